"""Transforms of an image to what a model sees: random crops or the center."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from util.data.batch import Box, Crops, Normalization, resize_crop
from util.data.decode import Jpeg, Record, read_for_device, read_pixels, read_rgb
from util.seeding import fold_seed, seeded
from util.settings.views import LABELED_VIEW, PRETRAIN_VIEW, AugmentSettings, ViewSettings

INTERPOLATIONS = ("bicubic", "bilinear")  # of evaluation

# Largest size of a resized image that is computed whole, as a multiple of the size it covers.
MAX_COVER = 16


def draw_size(
    rng: random.Random, height: int, width: int, area: tuple[float, float]
) -> tuple[int, int]:
    """Draw the (height, width) of a crop, which may not fit into the image.

    Its area is uniform, log(width / height) uniform in [log(3/4), log(4/3)].

    Args:
        area: range of the area, as fractions of the image's, in (0, 1].
    """
    pixels = height * width * rng.uniform(*area)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    return round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))


def draw_box(rng: random.Random, height: int, width: int, area: tuple[float, float]) -> Box:
    """Draw a random crop, distributed like torchvision's RandomResizedCrop.

    A size (see `draw_size`) that does not fit into the image is drawn again; after ten tries, the
    crop is the largest centered one with these aspect ratios.
    """
    for _ in range(10):
        h, w = draw_size(rng, height, width, area)
        if 0 < h <= height and 0 < w <= width:
            return Box(rng.randint(0, height - h), rng.randint(0, width - w), h, w)
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def draw_clipped_box(rng: random.Random, height: int, width: int, area: tuple[float, float]) -> Box:
    """Draw a random crop whose size (see `draw_size`) is clipped to the image, as MAE's probe."""
    h, w = draw_size(rng, height, width, area)
    h, w = min(max(h, 1), height), min(max(w, 1), width)
    return Box(rng.randint(0, height - h), rng.randint(0, width - w), h, w)


@dataclass(frozen=True)
class RandomCrops:
    """Random crops of an image, some of them flipped; the device flips and normalizes.

    Args:
        size: (height, width) in pixels.
        view: their areas, and how many are flipped.
        num_crops: K, crops per image. The k-th is the same for any larger K.
        decode: where JPEGs are decoded, by the worker (cpu) or on the device (gpu).
        clip: draw the boxes with `draw_clipped_box` instead of `draw_box`.
    """

    size: tuple[int, int]
    normalization: Normalization
    view: ViewSettings
    num_crops: int = 1
    decode: Literal["cpu", "gpu"] = "cpu"
    clip: bool = False

    def read(self, record: Record) -> Jpeg | Tensor:
        """Return the pixels (3, h, w), or a file that the device decodes."""
        return read_pixels(record) if self.decode == "cpu" else read_for_device(record)

    def draw(
        self, height: int, width: int, *seed_parts: int | str
    ) -> tuple[list[Box], list[bool], list[bool]]:
        """Draw the crops' boxes in an image of this size, and which are flipped along each side."""
        rng, boxes, flips, vertical = random.Random(fold_seed(*seed_parts)), [], [], []
        draw = draw_clipped_box if self.clip else draw_box
        for _ in range(self.num_crops):
            boxes.append(draw(rng, height, width, self.view.crop_area))
            flips.append(rng.random() < self.view.hflip)
            # Without vertical flips nothing is drawn for them, as before they existed.
            vertical.append(self.view.vflip > 0 and rng.random() < self.view.vflip)
        return boxes, flips, vertical

    def __call__(self, image: Jpeg | Tensor, *seed_parts: int | str) -> Crops:
        """Return crops of an image; see `Transform`."""
        boxes, flips, vertical_flips = self.draw(*image.shape[1:], *seed_parts)
        crops = Crops([], flips, self.normalization, vertical_flips=vertical_flips)
        if isinstance(image, Jpeg):
            return crops._replace(jpeg=image.data, boxes=boxes, size=self.size)
        return crops._replace(pixels=[resize_crop(image, box, self.size) for box in boxes])


@dataclass(frozen=True)
class CenterCrop:
    """The center of a resized image; the device normalizes.

    Args:
        size: (height, width) of the crop.
        cover_size: (height, width) that the resized image just covers, or has if `squash`.
        interpolation: one of INTERPOLATIONS.
        squash: do not keep the aspect ratio.
    """

    size: tuple[int, int]
    cover_size: tuple[int, int]
    normalization: Normalization
    interpolation: str = "bicubic"
    squash: bool = False
    num_crops: ClassVar[int] = 1
    read = staticmethod(read_pixels)

    def __call__(self, image: Tensor, *_: int | str) -> Crops:
        """Return the crop of an image (3, h, w); see `Transform`."""
        whole = Box(0, 0, *image.shape[1:])
        cover = self.cover_size if self.squash else self._cover(whole.height, whole.width)
        top, left = (round((c - s) / 2) for c, s in zip(cover, self.size, strict=True))
        box = Box(top, left, *self.size)
        if math.prod(cover) > MAX_COVER * math.prod(self.cover_size):
            crop = crop_of_resized(image, cover, box, self.interpolation)
        else:
            resized = resize_crop(image, whole, cover, self.interpolation)  # (3, *cover)
            crop = resized[:, top : top + box.height, left : left + box.width]
        return Crops([crop], [False], self.normalization)

    def _cover(self, height: int, width: int) -> tuple[int, int]:
        """Size that covers `cover_size` with the aspect ratio of an image."""
        scale = max(self.cover_size[0] / height, self.cover_size[1] / width)
        # As timm: squares by torchvision's Resize, which truncates, others by its own, rounded.
        whole = int if self.cover_size[0] == self.cover_size[1] else round
        sides = zip(self.cover_size, (height, width), strict=True)
        return tuple(max(covered, whole(side * scale)) for covered, side in sides)


def crop_of_resized(
    image: Tensor, size: Sequence[int], box: Box, interpolation: str = "bicubic"
) -> Tensor:
    """Resize an image (3, h, w) to a size and crop a box, computing only the pixels of the box.

    Pillow resizes, which rounds differently from `resize_crop`.
    """
    source = Image.fromarray(image.permute(1, 2, 0).numpy())
    top, bottom = (y * source.height / size[0] for y in (box.top, box.top + box.height))
    left, right = (x * source.width / size[1] for x in (box.left, box.left + box.width))
    edges = (left, top, right, bottom)
    resampling = Image.Resampling[interpolation.upper()]
    crop = source.resize((box.width, box.height), resampling, box=edges)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


@dataclass(frozen=True)
class Augmentation:
    """An augmentation of Pillow images that draws from the global generators, such as timm's.

    Args:
        augment: maps an RGB image to normalized float32 (3, H, W).
    """

    augment: Callable[[Image.Image], Tensor]
    num_crops: ClassVar[int] = 1
    read = staticmethod(read_rgb)

    def __call__(self, image: Image.Image, *seed_parts: int | str) -> Crops:
        """Return the augmented image; see `Transform`."""
        with seeded(*seed_parts):
            return Crops([self.augment(image)], [False], None)


def pretrain_transform(
    img_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    view: ViewSettings = PRETRAIN_VIEW,
    *,
    num_crops: int = 1,
    decode: Literal["cpu", "gpu"] = "cpu",
) -> RandomCrops:
    """Build MAE's augmentation: a random crop and flips.

    Args:
        img_size: (height, width) in pixels.
        mean, std: of the RGB channels, on the [0, 1] scale.
        num_crops, decode: see `RandomCrops`.
    """
    normalization = Normalization(tuple(mean), tuple(std))
    return RandomCrops(tuple(img_size), normalization, view, num_crops, decode)


def probe_transform(
    img_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    view: ViewSettings = LABELED_VIEW,
) -> RandomCrops:
    """Build MAE's augmentation of a linear probe: a clipped random crop and flips."""
    return RandomCrops(tuple(img_size), Normalization(tuple(mean), tuple(std)), view, clip=True)


def finetune_transform(
    img_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    augment: AugmentSettings,
    view: ViewSettings = LABELED_VIEW,
) -> Augmentation:
    """Build timm's augmentation: random crop, flips, RandAugment, random erasing.

    Args:
        img_size: (height, width) in pixels.
        mean, std: of the RGB channels, on the [0, 1] scale.
        augment: everything besides cropping and flipping.
    """
    transform = create_transform(
        img_size,
        is_training=True,
        scale=tuple(view.crop_area),
        hflip=view.hflip,
        vflip=view.vflip,
        interpolation="bicubic",
        mean=mean,
        std=std,
        auto_augment=None if augment.auto_augment == "none" else augment.auto_augment,
        color_jitter=augment.color_jitter,
        re_prob=augment.reprob,
        re_mode=augment.remode,
        re_count=augment.recount,
    )
    return Augmentation(transform)


def default_crop_pct(img_size: tuple[int, int]) -> float:
    """Return MAE's `crop_pct` for `eval_transform`: 224 / 256 up to 224 pixels, 1 above."""
    return 224 / 256 if max(img_size) <= 224 else 1.0


def eval_transform(
    img_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float = 1.0,
    *,
    interpolation: str = "bicubic",
    squash: bool = False,
) -> CenterCrop:
    """Build the transform that resizes to cover `img_size / crop_pct` and crops the center.

    Args:
        img_size: (height, width) in pixels.
        mean, std: of the RGB channels, on the [0, 1] scale.
        crop_pct: side of the crop over the side it is cut from, in (0, 1]; MAE's is 224 / 256.
        interpolation: one of INTERPOLATIONS.
        squash: resize to exactly `img_size / crop_pct`, whatever the image's aspect ratio.
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must lie in (0, 1], not {crop_pct}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {INTERPOLATIONS}, not {interpolation}")
    cover_size = tuple(int(side / crop_pct) for side in img_size)  # as MAE and timm
    normalization = Normalization(tuple(mean), tuple(std))
    return CenterCrop(tuple(img_size), cover_size, normalization, interpolation, squash)
