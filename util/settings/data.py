"""Settings and flags for which images a run reads, and how."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from util.arguments import (
    finite_float,
    fraction,
    natural_float,
    number,
    positive_int,
    process_count,
)
from util.errors import InputError
from util.machine import default_workers
from util.normalization import AXES, PixelFormat, check_scale

ClassFolder = Literal["auto", "first", "last"]
CLASS_FOLDERS = get_args(ClassFolder)
# Those that timm lacks or reads differently.
OWN_DATASETS = ("packed", "digits", "inat2019")
USUAL_FRACTION = 0.01  # of the images, held out for validation in pre-training
LEAST_HELD_OUT, MOST_HELD_OUT = 8, 500  # images, but never more than a tenth
MIN_CROP_PCT = 0.1  # below it, a resized image takes more than 100 times a crop's memory

AUTO = "auto"  # to measure a mean and std
PACKED_INDEX = "packed.json"  # file that makes a folder one of packed images


@dataclass(frozen=True, kw_only=True)
class PixelSettings:
    """How images are read and normalized.

    Raises:
        InputError: see `check_pixel_flags`.
    """

    channels: int | None = None
    value_range: list[float] | None = None
    axes: str | None = None
    """These three are the images' format, see `pixels`."""
    mean: list[float] | str | None = None
    std: list[float] | str | None = None
    """"auto" to measure it on the training images."""

    def __post_init__(self) -> None:
        check_pixel_flags(self.pixels, self.mean, self.std)

    @property
    def pixels(self) -> PixelFormat:
        """How images are read, as far as the flags say it."""
        return pixel_format(self.channels, self.value_range, self.axes)


@dataclass(frozen=True)
class DataSettings(PixelSettings):
    """Which images to read, and how.

    Raises:
        InputError: the size or the normalization is invalid.
    """

    dataset: str | None = None
    """None to infer it, see `name`."""
    data_path: str | None = None
    val_path: str | None = None
    data_csv: str | None = None
    """Table of images and labels, below `data_path` if that is given, see `util.data.table`."""
    val_csv: str | None = None
    val_fraction: float | None = None
    """Share of the images that is held out for validation, see `util.data.held_out`."""
    num_samples: int | None = None
    """Images per epoch of a stream."""
    class_folder: ClassFolder = "auto"
    """Which folder of an image's path is its class, see `util.data.layout.name_classes`."""
    input_size: list[int] | None = None
    """One side, or height and width. If None, it is that of the weights; so are mean and std."""
    tile: int | None = None
    """Side of the windows that are read instead of whole images, in pixels."""
    crop_pct: float | None = None
    """Side of the crop over the side of a resized validation image; None is MAE's default."""
    max_broken: float = 0.01
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.input_size and len(self.input_size) > 2:
            raise InputError("--input_size takes one side, or a height and a width")
        super().__post_init__()
        if self.data_csv:
            has_folders = self.val_path and not self.val_csv
            further = {
                "--dataset": self.dataset,
                "--num_samples": self.num_samples,
                "--class_folder": self.class_folder != "auto" and not has_folders,
            }
            if given := [flag for flag, value in further.items() if value]:
                raise InputError(
                    f"--data_csv lists the images and their classes: leave out {', '.join(given)}"
                )
        if self.val_fraction and (self.val_csv or self.val_path):
            flag = "--val_csv" if self.val_csv else "--val_path"
            raise InputError(f"{flag} gives the validation images: leave --val_fraction out")

    @property
    def input_form(self) -> dict[str, object]:
        """What the flags say of a model's input, as arguments of `models.starting_point`."""
        colors = {"mean": self.mean, "std": self.std, "pixels": self.pixels}
        return {"img_size": self.input_size, **colors}

    def read_as(self, pixels: PixelFormat) -> "DataSettings":
        """Return these settings for images of another format, such as that of the weights."""
        value_range = None if pixels.value_range is None else list(pixels.value_range)
        return replace(self, channels=pixels.channels, value_range=value_range, axes=pixels.axes)

    @property
    def name(self) -> str:
        """The dataset's name: as given, else inferred from a path, else the digits."""
        if self.data_csv or (self.val_csv and not (self.dataset or self.data_path)):
            return "table"
        path = self.data_path or self.val_path
        return self.dataset or (kind_of(path) if path else "digits")


def holds_packed(path: str | Path) -> bool:
    """Whether a folder, or its train/ or val/, holds packed images."""
    folder = Path(path).expanduser()
    return any((folder / split / PACKED_INDEX).is_file() for split in ("", "train", "val"))


def kind_of(path: str | Path | None) -> str:
    """Return the --dataset to assume for a path: packed images or a folder of files."""
    return "packed" if path and holds_packed(path) else "folder"


def pixel_format(
    channels: int | None, value_range: Sequence[float] | None, axes: str | None = None
) -> PixelFormat:
    """Return the format that flags or a checkpoint describe."""
    return PixelFormat(channels, None if value_range is None else tuple(value_range), axes)


def check_pixel_flags(
    pixels: PixelFormat, mean: Sequence[float] | str | None, std: Sequence[float] | str | None
) -> None:
    """Check the flags of the images' format and colors.

    Raises:
        InputError: the range is empty, only one of mean and std is measured, a std is not above 0,
            or values of 8-bit RGB are those of pixels from 0 to 255.
    """
    low, high = pixels.value_range or (0, 1)
    if not low < high:
        raise InputError(
            "--value_range takes the value that becomes 0 and then the one that becomes 1, such as "
            f"0 4095, not {low:g} {high:g}"
        )
    if AUTO in (mean, std):
        if mean != std:
            raise InputError(
                "--mean and --std are measured together: give auto for both, or numbers"
            )
        return
    if std and min(std) <= 0:
        raise InputError(f"--std must be above 0 in every channel, not {std}")
    if pixels.is_rgb8:
        check_scale(mean, std)


def crop_pct(text: str) -> float:
    """Parse a number from MIN_CROP_PCT to 1."""
    value = number(text)
    if not MIN_CROP_PCT <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between {MIN_CROP_PCT} and 1, not {text}")
    return value


def held_out_fraction(text: str) -> float:
    """Parse a number from 0 to 1, without 1."""
    value = number(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return value


def add_data_args(
    parser: argparse.ArgumentParser, *, input_size: int | None, holds_out: bool = False
) -> None:
    """Add the flags of DataSettings.

    Args:
        input_size: None if defaults come from the weights.
        holds_out: whether some images are held out by default.
    """
    inherited = "" if input_size else "from the weights, else "
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", help="folder or .tar file of images, or root of --dataset")
    group.add_argument(
        "--dataset",
        help=f"folder, tar, {', '.join(OWN_DATASETS)}, or a timm name such as torch/cifar10, "
        "torch/places365, hfds/NAME or wds/NAME (folder with --data_path, else digits)",
    )
    group.add_argument(
        "--val_path", help="folder or .tar file of validation images (val/ in --data_path)"
    )
    add_table_args(group)
    add_val_fraction_arg(group, holds_out=holds_out)
    group.add_argument(
        "--num_samples",
        type=positive_int,
        help="images per epoch of a stream (its own length, if known)",
    )
    add_class_folder_arg(group)
    group.add_argument(
        "--input_size",
        type=positive_int,
        nargs="+",
        default=[input_size] if input_size else None,
        metavar="PX",
        help="side of the square input, or height and width "
        f"({inherited}{input_size or 'the default of the model'})",
    )
    add_pixel_args(group, inherited=inherited)
    add_color_args(group, inherited=inherited)
    add_tile_arg(group)
    if input_size is None:
        add_crop_pct_arg(group)
    add_reading_args(group)


def add_crop_pct_arg(group: argparse._ActionsContainer, *, inherited: str = "") -> None:
    """Add the flag of the center crop; `inherited` says where the default comes from, if fixed."""
    group.add_argument(
        "--crop_pct",
        "--crop_share",
        type=crop_pct,
        help="side of the center crop over the side of a resized image, in validation and "
        f"evaluation ({inherited}224 / 256 up to 224 px, 1 above)",
    )


def add_table_args(group: argparse._ActionsContainer) -> None:
    """Add the flags for tables of images."""
    group.add_argument(
        "--data_csv",
        metavar="FILE",
        help="table with the columns path, label and perhaps split and group (.csv, .tsv, .txt or "
        ".jsonl); paths start from --data_path, else from its folder",
    )
    group.add_argument(
        "--val_csv",
        metavar="FILE",
        help="table of validation images; paths start from --val_path, else as in --data_csv, "
        "else from its folder (rows of DATA_CSV whose split is val)",
    )


def add_val_fraction_arg(group: argparse._ActionsContainer, *, holds_out: bool = False) -> None:
    """Add the flag for how many images are held out; `holds_out` says whether some are without."""
    images = f"{LEAST_HELD_OUT} to {MOST_HELD_OUT} images, a tenth of few"
    usual = f"{100 * USUAL_FRACTION:g}%%, {images}" if holds_out else "none"
    group.add_argument(
        "--val_fraction",
        "--val_share",
        type=held_out_fraction,
        metavar="F",
        help="fraction of the images to hold out for validation if none are given for it, chosen "
        "by their names, or by group if a table has groups; 0 for none "
        f"({usual})",
    )


def add_class_folder_arg(group: argparse._ActionsContainer) -> None:
    """Add the flag for the folder that is an image's class."""
    group.add_argument(
        "--class_folder",
        choices=CLASS_FOLDERS,
        default="auto",
        help="where class folders have folders of their own: the first folder below the images' "
        "is the class, or the last, the one that holds the image (last, unless all of these have "
        "the same name)",
    )


class _Numbers(argparse.Action):
    """Stores a number for each channel, or the word "auto"."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: list[float | str],
        option_string: str | None = None,
    ) -> None:
        if AUTO in values and len(values) > 1:
            parser.error(f"{option_string} takes auto alone, or a number for each channel")
        setattr(namespace, self.dest, AUTO if AUTO in values else values)


def number_or_auto(text: str) -> float | str:
    """Parse a finite number, or the word "auto"."""
    return AUTO if text == AUTO else finite_float(text)


def add_color_args(group: argparse._ActionsContainer, *, inherited: str) -> None:
    """Add the flags for mean and std; `inherited` says where defaults come from, if not fixed."""
    for name in ("mean", "std"):
        group.add_argument(
            f"--{name}",
            action=_Numbers,
            type=number_or_auto,
            nargs="+",
            metavar="X",
            help=f"{name} of each channel, on the [0, 1] scale; auto measures it on a sample of "
            f"the training images ({inherited}ImageNet's for three channels, else auto)",
        )


def add_pixel_args(group: argparse._ActionsContainer, *, inherited: str = "") -> None:
    """Add the flags of `PixelFormat`; `inherited` says where defaults come from."""
    group.add_argument(
        "--channels",
        type=positive_int,
        metavar="N",
        help="read N channels of the files as they are, in their own type: 8 or 16 bits, floating "
        f"point, TIFF with many bands, .npy and .npz ({inherited}any image becomes 8-bit RGB)",
    )
    group.add_argument(
        "--value_range",
        type=finite_float,
        nargs=2,
        metavar=("LO", "HI"),
        help="values that become 0 and 1, such as 0 4095 for 12 bits in 16-bit files "
        f"({inherited}those of the files' type; 0 1 in floating point)",
    )
    add_axes_arg(group)


def add_axes_arg(group: argparse._ActionsContainer) -> None:
    """Add the flag for the order of an array's axes."""
    group.add_argument(
        "--axes",
        choices=AXES,
        help="order of an array's axes: height, width, channels or channels, height, width "
        "(by its shape)",
    )


def add_tile_arg(group: argparse._ActionsContainer, *, inherited: str = "") -> None:
    """Add the flag for windows of large images; `inherited` says where the default comes from."""
    group.add_argument(
        "--tile",
        type=positive_int,
        metavar="PX",
        help="read a window of PX x PX pixels of each larger image, at random in training and from "
        f"the center in evaluation, instead of shrinking the image ({inherited}the whole image)",
    )


def add_reading_args(group: argparse._ArgumentGroup) -> None:
    """Add the flags for broken files and loader processes."""
    group.add_argument(
        "--max_broken",
        type=natural_float,
        default=DataSettings.max_broken,
        help="fraction of unreadable files above which the run stops (%(default)s)",
    )
    group.add_argument(
        "--num_workers",
        type=process_count,
        default=default_workers(),
        help="loader processes for each training process (seven eighths of its CPU cores, "
        "%(default)s on this machine)",
    )


def add_flip_args(group: argparse._ArgumentGroup) -> None:
    """Add the flags for how often training images are flipped."""
    for name, how, share in (("hflip", "left to right", 0.5), ("vflip", "top to bottom", 0.0)):
        group.add_argument(
            f"--{name}",
            type=fraction,
            default=share,
            metavar="P",
            help=f"fraction of training images that are flipped {how} (%(default)s)",
        )


def add_crop_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the number of crops per image and where to decode."""
    group = parser.add_argument_group("crops")
    group.add_argument(
        "--repeated_aug",
        type=positive_int,
        default=1,
        metavar="K",
        help="crops to take each time an image is read, which saves decoding. They share a "
        "micro-batch, --batch_size counts them, and an epoch has K times as many steps: lower "
        "--epochs (%(default)s)",
    )
    group.add_argument(
        "--decode",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where to decode JPEGs: in the loader processes or, with slightly different pixels, "
        "on the CUDA device (%(default)s)",
    )
