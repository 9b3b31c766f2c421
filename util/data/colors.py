"""Mean and std of the images' channels: measured, or checked against a few images."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from util.compute.distributed import broadcast_object, is_main_process
from util.data.annotated import StoredImages
from util.data.broken_images import reason_of
from util.data.decode import bits_of, check_opened, first_full, formats
from util.data.images import IndexedImages
from util.data.sampler import evenly_spaced
from util.data.streams import StreamedImages
from util.data.transforms import eval_transform
from util.errors import InputError, counted
from util.normalization import (
    PixelFormat,
    check_counts,
    usual_colors,
)
from util.patches import scale_to_unit
from util.progress import with_progress
from util.settings.data import AUTO

NUM_MEASURED = 256  # images for a mean and std
NUM_CHECKED = 16
MOST_UNITS = 1000.0  # times the range of values: no mean or std of an image is larger
LONGEST_SIDE = 2048  # of what is measured; of a larger image, every n-th row and column
# A channel whose deviation is this far from the one it is divided by, or whose mean is this many
# deviations off, is of other images: a network would see one color.
LEAST_SPREAD, MOST_SPREAD, FARTHEST_MEAN = 0.25, 4.0, 4.0

Colors = Sequence[float] | str | None
"""Mean or std of each channel, "auto" to measure it, or None for the default."""

Earlier = Callable[[], tuple[list[float], list[float]] | None]

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Measured(NamedTuple):
    """What was found in the values of some images."""

    mean: list[float]
    std: list[float]
    """Of each channel, on the [0, 1] scale."""
    low: float
    high: float
    """The lowest and the highest value, as in the files."""
    dtypes: tuple[torch.dtype, ...]
    """Those of the values."""
    number: int
    """Of images that could be read."""
    farthest: str
    """Name of the image with the value farthest from [0, 1]."""


def choose_colors(
    train_set: IndexedImages | StoredImages | StreamedImages,
    mean: Colors,
    std: Colors,
    *,
    pixels: PixelFormat,
    tile: int | None = None,
    earlier: Earlier | None = None,
) -> tuple[list[float], list[float]]:
    """Return mean and std of the channels; measure them if that was asked for.

    The default is ImageNet's for three channels, and measured values for any other number. Values
    that are not measured are checked against a few images, unless these are certainly of 8 bits.

    Args:
        mean, std: as given by the user, or by the weights that training starts from.
        tile: see `CenterCrop`.
        earlier: returns what a run that is continued has measured, None for a new run.

    Raises:
        InputError: the numbers of channels differ, the images do not have the range of values that
            is assumed, or they are a stream, of which nothing can be measured.
    """
    channels = pixels.num_channels
    is_default = mean is None and std is None
    default = usual_colors(channels) if channels == 3 else (AUTO, AUTO)
    mean, std = (default[i] if x is None else x for i, x in enumerate((mean, std)))
    check_counts(mean, std, channels)
    if (mean == AUTO) != (std == AUTO):
        raise InputError("--mean and --std belong together: give both, or auto for both")
    is_auto = mean == AUTO
    if is_auto and earlier and (before := earlier()):
        check_counts(*before, channels)
        return before
    if isinstance(train_set, StreamedImages):
        if is_auto:
            raise InputError(
                f"{train_set.name} is a stream, of which no mean and std can be measured: give "
                "them by --mean and --std"
            )
        logger.info(
            "%s is a stream: whether mean, std and range fit its values is not checked",
            train_set.name,
        )
        return list(mean), list(std)
    if pixels.is_rgb8:
        highest = _on_main_process(highest_deep_value, train_set)
        if highest is not None:
            check_depth(highest, is_chosen=not (is_auto or is_default))
        elif not is_auto:
            return list(mean), list(std)
    limit = NUM_MEASURED if is_auto else NUM_CHECKED
    found = _on_main_process(measure, train_set, pixels, limit=limit, tile=tile)
    if isinstance(found, str):  # training meets the broken images, and counts them
        if is_auto:
            raise InputError(
                f"none of {counted(min(limit, len(train_set)), 'image')} can be read, so mean and "
                f"std cannot be measured ({found}): repair the images, or correct the flags"
            )
        return list(mean), list(std)
    check_range(found, pixels)
    if is_auto:
        logger.info(
            "measured on %s: --mean %s --std %s",
            *(counted(found.number, "training image"), _listed(found.mean), _listed(found.std)),
        )
        check_fill_values(found, pixels)
        if likely := _likely_range(found, pixels):
            logger.info(
                "values are at most %g: with --value_range 0 %d, PSNR would have the usual scale",
                *(found.high, likely),
            )
        return found.mean, found.std
    check_spread(found, mean, std, pixels, is_default=is_default)
    return list(mean), list(std)


def compare_colors(
    val_set: IndexedImages,
    mean: list[float],
    std: list[float],
    *,
    pixels: PixelFormat,
    tile: int | None,
) -> None:
    """Warn if a few validation images, not of 8-bit RGB, are unlike a mean and std."""
    if not pixels.is_rgb8:
        found = _on_main_process(measure, val_set, pixels, limit=NUM_CHECKED, tile=tile)
        if not isinstance(found, str):
            check_spread(found, mean, std, pixels, is_default=False, what="validation image")


def _on_main_process(look: Callable[..., T], *args: object, **options: object) -> T:
    """Call a function that reads images on one process; return the result on all."""
    return broadcast_object(look(*args, **options) if is_main_process() else None)


def highest_deep_value(images: IndexedImages | StoredImages) -> int | None:
    """Return the highest value in gray images of 16 bits; None if there is none among a few.

    Read as RGB, they keep the upper 8 bits. Those of a TIFF that says 12 bits are scaled before.
    """
    highest = None
    for index in evenly_spaced(len(images), NUM_CHECKED):
        try:
            record, _ = images.stored(index)
            is_file = hasattr(record, "read")
            image = Image.open(record, formats=formats()) if is_file else record
            with image:
                check_opened(image)
                if not image.mode.startswith("I") or bits_of(image) == 12:
                    continue
                highest = max(highest or 0, int(np.asarray(first_full(image)).max()))
        except Exception:  # broken images are found when they are read
            continue
    return highest


def check_depth(highest: int, *, is_chosen: bool) -> None:
    """Check gray images of 16 bits that are read as 8-bit RGB.

    Args:
        highest: the highest value in some of them.
        is_chosen: whether the user chose a mean and std for them.

    Raises:
        InputError: they use so few bits that hardly any are left; if the user knows it, this warns.
    """
    likely = _fewer_bits(highest)
    if likely is None:
        return
    text = (
        f"the values of the images are at most {highest}, in files of 16 bits, of which the upper "
        f"8 are kept, so they would be almost black: use --value_range 0 {likely}, which scales "
        "them and keeps all bits"
    )
    if not is_chosen:
        raise InputError(text)
    logger.warning("%s", text)


def measure(
    images: IndexedImages | StoredImages,
    pixels: PixelFormat,
    *,
    limit: int,
    tile: int | None = None,
) -> Measured | str:
    """Measure the values of evenly spaced images; if none of them can be read, return why.

    Args:
        tile: see `CenterCrop`.
    """
    channels = pixels.num_channels
    blank = [0.0] * channels, [1.0] * channels
    read = eval_transform((1, 1), *blank, pixels=pixels, tile=tile).read
    sums, squares = np.zeros(channels), np.zeros(channels)
    low, high, dtypes, number, reason = np.inf, -np.inf, {}, 0, ""
    distance, farthest = -np.inf, ""
    ids = evenly_spaced(len(images), limit)
    for index in with_progress(ids, "mean and std", len(ids), unit="images"):
        try:
            values = read(images.stored(index)[0])  # (C, h, w)
        except Exception as error:  # counted in training
            reason = f"{images.name(index)}: {reason_of(error)}"
            continue
        step = math.ceil(max(values.shape[1:]) / LONGEST_SIDE)
        values = values[:, ::step, ::step]
        own = values.to(torch.float64)
        low, high = min(low, own.min().item()), max(high, own.max().item())
        scaled = scale_to_unit(values, pixels.value_range).double().flatten(1)
        sums += scaled.mean(dim=1).numpy()
        squares += scaled.square().mean(dim=1).numpy()
        dtypes[values.dtype] = None
        number += 1
        if (own_distance := (scaled - 0.5).abs().max().item()) > distance:
            distance, farthest = own_distance, images.name(index)
    if not number:
        return reason
    mean = sums / number
    std = np.sqrt(np.maximum(squares / number - mean**2, 0))
    if not std.all():  # a constant channel stays what it is
        std[std == 0] = 1.0
    rounded = ([float(f"{x:.5g}") for x in values] for values in (mean, std))
    return Measured(*rounded, low, high, tuple(dtypes), number, farthest)


def check_range(found: Measured, pixels: PixelFormat) -> None:
    """Raise InputError for floating-point values without a range that lie outside [0, 1]."""
    if pixels.value_range is not None or torch.float32 not in found.dtypes:
        return
    if found.low < 0 or found.high > 1:
        raise InputError(
            f"the images have floating-point values from {found.low:.4g} to {found.high:.4g}, and "
            f"no range is known for them: give --value_range {found.low:.4g} {found.high:.4g}, or "
            "limits that hold for all images; if one of these stands for missing pixels, replace "
            "it in the files before"
        )


def check_fill_values(found: Measured, pixels: PixelFormat) -> None:
    """Look for values that stand for missing pixels, such as -9999, far outside the range.

    Raises:
        InputError: they are all that a network would see. If they are only a part, this warns.
    """
    if min(found.mean) >= 0 and max(*found.mean, *found.std) <= 1:
        return
    low, high = pixels.value_range or (0, 1)
    text = (
        f"many values, from {found.low:g} to {found.high:g}, are outside --value_range {low:g} "
        f"{high:g}: correct it, or replace values that stand for missing pixels, as in "
        f"{found.farthest}"
    )
    if not max(map(abs, [*found.mean, *found.std])) < MOST_UNITS:
        raise InputError(text)
    logger.warning("%s", text)


def check_spread(
    found: Measured,
    mean: Sequence[float],
    std: Sequence[float],
    pixels: PixelFormat,
    *,
    is_default: bool,
    what: str = "image",
) -> None:
    """Compare a mean and std with those that were measured.

    Raises:
        InputError: they are far apart, and the former were not chosen for these images. If they
            were, this only warns.
    """
    far = [
        channel
        for channel, (m, s, own_m, own_s) in enumerate(
            zip(mean, std, found.mean, found.std, strict=True)
        )
        if not LEAST_SPREAD <= own_s / s <= MOST_SPREAD or abs(own_m - m) > FARTHEST_MEAN * s
    ]
    if not far:
        return
    check_fill_values(found, pixels)
    text = (
        f"the values of {counted(found.number, what)} are from {found.low:.6g} to "
        f"{found.high:.6g}; scaled to [0, 1], their mean is {_listed(found.mean)} and their std "
        f"{_listed(found.std)}, far from mean {_listed(mean)} and std {_listed(std)}"
    )
    advice = "use --mean auto --std auto"
    if likely := _likely_range(found, pixels):
        advice = f"use --value_range 0 {likely}, or {advice.removeprefix('use ')}"
    if is_default:
        raise InputError(f"{text}, which are ImageNet's: {advice}")
    logger.warning("%s: %s", text, advice)


def _likely_range(found: Measured, pixels: PixelFormat) -> int | None:
    """Return the largest value of fewer bits than the type has, if the values look like that."""
    is_known = pixels.is_rgb8 or pixels.value_range is not None
    if is_known or found.low < 0 or found.dtypes != (torch.uint16,):
        return None
    return _fewer_bits(found.high)


def _fewer_bits(highest: float) -> int | None:
    """Return the largest number of as few bits as values of up to this need, if 14 are enough."""
    return next((2**bits - 1 for bits in (8, 10, 12, 14) if highest < 2**bits), None)


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
