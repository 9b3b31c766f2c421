"""The learning rate: its peak (App. A.6) and its course over a run (Table 10)."""

import math
from collections.abc import Callable
from functools import partial


def scaled_lr(
    blr: float, effective_batch_size: int, *, mask_ratio: float = 1.0, pred_ratio: float = 1.0
) -> float:
    """The peak learning rate: blr * batch / 256 * γ / p (App. A.6).

    γ / p matches the variance of a loss over fewer patches; it is 1 when all masked patches are
    predicted, as in MAE, and where nothing is masked.
    """
    return blr * effective_batch_size / 256 * pred_ratio / mask_ratio


def cosine_lr(step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0 to lr, then half a cosine down to min_lr (Table 10).

    Args:
        step: optimizer steps done so far, in [0, total_steps].
        lr: the peak, reached after warmup_steps.
        min_lr: the floor, reached at total_steps.
        warmup_steps: 0 starts at the peak.
        total_steps: of the whole run.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def lr_schedule(
    *, lr: float, min_lr: float, warmup_epochs: float, epochs: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """The rate of every step of a run, by its number; see `cosine_lr`."""
    return partial(
        cosine_lr,
        lr=lr,
        min_lr=min_lr,
        warmup_steps=round(warmup_epochs * steps_per_epoch),
        total_steps=epochs * steps_per_epoch,
    )
