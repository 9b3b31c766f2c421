"""Selective recomputation (activation checkpointing) for the blocks of a model.

The policy is applied to a model's blocks from outside. A block saves its inputs and the outputs of
its matrix products, which cost most; norms, GELUs, attention and casts of weights are recomputed in
the backward pass.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn as nn
from timm.layers import DropPath
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from util.kernels import ONEDNN_LINEAR
from util.settings.compute import MEMORY_MODES

# For each matrix product, a function of its arguments: the weight's shape (out, in).
PRODUCTS = {
    torch.ops.aten.addmm.default: lambda bias, x, weight: weight.shape[::-1],
    torch.ops.aten.mm.default: lambda x, weight: weight.shape[::-1],
    ONEDNN_LINEAR: lambda proxy, x, weight, bias: weight.shape,
}
# Fused GPU kernels, whose outputs are a tenth of what medium saves and take long to compute.
ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
# Layers whose product is recomputed.
RECOMPUTED = {"medium": (), "low": ("mlp.fc1",)}
# A block's last layer. PyTorch stops recomputing once it has the last tensor that the backward pass
# needs: this layer's input, unless drop path follows it, which saves its draw.
LAST = "mlp.fc2"


def set_memory(
    blocks: Iterable[nn.Module],
    mixer: nn.Module | None,
    memory: str,
    *,
    attention: Sequence[object] = ATTENTION,
) -> None:
    """Choose what blocks save for backward; results are the same, bit for bit on a CPU.

    Args:
        mixer: inter-block attention, None without.
        memory: one of MEMORY_MODES; "high" saves everything and undoes an earlier choice.
        attention: operations whose outputs "medium" saves as well.
    """
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be one of {MEMORY_MODES}, not {memory!r}")
    for module in (*blocks, *([] if mixer is None else [mixer])):
        vars(module).pop("forward", None)
        if memory != "high":
            draws = has_drop_path(module)
            dropped = RECOMPUTED[memory] if draws else (*RECOMPUTED[memory], LAST)
            policy = recompute_policy(module, dropped, attention if memory == "medium" else ())
            contexts = partial(create_selective_checkpoint_contexts, policy)
            # Set on the object, so that names, hooks and submodules stay as they are. A partial,
            # not a closure, so that a deep copy of the module calls its own forward.
            module.forward = partial(checkpointed, module.forward, contexts, draws)


def has_drop_path(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training."""
    return any(isinstance(m, DropPath) and m.drop_prob for m in module.modules())


def checkpointed(
    forward: Callable[..., Tensor], contexts: Callable, draws: bool, *inputs: object
) -> Tensor:
    """Call a module's forward, saving the tensors that the policy chooses."""
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts
    )


def recompute_policy(
    module: nn.Module, dropped: Sequence[str], others: Sequence[object]
) -> Callable[..., CheckpointPolicy]:
    """Build a policy that saves the outputs of matrix products and of some other operations.

    An operation does not know its layer, so layers are recognized by their weight's shape. If
    layers share a shape, more or less is saved, with the same results.

    Args:
        module: a block or a mixer.
        dropped: names of its linear layers whose outputs are recomputed.
        others: further operations whose outputs are saved.
    """
    shapes = {layer.weight.shape for name, layer in module.named_modules() if name in dropped}

    def policy(
        context: SelectiveCheckpointContext, op: object, *args: object, **kwargs: object
    ) -> CheckpointPolicy:
        if op in others or (op in PRODUCTS and PRODUCTS[op](*args) not in shapes):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
