"""Sharded training (FSDP2): each process keeps its share of weights, gradients and Adam's moments.

Checkpoints hold whole tensors, the same as those of unsharded runs, so that a run may go on as
either.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from util.compute.distributed import is_main_process, world_size
from util.errors import InputError


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Spread a model's parameters over the processes, in place.

    A block's are gathered when it is computed and let go again, so that a device holds its share of
    the model and one or two whole blocks. The model may be on the CPU before.

    Args:
        model: whose `forward` is what is trained.
        blocks: parts of it that are computed one after another.
        device: of this process.

    Raises:
        InputError: there is only one process.
    """
    if world_size() == 1:
        raise InputError("--fsdp spreads a model over processes: start several by torchrun")
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, wherever its parts are; all processes have to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(content: object) -> object:
    """Nested dicts and lists with whole tensors, in the host's memory, instead of shares.

    Only the main process gets them, the others get None for each; all have to call it.
    """
    if isinstance(content, dict):
        return {key: gather_state(value) for key, value in content.items()}
    if isinstance(content, list):
        return [gather_state(value) for value in content]
    if isinstance(content, DTensor):
        tensor = content.full_tensor()
        return tensor.cpu() if is_main_process() else None
    return content


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The share of a whole tensor that goes with a parameter's; the tensor itself for whole ones.

    Args:
        tensor: the same on all processes.
        parameter: of a model, perhaps a share; one of another shape, as the count of Adam's steps
            is beside its moments, has nothing to say.
    """
    if not isinstance(parameter, DTensor) or parameter.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load whole tensors into a model, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({n: shard_like(t, own[n]) if n in own else t for n, t in state.items()})


def load_optimizer_state(optimizer: Optimizer, state: dict) -> None:
    """Load a `state_dict` of whole tensors into the optimizer of a model, sharded or not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shares = {
        index: {
            name: shard_like(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shares})


@contextmanager
def unsharded(model: nn.Module, build: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """Context with a model that any process can compute with alone, for measuring.

    Args:
        model: a sharded one, which is copied, or another, which is given back.
        build: makes one of the same kind.
    """
    if not isinstance(model, FSDPModule):
        yield model
        return
    with torch.device("meta"):
        copy = build()
    state = {name: full_tensor(tensor) for name, tensor in model.state_dict().items()}
    copy.load_state_dict(state, assign=True)
    del state
    yield copy
    copy.to("meta")  # whoever still knows it keeps no weights alive
