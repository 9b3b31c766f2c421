"""Numbers in a file that are an image: their order, and reading a window of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from util.data.damage import BrokenImageError
from util.errors import counted
from util.normalization import PixelFormat

MAX_VALUES = 2**28  # of one read


class Window(NamedTuple):
    """A part of an image."""

    top: int
    left: int
    height: int
    width: int


class Stored(Protocol):
    """An image as its file has it, perhaps turned, and with numbers of any type.

    Attributes:
        shape: (h, w, C).
        dtype: of what `read` returns, in either byte order.
        orientation: how the image is turned, as EXIF and TIFF count it; 1 is upright.
        has_alpha: whether the last channel is opacity.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype
    orientation: int
    has_alpha: bool

    def read(self, window: Window) -> np.ndarray:
        """Return the numbers of a window; (h, w, C)."""


class Layout(NamedTuple):
    """Which axes of an array are rows, columns and channels."""

    shape: tuple[int, int, int]
    """(h, w, C)."""
    channels_first: bool


def layout_of(shape: Sequence[int], pixels: PixelFormat) -> Layout:
    """Tell the axes of an array: those of `pixels`, or by which end has its number of channels.

    Raises:
        BrokenImageError: it is not an image, or both readings are possible.
    """
    shape = tuple(shape)
    if len(shape) == 2:
        return Layout((*shape, 1), False)
    if len(shape) != 3:
        raise BrokenImageError(f"an array of shape {shape}, not of (H, W), (H, W, C) or (C, H, W)")
    channels_first = _channels_are_first(shape, pixels)
    first, second, third = shape
    return Layout((second, third, first) if channels_first else shape, channels_first)


def _channels_are_first(shape: tuple[int, int, int], pixels: PixelFormat) -> bool:
    if pixels.axes is not None:
        return pixels.axes == "CHW"
    first, _, last = shape
    # A gray image can be read as any number of equal channels.
    for number in (pixels.num_channels, 1):
        if first == last == number:
            raise BrokenImageError(f"an array of shape {shape}: give --axes HWC or CHW")
        if number in (first, last):
            return number == first
    if pixels.num_channels == 1 and (first == 3) != (last == 3):  # colors, perhaps all equal
        return first == 3
    raise BrokenImageError(
        f"an array of shape {shape}, with {counted(pixels.num_channels, 'channel')} at neither "
        "end: correct --channels"
    )


def read_rows(
    file: BinaryIO, start: int, row_size: int, depth: int, dtype: np.dtype, window: Window
) -> np.ndarray:
    """Read a window of numbers that lie in a file row by row.

    Args:
        start: position of the first number, in bytes.
        row_size: pixels of a row.
        depth: numbers of a pixel, C.

    Returns:
        (h, w, C).

    Raises:
        BrokenImageError: the file ends before.
    """
    result = np.empty((window.height, window.width, depth), dtype)
    if window.width == row_size:  # all rows are one piece
        pieces = result.reshape(1, -1)
    else:
        pieces = result.reshape(window.height, -1)
    pixel = depth * dtype.itemsize
    for index, piece in enumerate(pieces):
        file.seek(start + ((window.top + index) * row_size + window.left) * pixel)
        data = file.read(piece.nbytes)
        if len(data) < piece.nbytes:
            raise BrokenImageError("truncated")
        piece[:] = np.frombuffer(data, dtype)
    return result


@dataclass(frozen=True)
class Contiguous:
    """An array that lies in a file as it is, so that a window reads only its rows.

    Args:
        start: position of the first number, in bytes.
        layout: of the array in C order.
        transposed: whether rows and columns are exchanged, as in Fortran order.
    """

    file: BinaryIO
    start: int
    layout: Layout
    dtype: np.dtype
    transposed: bool = False
    has_alpha: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        return self.layout.shape

    @property
    def orientation(self) -> int:
        """How the image is turned, as EXIF counts it."""
        return 5 if self.transposed else 1

    def read(self, window: Window) -> np.ndarray:
        """Return the numbers of a window; (h, w, C)."""
        height, width, channels = self.shape
        if not self.layout.channels_first:
            return read_rows(self.file, self.start, width, channels, self.dtype, window)
        size = height * width * self.dtype.itemsize
        starts = (self.start + channel * size for channel in range(channels))
        planes = [read_rows(self.file, start, width, 1, self.dtype, window) for start in starts]
        return np.concatenate(planes, axis=2)


@dataclass(frozen=True)
class InMemory:
    """An array that was read as a whole, (h, w, C)."""

    values: np.ndarray
    orientation: int = 1
    has_alpha: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, C)."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        """Of its numbers."""
        return self.values.dtype

    def read(self, window: Window) -> np.ndarray:
        """Return the numbers of a window; (h, w, C)."""
        top, left, height, width = window
        return self.values[top : top + height, left : left + width]


def check_size(shape: tuple[int, int, int]) -> None:
    """Raise BrokenImageError if a window of this shape has too many values for one read."""
    height, width, channels = shape
    if height * width * channels > MAX_VALUES:
        raise BrokenImageError(
            f"{width} x {height} pixels with {channels} channels are too many to read at once: "
            "use --tile"
        )
