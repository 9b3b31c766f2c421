"""From an image file's pixels, whatever their mode, to the model's input and back."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from util.errors import InputError

# timm passes over sections that it does not know, without a word.
AUTO_AUGMENT = (
    r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?|-t(3a|3aw|weights))*"
    r"|augmix(-(m|w|d|b)\d+|-(a|mstd)\d+(\.\d+)?)*"
    r"|(v0r?|originalr?|3a)(-mstd\d+(\.\d+)?)?"
)


def to_rgb(image: Image.Image) -> Image.Image:
    """The upright 8-bit RGB version of any image.

    EXIF orientation is applied. 16-bit grey is scaled by 1/257 (65535 -> 255) and rounded. Alpha
    is dropped and the colours below it stay as stored, as MAE's loader does. Of an animation, the
    first frame is read.

    Raises:
        OSError: the file is truncated.
        ValueError: the range of the pixel values is not known, or has no RGB equivalent.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: save them as 8 or 16 bit")
    if image.mode.startswith("I"):  # "I;16", its byte orders, and "I" for signed or 32-bit files
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey values {grey.min()}..{grey.max()} lie outside 0..65535")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB works too, but Pillow warns every time
    return image if image.mode == "RGB" else image.convert("RGB")


def read_rgb(image: Image.Image | BinaryIO | dict[str, object]) -> Image.Image:
    """`to_rgb` of an image in memory, a `datasets` record, or an open file, which it closes."""
    if isinstance(image, dict):
        from datasets import Image as ImageColumn

        image = ImageColumn().decode_example(image)
    with image:
        return to_rgb(image if isinstance(image, Image.Image) else Image.open(image))


def pretrain_transform(
    img_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """MAE's augmentation: a random crop of 20 to 100 % of the area, and a horizontal flip.

    Args:
        img_size: (height, width) in pixels.
        mean: of each RGB channel, in [0, 1].
        std: of each RGB channel, in units of the [0, 1] range.

    Returns:
        RGB image to float32 (3, H, W), normalised; random by torch's global generator.
    """
    return _crop_and_flip(img_size, mean, std, min_area=0.2)


def probe_transform(
    img_size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> Callable[[Image.Image], Tensor]:
    """The augmentation of a linear probe: as `pretrain_transform`, from 8 % of the area on."""
    return _crop_and_flip(img_size, mean, std, min_area=0.08)


def finetune_transform(
    img_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    auto_augment: str | None,
    color_jitter: float | None,
    erase_prob: float,
    erase_mode: str,
    erase_count: int,
) -> Callable[[Image.Image], Tensor]:
    """timm's augmentation: crop of 8 to 100 % of the area, flip, RandAugment, random erasing.

    Args:
        img_size: (height, width) in pixels.
        mean: of each RGB channel, in [0, 1].
        std: of each RGB channel, in units of the [0, 1] range.
        auto_augment: timm's description of RandAugment, AugMix or AutoAugment, for instance
            `rand-m9-mstd0.5-inc1`; None for none.
        color_jitter: change of brightness, contrast and saturation, 0.4 for instance. It counts
            only without `auto_augment`, or with one of the 3a kinds.
        erase_prob: share of images in which rectangles are erased, in [0, 1].
        erase_mode: what replaces them: `const` (the mean), `rand` (a colour) or `pixel` (noise).
        erase_count: at most so many rectangles, which share the area of one.

    Returns:
        RGB image to float32 (3, H, W), normalised; random by the global generators of torch (CPU),
        numpy and random.

    Raises:
        InputError: auto_augment is not in timm's language.
    """
    if auto_augment is not None and not re.fullmatch(AUTO_AUGMENT, auto_augment):
        raise InputError(
            f"--auto_augment '{auto_augment}' is not understood: write it as in "
            "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original-mstd0.5"
        )
    return create_transform(
        img_size,
        is_training=True,
        scale=(0.08, 1.0),
        interpolation="bicubic",
        mean=mean,
        std=std,
        auto_augment=auto_augment,
        color_jitter=color_jitter,
        re_prob=erase_prob,
        re_mode=erase_mode,
        re_count=erase_count,
    )


def default_crop_share(img_size: tuple[int, int]) -> float:
    """MAE's `crop_share` of `eval_transform`: 224 / 256 up to 224 pixels, all above."""
    return 224 / 256 if max(img_size) <= 224 else 1.0


def eval_transform(
    img_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    crop_share: float = 1.0,
) -> Callable[[Image.Image], Tensor]:
    """Resize to cover `img_size / crop_share`, then cut `img_size` out of the centre.

    Args:
        img_size: (height, width) in pixels.
        mean: of each RGB channel, in [0, 1].
        std: of each RGB channel, in units of the [0, 1] range.
        crop_share: side of the crop over the side it is cut from, in (0, 1]; MAE's is 224 / 256.

    Returns:
        A deterministic function of an RGB image to float32 (3, H, W), normalised.
    """
    if not 0 < crop_share <= 1:
        raise ValueError(f"crop_share must lie in (0, 1], not {crop_share}")
    cover_size = tuple(round(side / crop_share) for side in img_size)
    return v2.Compose(
        [
            partial(_resize_to_cover, size=cover_size),
            v2.CenterCrop(img_size),
            *_normalized_tensor(mean, std),
        ]
    )


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation: (B, 3, H, W) back to the [0, 1] range, not clipped to it."""
    channels = {"dtype": images.dtype, "device": images.device}
    mean = torch.tensor(mean, **channels).view(3, 1, 1)
    std = torch.tensor(std, **channels).view(3, 1, 1)
    return images * std + mean


def _crop_and_flip(
    img_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], *, min_area: float
) -> v2.Compose:
    crop = v2.RandomResizedCrop(
        img_size, scale=(min_area, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return v2.Compose([crop, v2.RandomHorizontalFlip(), *_normalized_tensor(mean, std)])


def _normalized_tensor(mean: Sequence[float], std: Sequence[float]) -> list[v2.Transform]:
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


def _resize_to_cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    scale = max(height / image.height, width / image.width)
    # Truncated, so that for square sizes this is torchvision's usual Resize of the short side.
    covering = [max(height, int(image.height * scale)), max(width, int(image.width * scale))]
    return v2.functional.resize(
        image, covering, interpolation=InterpolationMode.BICUBIC, antialias=True
    )
