"""The images of a suite: all of a folder, or evenly spaced ones of each class."""

import csv
from pathlib import Path

from util.data.folders import DiskTree
from util.data.layout import find_images
from util.data.sampler import evenly_spaced
from util.errors import InputError, counted

TABLE = "images.csv"


def data_flags(
    data_path: Path, val_path: Path | None, *, per_class: int | None, output_dir: Path
) -> list[str]:
    """Flags of the images, which may be those of a table that this writes.

    Args:
        data_path: folder of the training images, in folders of classes if `per_class` is given.
        val_path: of the validation images; None: in `data_path`.
        per_class: number of training images of each class; None: all.

    Raises:
        InputError: there are no folders of classes, or too few images in one.
    """
    flags = ["--data_path", str(data_path)]
    flags += [] if val_path is None else ["--val_path", str(val_path)]
    if per_class is None:
        return flags
    found = find_images(DiskTree(str(data_path)), "")
    if found.unlabeled:
        raise InputError(f"--data_path: {found.unlabeled}")
    rows = [("path", "label")]
    for label, name in enumerate(found.classes):
        paths = [path for path, own in zip(found.paths, found.labels, strict=True) if own == label]
        if len(paths) < per_class:
            raise InputError(
                f"{data_path} has {counted(len(paths), 'image')} of {name}, the suite needs "
                f"{per_class:,} of each class: give another --data_path"
            )
        rows += [(paths[index], name) for index in evenly_spaced(len(paths), per_class)]
    output_dir.mkdir(parents=True, exist_ok=True)
    table = output_dir / TABLE
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return ["--data_csv", str(table), *flags]
