import io
import json
import logging
import pickle
import random
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder, cifar, places365

from tests.helpers.data import (
    RANDOM,
    SEED,
    STILL,
    all_labels,
    all_values,
    assert_same,
    encoded,
    eval_loader,
    flat,
    open_shards,
    open_train,
    open_val_split,
    pixels_of,
    train_loader,
    values_of,
    write_grays,
    write_noise,
    write_parquet,
    write_shards,
    write_tar,
)
from util.data.broken_images import BrokenImages
from util.data.classes import check_classes
from util.data.datasets import build_dataset, open_train_val, open_val
from util.data.images import IndexedImages
from util.data.transforms import Augmentation
from util.errors import InputError
from util.settings.data import DataSettings


def sentence_of(loader):
    """Message that ends the first epoch; the traceback would keep the workers alive."""
    try:
        list(loader.steps(0))
    except InputError as error:
        return str(error)


pytestmark = pytest.mark.usefixtures("offline")


# Sources


def test_flat_folder_without_labels(tmp_path):
    write_grays(tmp_path, [3, 1, 2])
    dataset = open_train("", tmp_path)
    assert all_values(dataset) == [1, 2, 3]
    assert all_labels(dataset) == [None, None, None]
    assert dataset.num_classes is dataset.classes is None
    assert dataset.name(0) == str(tmp_path / "001.png")
    assert open_val_split("", tmp_path) is None


def test_class_folders(tmp_path):
    write_grays(tmp_path / "cat", [1, 2])
    write_grays(tmp_path / "dog", [3])
    dataset = open_train("folder", str(tmp_path))
    assert all_values(dataset) == [1, 2, 3]
    assert all_labels(dataset) == [0, 0, 1]
    assert (dataset.classes, dataset.num_classes) == (("cat", "dog"), 2)
    assert open_val_split("folder", tmp_path) is None


@pytest.mark.parametrize("val", ["val", "validation", "valid", "eval"])
@pytest.mark.parametrize("name", ["", "folder", "torch/folder"])
def test_train_and_val_folders(tmp_path, name, val):
    write_grays(tmp_path / "train" / "cat", [1, 2])
    write_grays(tmp_path / val / "cat", [3])
    assert all_values(open_train(name, tmp_path)) == [1, 2]
    assert all_values(open_val_split(name, tmp_path)) == [3]


def test_without_val_the_training_images_are_not_val(tmp_path):
    write_grays(tmp_path / "train", [1, 2])
    assert all_values(open_train("", tmp_path)) == [1, 2]
    assert open_val_split("", tmp_path) is None


def test_val_without_train_is_refused(tmp_path):
    write_grays(tmp_path / "val", [1])
    write_grays(tmp_path / "cat", [2])
    with pytest.raises(InputError, match="has val beside cat: if that is a split, give"):
        open_train("", tmp_path)
    shutil.rmtree(tmp_path / "cat")
    with pytest.raises(InputError, match="no train folder: move the training images into"):
        open_train("", tmp_path)


def test_an_explicit_path_is_taken_as_given(tmp_path):
    write_grays(tmp_path / "train", [1])
    write_grays(tmp_path / "test", [2])
    assert all_values(open_val_split("", tmp_path / "test", search_split=False)) == [2]
    with pytest.raises(InputError, match="one set of images is needed: give its path, such as"):
        open_val_split("", tmp_path, search_split=False)


@pytest.mark.parametrize("name", ["", "tar"])
def test_tar(tmp_path, name):
    files = {"cat/a.png": encoded(1), "cat/b.webp": encoded(2, "WEBP"), "dog/c.png": encoded(3)}
    write_tar(tmp_path / "images.tar", files)
    dataset = open_train(name, tmp_path / "images.tar")
    assert all_values(dataset) == [1, 2, 3]
    assert all_labels(dataset) == [0, 0, 1]
    assert dataset.classes == ("cat", "dog")
    assert dataset.name(0) == f"{tmp_path}/images.tar/cat/a.png"
    assert open_val_split(name, tmp_path / "images.tar") is None
    given = open_val_split(name, tmp_path / "images.tar", search_split=False)
    assert all_values(given) == [1, 2, 3]


def test_tars_of_splits_are_found_unless_there_are_folders(tmp_path):
    write_grays(tmp_path, [9])
    write_tar(tmp_path / "train.tar", {"cat/a.png": encoded(1), "dog/b.png": encoded(2)})
    assert all_values(open_train("", tmp_path)) == [1, 2]
    assert open_val_split("", tmp_path) is None
    write_tar(tmp_path / "val.tar", {"cat/a.png": encoded(3)})
    assert all_values(open_val_split("", tmp_path)) == [3]
    write_grays(tmp_path / "validation", [4])
    assert all_values(open_val_split("", tmp_path)) == [4]
    (tmp_path / "train.tar").unlink()
    with pytest.raises(InputError, match="no train folder: move the training images into"):
        open_train("", tmp_path)


@pytest.mark.parametrize(
    ("suffix", "file_format"),
    [
        (".webp", "WEBP"),
        (".bmp", "BMP"),
        (".tif", "TIFF"),
        (".TIFF", "TIFF"),
        (".gif", "GIF"),
        (".ppm", "PPM"),
        (".JPG", "JPEG"),
    ],
)
def test_no_image_is_skipped_because_of_its_suffix(tmp_path, suffix, file_format):
    write_grays(tmp_path, [1, 2], suffix, file_format)
    write_grays(tmp_path, [3])
    assert all_values(open_train("", tmp_path)) == [1, 2, 3]


def write_mnist(root):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, values in (("train", [1, 2, 3]), ("t10k", [4, 5])):
        pixels = np.repeat(np.array(values, np.uint8), 28 * 28).tobytes()
        header = struct.pack(">4B3I", 0, 0, 8, 3, len(values), 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels)
        header = struct.pack(">4BI", 0, 0, 8, 1, len(values))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + bytes(values))


def test_torchvision_datasets(tmp_path):
    write_mnist(tmp_path)
    dataset = open_train("torch/mnist", tmp_path)
    assert all_values(dataset) == all_labels(dataset) == [1, 2, 3]
    assert dataset.num_classes == 10
    assert dataset.classes[7] == "7 - seven"
    assert all_values(open_val_split("torch/mnist", tmp_path)) == [4, 5]


def test_torchvision_folders_read_16_bit_too(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(tmp_path / "cat" / "a.png")
    dataset = IndexedImages(ImageFolder(tmp_path), STILL, seed=0)
    assert all_values(dataset) == [100]
    assert dataset.name(0) == str(tmp_path / "cat" / "a.png")


def test_hugging_face_parquet_with_train_and_test(tmp_path):
    write_parquet(tmp_path / "set", [1, 2, 3])
    write_parquet(tmp_path / "set", [4], split="test")
    dataset = open_train(f"hfds/{tmp_path}/set", tmp_path / "cache")
    assert all_values(dataset) == [1, 2, 3]
    assert all_labels(dataset) == [1, 2, 0]
    assert dataset.classes == ("a", "b", "c")
    assert dataset.name(1) == "image 1"
    assert all_values(open_val_split(f"hfds/{tmp_path}/set", tmp_path / "cache")) == [4]


def test_hugging_face_folder_without_labels_and_val_split(tmp_path):
    write_grays(tmp_path / "set", [1, 2])
    name = f"hfds/{tmp_path}/set"
    dataset = open_train(name, tmp_path / "cache")
    assert all_values(dataset) == [1, 2]
    assert all_labels(dataset) == [None, None]
    with pytest.raises(InputError, match="have no labels"):
        check_classes(dataset, None, 2)
    assert dataset.name(0) == str(tmp_path / "set" / "001.png")
    assert open_val_split(name, tmp_path / "cache") is None


def skip_checksums(monkeypatch, module):
    """Let torchvision accept files other than the real ones, whose checksums it knows."""
    monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


def write_places(root, size):
    # Out of order, so that labels are not positions of sorted names.
    (root / "categories_places365.txt").write_text("/b/bog 1\n/a/arch 0\n/a/abbey 2\n")
    for split, folder, number in (("train_standard", "data_{}_standard", 1), ("val", "val_{}", 4)):
        files = [f"/{'x/' * (split != 'val')}{number + i:03d}.png" for i in range(3)]
        lines = [f"{file} {label}\n" for file, label in zip(files, (2, 0, 1), strict=True)]
        (root / f"places365_{split}.txt").write_text("".join(lines))
        folder = root / folder.format(size) / ("x" if split != "val" else "")
        write_grays(folder, range(number, number + 3))


@pytest.mark.parametrize(("size", "version"), [("256", "small"), ("large", "large")])
def test_places365_in_the_version_that_is_there(tmp_path, monkeypatch, caplog, size, version):
    skip_checksums(monkeypatch, places365)
    write_places(tmp_path, size)
    with caplog.at_level(logging.INFO):
        dataset = open_train("torch/places365", tmp_path)
    assert f"the {version} images in data_{size}_standard" in caplog.text
    assert all_values(dataset) == [1, 2, 3]
    assert all_labels(dataset) == [2, 0, 1]
    assert dataset.classes == ("/a/arch", "/b/bog", "/a/abbey")
    assert dataset.name(0) == str(tmp_path / f"data_{size}_standard/x/001.png")
    val_set = open_val_split("torch/Places365", tmp_path)
    assert all_values(val_set) == [4, 5, 6]
    assert check_classes(dataset, val_set, None) == 3


def test_incomplete_places365_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"data_large_standard not found in .*: extract Places365"):
        open_train("torch/places365", tmp_path)
    (tmp_path / "data_256_standard").mkdir()
    with pytest.raises(InputError, match="val_256 not found in"):
        open_val_split("torch/places365", tmp_path)
    with pytest.raises(InputError, match=r"download the files first.*categories_places365.txt"):
        open_train("torch/places365", tmp_path)


@pytest.mark.parametrize(
    ("name", "key"), [("cifar10", "label_names"), ("cifar100", "fine_label_names")]
)
def test_cifar(tmp_path, monkeypatch, name, key):
    skip_checksums(monkeypatch, cifar)
    source = {"cifar10": cifar.CIFAR10, "cifar100": cifar.CIFAR100}[name]
    folder = tmp_path / source.base_folder
    folder.mkdir()
    values = iter(range(1, 10))
    for file, _ in source.train_list + source.test_list:
        value = next(values)
        batch = {"data": np.full((1, 3072), value, np.uint8), "labels": [value % 3]}
        (folder / file).write_bytes(pickle.dumps(batch))
    (folder / source.meta["filename"]).write_bytes(pickle.dumps({key: ["owl", "ant", "elk"]}))
    dataset, val_set = (open_(f"torch/{name}", tmp_path) for open_ in (open_train, open_val_split))
    num_train = len(source.train_list)
    assert all_values(dataset) == list(range(1, num_train + 1))
    assert all_values(val_set) == [num_train + 1]
    assert all_labels(val_set) == [(num_train + 1) % 3]
    assert dataset.classes == val_set.classes == ("owl", "ant", "elk")
    assert dataset.num_classes == 3


def test_inaturalist_2021(tmp_path):
    ranks = "Animalia_Arthropoda_Insecta_Diptera_Family_Genus"
    classes = tuple(f"{number:05d}_{ranks}_species{number}" for number in range(3))
    for folder, values in (("2021_train", [1, 2, 3]), ("2021_valid", [4, 5, 6])):
        for name, value in zip(classes, values, strict=True):
            write_grays(tmp_path / folder / name, [value])
    dataset = open_train("torch/inat", tmp_path)
    assert (dataset.classes, all_labels(dataset)) == (classes, [0, 1, 2])
    assert all_values(open_val_split("torch/inat", tmp_path)) == [4, 5, 6]


def test_imagenet_goes_by_its_folder_names_because_others_are_not_unique(tmp_path):
    names = {"n01": ("crane",), "n02": ("crane", "derrick")}
    torch.save((names, []), tmp_path / "meta.bin")
    for split in ("train", "val"):
        for value, wnid in enumerate(names):
            write_grays(tmp_path / split / wnid, [value])
    for name in ("torch/imagenet", "folder"):
        for open_ in (open_train, open_val_split):
            dataset = open_(name, tmp_path)
            assert (dataset.classes, all_labels(dataset)) == (("n01", "n02"), [0, 1])


# Wrong input


def fill_nothing(path):
    pass


def fill_other_files(path):
    (path / "cat").mkdir()
    (path / "cat" / "notes.txt").write_text("meow")


def fill_empty_tar(path):
    write_tar(path / "images.tar", {})


def fill_broken_tar(path):
    (path / "images.tar").write_bytes(b"no tar" * 1000)


def fill_zip(path):
    (path / "images.zip").write_bytes(b"zip")


@pytest.mark.parametrize(
    ("fill", "name", "place", "advice"),
    [
        (fill_nothing, "", "", "give a folder of .jpg, .jpeg, .jpe, .jfif, .png and the like"),
        (fill_other_files, "", "", "(there are cat/notes.txt)"),
        (fill_empty_tar, "tar", "images.tar", "no images found in"),
        (fill_broken_tar, "", "images.tar", "is not a .tar archive: copy or pack it again"),
        (fill_zip, "", "images.zip", "unpack it once (unzip -q"),
        (fill_nothing, "", "missing", "missing does not exist: correct the path"),
        (fill_nothing, "", None, "give their path with --data_path"),
        (fill_nothing, "imagenet", "", "unknown --dataset imagenet: use folder, tar"),
        (fill_nothing, "foo/bar", "", "unknown --dataset foo/bar: use folder, tar"),
        (fill_nothing, "hfds/", "", "unknown --dataset hfds/: use"),
        (fill_nothing, "inat2019", None, "give their path with --data_path"),
        (fill_nothing, "torch/cifar10", "", "download the files first"),
        (fill_nothing, "torch/nonsense", "", "check the name"),
        (fill_nothing, "hfds/nobody/nothing", "", "check the name and the network"),
        (fill_nothing, "hfids/nobody/nothing", "", "check the name and the network"),
        (fill_nothing, "wds/", "", "name the shards, as in wds/train-{0000..0099}.tar"),
        (fill_nothing, "wds/a-{0..3}.tar", "", "give --num_samples"),
    ],
)
def test_wrong_input_is_one_sentence_that_says_what_to_change(tmp_path, fill, name, place, advice):
    fill(tmp_path)
    with pytest.raises(InputError) as error:
        open_train(name, None if place is None else tmp_path / place)
    assert advice in str(error.value)
    assert "\n" not in str(error.value)


def test_the_length_of_an_indexed_source_cannot_be_given(tmp_path):
    write_grays(tmp_path, [1])
    with pytest.raises(InputError, match=r"--num_samples is for streams, .*: leave it out"):
        open_train("", tmp_path, num_samples=5)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("hfds/x", "datasets"),
        ("hfids/x", "datasets"),
        ("wds/a-{0..1}.tar", "webdataset"),
        ("tfds/mnist", "tensorflow"),
        ("digits", "sklearn.datasets"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    for reader in ("hfds", "hfids", "tfds"):
        monkeypatch.delitem(sys.modules, f"timm.data.readers.reader_{reader}", raising=False)
    with pytest.raises(InputError, match=f"needs the package {package}: install it"):
        open_train(name, tmp_path, num_samples=None if name[0] in "hd" else 2)


# Training and validation images


def test_a_pair_has_its_own_transforms(tmp_path):
    write_grays(tmp_path / "train" / "cat", [1, 2])
    write_grays(tmp_path / "val" / "cat", [3])
    write_grays(tmp_path / "other", [4, 5])
    for val_path, values in ((None, [3]), (tmp_path / "other", [4, 5])):
        data = DataSettings(data_path=tmp_path, val_path=val_path)
        train_set, val_set = open_train_val(data, RANDOM, STILL, seed=SEED)
        assert (train_set.transform, train_set.seed) == (RANDOM, SEED)
        assert all_values(train_set) == [1, 2]
        assert val_set.transform is STILL
        assert all_values(val_set) == values


def test_a_pair_may_lack_validation_images_or_be_a_stream(tmp_path):
    write_shards(tmp_path, [2, 2])
    options = {"seed": SEED, "batch_size": 2}
    data = DataSettings(dataset="wds/train-{0..1}.tar", data_path=tmp_path, num_samples=4)
    train_set, val_set = open_train_val(data, RANDOM, STILL, **options)
    assert train_set.num_samples == 4
    assert val_set is None
    write_grays(tmp_path / "other_val", [7])
    data = replace(data, val_path=tmp_path / "other_val")
    assert all_values(open_train_val(data, RANDOM, STILL, **options)[1]) == [7]


@pytest.mark.parametrize(
    ("name", "data_path", "val_path"),
    [("", "", None), ("folder", None, "val"), ("digits", None, "val"), ("", "missing", "val")],
)
def test_evaluation_needs_no_training_images(tmp_path, name, data_path, val_path):
    write_grays(tmp_path / "val" / "cat", [1])
    write_grays(tmp_path / "val" / "dog", [2])
    data = DataSettings(
        dataset=name,
        data_path=None if data_path is None else tmp_path / data_path,
        val_path=val_path and tmp_path / val_path,
    )
    dataset = open_val(data, STILL, seed=SEED)
    assert all_values(dataset) == [1, 2]
    assert check_classes(None, dataset, None) == 2


# Broken images


def break_images(folder):
    """Replace images 1, 4, 5 and 7 of ten by files that are broken in every way."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
    jpeg, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG")
    Image.fromarray(pixels).save(png, "PNG")
    (folder / "001.png").write_bytes(b"")
    (folder / "004.png").write_text("not an image")
    (folder / "005.png").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    (folder / "007.png").write_bytes(png.getvalue()[: len(png.getvalue()) // 2])


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_broken_images_are_replaced_by_the_next_and_reported_every_time(tmp_path):
    write_grays(tmp_path, range(10))
    break_images(tmp_path)
    dataset = open_train("", tmp_path)
    assert all_values(dataset) == [0, 2, 2, 3, 6, 6, 6, 8, 8, 9]
    reports = [[report for b in eval_loader(dataset) for report in b.broken] for _ in range(2)]
    assert reports[0] == reports[1]
    names = [name.removeprefix(f"{tmp_path}/") for name, _ in reports[0]]
    assert names == ["001.png", "004.png", "005.png", "005.png", "007.png"]
    reasons = dict(zip(names, (reason for _, reason in reports[0]), strict=True))
    assert reasons["001.png"] == "an empty file"
    assert "truncated" in reasons["005.png"]


def test_the_last_image_is_replaced_by_the_first(tmp_path):
    write_grays(tmp_path, [1, 2])
    (tmp_path / "002.png").write_bytes(b"")
    assert all_values(open_train("", tmp_path)) == [1, 1]


def test_a_file_that_disappears_is_broken(tmp_path):
    write_grays(tmp_path, [1, 2])
    dataset = open_train("", tmp_path)
    (tmp_path / "001.png").unlink()
    assert all_values(dataset) == [2, 2]


def test_an_error_in_the_transform_is_not_mistaken_for_a_broken_image(tmp_path):
    write_grays(tmp_path, [1])
    with pytest.raises(ZeroDivisionError):
        open_train("", tmp_path, transform=Augmentation(lambda image: 1 / 0))[0, 0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_readable_ends_in_one_sentence(tmp_path, num_workers):
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(b"")
    sentence = sentence_of(train_loader(open_train("", tmp_path), num_workers=num_workers))
    assert sentence.startswith("3 images in a row cannot be read, the last being")
    assert "\n" not in sentence


def test_a_hundred_broken_images_in_a_row_are_enough(tmp_path):
    for index in range(150):
        (tmp_path / f"{index}.png").write_bytes(b"")
    with pytest.raises(InputError, match="100 images in a row"):
        open_train("", tmp_path)[0, 0]


def test_a_broken_file_is_named_once_and_counted_each_time(caplog):
    broken = BrokenImages(num_images=1000, max_fraction=0.01)
    broken.add([("a.png", "empty"), ("b.png", "empty")])
    broken.add([("a.png", "empty")])
    broken.check()
    assert caplog.text.count("a.png") == caplog.text.count("b.png") == 1
    assert broken.take_count() == 3
    assert broken.take_count() == 0
    broken.add([("a.png", "empty")])
    assert broken.count == 1
    assert caplog.text.count("a.png") == 1


def test_more_broken_files_than_allowed_stop_the_run_with_the_list():
    broken = BrokenImages(num_images=1000, max_fraction=0.01)
    broken.add([(f"{i}.png", "empty") for i in range(10)] * 5)
    broken.check()  # at the limit
    broken.add([(f"{i}.png", "empty") for i in range(25)])
    with pytest.raises(InputError) as error:
        broken.check()
    message = str(error.value)
    assert "25 of 1000 images (2.50%)" in message
    assert "limit of 1.00%" in message
    assert ", 1.png, 2.png" in message
    assert "19.png and 5 more" in message
    assert "20.png" not in message


def test_a_resumed_run_continues_to_count_broken_files(caplog):
    before, after = (BrokenImages(num_images=100, max_fraction=0.02) for _ in range(2))
    before.add([("a.png", "empty"), ("b.png", "empty")])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.count == 2
    caplog.clear()
    after.add([("a.png", "empty")])
    assert not caplog.text
    after.check()
    after.add([("c.png", "empty")])
    with pytest.raises(InputError, match="3 of 100"):
        after.check()


# Batches of indexed sources


def test_workers_change_nothing(tmp_path):
    write_noise(tmp_path, 11)
    (tmp_path / "class_0" / "004.png").write_bytes(b"")
    dataset = open_train("", tmp_path, RANDOM)
    runs = []
    for num_workers in (0, 1, 2):
        loader = train_loader(dataset, batch_size=3, accum_iter=2, num_workers=num_workers)
        runs.append(flat(loader.steps(0)) + flat(loader.steps(1)))
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    assert any(batch.broken for batch in runs[0])


def test_each_epoch_and_image_has_its_own_augmentation(tmp_path):
    write_noise(tmp_path, 1)
    dataset = open_train("", tmp_path, RANDOM)
    first, second = pixels_of(dataset[0, 0]), pixels_of(dataset[1, 0])
    assert not torch.equal(first, second)
    assert torch.equal(first, pixels_of(dataset[0, 0]))
    other_seed = build_dataset("", tmp_path, split="train", transform=RANDOM, seed=SEED + 1)
    assert not torch.equal(first, pixels_of(other_seed[0, 0]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_restart_gives_the_remaining_batches(tmp_path, num_workers):
    write_noise(tmp_path, 11)
    dataset = open_train("", tmp_path, RANDOM)
    loader = train_loader(dataset, accum_iter=2)
    assert loader.resumes_mid_epoch
    assert loader.effective_batch_size == 4
    full = list(loader.steps(3))
    assert [len(step) for step in full] == [2, 2, 2]
    assert [loader.images_in_step(step) for step in range(3)] == [4, 4, 3]
    fresh = train_loader(open_train("", tmp_path, RANDOM), accum_iter=2, num_workers=num_workers)
    for first_step in range(4):
        assert_same(flat(fresh.steps(3, first_step)), flat(full[first_step:]))


def test_an_abandoned_epoch_does_not_affect_the_next(tmp_path):
    write_noise(tmp_path, 20)
    loader = train_loader(open_train("", tmp_path, RANDOM), num_workers=2)
    full = flat(loader.steps(0))
    next(loader.steps(0))
    assert_same(flat(loader.steps(0)), full)


@pytest.mark.parametrize(("batch_size", "accum_iter", "world_size"), [(2, 1, 3), (1, 3, 2)])
def test_ranks_together_read_what_one_process_reads(tmp_path, batch_size, accum_iter, world_size):
    write_grays(tmp_path, range(13))
    dataset = open_train("", tmp_path)
    shape = {"batch_size": batch_size, "accum_iter": accum_iter, "world_size": world_size}
    ranks = [list(train_loader(dataset, rank=r, **shape).steps(0)) for r in range(world_size)]
    whole = list(train_loader(dataset, batch_size=6).steps(0))
    for step in range(2):  # the third has one image and stand-ins
        own = [value for rank in ranks for value in values_of(rank[step])]
        assert sorted(own) == sorted(values_of(whole[step]))
    assert [values_of(rank[2]) for rank in ranks] == [values_of(whole[2])] * world_size


def test_reading_neither_uses_nor_changes_global_random_state(tmp_path):
    write_noise(tmp_path, 7)
    first = flat(train_loader(open_train("", tmp_path, RANDOM)).steps(0))
    torch.manual_seed(123)
    random.seed(123)
    np.random.seed(123)  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    dataset = open_train("", tmp_path, RANDOM)
    assert_same(flat(train_loader(dataset).steps(0)), first)
    list(eval_loader(dataset))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(np.random.get_state()) == states[2]  # noqa: NPY002


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_reads_each_image_once_and_unpadded(tmp_path, num_workers):
    write_grays(tmp_path, range(7))
    dataset = open_train("", tmp_path)
    for world_size in (1, 3, 9):
        for rank in range(world_size):
            loader = eval_loader(
                dataset, batch_size=2, rank=rank, world_size=world_size, num_workers=num_workers
            )
            for _ in range(2):  # a loader can be used again
                assert values_of(loader) == list(range(7))[rank::world_size]


# Streams


def test_a_stream_reads_whole_steps_and_says_how_it_resumes(tmp_path, caplog):
    write_shards(tmp_path, [8, 6])
    with caplog.at_level(logging.INFO):
        loader = train_loader(open_shards(tmp_path, 14), accum_iter=2)
    assert "resumes at the start of an epoch" in caplog.text
    assert "fill a step (2 of 14 images)" in caplog.text
    assert not loader.resumes_mid_epoch
    assert (loader.steps_per_epoch, loader.effective_batch_size) == (3, 4)
    assert [loader.images_in_step(step) for step in range(3)] == [4, 4, 4]
    epochs = [list(loader.steps(epoch)) for epoch in range(2)]
    assert [[len(step) for step in epoch] for epoch in epochs] == [[2, 2, 2], [2, 2, 2]]
    values = [values_of(flat(epoch)) for epoch in epochs]
    assert all(len(set(epoch)) == 12 for epoch in values)
    assert values[0] != values[1]
    labels = [int(label) for batch in flat(epochs[0]) for label in batch.labels]
    assert labels == [value % 3 for value in values[0]]
    with pytest.raises(ValueError, match="only at 0"):
        loader.steps(0, first_step=1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_restarts_at_an_epoch_with_the_same_batches(tmp_path, num_workers):
    write_shards(tmp_path, [8, 6])
    first, second = (
        train_loader(open_shards(tmp_path, 12, transform=RANDOM), num_workers=num_workers)
        for _ in range(2)
    )
    epochs = [flat(first.steps(epoch)) for epoch in range(2)]
    torch.manual_seed(7)
    assert_same(flat(second.steps(1)), epochs[1])


def test_ranks_split_a_stream(tmp_path):
    write_shards(tmp_path, [4, 4])
    loaders = [train_loader(open_shards(tmp_path, 8), rank=r, world_size=2) for r in range(2)]
    values = [set(values_of(flat(loader.steps(0)))) for loader in loaders]
    assert values[0] | values[1] == set(range(1, 9))
    assert not values[0] & values[1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_exhausted_stream_starts_again_and_logs_it(tmp_path, caplog, num_workers):
    write_shards(tmp_path, [3, 2])
    loader = train_loader(open_shards(tmp_path, 12), num_workers=num_workers)
    values = values_of(flat(loader.steps(0)))
    assert len(values) == 12
    assert set(values[:5]) == set(values[5:10]) == {1, 2, 3, 4, 5}
    if num_workers == 0:  # a worker's log does not reach this process
        assert "has read all of its images (5) and starts over" in caplog.text


def test_unlabeled_shards(tmp_path):
    write_shards(tmp_path, [2, 2], labeled=False)
    batches = flat(train_loader(open_shards(tmp_path, 4)).steps(0))
    assert sorted(values_of(batches)) == [1, 2, 3, 4]
    assert {batch.labels for batch in batches} == {None}


def test_shards_listed_in_an_info_file(tmp_path):
    write_shards(tmp_path, [2, 3])
    shards = {"filenames": ["train-0.tar", "train-1.tar"], "shard_lengths": [2, 3]}
    split = {"name": "train", "num_samples": 5, **shards}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    dataset = open_train("wds/", tmp_path)
    assert dataset.num_samples == 5
    assert sorted(values_of(flat(train_loader(dataset, batch_size=5).steps(0)))) == [1, 2, 3, 4, 5]


def test_broken_images_and_shards_of_a_stream_are_named(tmp_path):
    write_shards(tmp_path, [2])
    write_tar(tmp_path / "train-1.tar", {"x.png": b"broken", "y.txt": b"", "z.png": encoded(9)})
    dataset = open_shards(tmp_path, 6, "train-{0..2}.tar")
    batches = flat(train_loader(dataset).steps(0))
    assert set(values_of(batches)) == {1, 2, 9}
    broken = {name.removeprefix(f"{tmp_path}/") for batch in batches for name, _ in batch.broken}
    assert broken == {"train-1.tar/x", "train-1.tar/y", "train-2.tar"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_with_nothing_readable_ends_in_one_sentence(tmp_path, num_workers):
    write_tar(tmp_path / "train-0.tar", {"x.png": b"broken"})
    sentence = sentence_of(
        train_loader(open_shards(tmp_path, 6, "train-0.tar"), num_workers=num_workers)
    )
    assert sentence.startswith(f"1 image in a row cannot be read, the last being {tmp_path}")
    assert "\n" not in sentence


def test_more_workers_than_shards_end_in_one_sentence(tmp_path):
    write_shards(tmp_path, [8])
    loader = train_loader(open_shards(tmp_path, 8, "train-0.tar"), num_workers=2)
    assert "lower --num_workers" in sentence_of(loader)


def test_a_stream_shorter_than_a_step_is_refused(tmp_path):
    write_shards(tmp_path, [2, 1])
    with pytest.raises(InputError, match="lower --batch_size or --accum_iter"):
        train_loader(open_shards(tmp_path, 3), batch_size=4)


def test_a_stream_has_no_val_split(tmp_path):
    write_shards(tmp_path, [2, 1])
    assert open_val_split("wds/train-{0..1}.tar", tmp_path, num_samples=3) is None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_hugging_face_streams_survive_broken_images(tmp_path, num_workers):
    write_grays(tmp_path / "set" / "cat", [1, 2, 3])
    write_grays(tmp_path / "set" / "dog", [4, 5, 6])
    (tmp_path / "set" / "cat" / "002.png").write_bytes(b"broken")
    runs = []
    for _ in range(2):
        dataset = open_train(f"hfids/{tmp_path}/set", tmp_path / "cache", num_samples=6)
        assert dataset.num_samples == 6
        loader = train_loader(dataset, num_workers=num_workers)
        epochs = [flat(loader.steps(epoch)) for epoch in ((0, 1), (1,))[len(runs)]]
        runs.append(epochs)
    values = [values_of(epoch) for epoch in runs[0]]
    assert set(values[0]) == {1, 3, 4, 5, 6}
    assert values[0] != values[1]
    assert_same(runs[0][1], runs[1][0])
    labels = [int(label) for batch in runs[0][0] for label in batch.labels]
    assert labels == [int(value > 3) for value in values[0]]
    broken = [name for batch in runs[0][0] for name, _ in batch.broken]
    assert str(tmp_path / "set" / "cat" / "002.png") in broken


def test_hugging_face_streams_without_labels(tmp_path):
    write_grays(tmp_path / "set", [1, 2, 3])
    dataset = open_train(f"hfids/{tmp_path}/set", tmp_path / "cache", num_samples=3)
    batches = flat(train_loader(dataset, batch_size=3).steps(0))
    assert sorted(values_of(batches)) == [1, 2, 3]
    assert batches[0].labels is None
