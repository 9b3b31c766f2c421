"""Settings and flags of how a step is computed: precision, kernels, memory."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from util.errors import InputError

COMPILE_MODES = ("whole", "blocks")
MEMORY_MODES = ("high", "medium", "low")
# Names of PyTorch's.
AMP_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ATTENTION_BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "math": "MATH",
}


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
