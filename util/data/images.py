"""Images read by index: replaced if broken, and augmented reproducibly."""

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

# By default timm finds only .png, .jpg and .jpeg, and silently skips the others.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".jp2"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
MAX_BROKEN_IN_A_ROW = 100


def class_names(reader: object) -> tuple[str, ...] | None:
    """Return a reader's class names in the order of its labels; None if it has no names.

    Images outside class folders have the class "".
    """
    # `wnids` first: ImageNet's other names in torchvision are tuples of synonyms, some shared.
    for attribute in ("wnids", "class_to_idx", "class_name_to_idx", "classes", "all_categories"):
        names = getattr(reader, attribute, None)
        if names:
            return tuple(sorted(names, key=names.get) if isinstance(names, dict) else names)
    return None


def names_hash(names: Sequence[str] | None) -> str | None:
    """Return a short digest of the names and their order."""
    if names is None:
        return None
    return hashlib.blake2b(
        "\n".join(names).encode(errors="surrogateescape"), digest_size=8
    ).hexdigest()


class Transform(Protocol):
    """Reads images and turns them into crops, in workers.

    Attributes:
        num_crops: K, crops per image.
    """

    num_crops: int

    def read(self, record: Record) -> object:
        """Return what `__call__` takes; any exception means that the record is broken."""

    def __call__(self, image: object, *seed_parts: int | str) -> Crops:
        """Return crops of an image; all randomness comes from the seed, see `fold_seed`."""


class IndexedImages(Dataset):
    """Images read by `[epoch, index]`; the result depends only on these two and the seed.

    Args:
        source: a dataset of timm, torchvision or `util.data.sources`.

    Attributes:
        labeled: False if no image has a label.
        classes: names in the order of labels; None if the source has no names or labels.
    """

    def __init__(self, source: Dataset, transform: Transform, *, seed: int) -> None:
        # By default both libraries convert to RGB themselves and ignore EXIF and 16-bit depth.
        self.reader = getattr(source, "reader", source)
        self.num_samples = len(self.reader)
        if hasattr(source, "loader"):
            source.loader = Image.open
        self.transform = transform
        self.seed = seed
        names = class_names(self.reader)
        # Without a label column, `adapt_hub_reader` has put the image column in its place.
        label_key, image_key = (getattr(self.reader, f"{k}_key", k) for k in ("label", "image"))
        self.labeled = names != ("",) and label_key != image_key
        self.classes = names if self.labeled else None
        self.num_classes = len(self.classes) if self.classes else None

    def __len__(self) -> int:
        return self.num_samples

    @property
    def num_crops(self) -> int:
        """Crops per image."""
        return self.transform.num_crops

    def with_transform(self, transform: Transform) -> "IndexedImages":
        """Return the same images with another transform."""
        images = copy.copy(self)
        images.transform = transform
        return images

    def name(self, index: int) -> str:
        """Return the image's file name, or its index if the source has no files."""
        if hasattr(self.reader, "filename"):
            name = self.reader.filename(index, absolute=True)
        else:
            samples = getattr(self.reader, "samples", None) or getattr(self.reader, "imgs", None)
            name = samples[index][0] if samples else None
        return str(name or f"image {index}")

    def identity(self) -> dict[str, object]:
        """Return what distinguishes these images from others: their number and a hash of names.

        The hash covers the file names, without folders, of up to 1,000 evenly spaced images: it
        stays the same when the folder moves.
        """
        count = min(len(self), 1000)
        names = [Path(self.name(i * len(self) // count)).name for i in range(count)]
        return {"number of training images": len(self), "hash of their names": names_hash(names)}

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the image at (epoch, index), or the next readable one if it is broken.

        Raises:
            InputError: `MAX_BROKEN_IN_A_ROW` images, or all of them, cannot be read.
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
            return Sample(crops, label_of(label) if self.labeled else -1, broken)
        raise too_many_broken(broken)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample | InputError]:
        """Return a micro-batch; PyTorch's DataLoader calls this method if it exists.

        An error is returned as a value: raised in a worker, it would drown in a traceback.
        """
        try:
            return [self[key] for key in keys]
        except InputError as error:
            return [error]


def label_of(label: object) -> int:
    """Return a reader's label, or -1 for none."""
    return int(label) if isinstance(label, numbers.Integral) else -1
