"""Packed images: the raw pixels of a dataset in one memory-mapped file, read without decoding.

In their folder, `pixels.bin` holds the pixels (height, width, channels) of all images, one after
another, `records.npy` their offsets, sizes, labels and names, and `packed.json` the rest. In
version 1, all are 8-bit RGB; in version 2, records also have the type of an image's numbers.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from util.data.broken_images import reason_of
from util.errors import InputError, counted
from util.json_text import parse_json
from util.normalization import PixelFormat
from util.settings.data import PACKED_INDEX

PIXELS, RECORDS = "pixels.bin", "records.npy"
VERSION = 2
FIELDS = [("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("label", "<i4")]
TYPE_FIELD = ("dtype", "S3")
DTYPES = ("|u1", "<u2", "<i2", "<f4")  # NumPy's names
RGB8_DTYPE = "|u1"


class PackedImage(NamedTuple):
    """An image to be packed; its name starts at the class folder."""

    name: str
    label: int
    height: int
    width: int
    dtype: str  # of DTYPES
    pixels: bytes


def write_packed(
    folder: Path,
    images: Iterable[PackedImage],
    *,
    classes: Sequence[str],
    short_side: int,
    channels: int = 3,
) -> None:
    """Write a new folder that `PackedImages` reads.

    Args:
        images: at least one.
        classes: names in the order of labels.
        short_side: size to which larger images were resized, for the record.
    """
    folder.mkdir()
    rows, dtypes, offset = [], [], 0
    with (folder / PIXELS).open("wb") as file:
        for image in images:
            row = offset, image.height, image.width, image.label, os.fsencode(image.name)
            rows.append(row)
            dtypes.append(image.dtype)
            offset += file.write(image.pixels)
    index = {"version": 1, "images": len(rows), "bytes": offset, "short_side": short_side}
    fields = [*FIELDS, ("name", f"S{max(len(name) for *_, name in rows)}")]
    if channels != 3 or set(dtypes) != {RGB8_DTYPE}:  # otherwise, earlier code reads them too
        index |= {"version": VERSION, "channels": channels, "dtypes": sorted(set(dtypes))}
        rows = [(*row, dtype.encode()) for row, dtype in zip(rows, dtypes, strict=True)]
        fields.append(TYPE_FIELD)
    np.save(folder / RECORDS, np.array(rows, fields))
    index["classes"] = list(classes)
    (folder / PACKED_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _is_consistent(
    records: np.ndarray, num_bytes: int, num_classes: int, channels: int, dtypes: Sequence[str]
) -> bool:
    """Whether the recorded images fill the file without gaps and have valid labels."""
    fields = (*(name for name, _ in FIELDS), "name")
    has_types = records.dtype.names == (*fields, TYPE_FIELD[0])
    if not (has_types or records.dtype.names == fields):
        return False
    item_sizes = np.ones(len(records), np.int64)
    if has_types:
        known = {name.encode(): np.dtype(name).itemsize for name in set(dtypes) & set(DTYPES)}
        found, places = np.unique(records[TYPE_FIELD[0]], return_inverse=True)
        if not set(found.tolist()) <= set(known):
            return False
        item_sizes = np.array([known[name] for name in found.tolist()])[places]
    offset, height, width, label = (records[name] for name, _ in FIELDS)
    ends = np.cumsum(item_sizes * channels * height * width)
    return (
        len(records) > 0
        and min(height.min(), width.min()) > 0
        and ends[-1] == num_bytes
        and offset[0] == 0
        and np.array_equal(offset[1:], ends[:-1])
        and 0 <= label.min() <= label.max() < num_classes
    )


class PackedImages(Dataset):
    """Packed images read by index; each process maps the files when it first reads one.

    Args:
        root: folder written by `write_packed`.

    Attributes:
        channels: C, of every image.
        dtypes: of the images, a few of DTYPES.
        classes: names in the order of labels; only "" if images have no labels.
        unlabeled: why there are no labels, or None.

    Raises:
        InputError: the files are missing, damaged, inconsistent or of a newer version.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        path = self.root / PACKED_INDEX
        try:
            index = parse_json(path.read_bytes())
            if index["version"] > VERSION:
                raise InputError(
                    f"{path} has version {index['version']} of the packed format, but this code "
                    f"reads only up to {VERSION}: update the code"
                )
            self.channels = int(index.get("channels", 3))
            self.dtypes = tuple(index.get("dtypes", (RGB8_DTYPE,)))
            self.classes = tuple(index["classes"])
            self.unlabeled = None
            if self.classes == ("",):
                self.unlabeled = (
                    f"{root} was prepared from images without class folders: sort them into one "
                    "folder per class, and prepare them again"
                )
            sizes = {PIXELS: index["bytes"], RECORDS: index["images"]}
            found = {PIXELS: (self.root / PIXELS).stat().st_size, RECORDS: len(self.records)}
        except FileNotFoundError as error:
            raise InputError(
                f"{error.filename} does not exist: use a folder that scripts/prepare_dataset.py "
                "has written, or its train/ or val/"
            ) from error
        except (EOFError, KeyError, OSError, TypeError, ValueError) as error:
            raise InputError(
                f"cannot read the packed images in {self.root}: prepare them again "
                f"({reason_of(error)})"
            ) from error
        for name, size in sizes.items():
            if found[name] != size:
                unit = "bytes" if name == PIXELS else "records"
                raise InputError(
                    f"{self.root / name} has {found[name]} {unit}, but {PACKED_INDEX} says {size}: "
                    "copy or prepare it again"
                )
        described = len(self.classes), self.channels, self.dtypes
        if not _is_consistent(self.records, sizes[PIXELS], *described):
            raise InputError(f"{self.root / RECORDS} is damaged: copy or prepare it again")

    @cached_property
    def records(self) -> np.ndarray:
        """FIELDS, the type in version 2, and name of each image, (N,)."""
        return np.load(self.root / RECORDS, mmap_mode="r", allow_pickle=False)

    @property
    def labels(self) -> np.ndarray:
        """Indices into `classes`, (N,)."""
        return self.records["label"]

    @cached_property
    def pixels(self) -> np.ndarray:
        """Bytes of all images, uint8 (bytes,)."""
        return np.memmap(self.root / PIXELS, np.uint8, mode="r")

    def __getstate__(self) -> dict:
        """Leave out the maps: pickling one would copy the whole file."""
        return {k: v for k, v in vars(self).items() if k not in ("records", "pixels")}

    def __len__(self) -> int:
        return len(self.records)

    def filename(self, index: int, *, absolute: bool = False) -> str:
        """Return the original file name from the class folder on, or prefixed by `root`."""
        name = os.fsdecode(self.records[index]["name"])
        return f"{self.root}/{name}" if absolute else name

    def check_format(self, pixels: PixelFormat) -> None:
        """Raise InputError if images are read as 8-bit RGB, but are not."""
        if not pixels.is_rgb8 or (self.channels == 3 and self.dtypes == (RGB8_DTYPE,)):
            return
        types = " and ".join(np.dtype(name).name for name in self.dtypes)
        raise InputError(
            f"{self.root} has images of {counted(self.channels, 'channel')} ({types}): give "
            f"--channels {self.channels}"
        )

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return a copy of the pixels, (h, w, C), and the label."""
        record = self.records[index]
        offset, height, width, label = (int(record[name]) for name, _ in FIELDS)
        name = record[TYPE_FIELD[0]].decode() if TYPE_FIELD[0] in record.dtype.names else RGB8_DTYPE
        dtype, shape = np.dtype(name), (height, width, self.channels)
        num_bytes = dtype.itemsize * math.prod(shape)
        values = np.array(self.pixels[offset : offset + num_bytes]).view(dtype)
        return values.astype(dtype.newbyteorder("="), copy=False).reshape(shape), label
