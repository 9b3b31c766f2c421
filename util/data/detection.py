"""Images with annotated objects: settings, datasets and batches."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from util.data.annotated import AnnotatedImages, StoredImages
from util.data.batch import Normalization, of_one_type
from util.data.coco import CocoFile, CocoImage, read_coco
from util.data.colors import Colors, Earlier, choose_colors
from util.data.images import names_hash
from util.data.jitter import LargeScaleJitter, View, WholeImage
from util.data.values import read_values
from util.errors import InputError, counted
from util.normalization import RGB8, PixelFormat
from util.settings.detection import DetectionSettings

_logger = logging.getLogger(__name__)


class DetectionBatch(NamedTuple):
    """A micro-batch from a worker."""

    images: Tensor  # (B, C, S, S), of a type in TYPE_RANGES
    sizes: list[tuple[int, int]]  # (height, width) of what is not padding
    targets: list[dict[str, Tensor]]  # see models_vitdet; of evaluation, empty
    ids: list[int]  # positions in the dataset
    broken: list[tuple[str, str]]  # (file name, reason), each time a broken image was read
    normalization: Normalization

    @property
    def num_images(self) -> int:
        """Batch size B."""
        return len(self.ids)

    def to(
        self, device: torch.device
    ) -> tuple[Tensor, list[tuple[int, int]], list[dict[str, Tensor]]]:
        """Return normalized float32 images, sizes and targets on the device."""
        images = self.images.to(device, non_blocking=True)
        targets = [
            {name: value.to(device, non_blocking=True) for name, value in target.items()}
            for target in self.targets
        ]
        return self.normalization(images), self.sizes, targets


class DetectionImages(AnnotatedImages):
    """Images of an annotation file.

    Args:
        file: where they come from.
        images: those to read.
        transform: LargeScaleJitter or WholeImage.
        train: whether targets are returned, which leave out crowds.
        options: seed, replace_broken and pixels, see AnnotatedImages.
    """

    def __init__(
        self,
        file: CocoFile,
        images: Sequence[CocoImage],
        folder: Path,
        transform: LargeScaleJitter | WholeImage,
        normalization: Normalization,
        *,
        train: bool,
        masks: bool,
        **options: object,
    ) -> None:
        super().__init__([image.name for image in images], folder, **options)
        self.file, self.images, self.transform = file, list(images), transform
        self.normalization, self.train, self.masks = normalization, train, masks

    def identity(self) -> dict[str, object]:
        """Return what distinguishes these images from others, with their objects."""
        objects = [
            f"{image.id} {own.label} {own.box} {own.is_crowd}"
            for image in self.images
            for own in image.objects
        ]
        return {**super().identity(), "hash of their objects": names_hash(objects)}

    def path(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.folder / self.images[index].name)

    def read(self, index: int) -> Tensor:
        """Read an image (C, h, w).

        Raises:
            Exception: the file is missing or broken, or its size is not the annotations'.
        """
        with Path(self.path(index)).open("rb") as file:
            image = read_values(file, self.pixels)
        height, width = self.images[index].size
        if image.shape[1:] != (height, width):
            own = f"{image.shape[2]} x {image.shape[1]} px"
            raise ValueError(f"it has {own}, but its annotations are for {width} x {height}")
        return image

    def transformed(
        self, index: int, content: Tensor, *seed_parts: int | str
    ) -> tuple[Tensor, tuple[int, int], dict[str, Tensor], int]:
        """Transform an image: (C, S, S), its size without padding, its target and its index."""
        view = self.transform.view(content.shape[1:], *seed_parts)
        target = make_target(self.images[index], view, masks=self.masks) if self.train else {}
        shown = view.image(content, self.normalization.mean, self.normalization.value_range)
        return shown, view.size, target, index

    def batch(self, contents: Sequence[tuple], broken: list[tuple[str, str]]) -> DetectionBatch:
        """Stack images; sizes and targets stay lists."""
        images, *others = map(list, zip(*contents, strict=True)) if contents else ([],) * 4
        images = of_one_type(images, self.normalization.value_range)
        stacked = torch.stack(images) if images else torch.empty(0)
        return DetectionBatch(stacked, *others, broken, self.normalization)


def make_target(image: CocoImage, view: View, *, masks: bool) -> dict[str, Tensor]:
    """Objects of an image that a view shows, without crowds.

    Args:
        masks: take boxes from the masks, and return both; else boxes are those of the file.
    """
    objects = [own for own in image.objects if not own.is_crowd]
    labels = torch.tensor([own.label for own in objects], dtype=torch.long)
    if not masks:
        boxes = torch.tensor([own.box for own in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = view.boxes(boxes)
        shown = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1) > 0
        return {"boxes": boxes[shown], "labels": labels[shown]}
    side = view.side
    drawn = [view.mask(own.mask(image.size)) for own in objects]
    stacked = torch.stack(drawn) if drawn else torch.zeros(0, side, side, dtype=torch.uint8)
    shown = (stacked != 0).flatten(1).any(dim=1)
    boxes = masks_to_boxes(stacked[shown])
    boxes[:, 2:] += 1  # a box ends after its last pixel
    return {"boxes": boxes, "labels": labels[shown], "masks": stacked[shown]}


class DetectionData(NamedTuple):
    """Training and validation images, and their classes."""

    train: DetectionImages
    val: DetectionImages | None
    classes: tuple[str, ...]


def open_detection(
    settings: DetectionSettings,
    *,
    side: int,
    masks: bool,
    mean: Colors,
    std: Colors,
    pixels: PixelFormat = RGB8,
    earlier: Earlier | None = None,
    seed: int,
) -> DetectionData:
    """Open the training and validation images.

    Args:
        side: of the square input, in pixels.
        masks: whether objects have masks besides boxes.
        pixels: how images are read.
        earlier: see `choose_colors`.

    Raises:
        InputError: see `read_coco`, `check_files`, `check_objects`, `choose_colors` and
            `check_classes`.
    """
    found = settings.find("train")
    if found is None:
        raise InputError(
            f"{settings.data_path} has neither annotations/instances_train2017.json nor "
            "annotations/instances_train.json: give --train_ann and --train_images"
        )
    path, folder = found
    file = read_coco(path, masks=masks, max_broken=settings.max_broken)
    transform = LargeScaleJitter(side, tuple(settings.lsj_scale), settings.hflip, settings.vflip)
    if not settings.aug:
        transform = WholeImage(side)
    images = file.images[: settings.limit_images]
    check_files(images, folder, settings.max_broken)
    check_objects(images, path)
    files = StoredImages([folder / image.name for image in images])
    mean, std = choose_colors(files, mean, std, pixels=pixels, earlier=earlier)
    train = DetectionImages(
        file,
        images,
        folder,
        transform,
        Normalization(tuple(mean), tuple(std), pixels.value_range),
        train=True,
        masks=masks,
        seed=seed,
        replace_broken=True,
        pixels=pixels,
    )
    colors = {"mean": mean, "std": std, "pixels": pixels}
    val = open_validation(settings, side=side, masks=masks, **colors)
    if val is not None:
        check_classes(val.file, file.classes, f"those of {path}")
    for name, own in (("training", train), ("validation", val)):
        _log_content(name, own)
    return DetectionData(train, val, file.classes)


def open_validation(
    settings: DetectionSettings,
    *,
    side: int,
    masks: bool,
    mean: Sequence[float],
    std: Sequence[float],
    pixels: PixelFormat = RGB8,
) -> DetectionImages | None:
    """Open the validation images; None if there are none.

    Args:
        side, masks, pixels: see `open_detection`.

    Raises:
        InputError: see `read_coco`, `check_files` and `check_objects`.
    """
    found = settings.find("val")
    if found is None:
        return None
    path, folder = found
    file = read_coco(path, masks=masks, max_broken=settings.max_broken)
    check_files(file.images, folder, settings.max_broken)
    check_objects(file.images, path)
    return DetectionImages(
        file,
        file.images,
        folder,
        WholeImage(side),
        Normalization(tuple(mean), tuple(std), pixels.value_range),
        train=False,
        masks=masks,
        seed=0,
        replace_broken=False,
        pixels=pixels,
        show_channels=settings.show_channels,
    )


def check_files(images: Sequence[CocoImage], folder: Path, max_broken: float) -> None:
    """Look whether the images are there; single missing ones count as broken when they are read.

    Raises:
        InputError: all are missing, or too many.
    """
    folders = {(folder / image.name).parent for image in images}
    listed = {
        parent / entry.name for parent in folders if parent.is_dir() for entry in os.scandir(parent)
    }
    missing = [image.name for image in images if folder / image.name not in listed]
    if len(missing) > max_broken * len(images):
        raise InputError(
            f"{len(missing)} of {counted(len(images), 'image')} listed are not in {folder}, such "
            f"as {missing[0]}: correct the folder, add them, or raise --max_broken"
        )


def check_objects(images: Sequence[CocoImage], path: Path) -> None:
    """Raise InputError if no image has an object that is not a crowd."""
    if not any(not own.is_crowd for image in images for own in image.objects):
        raise InputError(
            f"the {counted(len(images), 'image')} used from {path} have no objects, except for "
            "crowds: annotate some, or use other images"
        )


def check_classes(file: CocoFile, classes: Sequence[str], theirs: str) -> None:
    """Raise InputError if a file's classes differ from `theirs`."""
    if file.classes == tuple(classes):
        return
    if len(file.classes) != len(classes):
        difference = f"{len(file.classes)} instead of {len(classes)}"
    else:
        pairs = zip(file.classes, classes, strict=True)
        own, other = next((a, b) for a, b in pairs if a != b)
        difference = f"{own} instead of {other}"
    raise InputError(
        f"the categories of {file.path} differ from {theirs} ({difference}): they must have the "
        "same names in the same order"
    )


def _log_content(what: str, images: DetectionImages | None) -> None:
    if images is None:
        _logger.info("no validation images")
        return
    objects = [own for image in images.images for own in image.objects]
    crowds = sum(own.is_crowd for own in objects)
    empty = sum(not image.objects for image in images.images)
    _logger.info(
        "%s: %s, %d of them without objects; %s and %s of %s",
        *(images.file.path, counted(len(images), f"{what} image"), empty),
        *(counted(len(objects) - crowds, "object"), counted(crowds, "crowd")),
        "1 class" if len(images.file.classes) == 1 else f"{len(images.file.classes)} classes",
    )
