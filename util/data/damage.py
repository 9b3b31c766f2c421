"""Encoded images that cannot be read: without their metadata they may be, else what is wrong."""

import codecs
import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from PIL import UnidentifiedImageError

from util.data import tiff
from util.errors import counted

PNG = b"\x89PNG\r\n\x1a\n"

# Bytes at an offset, and which format they tell: first the formats that Pillow reads.
SIGNATURES = (
    (0, PNG, "PNG"),
    (0, b"\xff\xd8", "JPEG"),
    (0, b"GIF8", "GIF"),
    (0, b"BM", "BMP"),
    (8, b"WEBPVP8", "WebP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
    (0, b"II+\0", "BigTIFF"),
    (4, b"ftypavif", "AVIF"),
    (4, b"jP  \r\n", "JPEG 2000"),
    (0, b"P4", "PBM"),
    (0, b"P5", "PGM"),
    (0, b"P6", "PPM"),
)
# Formats that Pillow knows and that are not read, by how their files begin. The bytes of some could
# pass for TGA, which has no signature: without a palette, its bytes 3 to 6 are zero.
FOREIGN = {
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "ICO": rb"\0\0\x01\0(?!\0\0)",
    "CUR": rb"\0\0\x02\0(?!\0\0)",
    "ICNS": rb"icns",
    "PSD": rb"8BPS",
    "DDS": rb"DDS ",
    "BLP": rb"BLP[12]",
    "FTEX": rb"FTEX",
    "QOI": rb"qoif",
    "SGI": rb"\x01\xda",
    "PCX": rb"\n[\0\x02\x03\x05][\0\x01]",
    "DCX": rb"\xb1\x68\xde\x3a",
    "MSP": rb"DanM|LinS",
    "PIXAR": rb"\x80\xe8\0\0",
    "IM": rb"Image type:",
    "XBM": rb"\s*#define",
    "XPM": rb"/\* XPM \*/",
    "XV thumbnail": rb"P7 332",
    "Sun raster": rb"\x59\xa6\x6a\x95",
    "GIMP brush": rb"\0\0..\0\0\0[\x01\x02].{12}GIMP",
    "PCD": rb".{2048}PCD_",
    "OLE (FPX or MIC)": rb"\xd0\xcf\x11\xe0",
    "WMF": rb"\xd7\xcd\xc6\x9a",
    "EMF": rb"\x01\0\0\0.{36} EMF",
    "DIB": rb"[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "FLI": rb".{4}[\x11\x12]\xaf",
    "MPEG": rb"\0\0\x01[\xb3\xba]",
    "FITS": rb"SIMPLE",
    "GRIB": rb"GRIB",
    "BUFR": rb"BUFR",
    "McIDAS": rb"\0\0\0\0\0\0\0\x04",
}
UNREADABLE = (
    (0, b"MM\0+", "big-endian BigTIFF"),
    (4, b"ftyphei", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"v/1\x01", "OpenEXR"),
    (128, b"DICM", "DICOM"),
    (0, b"%PDF", "PDF"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\x89HDF", "HDF5"),
)
TEXTS = (
    (r"<!doctype html|<html", "an HTML page"),
    (r"<svg", "an SVG drawing"),
    (r"^version https://git-lfs", "a pointer of Git LFS (run `git lfs pull`)"),
    (r"^<", "XML"),
    ("", "text"),
)
NO_DIRECTORY = "TIFF without a readable directory: truncated or damaged"


class BrokenImageError(OSError):
    """An image cannot be read; the message says why."""


# Metadata


def without_metadata(data: bytes, *, keep_orientation: bool) -> bytes | None:
    """Remove from an encoded image what says nothing about its pixels; None if nothing is removed.

    Args:
        keep_orientation: keep the metadata that may say how the image is turned, unless their
            checksum is wrong.
    """
    try:
        bare = REMOVERS[_format_of(data)](data, keep_orientation)
    except (KeyError, struct.error):  # another format; a damaged structure
        return None
    return None if bare == data else bare


def _bare_png(data: bytes, keep_orientation: bool) -> bytes:
    chunks = list(_png_chunks(data))
    has_palette = data[25:26] == b"\3"
    if has_palette and not any(chunk.name == b"PLTE" for chunk in chunks):
        return data  # its name may be damaged, and without it Pillow would invent one
    if any(not chunk.is_metadata and not chunk.is_right for chunk in chunks):
        return data  # Pillow does not check the pixels' checksum
    kept = [chunk.raw for chunk in chunks if not _is_dispensable(chunk, keep_orientation)]
    return b"".join((PNG, *kept))


def _is_dispensable(chunk: "Chunk", keep_orientation: bool) -> bool:
    if not chunk.is_metadata or not chunk.is_right:
        return chunk.is_metadata
    texts = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
    turns = chunk.name == b"eXIf" or chunk.content.startswith(texts)
    return chunk.name != b"tRNS" and not (keep_orientation and turns)


def _bare_jpeg(data: bytes, keep_orientation: bool) -> bytes:
    kept, end = [], 0
    for segment in _jpeg_segments(data):
        size, application = len(segment.content), segment.marker - 0xE0
        if application == 0:  # shorter ones are no JFIF for libjpeg either
            keep = size >= 14
        elif application == 14:  # Adobe's, about the color space
            keep = size >= 12
        elif application == 1:
            keep = keep_orientation
        else:
            keep = not 0 <= application < 16 and segment.marker != 0xFE  # a comment
        if not keep:
            kept.append(data[end : segment.start])
            end = segment.start + len(segment.raw)
    return b"".join((*kept, data[end:])) if kept else data


def _bare_webp(data: bytes, keep_orientation: bool) -> bytes:
    removed = (b"ICCP",) if keep_orientation else (b"ICCP", b"EXIF", b"XMP ")
    kept, start = [], 12
    while start + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, start + 4)
        name, end = data[start : start + 4], start + 8 + size + size % 2
        chunk = data[start:end]
        if name == b"VP8X":  # its flags say which of the others exist
            flags = chunk[8] & (0b11011111 if keep_orientation else 0b11010011)
            chunk = chunk[:8] + bytes([flags]) + chunk[9:]
        if name not in removed:
            kept.append(chunk)
        start = end
    content = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(content)) + content


def _bare_tiff(data: bytes, keep_orientation: bool) -> bytes:
    tags = {*range(254, 270), *range(273, 282), *range(284, 294), *range(317, 326)}
    tags |= {332, *range(336, 348), *range(512, 533)}
    return tiff.keep_tags(data, tags | {tiff.XMP} if keep_orientation else tags)


def _bare_avif(data: bytes, keep_orientation: bool) -> bytes:  # which is no metadata in AVIF
    return re.sub(rb"(infe.{8})Exif", rb"\1none", data, flags=re.DOTALL)


REMOVERS = {
    "AVIF": _bare_avif,
    "PNG": _bare_png,
    "JPEG": _bare_jpeg,
    "WebP": _bare_webp,
    "TIFF": _bare_tiff,
    "BigTIFF": _bare_tiff,
}


class Chunk(NamedTuple):
    """A part of a PNG."""

    name: bytes
    content: bytes
    raw: bytes
    is_whole: bool
    is_right: bool
    """Whether its checksum is."""

    @property
    def is_metadata(self) -> bool:
        """Whether the pixels are independent of it, by PNG's rule for names."""
        return self.name.isalpha() and self.name[:1].islower()


def _png_chunks(data: bytes) -> Iterator[Chunk]:
    start = len(PNG)
    while start + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        raw = data[start:end]
        checksum = zlib.crc32(raw[4:-4]).to_bytes(4, "big")
        yield Chunk(name, raw[8:-4], raw, end <= len(data), raw[-4:] == checksum)
        start = end


class Segment(NamedTuple):
    """A part of a JPEG's header; of the last one, which has the pixels, only the beginning."""

    start: int
    marker: int
    content: bytes
    raw: bytes


def _jpeg_segments(data: bytes) -> Iterator[Segment]:
    start = 2
    while (start := data.find(b"\xff", start)) >= 0 and start + 4 <= len(data):
        marker, length = struct.unpack_from(">xBH", data, start)
        is_metadata = 0xE0 <= marker < 0xF0 or marker == 0xFE
        if marker == 0xFF:  # padding
            start += 1
        elif marker < 2 or 0xD0 <= marker < 0xDA or (is_metadata and length < 2):  # only a marker
            start += 2
        elif marker == 0xDA or length < 2:  # the pixels; damaged
            yield Segment(start, marker, b"", data[start : start + 4])
            return
        else:
            end = start + 2 + length
            yield Segment(start, marker, data[start + 4 : end], data[start:end])
            start = end


# Causes


def cause_of(data: bytes, error: Exception) -> str:
    """Return in a few words why these bytes are not read, Pillow having raised this error."""
    name = _format_of(data)
    is_identified = not isinstance(error, UnidentifiedImageError)  # its text is a memory address
    if name is None and not is_identified:
        return _what_else(data)
    found = CAUSES[name](data) if name in CAUSES else None
    if found:
        return found
    text = " ".join(str(error).split()).removesuffix(" when reading image file")
    if re.search("truncated|not enough image data|unexpected end", text, re.IGNORECASE):
        return "truncated"
    if is_identified:
        return f"damaged {name or 'image'} ({text or type(error).__name__})"
    return _kind_of_tiff(data) if name in ("TIFF", "BigTIFF") else f"{name} with a damaged header"


def _format_of(data: bytes) -> str | None:
    return next((n for at, sign, n in SIGNATURES if data.startswith(sign, at)), None)


def check_format(data: bytes) -> None:
    """Raise BrokenImageError for a file of a format that Pillow knows, but that is not read."""
    if _format_of(data) is not None:
        return
    for name, beginning in FOREIGN.items():
        if re.match(beginning, data, re.DOTALL):
            raise BrokenImageError(f"{name}, which is not read")


def _what_else(data: bytes) -> str:
    """Return what a file of no known format of images is."""
    if not data:
        return "an empty file"
    if not data.strip(b"\0"):
        return "nothing but zero bytes"
    if data.startswith(b"\x93NUMPY"):
        return "an array of NumPy: give the number of its channels by --channels"
    for at, sign, name in UNREADABLE:
        if data.startswith(sign, at):
            return f"{name}, which Pillow cannot read"
    head = data[:1000]
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head).lstrip()
    except UnicodeDecodeError:
        return "not an image of a known format"
    if re.search(r"[\x00-\x08\x0e-\x1f]", text):
        return "not an image of a known format"
    what = next(what for sign, what in TEXTS if re.search(sign, text, re.IGNORECASE))
    return f"not an image, but {what}"


def _cause_in_png(data: bytes) -> str | None:
    chunk = None
    for chunk in _png_chunks(data):
        name = chunk.name.decode("latin-1")
        if not re.fullmatch("[A-Za-z]{4}", name):
            return "damaged PNG (a chunk without a name)"
        if not chunk.is_metadata and chunk.is_whole and not chunk.is_right:
            return f"wrong checksum of the chunk {name}"
    return None if chunk and chunk.is_whole and chunk.name == b"IEND" else "truncated"


def _cause_in_jpeg(data: bytes) -> str | None:
    for segment in _jpeg_segments(data):
        is_frame = 0xC0 <= segment.marker <= 0xCF and segment.marker not in (0xC4, 0xC8, 0xCC)
        if is_frame and len(segment.content) >= 6:
            bits, height, width, channels = struct.unpack_from(">BHHB", segment.content)
            kind = f"{counted(channels, 'channel')} of {bits} bits"
            if segment.marker not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA):
                return "lossless or hierarchical JPEG, which Pillow cannot read"
            if bits != 8 or channels not in (1, 3, 4):
                return f"JPEG with {kind}, which Pillow cannot read"
            if not height or not width:
                return f"JPEG of {width} x {height} pixels"
        if segment.marker == 0xDA or segment.raw[2:4] < b"\0\2":  # what follows is not known
            return None
    return "truncated"


def _cause_in_webp(data: bytes) -> str | None:
    size = int.from_bytes(data[4:8], "little")
    return "truncated" if size + 8 > len(data) else None


def _cause_in_boxes(data: bytes) -> str | None:
    start = 0
    while start + 8 <= len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        if size < 8:  # the rest of the file; a size above 4 GB
            return None
        start += size
    return None if start == len(data) else "truncated"


def _cause_in_tiff(data: bytes) -> str | None:
    page = tiff.first_page(data)
    if page is None:
        return NO_DIRECTORY
    for offsets, sizes in (
        (tiff.STRIP_OFFSETS, tiff.STRIP_SIZES),
        (tiff.TILE_OFFSETS, tiff.TILE_SIZES),
    ):
        parts = zip(page.values(offsets), page.values(sizes), strict=False)
        if any(start + size > len(data) for start, size in parts):
            return "truncated"
    return None


def _kind_of_tiff(data: bytes) -> str:
    page = tiff.first_page(data)
    bits = page.values(tiff.BITS) or (1,)
    channels = page.value(tiff.CHANNELS, len(bits))
    depth = f"{bits[0]}-bit" if len(set(bits)) == 1 else "mixed"
    number = {2: " signed", 3: " floating-point"}.get(page.value(tiff.SAMPLE_FORMAT, 1), "")
    return (
        f"TIFF that Pillow cannot read ({counted(channels, 'channel')} of {depth}{number} "
        f"numbers, compression {page.value(tiff.COMPRESSION, 1)}): give --channels {channels}, or "
        "save it as RGB or gray with 8 or 16 bits"
    )


CAUSES = {
    "PNG": _cause_in_png,
    "JPEG": _cause_in_jpeg,
    "WebP": _cause_in_webp,
    "AVIF": _cause_in_boxes,
    "JPEG 2000": _cause_in_boxes,
    "TIFF": _cause_in_tiff,
    "BigTIFF": _cause_in_tiff,
}
