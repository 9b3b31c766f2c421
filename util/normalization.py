"""Which numbers of a file are pixels, and how they are scaled and normalized."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from util.errors import InputError, counted

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1], as in timm
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)
# Of pixels in [0, 1], a mean is at most 1 and a std at most 0.5, or 1 without scaling. Of pixels
# from 0 to 255, values are below 2 only if all images are almost black.
MAX_UNIT = 2.0

AXES = ("HWC", "CHW")


@dataclass(frozen=True)
class PixelFormat:
    """How images are read: as 8-bit RGB, or the numbers of a file as they are.

    Args:
        channels: C; None is three, and any image is converted to 8-bit RGB unless there is a
            `value_range`.
        value_range: the values that become 0 and 1; None for those of a number's type, and for 0
            and 1 in floating point.
        axes: order of an array's axes; None if its shape is clear.
    """

    channels: int | None = None
    value_range: tuple[float, float] | None = None
    axes: Literal["HWC", "CHW"] | None = None

    @property
    def num_channels(self) -> int:
        """C."""
        return self.channels or 3

    @property
    def is_rgb8(self) -> bool:
        """Whether images are converted to 8-bit RGB."""
        return self.channels is None and self.value_range is None

    @property
    def model_options(self) -> dict[str, int]:
        """What a model's builder needs to know, as a checkpoint holds it."""
        return {} if self.num_channels == 3 else {"in_chans": self.num_channels}

    def or_those_of(self, other: "PixelFormat") -> "PixelFormat":
        """Return this format, completed by another one where it says nothing.

        A range belongs to a number of channels: with another number, it is not taken.
        """
        channels = other.channels if self.channels is None else self.channels
        value_range = self.value_range
        if value_range is None and channels == other.channels:
            value_range = other.value_range
        return PixelFormat(channels, value_range, self.axes)

    @property
    def recipe(self) -> dict[str, object]:
        """What has to stay the same within a run."""
        return {**{f"--{name}": value for name, value in self.header.items()}, "--axes": self.axes}

    @property
    def header(self) -> dict[str, object]:
        """What a checkpoint says about the images of its training."""
        value_range = None if self.value_range is None else list(self.value_range)
        return {"channels": self.channels, "value_range": value_range}


RGB8 = PixelFormat()


def usual_colors(channels: int) -> tuple[list[float], list[float]]:
    """Return the mean and std to take if they are unknown: ImageNet's, else 0 and 1."""
    if channels == 3:
        return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
    return [0.0] * channels, [1.0] * channels


def check_counts(
    mean: Sequence[float] | str | None, std: Sequence[float] | str | None, channels: int
) -> None:
    """Raise InputError if a mean or std is given, but not for every channel.

    Args:
        mean, std: "auto" if it is to be measured.
    """
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and not isinstance(values, str) and len(values) != channels:
            raise InputError(
                f"--{name} has {counted(len(values), 'number')}, but the images have "
                f"{counted(channels, 'channel')}: give one for each, or auto"
            )


def check_scale(
    mean: Sequence[float] | None, std: Sequence[float] | None, path: str | Path | None = None
) -> None:
    """Raise InputError for a mean or std of pixels from 0 to 255, instead of [0, 1].

    Args:
        path: file that has them; None if they are from flags.
    """
    dashes, owner = ("--", "") if path is None else ("", f"{path} has ")
    given = {f"{dashes}mean": mean, f"{dashes}std": std}
    large = {name: values for name, values in given.items() if values and max(values) > MAX_UNIT}
    if large:
        theirs = " and ".join(f"{name} {_listed(values)}" for name, values in large.items())
        ours = " ".join(f"{n} {_listed(x / 255 for x in values)}" for n, values in large.items())
        verb = "," if owner else " is" if len(large) == 1 else " are"
        raise InputError(
            f"{owner}{theirs}{verb} for pixels from 0 to 255, but here they lie in [0, 1]: "
            f"{'write there' if owner else 'use'} {ours}"
        )


def _listed(values: Iterable[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)
