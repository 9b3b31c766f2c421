"""What a step keeps for its backward pass, and what it computes again there."""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MEMORY_MODES = ("high", "medium", "low")


class Recomputing(nn.Module):
    """A module that can compute parts of itself twice instead of keeping what is inside them."""

    memory = "high"

    def recomputed(
        self, function: Callable[..., Tensor], *inputs: Tensor, draws: bool = False
    ) -> Tensor:
        """Call a function and, unless memory is high, keep nothing but its inputs.

        The backward pass computes again what it needs of the inside, up to the last matrix product,
        whose result it does not need.

        Args:
            function: of the inputs, and of parameters.
            inputs: tensors.
            draws: whether the function draws random numbers, which have to be the same again.
        """
        if self.memory == "high" or not torch.is_grad_enabled():
            return function(*inputs)
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=draws)


def set_memory(model: nn.Module, memory: str) -> None:
    """Choose what a model keeps, one of MEMORY_MODES; results differ by rounding at most."""
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory is one of {MEMORY_MODES}, not {memory!r}")
    for module in model.modules():
        if isinstance(module, Recomputing):
            module.memory = memory
