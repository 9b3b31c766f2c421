"""What a worker hands over, and what the device does with it."""

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
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def resize_crop(image: Tensor, box: Box, size: tuple[int, int]) -> Tensor:
    """Cut a box out and resize it, bicubic and antialiased: uint8 (3, h, w) to uint8 (3, H, W)."""
    top, left, height, width = box
    crop = image[None, :, top : top + height, left : left + width]
    if image.device.type == "cpu":
        # A copy with the channels last is what the fast kernel takes, and gives.
        return _resize(crop.contiguous(memory_format=torch.channels_last), size)[0]
    return _resize_in_float(crop, size)[0]


def _resize(images: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", antialias=True)


def _resize_in_float(images: Tensor, size: Sequence[int]) -> Tensor:
    """`_resize` of uint8 images for GPUs, which have no kernel for whole numbers."""
    return _resize(images.float(), size).round_().clamp_(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Normalization:
    """What is left to do with a batch of pixels.

    Args:
        mean: of each RGB channel, in [0, 1].
        std: of each RGB channel, in units of the [0, 1] range.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise uint8 (B, 3, H, W) to float32."""
        mean, std = self._on(images.device)
        return normalize(images, mean.view(3, 1, 1), std.view(3, 1, 1))

    def later(self, images: Tensor) -> RawImages:
        """Leave uint8 (B, 3, H, W) to be normalised patch by patch."""
        return RawImages(images, *self._on(images.device))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return _channels(self.mean, device), _channels(self.std, device)


@cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A number for each channel, (3,); kept, so that the host never waits for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


class Crops(NamedTuple):
    """What a worker makes of one image: K views of it, and what the device has to do with them."""

    pixels: list[Tensor]  # K of (3, H, W): uint8, or float32 and normalised
    flips: list[bool]  # K, to be done
    normalization: Normalization | None  # to be done; None if it has been
    jpeg: Tensor | None = None  # uint8 (bytes,), to be decoded, in place of `pixels`
    boxes: Sequence[Box] = ()  # K, to be cut out of it and resized to `size`
    size: tuple[int, int] = (0, 0)


def denormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation: (B, 3, H, W) back to the [0, 1] range, not clipped to it."""
    channels = {"dtype": images.dtype, "device": images.device}
    mean = torch.tensor(mean, **channels).view(3, 1, 1)
    std = torch.tensor(std, **channels).view(3, 1, 1)
    return images * std + mean


class Sample(NamedTuple):
    """One image's crops, its label, and the broken images met on the way to it."""

    crops: Crops
    label: int
    broken: list[tuple[str, str]]


class EncodedCrops(NamedTuple):
    """Crops of JPEG files, to be decoded on the device."""

    files: Tensor  # uint8 (bytes,), one after another
    lengths: list[int]  # of each file, in bytes
    boxes: list[Sequence[Box]]  # of each file
    size: tuple[int, int]  # (height, width) of a crop
    is_encoded: list[bool]  # of every crop of the batch: whether it is one of these

    def decode(self, device: torch.device) -> list[Tensor]:
        """The crops, each uint8 (3, H, W) on the device.

        Raises:
            RunError: it cannot decode one.
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
    """One micro-batch, as it leaves a worker; `to`, or `raw`, completes it."""

    images: Tensor  # (B, 3, H, W): uint8, channels last in memory, or float32 and normalised
    labels: Tensor  # (B,), int64; -1 where the source has none
    broken: list[tuple[str, str]]  # (file name, reason) of a broken image, every time it is met
    flips: Tensor | None = None  # (B,), bool; None for none
    normalization: Normalization | None = None  # of uint8 images
    encoded: EncodedCrops | None = None  # those that are not among `images`

    @property
    def num_images(self) -> int:
        """B."""
        return len(self.labels)

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), float32 and normalised, and labels (B,), on the device.

        The host does not wait for the device, unless that decodes.
        """
        batch = self.copied(device)
        images = batch.upright()
        return images if self.normalization is None else self.normalization(images), batch.labels

    def raw(self, device: torch.device) -> Tensor | RawImages:
        """The images of `to`, normalised only where patches of them are read, if they are uint8."""
        images = self.copied(device).upright()
        return images if self.normalization is None else self.normalization.later(images)

    def copied(self, device: torch.device) -> "Batch":
        """The batch with its tensors on the device, for what is launched from now on.

        The host is a step or so ahead of a GPU, so that the next batch is on its way while the one
        before is computed.
        """
        names = [name for name in ("images", "labels", "flips") if getattr(self, name) is not None]
        on_gpu = device.type == "cuda"
        with torch.cuda.stream(copy_stream(device)) if on_gpu else nullcontext():
            copies = {n: getattr(self, n).to(device, non_blocking=True) for n in names}
        if on_gpu:
            computing = torch.cuda.current_stream(device)
            computing.wait_stream(copy_stream(device))
            for tensor in copies.values():
                tensor.record_stream(computing)  # its memory is free when that has read it
        return self._replace(**copies)

    def upright(self) -> Tensor:
        """Images (B, 3, H, W) where the batch is: decoded, and flipped where they are to be."""
        images = self.images
        if self.encoded is not None:
            decoded, others = iter(self.encoded.decode(images.device)), iter(images)
            images = torch.stack([next(decoded if e else others) for e in self.encoded.is_encoded])
        if self.flips is not None:
            images = torch.where(self.flips.view(-1, 1, 1, 1), images.flip(3), images)
        return images


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches are copied to a GPU, beside what it computes."""
    return torch.cuda.Stream(device)


def collate(samples: list[Sample | InputError | RunError]) -> Batch | InputError | RunError:
    """Put samples into a batch; an error among the samples takes the place of the batch."""
    for sample in samples:
        if isinstance(sample, InputError | RunError):
            return sample
    crops = [sample.crops for sample in samples]
    flips = list(itertools.chain.from_iterable(c.flips for c in crops))
    return Batch(
        images=_stack([pixels for c in crops for pixels in c.pixels]),
        labels=torch.tensor([sample.label for sample in samples for _ in sample.crops.flips]),
        broken=[entry for sample in samples for entry in sample.broken],
        flips=torch.tensor(flips) if any(flips) else None,
        normalization=crops[0].normalization,
        encoded=_join_encoded(crops),
    )


def _stack(pixels: list[Tensor]) -> Tensor:
    """(B, 3, H, W), in a worker in memory that is shared with the main process."""
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
