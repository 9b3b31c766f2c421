"""Hugging Face datasets: columns of any name and kind, labels, and why there are none."""

import logging

import datasets
import pytest

from tests.helpers.data import (
    all_labels,
    all_values,
    encoded,
    flat,
    labels_of,
    open_train,
    open_val_split,
    train_loader,
    values_of,
    write_grays,
    write_parquet,
)
from util.data.classes import check_classes
from util.data.hub import choose_columns
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("offline")

IMAGE = datasets.Image()
CLASS = datasets.ClassLabel(names=["a", "b", "c"])
TEXT, BYTES, NUMBER = (datasets.Value(kind) for kind in ("string", "binary", "int64"))
STRUCT = {"bytes": BYTES, "path": TEXT}
RECORDS = [{"bytes": encoded(value), "path": None} for value in (1, 2, 3)]


def write_table(folder, columns, split="train"):
    """Write columns given as (type, values)."""
    features = datasets.Features({name: kind for name, (kind, _) in columns.items()})
    table = {name: values for name, (_, values) in columns.items()}
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(table, features).to_parquet(folder / f"{split}-0.parquet")


def opened(tmp_path, columns):
    write_table(tmp_path / "set", columns)
    return open_train(f"hfds/{tmp_path}/set", tmp_path / "cache")


def stream_of(tmp_path, columns):
    write_table(tmp_path / "set", columns)
    return open_train(f"hfids/{tmp_path}/set", tmp_path / "cache", num_samples=3)


def first_epoch(stream):
    return flat(train_loader(stream, batch_size=3).steps(0))


# Columns


@pytest.mark.parametrize(
    ("kind", "images"),
    [(IMAGE, RECORDS), (STRUCT, RECORDS), (BYTES, [record["bytes"] for record in RECORDS])],
)
@pytest.mark.parametrize("name", ["img", "image"])
def test_the_only_images_are_read_whatever_their_column(tmp_path, name, kind, images):
    columns = {"id": (NUMBER, [5, 6, 7]), name: (kind, images), "fine": (CLASS, [2, 0, 1])}
    dataset = opened(tmp_path, columns)
    assert all_values(dataset) == [1, 2, 3]
    assert all_labels(dataset) == [2, 0, 1]
    assert dataset.classes == ("a", "b", "c")
    batches = first_epoch(stream_of(tmp_path, columns))
    assert sorted(zip(values_of(batches), labels_of(batches), strict=True)) == [
        *((1, 2), (2, 0), (3, 1))
    ]


def test_images_may_be_paths(tmp_path):
    write_grays(tmp_path, [4, 5])
    paths = [str(tmp_path / name) for name in ("005.png", "004.png")]
    dataset = opened(tmp_path, {"image": (TEXT, paths)})
    assert all_values(dataset) == [5, 4]
    assert dataset.name(0) == paths[0]


def test_columns_called_image_and_label_come_before_others():
    features = {"mask": IMAGE, "image": BYTES, "coarse": CLASS, "cls": NUMBER, "label": TEXT}
    assert choose_columns("x", features) == ("image", "label", None, None)


def test_columns_of_a_webdataset_are_found():
    features = {"jpg": IMAGE, "json": {"a": NUMBER}, "cls": NUMBER, "__key__": TEXT}
    assert choose_columns("x", features) == ("jpg", "cls", None, None)


@pytest.mark.parametrize(
    ("features", "advice"),
    [
        ({"a": IMAGE, "b": IMAGE}, "x has 2 columns of images (a, b): rename the one to read"),
        ({"text": TEXT, "n": NUMBER}, "x has no column of images, only text, n: give a dataset"),
        ({"image": NUMBER}, "x has no column of images, only image"),
    ],
)
def test_images_in_no_clear_column_are_refused_with_the_columns_there_are(features, advice):
    with pytest.raises(InputError) as error:
        choose_columns("x", features)
    assert str(error.value).startswith(advice)


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_a_dataset_without_images_is_refused_when_it_is_opened(tmp_path, kind):
    write_table(tmp_path / "set", {"text": (TEXT, ["a"])})
    with pytest.raises(InputError, match="set has no column of images, only text"):
        open_train(
            f"{kind}/{tmp_path}/set", tmp_path / "cache", num_samples=3 if kind == "hfids" else None
        )


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        ({}, "none of the columns (image) is called 'label': rename the one"),
        ({"fine": CLASS, "coarse": CLASS}, "several columns hold classes (fine, coarse): rename"),
        ({"label": datasets.Sequence(CLASS)}, "column 'label' holds several labels an image"),
        ({"label": datasets.List(CLASS)}, "column 'label' holds several labels an image"),
        ({"label": IMAGE}, "column 'label' holds no classes"),
        ({"label": {"a": NUMBER}}, "column 'label' holds no classes"),
    ],
)
def test_without_a_clear_column_of_labels_the_reason_is_said(features, reason):
    columns = choose_columns("x", {"image": IMAGE, **features})
    assert columns.label is None
    assert reason in columns.unlabeled


def test_other_columns_are_not_decoded(tmp_path):
    broken = [{"bytes": b"broken", "path": None}] * 3
    columns = {"image": (IMAGE, RECORDS), "mask": (IMAGE, broken)}
    assert all_values(opened(tmp_path, columns)) == [1, 2, 3]
    assert sorted(values_of(first_epoch(stream_of(tmp_path, columns)))) == [1, 2, 3]


@pytest.mark.parametrize("null", [None, {"bytes": None, "path": None}])
def test_null_images_are_broken(tmp_path, null):
    columns = {"image": (STRUCT, [RECORDS[0], null, RECORDS[2]])}
    dataset = opened(tmp_path, columns)
    assert all_values(dataset) == [1, 3, 3]
    ((name, reason),) = dataset[0, 1].broken
    assert name == dataset.name(1) == "image 1"
    assert "null" in reason
    batches = first_epoch(stream_of(tmp_path, columns))
    assert set(values_of(batches)) == {1, 3}


# Labels


@pytest.mark.parametrize(
    ("kind", "values", "labels", "classes"),
    [
        ("string", ["x10", "x9", "x10"], [1, 0, 1], ("x9", "x10")),
        ("string", ["2", "0", "2"], [2, 0, 2], None),
        ("bool", [True, False, True], [1, 0, 1], None),
        ("uint8", [2, 0, 1], [2, 0, 1], None),
        ("float32", [2.0, 0.0, 1.0], [2, 0, 1], None),
    ],
)
def test_labels_of_every_type(tmp_path, kind, values, labels, classes):
    columns = {"image": (IMAGE, RECORDS), "label": (datasets.Value(kind), values)}
    dataset = opened(tmp_path, columns)
    assert all_labels(dataset) == labels
    assert dataset.classes == classes
    assert dataset.class_sizes() == {label: labels.count(label) for label in labels}
    if classes is None:
        batches = first_epoch(stream_of(tmp_path, columns))
        assert sorted(zip(values_of(batches), labels_of(batches), strict=True)) == [
            *zip((1, 2, 3), labels, strict=True)
        ]


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        (CLASS, [-1, -1, -1], "in the column 'label', 3 of 3 are missing"),
        (CLASS, [0, -1, 2], "in the column 'label', 1 of 3 is missing"),
        (NUMBER, [0, None, None], "in the column 'label', 2 of 3 are missing"),
        (datasets.Value("float64"), [0.5, 1, 1.5], "'label', 0.5, 1.5 cannot be the index"),
        (datasets.List(CLASS), [[0], [0, 1], []], "'label' holds several labels an image"),
    ],
)
def test_images_without_usable_labels_train_without_and_say_so(tmp_path, kind, values, reason):
    columns = {"image": (IMAGE, RECORDS), "label": (kind, values)}
    dataset = opened(tmp_path, columns)
    stream = stream_of(tmp_path, columns)
    for images in (dataset, stream):
        with pytest.raises(InputError, match="training images have no labels") as error:
            check_classes(images, None, 3)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)
    assert dataset.classes is None
    assert all_labels(dataset) == [None] * 3
    batches = first_epoch(stream)
    assert sorted(values_of(batches)) == [1, 2, 3]
    assert batches[0].labels is None


def test_words_in_a_stream_are_refused_with_what_reads_them(tmp_path):
    words = ["cat", "dog", "cow"]
    stream = stream_of(tmp_path, {"image": (IMAGE, RECORDS), "label": (TEXT, words)})
    with pytest.raises(InputError, match=r"words \(cat, cow, dog\), .* use --dataset hfds/"):
        check_classes(stream, None, 3)
    assert sorted(values_of(first_epoch(stream))) == [1, 2, 3]


def test_a_stream_knows_the_classes_that_its_files_declare(tmp_path):
    stream = stream_of(tmp_path, {"img": (IMAGE, RECORDS), "kind": (CLASS, [2, 0, 1])})
    assert check_classes(stream, None, None) == 3


def test_a_stream_whose_labels_cannot_be_looked_at_says_so(tmp_path, caplog):
    stream = stream_of(tmp_path, {"image": (IMAGE, RECORDS), "label": (NUMBER, [0, 1, 2])})
    (tmp_path / "set" / "train-0.parquet").unlink()
    with caplog.at_level(logging.WARNING):
        assert check_classes(stream, None, 3) == 3
    assert "cannot be checked" in caplog.text


# Splits


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_validation_split_may_be_the_test_split(tmp_path, split):
    write_parquet(tmp_path / "set", [1, 2, 3])
    write_parquet(tmp_path / "set", [4, 5], split=split)
    val_set = open_val_split(f"hfds/{tmp_path}/set", tmp_path / "cache")
    assert all_values(val_set) == [4, 5]
    assert check_classes(None, val_set, None) == 3
