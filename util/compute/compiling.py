"""torch.compile, as the mains and benchmarks use it."""

import logging
from collections.abc import Iterable

import torch
import torch.nn as nn

from util.errors import InputError

COMPILE_MODES = ("whole", "blocks")
# Versions of a function. Blocks of two widths share one, each for full batches, an epoch's tail,
# held-out images and pictures; beyond PyTorch's limit of 8 they would run uncompiled.
RECOMPILE_LIMIT = 32


def compile_model(
    model: nn.Module, mode: str | None, *, device: torch.device, blocks: Iterable[nn.Module] = ()
) -> None:
    """Compile a model's forward pass in place.

    Shapes are static. Left to itself, PyTorch answers the smaller last batch of an epoch with code
    for any batch size, and runs every later batch in that slower code.

    Args:
        model: whose `forward` is trained.
        mode: "whole" fuses most; "blocks" compiles equal blocks once, in a fraction of the time;
            None leaves the model as it is.
        device: where the model runs.
        blocks: parts of the model, for "blocks".

    Raises:
        InputError: torch.compile does not work on this machine.
    """
    if mode is None:
        return
    check_compiler(device)
    # Of operations in place under --memory. Those of our blocks change nothing that is kept.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    if hasattr(torch.compiler.config, "recompile_limit"):
        torch.compiler.config.recompile_limit = RECOMPILE_LIMIT
    else:  # before PyTorch 2.10
        torch._dynamo.config.cache_size_limit = RECOMPILE_LIMIT
    for module in [model] if mode == "whole" else blocks:
        module.compile(dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Compile a line of code.

    Raises:
        InputError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # compilers fail in many ways
        raise InputError(
            f"--compile does not work on this machine ({type(error).__name__}): install a C++ "
            "compiler and PyTorch's own Triton, or leave it out"
        ) from error
