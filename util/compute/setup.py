"""Settings and setup of a model's computation: precision, kernels, memory, and placement."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from util.compute.precision import AMP_DTYPES, ATTENTION_BACKENDS, Precision
from util.compute.recompute import MEMORY_MODES, set_memory
from util.compute.sharding import shard
from util.errors import InputError
from util.optim import OptimSettings


@dataclass(frozen=True)
class ComputeSettings:
    """How a step is computed; see the flags.

    Raises:
        InputError: a setting cannot be combined with --fsdp.
    """

    amp: str | None = None
    attention_backend: str = "auto"
    compile: str | None = None
    memory: str = "high"
    fsdp: bool = False

    def __post_init__(self) -> None:
        if self.fsdp and self.compile:
            raise InputError("--compile cannot be combined with --fsdp: leave one of them out")
        if self.fsdp and self.amp == "fp16":
            raise InputError("--amp fp16 cannot be combined with --fsdp: use bf16 or fp32")


def place_model(
    model: nn.Module,
    compute: ComputeSettings,
    device: torch.device,
    example: Callable[[int], tuple],
    optim: OptimSettings | None = None,
    forward: Callable[..., Tensor] | None = None,
) -> Precision:
    """Move or shard a model to its device, set its memory mode, and build its Precision.

    Args:
        model: has transformer `blocks`, and possibly a `mixer` of feature maps.
        example: number of images -> inputs of the model.
        optim: settings of the training, if any; the attention kernel is tried with its batch size
            unless that is "auto".
        forward: the part of the model that `example` is for; None is all of it.

    Raises:
        InputError: there is only one process to shard over, or the chosen attention kernel cannot
            run the model.
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
    precision.check_attention_backend(model, example, batch_size, forward)
    return precision


def add_precision_args(
    parser: argparse.ArgumentParser, *, compile_modes: Sequence[str] = ("whole",)
) -> None:
    """Add the flags for precision and kernels; without `compile_modes`, none for compilation."""
    group = parser.add_argument_group("precision and kernels")
    group.add_argument(
        "--amp", choices=AMP_DTYPES, help="precision (bf16 if the device supports it, else fp32)"
    )
    group.add_argument(
        "--attention_backend",
        choices=("auto", *ATTENTION_BACKENDS),
        default=ComputeSettings.attention_backend,
        help="PyTorch's attention kernel; any but auto is forced, with no fallback (%(default)s)",
    )
    if not compile_modes:
        return
    how = ", or block by block, which compiles faster" if "blocks" in compile_modes else ""
    group.add_argument(
        "--compile",
        nargs="?",
        const="whole",
        choices=compile_modes,
        help=f"torch.compile the model as a whole{how} (off)",
    )


def add_memory_args(parser: argparse.ArgumentParser, *, fsdp: bool = True) -> None:
    """Add the flags for memory; `fsdp` says whether the program can shard its model."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--memory",
        choices=MEMORY_MODES,
        default=ComputeSettings.memory,
        help="what is kept for the backward pass, with the same results: everything, which is "
        "fastest (high); all but norms and activations (medium); without attention and the "
        "first layer of the MLPs, too (low) (%(default)s)",
    )
    if not fsdp:
        return
    group.add_argument(
        "--fsdp",
        action="store_true",
        help="shard weights, gradients and optimizer state over the processes, for models that do "
        "not fit on one GPU (off)",
    )
