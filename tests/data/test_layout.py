"""What folders are: splits, classes, masks, hidden."""

import os
import random
import subprocess
import sys
from functools import cmp_to_key
from itertools import groupby
from pathlib import Path

import pytest

from tests.helpers.data import encoded
from util.data.files import open_files
from util.data.folders import DiskTree, is_annotation, sorted_naturally, split_of
from util.errors import InputError

ROOT = Path(__file__).parents[2]


def write(folder, *paths):
    """Write images, or empty files where the suffix is not an image's."""
    for path in paths:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(1) if file.suffix == ".png" else b"")
    return folder


def images_in(folder, *names, count=2):
    return [f"{folder}/{name}/{i}.png" for name in names for i in range(count)]


def opened(folder, split="train", **options):
    return open_files(str(folder), split, **options)


def refused(folder, split="train", **options):
    with pytest.raises(InputError) as error:
        opened(folder, split, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("train", ("train", ())),
        ("Training", ("train", ())),
        ("TRAIN", ("train", ())),
        ("train2017", ("train", ())),
        ("train_images", ("train", ())),
        ("TrainImages", ("train", ())),
        ("images-train", ("train", ())),
        ("train.X1", ("train", ())),
        ("training_set", ("train", ())),
        ("cars_train", ("train", ("cars",))),
        ("ILSVRC2012_img_train", ("train", ("ilsvrc",))),
        ("val", ("validation", ())),
        ("Validation", ("validation", ())),
        ("valid", ("validation", ())),
        ("eval", ("validation", ())),
        ("test1", ("test", ())),
        ("test_images", ("test", ())),
        ("cars_test", ("test", ("cars",))),
        ("traindata", ("train", ())),
        ("trainer", None),
        ("strain", None),
        ("tested", None),
        ("value", None),
        ("train_masks", None),
        ("apple", None),
    ],
)
def test_the_split_that_a_name_means(name, meaning):
    assert split_of(name) == meaning


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("annotations", True),
        ("SegmentationClass", True),
        ("trimaps", True),
        ("train_masks", True),
        ("ground_truth", True),
        ("gtFine", True),
        ("no_mask", False),
        ("class_1", False),
        ("fine", False),
    ],
)
def test_names_of_folders_with_annotations(name, expected):
    assert is_annotation(name) == expected


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Training", "Validation", "Testing"),
        ("train2017", "val2017", "test2017"),
        ("train_images", "valid_images", "test_images"),
        ("cars_train", "cars_val", "cars_test"),
        ("train.X1", "val.X", "test.X"),
        ("trainset", "valset", "testset"),
    ],
)
@pytest.mark.parametrize("wrapper", ["", "Data/CLS-LOC/"])
def test_splits_of_any_usual_name_are_found(tmp_path, train, val, test, wrapper):
    for split, count in ((train, 3), (val, 2), (test, 1)):
        write(tmp_path, *images_in(f"{wrapper}{split}", "cat", "dog", count=count))
    assert (len(opened(tmp_path)), len(opened(tmp_path, "validation"))) == (6, 4)
    assert opened(tmp_path).listed.left == [f"{wrapper}{test}"]
    assert opened(tmp_path).classes == ("cat", "dog")


def test_a_class_called_train_among_others_is_a_class(tmp_path):
    classes = ("apple", "bus", "train", "whale")
    write(tmp_path, *images_in("train", *classes), *images_in("test", *classes))
    for folder in (tmp_path, tmp_path / "train"):
        assert opened(folder).classes == classes
        assert len(opened(folder)) == 8
    assert opened(tmp_path / "test", "validation", search_split=False).classes == classes
    (note,) = opened(tmp_path / "train").listed.notes
    assert note.startswith("train is read as a class")


@pytest.mark.parametrize("classes", [("test", "toast", "tower"), ("val", "valley", "volcano")])
def test_a_class_with_another_split_name_is_a_class(tmp_path, classes):
    write(tmp_path, *images_in(".", *classes))
    assert opened(tmp_path).classes == classes


@pytest.mark.parametrize(
    ("names", "commands"),
    [
        (("train", "extra"), "--data_path {}/train; if"),
        (("test", "cat"), "--data_path {0}/cat --val_path {0}/test; if"),
        (("train", "test", "cat", "dog"), "--data_path {0}/train --val_path {0}/test; if"),
    ],
)
def test_where_both_readings_are_possible_both_commands_are_given(tmp_path, names, commands):
    write(tmp_path, *images_in(".", *names))
    message = refused(tmp_path)
    assert f"give {commands.format(tmp_path)}" in message
    assert f"give --data_path {tmp_path} --class_folder last" in message
    assert opened(tmp_path, class_folder="last").classes == tuple(sorted(names))


def test_a_slash_at_the_end_and_a_relative_path_change_nothing(tmp_path, monkeypatch):
    write(tmp_path, *images_in("train", "train", "cat"), *images_in("val", "train", "cat"))
    assert opened(f"{tmp_path}/").listed.root == f"{tmp_path}/train"
    monkeypatch.chdir(tmp_path / "train")
    assert opened(".").classes == opened("../train").classes == ("cat", "train")


def test_a_path_with_spaces_is_quoted_in_commands(tmp_path):
    write(tmp_path / "my images", *images_in(".", "train", "extra"))
    assert f"--data_path '{tmp_path}/my images/train'" in refused(tmp_path / "my images")


def test_other_folders_beside_splits_are_named_not_read(tmp_path):
    write(tmp_path, *images_in("train2017", "."), *images_in("val2017", "."))
    write(tmp_path, *images_in("unlabeled2017", "."), "annotations/instances.json", "sample.png")
    listed = opened(tmp_path).listed
    assert listed.left == ["annotations", "unlabeled2017", "1 image beside them"]
    assert len(listed.paths) == 2


def test_splits_of_every_class_are_refused_with_both_commands(tmp_path):
    for name in ("bottle", "cable"):
        write(tmp_path, *images_in(name, "train/good", "test/broken"))
    message = refused(tmp_path)
    bottle = f"{tmp_path}/bottle"
    assert message.startswith(f"{bottle} has train and test, as has 1 more folder, which")
    assert f"--data_path {bottle}/train --val_path {bottle}/test" in message
    assert opened(tmp_path, class_folder="first").classes == ("bottle", "cable")


def test_splits_do_not_become_classes_by_the_first_folder(tmp_path):
    for split in ("train", "valid"):
        write(tmp_path, *images_in(f"data/{split}", "elbow/p1/study1", "hand/p2/study1"))
    assert len(opened(tmp_path)) == len(opened(tmp_path, class_folder="first")) == 4
    write(tmp_path, *images_in("data/more", "elbow"))
    for place in ("one/train", "one/valid", "other/train", "other/valid"):
        write(tmp_path / "flat", *images_in(place, "."))
    for class_folder in ("auto", "last"):
        message = refused(tmp_path / "flat", class_folder=class_folder)
        assert "named like splits, not classes" in message


def test_images_beside_their_masks_are_advised(tmp_path):
    for kind in ("gtFine", "other", "zebra"):
        write(tmp_path, *images_in(kind, "train/aachen", "val/bonn"))
    assert f"{tmp_path}/other has train and val" in refused(tmp_path)


def test_parts_of_a_set_are_not_classes(tmp_path):
    write(tmp_path, *images_in(".", "images_001", "images_002"))
    assert "named like parts of one set" in opened(tmp_path).listed.ambiguity
    assert opened(tmp_path, class_folder="last").listed.ambiguity is None


def test_splits_in_one_of_several_folders_are_refused_with_their_path(tmp_path):
    write(tmp_path, *images_in("data/train", "cat", "dog"), *images_in("data/val", "cat", "dog"))
    write(tmp_path, "docs/notes.txt")
    assert len(opened(tmp_path)) == 4
    write(tmp_path, "demo/1.png")
    assert f"such as --data_path {tmp_path}/data" in refused(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("trainA", "trainB", "testA", "testB"),
        ("train_hr", "train_lr", "val_hr", "val_lr"),
        ("train_mini", "public_test"),
        ("cars_train", "pets_test"),
        ("val_hr", "val_lr"),
        ("rps", "rps-test-set"),
    ],
)
def test_splits_of_several_datasets_are_refused(tmp_path, names):
    write(tmp_path / "data", *images_in(".", *names))
    message = refused(tmp_path / "data")
    assert "has folders named like splits" in message
    assert f"give --data_path {tmp_path}/data --class_folder last" in message
    assert len(opened(tmp_path / "data", class_folder="last").classes) == len(names)


def test_bullet_trains_are_classes(tmp_path):
    write(tmp_path, *images_in(".", "bullet_train", "steam_train"))
    assert opened(tmp_path).classes == ("bullet_train", "steam_train")


def test_two_folders_of_training_images_are_not_chosen_from(tmp_path):
    write(tmp_path, *images_in("train", "cat"), *images_in("train_2", "cat"))
    write(tmp_path, *images_in("val", "cat"))
    assert "train and train_2, which may all hold the training images" in refused(tmp_path)
    assert len(opened(tmp_path, "validation")) == 2


@pytest.mark.parametrize("only", ["val", "test"])
def test_training_on_validation_or_test_images_is_refused(tmp_path, only):
    write(tmp_path, *images_in(only, "cat", "dog"))
    assert f"has {only} but no train folder" in refused(tmp_path)
    assert len(opened(tmp_path, "validation", search_split=False)) == 4


@pytest.mark.parametrize(
    ("images", "annotations"),
    [
        ("images", "annotations/trimaps"),
        ("JPEGImages", "SegmentationClass"),
        ("train", "train_masks"),
        (".", "masks"),
        ("photos", "thumbnails"),
        ("images/cat", "annotations/cat"),
    ],
)
def test_masks_beside_images_are_not_images(tmp_path, images, annotations):
    write(tmp_path, f"{images}/1.png", f"{images}/2.png", f"{annotations}/1.png")
    source = opened(tmp_path)
    assert len(source) == 2
    assert source.listed.left == [annotations.split("/")[0]]


def test_masks_with_class_folders_are_not_images(tmp_path):
    classes = [f"{number:03d}.Bird" for number in range(3)]
    write(tmp_path, *images_in("CUB_200_2011/images", *classes))
    write(tmp_path, *images_in("segmentations", *classes))
    source = opened(tmp_path)
    assert source.classes == tuple(classes)
    assert (len(source), source.listed.left) == (6, ["segmentations"])


@pytest.mark.parametrize("deep", ["a/b/c/d/e/f", "2021/01/02/03/04/05"])
def test_images_are_found_at_any_depth(tmp_path, deep):
    write(tmp_path, *images_in("x", "cat", "dog"), f"{deep}/1.png")
    assert len(opened(tmp_path)) == 5


def test_classes_called_mask_are_classes(tmp_path):
    write(tmp_path, *images_in(".", "mask", "no_mask"))
    assert opened(tmp_path).classes == ("mask", "no_mask")


# Classes


def test_the_last_folder_is_the_class_and_says_so(tmp_path):
    write(tmp_path, *images_in(".", "dog/poodle", "dog/boxer", "cat/tabby", "cat/siamese"))
    source = opened(tmp_path)
    assert source.classes == ("boxer", "poodle", "siamese", "tabby")
    (note,) = source.listed.notes
    assert "the last folder of a path is the class" in note
    assert "--class_folder first for 2 classes (cat, dog)" in note
    assert opened(tmp_path, class_folder="first").classes == ("cat", "dog")
    assert opened(tmp_path, class_folder="first", order="torchvision").classes == ("cat", "dog")


def test_a_folder_of_the_same_name_in_every_class_is_passed(tmp_path):
    write(tmp_path, *images_in("train", "n01/images", "n02/images", "n03/images"))
    write(tmp_path, "train/n01/n01_boxes.txt", *images_in("val", "images"))
    write(tmp_path, "val/val_annotations.txt")
    train, val = opened(tmp_path), opened(tmp_path, "validation")
    assert train.classes == ("n01", "n02", "n03")
    assert train.listed.notes == ["the class of an image is the folder above images/"]
    assert val.unlabeled.startswith(f"{tmp_path}/val/images has no class folders")
    assert "val/val_annotations.txt may hold labels" in val.unlabeled


def test_the_same_class_in_many_folders_has_to_be_chosen(tmp_path):
    write(tmp_path, *images_in(".", "p1/benign", "p1/malignant", "p2/benign", "p3/malignant"))
    ambiguity = opened(tmp_path).listed.ambiguity
    assert "--class_folder last for 2 classes (benign, malignant)" in ambiguity
    assert "--class_folder first for 3 classes (p1, p2, p3)" in ambiguity
    source = opened(tmp_path, class_folder="last")
    assert source.classes == ("benign", "malignant")
    assert source.listed.labels == [0, 0, 1, 1, 0, 0, 1, 1]
    assert source.listed.ambiguity is None


def test_images_beside_folders_of_images_have_no_clear_class(tmp_path):
    write(tmp_path, *images_in(".", "dog", "dog/poodle", "cat"))
    assert "the folder dog holds images beside folders" in opened(tmp_path).listed.ambiguity
    assert opened(tmp_path, class_folder="first").listed.ambiguity is None


@pytest.mark.parametrize("names", [["a1", "A1", "a01", "A01"], ["10", "9", "010"], ["²", "2", "٣"]])
def test_the_order_of_classes_is_total(tmp_path, names):
    expected = sorted_naturally(names)
    for seed in range(4):
        shuffled = random.Random(seed).sample(names, len(names))
        assert sorted_naturally(shuffled) == expected
    write(tmp_path, *images_in(".", *names, count=1))
    assert opened(tmp_path).classes == tuple(expected)


# Links, and what cannot be listed


def test_a_link_to_a_folder_above_is_passed_over_and_named(tmp_path):
    data = write(tmp_path / "data", *images_in(".", "cat", "dog"))
    (data / "cat" / "all").symlink_to(data)
    (data / "dog" / "above").symlink_to(tmp_path)
    (data / "dog" / "itself").symlink_to(".")
    listed = opened(data).listed
    assert len(listed.paths) == 4
    assert sorted(listed.loops) == ["cat/all", "dog/above", "dog/itself"]


def test_links_that_lead_to_each_other_end(tmp_path):
    write(tmp_path / "data", "cat/1.png")
    write(tmp_path / "elsewhere", "a/1.png", "b/1.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "elsewhere" / "a" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "elsewhere" / "b" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    listed = opened(tmp_path / "data").listed
    assert sorted(listed.paths) == ["cat/1.png", "dog/1.png", "dog/b/1.png"]
    assert listed.loops == ["dog/b/a"]


def test_class_folders_full_of_links_to_each_other_end(tmp_path):
    names = [f"class_{number}" for number in range(12)]
    write(tmp_path, *images_in(".", *names, count=1))
    for name in names:
        for other in set(names) - {name}:
            (tmp_path / name / other).symlink_to(f"../{other}")
    assert len(opened(tmp_path, class_folder="last")) == 12 + 12 * 11


def test_a_link_out_of_the_folder_is_followed(tmp_path):
    write(tmp_path / "store", "cats/1.png", "cats/2.png")
    write(tmp_path / "data", "dog/1.png")
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store" / "cats")
    assert opened(tmp_path / "data").listed.num_images == {"cat": 2, "dog": 1}


def test_a_broken_link_is_a_broken_image_and_a_pipe_is_none(tmp_path):
    write(tmp_path, "1.png")
    (tmp_path / "2.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "3.png")
    (tmp_path / "4.png").symlink_to("4.png")
    assert opened(tmp_path).listed.paths == ["1.png", "2.png", "4.png"]
    with pytest.raises(FileNotFoundError):
        opened(tmp_path)[1]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    with pytest.raises(InputError, match="gone cannot be listed"):
        DiskTree(str(tmp_path)).listing("gone")


# Anything else


@pytest.mark.parametrize(
    ("files", "advice"),
    [
        (["a.zip"], "unpack it once (unzip -q {}/a.zip -d FOLDER)"),
        (["images.tar.gz"], "unpack it once (tar -xf {}/images.tar.gz -C FOLDER)"),
        (["train-0.parquet"], "read its files with --dataset hfds/{}"),
        (["notes.txt"], "(there are notes.txt)"),
        ([], "give a folder of .jpg"),
    ],
)
def test_a_folder_without_images_is_answered_with_what_reads_it(tmp_path, files, advice):
    write(tmp_path, *files)
    assert advice.format(tmp_path) in refused(tmp_path)


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ("a.zip", "unpack it once (unzip -q {}/a.zip -d FOLDER) and give that folder instead"),
        ("a.tgz", "unpack it once (tar -xf {}/a.tgz -C FOLDER)"),
        ("a.tar.xz", "unpack it once (tar -xf {}/a.tar.xz -C FOLDER)"),
        ("train-0.parquet", "read its folder with --dataset hfds/{}"),
        ("a.png", "it is one image; give its folder, {}"),
        ("a.txt", "give a folder or a .tar file that contains images"),
    ],
)
def test_a_file_that_is_no_archive_is_answered_with_what_reads_it(tmp_path, file, advice):
    write(tmp_path, file)
    assert advice.format(tmp_path) in refused(tmp_path / file)


# Any tree


class RandomTree:
    """A folder of images that is written together with what should be found in it."""

    SPLITS = (
        ("train", "val", "test"),
        ("Training", "Validation", None),
        ("train_images", None, "test_images"),
    )
    CLASSES = ("cat", "dog", "a1", "A1", "a01", "10", "9", "train", "Über", "x y", "n01")
    WRAPPERS = ("", "", "archive/", "Data/CLS-LOC/")
    HIDDEN = (
        ".DS_Store",
        "._1.png",
        ".thumbs/1.png",
        "__MACOSX/2.png",
        "@eaDir/3.png",
        "Thumbs.db",
    )

    def __init__(self, root, seed):
        self.random = random.Random(seed)
        self.root, self.store = root / "data", root / "store"
        self.files, self.num_hidden, self.loops = [], 0, 0
        self.expected = {"train": {}, "validation": None}  # path below the split -> class
        wrapper = self.random.choice(self.WRAPPERS)
        classes = self.random.sample(self.CLASSES, self.random.randint(3, len(self.CLASSES)))
        if self.random.random() < 0.3:
            self.fill("train", wrapper, classes)  # no splits
        else:
            names = self.random.choice(self.SPLITS)
            for role, name in zip(("train", "validation", "test"), names, strict=True):
                if name is not None:
                    self.fill(role, f"{wrapper}{name}/", classes)
        for path in self.random.sample(self.files, len(self.files)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        self.link(root)

    def fill(self, role, prefix, classes):
        found, hidden = {}, []
        for name in classes:
            for number in self.random.sample(range(120), self.random.randint(1, 4)):
                found[f"{name}/{number}{self.random.choice(['.png', '.JPG', '.tif'])}"] = name
            if self.random.random() < 0.2:
                hidden.append(f"{name}/{self.random.choice(self.HIDDEN)}")
        self.files += [self.root / f"{prefix}{path}" for path in [*found, *hidden]]
        self.files.append(self.root / f"{prefix}{classes[0]}/notes.txt")
        self.expected[role] = found
        if role == "train":
            self.num_hidden, self.train = len(hidden), self.root / prefix

    def link(self, root):
        """Add a class that is a link out of the tree, and a link to a folder above."""
        if self.random.random() < 0.5:
            (self.store / "zebras").mkdir(parents=True)
            (self.store / "zebras" / "1.png").write_bytes(b"")
            (self.train / "zebra").symlink_to(self.store / "zebras")
            self.expected["train"]["zebra/1.png"] = "zebra"
        if self.random.random() < 0.5:
            folder = next(iter(self.expected["train"])).split("/")[0]
            (self.train / folder / "loop").symlink_to(self.random.choice([self.root, root]))
            self.loops = 1


def pieces(text):
    """Runs of digits and of other characters."""
    return ["".join(run) for _, run in groupby(text, str.isdecimal)]


def before_or_after(a, b):
    """Compare two names by their numbers and letters, then as they are."""
    for x, y in zip(pieces(a.lower()), pieces(b.lower()), strict=False):
        both = x.isdecimal() and y.isdecimal()
        one, other = (int(x), int(y)) if both else (x, y)
        if one != other:
            return -1 if one < other else 1
    lengths = len(pieces(a)), len(pieces(b))
    if lengths[0] != lengths[1]:
        return lengths[0] - lengths[1]
    return (a > b) - (a < b)


@pytest.mark.parametrize("seed", range(60))
def test_any_tree_is_read_as_it_was_meant(tmp_path, seed):
    tree = RandomTree(tmp_path, seed)
    for split in ("train", "validation"):
        source, expected = opened(tree.root, split), tree.expected[split]
        if expected is None:
            assert source is None
            continue
        classes = sorted(set(expected.values()), key=cmp_to_key(before_or_after))
        assert list(source.classes) == classes
        found = {source.filename(i): classes[source.listed.labels[i]] for i in range(len(source))}
        assert found == expected
        assert list(found) == sorted(found, key=cmp_to_key(before_or_after))
    listed = opened(tree.root).listed
    assert listed.hidden.total() == tree.num_hidden
    assert listed.others == {".txt": 1}
    assert len(listed.loops) == tree.loops


def test_hash_seeds_and_the_disks_order_change_nothing(tmp_path):
    tree = RandomTree(tmp_path, seed=2)
    program = f"""
from util.data.files import open_files
source = open_files({str(tree.root)!r}, "train")
print(source.classes, source.listed.paths, source.listed.labels)
"""
    outputs = set()
    for seed in "012":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        outputs.add(
            subprocess.run(command, env=environment, capture_output=True, check=True).stdout
        )
    assert len(outputs) == 1
