"""From `--dataset` and `--data_path` to a data set that `util.data.loaders` reads.

Sources carry timm's names (`timm.data.create_dataset`) and come in two kinds. Indexed sources
(folders, .tar files, `packed`, `torch/...`, `hfds/...`, `inat2019`, `digits`) know each image by
its index, so that a run resumes at any step. Streams (`wds/...`, `hfids/...`, `tfds/...`) are read
from front to back, so that a run resumes at the start of an epoch.
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
from util.errors import InputError

logger = logging.getLogger(__name__)

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("validation", "val", "valid", "eval", "evaluation")
VAL_SPLITS = (*VAL_FOLDERS, "test")

STREAMS = ("hfids", "tfds", "wds")
FROM_FILES = ("folder", "torch", "wds")
FROM_FILES += tuple(name for name, source in OWN_SOURCES.items() if source.from_files)
DATASET_NAME = rf"(folder|tar|{'|'.join(OWN_SOURCES)})?|(torch|hfds|hfids|tfds)/.+|wds/.*"
ADVICE = {  # for a source of this kind that cannot be opened
    "folder": "give a folder or a .tar file that has images in it",
    **{name: source.advice for name, source in OWN_SOURCES.items()},
    "torch": "check the name, and download the files first, which a run never does by itself",
    "hfds": "check the name and the network, and call the column of the images 'image'",
    "hfids": "check the name and the network, and give --num_samples if its length is unknown",
    "tfds": "check the name, and prepare the files first, which a run never does by itself",
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
    """Open a data set by its name.

    Args:
        name: "" for what `data_path` is, `folder`, `tar`, `packed`, `digits`, `inat2019`, or one
            of timm's names; of `torch/places365` the small version is read where it is. Without a
            pattern, `wds/` takes the training shards of `_info.json` in `data_path`.
        data_path: folder, .tar file, or for Hugging Face's data sets their cache.
        split: in a folder, "train" is `train/` or `train.tar` if there is one, else the folder
            itself. A folder with `val/` or `val.tar` alone is refused: training would read the
            held-out images.
        transform: how images are read, and what is made of them.
        seed: the run's seed.
        num_samples: images in an epoch of a stream that does not know it.
        batch_size: of a micro-batch, a hint for timm's streams.
        search_split: False takes a folder exactly as given, and a .tar file for either split.

    Returns:
        None only for "validation", when the source has no held-out split. Streams count as having
        none, because they cannot be read once each and in order.

    Raises:
        InputError: the source cannot be opened; the sentence says what to change.
    """
    if not re.fullmatch(DATASET_NAME, name, re.IGNORECASE):
        raise InputError(
            f"--dataset {name} is unknown: use folder, tar, {', '.join(OWN_SOURCES)}, "
            "torch/<name>, hfds/<name>, hfids/<name>, tfds/<name> or wds/<pattern>.tar"
        )
    kind, _, rest = name.partition("/")
    kind = kind.lower() or kind_of(data_path)
    kind = "folder" if kind == "tar" else kind
    if num_samples is not None and kind not in STREAMS:
        raise InputError(f"--dataset {name} knows its length: drop --num_samples")
    root = _checked_path(data_path, required=kind in FROM_FILES)
    if kind in STREAMS:
        if split == "validation":
            logger.info("%s is a stream, without a held-out split: name one by --val_path", name)
            return None
        options = {"num_samples": num_samples, "batch_size": batch_size, "is_training": True}
        # timm's other streams give images as they are stored; unasked, tfds gives arrays.
        options["input_img_mode"] = "RGB" if kind == "tfds" else ""
        source = _open(name, root, rest if ".tar" in rest else split, seed=seed, **options)
        return StreamedImages(source, transform, seed=seed, name=name)
    in_folders = kind in ("folder", "packed") or rest.lower() in ("folder", "image_folder")
    if search_split and in_folders:
        root = _place_of_split(root, split, tars=kind == "folder")
        if root is None:
            return None
    splits = VAL_SPLITS if (kind, split) == ("hfds", "validation") else (split,)
    options = _places365_options(root, split) if name.lower() == "torch/places365" else {}
    sources = (_open(name or kind, root, split, **options) for split in splits)
    source = next((source for source in sources if source is not None), None)
    return None if source is None else IndexedImages(source, transform, seed=seed)


def open_val(data: DataSettings, transform: Transform, *, seed: int) -> IndexedImages | None:
    """Open the validation images alone; no training images need be there.

    Args:
        data: whose `val_path`, a folder, packed or not, or .tar file, is taken as given; without
            one, the data set's own validation images are opened.
        transform: how images are read, and what is made of them.
        seed: the run's seed.

    Returns:
        None where the source has no validation images.

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
    """Open the images to train on and the validation images.

    Args:
        data: which images.
        train_transform, val_transform: how they are read, and what is made of them.
        seed: the run's seed.
        batch_size: of a micro-batch, a hint for timm's streams.

    Returns:
        Both sets; None for the second where there are no validation images.

    Raises:
        InputError: see `build_dataset`; or there are validation images only.
    """
    if data.val_path and not (data.data_path or data.dataset):
        raise InputError(
            "--val_path names validation images only: name those to train on by --data_path or "
            "--dataset"
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


def open_labelled(
    data: DataSettings,
    train_transform: Transform,
    val_transform: Transform,
    *,
    seed: int,
    batch_size: int = 1,
    num_classes: int | None = None,
) -> tuple[IndexedImages | StreamedImages, IndexedImages | None, int]:
    """`open_train_val` for training on labels, and the number of classes.

    Args:
        num_classes: as given by the user; None to find it, see `check_classes`.

    Raises:
        InputError: see `build_dataset` and `check_classes`.
    """
    train_set, val_set = open_train_val(
        data, train_transform, val_transform, seed=seed, batch_size=batch_size
    )
    return train_set, val_set, check_classes(train_set, val_set, num_classes)


def _places365_options(root: str, split: str) -> dict[str, bool]:
    """Which version of Places365 timm should open: the small one if there is a folder of it."""
    small = any(Path(root, name).is_dir() for name in ("data_256_standard", "val_256"))
    size = "256" if small else "large"
    folder = f"data_{size}_standard" if split == "train" else f"val_{size}"
    if not Path(root, folder).is_dir():  # torchvision would read the lists and find no image
        raise InputError(
            f"{root} has no folder {folder}: extract the images of Places365 there, and call "
            "those for training data_256_standard or data_large_standard"
        )
    logger.info("Places365: reading the %s images in %s", "small" if small else "large", folder)
    return {"small": small}


def _checked_path(data_path: str | Path | None, *, required: bool) -> str | None:
    if data_path is None:
        if required:
            raise InputError("this --dataset is read from files: name their place by --data_path")
        return None
    if re.match(r"\w+://|pipe:", str(data_path)):  # webdataset reads from the network too
        return str(data_path)
    path = Path(data_path).expanduser()
    if required and not path.exists():
        raise InputError(f"{path} does not exist: correct --data_path or --val_path")
    return str(path)


def _place_of_split(root: str, split: str, *, tars: bool) -> str | None:
    """The sub-folder, or the tar, of a split; timm's own search would validate on training images.

    Args:
        root: of the splits, or of the training images alone.
        split: "train" or "validation".
        tars: whether a .tar file of a split's name counts where there is no sub-folder.
    """

    def existing(names: tuple[str, ...]) -> str | None:
        places = [Path(root, name) for name in names]
        found = [place for place in places if place.is_dir()]
        if tars:
            found += [tar for tar in (Path(f"{p}.tar") for p in places) if tar.is_file()]
        return str(found[0]) if found else None

    train, val = existing(TRAIN_FOLDERS), existing(VAL_FOLDERS)
    if split == "validation":
        return val
    if val and not train:
        raise InputError(
            f"{root} has held-out images but no train/: move the training images there, "
            f"or give their folder by --data_path and {val} by --val_path"
        )
    return train or root


def _open(name: str, root: str | None, split: str, **options: object) -> Dataset | None:
    """timm's data set; None when Hugging Face's does not have this held-out split."""
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
            import_module("webdataset")  # timm goes on without it
        source = timm.data.create_dataset(name, root, split, search_split=False, **options)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"--dataset {name} needs the package {error.name}: install it") from error
    except Exception as error:
        if "Unknown split" in str(error) and split in VAL_SPLITS:
            return None
        # What timm raises about a .tar file without images says something else.
        empty_tar = kind == "folder" and isinstance(error, ValueError)
        reason = "this one has none" if empty_tar else reason_of(error)
        place = f" at {root}" if root else ""
        raise InputError(
            f"--dataset {name or kind} cannot be opened{place}: {ADVICE[kind]} ({reason})"
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
        logger.warning(
            "%s: ignored %d files that are not images by their suffix: %s",
            *(folder, sum(ignored.values()), ", ".join(suffix or "none" for suffix in ignored)),
        )
