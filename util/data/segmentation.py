"""Images with masks of class indices: settings, datasets and batches."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from util.data.annotated import AnnotatedImages, StoredImages
from util.data.batch import Normalization, of_one_type
from util.data.broken_images import reason_of
from util.data.colors import Colors, Earlier, choose_colors
from util.data.joint_transforms import JointAugmentation, WholeImage, scaled_size
from util.data.masks import LabelRule, Pair, list_pairs, read_class_names, read_mask
from util.data.sampler import evenly_spaced
from util.data.values import read_values
from util.errors import InputError, counted
from util.normalization import RGB8, PixelFormat
from util.settings.segmentation import SegmentationSettings

MAX_CLASSES = 2**15 - 1  # labels are int16
MAX_RESIZED = 2**24  # pixels of an image after --short_side: 512 x 32,768
CHECKED_MASKS = 50  # at the start of a run

_logger = logging.getLogger(__name__)


class SegmentationBatch(NamedTuple):
    """A micro-batch from a worker; of evaluation, one image or none."""

    images: Tensor  # (B, C, H, W), of a type in TYPE_RANGES
    labels: Tensor  # (B, H, W), int16; UNLABELED where a pixel does not count
    broken: list[tuple[str, str]]  # (file name, reason), each time a broken pair was read
    normalization: Normalization

    @property
    def num_images(self) -> int:
        """Batch size B."""
        return len(self.labels)

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images (B, C, H, W), normalized float32, and labels (B, H, W) on the device."""
        images, labels = (x.to(device, non_blocking=True) for x in (self.images, self.labels))
        return self.normalization(images), labels.long()


class SegmentationImages(AnnotatedImages):
    """Pairs of images and masks.

    Args:
        transform: JointAugmentation or WholeImage.
        options: seed, replace_broken and pixels, see AnnotatedImages.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        rule: LabelRule,
        transform: Callable[..., tuple[Tensor, Tensor]],
        normalization: Normalization,
        **options: object,
    ) -> None:
        folder = pairs[0].image.parents[pairs[0].name.count("/")]
        super().__init__([pair.name for pair in pairs], folder, **options)
        self.pairs, self.rule, self.transform = list(pairs), rule, transform
        self.normalization = normalization

    def path(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.pairs[index].image)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Read an image (C, h, w) and its labels (h, w).

        Raises:
            InputError: the mask has colors, or a label that is not a class.
            Exception: one of the files is broken, or their sizes differ.
        """
        pair = self.pairs[index]
        with pair.image.open("rb") as file:
            image = read_values(file, self.pixels)
        try:
            values = read_mask(pair.mask)
        except InputError:
            raise
        except Exception as error:  # decoders raise anything on broken files
            raise ValueError(f"its mask {pair.mask}: {reason_of(error)}") from error
        sizes = [f"{shape[1]} x {shape[0]} px" for shape in (values.shape, image.shape[1:])]
        if sizes[0] != sizes[1]:
            raise ValueError(f"its mask has {sizes[0]}, the image {sizes[1]}")
        resized = scaled_size(values.shape, self.transform.short_side)
        if math.prod(resized) > max(MAX_RESIZED, values.size):
            raise ValueError(
                f"{sizes[1]} would become {resized[1]} x {resized[0]} px by --short_side "
                f"{self.transform.short_side}: cut it into pieces"
            )
        return image, self.rule(values, pair.mask)

    def transformed(
        self, index: int, content: tuple[Tensor, Tensor], *seed_parts: int | str
    ) -> tuple[Tensor, Tensor]:
        """Transform an image and its labels."""
        return self.transform(*content, *seed_parts)

    def batch(
        self, contents: Sequence[tuple[Tensor, Tensor]], broken: list[tuple[str, str]]
    ) -> SegmentationBatch:
        """Stack images and labels."""
        images, labels = map(list, zip(*contents, strict=True)) if contents else ([], [])
        images = of_one_type(images, self.normalization.value_range)
        stacked = (torch.stack(x) if x else torch.empty(0) for x in (images, labels))
        return SegmentationBatch(*stacked, broken, self.normalization)


class SegmentationData(NamedTuple):
    """Training and validation images, and their classes."""

    train: SegmentationImages
    val: SegmentationImages | None
    classes: tuple[str, ...]


def open_classes(
    settings: SegmentationSettings, trained: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Names of the classes: from --classes, the dataset's file, or numbers up to --nb_classes.

    Args:
        trained: a checkpoint's classes, which have to be the same; used if nothing else is known.

    Raises:
        InputError: neither names nor a number are known, or they contradict each other.
    """
    layout, first = settings.layout, settings.layout.first_label
    if layout.ignore_index == first == 0:
        raise InputError(
            "--ignore_index 0 would leave out the first class: use --reduce_zero_label, with which "
            "label 0 does not count and the classes start at 1"
        )
    own = settings.root / layout.classes_file
    path = Path(settings.classes) if settings.classes else own if own.is_file() else None
    number = settings.nb_classes or layout.num_classes
    by = "--nb_classes is" if settings.nb_classes else f"{settings.dataset} has"
    if path is not None:
        names = read_class_names(path, layout.ignore_index, first)
        if number not in (None, len(names)):
            raise InputError(
                f"{path} names {len(names)} classes, but {by} {number}: correct one of them"
            )
    elif trained is not None:
        names = list(trained)
        if number not in (None, len(names)):
            raise InputError(
                f"the checkpoint has {len(names)} classes, but {by} {number}: use the data that it "
                "was trained for, or correct the flag"
            )
    elif number is None:
        raise InputError(
            "the number of classes is unknown: give their names with --classes FILE, one on each "
            "line, or their number with --nb_classes"
        )
    else:
        names = [f"class {first + i}" for i in range(min(number, MAX_CLASSES + 1))]
    if not 2 <= len(names) <= MAX_CLASSES:
        raise InputError(f"from 2 to {MAX_CLASSES} classes are supported, not {len(names)}")
    if trained is not None and tuple(names) != tuple(trained):
        raise InputError(
            f"the classes of {path} differ from the checkpoint's, so labels would not mean the "
            f"same: {_first_difference(names, trained)}; give --classes those it was trained with"
        )
    return tuple(names)


def _first_difference(names: Sequence[str], trained: Sequence[str]) -> str:
    if len(names) != len(trained):
        return f"{len(names)} instead of {len(trained)}"
    number = next(i for i, (a, b) in enumerate(zip(names, trained, strict=True)) if a != b)
    return f"class {number} is {names[number]}, not {trained[number]}"


def open_segmentation(
    settings: SegmentationSettings,
    *,
    crop_size: tuple[int, int],
    mean: Colors,
    std: Colors,
    pixels: PixelFormat = RGB8,
    earlier: Earlier | None = None,
    seed: int,
) -> SegmentationData:
    """Open the images and masks of --data_path; validation images are those of its `val`.

    Args:
        pixels: how images are read.
        earlier: see `choose_colors`.

    Raises:
        InputError: see `list_pairs`, `open_classes`, `choose_colors` and `check_masks`.
    """
    settings = settings.read_as(pixels)
    root, layout = settings.root, settings.layout
    classes = open_classes(settings)
    rule = label_rule(settings, classes)
    pairs = list_pairs(root, layout.train, arrays=not pixels.is_rgb8)
    files = StoredImages([pair.image for pair in pairs])
    mean, std = choose_colors(files, mean, std, pixels=pixels, earlier=earlier)
    normalization = Normalization(tuple(mean), tuple(std), pixels.value_range)
    augmentation = JointAugmentation(
        crop_size,
        normalization.mean,
        layout.short_side,
        tuple(settings.scale),
        settings.photometric,
        settings.hflip,
        settings.vflip,
        pixels.value_range,
    )
    options = {"normalization": normalization, "pixels": pixels, "seed": seed}
    train = SegmentationImages(pairs, rule, augmentation, replace_broken=True, **options)
    check_masks(train, classes)
    val = None
    if any((root / kind / layout.val).exists() for kind in ("images", "annotations")):
        val = open_validation(settings, rule, **options)
        check_masks(val, classes, several=False)
    return SegmentationData(train, val, classes)


def open_validation(
    settings: SegmentationSettings,
    rule: LabelRule,
    *,
    normalization: Normalization,
    pixels: PixelFormat = RGB8,
    seed: int = 0,
) -> SegmentationImages:
    """Open the validation images of --data_path.

    Args:
        pixels: how images are read.

    Raises:
        InputError: see `list_pairs`.
    """
    pairs = list_pairs(settings.root, settings.layout.val, arrays=not pixels.is_rgb8)
    whole = WholeImage(settings.layout.short_side)
    options = {"seed": seed, "replace_broken": False, "pixels": pixels}
    options["show_channels"] = settings.show_channels
    return SegmentationImages(pairs, rule, whole, normalization, **options)


def label_rule(settings: SegmentationSettings, classes: Sequence[str]) -> LabelRule:
    """What the values of the dataset's masks mean.

    Raises:
        InputError: the label of a class is the one that does not count.
    """
    layout = settings.layout
    number = layout.ignore_index - layout.first_label
    if 0 <= number < len(classes):
        raise InputError(
            f"--ignore_index {layout.ignore_index} is the label of the class {classes[number]}: "
            "give that of pixels that do not count, or -1 if there are none"
        )
    return LabelRule(len(classes), layout.ignore_index, layout.reduce_zero_label)


def check_masks(
    images: SegmentationImages, classes: Sequence[str], *, several: bool = True
) -> None:
    """Look at a few masks before a run, evenly spaced: log which classes they have.

    Args:
        several: they need at least two classes.

    Raises:
        InputError: a mask has colors, a label that is not a class, or all have the same class.
    """
    checked = evenly_spaced(len(images), CHECKED_MASKS)
    pixels = torch.zeros(len(classes) + 1, dtype=torch.long)  # unlabeled ones first
    for index in checked:
        pair = images.pairs[index]
        try:
            labels = images.rule(read_mask(pair.mask), pair.mask)
        except InputError:
            raise
        except Exception:  # read again in training, where broken files are counted
            continue
        pixels += (labels.flatten().long() + 1).bincount(minlength=len(pixels))
    unlabeled, *labeled = (pixels / pixels.sum().clamp(min=1)).tolist()
    found = [name for name, part in zip(classes, labeled, strict=True) if part]
    missing = [name for name in classes if name not in found]
    what = "mask" if several else "validation mask"
    looked_at = f"{counted(len(checked), what)} looked at: {len(found)} of {len(classes)} classes"
    if several and len(found) < 2 and pixels.sum():
        raise InputError(
            f"{looked_at} ({', '.join(found) or 'none'}), {unlabeled:.0%} of the pixels do not "
            f"count: classes have to be numbered from {images.rule.first_label} on, "
            f"and --ignore_index {images.rule.ignore_index} must not be one of them"
        )
    absent = f", without {', '.join(missing)}" if missing else ""
    _logger.info("%s%s; %.1f%% of the pixels do not count", looked_at, absent, 100 * unlabeled)
