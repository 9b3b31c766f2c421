"""How the channels of images become the colors of pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from util.data.batch import Batch
from util.errors import InputError, counted
from util.normalization import PixelFormat
from util.patches import scale_to_unit

LOWEST, HIGHEST = 0.01, 0.99  # quantiles of an image that become black and white
MAX_SORTED = 2**20  # pixels of a channel, of which quantiles are taken


@dataclass(frozen=True)
class Display:
    """Which channels are shown, and between which values.

    Args:
        channels: indices: one is shown in gray, two are red and green, three red, green and blue.
        num_channels: C, those of an image.
        stretch: show each channel from LOWEST to HIGHEST of the original instead of from 0 to 1,
            where 12 bits in a 16-bit file would be almost black.
    """

    channels: tuple[int, ...] = (0, 1, 2)
    num_channels: int = 3
    stretch: bool = False

    @property
    def note(self) -> str:
        """What a title says of the colors; nothing of RGB and gray from 0 to 1."""
        notes = []
        if self.num_channels not in (1, 3) or self.channels != tuple(range(self.num_channels)):
            names = ", ".join(str(channel + 1) for channel in self.channels)
            notes.append(f"shown: channels {names} of {self.num_channels}")
        if self.stretch:
            notes.append("each from the original's 1st to its 99th percentile")
        return ", ".join(notes)

    def select(self, values: Tensor) -> Tensor:
        """Take the colors from the channels, (..., C) -> (..., 3)."""
        if self.channels == (0, 1, 2) and self.num_channels == 3:
            return values
        if len(self.channels) == 1:
            return values[..., list(self.channels) * 3]
        colors = values[..., list(self.channels)]
        if len(self.channels) == 2:
            colors = torch.cat((colors, torch.zeros_like(colors[..., :1])), dim=-1)
        return colors

    def of(self, originals: Tensor) -> "Rendering":
        """Choose the values that become black and white in images (B, C, H, W)."""
        if not self.stretch:
            return Rendering(self, None, None)
        values = originals.flatten(2)  # (B, C, H*W)
        values = values[..., :: -(-values.shape[2] // MAX_SORTED)]
        limits = torch.tensor([LOWEST, HIGHEST], dtype=values.dtype, device=values.device)
        low, high = values.quantile(limits, dim=2).unsqueeze(2)  # twice (B, 1, C)
        return Rendering(self, low, high)


class Rendering(NamedTuple):
    """A display of certain images.

    Args:
        low, high: (B, 1, C), the values that become 0 and 1; None for 0 and 1.
    """

    display: Display
    low: Tensor | None
    high: Tensor | None

    def pixels(self, values: Tensor) -> Tensor:
        """Turn pixels (B, N, C) into colors (B, N, 3), without clipping."""
        if self.low is not None:
            span = self.high - self.low
            values = (values - self.low) / torch.where(span > 0, span, 1.0)
        return self.display.select(values)

    def images(self, images: Tensor) -> Tensor:
        """Turn images (B, C, H, W) into pictures (B, 3, H, W), without clipping."""
        colors = self.pixels(images.flatten(2).transpose(1, 2)).transpose(1, 2)
        return colors.unflatten(2, images.shape[2:])

    def patches(self, patches: Tensor) -> Tensor:
        """Turn patches (B, P, p*p*C) into those of a picture, (B, P, p*p*3), without clipping."""
        colors = self.pixels(patches.reshape(len(patches), -1, self.display.num_channels))
        return colors.reshape(*patches.shape[:2], -1)


def choose_display(
    num_channels: int, show_channels: Sequence[int] | None, *, stretch: bool = False
) -> Display:
    """Return the display of images with a number of channels.

    Args:
        show_channels: one or three, numbered from 1; None for the first three, or all of fewer.
        stretch: see `Display`.

    Raises:
        InputError: there is no such channel.
    """
    if show_channels is None:
        return Display(tuple(range(min(3, num_channels))), num_channels, stretch)
    if max(show_channels) > num_channels:
        raise InputError(
            f"--show_channels {' '.join(map(str, show_channels))}: the images have only "
            f"{counted(num_channels, 'channel')}, numbered from 1"
        )
    return Display(tuple(number - 1 for number in show_channels), num_channels, stretch)


def is_deep(batch: Batch) -> bool:
    """Whether images of a batch, as it came from a worker, have more than 8 bits."""
    return batch.encoded is None and batch.images.dtype != torch.uint8


def visible(
    image: Tensor, pixels: PixelFormat, show_channels: Sequence[int] | None = None
) -> np.ndarray:
    """Show an image (C, h, w) in its own type as uint8 (h, w, 3); 8-bit RGB stays as it is.

    Args:
        pixels: how it was read.
        show_channels: see `choose_display`.
    """
    stretch = image.dtype != torch.uint8
    display = choose_display(len(image), show_channels, stretch=stretch)
    images = scale_to_unit(image, pixels.value_range).unsqueeze(0)
    colors = display.of(images).images(images)[0].clamp(0, 1)  # (3, h, w)
    return (colors * 255).round().byte().permute(1, 2, 0).numpy()
