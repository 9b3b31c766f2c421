"""How a model is computed: number formats and kernels, memory, and where it lies."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn

from util.compute.precision import AMP_DTYPES, ATTENTION_BACKENDS, Precision
from util.compute.recompute import MEMORY_MODES, set_memory
from util.compute.sharding import shard
from util.errors import InputError
from util.optim import OptimSettings


@dataclass(frozen=True)
class ComputeSettings:
    """How a step is computed; see the flags.

    Raises:
        InputError: something does not go with --fsdp.
    """

    amp: str | None = None
    attention_backend: str = "auto"
    compile: str | None = None
    memory: str = "high"
    fsdp: bool = False

    def __post_init__(self) -> None:
        if self.fsdp and self.compile:
            raise InputError("--compile does not go with --fsdp: leave one of them out")
        if self.fsdp and self.amp == "fp16":
            raise InputError("--amp fp16 does not go with --fsdp: use bf16 or fp32")


def place_model(
    model: nn.Module,
    compute: ComputeSettings,
    device: torch.device,
    example: Callable[[int], tuple],
    optim: OptimSettings | None = None,
) -> Precision:
    """Prepare a model for its device: what it keeps, sharded or moved, and its number format.

    Args:
        model: with `blocks`, its transformer blocks, and perhaps a `mixer` of feature maps.
        compute: how a step is computed.
        device: of this process.
        example: number of images -> inputs of the model.
        optim: how it is trained, if it is: a GPU is tried with a batch of that size, where it is
            known yet.

    Raises:
        InputError: there are no processes to shard it over, or the chosen attention kernel cannot
            run it.
    """
    set_memory(model.blocks, getattr(model, "mixer", None), compute.memory)
    if compute.fsdp:
        shard(model, model.blocks, device)
    else:
        model.to(device)
    precision = Precision(
        compute.amp,
        device,
        clip_grad=optim and optim.clip_grad,
        attention_backend=compute.attention_backend,
    )
    batch_size = 1 if optim is None or optim.batch_size == "auto" else optim.batch_size
    precision.check_attention_backend(model, example, batch_size)
    return precision


def add_precision_args(
    parser: argparse.ArgumentParser, *, compile_modes: Sequence[str] = ("whole",)
) -> None:
    """In which numbers and by which kernels a step is computed."""
    group = parser.add_argument_group("precision and kernels")
    group.add_argument(
        "--amp", choices=AMP_DTYPES, help="number format (bf16 where the device has it, else fp32)"
    )
    group.add_argument(
        "--attention_backend",
        choices=("auto", *ATTENTION_BACKENDS),
        default=ComputeSettings.attention_backend,
        help="PyTorch's attention kernel; a forced one runs or fails (%(default)s)",
    )
    by_blocks = ", or block by block, which compiles faster" if "blocks" in compile_modes else ""
    group.add_argument(
        "--compile",
        nargs="?",
        const="whole",
        choices=compile_modes,
        help=f"torch.compile the model as a whole{by_blocks} (off)",
    )


def add_memory_args(parser: argparse.ArgumentParser) -> None:
    """What a step keeps for its backward pass."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--memory",
        choices=MEMORY_MODES,
        default=ComputeSettings.memory,
        help="what a step keeps of an image: high is all of it and fastest; medium computes norms "
        "and activations twice, low the MLPs as well, with the same results (%(default)s)",
    )
    group.add_argument(
        "--fsdp",
        action="store_true",
        help="spread weights, gradients and optimizer over the processes, for models that one GPU "
        "does not hold (off)",
    )
