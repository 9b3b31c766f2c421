"""Settings and flags of the images and masks of segmentation."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from util.arguments import integer, positive_float, positive_int
from util.errors import InputError
from util.normalization import PixelFormat
from util.settings.data import (
    PixelSettings,
    add_color_args,
    add_flip_args,
    add_pixel_args,
    add_reading_args,
)
from util.settings.evaluation import add_show_channels_arg, check_show_channels

ADE20K_NAMES = "objectInfo150.txt"


class Layout(NamedTuple):
    """Where a dataset has its files, and what its masks mean."""

    train: str
    val: str
    classes_file: str
    num_classes: int | None = None
    ignore_index: int = 255
    reduce_zero_label: bool = False
    short_side: int | None = None

    @property
    def first_label(self) -> int:
        """Label of the first class in the masks."""
        return int(self.reduce_zero_label)


# What --eval takes from the checkpoint unless it is given.
TRAINED = ("ignore_index", "reduce_zero_label", "short_side")
LAYOUTS = {
    "folder": Layout("train", "val", "classes.txt"),
    "ade20k": Layout(
        *("training", "validation", ADE20K_NAMES),
        num_classes=150,
        reduce_zero_label=True,
        short_side=512,
    ),
}


@dataclass(frozen=True)
class SegmentationSettings(PixelSettings):
    """Which images and masks to read, and how; see the flags.

    Raises:
        InputError: the normalization or the scales are invalid.
    """

    data_path: str | None = None
    dataset: str = "folder"
    classes: str | None = None
    nb_classes: int | None = None
    ignore_index: int | None = None
    reduce_zero_label: bool | None = None
    short_side: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    photometric: bool | None = None
    """None: for 8-bit RGB alone, see `read_as`."""
    hflip: float = 0.5
    vflip: float = 0.0
    show_channels: list[int] | None = None
    """In pictures, numbered from 1."""
    max_broken: float = 0.01
    num_workers: int = 0
    defaults: Layout | None = None
    """Of the layout; None: those of `dataset`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_show_channels(self.show_channels)
        if self.scale[0] > self.scale[1]:
            raise InputError(f"--scale takes the smaller factor first, not {self.scale}")

    def read_as(self, pixels: PixelFormat) -> "SegmentationSettings":
        """Return these settings for images of a format, such as that of the weights.

        Raises:
            InputError: colors shall vary that are not 8-bit RGB.
        """
        if self.photometric and not pixels.is_rgb8:
            raise InputError(
                "--photometric changes colors, which needs 8-bit RGB images, not those of "
                "--channels or --value_range: leave it out"
            )
        photometric = pixels.is_rgb8 if self.photometric is None else self.photometric
        return replace(self, photometric=photometric)

    def recipe(self) -> dict[str, object]:
        """What has to stay the same within a run, besides the images."""
        return {
            **{f"--{name}": getattr(self.layout, name) for name in TRAINED},
            "--scale": list(self.scale),
            "--photometric": self.photometric,
            "--hflip": self.hflip,
            "--vflip": self.vflip,
        }

    @property
    def root(self) -> Path:
        """The folder of the data.

        Raises:
            InputError: it is not given, or does not exist.
        """
        if self.data_path is None:
            raise InputError("--data_path is missing: give the folder of images and masks")
        if not Path(self.data_path).is_dir():
            raise InputError(
                f"{self.data_path} does not exist: give the folder of images and masks"
            )
        return Path(self.data_path)

    @property
    def layout(self) -> Layout:
        """The dataset's layout, with what the flags override."""
        given = {name: getattr(self, name) for name in TRAINED}
        layout = self.defaults or LAYOUTS[self.dataset]
        return layout._replace(**{name: v for name, v in given.items() if v is not None})

    def as_trained(self, checkpoint: dict) -> "SegmentationSettings":
        """Copy of the settings with a checkpoint's values for what is not given."""
        trained = {name: checkpoint[name] for name in TRAINED}
        return replace(self, defaults=LAYOUTS[self.dataset]._replace(**trained))


def add_segmentation_data_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of SegmentationSettings."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        help="folder with images/train, images/val, annotations/train and annotations/val, or "
        "ADE20K's ADEChallengeData2016",
    )
    group.add_argument(
        "--dataset",
        choices=LAYOUTS,
        default="folder",
        help="folder: masks have the names of their images and hold class indices, as index or "
        "palette PNG; ade20k: its published layout, 150 classes, label 0 unlabeled, short sides "
        "of 512 px (%(default)s)",
    )
    group.add_argument(
        "--classes",
        metavar="FILE",
        help="names of the classes, one on each line, with or without the index before it "
        "(classes.txt in DATA_PATH)",
    )
    group.add_argument(
        "--nb_classes",
        "--num_classes",
        type=positive_int,
        help="number of classes (that of the names)",
    )
    group.add_argument(
        "--ignore_index",
        type=integer,
        help="label of pixels that do not count (255)",
    )
    group.add_argument(
        "--reduce_zero_label",
        action=argparse.BooleanOptionalAction,
        help="label 0 does not count either, and the classes start at 1 (on for ade20k)",
    )
    group.add_argument(
        "--short_side",
        type=positive_int,
        metavar="PX",
        help="resize images to this short side before anything else; predictions are resized "
        "back (ade20k 512, else off)",
    )
    group.add_argument(
        "--scale",
        type=positive_float,
        nargs=2,
        default=SegmentationSettings.scale,
        metavar=("MIN", "MAX"),
        help="range of the factor by which a training image is resized (0.5 2)",
    )
    group.add_argument(
        "--photometric",
        action=argparse.BooleanOptionalAction,
        help="vary brightness, contrast, saturation and hue in training (on for 8-bit RGB images)",
    )
    add_flip_args(group)
    inherited = "from --finetune's file, else "
    add_pixel_args(group, inherited=inherited)
    add_color_args(group, inherited=inherited)
    add_show_channels_arg(group)
    add_reading_args(group)
