"""Transforms of an image together with the masks of its objects."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as rle
from torch import Tensor

from util.data.batch import Box
from util.data.geometry import crop, in_type, mirror, pad, resize
from util.seeding import fold_seed


class View(NamedTuple):
    """A part of an image, resized, perhaps mirrored, and put into a corner of a square."""

    box: Box
    """The part, in pixels of the image."""
    size: tuple[int, int]
    """(height, width) that it is resized to."""
    flip: bool
    """Left to right."""
    side: int
    """Of the square, in pixels."""
    vertical_flip: bool = False

    def image(
        self,
        image: Tensor,
        fill: Sequence[float],
        value_range: tuple[float, float] | None = None,
    ) -> Tensor:
        """Image (C, h, w) -> (C, side, side).

        Args:
            fill: color elsewhere, in [0, 1].
            value_range: the values that are 0 and 1; None for those of the image's type.
        """
        shown = resize(crop(image, self.box), self.size)
        return self._place(shown, in_type(fill, image.dtype, value_range))

    def mask(self, mask: dict) -> Tensor:
        """Compressed run lengths of an object -> its mask uint8 (side, side)."""
        mask = crop(torch.from_numpy(rle.decode(mask)), self.box)
        # Of a pixel's center, as for the image; "nearest" would take its corner.
        mask = F.interpolate(mask[None, None].contiguous(), self.size, mode="nearest-exact")
        return self._place(mask[0], [0])[0]

    def boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) of the image, left, top, right, bottom -> those of what is shown of them."""
        top, left, rows, columns = self.box
        height, width = self.size
        scale = torch.tensor([width / columns, height / rows]).repeat(2)
        limit = torch.tensor([width, height], dtype=boxes.dtype).repeat(2)
        boxes = (boxes - torch.tensor([left, top, left, top])) * scale
        boxes = boxes.clamp(min=0).minimum(limit)
        if self.flip:
            left, top, right, bottom = boxes.unbind(dim=1)
            boxes = torch.stack((width - right, top, width - left, bottom), dim=1)
        if self.vertical_flip:
            left, top, right, bottom = boxes.unbind(dim=1)
            boxes = torch.stack((left, height - bottom, right, height - top), dim=1)
        return boxes

    def _place(self, image: Tensor, fill: Sequence[float]) -> Tensor:
        image = mirror(image, horizontal=self.flip, vertical=self.vertical_flip)
        return pad(image, (self.side, self.side), fill)


@dataclass(frozen=True)
class LargeScaleJitter:
    """Draws views for training as ViTDet does: resize, crop what does not fit, and flip.

    Args:
        side: of the square, in pixels.
        scale: range of the image's longer side after resizing, over the square's.
        hflip, vflip: fractions that are flipped left to right and top to bottom.
    """

    side: int
    scale: tuple[float, float] = (0.1, 2.0)
    hflip: float = 0.5
    vflip: float = 0.0

    def view(self, size: Sequence[int], *seed_parts: int | str) -> View:
        """Draw a view of an image of (height, width), by the seed.

        The part is cropped before it is resized, which gives the same region for less work.
        """
        rng = random.Random(fold_seed(*seed_parts))
        factor = self.side / max(size) * rng.uniform(*self.scale)
        shown = [min(side, max(1, round(self.side / factor))) for side in size]
        top, left = (rng.randint(0, side - own) for side, own in zip(size, shown, strict=True))
        flip = rng.random() < self.hflip
        vertical_flip = self.vflip > 0 and rng.random() < self.vflip
        size = _resized(shown, factor, self.side)
        return View(Box(top, left, *shown), size, flip, self.side, vertical_flip)


@dataclass(frozen=True)
class WholeImage:
    """The whole image, as large as fits into the square; for evaluation and without augmentation.

    Args:
        side: of the square, in pixels.
    """

    side: int

    def view(self, size: Sequence[int], *_: int | str) -> View:
        """Return the view of an image of (height, width)."""
        scaled = _resized(size, self.side / max(size), self.side)
        return View(Box(0, 0, *size), scaled, flip=False, side=self.side)


def _resized(size: Sequence[int], factor: float, limit: int) -> tuple[int, int]:
    return tuple(min(limit, max(1, round(factor * side))) for side in size)
