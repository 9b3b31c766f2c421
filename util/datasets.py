"""From `--dataset` and `--data_path` to a data set that `util.loaders` reads.

Sources carry timm's names (`timm.data.create_dataset`) and come in two kinds. Indexed sources
(folders, .tar files, `torch/...`, `hfds/...`, `digits`) know each image by its index, so that a run
resumes at any step. Streams (`wds/...`, `hfids/...`, `tfds/...`) are read from front to back, so
that a run resumes at the start of an epoch.
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

from util.broken_images import reason_of
from util.errors import InputError
from util.images import IMAGE_SUFFIXES, Digits, IndexedImages, Transform
from util.streams import StreamedImages, adapt_hub_reader

logger = logging.getLogger(__name__)

TRAIN_FOLDERS = ("train", "training")
HELD_OUT_FOLDERS = ("validation", "val", "valid", "eval", "evaluation")
HELD_OUT_SPLITS = (*HELD_OUT_FOLDERS, "test")

STREAMS = ("hfids", "tfds", "wds")
DATASET_NAME = r"(folder|tar|digits)?|(torch|hfds|hfids|tfds)/.+|wds/.*"
ADVICE = {  # for a source of this kind that cannot be opened
    "folder": "give a folder or a .tar file that has images in it",
    "digits": "install the requirements",
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
        name: "", `folder` or `tar` for what `data_path` is, `digits`, or one of timm's names.
            Without a pattern, `wds/` takes the training shards of `_info.json` in `data_path`.
        data_path: folder, .tar file, or for Hugging Face's data sets their cache.
        split: in a folder, "train" is `train/` if there is one, else the folder itself. A folder
            with `val/` but no `train/` is refused: training would read the held-out images.
        transform: RGB image to float32 (3, H, W).
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
            f"--dataset {name} is unknown: use folder, tar, digits, torch/<name>, hfds/<name>, "
            "hfids/<name>, tfds/<name> or wds/<pattern>.tar"
        )
    kind, _, rest = name.partition("/")
    kind = {"": "folder", "tar": "folder"}.get(kind.lower(), kind.lower())
    if num_samples is not None and kind not in STREAMS:
        raise InputError(f"--dataset {name} knows its length: drop --num_samples")
    root = _checked_path(data_path, required=kind in ("folder", "torch", "wds"))
    if kind in STREAMS:
        if split == "validation":
            logger.info("%s is a stream, without a held-out split: name one by --val_path", name)
            return None
        options = {"num_samples": num_samples, "batch_size": batch_size, "is_training": True}
        # timm's other streams give images as they are stored; unasked, tfds gives arrays.
        options["input_img_mode"] = "RGB" if kind == "tfds" else ""
        source = _open(name, root, rest if ".tar" in rest else split, seed=seed, **options)
        return StreamedImages(source, transform, seed=seed, name=name)
    if search_split and (kind == "folder" or rest.lower() in ("folder", "image_folder")):
        root = _folder_of_split(root, split)
        if root is None:
            return None
    splits = HELD_OUT_SPLITS if (kind, split) == ("hfds", "validation") else (split,)
    sources = (_open(name, root, split) for split in splits)
    source = next((source for source in sources if source is not None), None)
    return None if source is None else IndexedImages(source, transform, seed=seed)


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


def _folder_of_split(root: str, split: str) -> str | None:
    """The sub-folder of a split; timm's own search would validate on the training images."""

    def existing(names: tuple[str, ...]) -> str | None:
        return next((str(Path(root, name)) for name in names if Path(root, name).is_dir()), None)

    train, held_out = existing(TRAIN_FOLDERS), existing(HELD_OUT_FOLDERS)
    if split == "validation":
        return held_out
    if held_out and not train:
        raise InputError(
            f"{root} has held-out images but no train/: move the training images there, "
            f"or give their folder by --data_path and {held_out} by --val_path"
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
        elif Path(root).suffix == ".tar":
            # Processes forked from this one would share the position in a file that is kept open.
            options["cache_tarfiles"] = False
    try:
        if kind == "digits":
            return Digits(split)
        if kind == "wds":
            import_module("webdataset")  # timm goes on without it
        source = timm.data.create_dataset(name, root, split, search_split=False, **options)
    except ImportError as error:
        raise InputError(f"--dataset {name} needs the package {error.name}: install it") from error
    except Exception as error:
        if "Unknown split" in str(error) and split in HELD_OUT_SPLITS:
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
