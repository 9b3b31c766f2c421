"""Settings and flags of optimization and fine-tuning (Tables 10 and 11)."""

import argparse
import math
from dataclasses import dataclass, replace

from util.arguments import fraction, natural_float, natural_int, positive_float, positive_int
from util.errors import InputError

Group = argparse._ArgumentGroup


@dataclass(frozen=True)
class OptimSettings:
    """Optimization settings; None is derived from the model or other settings.

    Raises:
        InputError: the effective batch size is undetermined or given twice, or the warm-up is as
            long as the run.
    """

    batch_size: int | str
    """Images per process and micro-step, or "auto"."""
    accum_iter: int = 1
    effective_batch_size: int | None = None
    epochs: int | None = None
    warmup_epochs: float | None = None
    blr: float | None = None
    lr: float | None = None
    min_lr: float = 0.0
    weight_decay: float = 0.0
    clip_grad: float | None = None

    def __post_init__(self) -> None:
        if self.batch_size == "auto" and self.effective_batch_size is None:
            raise InputError(
                "--batch_size auto needs --effective_batch_size, the images of a step: the paper's "
                "4096 for ImageNet, or 64 for a few thousand images"
            )
        if self.effective_batch_size is not None and self.accum_iter > 1:
            raise InputError("--effective_batch_size sets --accum_iter: give only one of them")
        if None not in (self.warmup_epochs, self.epochs) and self.warmup_epochs >= self.epochs:
            raise InputError(
                f"--warmup_epochs {self.warmup_epochs:g} must be below --epochs {self.epochs}: "
                "otherwise, the learning rate never reaches its peak"
            )

    def with_defaults(self, **defaults: float) -> "OptimSettings":
        """Copy of the settings in which these defaults replace None."""
        return replace(self, **{n: v for n, v in defaults.items() if getattr(self, n) is None})


@dataclass(frozen=True)
class IterationSettings:
    """Optimization settings of runs whose length is a number of steps; an epoch is `eval_every`.

    Raises:
        InputError: the length is given twice, `eval_every` does not divide it, or see
            OptimSettings.
    """

    batch_size: int
    max_iters: int | None
    """None: see `with_passes`."""
    lr: float
    epochs: int | None = None
    """Passes over the images, instead of `max_iters`."""
    accum_iter: int = 1
    effective_batch_size: int | None = None
    eval_every: int | None = None
    """None: a tenth of the run if that is a whole number, else the run; or one pass."""
    warmup_iters: int | None = None
    min_lr: float = 0.0
    weight_decay: float = 0.0
    clip_grad: float | None = None

    def __post_init__(self) -> None:
        if self.max_iters is None:
            return
        if self.epochs is not None:
            raise InputError("--max_iters and --epochs both set the length: give only one of them")
        if self.max_iters % self.steps_per_epoch:
            raise InputError(
                f"the run's {self.max_iters} steps are not a multiple of --eval_every "
                f"{self.steps_per_epoch}: change the length or --eval_every"
            )
        if self.warmup_iters is not None and self.warmup_iters >= self.max_iters:
            raise InputError(
                f"--warmup_iters {self.warmup_iters} must be below the run's {self.max_iters} "
                "steps: otherwise, the learning rate never reaches its peak"
            )
        self.optim()

    def with_passes(
        self, passes: int, num_images: int, effective_batch_size: int
    ) -> "IterationSettings":
        """Copy whose length is set: `epochs`, else `passes`, unless `max_iters` is."""
        if self.max_iters is not None:
            return self
        steps = math.ceil(num_images / effective_batch_size)
        max_iters = (self.epochs or passes) * steps
        eval_every = self.eval_every or steps
        return replace(self, max_iters=max_iters, epochs=None, eval_every=eval_every)

    @property
    def steps_per_epoch(self) -> int:
        """Steps between evaluations."""
        tenth, rest = divmod(self.max_iters, 10)
        return self.eval_every or (self.max_iters if rest else tenth)

    def optim(self, *, warmup_iters: int = 0) -> OptimSettings:
        """Return the same in epochs.

        Args:
            warmup_iters: default of the setting, at most a tenth of the run.
        """
        warmup_iters = min(warmup_iters, self.max_iters // 10)
        if self.warmup_iters is not None:
            warmup_iters = self.warmup_iters
        names = ("batch_size", "accum_iter", "effective_batch_size")
        names += ("lr", "min_lr", "weight_decay", "clip_grad")
        return OptimSettings(
            epochs=self.max_iters // self.steps_per_epoch,
            warmup_epochs=warmup_iters / self.steps_per_epoch,
            **{name: getattr(self, name) for name in names},
        )


@dataclass(frozen=True)
class FineTuneSettings:
    """How fine-tuning treats a pre-trained encoder; None depends on the model's size.

    Raises:
        InputError: a setting would have no effect, or no end.
    """

    layer_decay: float | None = None
    drop_path: float | None = None
    ema: float | None = None
    """Decay of the moving average of the weights; None keeps none."""

    def __post_init__(self) -> None:
        if self.ema == 1:
            raise InputError("--ema 1 would never update the average: lower it")
        if self.drop_path == 1:
            raise InputError("--drop_path 1 would skip the last block entirely: lower it")


def batch_size_choice(text: str) -> int | str:
    """An integer of at least 1, or "auto"."""
    return text if text == "auto" else positive_int(text)


def add_optim_args(
    parser: argparse.ArgumentParser,
    *,
    batch_size: int,
    epochs: int | None,
    blr: float | None,
    weight_decay: float,
    warmup_epochs: str = "EPOCHS / 20",
    min_lr: float = 0.0,
    auto_batch_size: bool = False,
) -> None:
    """Add the flags of OptimSettings; `epochs` and `blr` of None depend on the model's size."""
    by_size = "by model size"
    group = parser.add_argument_group("optimization")
    _add_batch_args(group, batch_size, auto_batch_size=auto_batch_size)
    group.add_argument(
        "--epochs",
        type=positive_int,
        default=epochs,
        help=f"number of epochs ({epochs or by_size})",
    )
    group.add_argument(
        "--warmup_epochs",
        type=natural_float,
        help=f"epochs of learning-rate warm-up ({warmup_epochs})",
    )
    group.add_argument(
        "--blr",
        type=positive_float,
        default=blr,
        help=f"base learning rate, for a batch size of 256 ({blr or by_size})",
    )
    group.add_argument(
        "--lr",
        type=positive_float,
        help="peak learning rate, taken as it is (BLR x effective batch size / 256, in "
        "pre-training also x PRED_RATIO / MASK_RATIO)",
    )
    _add_step_args(group, min_lr=min_lr, weight_decay=weight_decay)


def add_iteration_args(
    parser: argparse.ArgumentParser,
    *,
    batch_size: int,
    max_iters: int | None,
    warmup_iters: int,
    lr: float,
    weight_decay: float,
) -> None:
    """Add the flags of IterationSettings; without `max_iters`, also one for epochs."""
    group = parser.add_argument_group("optimization")
    _add_batch_args(group, batch_size, auto_batch_size=False)
    group.add_argument(
        "--max_iters",
        type=positive_int,
        default=max_iters,
        help=f"steps of the run ({max_iters or 'EPOCHS over all images'})",
    )
    every = "MAX_ITERS / 10 if that is a whole number, else MAX_ITERS"
    if max_iters is None:
        every += "; with EPOCHS, each"
        group.add_argument(
            "--epochs",
            type=positive_int,
            help="length of the run in passes over the training images (depends on the model's "
            "size)",
        )
    group.add_argument(
        "--eval_every",
        type=positive_int,
        metavar="STEPS",
        help=f"steps between evaluations, which are the log's epochs ({every})",
    )
    group.add_argument(
        "--warmup_iters",
        type=natural_int,
        help=f"steps of learning-rate warm-up ({warmup_iters}, at most MAX_ITERS / 10)",
    )
    group.add_argument(
        "--lr",
        type=positive_float,
        default=lr,
        help="peak learning rate, for the batch size as it is (%(default)s)",
    )
    _add_step_args(group, min_lr=0.0, weight_decay=weight_decay)


def add_finetune_args(
    parser: argparse.ArgumentParser,
    *,
    layer_decay: float | None = None,
    drop_path: float | None = None,
) -> Group:
    """Add the flags of FineTuneSettings, and return their group for further ones."""
    by_size = "depends on the model's size"
    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--layer_decay",
        type=fraction,
        default=layer_decay,
        help=f"decay of the learning rate from layer to layer ({layer_decay or by_size})",
    )
    group.add_argument(
        "--drop_path",
        type=fraction,
        default=drop_path,
        help="drop-path rate of the last block; the rates rise linearly from 0 "
        f"({drop_path or by_size})",
    )
    group.add_argument(
        "--ema",
        type=fraction,
        metavar="DECAY",
        help="keep and evaluate a moving average of the weights; a decay such as 0.9999, lower at "
        "the start of a run (off)",
    )
    return group


def _add_batch_args(group: Group, batch_size: int, *, auto_batch_size: bool) -> None:
    auto = ", auto for as many as fit in memory, with --effective_batch_size"
    group.add_argument(
        "--batch_size",
        type=batch_size_choice if auto_batch_size else positive_int,
        default=batch_size,
        help="images per process and micro-step"
        + (auto if auto_batch_size else "")
        + " (%(default)s)",
    )
    group.add_argument(
        "--accum_iter", type=positive_int, default=1, help="micro-steps per step (%(default)s)"
    )
    group.add_argument(
        "--effective_batch_size",
        type=positive_int,
        metavar="N",
        help="images per step over all processes; sets --accum_iter (BATCH_SIZE x ACCUM_ITER x "
        "processes)",
    )


def _add_step_args(group: Group, *, min_lr: float, weight_decay: float) -> None:
    group.add_argument(
        "--min_lr",
        type=natural_float,
        default=min_lr,
        help="lowest learning rate after the warm-up (%(default)s)",
    )
    group.add_argument(
        "--weight_decay", type=natural_float, default=weight_decay, help="(%(default)s)"
    )
    group.add_argument("--clip_grad", type=positive_float, help="maximum gradient norm (off)")
