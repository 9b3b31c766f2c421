"""The optimizers and their parameter groups (Tables 10 and 11, App. B.1)."""

import torch.nn as nn
from timm.optim import Lars, param_groups_layer_decay, param_groups_weight_decay
from torch.optim import AdamW, Optimizer


def build_adamw(model: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> AdamW:
    """AdamW with MAE's rule: no decay for biases and other one-dimensional parameters.

    Tokens and mixing weights have more dimensions and do decay, as in the paper's runs.
    """
    groups = param_groups_weight_decay(model, weight_decay=weight_decay)
    # Fused: one kernel for the whole update, and no host synchronisation under fp16 scaling.
    return AdamW(groups, lr=0.0, betas=betas, fused=True)


def build_layer_decay_adamw(
    model: nn.Module, *, weight_decay: float, layer_decay: float, betas: tuple[float, float]
) -> AdamW:
    """AdamW of fine-tuning: a layer learns slower the further it is from the head (Table 11).

    MAE's rule: layer i of n, embeddings first, head and norm last, has the rate lr * decay^(n - i).
    One-dimensional parameters, class token and positions do not decay.

    Args:
        model: a VisionTransformer; its `group_matcher` says what a layer is.
        weight_decay: of the others.
        layer_decay: 1 is the same rate everywhere.
        betas: of Adam.
    """
    groups = param_groups_layer_decay(
        model,
        weight_decay=weight_decay,
        no_weight_decay_list=("cls_token", "pos_embed"),
        layer_decay=layer_decay,
    )
    return AdamW(groups, lr=0.0, betas=betas, fused=True)


def build_lars(model: nn.Module, *, weight_decay: float, momentum: float = 0.9) -> Lars:
    """MAE's LARS for linear probing, of the parameters that are trained.

    Matrices get a trust ratio, vectors neither that nor weight decay. timm's LARS leaves the ratio
    out wherever the decay is zero, unless told otherwise. With a decay, timm's ratio divides by
    |g| + decay |w|, where MAE's has |g + decay w|; the recipe has none.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "always_adapt": True},
        {"params": vectors, "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars(groups, lr=0.0, momentum=momentum, trust_coeff=0.001, eps=0.0)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of the next step in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
