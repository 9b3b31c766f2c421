"""Datasets of the Hugging Face hub, read by index or as a stream, whatever their columns' names."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from torch.utils.data import Dataset, IterableDataset

from util.data.labels import read_labels
from util.errors import InputError, first_few

IMAGE, LABEL = "image", "label"  # names of columns that come before others
SHARD_LABEL = "cls"  # of a webdataset
BINARY = ("binary", "large_binary")
NUMBERS = ("int", "uint", "float", "bool")  # how types of numbers begin
WORDS = ("string", "large_string")
PEEKED = 16  # examples of a stream


class Columns(NamedTuple):
    """The columns of a dataset that are read."""

    image: str
    label: str | None
    unlabeled: str | None
    """Why there are no labels; None if there is a column of them."""
    classes: tuple[str, ...] | None
    """Names, if the dataset declares them."""


def choose_columns(name: str, features: Mapping[str, object]) -> Columns:
    """Choose the columns of images and labels.

    Args:
        name: of the dataset, for messages.
        features: types of columns, by name.

    Raises:
        InputError: it is not clear which column holds images, or none does.
    """
    label, unlabeled = _label_column(features)
    names = getattr(features[label], "names", None) if label else None
    return Columns(_image_column(name, features), label, unlabeled, names and tuple(names))


def _image_column(name: str, features: Mapping[str, object]) -> str:
    kinds: tuple[Callable[[object], bool], ...] = (_is_image, _is_struct_of_image, _is_binary)
    if IMAGE in features and any(is_kind(features[IMAGE]) for is_kind in kinds):
        return IMAGE
    for is_kind in kinds:
        found = [column for column, feature in features.items() if is_kind(feature)]
        if len(found) > 1:
            raise InputError(
                f"{name} has {len(found)} columns of images ({first_few(found)}): rename the one "
                f"to read to '{IMAGE}', and save the dataset"
            )
        if found:
            return found[0]
    if IMAGE in features and _is_text(features[IMAGE]):  # the paths of images
        return IMAGE
    raise InputError(
        f"{name} has no column of images, only {', '.join(features)}: give a dataset that has one, "
        "declared as Image or with the bytes of image files"
    )


def _label_column(features: Mapping[str, object]) -> tuple[str | None, str | None]:
    """Return the column of labels, or why there is none."""
    from datasets import ClassLabel

    declared = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
    called = [column for column in (LABEL, SHARD_LABEL) if column in features]
    if not called and not declared:  # several classes an image, which is said below
        items = {column: getattr(feature, "feature", None) for column, feature in features.items()}
        called = [column for column, item in items.items() if isinstance(item, ClassLabel)]
    advice = f"rename the one to learn to '{LABEL}', and save the dataset"
    if not called and len(declared) > 1:
        return None, f"several columns hold classes ({', '.join(declared)}): {advice}"
    if not called and not declared:
        return None, f"none of the columns ({', '.join(features)}) is called '{LABEL}': {advice}"
    column = (called or declared)[0]
    feature = features[column]
    if column in declared or _is_text(feature) or _dtype(feature).startswith(NUMBERS):
        return column, None
    content = "several labels an image" if hasattr(feature, "feature") else "no classes"
    return None, f"the column '{column}' holds {content}: give a dataset with one class an image"


def _dtype(feature: object) -> str:
    return str(getattr(feature, "dtype", None))


def _is_image(feature: object) -> bool:
    from datasets import Image

    return isinstance(feature, Image)


def _is_struct_of_image(feature: object) -> bool:
    return isinstance(feature, dict) and ("bytes" in feature or "path" in feature)


def _is_binary(feature: object) -> bool:
    return _dtype(feature) in BINARY


def _is_text(feature: object) -> bool:
    return _dtype(feature) in WORDS


class HubImages(Dataset):
    """Images of a split of a Hugging Face dataset, read by index.

    Args:
        name: of the dataset, or the path of its folder.
        cache: folder of prepared datasets; None for the library's own.

    Attributes:
        labels: indices of classes; None if there are none.
        classes: names in the order of labels; None if labels are numbers without names.
        unlabeled: why there are no labels, or None.
        has_word_labels: whether the names of classes are the values of the column.

    Raises:
        InputError: see `choose_columns`.
    """

    def __init__(self, name: str, cache: str | None, split: str) -> None:
        from datasets import Image, load_dataset

        dataset = load_dataset(name, split=split, cache_dir=cache)
        columns = choose_columns(name, dataset.features)
        self.column = columns.image
        # Reading a row decodes all of its columns.
        images = dataset.cast_column(columns.image, Image(decode=False))
        self.images = images.select_columns([columns.image])
        self.encoded = self.images.with_format("arrow")
        self.has_word_labels = False
        self.labels, self.classes, self.unlabeled = None, columns.classes, columns.unlabeled
        if columns.label is not None:
            rows = dataset.select_columns([columns.label]).with_format("arrow")[:]
            found = read_labels(rows[columns.label].to_pylist())
            self.labels = found.indices or None
            self.classes = columns.classes or found.classes
            self.has_word_labels = found.classes is not None
            self.unlabeled = found.fault and (
                f"in the column '{columns.label}', {found.fault}: give images of which each has "
                "a class"
            )

    def __len__(self) -> int:
        return len(self.images)

    def filename(self, index: int, *, absolute: bool = False) -> str | None:
        """Return an image's path, if it has one, without reading the image."""
        del absolute  # it is what the dataset says
        image = self.encoded[index][self.column][0]
        return image["path"].as_py() if image.is_valid else None

    def __getitem__(self, index: int) -> tuple[BinaryIO | None, int | None]:
        """Return an encoded image, None if it is null, and the label."""
        image = self.images[index][self.column] or {}
        label = None if self.labels is None else self.labels[index]
        if image.get("bytes") is not None:
            return io.BytesIO(image["bytes"]), label
        path = image.get("path")
        return None if path is None else Path(path).open("rb"), label


def adapt_stream_reader(name: str, reader: object) -> None:
    """Let timm's reader of streams find its columns, and leave images encoded.

    Decoding would stop at a broken image. The reader gets the attributes `classes` and
    `unlabeled`.

    Raises:
        InputError: see `choose_columns`.
    """
    from datasets import Dataset, Image

    stream = reader.builder.as_streaming_dataset(split=reader.split)
    features = stream.features or Dataset.from_list(list(stream.take(1))).features
    columns = choose_columns(name, features)
    stream = stream.cast_column(columns.image, Image(decode=False))
    stream = stream.select_columns([c for c in (columns.image, columns.label) if c is not None])
    reader.input_key = columns.image
    reader.target_key = columns.label or columns.image
    reader.class_to_idx = {name: label for label, name in enumerate(columns.classes or [])}
    reader.builder = _Opened(stream)
    reader.unlabeled = columns.unlabeled


def why_unlabeled(reader: object) -> str | None:
    """Return why a stream has no labels to learn, as far as its first examples show; else None.

    Args:
        reader: see `adapt_stream_reader`.
    """
    if reader.unlabeled is not None:
        return reader.unlabeled
    column = reader.target_key
    examples = reader.builder.stream.select_columns([column]).take(PEEKED)
    values = [example[column] for example in examples]
    found = read_labels(values)
    if found.classes is not None:
        return (
            f"the column '{column}' holds words ({first_few(found.classes)}), whose indices are "
            "not known before all are read: use --dataset hfds/... instead of hfids/..."
        )
    return found.fault and (
        f"in the column '{column}', {found.fault}, as the first {len(values)} show: give images "
        "of which each has a class"
    )


class _Opened(NamedTuple):
    """Stands for a builder whose stream is open."""

    stream: IterableDataset

    def as_streaming_dataset(self, split: str) -> IterableDataset:
        """Return the stream; its split was chosen before."""
        del split
        return self.stream
