"""Which images a run reads, and how: the settings and their flags."""

import argparse
from dataclasses import dataclass

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from util.arguments import finite_float, natural_float, positive_int, process_count
from util.compute.distributed import default_workers
from util.data.packed import kind_of
from util.data.sources import OWN_SOURCES
from util.errors import InputError

MIN_CROP_PCT = 0.1  # below it, resized images take more than a hundred times a crop's memory


@dataclass(frozen=True)
class DataSettings:
    """Which images, and how they are read.

    Raises:
        InputError: the size or the normalisation is invalid.
    """

    dataset: str | None = None
    """None is what a path holds, see `name`."""
    data_path: str | None = None
    val_path: str | None = None
    num_samples: int | None = None
    """Of an epoch of a stream."""
    input_size: list[int] | None = None
    """A side, or height and width. None, as for mean and std, is what the weights say."""
    mean: list[float] | None = None
    std: list[float] | None = None
    crop_pct: float | None = None
    """Share of the side of validation images that is seen; None is the default of their size."""
    max_broken: float = 0.01
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.input_size and len(self.input_size) > 2:
            raise InputError("--input_size takes one side, or a height and a width")
        if self.std and min(self.std) <= 0:
            raise InputError(f"--std must be above 0 in every channel, not {self.std}")

    @property
    def name(self) -> str:
        """The data set that is meant: by its name, else what a path holds, else the digits."""
        path = self.data_path or self.val_path
        return self.dataset or (kind_of(path) if path else "digits")


def check_decoder(decode: str, device: torch.device) -> None:
    """Raise InputError where `--decode gpu` has no CUDA device."""
    if decode == "gpu" and device.type != "cuda":
        raise InputError(
            f"--decode gpu needs a CUDA device, and this run is on {device}: use --decode cpu"
        )


def crop_pct(text: str) -> float:
    """A number from MIN_CROP_PCT to 1."""
    value = float(text)
    if not MIN_CROP_PCT <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in {MIN_CROP_PCT} to 1")
    return value


def add_data_args(parser: argparse.ArgumentParser, *, input_size: int | None) -> None:
    """Which images, and how they are read; without `input_size`, as the weights were trained."""
    inherited = "" if input_size else "those of --finetune's file, else "
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", help="folder or tar of images, or the root of --dataset")
    group.add_argument(
        "--dataset",
        help=f"folder, tar, {', '.join(OWN_SOURCES)}, or a name of timm's such as torch/cifar10, "
        "torch/places365, hfds/NAME or wds/NAME (folder with --data_path, else digits)",
    )
    group.add_argument(
        "--val_path", help="held-out images, where --data_path brings none (its val folder)"
    )
    group.add_argument(
        "--num_samples",
        type=positive_int,
        help="images of a streamed set that does not tell (what it tells)",
    )
    group.add_argument(
        "--input_size",
        type=positive_int,
        nargs="+",
        default=[input_size] if input_size else None,
        metavar="PX",
        help="side of the square input, or height and width "
        f"({inherited}{input_size or 'the size of the model'})",
    )
    for name, imagenet in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        group.add_argument(
            f"--{name}",
            type=finite_float,
            nargs=3,
            metavar=("R", "G", "B"),
            default=list(imagenet) if input_size else None,
            help=f"of the channels, in 0 to 1 ({inherited}ImageNet's)",
        )
    if input_size is None:
        group.add_argument(
            "--crop_pct",
            "--crop_share",
            type=crop_pct,
            help="of the side of held-out images that is seen (224 / 256 up to 224 px, 1 above)",
        )
    group.add_argument(
        "--max_broken",
        type=natural_float,
        default=DataSettings.max_broken,
        help="share of unreadable files above which the run stops (%(default)s)",
    )
    group.add_argument(
        "--num_workers",
        type=process_count,
        default=default_workers(),
        help="loader processes of each process (its share of the CPU cores less an eighth, "
        "%(default)s on this machine)",
    )


def add_crop_args(parser: argparse.ArgumentParser) -> None:
    """How many crops are taken of the images, and where they are decoded."""
    group = parser.add_argument_group("crops")
    group.add_argument(
        "--repeated_aug",
        type=positive_int,
        default=1,
        metavar="K",
        help="crops of every image each time that it is read, which saves decoding. They share a "
        "micro-batch, --batch_size counts them, and an epoch has K times as many steps: lower "
        "--epochs (%(default)s)",
    )
    group.add_argument(
        "--decode",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where JPEGs are decoded: by loader processes or, with somewhat other pixels, on the "
        "CUDA device (%(default)s)",
    )
