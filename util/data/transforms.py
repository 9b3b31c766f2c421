"""Transforms of an image to what a model sees: random crops or the center."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from util.data.batch import (
    Box,
    Crops,
    Normalization,
    Sample,
    collate,
    resize_crop,
    to_type,
)
from util.data.decode import Jpeg, Record, read_for_device, read_rgb
from util.data.values import OpenImage, open_values, read_values, read_window
from util.normalization import RGB8, PixelFormat
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
        pixels: how images are read.
        tile: side of a window of a larger image, drawn for every crop, from which it is cut.
        clip: draw the boxes with `draw_clipped_box` instead of `draw_box`.
    """

    size: tuple[int, int]
    normalization: Normalization
    view: ViewSettings
    num_crops: int = 1
    decode: Literal["cpu", "gpu"] = "cpu"
    pixels: PixelFormat = RGB8
    tile: int | None = None
    clip: bool = False

    def read(self, record: Record) -> Jpeg | OpenImage | Tensor:
        """Return the pixels (C, h, w), or a file that the device decodes or windows are read of."""
        if self.decode == "gpu":
            return read_for_device(record)
        read = read_values if self.tile is None else open_values
        return read(record, self.pixels)

    def draw(
        self, height: int, width: int, *seed_parts: int | str
    ) -> tuple[list[Box], list[bool], list[bool]]:
        """Draw the crops' boxes in an image of this size, and which are flipped along each side."""
        rng, boxes, flips, vertical = random.Random(fold_seed(*seed_parts)), [], [], []
        draw = draw_clipped_box if self.clip else draw_box
        for _ in range(self.num_crops):
            window = draw_window(rng, height, width, self.tile)
            box = draw(rng, window.height, window.width, self.view.crop_area)
            boxes.append(box._replace(top=window.top + box.top, left=window.left + box.left))
            flips.append(rng.random() < self.view.hflip)
            # Without vertical flips nothing is drawn for them, as before they existed.
            vertical.append(self.view.vflip > 0 and rng.random() < self.view.vflip)
        return boxes, flips, vertical

    def __call__(self, image: Jpeg | OpenImage | Tensor, *seed_parts: int | str) -> Crops:
        """Return crops of an image; see `Transform`."""
        boxes, flips, vertical_flips = self.draw(*image.shape[1:], *seed_parts)
        crops = Crops([], flips, self.normalization, vertical_flips=vertical_flips)
        if isinstance(image, Jpeg):
            return crops._replace(jpeg=image.data, boxes=boxes, size=self.size)
        if isinstance(image, OpenImage):
            with image:
                return crops._replace(pixels=[self._resized(image.window(box)) for box in boxes])
        return crops._replace(pixels=[resize_crop(image, box, self.size) for box in boxes])

    def _resized(self, window: Tensor) -> Tensor:
        return resize_crop(window, Box(0, 0, *window.shape[1:]), self.size)


def draw_window(rng: random.Random, height: int, width: int, tile: int | None) -> Box:
    """Draw a window of an image of this size; without a tile, it is the whole image."""
    if tile is None:
        return Box(0, 0, height, width)
    h, w = min(tile, height), min(tile, width)
    return Box(rng.randint(0, height - h), rng.randint(0, width - w), h, w)


def center_window(height: int, width: int, tile: int | None) -> Box:
    """Return the window in the middle of an image of this size; without a tile, all of it."""
    h, w = (side if tile is None else min(tile, side) for side in (height, width))
    return Box((height - h) // 2, (width - w) // 2, h, w)


@dataclass(frozen=True)
class CenterCrop:
    """The center of a resized image; the device normalizes.

    Args:
        size: (height, width) of the crop.
        cover_size: (height, width) that the resized image just covers, or has if `squash`.
        interpolation: one of INTERPOLATIONS.
        squash: do not keep the aspect ratio.
        pixels: how images are read.
        tile: side of the window in the middle of a larger image that stands for it.
    """

    size: tuple[int, int]
    cover_size: tuple[int, int]
    normalization: Normalization
    interpolation: str = "bicubic"
    squash: bool = False
    pixels: PixelFormat = RGB8
    tile: int | None = None
    num_crops: ClassVar[int] = 1

    def read(self, record: Record) -> Tensor:
        """Return the pixels (C, h, w) of an image or its window; see `Transform`."""
        if self.tile is None:
            return read_values(record, self.pixels)
        image = open_values(record, self.pixels)
        return read_window(image, center_window(*image.shape[1:], self.tile))

    def __call__(self, image: Tensor, *_: int | str) -> Crops:
        """Return the crop of an image (C, h, w); see `Transform`."""
        whole = Box(0, 0, *image.shape[1:])
        cover = self.cover_size if self.squash else self._cover(whole.height, whole.width)
        top, left = (round((c - s) / 2) for c, s in zip(cover, self.size, strict=True))
        box = Box(top, left, *self.size)
        if math.prod(cover) > MAX_COVER * math.prod(self.cover_size):
            crop = crop_of_resized(image, cover, box, self.interpolation)
        else:
            resized = resize_crop(image, whole, cover, self.interpolation)  # (C, *cover)
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
    """Resize an image (C, h, w) to a size and crop a box, computing only the pixels of the box.

    Pillow resizes each channel, which rounds differently from `resize_crop`.
    """
    height, width = image.shape[1:]
    top, bottom = (y * height / size[0] for y in (box.top, box.top + box.height))
    left, right = (x * width / size[1] for x in (box.left, box.left + box.width))
    options = {"resample": Image.Resampling[interpolation.upper()]}
    options["box"] = (left, top, right, bottom)
    is_uint8 = image.dtype == torch.uint8
    channels = [
        Image.fromarray((channel if is_uint8 else channel.float()).numpy()).resize(
            (box.width, box.height), **options
        )
        for channel in image
    ]
    return to_type(torch.from_numpy(np.stack(channels)), image.dtype)


@dataclass(frozen=True)
class Augmentation:
    """An augmentation of Pillow images that draws from the global generators, such as timm's.

    Args:
        augment: maps an RGB image to normalized float32 (3, H, W).
    """

    augment: Callable[[Image.Image], Tensor]
    tile: int | None = None
    num_crops: ClassVar[int] = 1

    def read(self, record: Record) -> Image.Image | OpenImage | Tensor:
        """Return a Pillow image or what a tile is taken from; see `Transform`."""
        return read_rgb(record) if self.tile is None else open_values(record)

    def __call__(self, image: Image.Image | OpenImage | Tensor, *seed_parts: int | str) -> Crops:
        """Return the augmented image; see `Transform`."""
        if self.tile is not None:
            image = self._tile_of(image, *seed_parts)
        with seeded(*seed_parts):
            return Crops([self.augment(image)], [False], None)

    def _tile_of(self, image: OpenImage | Tensor, *seed_parts: int | str) -> Image.Image:
        rng = random.Random(fold_seed("tile", *seed_parts))
        pixels = read_window(image, draw_window(rng, *image.shape[1:], self.tile))
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class ErasedCrops:
    """Random crops, normalized, of which timm's random erasing takes parts.

    Args:
        erase: maps (C, H, W) to the same shape and draws from the global generators.
    """

    crops: RandomCrops
    erase: Callable[[Tensor], Tensor]
    num_crops: ClassVar[int] = 1

    def read(self, record: Record) -> OpenImage | Tensor:
        """Return the pixels (C, h, w), or a file of which a window is read."""
        return self.crops.read(record)

    def __call__(self, image: OpenImage | Tensor, *seed_parts: int | str) -> Crops:
        """Return the crop with parts erased; see `Transform`."""
        crops = self.crops(image, *seed_parts)
        images, _ = collate([Sample(crops, label=None, broken=[])]).to(torch.device("cpu"))
        with seeded(*seed_parts):
            return Crops([self.erase(images[0])], [False], None)


def pretrain_transform(
    img_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    view: ViewSettings = PRETRAIN_VIEW,
    *,
    num_crops: int = 1,
    decode: Literal["cpu", "gpu"] = "cpu",
    pixels: PixelFormat = RGB8,
    tile: int | None = None,
) -> RandomCrops:
    """Build MAE's augmentation: a random crop and flips.

    Args:
        img_size: (height, width) in pixels.
        mean, std: of the channels, on the [0, 1] scale.
        num_crops, decode, pixels, tile: see `RandomCrops`.
    """
    normalization = Normalization(tuple(mean), tuple(std), pixels.value_range)
    return RandomCrops(tuple(img_size), normalization, view, num_crops, decode, pixels, tile)


def probe_transform(
    img_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    view: ViewSettings = LABELED_VIEW,
    *,
    pixels: PixelFormat = RGB8,
    tile: int | None = None,
) -> RandomCrops:
    """Build MAE's augmentation of a linear probe: a clipped random crop and flips."""
    crops = pretrain_transform(img_size, mean, std, view, pixels=pixels, tile=tile)
    return replace(crops, clip=True)


def finetune_transform(
    img_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    augment: AugmentSettings,
    view: ViewSettings = LABELED_VIEW,
    *,
    pixels: PixelFormat = RGB8,
    tile: int | None = None,
) -> Augmentation | ErasedCrops:
    """Build timm's augmentation: random crop, flips, RandAugment, random erasing.

    Args:
        img_size: (height, width) in pixels.
        mean, std: of the channels, on the [0, 1] scale.
        augment: everything besides cropping and flipping; what changes colors needs 8-bit RGB.
        pixels, tile: see `RandomCrops`.
    """
    if not pixels.is_rgb8:
        if augment.changes_colors:
            raise ValueError("colors can be changed in 8-bit RGB only")
        erase = RandomErasing(
            augment.reprob, mode=augment.remode, max_count=augment.recount, device="cpu"
        )
        crops = pretrain_transform(img_size, mean, std, view, pixels=pixels, tile=tile)
        return ErasedCrops(crops, erase)
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
    return Augmentation(transform, tile)


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
    pixels: PixelFormat = RGB8,
    tile: int | None = None,
) -> CenterCrop:
    """Build the transform that resizes to cover `img_size / crop_pct` and crops the center.

    Args:
        img_size: (height, width) in pixels.
        mean, std: of the channels, on the [0, 1] scale.
        crop_pct: side of the crop over the side it is cut from, in (0, 1]; MAE's is 224 / 256.
        interpolation: one of INTERPOLATIONS.
        squash: resize to exactly `img_size / crop_pct`, whatever the image's aspect ratio.
        pixels, tile: see `CenterCrop`.
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must lie in (0, 1], not {crop_pct}")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {INTERPOLATIONS}, not {interpolation}")
    cover_size = tuple(int(side / crop_pct) for side in img_size)  # as MAE and timm
    return CenterCrop(
        tuple(img_size),
        cover_size,
        Normalization(tuple(mean), tuple(std), pixels.value_range),
        interpolation,
        squash,
        pixels,
        tile,
    )
