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
from scripts.analysis.flags import MAX_SHOWN, ImageSettings
from util.compute.distributed import world_size
from util.data.batch import Batch, Sample, collate
from util.data.broken_images import BrokenImages, reason_of
from util.data.datasets import build_dataset, open_val
from util.data.images import IndexedImages, Transform
from util.data.layout import images_below
from util.data.loaders import build_eval_loader
from util.data.sampler import evenly_spaced
from util.data.transforms import CenterCrop, eval_transform
from util.errors import InputError
from util.eval.display import Display, choose_display, is_deep
from util.eval.figures import readable_name
from util.eval.monitor import masked_batches, val_split
from util.eval.reconstructions import Colors
from util.masking import Masking, TokenSplit
from util.normalization import PixelFormat
from util.runs.run import start_run
from util.settings.masking import MaskSettings

MEMORY_ADVICE = "lower --batch_size"

_logger = logging.getLogger(__name__)


def list_images(
    paths: Sequence[str], limit: int | None = None, *, arrays: bool = False
) -> list[Path]:
    """List the given files and the images in the given folders; above a limit, choose evenly.

    Args:
        arrays: whether NumPy's files in folders are images.

    Raises:
        InputError: a path is missing, or there are no images.
    """
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"--images {path} does not exist")
        files += images_below(path, arrays=arrays) if path.is_dir() else [path]
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
            pixels = transform.read(path.open("rb"))  # (C, h, w)
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


def open_measured(settings: ImageSettings, transform: CenterCrop, seed: int) -> IndexedImages:
    """Open the validation images of --data_path, or all of a folder without such.

    Raises:
        InputError: they cannot be read by index; see also `build_dataset`.
    """
    data = settings.data.read_as(transform.pixels)
    found = open_val(data, transform, seed=seed)
    if found is None:
        name = data.data_path or data.dataset
        _logger.info("%s has no validation set of its own: measuring its images", name)
        options = {"split": "train", "transform": transform, "seed": seed}
        found = build_dataset(data.name, data.data_path, pixels=data.pixels, **options)
    if not isinstance(found, IndexedImages):
        raise InputError(f"{data.name} is a stream: use a source that is read by index")
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
    settings: ImageSettings, transform: CenterCrop, *, seed: int, device: torch.device
) -> AnalysisImages:
    """Open the images to measure and those to draw; where one is not given, it is the other.

    Raises:
        InputError: an image to draw cannot be read; see also `open_measured`.
    """
    num_shown = min(MAX_SHOWN, settings.num_images or MAX_SHOWN)
    arrays = not transform.pixels.is_rgb8
    files = list_images(settings.images, arrays=arrays) if settings.images else []
    shown = read_images(evenly(files, num_shown), transform) if files else None
    if not (settings.data_path or settings.dataset):
        files = evenly(files, settings.num_images)
        measured = FileBatches(files, transform, settings.batch_size)
        return AnalysisImages(measured, len(files), shown, settings.max_broken)
    source = open_measured(settings, transform, seed)
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
    pixels: PixelFormat
    tile: int | None
    """Side of the windows of larger images that it was trained on."""
    masking: Masking
    device: torch.device
    name: str
    """As titles show it."""

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
        name = readable_name(training["model_name"], training["epoch"])
        form = training["pixels"], training["tile"]
        return cls(model.to(device), colors, *form, masking, device, name)

    @property
    def transform(self) -> CenterCrop:
        """The transform of validation images in pre-training."""
        reading = {"pixels": self.pixels, "tile": self.tile}
        return eval_transform(self.model.encoder.img_size, *self.colors, **reading)

    def display(self, shown: Batch, show_channels: Sequence[int] | None = None) -> Display:
        """How images to draw are shown.

        Raises:
            InputError: see `choose_display`.
        """
        return choose_display(len(self.colors[0]), show_channels, stretch=is_deep(shown))

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
