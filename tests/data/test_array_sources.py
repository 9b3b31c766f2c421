"""Arrays of NumPy and TIFF files of many channels are found in every source, if that is stated."""

import io

import datasets
import numpy as np
import pytest
import tifffile

from tests.helpers.data import (
    CPU,
    all_labels,
    eval_loader,
    open_train,
    train_loader,
    write_grays,
    write_tar,
)
from util.data.datasets import open_train_val
from util.data.layout import images_below
from util.data.report import describe
from util.data.transforms import eval_transform
from util.errors import InputError
from util.normalization import PixelFormat
from util.settings.data import DataSettings

TWO = PixelFormat(channels=2)
STILL = eval_transform((8, 8), (0.0, 0.0), (1.0, 1.0), pixels=TWO)
NAMES = ("cat/a.npy", "cat/b.NPZ", "dog/c.tif")

pytestmark = pytest.mark.usefixtures("offline")


def encoded(name, value):
    """Image file of two channels, a value and its double."""
    pixels, file = np.tile(np.uint16([value, 2 * value]), (8, 8, 1)), io.BytesIO()
    if name.endswith(".tif"):
        tifffile.imwrite(file, np.moveaxis(pixels, 2, 0), photometric="minisblack")
    else:
        (np.save if name.endswith(".npy") else np.savez)(file, pixels)
    return file.getvalue()


FILES = {name: encoded(name, value) for value, name in enumerate(NAMES, start=1)}


def write_files(folder, files=FILES):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def values_of(batches):
    """The value of each image, whose second channel is its double."""
    pixels = np.concatenate([batch.to(CPU)[0][:, :, 0, 0].numpy() for batch in batches])
    first, second = np.round(pixels * 65535).astype(int).T
    assert (second == 2 * first).all()
    return first.tolist()


def opened(name, path, **options):
    return open_train(name, path, STILL, pixels=TWO, **options)


def test_in_folders_and_archives(tmp_path):
    write_files(tmp_path / "images")
    write_tar(tmp_path / "images.tar", FILES)
    for path in (tmp_path / "images", tmp_path / "images.tar"):
        images = opened("", path)
        assert values_of(eval_loader(images)) == [1, 2, 3]
        assert all_labels(images) == [0, 0, 1]
        assert images.classes == ("cat", "dog")
    below = images_below(tmp_path / "images", arrays=True)
    assert [path.name for path in below] == ["a.npy", "b.NPZ", "c.tif"]
    assert [path.name for path in images_below(tmp_path / "images")] == ["c.tif"]


@pytest.mark.parametrize("suffixes", [True, False])
def test_in_a_table(tmp_path, suffixes):
    write_files(tmp_path)
    names = NAMES if suffixes else [name.split(".")[0] for name in NAMES]
    lines = ["path,label", *(f"{name},{name[:3]}" for name in names)]
    (tmp_path / "images.csv").write_text("\n".join(lines))
    settings = DataSettings(data_csv=str(tmp_path / "images.csv"), channels=2)
    images, _ = open_train_val(settings, STILL, STILL, seed=0)
    assert values_of(eval_loader(images)) == [1, 2, 3]


def test_in_shards(tmp_path):
    files = {f"{number}.{name.split('.')[1]}": FILES[name] for number, name in enumerate(NAMES)}
    labels = {f"{number}.cls": str(number).encode() for number in range(3)}
    write_tar(tmp_path / "train-0.tar", dict(sorted((files | labels).items())))
    images = opened("wds/train-0.tar", tmp_path, num_samples=3)
    batches = [batch for step in train_loader(images, batch_size=3).steps(0) for batch in step]
    assert sorted(values_of(batches)) == [1, 2, 3]
    assert images.unlabeled is None


def test_in_a_column_of_bytes(tmp_path):
    features = datasets.Features({"image": datasets.Value("binary")})
    table = datasets.Dataset.from_dict({"image": list(FILES.values())}, features)
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    images = opened(f"hfds/{tmp_path}/set", tmp_path / "cache")
    assert values_of(eval_loader(images)) == [1, 2, 3]


def test_the_training_and_validation_images_of_settings_may_be_arrays(tmp_path):
    write_files(tmp_path / "train")
    write_files(tmp_path / "val", {name: encoded(name, 9) for name in NAMES})
    settings = DataSettings(data_path=str(tmp_path), channels=2)
    train, val = open_train_val(settings, STILL, STILL, seed=0)
    assert values_of(eval_loader(train)) == [1, 2, 3]
    assert values_of(eval_loader(val)) == [9, 9, 9]
    given = DataSettings(
        data_path=str(tmp_path / "train"), val_path=str(tmp_path / "val"), channels=2
    )
    assert len(open_train_val(given, STILL, STILL, seed=0)[1]) == 3


def test_unless_channels_are_stated_arrays_are_no_images(tmp_path):
    write_files(tmp_path / "arrays", {"a.npy": FILES["cat/a.npy"], "b.npy": FILES["cat/a.npy"]})
    write_tar(tmp_path / "arrays.tar", {"a.npz": FILES["cat/b.NPZ"]})
    advice = "of NumPy; if these are images, give the number of their channels by --channels"
    for place, files in (
        ("arrays", "a.npy, b.npy are arrays"),
        ("arrays.tar", "a.npz is an array"),
    ):
        with pytest.raises(InputError) as caught:
            open_train("", tmp_path / place)
        assert str(caught.value) == f"no images found in {tmp_path / place}: {files} {advice}"
    write_grays(tmp_path / "arrays", [1, 2])
    images = open_train("", tmp_path / "arrays")
    assert (len(images), describe(images)["other_suffixes"]) == (2, {".npy": 2})


def test_an_array_in_a_table_of_8_bit_images_is_broken_and_says_what_to_give(tmp_path):
    write_files(tmp_path)
    write_grays(tmp_path, [7])
    (tmp_path / "images.csv").write_text("path\n007.png\ncat/a.npy\n")
    images, _ = open_train_val(
        DataSettings(data_csv=str(tmp_path / "images.csv")),
        eval_transform((8, 8), (0.0,) * 3, (1.0,) * 3),
        None,
        seed=0,
    )
    reason = "an array of NumPy: give the number of its channels by --channels"
    assert images[0, 1].broken == [(f"{tmp_path}/cat/a.npy", reason)]


def test_pages_that_are_channels_are_not_told_as_left_out(tmp_path):
    write_files(tmp_path, {"a.tif": FILES["dog/c.tif"]})
    assert describe(opened("", tmp_path))["notes"] == []
    further = "1 TIFF file has further pages, which are not read (--channels N reads N as channels)"
    assert describe(open_train("", tmp_path))["notes"] == [further]
    stack = np.zeros((3, 2, 8, 8), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", stack, ome=True, metadata={"axes": "TCYX"})
    assert describe(opened("", tmp_path))["notes"] == [further]
