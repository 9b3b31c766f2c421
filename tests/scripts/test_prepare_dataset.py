"""Prepared images are those of the folder, resized, with the same names, labels and classes."""

import errno
import json
import signal

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torchvision.transforms import InterpolationMode, v2

from scripts import prepare_dataset
from scripts.prepare_dataset import jpeg_names, main
from tests.helpers.data import encoded, write_tar
from tests.helpers.files import files_in, write_classes
from tests.helpers.models import use_nano_models
from tests.helpers.processes import command, finish, start
from tests.helpers.runs import TINY, assert_identical, log_without_time, refusal, run, run_until
from util.data.batch import Box, resize_crop
from util.data.classes import check_classes
from util.data.datasets import build_dataset, open_train_val
from util.data.decode import read_rgb
from util.data.values import read_values
from util.errors import InputError
from util.normalization import PixelFormat
from util.runs.checkpoint import list_checkpoints, read_checkpoint
from util.settings.data import DataSettings

SIDE = 24
FORMATS = ["jpeg", "raw"]


def photo(width, height, seed=0):
    """Return an image that JPEG preserves well, with slowly changing colors."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Images of every kind in class folders; numeric names that sort differently as text."""
    folder = tmp_path_factory.mktemp("images")
    for split, classes in (("train", ("2", "10", "cat")), ("val", ("2", "10", "cat"))):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in (1, 2, 10):
                image = photo(40 + index, 30 + number, seed=10 * number + index)
                image.save(folder / split / name / f"{index}.png")
    train = folder / "train" / "cat"
    photo(20, 30).save(train / "small.jpg", quality=50)
    photo(60, 90).save(train / "large.jpg")
    photo(20, 20).save(train / "small.webp", lossless=True)
    photo(90, 30).convert("L").save(train / "gray.jpg")
    Image.fromarray(np.full((50, 60), 100 * 257, np.uint16)).save(train / "16bit.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo(80, 50).save(train / "turned.jpg", exif=exif)
    return folder


@pytest.fixture(scope="session")
def prepared(images, tmp_path_factory):
    """The images in both formats."""
    folder = tmp_path_factory.mktemp("prepared")
    for form in FORMATS:
        prepare(images, folder / form, "--format", form)
    return folder


def prepare(images, out, *options):
    argv = ["--data_path", images, "--output_dir", out, "--short_side", SIDE]
    run(*argv, "--num_workers", 0, *options, main=main)


def opened(path, split="train"):
    return build_dataset("", path, split=split, transform=None, seed=0)


def names_of(images):
    return [images.reader.filename(index) for index in range(len(images))]


def pixels_of(images, index):
    record, label = images.reader[index]
    if not isinstance(record, np.ndarray):
        record = np.asarray(read_rgb(record))
    return record, label


def resized(pixels):
    """Resize pixels with torchvision."""
    if min(pixels.shape[:2]) <= SIDE:
        return pixels
    resize = v2.Resize(SIDE, InterpolationMode.BICUBIC, antialias=True)
    return np.asarray(resize(Image.fromarray(pixels)))


# Results


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_names_labels_classes_and_pixels_are_those_of_the_folder(images, prepared, form, split):
    originals, results = opened(images, split), opened(prepared / form, split)
    assert results.classes == originals.classes == ("2", "10", "cat")
    assert check_classes(originals, results, None) == 3
    names = names_of(originals)
    if form == "jpeg":
        names = jpeg_names(names)
    assert sorted(names_of(results)) == sorted(names)
    for index, name in enumerate(names_of(results)):
        found, label = pixels_of(results, index)
        pixels, expected_label = pixels_of(originals, names.index(name))
        assert label == expected_label
        expected = resized(pixels)
        assert found.shape == expected.shape
        distance = np.abs(found.astype(int) - expected).mean()
        assert distance <= (3 if form == "jpeg" else 0), name


def test_packed_images_keep_the_order_of_the_folder(images, prepared):
    assert names_of(opened(prepared / "raw")) == names_of(opened(images))


def test_a_small_jpeg_is_copied_byte_for_byte_and_nothing_is_enlarged(images, prepared):
    results = opened(prepared / "jpeg")
    by_name = {name: index for index, name in enumerate(names_of(results))}
    file, _ = results.reader[by_name["cat/small.jpg.jpg"]]
    assert file.read() == (images / "train" / "cat" / "small.jpg").read_bytes()
    small, _ = pixels_of(results, by_name["cat/small.webp.jpg"])
    assert small.shape == (20, 20, 3)
    turned, _ = pixels_of(results, by_name["cat/turned.jpg"])
    assert turned.shape == (SIDE * 80 // 50, SIDE, 3)


def test_two_names_never_become_one():
    names = ["a/1.png", "a/1.jpg", "b/1.png", "c/1.2.tif", "1"]
    assert jpeg_names(names) == ["a/1.png.jpg", "a/1.jpg.jpg", "b/1.jpg", "c/1.2.jpg", "1.jpg"]


@pytest.mark.parametrize("form", FORMATS)
def test_the_result_is_the_same_for_any_number_of_processes(images, prepared, tmp_path, form):
    for num_workers in (1, 2):
        out = tmp_path / str(num_workers)
        prepare(images, out, "--format", form, "--num_workers", num_workers)
        assert files_in(out) == files_in(prepared / form)


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_without_classes_and_splits(images, tmp_path, form):
    flat = images / "train" / "2"
    prepare(flat, tmp_path / "out", "--format", form)
    for results in (opened(tmp_path / "out"), opened(flat)):
        assert len(results) == 3
        assert not results.labeled
        assert results.classes is None
    assert opened(tmp_path / "out", "validation") is None


def test_val_path_may_name_prepared_images(images, prepared):
    for place in ("raw/val", "jpeg/val.tar"):
        data = DataSettings(dataset="folder", data_path=images, val_path=prepared / place)
        train_set, val_set = open_train_val(data, None, None, seed=0)
        assert (len(train_set), len(val_set)) == (15, 9)
        assert check_classes(train_set, val_set, None) == 3


def test_classes_that_are_not_clear_are_not_guessed(tmp_path, capsys):
    for name in ("cats/gray", "dogs/gray", "red"):
        (tmp_path / "images" / name).mkdir(parents=True)
        photo(9, 9).save(tmp_path / "images" / name / "1.png")
    prepare(tmp_path / "images", tmp_path / "jpeg")
    with pytest.raises(InputError, match="2 folders are named gray"):
        check_classes(opened(tmp_path / "jpeg"), None, None)
    argv = [
        "--data_path",
        tmp_path / "images",
        "--output_dir",
        tmp_path / "raw",
        "--format",
        "raw",
    ]
    assert "2 folders are named gray" in refusal(capsys, *argv, main=main)
    prepare(tmp_path / "images", tmp_path / "raw", "--format", "raw", "--class_folder", "first")
    assert opened(tmp_path / "raw").classes == ("cats", "dogs", "red")


@pytest.mark.parametrize("form", FORMATS)
def test_pretraining_resumes_within_an_epoch_bit_for_bit(tmp_path, monkeypatch, form):
    use_nano_models(monkeypatch)
    write_classes(tmp_path / "images")
    prepare(tmp_path / "images", tmp_path / "data", "--format", form)
    argv = [*TINY, "--data_path", tmp_path / "data", "--save_every_minutes", 0, "--log_every", 1]
    run(*argv, "--output_dir", tmp_path / "whole")
    run_until(3, monkeypatch, *argv, "--output_dir", tmp_path / "parts")
    run(*argv, "--num_workers", 1, "--output_dir", tmp_path / "parts")
    states = [
        read_checkpoint(list_checkpoints(tmp_path / name)[-1], "pretrain")["model"]
        for name in ("whole", "parts")
    ]
    assert_identical(*states)
    logs = [log_without_time(tmp_path / name) for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert logs[0][-1]["val_images"] == 12
    settings = json.loads((tmp_path / "whole" / "args.json").read_text())
    assert settings["args"]["dataset"] is None


def test_the_older_name_of_raw_pixels_is_understood(images, prepared, tmp_path):
    prepare(images, tmp_path / "uint8", "--format", "uint8")
    assert files_in(tmp_path / "uint8") == files_in(prepared / "raw")


# Other channels and types


@pytest.fixture
def bands(tmp_path):
    """Images of five channels, 16 bits; one is smaller than the rest, and one is 8 bits."""
    rng = np.random.default_rng(0)
    for name, (height, width), dtype in [
        ("a/large", (60, 90), np.uint16),
        ("a/small", (20, 30), np.uint16),
        ("b/bytes", (40, 30), np.uint8),
    ]:
        coarse = rng.integers(0, np.iinfo(dtype).max, (3, 3, 5)).astype(np.float32)
        array = resize_crop(
            torch.from_numpy(coarse).permute(2, 0, 1), Box(0, 0, 3, 3), (height, width)
        )
        path = tmp_path / "bands" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array.permute(1, 2, 0).numpy().clip(0, np.iinfo(dtype).max).astype(dtype))
    return tmp_path / "bands"


def test_own_values_are_resized_and_keep_their_channels_and_types(bands, tmp_path, capsys):
    prepare(bands, tmp_path / "out", "--channels", 5)
    assert (
        f"train on it with --data_path {tmp_path / 'out'} --channels 5\n" in capsys.readouterr().out
    )
    pixels = PixelFormat(channels=5)
    originals, results = (
        build_dataset("", path, split="train", transform=None, seed=0, pixels=pixels)
        for path in (bands, tmp_path / "out")
    )
    assert results.classes == ("a", "b")
    shapes = []
    for index in range(3):
        values = read_values(originals.stored(index)[0], pixels)
        found = read_values(results.stored(index)[0], pixels)
        assert found.dtype == values.dtype
        if min(values.shape[1:]) > SIDE:
            values = resize_crop(values, Box(0, 0, *values.shape[1:]), found.shape[1:])
        assert torch.equal(found.int(), values.int())
        shapes.append(tuple(found.shape))
    assert shapes == [(5, SIDE, 36), (5, 20, 30), (5, 32, SIDE)]


def test_values_that_are_not_finite_are_left_out_and_listed(bands, tmp_path):
    np.save(bands / "b" / "nan.npy", np.full((9, 9, 5), np.nan, np.float32))
    prepare(bands, tmp_path / "out", "--channels", 5, "--max_broken", 0.5)
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert record["channels"] == 5
    left_out = record["splits"]["train"]["left_out"]
    assert left_out == {str(bands / "b" / "nan.npy"): "NaN or infinite values"}


def test_pretraining_on_prepared_values_is_that_on_the_files(bands, tmp_path, monkeypatch):
    use_nano_models(monkeypatch)
    own = ["--channels", 5, "--value_range", 0, 65535, "--val_fraction", 0]
    prepare(bands, tmp_path / "data", "--short_side", 90, *own[:5])
    for name, path in (("files", bands), ("packed", tmp_path / "data")):
        run(*TINY, *own, "--data_path", path, "--output_dir", tmp_path / name)
    states = [
        read_checkpoint(list_checkpoints(tmp_path / name)[-1], "pretrain")["model"]
        for name in ("files", "packed")
    ]
    assert_identical(*states)


def test_jpeg_files_of_other_images_are_refused(bands, tmp_path, capsys):
    argv = ["--data_path", bands, "--output_dir", tmp_path / "out", "--channels", 5]
    assert "use --format raw" in refusal(capsys, *argv, "--format", "jpeg", main=main)
    assert not (tmp_path / "out").exists()


# Broken images


@pytest.fixture
def broken(tmp_path):
    """Ten images of two classes; one image is truncated."""
    for index in range(10):
        path = tmp_path / "broken" / "ab"[index % 2] / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(30, 30, seed=index).save(path)
    path = tmp_path / "broken" / "b" / "5.jpg"
    path.write_bytes(path.read_bytes()[:400])
    return tmp_path / "broken"


def test_broken_images_stop_it_and_nothing_is_left(broken, tmp_path, capsys):
    argv = ["--data_path", broken, "--output_dir", tmp_path / "out", "--num_workers", 2]
    sentence = refusal(capsys, *argv, main=main)
    assert "1 of 10 images (10.00%) cannot be read, above the limit of 1.00%" in sentence
    assert f"or raise --max_broken: {broken}/b/5.jpg" in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("form", FORMATS)
def test_broken_images_below_the_limit_are_left_out_and_listed(broken, tmp_path, capsys, form):
    prepare(broken, tmp_path / "out", "--format", form, "--max_broken", 0.1)
    assert f"left out: {broken}/b/5.jpg (truncated" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())["splits"]["train"]
    assert record["images"] == 9
    assert list(record["left_out"]) == [f"{broken}/b/5.jpg"]
    results = opened(tmp_path / "out")
    labels = [results.reader[index][1] for index in range(len(results))]
    assert dict(zip(names_of(results), labels, strict=True)) == {
        f"{'ab'[i % 2]}/{i}.jpg": i % 2 for i in range(10) if i != 5
    }


def test_a_class_is_not_lost_because_that_would_shift_labels(tmp_path, capsys):
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        photo(9, 9).save(tmp_path / "images" / name / "1.png")
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"")
    argv = ["--data_path", tmp_path / "images", "--output_dir", tmp_path / "out"]
    sentence = refusal(capsys, *argv, "--max_broken", 1, main=main)
    assert "no image of the class 'a' can be read" in sentence


# Faults


def test_a_killed_preparation_leaves_nothing_that_looks_finished(images, tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, signal, scripts.prepare_dataset as p\n"
        "p.write_checksums = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"p.main(['--data_path', {str(images)!r}, '--output_dir', {str(out)!r}])"
    )
    assert finish(start(command("-c", code)))[0] == -signal.SIGKILL
    assert not out.exists()
    prepare(images, out)  # leftover files are not in the way
    run("--verify", "--output_dir", out, main=main)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(images, tmp_path, capsys, monkeypatch):
    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_dataset, "write_checksums", fail)
    argv = ["--data_path", images, "--output_dir", tmp_path / "out", "--num_workers", 0]
    assert "No space left on device" in refusal(capsys, *argv, main=main)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_result_is_not_overwritten(images, prepared, capsys):
    before = files_in(prepared)
    argv = ["--data_path", images, "--output_dir", prepared / "jpeg", "--num_workers", 0]
    assert "exists: delete it first" in refusal(capsys, *argv, main=main)
    assert files_in(prepared) == before


@pytest.mark.parametrize(
    ("argv", "advice"),
    [
        ([], "give --data_path and --output_dir, or --verify and --output_dir"),
        (["--data_path", "IMAGES"], "give --data_path and --output_dir"),
        (["--data_path", "nowhere", "--output_dir", "OUT"], "nowhere does not exist"),
        (["--data_path", "EMPTY", "--output_dir", "OUT"], "no images found in"),
        (["--data_path", "IMAGES/val", "--output_dir", "OUT/deeper"], "cannot write"),
        (["--data_path", "PREPARED/raw", "--output_dir", "OUT"], "no images found in"),
        (["--verify", "--output_dir", "IMAGES"], "checksums.txt cannot be read"),
        (["--verify", "IMAGES"], "stands without a flag: write --output_dir before it"),
        (["--verify", "--output_dir", "IMAGES", "--data_path", "IMAGES"], "leave --data_path out"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(images, prepared, tmp_path, capsys, argv, advice):
    (tmp_path / "empty").mkdir()
    places = {"IMAGES": images, "PREPARED": prepared, "EMPTY": tmp_path / "empty"}
    places["OUT"] = tmp_path / "out"
    for name, place in places.items():
        argv = [word.replace(name, str(place)) for word in argv]
    assert advice in refusal(capsys, *argv, main=main)
    assert not (tmp_path / "out").exists()


def test_label_files_are_not_lost(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", {"1.png": encoded(1), "1.cls": b"0"})
    argv = ["--data_path", tmp_path / "a.tar", "--output_dir", tmp_path / "out"]
    assert "labels in .cls files would be lost" in refusal(capsys, *argv, main=main)


@pytest.mark.parametrize("quality", ["0", "101", "x"])
def test_an_invalid_jpeg_quality_is_refused(capsys, quality):
    with pytest.raises(SystemExit) as caught:
        main(["--quality", quality])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# Checksums


@pytest.mark.parametrize("form", FORMATS)
def test_verify_finds_a_flipped_byte_in_any_file(prepared, tmp_path, capsys, form):
    run("--verify", "--output_dir", prepared / form, main=main)
    files = files_in(prepared / form)
    assert len(files) == {"jpeg": 4, "raw": 8}[form]
    for name, content in files.items():
        for position in {0, len(content) // 2, len(content) - 1}:
            for other, whole in files.items():
                path = tmp_path / form / other
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(whole)
            flipped = bytearray(content)
            flipped[position] ^= 1
            (tmp_path / form / name).write_bytes(flipped)
            sentence = refusal(
                capsys, "--verify", "--output_dir", tmp_path / form, main=main, code=1
            )
            assert "damaged" in sentence
            assert name in sentence or name == "checksums.txt"


def test_verify_checks_every_file(prepared, tmp_path, capsys):
    files = files_in(prepared / "jpeg")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "val.tar").unlink()
    assert "val.tar" in refusal(capsys, "--verify", "--output_dir", tmp_path, main=main, code=1)
    (tmp_path / "val.tar").write_bytes(files["val.tar"])
    lines = (tmp_path / "checksums.txt").read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        (tmp_path / "checksums.txt").write_text("".join(lines[:kept]))
        refusal(capsys, "--verify", "--output_dir", tmp_path, main=main, code=1)
