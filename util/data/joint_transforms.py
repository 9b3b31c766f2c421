"""Transforms of an image together with its labels."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as v2f

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
        photometric: vary brightness, contrast, saturation and hue.
        hflip, vflip: fractions that are flipped left to right and top to bottom.
    """

    size: tuple[int, int]
    mean: Sequence[float]
    short_side: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    photometric: bool = True
    hflip: float = 0.5
    vflip: float = 0.0

    def __call__(
        self, image: Tensor, labels: Tensor, *seed_parts: int | str
    ) -> tuple[Tensor, Tensor]:
        """Image uint8 (3, h, w) and labels (h, w) -> (3, H, W) and (H, W), by the seed."""
        rng = random.Random(fold_seed(*seed_parts))
        factor = rng.uniform(*self.scale)
        size = scaled_size(image.shape[1:], self.short_side, factor)
        pair = tv_tensors.Image(image), tv_tensors.Mask(labels)
        image, labels = (v2f.resize(x, size, antialias=True) for x in pair)
        crop = [min(sides) for sides in zip(self.size, size, strict=True)]
        box = self.draw_box(rng, labels, crop)
        image, labels = (v2f.crop(x, *box, *crop) for x in (image, labels))
        if rng.random() < self.hflip:
            image, labels = v2f.horizontal_flip(image), v2f.horizontal_flip(labels)
        if self.vflip > 0 and rng.random() < self.vflip:
            image, labels = v2f.vertical_flip(image), v2f.vertical_flip(labels)
        if self.photometric:
            with seeded(*seed_parts):
                image = v2.RandomPhotometricDistort()(image)
        below, right = (side - own for side, own in zip(self.size, crop, strict=True))
        image = v2f.pad(image, [0, 0, right, below], fill=[round(255 * m) for m in self.mean])
        labels = v2f.pad(labels, [0, 0, right, below], fill=UNLABELED)
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)

    def draw_box(self, rng: random.Random, labels: Tensor, size: Sequence[int]) -> tuple[int, int]:
        """Draw a crop's top and left, again if one class has more than 75% of its labeled pixels.

        After CROP_TRIES, the last one stands.
        """
        for _ in range(CROP_TRIES):
            box = tuple(rng.randint(0, x - s) for x, s in zip(labels.shape, size, strict=True))
            crop = v2f.crop(labels, *box, *size)
            counts = crop[crop != UNLABELED].long().bincount()
            if counts.count_nonzero() > 1 and counts.max() < MAX_CLASS_FRACTION * counts.sum():
                break
        return box


@dataclass(frozen=True)
class WholeImage:
    """The whole image, resized to a short side; its labels keep their size."""

    short_side: int | None = None

    def __call__(self, image: Tensor, labels: Tensor, *_: int | str) -> tuple[Tensor, Tensor]:
        """Image uint8 (3, h, w) and labels (H, W) -> (3, h', w') and the same labels."""
        return self.resize(image), labels

    def resize(self, image: Tensor) -> Tensor:
        """Image uint8 (3, h, w) -> (3, h', w')."""
        if self.short_side is None:
            return image
        return v2f.resize(image, scaled_size(image.shape[1:], self.short_side), antialias=True)


def scaled_size(size: Sequence[int], short_side: int | None, factor: float = 1.0) -> list[int]:
    """(height, width) resized to a short side, if one is given, and then by a factor."""
    if short_side is not None:
        factor *= short_side / min(size)
    return [max(1, round(side * factor)) for side in size]
