"""Labels that would not mean the same class everywhere are refused."""

import json

import pytest
import torch

from tests.helpers.data import (
    open_shards,
    open_train,
    open_val_split,
    write_grays,
    write_parquet,
    write_shards,
)
from util.data.classes import check_classes, check_labels
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("offline")


def folder_of(path, classes, held_out=False):
    """A data set with one image a class; "" is an image beside the class folders."""
    for value, name in enumerate(classes):
        write_grays(path / name, [value])
    return open_val_split("", path, search_split=False) if held_out else open_train("", path)


@pytest.mark.parametrize(
    ("train", "held_out", "num_classes", "checkpoint", "expected"),
    [
        ("abc", "abc", None, None, 3),
        ("abc", None, 3, None, 3),
        (None, "abc", 3, None, 3),  # a checkpoint that does not know its classes
        (None, "abc", None, "abc", 3),
        (None, "abc", 1000, "abc", 1000),  # its head was trained on just these
        (None, None, 5, None, 5),
    ],
)
def test_the_number_of_classes(tmp_path, train, held_out, num_classes, checkpoint, expected):
    train_set = train and folder_of(tmp_path / "train", train)
    val_set = held_out and folder_of(tmp_path / "val", held_out, held_out=True)
    assert check_classes(train_set, val_set, num_classes, checkpoint) == expected


@pytest.mark.parametrize(
    ("train", "held_out", "num_classes", "checkpoint", "advice"),
    [
        ("abc", "ab", None, None, "held-out images are not those of the training images"),
        (
            "abcdefg",
            "ag",
            7,
            None,
            "5 are missing (b, c, d, ...); give both the same, in the same order",
        ),
        ("abc", "bcd", None, None, "1 are missing (a) and 1 are new (d)"),
        (None, "ab", None, "abc", "held-out images are not those of the checkpoint"),
        ("abd", "abd", None, "abc", "training images are not those of the checkpoint"),
        (None, "abc", None, "bca", "the same ones are in another order"),
        (
            "abc",
            "abc",
            2,
            None,
            "head of 2 classes does not fit the 3 of the training images (a, b, c)",
        ),
        ("abc", "abc", 1000, None, "correct --num_classes, or the path of the images"),
        (
            None,
            "abcd",
            1000,
            None,
            "1000 classes does not fit the 4 of the held-out images (a, b, c, ...)",
        ),
        (None, "abc", 2, "abc", "head of 2 classes does not fit the 3 of the checkpoint (a, b, c)"),
        ([""], "abc", None, None, "training images have no labels: sort them into one folder per"),
        ("abc", [""], 3, None, "held-out images have no labels"),
        (["", "a", "b"], None, None, None, "some of the training images lie beside the class"),
        ("a", "a", None, None, "one class only (a)"),
        (None, None, None, None, "give --num_classes"),
    ],
)
def test_labels_that_would_not_mean_the_same_are_refused(
    tmp_path, train, held_out, num_classes, checkpoint, advice
):
    train_set = train and folder_of(tmp_path / "train", train)
    val_set = held_out and folder_of(tmp_path / "val", held_out, held_out=True)
    with pytest.raises(InputError) as error:
        check_classes(train_set, val_set, num_classes, checkpoint)
    assert advice in str(error.value)
    assert "\n" not in str(error.value)


def test_readers_that_sort_otherwise_are_told_apart(tmp_path):
    for split in ("train", "val"):
        folder_of(tmp_path / split, ["9", "10"])  # as numbers for timm, as text for torchvision
    train_set = open_train("torch/folder", tmp_path)
    with pytest.raises(InputError, match="the same ones are in another order"):
        check_classes(train_set, open_val_split("folder", tmp_path), None)
    assert check_classes(train_set, open_val_split("torch/folder", tmp_path), None) == 2


def test_two_folders_of_one_name_are_not_taken_for_one_class(tmp_path):
    images = folder_of(tmp_path, ["cats/grey", "cats/red", "dogs/grey"])
    with pytest.raises(InputError, match="2 folders of the training images are called grey"):
        check_classes(images, None, None)


def test_a_stream_that_does_not_know_its_classes_needs_their_number(tmp_path):
    write_shards(tmp_path, [2, 2])
    stream = open_shards(tmp_path, 4)
    val_set = folder_of(tmp_path / "val", "abc", held_out=True)
    for held_out in (None, val_set):
        with pytest.raises(InputError, match=r"training images do not tell .*give --num_classes"):
            check_classes(stream, held_out, None)
        assert check_classes(stream, held_out, 3) == 3
    with pytest.raises(
        InputError, match="head of 4 classes does not fit the 3 of the held-out images"
    ):
        check_classes(stream, val_set, 4)
    assert check_classes(stream, val_set, None, "abc") == 3


def test_a_stream_that_knows_its_classes(tmp_path):
    write_parquet(tmp_path / "set", [1, 2, 3])
    label = {"name": "label", "dtype": {"class_label": {"names": {"0": "a", "1": "b", "2": "c"}}}}
    features = [{"name": "image", "dtype": "image"}, label]
    card = json.dumps({"dataset_info": {"features": features}})  # which is YAML, too
    (tmp_path / "set" / "README.md").write_text(f"---\n{card}\n---\n")
    stream = open_train(f"hfids/{tmp_path}/set", tmp_path / "cache", num_samples=3)
    assert check_classes(stream, None, None) == 3
    with pytest.raises(InputError, match=r"1 are missing \(b\)"):
        check_classes(stream, folder_of(tmp_path / "val", "ac", held_out=True), None)


@pytest.mark.parametrize(("labels", "named"), [((0, 3, 4), 3), ((2, -1), -1), ((0, 255, 9), 255)])
def test_a_label_that_is_no_class_is_refused_and_named(labels, named):
    with pytest.raises(InputError, match=f"label {named}, which is none of 3 classes") as caught:
        check_labels(torch.tensor(labels), 3)
    assert "\n" not in str(caught.value)


def test_every_class_is_a_label():
    check_labels(torch.tensor([0, 1, 2]), 3)
