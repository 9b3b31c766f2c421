"""Images read by index: replaced if broken, and augmented reproducibly."""

import copy
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from util.data.batch import Crops, Sample
from util.data.broken_images import reason_of, too_many_broken
from util.data.damage import BrokenImageError
from util.data.decode import Record
from util.data.labels import index_of
from util.data.layout import ImageList
from util.data.packed import PackedImages
from util.data.sampler import evenly_spaced
from util.data.table import TableImages
from util.errors import InputError
from util.settings.evaluation import TaskName

MAX_BROKEN_IN_A_ROW = 100
HASHED_BYTES = 2**16  # of a file
TRAINING_IMAGES, HELD_OUT = "number of training images", "number of images held out"  # keys


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
        """Return crops of an image; all randomness comes from the seed, see `fold_seed`.

        Raises:
            BrokenImageError: a window of it cannot be read.
        """


class IndexedImages(Dataset):
    """Images read by `[epoch, index]`; the result depends only on these two and the seed.

    Args:
        source: a dataset of timm, torchvision or `util.data.sources`.

    Attributes:
        place: where the images are from.
        listed: what was found in their folders; None if they are not from folders.
        task: what their labels are for.
        unlabeled: why images have no labels; None if they have.
        notes: sentences for the log about a table.
        classes: names in the order of labels; None if the source has no names or labels.
        ids: indices of the images in the source; None for all in order.
        num_held_out: images of the source that are held out for validation.
    """

    def __init__(
        self, source: Dataset, transform: Transform, *, seed: int, place: str = ""
    ) -> None:
        # By default both libraries convert to RGB themselves and ignore EXIF and 16-bit depth.
        self.reader = getattr(source, "reader", source)
        self.num_samples = len(self.reader)
        if hasattr(source, "loader"):
            source.loader = partial(open, mode="rb")
        self.transform = transform
        self.seed = seed
        self.listed: ImageList | None = getattr(self.reader, "listed", None)
        self.is_table = isinstance(self.reader, TableImages)
        if self.is_table:
            place = self.reader.place
        self.place = place or (self.listed.root if self.listed else type(self.reader).__name__)
        self.task: TaskName = self.reader.task if self.is_table else "classification"
        self.notes: list[str] = self.reader.notes if self.is_table else []
        self.unlabeled: str | None = getattr(self.reader, "unlabeled", None)
        self.classes = class_names(self.reader) if self.labeled else None
        self.num_classes = len(self.classes) if self.classes else None
        self.ids: np.ndarray | None = None
        self.num_held_out: int = self.reader.num_held_out if self.is_table else 0

    def __len__(self) -> int:
        return self.num_samples

    @property
    def labeled(self) -> bool:
        """Whether images have labels."""
        return self.unlabeled is None

    @property
    def num_crops(self) -> int:
        """Crops per image."""
        return self.transform.num_crops

    def with_transform(self, transform: Transform) -> "IndexedImages":
        """Return the same images with another transform."""
        images = copy.copy(self)
        images.transform = transform
        return images

    def split(self, is_held_out: np.ndarray) -> tuple["IndexedImages", "IndexedImages"]:
        """Return the training images and those that are held out.

        Args:
            is_held_out: bool (N,).
        """
        train_set = self._part((~is_held_out).nonzero()[0], bare=False)
        train_set.num_held_out = int(is_held_out.sum())
        return train_set, self._part(is_held_out.nonzero()[0], bare=True)

    def _part(self, ids: np.ndarray, *, bare: bool) -> "IndexedImages":
        """Return some of the images; `bare`: without what was found beside them."""
        images = copy.copy(self)
        images.ids = ids
        images.num_samples = len(ids)
        images.listed = self.listed and self.listed.part(ids, bare=bare)
        images.notes = [] if bare else list(self.notes)
        return images

    def own_names(self) -> list[str]:
        """Return names that do not depend on where the images are.

        These are paths below the images' folder, or indices if the source has no files.
        """
        if self.listed is not None:
            return self.listed.paths
        if isinstance(self.reader, PackedImages):
            return [self.reader.filename(index) for index in range(len(self))]
        samples = getattr(self.reader, "samples", None) or getattr(self.reader, "imgs", None)
        if samples:
            paths = [str(sample[0]) for sample in samples]
            root = os.path.commonpath(paths)
            return [os.path.relpath(path, root) for path in paths]
        return list(map(str, range(len(self))))

    def stored(self, index: int) -> tuple[Record, object]:
        """Return the image as stored, and its label."""
        return self.reader[self._id(index)]

    def _id(self, index: int) -> int:
        """Return the index in the source."""
        return index if self.ids is None else int(self.ids[index])

    def name(self, index: int) -> str:
        """Return the image's file name, or its index if the source has no files."""
        index = self._id(index)
        if hasattr(self.reader, "filename"):
            name = self.reader.filename(index, absolute=True)
        else:
            samples = getattr(self.reader, "samples", None) or getattr(self.reader, "imgs", None)
            name = samples[index][0] if samples else None
        return str(name or f"image {index}")

    def file_names(self) -> list[str]:
        """Return the names of all files; of a source without files, of at most 1,000 images."""
        if self.listed is not None:
            return self.listed.paths
        return [self.name(index) for index in evenly_spaced(len(self), 1000)]

    def class_sizes(self) -> Counter[int] | None:
        """Count the images of each label; None if labels are not known before, or are numbers."""
        found = (getattr(self.reader, name, None) for name in ("labels", "targets"))
        labels = next((labels for labels in found if labels is not None), None)
        if labels is None or self.task == "regression":
            return None
        if self.ids is not None:
            labels = [labels[index] for index in self.ids]
        sets = labels if self.task == "multilabel" else [labels]
        return Counter(map(int, itertools.chain.from_iterable(sets)))

    def identity(self) -> dict[str, object]:
        """Return what distinguishes these images from others, in whichever folder they are.

        The hash of names covers up to 1,000 evenly spaced images, below their class folders.
        """
        names = [Path(self.name(i)).name for i in evenly_spaced(len(self), 1000)]
        identity = {
            TRAINING_IMAGES: len(self),
            "hash of their names": names_hash(names),
            "hash of the names of classes": names_hash(self.classes),
            HELD_OUT: self.num_held_out,
        }
        if self.is_table:
            identity["hash of the labels"] = names_hash(list(map(str, self.reader.labels or [])))
        return identity

    def content_hash(self) -> str | None:
        """Return a digest of the first bytes of up to 100 evenly spaced files.

        It tells apart images that exchanged their names, as when class folders are swapped. None
        if images are not files.
        """
        digest = hashlib.blake2b(digest_size=8)
        for index in evenly_spaced(len(self), 100):
            with suppress(OSError):  # broken images are found when they are read
                file, _ = self.stored(index)
                if not hasattr(file, "read"):
                    return None
                with file:
                    digest.update(file.read(HASHED_BYTES))
        return digest.hexdigest()

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
                record, label = self.stored(candidate)
                image = self.transform.read(record)
            except Exception as error:  # decoders raise anything on broken files
                broken.append((self.name(candidate), reason_of(error)))
                continue
            try:
                crops = self.transform(image, "augment", self.seed, epoch, index)
            except BrokenImageError as error:  # in a window, which is read only now
                broken.append((self.name(candidate), reason_of(error)))
                continue
            return Sample(crops, self._label_of(label), broken)
        raise too_many_broken(broken)

    def name_at(self, key: tuple[int, int]) -> str:
        """Return the name of the image that is read at (epoch, index)."""
        return self.name((key[1] + len(self[key].broken)) % len(self))

    def _label_of(self, label: object) -> int | float | Tensor | None:
        """Return an image's label in the form that a batch of the task takes."""
        if not self.labeled:
            return None
        if self.task == "multilabel":
            return torch.zeros(self.num_classes).index_fill_(0, torch.tensor(label).long(), 1.0)
        return label if self.task == "regression" else index_of(label)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample | InputError]:
        """Return a micro-batch; PyTorch's DataLoader calls this method if it exists.

        An error is returned as a value: raised in a worker, it would drown in a traceback.
        """
        try:
            return [self[key] for key in keys]
        except InputError as error:
            return [error]
