"""The benchmark of the loader runs, and reports different pixels."""

import json
import tarfile

import pytest
from PIL import Image

from scripts import benchmark_loader
from scripts.benchmark_loader import main, pixel_difference, summarize
from tests.helpers.files import write_images
from tests.helpers.runs import refusal, run

QUICK = ["--rounds", 2, "--num_images", 12, "--batch_size", 4, "--input_size", 16]


@pytest.fixture
def photos(tmp_path):
    """JPEG files, one with an EXIF rotation, of a size at which rounding does not matter."""
    folder = write_images(tmp_path / "photos" / "cat", 5, size=60)
    for path in list(folder.iterdir()):
        exif = Image.Exif()
        exif[0x0112] = 6 if path.stem == "000" else 1
        Image.open(path).save(path.with_suffix(".jpg"), quality=95, exif=exif)
        path.unlink()
    return folder.parent


@pytest.mark.parametrize("num_workers", [0, 1])
def test_it_measures_every_loader(tmp_path, photos, capsys, num_workers):
    path = tmp_path / "report.json"
    argv = ["--data_path", photos, "--also", photos / "cat", "--num_workers", num_workers]
    run(*argv, *QUICK, "--json", path, main=main)
    out = capsys.readouterr().out
    report = json.loads(path.read_text())
    names = ["Pillow and torchvision v1", "this project", "this project, --repeated_aug 4"]
    assert list(report["results"]) == [*names, f"this project, {photos / 'cat'}"]
    for name, result in report["results"].items():
        assert len(report["rounds"][name]) == 2
        assert 0 < result["slowest"] <= result["images_per_second"] <= result["fastest"]
        assert f"| {name} | {result['images_per_second']:.0f} |" in out
    assert report["results"][names[0]]["ratio"] == 1
    assert 0 <= report["pixel_difference"] < 0.1
    assert {"commit", "torch", "torchvision"} <= set(report["versions"])
    assert report["args"]["num_workers"] == num_workers
    assert report["machine"]["cores"] > 0 and report["machine"]["cpu"]
    assert report["rounds_done"] == 2


@pytest.mark.faults
def test_a_benchmark_that_is_stopped_keeps_the_rounds_it_has_measured(
    tmp_path, photos, monkeypatch
):
    calls = []

    def stop_or_measure(*_):
        calls.append(0)
        if len(calls) == 5:  # there are three loaders
            raise KeyboardInterrupt
        return float(len(calls))

    monkeypatch.setattr(benchmark_loader, "images_per_second", stop_or_measure)
    path = tmp_path / "report.json"
    with pytest.raises(KeyboardInterrupt):
        run("--data_path", photos, *QUICK, "--num_workers", 0, "--json", path, main=main)
    report = json.loads(path.read_text())
    assert report["rounds_done"] == 1
    assert list(report["rounds"].values()) == [[1.0], [2.0], [3.0]]
    assert [result["ratio"] for result in report["results"].values()] == [1, 2, 3]


def test_ratios_are_taken_within_rounds():
    results = summarize({"a": [1.0, 10.0, 100.0], "b": [2.0, 30.0, 210.0]})
    assert results["b"]["images_per_second"] == 30
    assert results["b"]["ratio"] == pytest.approx(2.1)


def test_other_pixels_end_it_in_one_sentence(photos, capsys, monkeypatch):
    images = benchmark_loader.open_images(str(photos), (16, 16))
    assert pixel_difference(images, (16, 16)) < 0.1
    brighter = benchmark_loader.functional.adjust_brightness
    resize = benchmark_loader.functional.resized_crop
    monkeypatch.setattr(
        benchmark_loader.functional, "resized_crop", lambda *a: brighter(resize(*a), 1.1)
    )
    sentence = refusal(capsys, "--data_path", photos, *QUICK, main=main, code=1)
    assert "of 255, not below 0.1" in sentence


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--data_path", "nowhere"], "nowhere does not exist"),
        (["--data_path", "PHOTOS", "--also", "nowhere"], "nowhere does not exist"),
        (["--data_path", "PHOTOS", "--batch_size", 6], "--batch_size 6 must be a multiple of 4"),
        (["--data_path", "PHOTOS", "--repeats", 0], "must be at least 1, not 0"),
        (
            ["--data_path", "PHOTOS", "--json", "nowhere/report.json"],
            "nowhere does not exist",
        ),
        ([], "--data_path"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(photos, capsys, options, reason):
    options = [photos if word == "PHOTOS" else word for word in options]
    sentence = refusal(capsys, *QUICK, *options, main=main)
    assert reason in sentence


def test_a_tar_is_measured_too(tmp_path, photos, capsys):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, arcname="photos")
    run("--data_path", tmp_path / "photos.tar", *QUICK, "--num_workers", 0, main=main)
    assert "| this project |" in capsys.readouterr().out
