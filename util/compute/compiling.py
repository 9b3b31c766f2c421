"""torch.compile for the mains and benchmarks."""

import logging
from collections.abc import Iterable

import torch
import torch.nn as nn

from util.errors import InputError
from util.progress import waiting

# Compiled versions of one function. Blocks of two widths share it, and each needs versions for full
# batches, an epoch's last batch, validation images and figures; above PyTorch's limit of 8, further
# ones would run uncompiled.
RECOMPILE_LIMIT = 32

_logger = logging.getLogger(__name__)


def compile_model(
    model: nn.Module, mode: str | None, *, device: torch.device, blocks: Iterable[nn.Module] = ()
) -> None:
    """Compile a model's forward pass in place.

    Shapes are static. By default, PyTorch would compile code for any batch size once it meets the
    smaller last batch of an epoch, and run every later batch with that slower code.

    Args:
        mode: "whole" fuses most; "blocks" compiles equal blocks once, in a fraction of the time;
            None leaves the model as it is.
        blocks: parts of the model, for "blocks".

    Raises:
        InputError: torch.compile does not work on this machine.
    """
    if mode is None:
        return
    check_compiler(device)
    # Silences a warning about in-place operations under --memory: ours change no saved tensor.
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    if hasattr(torch.compiler.config, "recompile_limit"):
        torch.compiler.config.recompile_limit = RECOMPILE_LIMIT
    else:  # before PyTorch 2.10
        torch._dynamo.config.cache_size_limit = RECOMPILE_LIMIT
    _logger.info("the first step compiles the model, which takes a minute or more")
    for module in [model] if mode == "whole" else blocks:
        module.compile(dynamic=False)


@waiting("trying whether --compile works")
def check_compiler(device: torch.device) -> None:
    """Try to compile a trivial function.

    Raises:
        InputError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # compilers fail in many ways
        raise InputError(
            f"--compile does not work on this machine ({type(error).__name__}): install a C++ "
            "compiler and the Triton version that PyTorch requires, or leave --compile out"
        ) from error
