"""Decoding of images of any format and mode to upright 8-bit RGB pixels."""

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from util.data import tiff
from util.data.damage import BrokenImageError, cause_of, check_format, without_metadata
from util.data.folders import IMAGE_FORMATS
from util.data.jpeg import decode_jpeg, decoder_on
from util.errors import InputError
from util.normalization import RGB8, PixelFormat

MULTI_PICTURE = "MPO"  # Pillow's name of a JPEG that has further pictures
MAX_UNCHECKED_PIXELS = 2**24  # above it, Pillow checks for decompression bombs
NO_IMAGE = "no image (null)"
FINAL_ERRORS = (BrokenImageError, Image.DecompressionBombError, MemoryError)  # not of metadata

# Entries of `Image.info` from which Pillow reads the orientation.
ORIENTING = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
UPRIGHT = {  # how to turn an image by its orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide Pillow's warnings, which are about metadata; those about size are of another class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@cache
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the formats to read, of which old versions lack some."""
    Image.init()
    return tuple(name for name in IMAGE_FORMATS if name in Image.OPEN)


def check_opened(image: Image.Image) -> None:
    """Raise BrokenImageError for an image that a library has opened, of a format that is not read.

    Opening has read its header, the pixels are not decoded yet.
    """
    if image.format not in (None, MULTI_PICTURE, *IMAGE_FORMATS):
        raise BrokenImageError(f"{image.format}, which is not read")


@_without_warnings()
def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF or XMP says; without them, and if damaged, it is upright.

    Unlike Pillow's `exif_transpose`, this does not write EXIF, which fails for some that is read.
    """
    image.load()
    if image.format == "TIFF":  # Pillow has turned it, and some versions still say how
        return image
    method = UPRIGHT.get(_orientation_of(image))
    if method is None:
        return image
    turned = image.transpose(method)
    turned.info = {key: turned.info[key] for key in turned.info if key not in ORIENTING}
    return turned


def _orientation_of(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF raises anything
        return 1
    return orientation if isinstance(orientation, int) else 1


def first_full(image: Image.Image) -> Image.Image:
    """Go to the first page of a TIFF that is no smaller version of another one."""
    if image.format == "TIFF" and image.fp and image.tell() == 0:
        image.seek(tiff.first_full_index(image.fp))
    return image


def bits_of(image: Image.Image) -> int | None:
    """Return the bits of a gray TIFF's values; None for any other file."""
    bits = image.tag_v2.get(tiff.BITS) if image.format == "TIFF" else None
    return bits[0] if bits is not None and len(bits) == 1 else None


@_without_warnings()
def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to upright 8-bit RGB.

    The orientation of EXIF and XMP is applied. 12- and 16-bit gray is scaled to 8 bits and
    rounded. Alpha is dropped without blending, as in MAE's loader. Only the first frame of an
    animation is read, and the first page of a TIFF that is no smaller version of another one.

    Raises:
        BrokenImageError: the range of the pixel values is unknown or has no RGB equivalent.
        Exception: Pillow cannot read it.
    """
    image = first_full(image)
    tags = image.tag_v2 if image.format == "TIFF" else {}
    image = upright(image)
    if image.mode == "F":
        raise BrokenImageError("floating-point pixels have no known range: give --value_range")
    if image.mode.startswith("I"):  # "I;16", its byte orders, and "I" for signed or 32-bit files
        image = _with_8_bits(image, tags)
    return image if image.mode == "RGB" else image.convert("RGB")


def _with_8_bits(image: Image.Image, tags: dict[int, object]) -> Image.Image:
    """Scale gray of more bits, and invert it where 0 is white, as Pillow does with 8 bits."""
    gray = np.asarray(image).astype(np.int64)
    if gray.min() < 0 or gray.max() > 65535:
        raise BrokenImageError(
            f"gray values {gray.min()}..{gray.max()} are outside 0..65535: give --value_range"
        )
    white = 4095 if tags.get(tiff.BITS) == (12,) else 65535
    gray = (gray * 255 + white // 2) // white
    if image.mode == "I;16" and tags and tags.get(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO:
        gray = 255 - gray
    return Image.fromarray(gray.astype(np.uint8))


class Jpeg(NamedTuple):
    """A JPEG file that has not been decoded."""

    data: Tensor  # uint8 (bytes,)
    shape: tuple[int, int, int]  # (3, h, w), of the decoded pixels


T = TypeVar("T")
Record = Image.Image | BinaryIO | np.ndarray | dict[str, object] | None
"""A Pillow image, an array (h, w, C), an open file, or a record or null of `datasets`."""


def read_rgb(record: Record) -> Image.Image:
    """Read a record with `to_rgb`, whatever its metadata, and close it if it is a file.

    Raises:
        BrokenImageError: the image is missing, damaged or of an unknown format.
        Image.DecompressionBombError: it is too large.
    """
    if isinstance(record, np.ndarray):
        return Image.fromarray(record)
    if not isinstance(record, Image.Image):
        return _rgb_of(bytes_of(record))
    with record:
        check_opened(record)
        file = getattr(record, "fp", None)  # if it has not been read yet
        try:
            return to_rgb(record)
        except FINAL_ERRORS:
            raise
        except Exception:
            if file is None or file.closed:
                raise
            file.seek(0)
            return _rgb_of(file.read())


def bytes_of(record: BinaryIO | dict[str, object] | None) -> bytes:
    """Return the bytes of an image's file, and close it.

    Raises:
        BrokenImageError: there is no image.
    """
    if record is None:
        raise BrokenImageError(NO_IMAGE)
    if not isinstance(record, dict):
        with record:
            return record.read()
    if record.get("bytes") is not None:
        return record["bytes"]
    path = record.get("path")
    if path is None:
        raise BrokenImageError(NO_IMAGE)
    if "://" not in path:
        return Path(path).read_bytes()
    import fsspec

    with fsspec.open(path, "rb") as file:  # an address, or a member of an archive
        return file.read()


def _rgb_of(data: bytes) -> Image.Image:
    try:
        return decode_by_pillow(data, to_rgb)
    except BrokenImageError:
        # Where 0 is white, Pillow reads 16 bits in one byte order only.
        positive = tiff.with_black_as_zero(data)
        image = positive and _decoded_or_none(positive, to_rgb)
        if not image:
            raise
        return ImageOps.invert(image)


def decode_by_pillow(data: bytes, convert: Callable[[Image.Image], T]) -> T:
    """Decode a file's bytes with Pillow; if that fails, again without metadata.

    Args:
        convert: what to do with the image.

    Raises:
        BrokenImageError, Image.DecompressionBombError: see `read_rgb`.
    """
    try:
        return _decoded(data, convert)
    except FINAL_ERRORS:
        raise
    except Exception as error:  # decoders raise anything on broken files
        for keep_orientation in (True, False):
            bare = without_metadata(data, keep_orientation=keep_orientation)
            found = None if bare is None else _decoded_or_none(bare, convert)
            if found is not None:
                return found
        raise BrokenImageError(cause_of(data, error)) from error


def _decoded_or_none(data: bytes, convert: Callable[[Image.Image], T]) -> T | None:
    try:
        return _decoded(data, convert)
    except FINAL_ERRORS:
        raise
    except Exception:
        return None


@_without_warnings()
def _decoded(data: bytes, convert: Callable[[Image.Image], T]) -> T:
    check_format(data)
    with Image.open(io.BytesIO(data), formats=formats()) as image:
        return convert(image)


def read_record(record: Record) -> Jpeg | Tensor:
    """Return an upright RGB or gray JPEG undecoded, and anything else as `read_pixels` does."""
    if isinstance(record, np.ndarray):
        array = record if record.flags.writeable else record.copy()  # torch lacks read-only tensors
        return torch.from_numpy(array).permute(2, 0, 1)  # (3, h, w)
    if record is None or isinstance(record, dict | Image.Image):
        return _pixels_of(read_rgb(record))
    data = bytes_of(record)
    size = _size_of_plain_jpeg(data)
    if size is not None:
        return _jpeg_of(data, size)
    size = _size_of_upright_jpeg(data)
    if size is None:
        return _pixels_of(_rgb_of(data))
    # A decoder might find in them that the image is turned, although Pillow does not.
    return _jpeg_of(without_metadata(data, keep_orientation=False) or data, size)


def _jpeg_of(data: bytes, size: tuple[int, int]) -> Jpeg:
    return Jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), (3, *size))


def read_pixels(record: Record) -> Tensor:
    """Read the pixels of a record as `to_rgb` does, but faster.

    Returns:
        uint8 (3, h, w), channels last in memory.

    Raises:
        BrokenImageError, Image.DecompressionBombError: see `read_rgb`.
    """
    image = read_record(record)
    return _decode(image) if isinstance(image, Jpeg) else image


def read_for_device(record: Record) -> Jpeg | Tensor:
    """Read as `read_record` does, but a JPEG without its metadata, which a device might heed.

    A JPEG without an end marker is decoded here, to find it broken.
    """
    image = read_record(record)
    if not isinstance(image, Jpeg):
        return image
    if image.data[-2:].tolist() != [0xFF, 0xD9]:
        return _decode(image)
    bare = without_metadata(image.data.numpy().tobytes(), keep_orientation=False)
    return image if bare is None else _jpeg_of(bare, image.shape[1:])


def _pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, h, w)


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an RGB or gray JPEG without EXIF or XMP, which could rotate it.

    This walks the header's segments, several times faster than Pillow. None leaves the decision
    to Pillow.
    """
    start, size = 2, None
    while data[:2] == b"\xff\xd8" and start + 10 <= len(data) and data[start] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, start)
        if marker in (0xE1, 0xFF):  # EXIF or XMP; padding, which may precede them
            break
        if marker == 0xDA:  # the pixels
            return size
        if marker in (0xC0, 0xC2):  # the frame, baseline or progressive
            depth, height, width, channels = struct.unpack_from(">BHHB", data, start + 4)
            usual = depth == 8 and channels in (1, 3) and 0 < height * width < MAX_UNCHECKED_PIXELS
            size = (height, width) if usual else None
        start += 2 + length
    return None


@_without_warnings()
def _size_of_upright_jpeg(data: bytes) -> tuple[int, int] | None:
    """Like `_size_of_plain_jpeg`, but also for files with EXIF and XMP."""
    if not data.startswith(b"\xff\xd8"):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            usual = image.format == "JPEG" and image.mode in ("RGB", "L")
            return image.size[::-1] if usual and _orientation_of(image) == 1 else None
    except Exception:  # the file or its metadata are damaged
        return None


def _decode(image: Jpeg) -> Tensor:
    try:
        return decode_jpeg(image.data)  # (3, h, w)
    except RuntimeError:  # Pillow decides what is broken
        return _pixels_of(_rgb_of(image.data.numpy().tobytes()))


def check_decoder(decode: str, device: torch.device, pixels: PixelFormat = RGB8) -> None:
    """Raise InputError if `--decode gpu` is impossible with the device, libraries or images."""
    if decode == "gpu" and not pixels.is_rgb8:
        raise InputError(
            "--decode gpu is for 8-bit RGB: leave it out with --channels or --value_range"
        )
    if decode == "gpu" and device.type != "cuda":
        raise InputError(
            f"--decode gpu needs a CUDA device, but this run is on {device}: use --decode cpu"
        )
    if decode == "gpu":
        decoder_on(device)
