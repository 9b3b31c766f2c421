"""Pixels of TIFF files as they are stored: any type, channels in samples or pages, windows."""

import logging
import math
from typing import BinaryIO, NamedTuple

import numpy as np
import tifffile

from util.data import tiff
from util.data.damage import NO_DIRECTORY, BrokenImageError
from util.data.stored import (
    MAX_VALUES,
    Contiguous,
    InMemory,
    Layout,
    Stored,
    Window,
    check_size,
    layout_of,
    read_rows,
)
from util.normalization import PixelFormat

ORIENTATION = 274
JPEG = (6, 7, 33007, 34892)  # compressions whose colors are decoded to RGB
ALPHA = (1, 2)  # values of ExtraSamples
AXES = {"S": "samples", "C": "channels", "Z": "slices", "T": "times"}  # others are pages
PALETTE, YCBCR = 3, 6  # of PHOTOMETRIC
REFUSED_COLORS = {YCBCR: "YCbCr", 8: "CIELAB", 9: "ICCLAB", 10: "ITULAB"}

# What is damaged is told for each image, once.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def open_tiff(file: BinaryIO, pixels: PixelFormat) -> Stored:
    """Return the first full image of a TIFF; further ones of the same kind may be its channels.

    Raises:
        BrokenImageError: it cannot be read, or more than one axis may be the channels.
        Exception: it is damaged.
    """
    directories = list(tiff.pages(file))
    if not directories:
        raise BrokenImageError(NO_DIRECTORY)
    are_full = [page.is_full for page in directories]
    _check_alike(directories[are_full.index(True) if True in are_full else 0])
    series = _series_of(file, are_full)
    if series is None or _needs_other_files(series):  # which are images of their own
        file.seek(0)
        series = _first_full(tifffile.TiffFile(Unnamed(file), is_ome=False).series, are_full)
    if series.transform is not None:
        raise BrokenImageError(f"TIFF of the kind {series.kind}: save it as a plain TIFF")
    if _has_channels_last(series, pixels):
        return _whole(file, series)
    channels = _channels_of(series, pixels)
    if not (channels.are_samples or tiff.are_complete(directories)):
        raise BrokenImageError("TIFF whose further pages are damaged or cut off")
    return TiffImage(file, series, channels, pixels, num_pages=sum(are_full))


class Unnamed:
    """An open file without its name, by which tifffile would find and open others.

    An OME-TIFF names any files for its pages, and Micro-Manager's have the beginning of their names
    in common.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell = file.seek, file.tell
        self.read, self.readinto = file.read, file.readinto


def _series_of(file: BinaryIO, are_full: list[bool]) -> tifffile.TiffPageSeries | None:
    """Return the first series of full pages; None if only other files could tell their number."""
    file.seek(0)
    try:
        return _first_full(tifffile.TiffFile(Unnamed(file)).series, are_full)
    except ValueError:
        return None


def _needs_other_files(series: tifffile.TiffPageSeries) -> bool:
    """Whether an OME-TIFF lists pages of other files."""
    if series.kind != "ome":
        return False
    return series.is_multifile or None in [series[index] for index in range(len(series))]


def _check_alike(page: tiff.Page) -> None:
    """Raise BrokenImageError if the samples of a page are of different kinds."""
    number = page.value(tiff.CHANNELS, 1)
    for what, tag in (("numbers of bits", tiff.BITS), ("types", tiff.SAMPLE_FORMAT)):
        values = page.values(tag)[:number]
        if len(set(values)) > 1:
            listed = ", ".join(map(str, values))
            raise BrokenImageError(f"TIFF whose channels have different {what} ({listed})")


def _first_full(
    found: list[tifffile.TiffPageSeries], are_full: list[bool]
) -> tifffile.TiffPageSeries:
    """Return the first series of full pages, which tifffile may have mixed with masks.

    Args:
        are_full: of each page that was looked at.
    """
    if all(are_full):
        return found[0]
    for series in found:
        pages = [series[index] for index in range(len(series))]
        full = [page for page in pages if page.index >= len(are_full) or are_full[page.index]]
        if len(full) == len(pages):
            return series
        if full:
            shape, axes = (len(full), *full[0].shape), "I" + full[0].axes
            return tifffile.TiffPageSeries(full, shape, axes=axes)
    return found[0]


def _has_channels_last(series: tifffile.TiffPageSeries, pixels: PixelFormat) -> bool:
    """Whether tifffile wrote an array (H, W, C), of which it took W and C for rows and columns."""
    key = series.keyframe
    if series.kind != "shaped" or series.axes != "QYX" or pixels.is_rgb8 or key.dtype is None:
        return False
    is_plain = key.bitspersample == 8 * key.dtype.itemsize
    if not is_plain or key.photometric != tiff.BLACK_IS_ZERO:
        return False
    first, _, last = series.shape
    if first == last == pixels.num_channels:
        return not layout_of(series.shape, pixels).channels_first
    return last == pixels.num_channels


def _whole(file: BinaryIO, series: tifffile.TiffPageSeries) -> Stored:
    """Return an image (H, W, C) whose rows are pages."""
    if series.dataoffset is not None:
        dtype = series.dtype.newbyteorder(series.keyframe.parent.byteorder)
        return Contiguous(file, series.dataoffset, Layout(series.shape, False), dtype)
    check_size(series.shape)
    return InMemory(series.asarray(maxworkers=1))


class Channels(NamedTuple):
    """Which numbers of a series are the channels of the image."""

    number: int
    step: int = 1
    """Numbers from one to the next."""
    are_samples: bool = False
    has_alpha: bool = False


def _channels_of(series: tifffile.TiffPageSeries, pixels: PixelFormat) -> Channels:
    """Choose the axis that has the channels.

    Raises:
        BrokenImageError: none has their number, or more than one.
    """
    key, shape = series.keyframe, series.shape
    steps = [math.prod(shape[index + 1 :]) for index in range(len(shape))]
    others = [i for i, axis in enumerate(series.axes) if axis not in "YX" and shape[i] > 1]
    if pixels.is_rgb8:  # other pages are other images
        others = [index for index in others if series.axes[index] == "S"]
    has_alpha = bool(key.extrasamples) and key.extrasamples[-1] in ALPHA
    wanted = pixels.num_channels

    def fits(index: int) -> bool:
        with_alpha = has_alpha and series.axes[index] == "S"
        return shape[index] == wanted or (with_alpha and shape[index] == wanted + 1)

    fitting = [index for index in others if fits(index)] or others
    if not fitting:
        return Channels(1)
    if len(fitting) > 1:
        names = (f"{shape[i]} {AXES.get(series.axes[i], 'pages')}" for i in fitting)
        raise BrokenImageError(
            f"TIFF of {' and '.join(names)}, which may all be channels: keep one of them in a file"
        )
    index = fitting[0]
    are_samples = series.axes[index] == "S"
    return Channels(shape[index], steps[index], are_samples, has_alpha and are_samples)


class Part(NamedTuple):
    """Numbers of a page that are one plane of pixels, with one or more channels."""

    page: int
    sample: int
    """Of the samples that are stored apart."""
    layer: int
    """Of an image that has depth."""


class TiffImage:
    """An image of a TIFF, of which the strips or tiles of a window are decoded.

    Args:
        num_pages: full pages of the file.

    Attributes:
        shape, dtype, orientation, has_alpha: see `Stored`.
        has_further_pages: whether some are not read.
    """

    def __init__(
        self,
        file: BinaryIO,
        series: tifffile.TiffPageSeries,
        channels: Channels,
        pixels: PixelFormat,
        *,
        num_pages: int,
    ) -> None:
        self.key = series.keyframe
        _check_kind(self.key)
        self.file = file
        self.file_size = file.seek(0, 2)
        self.series = series
        self.orientation = int(self.key.tags.valueof(ORIENTATION, 1))
        self.has_alpha = channels.has_alpha
        self.parts = self._parts_of(channels)
        self.has_further_pages = len({part.page for part in self.parts}) < num_pages
        self.values = Values(self.key, scales=pixels.value_range is None)
        number = channels.number
        if self.values.palette is not None:
            if number != 1:
                raise BrokenImageError(f"TIFF with a palette and {number} channels")
            number = 3
        self.shape = (self.key.imagelength, self.key.imagewidth, number)
        self.dtype = self.values.dtype

    def _parts_of(self, channels: Channels) -> dict[Part, list[int]]:
        """Return where the channels are: in which parts, and where within their pixels."""
        parts: dict[Part, list[int]] = {}
        _, depth, height, width, samples = self.key.shaped
        plane = height * width * samples
        page = self.key.shaped[0] * depth * plane
        for channel in range(channels.number):
            start = channel * channels.step
            index, start = divmod(start, page)
            sample, start = divmod(start, depth * plane)
            layer, start = divmod(start, plane)
            if start >= samples:
                raise BrokenImageError(f"TIFF whose axes {self.series.axes} are not its pages'")
            parts.setdefault(Part(index, sample, layer), []).append(start)
        return parts

    def read(self, window: Window) -> np.ndarray:
        """Return the numbers of a window; (h, w, C)."""
        planes = [self._read_part(part, window)[..., at] for part, at in self.parts.items()]
        stored = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        return self.values.of(stored)

    def _read_part(self, part: Part, window: Window) -> np.ndarray:
        """Return a window of a plane, (h, w, c); what is not compressed is only read."""
        _, depth, height, width, samples = self.key.shaped
        size = height * width * samples * self.key.dtype.itemsize  # of a plane
        if self.series.is_truncated:  # one directory stands for all pages
            if self.series.dataoffset is None:
                raise BrokenImageError("TIFF without the directories of its pages")
            start = self.series.dataoffset + part.page * self.key.shaped[0] * depth * size
        else:
            page = self.series[part.page]
            if not page.is_final:
                return self._decode(page, part, window)
            start = page.dataoffsets[0]
        start += (part.sample * depth + part.layer) * size
        dtype = self.key.dtype.newbyteorder(self.key.parent.byteorder)
        return read_rows(self.file, start, width, samples, dtype, window)

    def _decode(
        self, page: tifffile.TiffPage | tifffile.TiffFrame, part: Part, window: Window
    ) -> np.ndarray:
        """Decode the strips or tiles of a window and put them together."""
        key = self.key
        _, depth, height, width, samples = key.shaped
        rows, columns, layers = key.rowsperstrip, width, 1
        if key.is_tiled:
            rows, columns, layers = key.tilelength, key.tilewidth, key.tiledepth
        if rows * columns * layers * samples > MAX_VALUES:
            raise BrokenImageError("TIFF whose pixels are compressed in one piece: use tiles")
        down, across = math.ceil(height / rows), math.ceil(width / columns)
        first = (part.sample * math.ceil(depth / layers) + part.layer // layers) * down * across
        top, left = window.top, window.left
        bottom, right = top + window.height, left + window.width
        result = np.full((window.height, window.width, samples), key.nodata, key.dtype)
        for row in range(top // rows, math.ceil(bottom / rows)):
            for column in range(left // columns, math.ceil(right / columns)):
                segment = self._segment(page, first + row * across + column)
                if segment is None:
                    continue
                segment = segment[part.layer % layers]
                y, x = row * rows, column * columns
                ys = slice(max(top, y), min(bottom, y + segment.shape[0]))
                xs = slice(max(left, x), min(right, x + segment.shape[1]))
                target = result[ys.start - top : ys.stop - top, xs.start - left : xs.stop - left]
                target[:] = segment[ys.start - y : ys.stop - y, xs.start - x : xs.stop - x]
        return result

    def _segment(
        self, page: tifffile.TiffPage | tifffile.TiffFrame, index: int
    ) -> np.ndarray | None:
        """Return a decoded strip or tile (depth, h, w, C); None if the file leaves it out."""
        start, size = page.dataoffsets[index], page.databytecounts[index]
        if not size:
            return None
        if start + size > self.file_size:
            raise BrokenImageError("truncated")
        self.file.seek(start)
        data = self.file.read(size)
        tables = {"jpegtables": page.jpegtables, "jpegheader": self.key.jpegheader}
        return page.decode(data, index, **tables)[0]


def _check_kind(key: tifffile.TiffPage) -> None:
    """Raise BrokenImageError for pixels that are not read."""
    if key.dtype is None:
        raise BrokenImageError(
            f"TIFF of {key.bitspersample}-bit numbers of format {int(key.sampleformat)}, which "
            "cannot be read"
        )
    if 0 in key.shaped:
        raise BrokenImageError(f"TIFF of {key.imagewidth} x {key.imagelength} pixels")
    colors = REFUSED_COLORS.get(key.photometric)
    if colors and not (key.photometric == YCBCR and key.compression in JPEG):
        raise BrokenImageError(f"TIFF with {colors} colors: save it as RGB")
    if key.dtype.kind not in "bui" and _is_inverted(key):
        raise BrokenImageError(f"TIFF in which 0 is white, with {key.dtype.name} values")


def _is_inverted(key: tifffile.TiffPage) -> bool:
    return tiff.PHOTOMETRIC in key.tags and key.photometric == tiff.WHITE_IS_ZERO


class Values:
    """Turns stored numbers into values of pixels: by a palette, or so that 0 is black.

    Args:
        scales: whether numbers of fewer bits than their type are scaled to its range.

    Attributes:
        palette: uint8 (N, 3), or None.
        dtype: of the values.
    """

    def __init__(self, key: tifffile.TiffPage, *, scales: bool) -> None:
        self.palette = _palette_of(key) if key.photometric == PALETTE else None
        self.is_inverted = _is_inverted(key)
        self.dtype = key.dtype if self.palette is None else self.palette.dtype
        self.largest = 2**key.bitspersample - 1
        self.scales = scales and key.dtype in (np.uint8, np.uint16)

    def of(self, stored: np.ndarray) -> np.ndarray:
        """Return the values of stored numbers; (h, w, C)."""
        if self.palette is not None:
            return self.palette[stored[..., 0].astype(np.intp)]
        if self.is_inverted:
            is_unsigned = stored.dtype.kind == "u"
            stored = stored.dtype.type(self.largest) - stored if is_unsigned else ~stored
        full = np.iinfo(self.dtype).max if self.scales else self.largest
        if full == self.largest:
            return stored
        scaled = (stored.astype(np.uint32) * full + self.largest // 2) // self.largest
        return scaled.astype(self.dtype)


def _palette_of(key: tifffile.TiffPage) -> np.ndarray:
    colors = key.colormap
    if colors is None or colors.shape[1] < 2**key.bitspersample:
        raise BrokenImageError("TIFF without its palette")
    if colors.max() > 255:  # some programs write 8 bits instead of 16
        colors = colors >> 8
    return colors.T.astype(np.uint8)
