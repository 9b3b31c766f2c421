"""Images that are known by their index, and the batches they come in."""

import copy
import hashlib
import io
import itertools
import json
import logging
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.io import ImageReadMode, decode_jpeg

from util.data.broken_images import reason_of, too_many_broken
from util.data.transforms import Box, Crops, Normalization, Transform, resize_crop, to_rgb
from util.errors import InputError, RunError
from util.patches import RawImages

# By itself timm finds .png, .jpg and .jpeg only, and passes over the others without a word.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".jp2"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
)
MAX_BROKEN_IN_A_ROW = 100  # images in a row

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One image's crops, its label, and the broken images met on the way to it."""

    crops: Crops
    label: int
    broken: list[tuple[str, str]]


class EncodedCrops(NamedTuple):
    """Crops of JPEG files, to be decoded on the device."""

    files: Tensor  # uint8 (bytes,), one after another
    lengths: list[int]  # of each file, in bytes
    boxes: list[Sequence[Box]]  # of each file
    size: tuple[int, int]  # (height, width) of a crop
    is_encoded: list[bool]  # of every crop of the batch: whether it is one of these

    def decode(self, device: torch.device) -> list[Tensor]:
        """The crops, each uint8 (3, H, W) on the device.

        Raises:
            RunError: it cannot decode one.
        """
        files = list(self.files.split(self.lengths))
        try:
            images = decode_jpeg(files, mode=ImageReadMode.RGB, device=device)
        except RuntimeError as error:
            raise RunError(
                f"a JPEG cannot be decoded on {device}: use --decode cpu ({reason_of(error)})"
            ) from error
        pairs = zip(images, self.boxes, strict=True)
        return [resize_crop(image, box, self.size) for image, boxes in pairs for box in boxes]


class Batch(NamedTuple):
    """One micro-batch, as it leaves a worker; `to`, or `raw`, completes it."""

    images: Tensor  # (B, 3, H, W): uint8, channels last in memory, or float32 and normalised
    labels: Tensor  # (B,), int64; -1 where the source has none
    broken: list[tuple[str, str]]  # (file name, reason) of a broken image, every time it is met
    flips: Tensor | None = None  # (B,), bool; None for none
    normalization: Normalization | None = None  # of uint8 images
    encoded: EncodedCrops | None = None  # those that are not among `images`

    def to(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W), float32 and normalised, and labels (B,), on the device.

        The host does not wait for the device, unless that decodes.
        """
        images, labels = self._upright(device), self.labels.to(device, non_blocking=True)
        return images if self.normalization is None else self.normalization(images), labels

    def raw(self, device: torch.device) -> Tensor | RawImages:
        """The images of `to`, normalised only where patches of them are read, if they are uint8."""
        images = self._upright(device)
        return images if self.normalization is None else self.normalization.later(images)

    def _upright(self, device: torch.device) -> Tensor:
        """Images (B, 3, H, W) on the device: decoded, and flipped where they are to be."""
        images = self.images.to(device, non_blocking=True)
        if self.encoded is not None:
            decoded, others = iter(self.encoded.decode(device)), iter(images)
            images = torch.stack([next(decoded if e else others) for e in self.encoded.is_encoded])
        if self.flips is not None:
            flips = self.flips.to(device, non_blocking=True).view(-1, 1, 1, 1)
            images = torch.where(flips, images.flip(3), images)
        return images


class CopyStream:
    """Copies batches to a GPU on a stream of its own, beside what the GPU computes.

    The host is a step or so ahead of a GPU, so that the next batch is on its way while the one
    before is computed.

    Args:
        device: where batches go. Copies to anything but a GPU, and files that the device decodes,
            are left to `Batch`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, batch: Batch) -> Batch:
        """The batch with its tensors on the GPU, for what is launched from now on."""
        if self.stream is None:
            return batch
        names = [name for name in ("images", "labels", "flips") if getattr(batch, name) is not None]
        with torch.cuda.stream(self.stream):
            copies = {n: getattr(batch, n).to(self.device, non_blocking=True) for n in names}
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for tensor in copies.values():
            tensor.record_stream(computing)  # its memory is free when that has read it
        return batch._replace(**copies)


def collate(samples: list[Sample | InputError | RunError]) -> Batch | InputError | RunError:
    """Put samples into a batch; an error among the samples takes the place of the batch."""
    for sample in samples:
        if isinstance(sample, InputError | RunError):
            return sample
    crops = [sample.crops for sample in samples]
    flips = list(itertools.chain.from_iterable(c.flips for c in crops))
    return Batch(
        images=_stack([pixels for c in crops for pixels in c.pixels]),
        labels=torch.tensor([sample.label for sample in samples for _ in sample.crops.flips]),
        broken=[entry for sample in samples for entry in sample.broken],
        flips=torch.tensor(flips) if any(flips) else None,
        normalization=crops[0].normalization,
        encoded=_join_encoded(crops),
    )


def _stack(pixels: list[Tensor]) -> Tensor:
    """(B, 3, H, W), in a worker in memory that is shared with the main process."""
    if not pixels:
        return torch.empty(0)
    if pixels[0].dtype != torch.uint8:
        return default_collate(pixels)
    return default_collate([p.permute(1, 2, 0) for p in pixels]).permute(0, 3, 1, 2)


def _join_encoded(crops: list[Crops]) -> EncodedCrops | None:
    encoded = [c for c in crops if c.jpeg is not None]
    if not encoded:
        return None
    return EncodedCrops(
        files=torch.cat([c.jpeg for c in encoded]),
        lengths=[len(c.jpeg) for c in encoded],
        boxes=[c.boxes for c in encoded],
        size=encoded[0].size,
        is_encoded=[c.jpeg is not None for c in crops for _ in c.flips],
    )


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
