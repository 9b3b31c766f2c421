"""The images of a suite: all of a folder, or evenly spaced ones of each class."""

import csv
import io
from pathlib import Path

from util.data.folders import DiskTree
from util.data.layout import find_images
from util.data.sampler import evenly_spaced
from util.errors import InputError, counted
from util.runs.files import replace_file

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
        InputError: there are no folders of classes, or too few images in one; or the table there is
            lists other images.
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
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    table, content = output_dir / TABLE, text.getvalue().encode()
    if not table.exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        replace_file(table, lambda file: file.write(content))
    elif table.read_bytes() != content:
        raise InputError(f"{table} lists other images: choose another --output_dir")
    return ["--data_csv", str(table), *flags]
