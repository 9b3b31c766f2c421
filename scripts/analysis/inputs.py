"""The model, the masks and the images of an analysis, from its flags."""

import argparse
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from models import load_model
from util.arguments import Parser, positive_int, ratio, seed_number
from util.compute.distributed import world_size
from util.data.batch import Batch, Sample, collate
from util.data.broken_images import BrokenImages, reason_of
from util.data.datasets import build_dataset, open_val
from util.data.decode import read_pixels
from util.data.images import IndexedImages, Transform
from util.data.layout import images_below
from util.data.loaders import build_eval_loader
from util.data.sampler import evenly_spaced
from util.data.settings import DataSettings, add_reading_args
from util.data.transforms import eval_transform
from util.errors import InputError
from util.eval.monitor import masked_batches, val_split
from util.eval.reconstructions import Colors
from util.masking import Masking, MaskSettings, TokenSplit
from util.runs.run import start_run

MAX_SHOWN = 8  # images in a figure
CHECKPOINT_HELP = (
    "checkpoint of main_pretrain.py, or a released CrossMAE or MAE checkpoint that has its decoder"
)
MEMORY_ADVICE = "lower --batch_size"

_logger = logging.getLogger(__name__)


def list_images(paths: Sequence[str], limit: int | None = None) -> list[Path]:
    """List the given files and the images in the given folders; above a limit, choose evenly.

    Raises:
        InputError: a path is missing, or there are no images.
    """
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"--images {path} does not exist")
        files += images_below(path) if path.is_dir() else [path]
    if not files:
        raise InputError(f"no images found in --images {' '.join(paths)}")
    return evenly(files, limit)


def evenly(files: list[Path], limit: int | None) -> list[Path]:
    """Choose at most `limit` files, evenly spaced."""
    return [files[index] for index in evenly_spaced(len(files), limit)]


def read_images(files: Sequence[Path], transform: Transform) -> Batch:
    """Read image files.

    Raises:
        InputError: one cannot be read.
    """
    samples = []
    for path in files:
        try:
            pixels = read_pixels(path.open("rb"))  # (3, h, w)
        except Exception as error:  # decoders raise anything on broken files
            raise InputError(f"cannot read image {path}: {reason_of(error)}") from error
        samples.append(Sample(transform(pixels), label=None, broken=[]))
    return collate(samples)


def sample_images(source: IndexedImages, limit: int) -> Batch:
    """Read at most this many images, evenly spaced.

    Raises:
        InputError: too many of them cannot be read.
    """
    return collate([source[0, index] for index in evenly_spaced(len(source), limit)])


class FileBatches:
    """Batches of image files, read as they are needed."""

    def __init__(self, files: Sequence[Path], transform: Transform, batch_size: int) -> None:
        self.parts = [files[i : i + batch_size] for i in range(0, len(files), batch_size)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Batch]:
        return (read_images(part, self.transform) for part in self.parts)


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
        return self._replace(measured=[self.shown], num_measured=self.shown.num_images)


def open_images(
    settings: ImageSettings, transform: Transform, *, seed: int, device: torch.device
) -> AnalysisImages:
    """Open the images to measure and those to draw; where one is not given, it is the other.

    Raises:
        InputError: an image to draw cannot be read; see also `ImageSettings.open_measured`.
    """
    num_shown = min(MAX_SHOWN, settings.num_images or MAX_SHOWN)
    files = list_images(settings.images) if settings.images else []
    shown = read_images(evenly(files, num_shown), transform) if files else None
    if not (settings.data_path or settings.dataset):
        files = evenly(files, settings.num_images)
        measured = FileBatches(files, transform, settings.batch_size)
        return AnalysisImages(measured, len(files), shown, settings.max_broken)
    source = settings.open_measured(transform, seed)
    if shown is None:
        shown = sample_images(source, num_shown)
    sizes = {"batch_size": settings.batch_size, "num_workers": settings.num_workers}
    loader = build_eval_loader(source, **sizes, device=device, limit=settings.num_images)
    number = min(len(source), settings.num_images or len(source))
    return AnalysisImages(loader, number, shown, settings.max_broken)


def start_analysis(args: argparse.Namespace) -> torch.device:
    """Start the program on its device, with float32 products as exact as they can be.

    Raises:
        InputError: there are several processes; see also `start_run`.
    """
    device = start_run(device=args.device, seed=args.seed)
    if world_size() > 1:
        raise InputError("analyses run in one process: start them with python, not torchrun")
    torch.set_float32_matmul_precision("highest")  # start_run allows TF32
    return device


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
        if mask_ratio and training["mask_sampling"] != "random":
            raise InputError(
                f"{path} was trained with {training['mask_sampling']} masks: leave out --mask_ratio"
            )
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
