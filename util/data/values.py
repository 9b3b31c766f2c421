"""Images as the numbers in their files: any number of channels, 8 or 16 bits, floating point."""

import io
import re
from collections.abc import Callable
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.data.arrays import HEAD_SIZE, ImageArray, is_array, open_array
from util.data.batch import Box
from util.data.broken_images import reason_of
from util.data.damage import PNG, BrokenImageError
from util.data.decode import (
    Record,
    bytes_of,
    check_opened,
    decode_by_pillow,
    read_pixels,
    upright,
)
from util.errors import counted
from util.normalization import RGB8, PixelFormat

# Modes of Pillow that are converted before their numbers are taken.
CONVERTED = {"1": "L", "PA": "RGBA", "La": "LA", "RGBa": "RGBA"}
CONVERTED |= dict.fromkeys(("CMYK", "YCbCr", "LAB", "HSV", "RGBX"), "RGB")
JPEG = b"\xff\xd8"
# Of PGM and PPM: which of them, and the largest possible value, after width and height.
NETPBM = re.compile(rb"P([56])" + rb"\s+(?:#[^\n]*\n\s*)*\d+" * 2 + rb"\s+(?:#[^\n]*\n\s*)*(\d+)\s")
BOXES = 4096  # bytes in which a JPEG 2000 or AVIF file describes itself
PNG_BITS, PNG_KIND = slice(24, 25), slice(25, 26)  # of a PNG's header
SIXTEEN, GRAY = b"\x10", b"\0"  # their values


class OpenImage:
    """An image in an open file, of which windows are read as they are needed.

    Attributes:
        shape: (C, h, w).
    """

    def __init__(self, file: BinaryIO, array: ImageArray, pixels: PixelFormat) -> None:
        self._file, self._array, self._pixels = file, array, pixels
        self.shape = (pixels.num_channels, *array.shape[:2])

    def __enter__(self) -> "OpenImage":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def window(self, box: Box) -> Tensor:
        """Read a window, (C, H, W).

        Raises:
            BrokenImageError: it cannot be read.
        """
        try:
            values = self._array.read(*box)
        except BrokenImageError:
            raise
        except Exception as error:  # decoders raise anything on broken files
            raise BrokenImageError(reason_of(error)) from error
        return _tensor_of(values, self._array.has_alpha, self._pixels)


def read_values(record: Record, pixels: PixelFormat = RGB8) -> Tensor:
    """Read a record's pixels in their own type, or as 8-bit RGB.

    What is converted loses nothing, except that the alpha of color images is dropped for three
    channels, as in MAE's loader, and that of gray images for one.

    Returns:
        (C, h, w), channels last in memory: uint8, uint16, int16 or float32.

    Raises:
        BrokenImageError: the image is missing, damaged, of an unknown format or has another number
            of channels, or values that are not finite.
        Image.DecompressionBombError: it is too large.
    """
    if pixels.is_rgb8:
        return read_pixels(record)
    image = open_values(record, pixels)
    return read_window(image, Box(0, 0, *image.shape[1:]))


def read_window(image: OpenImage | Tensor, box: Box) -> Tensor:
    """Return a window of what `open_values` returned, (C, H, W), and close it.

    Raises:
        BrokenImageError: it cannot be read.
    """
    if isinstance(image, OpenImage):
        with image:
            return image.window(box)
    top, left, height, width = box
    return image[:, top : top + height, left : left + width]


def open_values(record: Record, pixels: PixelFormat = RGB8) -> OpenImage | Tensor:
    """Open a record to read windows of it; what has to be decoded whole is.

    Returns:
        The open file, which the caller closes, or what `read_values` does.

    Raises:
        BrokenImageError, Image.DecompressionBombError: see `read_values`.
    """
    if pixels.is_rgb8:
        return _open_rgb8(record)
    if isinstance(record, np.ndarray):  # packed images
        return _tensor_of(record, False, pixels)
    if isinstance(record, Image.Image):
        with record:
            check_opened(record)
            return _tensor_of(*_numbers_of(record), pixels)
    file = record if hasattr(record, "read") else io.BytesIO(bytes_of(record))
    head = file.read(HEAD_SIZE)
    file.seek(0)
    if is_array(head):
        return _opened(file, lambda: OpenImage(file, open_array(file, pixels), pixels))
    with file:
        data = file.read()
    if data.startswith(JPEG) and pixels.num_channels == 3:
        return read_pixels(io.BytesIO(data))  # faster, and the same
    if lost := _lost_bits(data):
        raise BrokenImageError(f"{lost}, of which 8 would be read: save it as PNG or TIFF")
    if data.startswith(PNG) and data[PNG_BITS] == SIXTEEN and data[PNG_KIND] != GRAY:
        return _tensor_of(*_deep_png(data), pixels)
    values, has_alpha = decode_by_pillow(data, _numbers_of)
    if pixels.value_range is not None:
        values = _as_in_netpbm(values, data)
    return _tensor_of(values, has_alpha, pixels)


def _lost_bits(data: bytes) -> str | None:
    """Name an image of whose values Pillow drops bits; None for any other."""
    if netpbm := NETPBM.match(data):
        return "PPM with 16-bit colors" if netpbm[1] == b"6" and int(netpbm[2]) > 255 else None
    start = data.find(b"ihdr", 0, BOXES) + 4  # height, width, channels, bits
    if data.startswith(b"jP  \r\n", 4) and start > 3:
        channels = int.from_bytes(data[start + 8 : start + 10], "big")
        bits = data[start + 10] % 128 + 1
        return f"JPEG 2000 with {bits}-bit colors" if channels > 1 and bits > 8 else None
    start = data.find(b"av1C", 0, BOXES) + 4
    if data.startswith(b"ftypavif", 4) and start > 3 and data[start + 2] & 0x40:
        return "AVIF of more than 8 bits"
    return None


def _as_in_netpbm(values: np.ndarray, data: bytes) -> np.ndarray:
    """Undo the scaling of the values of a PGM or PPM by its largest possible one."""
    netpbm = NETPBM.match(data)
    if netpbm is None:
        return values
    full, highest = np.iinfo(values.dtype).max, int(netpbm[2])
    if full == highest:
        return values
    return np.rint(values.astype(np.float64) * (highest / full)).astype(values.dtype)


def _open_rgb8(record: Record) -> OpenImage | Tensor:
    """Open a TIFF of 8-bit RGB; read anything else."""
    if hasattr(record, "read"):
        head = record.read(HEAD_SIZE)
        record.seek(0)
        if is_array(head):
            try:
                array = open_array(record, RGB8)
            except Exception:  # Pillow decides what is broken
                array = None
            record.seek(0)
            if array is not None and array.dtype == np.uint8 and array.shape[2] == 3:
                return OpenImage(record, array, RGB8)
    return read_pixels(record)


def _opened(file: BinaryIO, open_image: Callable[[], OpenImage]) -> OpenImage:
    """Return an open image; close its file if it cannot be opened."""
    try:
        return open_image()
    except BaseException:
        file.close()
        raise


def _deep_png(data: bytes) -> tuple[np.ndarray, bool]:
    """Decode a PNG of 16-bit colors, of which Pillow drops 8 bits, and whether it has alpha."""
    import imagecodecs  # takes a while

    values = imagecodecs.png_decode(data)
    return values, values.shape[-1] in (2, 4)


def _numbers_of(image: Image.Image) -> tuple[np.ndarray, bool]:
    """Return the numbers of an upright image, (h, w) or (h, w, c), and whether it has alpha."""
    image = upright(image)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif image.mode in CONVERTED:
        image = image.convert(CONVERTED[image.mode])
    values = np.array(image)
    if image.mode.startswith("I"):  # "I;16", its byte orders, and "I" for signed or 32-bit files
        if values.min() < 0 or values.max() > 65535:
            raise BrokenImageError(
                f"values {values.min()} to {values.max()} are outside 0 to 65535"
            )
        values = values.astype(np.uint16)
    return values, image.mode in ("LA", "RGBA")


def _tensor_of(values: np.ndarray, has_alpha: bool, pixels: PixelFormat) -> Tensor:
    """Convert (h, w) or (h, w, c) to (C, h, w), C being that of the format.

    Raises:
        BrokenImageError: the channels are not those of the format, or values are not finite.
    """
    values = values[:, :, None] if values.ndim == 2 else values
    values = _with_channels(values, has_alpha, pixels.num_channels)
    if values.dtype == np.float32 and not np.isfinite(values).all():
        raise BrokenImageError("NaN or infinite values")
    values = np.ascontiguousarray(values)
    if not values.flags.writeable:  # torch lacks read-only tensors
        values = values.copy()
    return torch.from_numpy(values).permute(2, 0, 1)


def _with_channels(values: np.ndarray, has_alpha: bool, channels: int) -> np.ndarray:
    """Convert (h, w, c) to another number of channels where nothing but alpha is lost."""
    own = values.shape[2]
    if own == channels:
        return values
    if has_alpha and own - 1 in (1, 3) and channels in (1, 3):
        values = values[:, :, :-1]
    if values.shape[2] == channels:
        return values
    if values.shape[2] == 1 and channels == 3:
        return values.repeat(3, axis=2)
    if values.shape[2] == 3 and channels == 1 and (values == values[:, :, :1]).all():
        return values[:, :, :1]  # gray, stored as colors
    colors = " (colors that differ)" if values.shape[2] == 3 and channels == 1 else ""
    raise BrokenImageError(
        f"it has {counted(own, 'channel')}{colors}, but --channels is {channels}"
    )
