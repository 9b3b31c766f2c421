"""What a step keeps for its backward pass, and what it computes again there.

A policy that is put on a model's blocks from outside. A block keeps what it is handed and the
outputs of its matrix products, which are the cost; norms, GELUs, attention and casts of weights are
computed again.
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

MEMORY_MODES = ("high", "medium", "low")
# Each matrix product -> the shape (out, in) of its layer's weight, from the product's arguments.
PRODUCTS = {
    torch.ops.aten.addmm.default: lambda bias, x, weight: weight.shape[::-1],
    torch.ops.aten.mm.default: lambda x, weight: weight.shape[::-1],
    ONEDNN_LINEAR: lambda proxy, x, weight, bias: weight.shape,
}
# Fused kernels of GPUs, whose outputs are a tenth of what medium keeps and take long to compute.
ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)
# Layers whose product is computed again.
AGAIN = {"medium": (), "low": ("mlp.fc1",)}
# A block's last layer. PyTorch stops computing again once it has the last tensor that the backward
# pass needs, this layer's input; unless drop path comes after it, which keeps what it drew.
LAST = "mlp.fc2"


def set_memory(
    blocks: Iterable[nn.Module],
    mixer: nn.Module | None,
    memory: str,
    *,
    attention: Sequence[object] = ATTENTION,
) -> None:
    """Choose what a step keeps; the results are the same, to the bit on a CPU.

    Args:
        blocks: modules that run one after another.
        mixer: inter-block attention, if there is any.
        memory: one of MEMORY_MODES; "high" keeps everything, and takes an earlier choice back.
        attention: operations whose outputs medium keeps as well.
    """
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory is one of {MEMORY_MODES}, not {memory!r}")
    for module in (*blocks, *([] if mixer is None else [mixer])):
        vars(module).pop("forward", None)
        if memory != "high":
            draws = has_drop_path(module)
            dropped = AGAIN[memory] if draws else (*AGAIN[memory], LAST)
            policy = keep_products_but(module, dropped, attention if memory == "medium" else ())
            contexts = partial(create_selective_checkpoint_contexts, policy)
            # On the object: names, hooks and the modules inside stay as they are. Not a closure,
            # so that a deep copy of the module calls itself.
            module.forward = partial(recomputed, module.forward, contexts, draws)


def has_drop_path(module: nn.Module) -> bool:
    """Whether a module draws random numbers in training."""
    return any(isinstance(m, DropPath) and m.drop_prob for m in module.modules())


def recomputed(
    forward: Callable[..., Tensor], contexts: Callable, draws: bool, *inputs: object
) -> Tensor:
    """Call a module's forward, and keep of its inside what the policy says."""
    if not torch.is_grad_enabled():
        return forward(*inputs)
    return checkpoint(
        forward, *inputs, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts
    )


def keep_products_but(
    module: nn.Module, dropped: Sequence[str], others: Sequence[object]
) -> Callable[..., CheckpointPolicy]:
    """The policy that keeps outputs of a module's products and of some other operations.

    An operation does not know its layer, so the shape of the weight tells. Where layers share a
    shape, more or less is kept; results are the same.

    Args:
        module: a block or a mixer.
        dropped: names of linear layers in it whose outputs are not kept.
        others: operations.
    """
    shapes = {layer.weight.shape for name, layer in module.named_modules() if name in dropped}

    def policy(
        context: SelectiveCheckpointContext, op: object, *args: object, **kwargs: object
    ) -> CheckpointPolicy:
        if op in others or (op in PRODUCTS and PRODUCTS[op](*args) not in shapes):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
