"""Labels that would not mean the same class everywhere are refused."""

import json

import pytest
import torch

from tests.helpers.data import (
    encoded,
    open_shards,
    open_train,
    open_val_split,
    write_grays,
    write_parquet,
    write_shards,
    write_tar,
)
from util.data.classes import check_classes, check_labels
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("offline")


def folder_of(path, classes, val=False):
    """A dataset with one image per class; "" is an image outside the class folders."""
    for value, name in enumerate(classes):
        write_grays(path / name, [value])
    return open_val_split("", path, search_split=False) if val else open_train("", path)


@pytest.mark.parametrize(
    ("train", "val", "num_classes", "checkpoint", "expected"),
    [
        ("abc", "abc", None, None, 3),
        ("abc", None, 3, None, 3),
        (None, "abc", 3, None, 3),  # a checkpoint without class names
        (None, "abc", None, "abc", 3),
        (None, "abc", 1000, "abc", 1000),  # its head was trained on exactly these
        (None, None, 5, None, 5),
    ],
)
def test_the_number_of_classes(tmp_path, train, val, num_classes, checkpoint, expected):
    train_set = train and folder_of(tmp_path / "train", train)
    val_set = val and folder_of(tmp_path / "val", val, val=True)
    assert check_classes(train_set, val_set, num_classes, checkpoint) == expected


@pytest.mark.parametrize(
    ("train", "val", "num_classes", "checkpoint", "advice"),
    [
        ("abc", "ab", None, None, "validation images differ from those of the training images"),
        (
            "abcdefg",
            "ag",
            7,
            None,
            "5 missing (b, c, d, ...); give both the same classes in the same order",
        ),
        ("abc", "bcd", None, None, "1 missing (a) and 1 new (d)"),
        (None, "ab", None, "abc", "validation images differ from those of the checkpoint"),
        ("abd", "abd", None, "abc", "training images differ from those of the checkpoint"),
        (None, "abc", None, "bca", "their order differs"),
        (
            "abc",
            "abc",
            2,
            None,
            "head of 2 classes does not match the 3 of the training images (a, b, c)",
        ),
        ("abc", "abc", 1000, None, "correct --num_classes or the path of the images"),
        (
            None,
            "abcd",
            1000,
            None,
            "1000 classes does not match the 4 of the validation images (a, b, c, ...)",
        ),
        (
            None,
            "abc",
            2,
            "abc",
            "head of 2 classes does not match the 3 of the checkpoint (a, b, c)",
        ),
        (
            [""],
            "abc",
            None,
            None,
            "has no class folders: sort the images into one per class",
        ),
        ("abc", [""], 3, None, "validation images have no labels"),
        (["", "a", "b"], None, None, None, "some of the training images are outside the class"),
        ("a", "a", None, None, "only one class (a)"),
        (None, None, None, None, "give --num_classes"),
    ],
)
def test_labels_that_would_not_mean_the_same_are_refused(
    tmp_path, train, val, num_classes, checkpoint, advice
):
    train_set = train and folder_of(tmp_path / "train", train)
    val_set = val and folder_of(tmp_path / "val", val, val=True)
    with pytest.raises(InputError) as error:
        check_classes(train_set, val_set, num_classes, checkpoint)
    assert advice in str(error.value)
    assert "\n" not in str(error.value)


def test_readers_that_sort_differently_are_distinguished(tmp_path):
    for split in ("train", "val"):
        folder_of(tmp_path / split, ["9", "10"])  # as numbers for timm, as text for torchvision
    train_set = open_train("torch/folder", tmp_path)
    with pytest.raises(InputError, match="their order differs"):
        check_classes(train_set, open_val_split("folder", tmp_path), None)
    assert check_classes(train_set, open_val_split("torch/folder", tmp_path), None) == 2


def test_two_folders_of_the_same_name_are_not_merged_into_one_class(tmp_path):
    images = folder_of(tmp_path, ["cats/gray", "cats/red", "dogs/gray"])
    with pytest.raises(InputError) as error:
        check_classes(images, None, None)
    assert "2 folders are named gray" in str(error.value)
    assert "--class_folder last for 2 classes (gray, red)" in str(error.value)
    assert "--class_folder first for 2 classes (cats, dogs)" in str(error.value)


def test_a_stream_that_does_not_know_its_classes_needs_their_number(tmp_path):
    write_shards(tmp_path, [2, 2])
    stream = open_shards(tmp_path, 4)
    val_set = folder_of(tmp_path / "val", "abc", val=True)
    for images in (None, val_set):
        with pytest.raises(
            InputError, match=r"classes of the training images is unknown: give --num_classes"
        ):
            check_classes(stream, images, None)
        assert check_classes(stream, images, 3) == 3
    with pytest.raises(
        InputError, match="head of 4 classes does not match the 3 of the validation images"
    ):
        check_classes(stream, val_set, 4)
    assert check_classes(stream, val_set, None, "abc") == 3


def test_a_stream_that_knows_its_classes(tmp_path):
    write_parquet(tmp_path / "set", [1, 2, 3])
    label = {"name": "label", "dtype": {"class_label": {"names": {"0": "a", "1": "b", "2": "c"}}}}
    features = [{"name": "image", "dtype": "image"}, label]
    card = json.dumps({"dataset_info": {"features": features}})  # also valid YAML
    (tmp_path / "set" / "README.md").write_text(f"---\n{card}\n---\n")
    stream = open_train(f"hfids/{tmp_path}/set", tmp_path / "cache", num_samples=3)
    assert check_classes(stream, None, None) == 3
    with pytest.raises(InputError, match=r"1 missing \(b\)"):
        check_classes(stream, folder_of(tmp_path / "val", "ac", val=True), None)


def test_numbers_beside_names_are_told(tmp_path, caplog):
    images = folder_of(tmp_path / "train", "ab")
    files = {"0.png": encoded(1), "0.cls": b"1"}
    write_tar(tmp_path / "val.tar", files)
    val_set = open_val_split("", tmp_path / "val.tar", search_split=False)
    assert check_classes(images, val_set, None) == 2
    assert "validation images are numbers without names" in caplog.text
    assert "(0 is a, 1 is b)" in caplog.text


def test_numbers_and_words_are_not_the_same_labels(tmp_path):
    write_shards(tmp_path, [4])
    files = {"0.png": encoded(1), "0.cls": b"cat", "1.png": encoded(2), "1.cls": b"dog"}
    write_tar(tmp_path / "val.tar", files)
    val_set = open_val_split("", tmp_path / "val.tar", search_split=False)
    stream = open_shards(tmp_path, 4, "train-0.tar")
    with pytest.raises(InputError, match=r"names \(cat, dog\): give both as the same"):
        check_classes(stream, val_set, 3)


@pytest.mark.parametrize(("labels", "named"), [((0, 3, 4), 3), ((2, -2), -2), ((0, 255, 9), 255)])
def test_a_label_outside_the_classes_is_refused_and_named(labels, named):
    with pytest.raises(InputError, match=f"label {named} is not one of the 3 classes") as caught:
        check_labels(torch.tensor(labels), 3)
    assert "\n" not in str(caught.value)


def test_a_missing_label_is_refused_as_such():
    with pytest.raises(InputError, match="an image has no label: label every image"):
        check_labels(None, 3)


def test_every_class_is_a_label():
    check_labels(torch.tensor([0, 1, 2]), 3)
