"""Sharded training (FSDP2): each process keeps a shard of weights, gradients and Adam's moments.

Checkpoints contain full tensors, as in unsharded runs, so that a run can continue as either.
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
    """Shard a model's parameters over the processes, in place.

    A block's parameters are gathered while it is computed, so that a device holds its shard of the
    model and one or two full blocks. The model may be on the CPU before.

    Args:
        model: is trained through its `forward`.
        blocks: its parts, which run one after another.

    Raises:
        InputError: there is only one process.
    """
    if world_size() == 1:
        raise InputError("--fsdp needs several processes: start the run with torchrun")
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; return any other tensor as it is. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(content: object) -> object:
    """Copy nested dicts and lists with every sharded tensor gathered, in host memory.

    Only the main process gets the tensors, the others None in their place; all must call it.
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
    """Shard a full tensor like a parameter.

    Returns the tensor itself if the parameter is not sharded or has another shape, as Adam's step
    count has.

    Args:
        tensor: the same on all processes.
    """
    if not isinstance(parameter, DTensor) or parameter.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load full tensors into a model, sharded or not."""
    own = model.state_dict()
    model.load_state_dict({n: shard_like(t, own[n]) if n in own else t for n, t in state.items()})


def load_optimizer_state(optimizer: Optimizer, state: dict) -> None:
    """Load a `state_dict` of full tensors into the optimizer of a model, sharded or not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {
        index: {
            name: shard_like(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shards})


@contextmanager
def unsharded(model: nn.Module, build: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """Context with an unsharded model, which each process can run independently for evaluation.

    Args:
        model: copied if it is sharded, else yielded as it is.
        build: makes a model of the same architecture.
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
    copy.to("meta")  # frees the weights even if a reference to the copy remains
