"""Opens the dataset that `--dataset` and `--data_path` name, for `util.data.loaders` to read.

Sources have timm's names (`timm.data.create_dataset`) and are of two kinds. Indexed sources
(folders, .tar files, `packed`, `torch/...`, `hfds/...`, `inat2019`, `digits`) are read by index,
so a run resumes at any step. Streams (`wds/...`, `hfids/...`, `tfds/...`) are read sequentially,
so a run resumes at the start of an epoch.
"""

import logging
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal

import numpy as np
import timm.data
from torch.utils.data import Dataset

from util.data.broken_images import reason_of
from util.data.files import open_files, split_folder
from util.data.held_out import HoldOut
from util.data.hub import HubImages, adapt_stream_reader
from util.data.images import IndexedImages, Transform
from util.data.packed import PackedImages
from util.data.sources import OWN_SOURCES
from util.data.streams import StreamedImages
from util.data.table import TableSource, check_apart
from util.errors import InputError, counted
from util.normalization import RGB8, PixelFormat
from util.progress import waiting
from util.settings.data import ClassFolder, DataSettings, kind_of
from util.settings.evaluation import TaskName

logger = logging.getLogger(__name__)

VAL_SPLITS = ("validation", "val", "valid", "eval", "evaluation", "test")  # of Hugging Face's
IMAGE_FOLDERS = ("torch/folder", "torch/image_folder")  # timm's names of torchvision's

STREAMS = ("hfids", "tfds", "wds")
FROM_FILES = ("folder", "torch", "wds")
FROM_FILES += tuple(name for name, source in OWN_SOURCES.items() if source.from_files)
DATASET_NAME = rf"(folder|tar|{'|'.join(OWN_SOURCES)})?|(torch|hfds|hfids|tfds)/.+|wds/.*"
ADVICE = {  # by kind, if a source cannot be opened
    **{name: source.advice for name, source in OWN_SOURCES.items()},
    "torch": "check the name, and download the files first, because runs never do",
    "hfds": "check the name and the network",
    "hfids": "check the name and the network, and give --num_samples if the length is unknown",
    "tfds": "check the name, and prepare the files first, because runs never do",
    "wds": "name the shards, as in wds/train-{0000..0099}.tar, and give --num_samples",
}


def build_dataset(
    name: str,
    data_path: str | Path | None,
    *,
    split: Literal["train", "validation"],
    transform: Transform,
    seed: int,
    num_samples: int | None = None,
    batch_size: int = 1,
    search_split: bool = True,
    class_folder: ClassFolder = "auto",
    pixels: PixelFormat = RGB8,
) -> IndexedImages | StreamedImages | None:
    """Open a dataset by name.

    Args:
        name: `folder`, `tar`, `packed`, `digits`, `inat2019`, one of timm's names, or "" to infer
            it from `data_path`. `torch/places365` is read in its small version if that exists.
            `wds/` without a pattern takes the training shards of `_info.json` in `data_path`.
        data_path: folder or .tar file, or the cache of Hugging Face datasets.
        split: which of the images, see `open_files`.
        num_samples: images per epoch of a stream of unknown length.
        batch_size: micro-batch size, a hint for timm's streams.
        search_split, class_folder, pixels: see `open_files`.

    Returns:
        None only for "validation", if the source has no such split. Streams count as having none,
        because they cannot be read in order, each image once.

    Raises:
        InputError: the source cannot be opened; the message says what to change.
    """
    if not re.fullmatch(DATASET_NAME, name, re.IGNORECASE):
        raise InputError(
            f"unknown --dataset {name}: use folder, tar, {', '.join(OWN_SOURCES)}, "
            "torch/<name>, hfds/<name>, hfids/<name>, tfds/<name> or wds/<pattern>.tar"
        )
    kind, _, rest = name.partition("/")
    kind = kind.lower() or kind_of(data_path)
    kind = "folder" if kind == "tar" else kind
    if num_samples is not None and kind not in STREAMS:
        raise InputError(
            f"--num_samples is for streams, not for --dataset {name or kind}: leave it out"
        )
    is_image_folder = name.lower() in IMAGE_FOLDERS
    if class_folder != "auto" and not (kind == "folder" or is_image_folder):
        raise InputError(
            f"--class_folder is for folders and .tar files, not for --dataset {name or kind}: "
            "leave it out"
        )
    root = _checked_path(data_path, required=kind in FROM_FILES)
    if kind in STREAMS:
        if split == "validation":
            logger.info("%s is a stream without validation images: add some with --val_path", name)
            return None
        options = {"num_samples": num_samples, "batch_size": batch_size, "is_training": True}
        # tfds returns arrays by default, timm's other streams return images as stored.
        options["input_img_mode"] = "RGB" if kind == "tfds" else ""
        source = _open(name, root, rest if ".tar" in rest else split, seed=seed, **options)
        return StreamedImages(source, transform, seed=seed, name=name)
    if kind == "folder" or is_image_folder:
        options = {"search_split": search_split, "class_folder": class_folder, "pixels": pixels}
        if is_image_folder:
            first = "first" if class_folder == "auto" else class_folder
            options |= {"order": "torchvision", "class_folder": first}
        source = open_files(root, split, **options)
        return None if source is None else IndexedImages(source, transform, seed=seed)
    if kind == "packed" and search_split:
        root = split_folder(root, split)
        if root is None:
            return None
    splits = VAL_SPLITS if (kind, split) == ("hfds", "validation") else (split,)
    options = _places365_options(root, split) if name.lower() == "torch/places365" else {}
    for found in splits:
        source = _open(name or kind, root, found, **options)
        if source is not None:
            if isinstance(source, PackedImages):
                source.check_format(pixels)
            place = f"{name or kind} ({found}{f', {root}' if root else ''})"
            return IndexedImages(source, transform, seed=seed, place=place)
    return None


@waiting("listing the images")
def open_val(
    data: DataSettings,
    transform: Transform,
    *,
    seed: int,
    task: TaskName = "classification",
    classes: Sequence[str] | None = None,
) -> IndexedImages | None:
    """Open only the validation images; training images may be missing.

    Args:
        data: its `val_path` (a folder, packed or not, or a .tar file) is taken as given; without
            one, the dataset's own validation images are opened.
        task: what the labels are for.
        classes: of a checkpoint, for the labels of a table; None for the table's own.

    Returns:
        None if the source has no validation images.

    Raises:
        InputError: see `build_dataset` and `TableSource.open`.
    """
    hold_out = HoldOut.of(data, by_default=False)
    if hold_out is not None and not data.data_csv:
        return open_train_val(data, transform, transform, seed=seed, task=task)[1]
    table = _tables(data, hold_out)[1]
    return _open_val(data, transform, table, seed=seed, task=task, classes=classes)


def _open_val(
    data: DataSettings,
    transform: Transform,
    table: TableSource | None,
    *,
    seed: int,
    task: TaskName,
    classes: Sequence[str] | None,
) -> IndexedImages | None:
    """Open the validation images.

    Args:
        table: that has them, if one has.
        classes: of the training images or a checkpoint, for a table's labels; None for its own.
    """
    if table is not None:
        images = table.open("validation", task=task, classes=classes, pixels=data.pixels)
        return None if images is None else IndexedImages(images, transform, seed=seed)
    options = {"split": "validation", "transform": transform, "seed": seed}
    options |= {"class_folder": data.class_folder, "pixels": data.pixels}
    if data.val_path:
        # Classes in the order of the training images'.
        name = data.name if data.name.lower() in IMAGE_FOLDERS else ""
        images = build_dataset(name, data.val_path, search_split=False, **options)
    else:
        images = build_dataset(data.name, data.data_path, **options)
    if images is not None:
        _check_task(task, "--val_csv" if data.data_csv else "--data_csv")
    return images


def _tables(
    data: DataSettings, hold_out: HoldOut | None
) -> tuple[TableSource | None, TableSource | None]:
    """The tables that have the training and the validation images, perhaps the same one."""
    table = None
    has_other = bool(data.val_csv or data.val_path)
    if data.data_csv:
        folder = data.data_path and Path(data.data_path)
        splits = ("train",) if has_other else ("train", "validation")
        options = {"splits": splits, "hold_out": None if has_other else hold_out}
        table = TableSource(Path(data.data_csv), folder, "--data_path", **options)
    if data.val_csv is None:
        return table, None if has_other else table
    folder = data.val_path
    if folder is None and data.data_csv:
        folder = data.data_path or Path(data.data_csv).parent
    folder = folder and Path(folder)
    return table, TableSource(Path(data.val_csv), folder, "--val_path", alone=True)


def _check_task(task: TaskName, flag: str) -> None:
    if task != "classification":
        raise InputError(f"--task {task} takes labels from a table: give it by {flag}")


@waiting("listing the images")
def open_train_val(
    data: DataSettings,
    train_transform: Transform | None = None,
    val_transform: Transform | None = None,
    *,
    seed: int,
    batch_size: int = 1,
    task: TaskName = "classification",
    holds_out: bool = False,
) -> tuple[IndexedImages | StreamedImages, IndexedImages | None]:
    """Open the training images, and the validation images if there are any.

    Args:
        train_transform, val_transform: None to set them before an image is read, when the images
            are known.
        batch_size: micro-batch size, a hint for timm's streams.
        task: what the labels are for.
        holds_out: whether some images are held out where there are no validation images.

    Raises:
        InputError: see `build_dataset`, `TableSource.open` and `check_apart`; or `data` names only
            validation images, or `val_fraction` cannot be applied.
    """
    val_flag = "--val_csv" if data.val_csv else "--val_path" if data.val_path else None
    if val_flag and not (data.data_path or data.dataset or data.data_csv):
        raise InputError(
            f"{val_flag} gives only the validation images: give the training images with "
            "--data_path, --dataset or --data_csv"
        )
    hold_out = HoldOut.of(data, by_default=holds_out)
    table, val_table = _tables(data, hold_out)
    if table is not None:
        train_set = IndexedImages(
            table.open("train", task=task, pixels=data.pixels), train_transform, seed=seed
        )
    else:
        _check_task(task, "--data_csv")
        train_set = build_dataset(
            data.name,
            data.data_path,
            split="train",
            transform=train_transform,
            seed=seed,
            num_samples=data.num_samples,
            batch_size=batch_size,
            class_folder=data.class_folder,
            pixels=data.pixels,
        )
    options = {"seed": seed, "task": task, "classes": train_set.classes}
    val_set = _open_val(data, val_transform, val_table, **options)
    if table is not None and val_table is not None and val_set is not None:
        check_apart(train_set.reader, val_set.reader)
    if hold_out is not None and table is None:
        return _split(hold_out, train_set, val_set, val_transform, name=data.name)
    return train_set, val_set


def _split(
    hold_out: HoldOut,
    train_set: IndexedImages | StreamedImages,
    val_set: IndexedImages | None,
    val_transform: Transform,
    *,
    name: str,
) -> tuple[IndexedImages | StreamedImages, IndexedImages | None]:
    """Hold out training images for validation, unless there are validation images already.

    Args:
        name: of the dataset, for messages.

    Raises:
        InputError: --val_fraction was given, but it cannot be applied.
    """
    fault = None
    if not isinstance(train_set, IndexedImages):
        fault = f"{name} is a stream: give validation images by --val_path instead"
    elif val_set is not None:
        fault = f"there are validation images already, {val_set.place}: leave it out"
    if fault and hold_out.fraction is not None:
        raise InputError(f"--val_fraction cannot hold out images, because {fault}")
    if fault:
        return train_set, val_set
    chosen = hold_out.choose(train_set.own_names())
    hold_out.check(chosen, counted(len(train_set), "image"), train_set.place)
    note = hold_out.describe(sum(chosen))
    if any(chosen):
        train_set, val_set = train_set.split(np.asarray(chosen))
        val_set.transform = val_transform
    train_set.notes = [*train_set.notes, note]
    return train_set, val_set


def _places365_options(root: str, split: str) -> dict[str, bool]:
    """Select timm's version of Places365: the small one if its folder exists."""
    small = any(Path(root, name).is_dir() for name in ("data_256_standard", "val_256"))
    size = "256" if small else "large"
    folder = f"data_{size}_standard" if split == "train" else f"val_{size}"
    if not Path(root, folder).is_dir():  # torchvision would read the lists and find no images
        raise InputError(
            f"{folder} not found in {root}: extract Places365 there, with the training images in "
            "data_256_standard or data_large_standard, and the validation images in val_256 or "
            "val_large"
        )
    logger.info("Places365: reading the %s images in %s", "small" if small else "large", folder)
    return {"small": small}


def _checked_path(data_path: str | Path | None, *, required: bool) -> str | None:
    if data_path is None:
        if required:
            raise InputError("this --dataset is read from files: give their path with --data_path")
        return None
    if re.match(r"\w+://|pipe:", str(data_path)):  # webdataset reads from the network too
        return str(data_path)
    path = Path(data_path).expanduser()
    if required and not path.exists():
        raise InputError(f"{path} does not exist: correct the path")
    return str(path)


def _open(name: str, root: str | None, split: str, **options: object) -> Dataset | None:
    """Open a source; None if a Hugging Face dataset lacks this validation split."""
    kind, _, rest = name.partition("/")
    kind = kind.lower()
    try:
        if kind in OWN_SOURCES:
            return OWN_SOURCES[kind].open(root, split)
        if kind == "wds":
            import_module("webdataset")  # timm would continue without it
        if kind == "hfds":
            return HubImages(rest, root, split)
        source = timm.data.create_dataset(name, root, split, search_split=False, **options)
        if kind == "hfids":
            adapt_stream_reader(rest, source.reader)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"--dataset {name} needs the package {error.name}: install it") from error
    except Exception as error:
        if "Unknown split" in str(error) and split in VAL_SPLITS:
            return None
        location = f" at {root}" if root else ""
        raise InputError(
            f"cannot open --dataset {name or kind}{location}: {ADVICE[kind]} ({reason_of(error)})"
        ) from error
    return source
