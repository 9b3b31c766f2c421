"""Images that are known by their index: read, replaced where broken, augmented by place."""

import copy
import hashlib
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch.utils.data import Dataset

from util.data.batch import Crops, Sample
from util.data.broken_images import reason_of, too_many_broken
from util.data.decode import Record
from util.errors import InputError

# By itself timm finds .png, .jpg and .jpeg only, and passes over the others without a word.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".jp2"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
MAX_BROKEN_IN_A_ROW = 100  # images in a row


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
        source: a data set of timm's, torchvision's or `util.data.sources`.
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
