"""Resizing, mirroring and padding of images in the type of their files."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as v2f

from util.data.batch import Box, to_type
from util.patches import TYPE_RANGES, as_movable


def resize(image: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (C, h, w) of a type in TYPE_RANGES to a size, bilinearly and antialiased."""
    if image.dtype in (torch.uint8, torch.float32):
        return v2f.resize(image, list(size), antialias=True)
    return to_type(v2f.resize(image.float(), list(size), antialias=True), image.dtype)


def crop(image: Tensor, box: Box) -> Tensor:
    """Cut a box out of (..., h, w)."""
    top, left, height, width = box
    return image[..., top : top + height, left : left + width]


def mirror(image: Tensor, *, horizontal: bool, vertical: bool) -> Tensor:
    """Mirror (..., h, w) left to right, top to bottom, both or not at all."""
    dims = [dim for dim, is_on in ((-1, horizontal), (-2, vertical)) if is_on]
    return as_movable(image).flip(dims).view(image.dtype) if dims else image


def pad(image: Tensor, size: Sequence[int], fill: Sequence[float]) -> Tensor:
    """Put (C, h, w) into the upper left corner of (C, H, W).

    Args:
        fill: value of each channel elsewhere.
    """
    padded = torch.tensor(fill, dtype=image.dtype).view(-1, 1, 1).repeat(1, *size)
    padded[:, : image.shape[1], : image.shape[2]] = image
    return padded


def in_type(
    values: Sequence[float], dtype: torch.dtype, value_range: tuple[float, float] | None
) -> list[float]:
    """Return colors of [0, 1] as an image of a type in TYPE_RANGES has them.

    Args:
        value_range: the values that are 0 and 1; None for those of the type.
    """
    low, high = TYPE_RANGES[dtype] if value_range is None else value_range
    scaled = [low + value * (high - low) for value in values]
    if dtype == torch.float32:
        return scaled
    limits = torch.iinfo(dtype)
    return [min(max(round(value), limits.min), limits.max) for value in scaled]
