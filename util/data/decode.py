"""From an image, whatever its format and mode, to upright 8-bit RGB pixels."""

import io
import struct
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

SURELY_NO_BOMB = 2**24  # pixels; Pillow judges larger images


def to_rgb(image: Image.Image) -> Image.Image:
    """The upright 8-bit RGB version of any image.

    EXIF orientation is applied. 16-bit grey is scaled by 1/257 (65535 -> 255) and rounded. Alpha
    is dropped and the colours below it stay as stored, as MAE's loader does. Of an animation, the
    first frame is read.

    Raises:
        OSError: the file is truncated.
        ValueError: the range of the pixel values is not known, or has no RGB equivalent.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: save them as 8 or 16 bit")
    if image.mode.startswith("I"):  # "I;16", its byte orders, and "I" for signed or 32-bit files
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey values {grey.min()}..{grey.max()} lie outside 0..65535")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB works too, but Pillow warns every time
    return image if image.mode == "RGB" else image.convert("RGB")


class Jpeg(NamedTuple):
    """A JPEG file that has not been decoded."""

    data: Tensor  # uint8 (bytes,)
    shape: tuple[int, int, int]  # (3, h, w), of its pixels


Record = Image.Image | BinaryIO | np.ndarray | dict[str, object]
"""An image in memory, uint8 (h, w, 3) or Pillow's; an open file; a `datasets` record."""


def read_rgb(record: Record) -> Image.Image:
    """`to_rgb` of a record, which is closed if it is a file."""
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
    """The file of an upright RGB or grey JPEG; the pixels of anything else, as `read_pixels`."""
    if isinstance(record, np.ndarray):
        array = record if record.flags.writeable else record.copy()  # torch has no read-only data
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
    """The pixels of a record, as `to_rgb` gives them, but faster.

    Returns:
        uint8 (3, h, w), channels last in memory.

    Raises:
        OSError: the file is truncated.
        ValueError: see `to_rgb`.
    """
    image = read_record(record)
    return _decode(image) if isinstance(image, Jpeg) else image


def read_for_device(record: Record) -> Jpeg | Tensor:
    """`read_record`, but of a JPEG without its end the pixels, or what is wrong with it."""
    image = read_record(record)
    if isinstance(image, Jpeg) and image.data[-2:].tolist() != [0xFF, 0xD9]:
        return _decode(image)
    return image


def _pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, h, w)


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """(height, width) of an RGB or grey JPEG without EXIF or XMP, which could turn it.

    This walks through the segments of the header, which takes Pillow several times as long.
    Pillow has the last word on whatever gives None here.
    """
    start = 2
    while data[:2] == b"\xff\xd8" and start + 10 <= len(data) and data[start] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, start)
        if marker in (0xE1, 0xFF):  # EXIF or XMP; padding, behind which there may be some
            break
        if marker in (0xC0, 0xC2):  # the frame, baseline or progressive
            depth, height, width, channels = struct.unpack_from(">BHHB", data, start + 4)
            usual = depth == 8 and channels in (1, 3) and 0 < height * width < SURELY_NO_BOMB
            return (height, width) if usual else None
        start += 2 + length
    return None


def _size_of_upright_jpeg(data: bytes) -> tuple[int, int] | None:
    """As `_size_of_plain_jpeg`, also with EXIF and XMP.

    Raises:
        OSError: this is no image.
    """
    with Image.open(io.BytesIO(data)) as image:
        usual = image.format == "JPEG" and image.mode in ("RGB", "L")
        upright = usual and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return (image.height, image.width) if upright else None


def _decode(image: Jpeg) -> Tensor:
    try:
        return decode_jpeg(image.data, mode=ImageReadMode.RGB)  # (3, h, w)
    except RuntimeError:  # Pillow is the judge of what is broken
        return _pixels_of(read_rgb(io.BytesIO(image.data.numpy())))
