"""Flags of the analyses. Nothing here imports PyTorch, so that programs check them first."""

import argparse
from dataclasses import dataclass

from util.arguments import Parser, positive_int, ratio, seed_number
from util.errors import InputError
from util.settings.data import DataSettings, add_reading_args
from util.settings.evaluation import add_show_channels_arg, check_show_channels
from util.settings.model import add_checkpoint_arg

MAX_SHOWN = 8  # images in a figure
CHECKPOINT_HELP = (
    "checkpoint of main_pretrain.py, or a released CrossMAE or MAE checkpoint that has its decoder"
)


@dataclass(frozen=True)
class ImageSettings:
    """Which images an analysis measures and draws; see the flags.

    Raises:
        InputError: no images are named; see also `check_show_channels`.
    """

    data_path: str | None = None
    dataset: str | None = None
    images: list[str] | None = None
    num_images: int | None = None
    batch_size: int = 32
    num_workers: int = 0
    max_broken: float = 0.01
    show_channels: list[int] | None = None

    def __post_init__(self) -> None:
        check_show_channels(self.show_channels)
        if not (self.data_path or self.dataset or self.images):
            raise InputError("no images: give --data_path, --images or both")

    @property
    def data(self) -> DataSettings:
        """The images to measure."""
        return DataSettings(
            self.dataset,
            self.data_path,
            max_broken=self.max_broken,
            num_workers=self.num_workers,
        )


def analysis_parser(doc: str, *, draws: bool = True) -> Parser:
    """Build the parser of an analysis of one checkpoint.

    Args:
        doc: of the program; its first line is the description.
        draws: whether the analysis draws images.
    """
    parser = Parser(description=doc.splitlines()[0])
    add_checkpoint_arg(parser, CHECKPOINT_HELP)
    parser.add_argument("--output_dir", required=True, help="folder for results")
    add_mask_args(parser)
    add_image_args(parser, draws=draws)
    return parser


def add_mask_args(parser: Parser) -> None:
    """Add the flags of masks, device and seed."""
    parser.add_argument(
        "--mask_ratio", type=ratio, help="fraction of patches that is masked (as trained)"
    )
    add_device_args(parser)


def add_device_args(parser: Parser) -> None:
    """Add the flags of device and seed."""
    parser.add_argument("--device", help="cuda, cuda:N or cpu (cuda if available)")
    parser.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="seed of what is random, such as masks (%(default)s)",
    )


def add_image_args(parser: Parser, *, draws: bool = True) -> None:
    """Add the flags of ImageSettings; `draws` says whether the analysis draws images."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--data_path",
        help="folder or .tar file of the images to measure: its validation images, or all if it "
        "has no val/ (--images)",
    )
    group.add_argument("--dataset", help="kind of --data_path, see main_pretrain.py (folder)")
    drawn = f"draw, at most {MAX_SHOWN} (some of --data_path)"
    group.add_argument(
        "--images",
        nargs="+",
        help=f"files or folders of images to {drawn if draws else 'measure without --data_path'}",
    )
    group.add_argument(
        "--num_images",
        type=positive_int,
        help="measure and draw at most this many images, evenly spaced (all)",
    )
    if draws:
        add_show_channels_arg(group)
    add_loader_args(group)


def add_loader_args(group: argparse._ArgumentGroup) -> None:
    """Add the flags of how images are loaded."""
    group.add_argument(
        "--batch_size",
        type=positive_int,
        default=ImageSettings.batch_size,
        help="images at a time (%(default)s)",
    )
    add_reading_args(group)
