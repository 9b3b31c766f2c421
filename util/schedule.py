"""Learning-rate schedule: the peak (App. A.6) and the curve over a run (Table 10)."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

from util.errors import counted
from util.settings.optim import OptimSettings

LR_FALLS = (8 / 9, 26 / 27)  # of a run, in `step_lr`
FEW_STEPS = 4  # per epoch
SMALL_BATCH = 64  # below, rates that are proportional to the batch size are too low


class Steps(Protocol):
    """Numbers that determine the learning rate; a training loader has them."""

    effective_batch_size: int
    steps_per_epoch: int


class LearningRate(NamedTuple):
    """A run's peak learning rate, and the rate at each step."""

    peak: float
    at: Callable[[int], float]
    origin: str
    """Where the peak comes from, for the log."""


def scaled_lr(
    blr: float, effective_batch_size: int, *, mask_ratio: float = 1.0, pred_ratio: float = 1.0
) -> float:
    """Peak learning rate: blr * batch / 256 * γ / p (App. A.6).

    γ / p accounts for the larger variance of a loss over fewer patches; it is 1 when all masked
    patches are predicted, as in MAE, and when nothing is masked.
    """
    return blr * effective_batch_size / 256 * pred_ratio / mask_ratio


def cosine_lr(step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0 to lr, then half a cosine down to min_lr (Table 10).

    Args:
        step: optimizer steps done so far, in [0, total_steps].
        lr: the peak, reached after warmup_steps.
        min_lr: the floor, reached at total_steps.
        warmup_steps: 0 starts at the peak.
    """
    rates, steps = (lr, min_lr), (warmup_steps, total_steps)
    return _warm_up_and_fall(step, rates, steps, lambda done: 0.5 * (1 + math.cos(math.pi * done)))


def linear_lr(step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0 to lr, then linearly down to min_lr (segmentation: poly with power 1).

    Args:
        step, lr, min_lr, warmup_steps, total_steps: see `cosine_lr`.
    """
    return _warm_up_and_fall(step, (lr, min_lr), (warmup_steps, total_steps), lambda done: 1 - done)


def step_lr(step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0 to lr, then a tenth of it twice, as in ViTDet.

    Args:
        step, lr, min_lr, warmup_steps, total_steps: see `cosine_lr`.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    falls = sum(step >= round(fraction * total_steps) for fraction in LR_FALLS)
    return max(min_lr, lr * 0.1**falls)


def _warm_up_and_fall(
    step: int,
    rates: tuple[float, float],
    steps: tuple[int, int],
    fall: Callable[[float], float],
) -> float:
    """`fall` maps the fraction of the steps after warm-up that are done to what is left of lr."""
    (lr, min_lr), (warmup_steps, total_steps) = rates, steps
    if step < warmup_steps:
        return lr * step / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return min_lr + (lr - min_lr) * fall(min(1.0, done))


def lr_schedule(
    *,
    lr: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: int,
    steps_per_epoch: int,
    curve: Callable[..., float] = cosine_lr,
) -> Callable[[int], float]:
    """Function from a step to its learning rate; `curve` is, for example, `cosine_lr`."""
    return partial(
        curve,
        lr=lr,
        min_lr=min_lr,
        warmup_steps=round(warmup_epochs * steps_per_epoch),
        total_steps=epochs * steps_per_epoch,
    )


def plan_learning_rate(
    optim: OptimSettings,
    steps: Steps,
    *,
    mask_ratio: float = 1.0,
    pred_ratio: float = 1.0,
    curve: Callable[..., float] = cosine_lr,
) -> LearningRate:
    """Determine a run's learning rate.

    Args:
        optim: with epochs, warmup_epochs, and blr or lr set.
        curve: see `lr_schedule`.
    """
    peak, origin = optim.lr, "as given"
    if peak is None:
        ratios = {"mask_ratio": mask_ratio, "pred_ratio": pred_ratio}
        peak = scaled_lr(optim.blr, steps.effective_batch_size, **ratios)
        scale = "batch / 256" + (" x pred_ratio / mask_ratio" if mask_ratio < 1 else "")
        origin = f"= {optim.blr:g} x {peak / optim.blr:.4g} ({scale})"
    at = lr_schedule(
        lr=peak,
        min_lr=optim.min_lr,
        warmup_epochs=optim.warmup_epochs,
        epochs=optim.epochs,
        steps_per_epoch=steps.steps_per_epoch,
        curve=curve,
    )
    return LearningRate(peak, at, origin)


def odd_settings(
    optim: OptimSettings, steps: Steps, lr: LearningRate, num_images: int, *, in_steps: bool = False
) -> list[str]:
    """Warn of settings that fit the data badly; each warning names the flag to change.

    Args:
        optim: with all defaults filled in.
        num_images: crops in a pass over the training images.
        in_steps: whether the length of the run is given in steps, not in epochs.
    """
    batch, per_epoch = steps.effective_batch_size, steps.steps_per_epoch
    warnings = []
    fewer = min(num_images, 2 ** max(3, int(math.log2(num_images / 16))))  # images of a step
    if batch > num_images:
        text = f"a step of {batch} images is more than the {counted(num_images, 'training image')}"
        if optim.lr is None and not in_steps:
            text += f", and the learning rate is scaled for {batch}"
        warnings.append(f"{text}: {_lower_batch(optim, fewer)}")
    elif per_epoch <= FEW_STEPS and not in_steps and fewer < batch:
        text = f"an epoch of {num_images} images has only {counted(per_epoch, 'step')}"
        warnings.append(f"{text}: {_lower_batch(optim, fewer)}")
    if optim.lr is None and batch < SMALL_BATCH and not warnings:
        warnings.append(
            f"lr {lr.peak:.2g} is scaled down for {counted(batch, 'image')} a step and may be too "
            f"low: give one, such as --lr {2 * optim.blr:g}"
        )
    total, warmup = optim.epochs * per_epoch, round(optim.warmup_epochs * per_epoch)
    if 2 * warmup > total:
        flag = "--warmup_iters" if in_steps else "--warmup_epochs"
        share = "every step" if warmup >= total else f"{warmup} of {counted(total, 'step')}"
        verb = "is" if warmup >= total else "are"
        warnings.append(f"{share} {verb} warm-up of the learning rate: lower {flag}")
    if optim.min_lr >= lr.peak:
        warnings.append(
            f"the learning rate never falls: its peak is {lr.peak:.2g}, and --min_lr "
            f"{optim.min_lr:g} is not below it"
        )
    return warnings


def _lower_batch(optim: OptimSettings, size: int) -> str:
    """Advice to take this many images in each step."""
    flag = "--batch_size" if optim.effective_batch_size is None else "--effective_batch_size"
    advice = f"lower {flag}, so that a step has about {counted(size, 'image')}"
    if optim.lr is None and size < SMALL_BATCH:
        advice += f", and give --lr, such as {2 * optim.blr:g}"
    return advice
