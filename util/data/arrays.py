"""Images that are arrays of any number of channels and type: TIFF, .npy and .npz."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from util.data.damage import BrokenImageError
from util.data.stored import Contiguous, InMemory, Layout, Stored, Window, check_size, layout_of
from util.normalization import PixelFormat

HEAD_SIZE = 4  # bytes of a file that tell its format
KINDS = {
    **dict.fromkeys((b"II*\0", b"MM\0*"), "TIFF"),
    **dict.fromkeys((b"II+\0", b"MM\0+"), "BigTIFF"),
    b"\x93NUM": ".npy",
    b"PK\3\4": ".npz",
}
# How an image is turned, by its orientation in EXIF and TIFF: whether rows and columns are
# exchanged, and which of the new ones are reversed.
TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class ImageArray:
    """An upright image in an open file, of which windows can be read.

    Attributes:
        shape: (h, w, C).
        dtype: uint8, uint16, int16 or float32, in the processor's byte order.
        has_alpha: whether the last channel is opacity.
    """

    def __init__(self, stored: Stored, pixels: PixelFormat, kind: str) -> None:
        self._stored = stored
        self._kind = kind
        self._is_transposed, self._from_bottom, self._from_right = TURNS.get(
            stored.orientation, TURNS[1]
        )
        height, width, channels = stored.shape
        if not min(stored.shape):
            raise BrokenImageError(f"{kind} of {width} x {height} pixels, {channels} channels")
        if self._is_transposed:
            height, width = width, height
        self.shape = (height, width, channels)
        self.dtype = _type_of(stored.dtype, pixels)
        self.has_alpha = stored.has_alpha
        # Without a range, values are fractions of what their type holds.
        self._true = 255 if pixels.value_range is None else 1

    def read(
        self, top: int = 0, left: int = 0, height: int | None = None, width: int | None = None
    ) -> np.ndarray:
        """Return a window, or what is right of and below its corner; (h, w, C), writable.

        Raises:
            BrokenImageError: the pixels are damaged, or too many for one read.
        """
        height = self.shape[0] - top if height is None else height
        width = self.shape[1] - left if width is None else width
        check_size((height, width, self.shape[2]))
        with _damage_of(self._kind):
            values = self._stored.read(self._turned_back(Window(top, left, height, width)))
        if self._is_transposed:
            values = values.swapaxes(0, 1)
        values = values[:: -1 if self._from_bottom else 1, :: -1 if self._from_right else 1]
        with np.errstate(
            over="ignore"
        ):  # what float32 cannot hold becomes infinite: a broken image
            result = np.array(values, self.dtype, order="C")
        return result * self._true if values.dtype == bool else result

    def _turned_back(self, window: Window) -> Window:
        """Return where a window of the upright image is stored."""
        top, left, height, width = window
        if self._from_bottom:
            top = self.shape[0] - top - height
        if self._from_right:
            left = self.shape[1] - left - width
        if self._is_transposed:
            return Window(left, top, width, height)
        return Window(top, left, height, width)


def _type_of(dtype: np.dtype, pixels: PixelFormat) -> np.dtype:
    """Return the type in which numbers of a file are read.

    Raises:
        BrokenImageError: they are no real numbers, or integers whose range is not known.
    """
    if dtype.kind == "b":
        return np.dtype(np.uint8)
    if dtype.kind in "iu" and dtype.itemsize <= 2:
        return np.dtype(np.int16) if dtype == np.int8 else dtype.newbyteorder("=")
    if dtype.kind in "iu" and pixels.value_range is None:
        raise BrokenImageError(f"{dtype.name} values have no known range: give --value_range")
    if dtype.kind in "iuf":
        return np.dtype(np.float32)
    raise BrokenImageError(f"values of type {dtype.name}, which are no real numbers")


def is_array(head: bytes) -> bool:
    """Whether a file that begins with these bytes is read by `open_array`."""
    return head[:HEAD_SIZE] in KINDS


def open_array(file: BinaryIO, pixels: PixelFormat) -> ImageArray:
    """Return the image of a TIFF, .npy or .npz; the file has to stay open while it is read.

    Args:
        pixels: its number of channels, and the axes of NumPy's arrays, decide what is a channel.
            Without a value range, numbers of unusual depth are scaled to the range of their type.

    Raises:
        BrokenImageError: it has no such image.
    """
    file.seek(0)
    kind = KINDS.get(file.read(HEAD_SIZE), "image")
    file.seek(0)
    with _damage_of(kind):
        if kind == ".npy":
            stored = _open_npy(file, pixels)
        elif kind == ".npz":
            stored = _open_npz(file, pixels)
        else:
            from util.data.tiff_arrays import open_tiff  # tifffile is slow to import

            stored = open_tiff(file, pixels)
    return ImageArray(stored, pixels, kind)


def has_further_pages(file: str | Path | BinaryIO, pixels: PixelFormat) -> bool:
    """Whether a TIFF of several full pages has some that are not read."""
    if pixels.is_rgb8:
        return True
    if isinstance(file, str | Path):
        with Path(file).open("rb") as opened:
            return has_further_pages(opened, pixels)
    from util.data.tiff_arrays import TiffImage, open_tiff

    try:
        image = open_tiff(file, pixels)
    except Exception:  # a broken image is reported when it is read
        return False
    return isinstance(image, TiffImage) and image.has_further_pages


@contextmanager
def _damage_of(kind: str) -> Iterator[None]:
    """Turn errors of decoders, which may be any, into BrokenImageError."""
    try:
        yield
    except (BrokenImageError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise BrokenImageError(f"damaged {kind} ({text or type(error).__name__})") from error


def _open_npy(file: BinaryIO, pixels: PixelFormat) -> Contiguous:
    shape, is_fortran, dtype = _npy_header(file)
    layout = layout_of(shape, pixels)
    if is_fortran:  # the last axis comes first
        height, width, channels = layout.shape
        layout = Layout((width, height, channels), len(shape) == 3 and not layout.channels_first)
    return Contiguous(file, file.tell(), layout, dtype, transposed=is_fortran)


def _npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return an array's shape, whether it is in Fortran order, and its type."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    # Version 3 differs from 2 in the encoding of the header, which is ASCII for all numbers.
    return np.lib.format.read_array_header_2_0(file)


def _open_npz(file: BinaryIO, pixels: PixelFormat) -> InMemory:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        if not names:
            raise BrokenImageError("a ZIP archive without arrays of NumPy")
        if len(names) > 1:
            arrays = ", ".join(name.removesuffix(".npy") for name in names)
            raise BrokenImageError(f".npz of {len(names)} arrays ({arrays}): keep one in each file")
        with archive.open(names[0]) as member:
            shape, is_fortran, dtype = _npy_header(member)
            layout = layout_of(shape, pixels)
            check_size(layout.shape)
            _type_of(dtype, pixels)
            data = member.read()
    size = int(np.prod(shape)) * dtype.itemsize
    if len(data) < size:
        raise BrokenImageError("truncated")
    values = np.frombuffer(data[:size], dtype).reshape(shape, order="F" if is_fortran else "C")
    if values.ndim == 2:
        values = values[:, :, None]
    return InMemory(np.moveaxis(values, 0, 2) if layout.channels_first else values)
