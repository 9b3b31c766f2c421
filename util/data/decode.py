"""Decoding of images of any format and mode to upright 8-bit RGB pixels."""

import io
import struct
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

MAX_UNCHECKED_PIXELS = 2**24  # above it, Pillow checks for decompression bombs


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to upright 8-bit RGB.

    EXIF orientation is applied. 16-bit gray is scaled by 1/257 (65535 -> 255) and rounded. Alpha
    is dropped without blending, as in MAE's loader. Only an animation's first frame is read.

    Raises:
        OSError: the file is truncated.
        ValueError: the range of the pixel values is unknown or has no RGB equivalent.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: save them as 8 or 16 bit")
    if image.mode.startswith("I"):  # "I;16", its byte orders, and "I" for signed or 32-bit files
        gray = np.asarray(image).astype(np.int64)
        if gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"gray values {gray.min()}..{gray.max()} are outside 0..65535")
        image = Image.fromarray(((gray + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # converting straight to RGB makes Pillow warn every time
    return image if image.mode == "RGB" else image.convert("RGB")


class Jpeg(NamedTuple):
    """A JPEG file that has not been decoded."""

    data: Tensor  # uint8 (bytes,)
    shape: tuple[int, int, int]  # (3, h, w), of the decoded pixels


Record = Image.Image | BinaryIO | np.ndarray | dict[str, object]
"""A Pillow image, an array uint8 (h, w, 3), an open file, or a record of `datasets`."""


def read_rgb(record: Record) -> Image.Image:
    """Read a record with `to_rgb`, and close it if it is a file."""
    if isinstance(record, np.ndarray):
        return Image.fromarray(record)
    if isinstance(record, dict):
        if record.get("bytes") is None:
            from datasets import Image as ImageColumn

            record = ImageColumn().decode_example(record)
        else:
            record = io.BytesIO(record["bytes"])
    with record:
        return to_rgb(record if isinstance(record, Image.Image) else Image.open(record))


def read_record(record: Record) -> Jpeg | Tensor:
    """Return an upright RGB or gray JPEG undecoded, and anything else as `read_pixels` does."""
    if isinstance(record, np.ndarray):
        array = record if record.flags.writeable else record.copy()  # torch lacks read-only tensors
        return torch.from_numpy(array).permute(2, 0, 1)  # (3, h, w)
    if isinstance(record, dict | Image.Image):
        return _pixels_of(read_rgb(record))
    with record:
        data = record.read()
    size = _size_of_plain_jpeg(data) or _size_of_upright_jpeg(data)
    if size is None:
        return _pixels_of(read_rgb(io.BytesIO(data)))
    return Jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), (3, *size))


def read_pixels(record: Record) -> Tensor:
    """Read the pixels of a record as `to_rgb` does, but faster.

    Returns:
        uint8 (3, h, w), channels last in memory.

    Raises:
        OSError: the file is truncated.
        ValueError: see `to_rgb`.
    """
    image = read_record(record)
    return _decode(image) if isinstance(image, Jpeg) else image


def read_for_device(record: Record) -> Jpeg | Tensor:
    """Read as `read_record` does, but decode a JPEG without an end marker, to find it broken."""
    image = read_record(record)
    if isinstance(image, Jpeg) and image.data[-2:].tolist() != [0xFF, 0xD9]:
        return _decode(image)
    return image


def _pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, h, w)


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an RGB or gray JPEG without EXIF or XMP, which could rotate it.

    This walks the header's segments, several times faster than Pillow. None leaves the decision
    to Pillow.
    """
    start = 2
    while data[:2] == b"\xff\xd8" and start + 10 <= len(data) and data[start] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, start)
        if marker in (0xE1, 0xFF):  # EXIF or XMP; padding, which may precede them
            break
        if marker in (0xC0, 0xC2):  # the frame, baseline or progressive
            depth, height, width, channels = struct.unpack_from(">BHHB", data, start + 4)
            usual = depth == 8 and channels in (1, 3) and 0 < height * width < MAX_UNCHECKED_PIXELS
            return (height, width) if usual else None
        start += 2 + length
    return None


def _size_of_upright_jpeg(data: bytes) -> tuple[int, int] | None:
    """Like `_size_of_plain_jpeg`, but also for files with EXIF and XMP.

    Raises:
        OSError: this is not an image.
    """
    with Image.open(io.BytesIO(data)) as image:
        usual = image.format == "JPEG" and image.mode in ("RGB", "L")
        upright = usual and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return (image.height, image.width) if upright else None


def _decode(image: Jpeg) -> Tensor:
    try:
        return decode_jpeg(image.data, mode=ImageReadMode.RGB)  # (3, h, w)
    except RuntimeError:  # Pillow decides what is broken
        return _pixels_of(read_rgb(io.BytesIO(image.data.numpy())))
