"""Batches as workers produce them, and the decoding, flips and normalization on the device."""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from util.data.broken_images import reason_of
from util.data.jpeg import decode_jpegs_on
from util.errors import InputError, RunError
from util.patches import RawImages, as_movable, normalize


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def resize_crop(
    image: Tensor, box: Box, size: Sequence[int], interpolation: str = "bicubic"
) -> Tensor:
    """Crop a box and resize it, antialiased: (C, h, w) to (C, H, W) of the same type.

    Args:
        image: of a type in TYPE_RANGES.
        interpolation: bicubic or bilinear.
    """
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    if image.dtype == torch.uint8 and image.device.type == "cpu":
        # The fast kernel takes and returns channels-last memory.
        return _resize(crop.contiguous(memory_format=torch.channels_last), size, interpolation)[0]
    return _resize_in_float(crop, size, interpolation)[0]


def _resize(images: Tensor, size: Sequence[int], interpolation: str = "bicubic") -> Tensor:
    return F.interpolate(images, size, mode=interpolation, antialias=True)


def _resize_in_float(images: Tensor, size: Sequence[int], interpolation: str = "bicubic") -> Tensor:
    """`_resize` of types that lack a kernel: 16 bits, and 8 bits on GPUs."""
    return to_type(_resize(images.float(), size, interpolation), images.dtype)


def to_type(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert computed values to a type of TYPE_RANGES: round, and clip what is outside of it."""
    if dtype in (values.dtype, torch.float32):
        return values
    limits = torch.iinfo(dtype)
    return values.round_().clamp_(limits.min, limits.max).to(dtype)


@dataclass(frozen=True)
class Normalization:
    """Normalization by a mean and std for each channel, both on the [0, 1] scale.

    Args:
        value_range: the values that become 0 and 1; None for those of the images' type.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_range: tuple[float, float] | None = None

    @property
    def colors(self) -> tuple[list[float], list[float]]:
        """Mean and std, as a checkpoint holds them."""
        return list(self.mean), list(self.std)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize (B, C, H, W) of a type in TYPE_RANGES to float32."""
        mean, std = (values.view(-1, 1, 1) for values in self._on(images.device))
        return normalize(images, mean, std, self.value_range)

    def later(self, images: Tensor) -> RawImages:
        """Wrap (B, C, H, W) of a type in TYPE_RANGES to be normalized patch by patch."""
        return RawImages(images, *self._on(images.device), self.value_range)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _channels(self.mean, device), _channels(self.std, device)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value per channel, (C,); cached so that the host never waits for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class Crops(NamedTuple):
    """K crops of one image from a worker, and the steps that are left to the device."""

    pixels: list[Tensor]  # K of (C, H, W): as in the file, or normalized float32
    flips: list[bool]  # K, left to right, not yet applied
    normalization: Normalization | None  # not yet applied; None if it has been
    jpeg: Tensor | None = None  # uint8 (bytes,), to be decoded; `pixels` is empty then
    boxes: Sequence[Box] = ()  # K, to be cropped from it and resized to `size`
    size: tuple[int, int] = (0, 0)
    vertical_flips: Sequence[bool] = ()  # K, top to bottom, not yet applied; empty for none


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalization: (B, C, H, W) back to the [0, 1] scale, without clipping."""
    channels = {"dtype": images.dtype, "device": images.device}
    mean = torch.tensor(mean, **channels).view(-1, 1, 1)
    std = torch.tensor(std, **channels).view(-1, 1, 1)
    return images * std + mean


class Sample(NamedTuple):
    """Crops and label of one image, and the broken images that were skipped to reach it."""

    crops: Crops
    label: int | float | Tensor | None  # an index, a number, or (N,) with 1 for each of its classes
    broken: list[tuple[str, str]]


class EncodedCrops(NamedTuple):
    """JPEG files that the device decodes, and the crops to take from them."""

    files: Tensor  # uint8 (bytes,), concatenated
    lengths: list[int]  # of each file, in bytes
    boxes: list[Sequence[Box]]  # of each file
    size: tuple[int, int]  # (height, width) of a crop
    is_encoded: list[bool]  # for every crop of the batch: whether it comes from one of the files

    def decode(self, device: torch.device) -> list[Tensor]:
        """Return the crops, each uint8 (3, H, W) on the device.

        Raises:
            RunError: the device cannot decode a file.
        """
        files = list(self.files.split(self.lengths))
        try:
            images = decode_jpegs_on(device, files)
        except RuntimeError as error:
            raise RunError(
                f"a JPEG cannot be decoded on {device}: use --decode cpu ({reason_of(error)})"
            ) from error
        pairs = zip(images, self.boxes, strict=True)
        return [resize_crop(image, box, self.size) for image, boxes in pairs for box in boxes]


class Batch(NamedTuple):
    """A micro-batch from a worker, completed by `to` or `raw`."""

    images: Tensor
    """(B, C, H, W), channels last in memory, of a type in TYPE_RANGES; or normalized float32"""
    labels: Tensor | None
    """(B,) int64, (B, N) float32 of 0 and 1, or (B,) float32, by task; None if an image has none"""
    broken: list[tuple[str, str]]  # (file name, reason), each time a broken image was read
    flips: Tensor | None = None  # (B,), bool, left to right; None if no image is flipped
    normalization: Normalization | None = None  # that is left to do
    encoded: EncodedCrops | None = None  # crops that are not yet among `images`
    vertical_flips: Tensor | None = None  # (B,), bool, top to bottom; None if no image is

    @property
    def num_images(self) -> int:
        """Batch size B."""
        return len(self.images if self.encoded is None else self.encoded.is_encoded)

    def to(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return images (B, C, H, W), normalized float32, and labels on the device.

        The host waits for the device only if the device decodes JPEGs.
        """
        batch = self.copied(device)
        images = batch.upright()
        return images if self.normalization is None else self.normalization(images), batch.labels

    def raw(self, device: torch.device) -> Tensor | RawImages:
        """Return the images of `to`, but leave those of a file's type to be normalized by patch."""
        images = self.copied(device).upright()
        return images if self.normalization is None else self.normalization.later(images)

    def copied(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on the device, for work launched from now on.

        Copies to a GPU overlap with the computation of the previous batch.
        """
        names = ("images", "labels", "flips", "vertical_flips")
        names = [name for name in names if getattr(self, name) is not None]
        on_gpu = device.type == "cuda"
        with torch.cuda.stream(copy_stream(device)) if on_gpu else nullcontext():
            copies = {n: getattr(self, n).to(device, non_blocking=True) for n in names}
        if on_gpu:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(copy_stream(device))
            for tensor in copies.values():
                tensor.record_stream(computing)  # keeps its memory until that stream is done
        return self._replace(**copies)

    def upright(self) -> Tensor:
        """Return images (B, C, H, W), decoded and flipped, on the batch's own device."""
        images = self.images
        if self.encoded is not None:
            decoded, others = iter(self.encoded.decode(images.device)), iter(images)
            images = torch.stack([next(decoded if e else others) for e in self.encoded.is_encoded])
        own_type, images = images.dtype, as_movable(images)
        for flips, dim in ((self.flips, 3), (self.vertical_flips, 2)):
            if flips is not None:
                images = torch.where(flips.view(-1, 1, 1, 1), images.flip(dim), images)
        return images.view(own_type)


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Stream that copies batches to a GPU in parallel with its computation."""
    return torch.cuda.Stream(device)


def collate(samples: list[Sample | InputError | RunError]) -> Batch | InputError | RunError:
    """Combine samples into a batch; if one of them is an error, return the error instead."""
    for sample in samples:
        if isinstance(sample, InputError | RunError):
            return sample
    crops = [sample.crops for sample in samples]
    try:
        images = _stack([pixels for c in crops for pixels in c.pixels], crops[0].normalization)
    except InputError as error:
        return error
    labels = [sample.label for sample in samples for _ in sample.crops.flips]
    return Batch(
        images=images,
        labels=_join_labels(labels),
        broken=[entry for sample in samples for entry in sample.broken],
        flips=_join_flips([c.flips for c in crops]),
        normalization=crops[0].normalization,
        encoded=_join_encoded(crops),
        vertical_flips=_join_flips([c.vertical_flips or [False] * len(c.flips) for c in crops]),
    )


def _join_labels(labels: Sequence[int | float | Tensor | None]) -> Tensor | None:
    if any(label is None for label in labels):
        return None
    if isinstance(labels[0], Tensor):
        return torch.stack(list(labels))
    return torch.tensor(labels)


def _join_flips(flips: Sequence[Sequence[bool]]) -> Tensor | None:
    joined = list(itertools.chain.from_iterable(flips))
    return torch.tensor(joined) if any(joined) else None


def _stack(pixels: list[Tensor], normalization: Normalization | None) -> Tensor:
    """Stack to (B, C, H, W); in a worker, in memory shared with the main process.

    Raises:
        InputError: their types are mixed, and there is no range to scale all by.
    """
    if not pixels:
        return torch.empty(0)
    if normalization is None:
        return default_collate(pixels)
    pixels = of_one_type([p.permute(1, 2, 0) for p in pixels], normalization.value_range)
    return default_collate(pixels).permute(0, 3, 1, 2)


def of_one_type(pixels: list[Tensor], value_range: tuple[float, float] | None) -> list[Tensor]:
    """Convert images of types in TYPE_RANGES to one type, if they are mixed.

    Raises:
        InputError: there is no range to scale all by.
    """
    types = {p.dtype for p in pixels}
    if len(types) < 2:
        return pixels
    if value_range is not None:
        return [p.to(torch.float32) for p in pixels]
    if types == {torch.uint8, torch.uint16}:  # 255 x 257 = 65535
        return [p.int().mul_(257).to(torch.uint16) if p.dtype == torch.uint8 else p for p in pixels]
    names = " and ".join(sorted(str(t).removeprefix("torch.") for t in types))
    raise InputError(
        f"the images have values of different types ({names}): give --value_range LO HI, the "
        "values that become 0 and 1 in all of them"
    )


def _join_encoded(crops: list[Crops]) -> EncodedCrops | None:
    encoded = [c for c in crops if c.jpeg is not None]
    if not encoded:
        return None
    return EncodedCrops(
        files=torch.cat([c.jpeg for c in encoded]),
        lengths=[len(c.jpeg) for c in encoded],
        boxes=[c.boxes for c in encoded],
        size=encoded[0].size,
        is_encoded=[c.jpeg is not None for c in crops for _ in c.flips],
    )
