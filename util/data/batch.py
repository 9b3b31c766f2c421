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
from torchvision.io import ImageReadMode, decode_jpeg

from util.data.broken_images import reason_of
from util.errors import InputError, RunError
from util.patches import RawImages, normalize


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def resize_crop(
    image: Tensor, box: Box, size: Sequence[int], interpolation: str = "bicubic"
) -> Tensor:
    """Crop a box and resize it, antialiased: uint8 (3, h, w) to uint8 (3, H, W).

    Args:
        interpolation: bicubic or bilinear.
    """
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    if image.device.type == "cpu":
        # The fast kernel takes and returns channels-last memory.
        return _resize(crop.contiguous(memory_format=torch.channels_last), size, interpolation)[0]
    return _resize_in_float(crop, size, interpolation)[0]


def _resize(images: Tensor, size: Sequence[int], interpolation: str = "bicubic") -> Tensor:
    return F.interpolate(images, size, mode=interpolation, antialias=True)


def _resize_in_float(images: Tensor, size: Sequence[int], interpolation: str = "bicubic") -> Tensor:
    """`_resize` of uint8 images on GPUs, which lack an integer kernel."""
    resized = _resize(images.float(), size, interpolation)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Normalization:
    """Normalization by a mean and std for each RGB channel, both on the [0, 1] scale."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize uint8 (B, 3, H, W) to float32."""
        mean, std = self._on(images.device)
        return normalize(images, mean.view(3, 1, 1), std.view(3, 1, 1))

    def later(self, images: Tensor) -> RawImages:
        """Wrap uint8 (B, 3, H, W) to be normalized patch by patch."""
        return RawImages(images, *self._on(images.device))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _channels(self.mean, device), _channels(self.std, device)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value per channel, (3,); cached so that the host never waits for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class Crops(NamedTuple):
    """K crops of one image from a worker, and the steps that are left to the device."""

    pixels: list[Tensor]  # K of (3, H, W): uint8, or normalized float32
    flips: list[bool]  # K, left to right, not yet applied
    normalization: Normalization | None  # not yet applied; None if it has been
    jpeg: Tensor | None = None  # uint8 (bytes,), to be decoded; `pixels` is empty then
    boxes: Sequence[Box] = ()  # K, to be cropped from it and resized to `size`
    size: tuple[int, int] = (0, 0)
    vertical_flips: Sequence[bool] = ()  # K, top to bottom, not yet applied; empty for none


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalization: (B, 3, H, W) back to the [0, 1] scale, without clipping."""
    channels = {"dtype": images.dtype, "device": images.device}
    mean = torch.tensor(mean, **channels).view(3, 1, 1)
    std = torch.tensor(std, **channels).view(3, 1, 1)
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
            images = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
        except RuntimeError as error:
            raise RunError(
                f"a JPEG cannot be decoded on {device}: use --decode cpu ({reason_of(error)})"
            ) from error
        pairs = zip(images, self.boxes, strict=True)
        return [resize_crop(image, box, self.size) for image, boxes in pairs for box in boxes]


class Batch(NamedTuple):
    """A micro-batch from a worker, completed by `to` or `raw`."""

    images: Tensor  # (B, 3, H, W): uint8, channels last in memory, or normalized float32
    labels: Tensor | None
    """(B,) int64, (B, N) float32 of 0 and 1, or (B,) float32, by task; None if an image has none"""
    broken: list[tuple[str, str]]  # (file name, reason), each time a broken image was read
    flips: Tensor | None = None  # (B,), bool, left to right; None if no image is flipped
    normalization: Normalization | None = None  # of uint8 images
    encoded: EncodedCrops | None = None  # crops that are not yet among `images`
    vertical_flips: Tensor | None = None  # (B,), bool, top to bottom; None if no image is

    @property
    def num_images(self) -> int:
        """Batch size B."""
        return len(self.images if self.encoded is None else self.encoded.is_encoded)

    def to(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return images (B, 3, H, W), normalized float32, and labels on the device.

        The host waits for the device only if the device decodes JPEGs.
        """
        batch = self.copied(device)
        images = batch.upright()
        return images if self.normalization is None else self.normalization(images), batch.labels

    def raw(self, device: torch.device) -> Tensor | RawImages:
        """Return the images of `to`, but leave uint8 ones to be normalized patch by patch."""
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
        """Return images (B, 3, H, W), decoded and flipped, on the batch's own device."""
        images = self.images
        if self.encoded is not None:
            decoded, others = iter(self.encoded.decode(images.device)), iter(images)
            images = torch.stack([next(decoded if e else others) for e in self.encoded.is_encoded])
        for flips, dim in ((self.flips, 3), (self.vertical_flips, 2)):
            if flips is not None:
                images = torch.where(flips.view(-1, 1, 1, 1), images.flip(dim), images)
        return images


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
    labels = [sample.label for sample in samples for _ in sample.crops.flips]
    return Batch(
        images=_stack([pixels for c in crops for pixels in c.pixels]),
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


def _stack(pixels: list[Tensor]) -> Tensor:
    """Stack to (B, 3, H, W); in a worker, in memory shared with the main process."""
    if not pixels:
        return torch.empty(0)
    if pixels[0].dtype != torch.uint8:
        return default_collate(pixels)
    return default_collate([p.permute(1, 2, 0) for p in pixels]).permute(0, 3, 1, 2)


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
