"""TIFF files written tag by tag, also of kinds that Pillow does not write."""

import struct

import numpy as np


def tiff(*pages, order="<", big=False):
    """Return a TIFF of uncompressed pages, each a pair of its pixels and a dict of its tags.

    Args:
        order: of bytes, as `struct` and NumPy spell it.
        big: write a BigTIFF.
    """
    offset, count = ("Q", "Q") if big else ("I", "H")
    mark = b"II" if order == "<" else b"MM"
    data = mark + struct.pack(f"{order}H", 43 if big else 42)
    data += struct.pack(f"{order}HH", 8, 0) if big else b""
    for pixels, tags in pages:
        data += struct.pack(order + offset, len(data) + struct.calcsize(offset) + pixels.nbytes)
        strip = len(data)
        data += pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        tags = shape_of(pixels) | {273: strip, 279: pixels.nbytes} | tags
        data += struct.pack(order + count, len(tags))
        for tag, value in sorted(tags.items()):
            data += struct.pack(f"{order}HH{offset}{offset}", tag, 16 if big else 4, 1, value)
    return data + struct.pack(order + offset, 0)


def shape_of(pixels):
    """Return the tags of pixels (h, w), or (h, w, channels)."""
    height, width, channels = (*pixels.shape, 1)[:3]
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    bits = pixels.dtype.itemsize * 8
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: channels, 278: height}
    return tags | {339: kind}


def packed_12_bit(values):
    """Return even numbers of values below 4096 as bytes, two values in three."""
    first, second = values.reshape(-1, 2).astype(int).T
    parts = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(parts, axis=-1).astype(np.uint8)
