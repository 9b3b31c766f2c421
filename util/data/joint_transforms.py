"""Transforms of an image together with its labels."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as v2f

from util.data.batch import Box
from util.data.geometry import crop, in_type, mirror, pad, resize
from util.data.masks import UNLABELED
from util.seeding import fold_seed, seeded

CROP_TRIES, MAX_CLASS_FRACTION = 10, 0.75  # of a training crop


@dataclass(frozen=True)
class JointAugmentation:
    """Scale, crop, flip and colors of a training image and its labels, as in MAE's recipe.

    Args:
        size: (height, width) of the crop, in pixels.
        mean: of the normalization; fills what lies outside the image.
        short_side: of the image before it is scaled; None leaves its size.
        scale: range of the factor.
        photometric: vary brightness, contrast, saturation and hue, of 8-bit RGB.
        hflip, vflip: fractions that are flipped left to right and top to bottom.
        value_range: the values that are 0 and 1 of the mean; None for those of an image's type.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    short_side: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    photometric: bool = True
    hflip: float = 0.5
    vflip: float = 0.0
    value_range: tuple[float, float] | None = None

    def __call__(
        self, image: Tensor, labels: Tensor, *seed_parts: int | str
    ) -> tuple[Tensor, Tensor]:
        """Image (C, h, w) and labels (h, w) -> (C, H, W) and (H, W), by the seed."""
        rng = random.Random(fold_seed(*seed_parts))
        factor = rng.uniform(*self.scale)
        size = scaled_size(image.shape[1:], self.short_side, factor)
        image = resize(image, size)
        labels = v2f.resize(tv_tensors.Mask(labels), size).as_subclass(Tensor)
        shown = [min(sides) for sides in zip(self.size, size, strict=True)]
        box = Box(*self.draw_box(rng, labels, shown), *shown)
        flips = {"horizontal": rng.random() < self.hflip}
        flips["vertical"] = self.vflip > 0 and rng.random() < self.vflip
        image, labels = (mirror(crop(x, box), **flips) for x in (image, labels))
        if self.photometric:
            with seeded(*seed_parts):
                image = v2.RandomPhotometricDistort()(image)
        image = pad(image, self.size, in_type(self.mean, image.dtype, self.value_range))
        return image, pad(labels[None], self.size, [UNLABELED])[0]

    def draw_box(self, rng: random.Random, labels: Tensor, size: Sequence[int]) -> tuple[int, int]:
        """Draw a crop's top and left, again if one class has more than 75% of its labeled pixels.

        After CROP_TRIES, the last one stands.
        """
        for _ in range(CROP_TRIES):
            corner = tuple(rng.randint(0, x - s) for x, s in zip(labels.shape, size, strict=True))
            shown = crop(labels, Box(*corner, *size))
            counts = shown[shown != UNLABELED].long().bincount()
            if counts.count_nonzero() > 1 and counts.max() < MAX_CLASS_FRACTION * counts.sum():
                break
        return corner


@dataclass(frozen=True)
class WholeImage:
    """The whole image, resized to a short side; its labels keep their size."""

    short_side: int | None = None

    def __call__(self, image: Tensor, labels: Tensor, *_: int | str) -> tuple[Tensor, Tensor]:
        """Image (C, h, w) and labels (H, W) -> (C, h', w') and the same labels."""
        return self.resize(image), labels

    def resize(self, image: Tensor) -> Tensor:
        """Image (C, h, w) -> (C, h', w')."""
        if self.short_side is None:
            return image
        return resize(image, scaled_size(image.shape[1:], self.short_side))


def scaled_size(size: Sequence[int], short_side: int | None, factor: float = 1.0) -> list[int]:
    """(height, width) resized to a short side, if one is given, and then by a factor."""
    if short_side is not None:
        factor *= short_side / min(size)
    return [max(1, round(side * factor)) for side in size]
