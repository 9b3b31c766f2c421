"""Synthetic images of cells: their formats, and what tells their classes apart."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from scripts import draw_cells
from tests.helpers.files import files_in
from tests.helpers.runs import refusal, run

SMALL = ["--images", 4, "--val_images", 2, "--size", 24]


def draw(folder, form):
    run("--output_dir", folder, "--format", form, *SMALL, main=draw_cells.main)
    return folder / "train" / "long" / f"00001.{form}"


def test_the_formats_are_as_described(tmp_path):
    assert Image.open(draw(tmp_path / "a", "png")).mode == "RGB"
    bands = tifffile.imread(draw(tmp_path / "b", "tif"))
    assert bands.shape == (24, 24, 5) and bands.dtype == np.uint16
    assert 1000 < bands.max() <= 4095
    values = np.load(draw(tmp_path / "c", "npy"))
    assert values.shape == (24, 24) and values.dtype == np.int16
    assert -1000 <= values.min() < -500 < values.max() <= 1000


def test_the_same_arguments_write_the_same_images_in_balanced_classes(tmp_path):
    for name in ("a", "b"):
        draw(tmp_path / name, "tif")
    files = files_in(tmp_path / "a")
    assert files == files_in(tmp_path / "b")
    numbers = {name: sum(f"/{name}/" in path for path in files) for name in draw_cells.CLASSES}
    assert numbers == {"round": 3, "long": 3}


def test_cells_of_both_classes_cover_the_same_area():
    covered = []
    for elongation in draw_cells.CLASSES.values():
        random = np.random.default_rng(0)
        images = [draw_cells.draw_image(random, 48, 12, elongation) for _ in range(60)]
        covered.append(np.mean([image[..., 0] - image[..., 4] > 0.2 for image in images]))
    assert covered[0] == pytest.approx(covered[1], rel=0.15)


def test_an_existing_folder_is_refused(tmp_path, capsys):
    sentence = refusal(capsys, "--output_dir", tmp_path, *SMALL, main=draw_cells.main)
    assert "exists: give another --output_dir" in sentence
