"""JPEG files of all kinds that cameras and programs write."""

import io

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


# How to turn an image of each EXIF orientation upright.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def file_of(image, file_format, **options):
    """Return the image as an open file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    file.seek(0)
    return file


def photo(width=67, height=45):
    """Return an image like a photograph: smooth, with some noise."""
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype("u1"))


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def padded(file):
    """Insert bytes before a JPEG's first segment that readers skip."""
    data = file.getvalue()
    return io.BytesIO(data[:2] + b"\xff\xff" + data[2:])


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
JPEGS = {
    "usual": lambda: file_of(photo(), "JPEG", quality=95),
    "progressive": lambda: file_of(photo(), "JPEG", progressive=True),
    "without subsampling": lambda: file_of(photo(), "JPEG", subsampling=0),
    "RGB inside": lambda: file_of(photo(), "JPEG", keep_rgb=True),
    "gray": lambda: file_of(photo().convert("L"), "JPEG"),
    "CMYK": lambda: file_of(photo().convert("CMYK"), "JPEG"),
    "comment and profile": lambda: file_of(photo(), "JPEG", comment=b"no", icc_profile=b"i" * 999),
    **{f"EXIF {n}": lambda n=n: file_of(photo(), "JPEG", exif=exif(n)) for n in UPRIGHT},
    "EXIF after padding": lambda: padded(JPEGS["EXIF 6"]()),
    "XMP": lambda: file_of(photo(), "JPEG", xmp=XMP),
    "two pictures": lambda: file_of(photo(), "MPO", save_all=True, append_images=[photo(9)]),
    "tiny": lambda: file_of(photo(1, 1), "JPEG"),
    "with a tail": lambda: io.BytesIO(file_of(photo(), "JPEG").getvalue() + b"tail"),
}
