"""Images that are known by their index."""

import copy
import hashlib
import io
import json
import logging
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset

from util.data.batch import Crops, Sample
from util.data.broken_images import reason_of, too_many_broken
from util.data.decode import Record, to_rgb
from util.errors import InputError

# By itself timm finds .png, .jpg and .jpeg only, and passes over the others without a word.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".jp2"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
MAX_BROKEN_IN_A_ROW = 100  # images in a row

logger = logging.getLogger(__name__)


class Digits(Dataset):
    """scikit-learn's 1,797 real digits, 8x8 resized to 32x32 RGB; every fifth is held out."""

    classes = tuple("0123456789")

    def __init__(self, split: Literal["train", "validation"]) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        chosen = (np.arange(len(labels)) % 5 == 0) == (split == "validation")
        grey = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8)  # scikit-learn's go to 16
        self.images = grey.reshape(-1, 8, 8)
        self.labels = labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[index])
        return to_rgb(image.resize((32, 32), Image.Resampling.BICUBIC)), self.labels[index]


class INat2019(Dataset):
    """iNaturalist 2019 as its authors ship it: images, and lists of them in JSON (COCO style).

    Classes are the categories in the order of their ids, called by name, or by id where an
    anonymised list has no names.

    Args:
        root: folder of `train2019.json`, `val2019.json` and the images.
        split: which of the lists is read.

    Raises:
        InputError: the list is missing or malformed, or an image has not exactly one annotation.
    """

    def __init__(self, root: str | Path, split: Literal["train", "validation"]) -> None:
        path = Path(root, {"train": "train2019.json", "validation": "val2019.json"}[split])
        try:
            content = json.loads(path.read_bytes())
            names = {category["id"]: category.get("name") for category in content["categories"]}
            files = {image["id"]: image["file_name"] for image in content["images"]}
            pairs = [(entry["image_id"], entry["category_id"]) for entry in content["annotations"]]
            ids = sorted(names)
            label_of_id = {category: label for label, category in enumerate(ids)}
            categories = dict(pairs)
            labels = {image: label_of_id[category] for image, category in categories.items()}
            samples = [(str(Path(root, file)), labels.get(image)) for image, file in files.items()]
        except FileNotFoundError as error:
            raise InputError(
                f"{path} does not exist: give the folder of train2019.json, val2019.json and "
                "train_val2019/ by --data_path"
            ) from error
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is no list of iNaturalist 2019: download it again ({reason_of(error)})"
            ) from error
        sizes = len(names), len(files)
        if not samples or sizes != (len(content["categories"]), len(content["images"])):
            raise InputError(f"{path} has no images, or an id twice: download it again")
        if len(categories) != len(pairs) or set(categories) != set(files):
            raise InputError(
                f"{path} needs exactly one annotation for each of its {len(files)} images, but has "
                f"{len(pairs)} for {len(categories)} images: download it again"
            )
        self.samples = samples  # (path, label)
        self.classes = tuple(str(names[i] if all(names.values()) else i) for i in ids)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return Path(path).open("rb"), label


def _has_tar_end(path: Path) -> bool:
    """Whether an archive ends as tar ends it, by two blocks of zeros."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1024))
        return not any(file.read())


class TarImages(ReaderImageInTar):
    """timm's reader of a .tar file, but it goes straight to where an image lies.

    timm's opens the archive for every image, or keeps it open, so that processes forked from this
    one share the position in it.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root, cache_tarfiles=False)
        archive = Path(root)
        if archive.is_file() and not _has_tar_end(archive):
            logger.warning(
                "%s lacks the zeros at its end: it may have been cut off between two images", root
            )

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        member, _, parent = self.samples[index]
        if parent is not None:  # an archive within the archive
            return super().__getitem__(index)
        with Path(self.root).open("rb") as file:
            file.seek(member.offset_data)
            data = file.read(member.size)
        if len(data) < member.size:
            raise OSError("the archive ends within the image")
        return io.BytesIO(data), self.targets[index]


def class_names(reader: object) -> tuple[str, ...] | None:
    """The names of a reader's classes in the order of its labels; None where it has no names.

    Images outside of class folders have the class "".
    """
    # `wnids` first: ImageNet's other names in torchvision are tuples of synonyms, some shared.
    for attribute in ("wnids", "class_to_idx", "class_name_to_idx", "classes", "all_categories"):
        names = getattr(reader, attribute, None)
        if names:
            return tuple(sorted(names, key=names.get) if isinstance(names, dict) else names)
    return None


def names_hash(names: Sequence[str] | None) -> str | None:
    """A short digest of names in their order; None for none."""
    if names is None:
        return None
    return hashlib.blake2b(
        "\n".join(names).encode(errors="surrogateescape"), digest_size=8
    ).hexdigest()


class Transform(Protocol):
    """How images are read, and what workers make of them.

    Attributes:
        num_crops: K, views of every image.
    """

    num_crops: int

    def read(self, record: Record) -> object:
        """Whatever `__call__` takes; raises anything where the record is broken."""

    def __call__(self, image: object, *place: int | str) -> Crops:
        """Views of an image; all randomness follows from the place, see `fold_seed`."""


class IndexedImages(Dataset):
    """Images known by their index: what `[epoch, index]` gives depends on the seed alone.

    Args:
        source: a data set of timm or torchvision, `Digits` or `INat2019`.
        transform: how images are read, and what is made of them.
        seed: the run's seed; the augmentation is a function of (seed, epoch, index).

    Attributes:
        labelled: False where no image has a label.
        classes: their names in the order of labels; None where the source has no names or labels.
        num_classes: their number, or None.
    """

    def __init__(self, source: Dataset, transform: Transform, *, seed: int) -> None:
        # Left alone, both libraries convert to RGB themselves, without regard to EXIF and 16 bit.
        self.reader = getattr(source, "reader", source)
        self.num_samples = len(self.reader)
        if hasattr(source, "loader"):
            source.loader = Image.open
        self.transform = transform
        self.seed = seed
        names = class_names(self.reader)
        # Without a column of labels, timm's reader has been pointed at the images instead.
        label_key, image_key = (getattr(self.reader, f"{k}_key", k) for k in ("label", "image"))
        self.labelled = names != ("",) and label_key != image_key
        self.classes = names if self.labelled else None
        self.num_classes = len(self.classes) if self.classes else None

    def __len__(self) -> int:
        return self.num_samples

    def with_transform(self, transform: Transform) -> "IndexedImages":
        """The same images, otherwise prepared."""
        images = copy.copy(self)
        images.transform = transform
        return images

    def name(self, index: int) -> str:
        """The image's file name, or its index where the source has no files."""
        if hasattr(self.reader, "filename"):
            name = self.reader.filename(index, absolute=True)
        else:
            samples = getattr(self.reader, "samples", None) or getattr(self.reader, "imgs", None)
            name = samples[index][0] if samples else None
        return str(name or f"image {index}")

    def identity(self) -> dict[str, object]:
        """What tells these images from others: their number and a hash of their names.

        The hash is of file names without folders, of up to 1,000 images spread over the data set:
        it stays when the files move, and tells other images of the same number from these.
        """
        count = min(len(self), 1000)
        names = [Path(self.name(i * len(self) // count)).name for i in range(count)]
        return {"number of training images": len(self), "hash of their names": names_hash(names)}

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """The image at (epoch, index), or the next readable one in its place.

        Raises:
            InputError: `MAX_BROKEN_IN_A_ROW` images, or all there are, cannot be read.
        """
        epoch, index = key
        broken = []
        for offset in range(min(len(self), MAX_BROKEN_IN_A_ROW)):
            candidate = (index + offset) % len(self)
            try:
                record, label = self.reader[candidate]
                image = self.transform.read(record)
            except Exception as error:  # decoders raise anything on broken files
                broken.append((self.name(candidate), reason_of(error)))
                continue
            crops = self.transform(image, "augment", self.seed, epoch, index)
            return Sample(crops, label_of(label) if self.labelled else -1, broken)
        raise too_many_broken(broken)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample | InputError]:
        """A micro-batch; torch's loader asks for it by this name.

        An error is handed over as a value: raised in a worker, its sentence would drown in a
        traceback.
        """
        try:
            return [self[key] for key in keys]
        except InputError as error:
            return [error]


def label_of(label: object) -> int:
    """A reader's label, or -1 where it gives none."""
    return int(label) if isinstance(label, numbers.Integral) else -1
