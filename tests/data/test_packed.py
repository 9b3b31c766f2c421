"""Packed images are read as they were written, in every process, or are refused."""

import json
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from util.data.damage import BrokenImageError
from util.data.datasets import build_dataset, open_val
from util.data.packed import (
    FIELDS,
    PIXELS,
    RECORDS,
    PackedImage,
    PackedImages,
    write_packed,
)
from util.data.values import read_values
from util.errors import InputError
from util.normalization import RGB8, PixelFormat
from util.settings.data import PACKED_INDEX, DataSettings, holds_packed

SIZES = [(5, 7), (1, 9), (300, 2)]
NAMES = ["cat/1.png", "cat/zwei und 2.webp", "ödnis/\udcff.jpg"]  # the last is not UTF-8
LABELS = [0, 0, 1]
CLASSES = ("cat", "ödnis")


def packed(name, label, array):
    return PackedImage(name, label, *array.shape[:2], array.dtype.str, array.tobytes())


def make_pixels():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@pytest.fixture
def folder(tmp_path):
    parts = zip(NAMES, LABELS, make_pixels(), strict=True)
    rows = [packed(name, label, array) for name, label, array in parts]
    write_packed(tmp_path / "train", rows, classes=CLASSES, short_side=2)
    return tmp_path / "train"


def test_what_was_written_is_read(folder):
    images = PackedImages(folder)
    assert len(images) == 3
    assert images.classes == CLASSES
    for index, pixels in enumerate(make_pixels()):
        found, label = images[index]
        assert type(found) is np.ndarray
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, pixels)
        assert label == LABELS[index]
        assert images.filename(index) == NAMES[index]
        assert images.filename(index, absolute=True) == f"{folder}/{NAMES[index]}"


def test_changing_an_image_changes_neither_the_file_nor_the_next_reading(folder):
    images = PackedImages(folder)
    images[0][0][:] = 0
    np.testing.assert_array_equal(images[0][0], make_pixels()[0])


def read(images, index):
    return images[index]


def test_another_process_maps_the_file_on_its_own(folder):
    images = PackedImages(folder)
    pixels, label = images[2]
    assert len(pickle.dumps(images)) < pixels.nbytes  # does not include the file
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(read, images, 2).result()
    np.testing.assert_array_equal(found[0], pixels)
    assert found[1] == label


def test_packed_folders_are_known_by_their_index(folder):
    assert holds_packed(folder)
    assert holds_packed(folder.parent)
    assert not holds_packed(folder.parent.parent)
    (folder / PACKED_INDEX).unlink()
    assert not holds_packed(folder.parent)


def test_packed_images_are_a_dataset_given_by_name_or_inferred(folder):
    shutil.copytree(folder, folder.parent / "val")
    options = {"transform": None, "seed": 0}
    assert DataSettings(data_path=folder.parent).name == "packed"
    assert DataSettings(val_path=folder).name == "packed"
    for name in ("", "packed", "Packed"):
        for path in (folder, folder.parent):
            images = build_dataset(name, path, split="train", **options)
            assert (len(images), images.classes) == (3, CLASSES)
            assert images.name(0) == f"{folder}/cat/1.png"
        assert build_dataset(name, folder, split="validation", **options) is None
        val_set = build_dataset(name, folder.parent, split="validation", **options)
        assert val_set.reader.root == folder.parent / "val"
    # They are accepted wherever a folder of images is.
    val_set = open_val(DataSettings(dataset="digits", val_path=folder.parent / "val"), **options)
    assert val_set.reader.root == folder.parent / "val"


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        (None, "give their path with --data_path"),
        ("nowhere", "nowhere does not exist: correct the path"),
        (".", "packed.json does not exist: use a folder that scripts/prepare_dataset.py has"),
    ],
)
def test_a_wrong_path_is_refused_in_one_sentence(tmp_path, path, advice):
    with pytest.raises(InputError) as error:
        build_dataset("packed", path and tmp_path / path, split="train", transform=None, seed=0)
    assert advice in str(error.value)
    assert "\n" not in str(error.value)


def change_index(folder, **changes):
    index = json.loads((folder / PACKED_INDEX).read_text())
    (folder / PACKED_INDEX).write_text(json.dumps({**index, **changes}))


def change_record(folder, field, value):
    records = np.load(folder / RECORDS)
    records[field][1] = value
    np.save(folder / RECORDS, records)


def shorten(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("damage", "advice"),
    [
        (lambda f: shorten(f / PIXELS, 1000), "has 1000 bytes, but packed.json says 1932"),
        (lambda f: shorten(f / RECORDS, 200), "prepare them again"),
        (lambda f: shorten(f / RECORDS, 0), "prepare them again"),
        (
            lambda f: np.save(f / RECORDS, np.load(f / RECORDS)[:2]),
            "has 2 records, but packed.json says 3",
        ),
        (lambda f: np.save(f / RECORDS, np.zeros(3)), "records.npy is damaged"),
        (lambda f: np.save(f / RECORDS, np.array([{}] * 3)), "prepare them again"),
        *(
            (lambda f, field=field: change_record(f, field, 99), "records.npy is damaged")
            for field, _ in FIELDS
        ),
        (lambda f: change_record(f, "height", -1), "records.npy is damaged"),
        (lambda f: change_record(f, "label", -1), "records.npy is damaged"),
        (lambda f: change_index(f, version=3), "has version 3 of the packed format"),
        (lambda f: change_index(f, channels=1), "records.npy is damaged"),
        (lambda f: change_index(f, bytes=1), "has 1932 bytes, but packed.json says 1:"),
        (lambda f: change_index(f, images="3"), "has 3 records, but packed.json says 3"),
        (lambda f: change_index(f, classes=["cat"]), "records.npy is damaged"),
        (lambda f: (f / PACKED_INDEX).write_text("{}"), "(KeyError: 'version')"),
        (lambda f: (f / PACKED_INDEX).write_text("[]"), "(TypeError"),
        (lambda f: (f / PACKED_INDEX).write_bytes(b"\xff"), "prepare them again"),
        (lambda f: (f / PIXELS).unlink(), "pixels.bin does not exist: use a folder"),
        (lambda f: (f / RECORDS).unlink(), "records.npy does not exist"),
        (lambda f: shutil.rmtree(f), "packed.json does not exist"),
    ],
)
def test_damaged_or_foreign_files_are_refused_at_opening(folder, damage, advice):
    damage(folder)
    with pytest.raises(InputError) as error:
        PackedImages(folder)
    assert advice in str(error.value)
    assert "\n" not in str(error.value)


# Other channels and types


DTYPES = ("uint8", "uint16", "int16", "float32")


@pytest.fixture
def bands(tmp_path):
    """A function that packs images, one of each type; returns the folder and their values."""

    def pack(dtypes=DTYPES, channels=5):
        rng = np.random.default_rng(0)
        arrays = [
            rng.integers(0, 120, (3 + i, 5, channels)).astype(dtype)
            for i, dtype in enumerate(dtypes)
        ]
        rows = [packed(f"a/{i}.tif", 0, array) for i, array in enumerate(arrays)]
        write_packed(tmp_path / "own", rows, classes=["a"], short_side=2, channels=channels)
        return tmp_path / "own", arrays

    return pack


def test_values_of_every_type_are_read_as_they_were_written(bands):
    folder, arrays = bands()
    images = PackedImages(folder)
    assert (images.channels, images.dtypes) == (5, ("<f4", "<i2", "<u2", "|u1"))
    for index, array in enumerate(arrays):
        found, _ = images[index]
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def open_as(folder, pixels):
    return build_dataset("", folder, split="train", transform=None, seed=0, pixels=pixels)


def test_other_images_than_8_bit_rgb_are_not_read_as_such(bands):
    folder, _ = bands(["uint8", "uint16"])
    with pytest.raises(InputError, match=r"5 channels \(uint16 and uint8\): give --channels 5$"):
        open_as(folder, RGB8)
    pixels = PixelFormat(channels=5)
    images = open_as(folder, pixels)
    assert read_values(images.stored(1)[0], pixels).dtype == torch.uint16
    with pytest.raises(BrokenImageError, match="it has 5 channels, but --channels is 4"):
        read_values(images.stored(1)[0], PixelFormat(channels=4))


def test_8_bit_rgb_is_written_as_earlier_code_reads_it(folder):
    index = json.loads((folder / PACKED_INDEX).read_text())
    assert list(index) == ["version", "images", "bytes", "short_side", "classes"]
    assert index["version"] == 1
    assert np.load(folder / RECORDS).dtype.names == ("offset", "height", "width", "label", "name")


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: change_index(f, channels=4),
        lambda f: change_index(f, dtypes=["<u2"]),
        lambda f: change_record(f, "dtype", b"<f4"),
        lambda f: change_record(f, "dtype", b"|O8"),
    ],
)
def test_damaged_types_are_refused_at_opening(bands, damage):
    folder, _ = bands(["uint8", "uint16"])
    damage(folder)
    with pytest.raises(InputError, match=r"records.npy is damaged"):
        PackedImages(folder)
