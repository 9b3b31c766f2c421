"""Packed images: the raw pixels of a dataset in one memory-mapped file, read without decoding.

In their folder, `pixels.bin` holds the pixels (height, width, 3) of all images, one after another,
`records.npy` their offsets, sizes, labels and names, and `packed.json` the rest.
"""

import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from util.data.broken_images import reason_of
from util.errors import InputError
from util.settings.data import PACKED_INDEX

PIXELS, RECORDS = "pixels.bin", "records.npy"
VERSION = 1
FIELDS = [("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("label", "<i4")]


def write_packed(
    folder: Path,
    images: Iterable[tuple[str, int, int, int, bytes]],
    *,
    classes: Sequence[str],
    short_side: int,
) -> None:
    """Write a new folder that `PackedImages` reads.

    Args:
        images: at least one (file name from the class folder on, label, height, width, pixels).
        classes: names in the order of labels.
        short_side: size to which larger images were resized, for the record.
    """
    folder.mkdir()
    rows, offset = [], 0
    with (folder / PIXELS).open("wb") as file:
        for name, label, height, width, pixels in images:
            rows.append((offset, height, width, label, os.fsencode(name)))
            offset += file.write(pixels)
    longest = max(len(row[-1]) for row in rows)
    np.save(folder / RECORDS, np.array(rows, [*FIELDS, ("name", f"S{longest}")]))
    sizes = {"images": len(rows), "bytes": offset, "short_side": short_side}
    index = {"version": VERSION, **sizes, "classes": list(classes)}
    (folder / PACKED_INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _is_consistent(records: np.ndarray, num_bytes: int, num_classes: int) -> bool:
    """Whether the recorded images fill the file without gaps and have valid labels."""
    if records.dtype.names != (*(name for name, _ in FIELDS), "name"):
        return False
    offset, height, width, label = (records[name] for name, _ in FIELDS)
    ends = np.cumsum(3 * height.astype(np.int64) * width)
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
        classes: names in the order of labels; only "" if images have no labels.
        unlabeled: why there are no labels, or None.

    Raises:
        InputError: the files are missing, damaged, inconsistent or of a newer version.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        path = self.root / PACKED_INDEX
        try:
            index = json.loads(path.read_bytes())
            if index["version"] > VERSION:
                raise InputError(
                    f"{path} has version {index['version']} of the packed format, but this code "
                    f"reads only up to {VERSION}: update the code"
                )
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
        if not _is_consistent(self.records, sizes[PIXELS], len(self.classes)):
            raise InputError(f"{self.root / RECORDS} is damaged: copy or prepare it again")

    @cached_property
    def records(self) -> np.ndarray:
        """FIELDS and name of each image, (N,)."""
        return np.load(self.root / RECORDS, mmap_mode="r", allow_pickle=False)

    @property
    def labels(self) -> np.ndarray:
        """Indices into `classes`, (N,)."""
        return self.records["label"]

    @cached_property
    def pixels(self) -> np.ndarray:
        """Pixels of all images, uint8 (bytes,)."""
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

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return a copy of the pixels, uint8 (h, w, 3), and the label."""
        offset, height, width, label = (int(self.records[index][name]) for name, _ in FIELDS)
        pixels = self.pixels[offset : offset + 3 * height * width]
        return np.array(pixels).reshape(height, width, 3), label
