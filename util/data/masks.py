"""Images and their masks as files, names of classes, and what the values of a mask mean."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.data.decode import decode_by_pillow, upright
from util.data.folders import ARRAY_SUFFIXES, IMAGE_SUFFIXES
from util.data.layout import images_below
from util.errors import InputError, counted
from util.settings.segmentation import ADE20K_NAMES

UNLABELED = -1  # in labels, whatever marks it in a file
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
INDEXED = r"(\d+)(?:\s*[:,;]\s*|\s+)(.+)"  # a line of an index and a name


class Pair(NamedTuple):
    """An image and its mask."""

    name: str
    """Path below the folder of the images, without suffix."""
    image: Path
    mask: Path


def list_images(
    folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES, *, arrays: bool = False
) -> dict[str, Path]:
    """Find a folder's images by their path without suffix, sorted.

    Args:
        arrays: whether arrays of NumPy are images.

    Raises:
        InputError: the folder is missing or empty, or two files differ only in their suffix.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the folder of the images")
    found: dict[str, Path] = {}
    suffixes = (*suffixes, *(ARRAY_SUFFIXES if arrays else ()))
    files = images_below(folder, arrays=arrays)
    paths = [path for path in files if path.suffix.lower() in suffixes]
    for path in sorted(paths, key=lambda path: (path.parent.parts, path.name)):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise InputError(f"{found[name]} and {path} have the same name: rename one of them")
        found[name] = path
    if not found:
        raise InputError(f"no images found in {folder}: use {', '.join(suffixes[:5])} and the like")
    return found


def list_pairs(root: Path, split: str, *, arrays: bool = False) -> list[Pair]:
    """Find the images of a split and their masks: `images/SPLIT` and `annotations/SPLIT`.

    Args:
        arrays: whether arrays of NumPy are images.

    Raises:
        InputError: a folder is missing, or an image or a mask has no partner.
    """
    folders = {kind: root / kind / split for kind in ("images", "annotations")}
    for folder in folders.values():
        if not folder.is_dir():
            raise InputError(
                f"{folder} does not exist: --data_path needs images/{split} and "
                f"annotations/{split} with masks of the same names"
            )
    images = list_images(folders["images"], arrays=arrays)
    masks = list_images(folders["annotations"], MASK_SUFFIXES)
    for what, partner, alone in (
        ("image", "mask", [path for name, path in images.items() if name not in masks]),
        ("mask", "image", [path for name, path in masks.items() if name not in images]),
    ):
        if alone:
            missing = folders["annotations" if what == "image" else "images"]
            more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
            raise InputError(
                f"{counted(len(alone), what)} without {partner}: {alone[0]}{more}; add files of "
                f"the same name to {missing}, or remove them"
            )
    return [Pair(name, images[name], masks[name]) for name in images]


def read_class_names(path: Path, ignore_index: int, first: int = 0) -> list[str]:
    """Read names from lines "NAME", "INDEX NAME", or ADE20K's table.

    Indices of pixels that do not count are no classes: `ignore_index`, and those below `first`.

    Args:
        first: label of the first class in the masks.

    Raises:
        InputError: the file cannot be read, is empty or repeats a name, or its indices have gaps.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text in UTF-8: save it as such") from error
    except OSError as error:
        raise InputError(f"cannot read the names of classes in {path}: {error}") from error
    lines = [line for line in lines if line]
    if path.name == ADE20K_NAMES:
        lines = [line.rsplit("\t", 1)[-1].strip() for line in lines[1:]]
    split = [match.groups() for line in lines if (match := re.fullmatch(INDEXED, line))]
    if split and len(split) < len(lines):
        raise InputError(f"{path} has lines with and without an index: write it on all or none")
    if split:
        indices = [int(index) for index, _ in split]
        names = {int(index): name for index, name in split}
        kept = [i for i in sorted(names) if i >= first and i != ignore_index]
        if len(names) < len(indices) or kept != list(range(first, first + len(kept))):
            raise InputError(
                f"{path} has the indices {', '.join(map(str, sorted(indices)))}: number the "
                f"classes from {first} without gaps, besides --ignore_index {ignore_index}"
            )
        lines = [names[i] for i in kept]
    if not lines or len(set(lines)) < len(lines):
        fault = "a name twice" if lines else "no names"
        raise InputError(f"{path} has {fault}: give each class a name of its own")
    return lines


class LabelRule(NamedTuple):
    """What the values of a mask mean."""

    num_classes: int
    ignore_index: int
    reduce_zero_label: bool

    @property
    def first_label(self) -> int:
        """Label of the first class."""
        return int(self.reduce_zero_label)

    def __call__(self, values: np.ndarray, path: Path) -> Tensor:
        """Values (H, W) of a mask -> labels int16 (H, W), UNLABELED where a pixel does not count.

        Raises:
            InputError: a value is not a class.
        """
        first = self.first_label
        ignored = values == self.ignore_index
        if self.reduce_zero_label:
            ignored |= values == 0
        wrong = ~ignored & ((values < first) | (values >= first + self.num_classes))
        if wrong.any():
            unlabeled = f"{'0 and ' if first else ''}{self.ignore_index}"
            raise InputError(
                f"{path} has label {values[wrong][0]}, but the classes are {first} to "
                f"{first + self.num_classes - 1}, with {unlabeled} for pixels that do not count: "
                "correct --nb_classes or --classes, --ignore_index or --reduce_zero_label, or the "
                "mask"
            )
        return torch.from_numpy(np.where(ignored, UNLABELED, values - first).astype(np.int16))


def read_mask(path: Path) -> np.ndarray:
    """Read the class indices (H, W) of an index or palette image, int64.

    Raises:
        InputError: it has colors instead of indices.
        BrokenImageError: it is damaged or of an unknown format.
    """
    mode, values = decode_by_pillow(
        path.read_bytes(), lambda image: (image.mode, np.asarray(upright(image)))
    )
    if mode not in ("1", "L", "P", "I") and not mode.startswith("I;16"):
        raise InputError(
            f"{path} has mode {mode} instead of class indices: save masks as index or palette PNG"
        )
    return values.astype(np.int64)
