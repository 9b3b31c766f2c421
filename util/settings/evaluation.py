"""Settings and flags of evaluation: during pre-training, of a task, and of whole images."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from util.arguments import natural_int, positive_int
from util.errors import InputError

KNN_EVERY = 20  # epochs


@dataclass(frozen=True)
class MonitorSettings:
    """Epochs between measurements, and what pictures show; see the flags.

    Raises:
        InputError: see `check_show_channels`.
    """

    eval_every: int = 20
    knn_every: int | None = None
    """0: never; None: KNN_EVERY if the images allow it."""
    knn_images: int = 50_000
    visualize_every: int | None = None
    """None: after 0, 1, 2, 5, 10, 20, 50, ... epochs."""
    show_channels: list[int] | None = None

    def __post_init__(self) -> None:
        check_show_channels(self.show_channels)


def add_monitor_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of MonitorSettings."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval_every",
        type=positive_int,
        default=MonitorSettings.eval_every,
        help="epochs between measurements of validation loss and PSNR (%(default)s)",
    )
    group.add_argument(
        "--knn_every",
        type=natural_int,
        help=f"epochs between measurements of k-NN accuracy, 0 for none ({KNN_EVERY} with labels "
        "and validation images)",
    )
    group.add_argument(
        "--knn_images",
        type=positive_int,
        default=MonitorSettings.knn_images,
        metavar="N",
        help="training images that k-NN compares with, evenly spaced; fewer are faster and give "
        "lower accuracies (%(default)s)",
    )
    group.add_argument(
        "--visualize_every",
        type=positive_int,
        metavar="N",
        help="draw reconstructions every N epochs, and after the last (after 0, 1, 2, 5, 10, 20, "
        "50, ... epochs, and the last)",
    )
    add_show_channels_arg(group)


def add_show_channels_arg(group: argparse._ActionsContainer) -> None:
    """Add the flag for what pictures show of images with any number of channels."""
    group.add_argument(
        "--show_channels",
        type=positive_int,
        nargs="+",
        metavar="N",
        help="channels that pictures show, numbered from 1: one in gray, or three as red, green "
        "and blue (the first three)",
    )


def check_show_channels(numbers: Sequence[int] | None) -> None:
    """Raise InputError unless one or three channels are shown."""
    if numbers is not None and len(numbers) not in (1, 3):
        raise InputError("--show_channels takes one channel, for gray, or three, for colors")


MODES = ("slide", "whole")


@dataclass(frozen=True)
class WindowSettings:
    """How whole images are predicted; see the flags."""

    eval_mode: str = "slide"
    stride: int | None = None
    window_batch: int = 8


def add_window_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of WindowSettings."""
    group = parser.add_argument_group("prediction of whole images")
    group.add_argument(
        "--eval_mode",
        choices=MODES,
        default=WindowSettings.eval_mode,
        help="average overlapping windows of the size of the training crops (slide), or take the "
        "image at once, with positions resampled (whole) (%(default)s)",
    )
    group.add_argument(
        "--stride",
        type=positive_int,
        metavar="PX",
        help="distance of windows (two thirds of the crop's shorter side, 341 of 512)",
    )
    group.add_argument(
        "--window_batch",
        type=positive_int,
        default=WindowSettings.window_batch,
        help="windows computed together (%(default)s)",
    )


TaskName = Literal["classification", "multilabel", "regression"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
# Choices of --best_by -> (metric, whether the lowest is best), and those that a task has, its
# default first.
BEST_BY = {
    "top1": ("val_top1", False),
    "balanced": ("val_balanced", False),
    "map": ("val_map", False),
    "mae": ("val_mae", True),
    "loss": ("val_loss", True),
}
CHOICES = {
    "classification": ("top1", "balanced", "loss"),
    "multilabel": ("map", "loss"),
    "regression": ("mae", "loss"),
}


@dataclass(frozen=True)
class TaskSettings:
    """What a head is trained for; see the flags.

    Raises:
        InputError: a setting is of another task.
    """

    task: str = "classification"
    class_weights: str | None = None
    best_by: str | None = None

    def __post_init__(self) -> None:
        choices = CHOICES[self.task]
        if self.best_by not in (None, *choices):
            raise InputError(
                f"--best_by {self.best_by} is not measured with --task {self.task}: choose "
                f"{', '.join(choices[:-1])} or {choices[-1]}"
            )
        if self.class_weights and self.task == "regression":
            raise InputError("--class_weights is for classes: leave it out with --task regression")

    @property
    def best(self) -> tuple[str, bool]:
        """The metric of the best epoch, and whether the lowest is best."""
        return BEST_BY[self.best_by or CHOICES[self.task][0]]


def add_task_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of TaskSettings."""
    group = parser.add_argument_group("task")
    group.add_argument(
        "--task",
        choices=TASKS,
        default=TaskSettings.task,
        help="one class for each image, any number of classes, or a number; the last two need "
        "--data_csv (%(default)s)",
    )
    group.add_argument(
        "--class_weights",
        choices=("balanced",),
        help="weight classes in the loss inversely to their numbers of images (all alike)",
    )
    group.add_argument(
        "--best_by",
        choices=BEST_BY,
        help="what the best epoch is chosen by: top-1 or balanced accuracy, mAP, mean absolute "
        "error, or the loss; among equals, the lower loss (top1; map and mae of the other tasks)",
    )
