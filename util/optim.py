"""Optimizers and their parameter groups (Tables 10 and 11, App. B.1)."""

import logging

import torch.nn as nn
from timm.optim import Lars, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch.optim import AdamW, Optimizer

_logger = logging.getLogger(__name__)


def build_adamw(model: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> AdamW:
    """AdamW with MAE's rule: no decay for biases and other one-dimensional parameters.

    Tokens and mixing weights have more dimensions and do decay, as in the paper's runs.
    """
    groups = param_groups_weight_decay(model, weight_decay=weight_decay)
    # Fused: one kernel for the whole update, without host synchronization under fp16 scaling.
    return AdamW(groups, lr=0.0, betas=betas, fused=True)


def build_layer_decay_adamw(
    model: nn.Module, *, weight_decay: float, layer_decay: float, betas: tuple[float, float]
) -> AdamW:
    """AdamW for fine-tuning: learning rates fall with the distance from the head (Table 11).

    MAE's rule: layer i of n, embeddings first, head and norm last, has the rate lr * decay^(n - i).
    One-dimensional parameters, class token and position embeddings have no weight decay.

    Args:
        model: its `group_matcher` defines the layers.
        layer_decay: 1 gives every layer the same rate.
    """
    groups = param_groups_layer_decay(
        model,
        weight_decay=weight_decay,
        no_weight_decay_list=("cls_token", "pos_embed"),
        layer_decay=layer_decay,
    )
    return AdamW(groups, lr=0.0, betas=betas, fused=True)


def build_lars(model: nn.Module, *, weight_decay: float, momentum: float = 0.9) -> Lars:
    """MAE's LARS for linear probing, on the trainable parameters.

    Matrices get a trust ratio; vectors get neither that nor weight decay. timm's LARS skips the
    ratio where the decay is zero, unless `always_adapt` is set. With a decay, timm's ratio divides
    by |g| + decay |w| and MAE's by |g + decay w|; the recipe has no decay.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "always_adapt": True},
        {"params": vectors, "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars(groups, lr=0.0, momentum=momentum, trust_coeff=0.001, eps=0.0)


def build_ema(model: nn.Module, decay: float | None, num_steps: int) -> ModelEmaV3 | None:
    """Build a moving average of the weights that follows them closely at first; None without decay.

    The decay of step n, counted from 0, is n / (n + 9) until it reaches `decay`, so an average is
    over the last tenth of a short run instead of over its random start.

    Args:
        num_steps: of the run; a decay that it is too short for is warned of.
    """
    if decay is None:
        return None
    if decay**num_steps > 0.1:
        _logger.warning(
            "--ema %g averages over about %d steps, but the run has %d: the average is over about "
            "the last tenth of the steps so far instead",
            *(decay, round(1 / (1 - decay)), num_steps),
        )
    return ModelEmaV3(model, decay, use_warmup=True, warmup_gamma=9, warmup_power=1)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
