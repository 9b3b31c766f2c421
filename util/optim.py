"""The optimizer of pre-training and its parameter groups (Table 10)."""

import torch.nn as nn
from timm.optim import param_groups_weight_decay
from torch.optim import AdamW, Optimizer


def build_adamw(model: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> AdamW:
    """AdamW with MAE's rule: no decay for biases and other one-dimensional parameters.

    Tokens and mixing weights have more dimensions and do decay, as in the paper's runs.
    """
    groups = param_groups_weight_decay(model, weight_decay=weight_decay)
    # Fused: one kernel for the whole update, and no host synchronisation under fp16 scaling.
    return AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of the next step in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
