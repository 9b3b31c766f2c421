"""The model, the masks and the images of an analysis, from its flags."""

import argparse
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from models import load_model
from util.arguments import Parser, positive_int, ratio, seed_number
from util.data.batch import Batch, Sample, collate
from util.data.broken_images import BrokenImages
from util.data.datasets import build_dataset, open_val
from util.data.decode import read_pixels
from util.data.images import IndexedImages, Transform
from util.data.loaders import build_eval_loader
from util.data.settings import DataSettings, add_reading_args
from util.data.transforms import eval_transform
from util.errors import InputError
from util.eval.monitor import masked_batches, val_split
from util.eval.reconstructions import Colors
from util.masking import Masking, MaskSettings, TokenSplit

MAX_SHOWN = 8  # images in a figure
CHECKPOINT_HELP = "of main_pretrain.py, or of the released CrossMAE or MAE code with its decoder"

_logger = logging.getLogger(__name__)


def list_images(paths: Sequence[str], limit: int) -> list[Path]:
    """List the given files and the images in the given folders; above a limit, choose evenly.

    Raises:
        InputError: a path is missing, or there are no images.
    """
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"--images {path} does not exist")
        known = Image.registered_extensions()
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in known)
        files += inside if path.is_dir() else [path]
    if not files:
        raise InputError(f"no images found in --images {' '.join(paths)}")
    count = min(limit, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def read_image(path: Path) -> Tensor:
    """Read an image file's pixels: uint8 (3, h, w).

    Raises:
        InputError: it cannot be read.
    """
    try:
        return read_pixels(path.open("rb"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"cannot read image {path}: {error}") from error


@dataclass(frozen=True)
class ImageSettings:
    """Which images an analysis measures and draws; see the flags.

    Raises:
        InputError: no images are named.
    """

    data_path: str | None = None
    dataset: str | None = None
    images: list[str] | None = None
    num_images: int | None = None
    batch_size: int = 32
    num_workers: int = 0
    max_broken: float = 0.01

    def __post_init__(self) -> None:
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

    def open_measured(self, transform: Transform, seed: int) -> IndexedImages:
        """Open the validation images of --data_path, or all of a folder without such.

        Raises:
            InputError: they cannot be read by index; see also `build_dataset`.
        """
        found = open_val(self.data, transform, seed=seed)
        if found is None:
            name = self.data_path or self.dataset
            _logger.info("%s has no validation set of its own: measuring its images", name)
            options = {"split": "train", "transform": transform, "seed": seed}
            found = build_dataset(self.data.name, self.data_path, **options)
        if not isinstance(found, IndexedImages):
            raise InputError(f"{self.data.name} is a stream: use a source that is read by index")
        return found


class AnalysisImages(NamedTuple):
    """Images on the CPU, as loaders yield them."""

    measured: Iterable[Batch]
    num_measured: int
    shown: Batch
    max_broken: float

    def only_shown(self) -> "AnalysisImages":
        """The images to draw, to be measured as well."""
        count = self.shown.num_images
        return AnalysisImages([self.shown], count, self.shown, max_broken=0.0)


def open_images(
    settings: ImageSettings, transform: Transform, *, seed: int, device: torch.device
) -> AnalysisImages:
    """Open the images to measure and those to draw; where one is not given, it is the other.

    Raises:
        InputError: an image to draw cannot be read; see also `ImageSettings.open_measured`.
    """
    limit = min(MAX_SHOWN, settings.num_images or MAX_SHOWN)
    drawn = []
    if settings.images:
        files = list_images(settings.images, limit)
        drawn = [Sample(transform(read_image(path)), label=-1, broken=[]) for path in files]
    if not (settings.data_path or settings.dataset):
        return AnalysisImages([], 0, collate(drawn), max_broken=0.0).only_shown()
    source = settings.open_measured(transform, seed)
    if not drawn:
        count = min(limit, len(source))
        drawn = source.__getitems__([(0, i * len(source) // count) for i in range(count)])
    shown = collate(drawn)
    if isinstance(shown, InputError):
        raise shown
    sizes = {"batch_size": settings.batch_size, "num_workers": settings.num_workers}
    loader = build_eval_loader(source, **sizes, device=device, limit=settings.num_images)
    number = min(len(source), settings.num_images or len(source))
    return AnalysisImages(loader, number, shown, settings.max_broken)


@dataclass(frozen=True)
class Subject:
    """A pre-trained model in evaluation mode on its device, with its masks and colors."""

    model: nn.Module
    colors: Colors
    masking: Masking
    device: torch.device

    @classmethod
    def load(
        cls, path: str, *, device: torch.device, seed: int, mask_ratio: float | None = None
    ) -> "Subject":
        """Load a checkpoint; all masked patches will be predicted.

        Args:
            path: see `load_model`.
            mask_ratio: None is that of training.

        Raises:
            InputError: see `load_model`; or no patch would be masked or visible.
        """
        model, training = load_model(path)
        masks = MaskSettings(
            mask_ratio or training["mask_ratio"], mask_sampling=training["mask_sampling"]
        )
        masking = Masking.of(masks, model.encoder.grid_size, seed=seed, all_masked=True)
        colors = training["mean"], training["std"]
        return cls(model.to(device), colors, masking, device)

    @property
    def transform(self) -> Transform:
        """The transform of validation images in pre-training."""
        return eval_transform(self.model.encoder.img_size, *self.colors)

    def batches(self, images: AnalysisImages) -> Iterator[tuple[Tensor, TokenSplit]]:
        """Yield the measured images, normalized, and their splits, with a progress bar.

        Raises:
            InputError: too many images cannot be read.
        """
        broken = BrokenImages(images.num_measured, images.max_broken)
        loader = tqdm(images.measured, unit="batch", disable=None, leave=False)
        yield from masked_batches(loader, self.masking, self.device, broken)
        broken.check()

    def shown(
        self, images: AnalysisImages, *, masked: Sequence[int] = ()
    ) -> tuple[Tensor, TokenSplit]:
        """Images to draw, normalized, and their splits.

        Args:
            masked: patches that must not be visible.
        """
        pixels, _ = images.shown.to(self.device)
        return pixels, val_split(self.masking, range(len(pixels)), self.device, masked=masked)


def analysis_parser(doc: str, *, draws: bool = True) -> Parser:
    """Build the parser of an analysis of one checkpoint.

    Args:
        doc: of the program; its first line is the description.
        draws: whether the analysis draws images.
    """
    parser = Parser(description=doc.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--output_dir", required=True, help="folder for results")
    add_mask_args(parser)
    add_image_args(parser, draws=draws)
    return parser


def add_mask_args(parser: Parser) -> None:
    """Add the flags of masks and device."""
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
        help="of the masks, where an analysis has any (%(default)s)",
    )


def add_image_args(parser: Parser, *, draws: bool = True) -> None:
    """Add the flags of ImageSettings; `draws` says whether the analysis draws images."""
    group = parser.add_argument_group("images")
    add = group.add_argument
    others = " (those that are drawn)" if draws else ""
    add(
        "--data_path",
        help="folder or .tar file of the images to measure: its validation images, or all if it "
        f"has no val/{others}",
    )
    add("--dataset", help="kind of --data_path, see main_pretrain.py (folder)")
    if draws:
        add(
            "--images",
            nargs="+",
            help=f"files or folders of images to draw, at most {MAX_SHOWN} (some of --data_path)",
        )
    add(
        "--num_images",
        type=positive_int,
        help="limit on the number of images, evenly spaced (all)",
    )
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
