"""Opens the dataset that `--dataset` and `--data_path` name, for `util.data.loaders` to read.

Sources have timm's names (`timm.data.create_dataset`) and are of two kinds. Indexed sources
(folders, .tar files, `packed`, `torch/...`, `hfds/...`, `inat2019`, `digits`) are read by index,
so a run resumes at any step. Streams (`wds/...`, `hfids/...`, `tfds/...`) are read sequentially,
so a run resumes at the start of an epoch.
"""

import logging
import os
import re
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Literal

import timm.data
from torch.utils.data import Dataset

from util.data.broken_images import reason_of
from util.data.classes import check_classes
from util.data.images import IMAGE_SUFFIXES, IndexedImages, Transform
from util.data.packed import kind_of
from util.data.settings import DataSettings
from util.data.sources import OWN_SOURCES, TarImages
from util.data.streams import StreamedImages, adapt_hub_reader
from util.errors import InputError, counted

logger = logging.getLogger(__name__)

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("validation", "val", "valid", "eval", "evaluation")
VAL_SPLITS = (*VAL_FOLDERS, "test")

STREAMS = ("hfids", "tfds", "wds")
FROM_FILES = ("folder", "torch", "wds")
FROM_FILES += tuple(name for name, source in OWN_SOURCES.items() if source.from_files)
DATASET_NAME = rf"(folder|tar|{'|'.join(OWN_SOURCES)})?|(torch|hfds|hfids|tfds)/.+|wds/.*"
ADVICE = {  # by kind, if a source cannot be opened
    "folder": "give a folder or a .tar file that contains images",
    **{name: source.advice for name, source in OWN_SOURCES.items()},
    "torch": "check the name, and download the files first, because runs never do",
    "hfds": "check the name and the network, and name the image column 'image'",
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
) -> IndexedImages | StreamedImages | None:
    """Open a dataset by name.

    Args:
        name: `folder`, `tar`, `packed`, `digits`, `inat2019`, one of timm's names, or "" to infer
            it from `data_path`. `torch/places365` is read in its small version if that exists.
            `wds/` without a pattern takes the training shards of `_info.json` in `data_path`.
        data_path: folder or .tar file, or the cache of Hugging Face datasets.
        split: in a folder, "train" is `train/` or `train.tar` if there is one, else the folder
            itself. A folder with only `val/` or `val.tar` is refused: training would read the
            validation images.
        num_samples: images per epoch of a stream of unknown length.
        batch_size: micro-batch size, a hint for timm's streams.
        search_split: False takes a folder exactly as given, and a .tar file for either split.

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
    in_folders = kind in ("folder", "packed") or rest.lower() in ("folder", "image_folder")
    if search_split and in_folders:
        root = _split_path(root, split, tars=kind == "folder")
        if root is None:
            return None
    splits = VAL_SPLITS if (kind, split) == ("hfds", "validation") else (split,)
    options = _places365_options(root, split) if name.lower() == "torch/places365" else {}
    sources = (_open(name or kind, root, split, **options) for split in splits)
    source = next((source for source in sources if source is not None), None)
    return None if source is None else IndexedImages(source, transform, seed=seed)


def open_val(data: DataSettings, transform: Transform, *, seed: int) -> IndexedImages | None:
    """Open only the validation images; training images may be missing.

    Args:
        data: its `val_path` (a folder, packed or not, or a .tar file) is taken as given; without
            one, the dataset's own validation images are opened.

    Returns:
        None if the source has no validation images.

    Raises:
        InputError: see `build_dataset`.
    """
    options = {"split": "validation", "transform": transform, "seed": seed}
    if data.val_path:
        return build_dataset("", data.val_path, search_split=False, **options)
    return build_dataset(data.name, data.data_path, **options)


def open_train_val(
    data: DataSettings,
    train_transform: Transform,
    val_transform: Transform,
    *,
    seed: int,
    batch_size: int = 1,
) -> tuple[IndexedImages | StreamedImages, IndexedImages | None]:
    """Open the training images, and the validation images if there are any.

    Args:
        batch_size: micro-batch size, a hint for timm's streams.

    Raises:
        InputError: see `build_dataset`; or `data` names only validation images.
    """
    if data.val_path and not (data.data_path or data.dataset):
        raise InputError(
            "--val_path gives only the validation images: give the training images with "
            "--data_path or --dataset"
        )
    train_set = build_dataset(
        data.name,
        data.data_path,
        split="train",
        transform=train_transform,
        seed=seed,
        num_samples=data.num_samples,
        batch_size=batch_size,
    )
    return train_set, open_val(data, val_transform, seed=seed)


def open_labeled(
    data: DataSettings,
    train_transform: Transform,
    val_transform: Transform,
    *,
    seed: int,
    batch_size: int = 1,
    num_classes: int | None = None,
) -> tuple[IndexedImages | StreamedImages, IndexedImages | None, int]:
    """Open both sets with `open_train_val` to train on labels; also return the class count.

    Args:
        num_classes: None to infer it, see `check_classes`.

    Raises:
        InputError: see `build_dataset` and `check_classes`.
    """
    train_set, val_set = open_train_val(
        data, train_transform, val_transform, seed=seed, batch_size=batch_size
    )
    return train_set, val_set, check_classes(train_set, val_set, num_classes)


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


def _split_path(root: str, split: str, *, tars: bool) -> str | None:
    """Subfolder or .tar file of a split; timm's own search would validate on training images.

    Args:
        root: parent folder of the splits, or folder of training images only.
        tars: whether a .tar file named after the split counts if there is no subfolder.
    """

    def existing(names: tuple[str, ...]) -> str | None:
        paths = [Path(root, name) for name in names]
        found = [path for path in paths if path.is_dir()]
        if tars:
            found += [tar for tar in (Path(f"{path}.tar") for path in paths) if tar.is_file()]
        return str(found[0]) if found else None

    train, val = existing(TRAIN_FOLDERS), existing(VAL_FOLDERS)
    if split == "validation":
        return val
    if val and not train:
        raise InputError(
            f"{root} has validation images but no train folder: move the training images into "
            f"{root}/train, or give their folder as --data_path, and {val} as --val_path"
        )
    return train or root


def _open(name: str, root: str | None, split: str, **options: object) -> Dataset | None:
    """Open a source through timm; None if a Hugging Face dataset lacks this validation split."""
    kind = name.partition("/")[0].lower()
    if kind in ("", "folder", "tar"):
        name, kind = "", "folder"
        timm.data.add_img_extensions(IMAGE_SUFFIXES)
        if Path(root).is_dir():
            _report_ignored_files(root)
    try:
        if kind in OWN_SOURCES:
            return OWN_SOURCES[kind].open(root, split)
        if kind == "folder" and Path(root).is_file() and Path(root).suffix == ".tar":
            return TarImages(root)
        if kind == "wds":
            import_module("webdataset")  # timm would continue without it
        source = timm.data.create_dataset(name, root, split, search_split=False, **options)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"--dataset {name} needs the package {error.name}: install it") from error
    except Exception as error:
        if "Unknown split" in str(error) and split in VAL_SPLITS:
            return None
        # timm's own message about a .tar file without images is misleading.
        empty_tar = kind == "folder" and isinstance(error, ValueError)
        reason = "this one has none" if empty_tar else reason_of(error)
        location = f" at {root}" if root else ""
        raise InputError(
            f"cannot open --dataset {name or kind}{location}: {ADVICE[kind]} ({reason})"
        ) from error
    if kind in ("hfds", "hfids"):
        adapt_hub_reader(kind, source.reader)
    return source


def _report_ignored_files(folder: str) -> None:
    suffixes = Counter(
        Path(file).suffix.lower()
        for _, _, files in os.walk(folder, followlinks=True)
        for file in files
    )
    ignored = {suffix: n for suffix, n in suffixes.items() if suffix not in IMAGE_SUFFIXES}
    if ignored:
        files = counted(sum(ignored.values()), "file")
        listed = ", ".join(suffix or "no suffix" for suffix in ignored)
        logger.warning("%s: ignored %s whose suffix is not an image's: %s", folder, files, listed)
