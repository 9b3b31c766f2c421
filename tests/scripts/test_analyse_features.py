"""The script that shows what the features of every encoder block know."""

import json
from functools import partial

import pytest
from PIL import Image

import main_knn
from scripts import analyse_features, export_encoder
from tests.helpers import analyses
from tests.helpers.analyses import (
    QUICK,
    grid_of,
    numbers_in,
    pictures_in,
    refuse,
    save_model,
    save_released,
)
from tests.helpers.files import write_images
from tests.helpers.runs import run
from tests.helpers.weights import stored, timm_nano

main = analyse_features.main
analyse = partial(analyses.analyse_checkpoint, main, "features")
pytestmark = [pytest.mark.usefixtures("nano"), pytest.mark.xdist_group("analyse_features")]
both = pytest.mark.parametrize("method", ["crossmae", "mae"])
NEIGHBORS = (10, 20, 100)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {method: save_model(folder / f"{method}.pth", method) for method in ("crossmae", "mae")}


@pytest.fixture(scope="module")
def found(checkpoints, images, tmp_path_factory):
    """Folder, report, printed lines and figures of each method."""
    results = {}
    for method, path in checkpoints.items():
        folder = tmp_path_factory.mktemp(method)
        results[method] = (folder, *analyse(folder, path, "--data_path", images, save=True))
    return results


@pytest.fixture
def argv(tmp_path, checkpoints, images):
    places = {"--checkpoint": checkpoints["crossmae"], "--output_dir": tmp_path / "out"}
    return {**places, "--data_path": images}


def accuracies(block):
    return [block[f"knn{k}"] for k in NEIGHBORS]


# The report


@both
def test_accuracies_are_percentages_for_the_input_and_every_block(found, method):
    _, report, *_ = found[method]
    assert report["num_images"] == {"training": 37, "validation": 12}
    assert [block["block"] for block in report["blocks"]] == [0, 1, 2]
    for block in report["blocks"]:
        for percent in accuracies(block):
            assert percent == pytest.approx(100 / 12 * round(percent / 100 * 12))
            assert 0 <= percent <= 100
    assert len({tuple(accuracies(block)) for block in report["blocks"]}) > 1


@both
@pytest.mark.parametrize("crop", [[], ["--crop_pct", 0.6]], ids=["default", "crop"])
def test_the_last_block_is_what_main_knn_measures(tmp_path, checkpoints, images, method, crop):
    data = ["--data_path", images, "--batch_size", 8, *crop]
    report, *_ = analyse(tmp_path, checkpoints[method], *data)
    argv = ["--finetune", checkpoints[method], "--output_dir", tmp_path, "--no-logistic"]
    run(*argv, *data, "--amp", "fp32", *QUICK, main=main_knn.main)
    expected = json.loads((tmp_path / "knn.json").read_text())
    assert report["crop_pct"] == expected["crop_pct"]
    results = expected["results"]["pre-trained"]
    assert accuracies(report["blocks"][-1]) == [results[f"{k}-NN"] for k in NEIGHBORS]


def test_colors_of_which_each_class_has_its_own_are_always_recognized(tmp_path, checkpoints):
    for path in (tmp_path / "images" / split for split in ("train", "val")):
        for name in ("red", "green", "blue"):
            (path / name).mkdir(parents=True)
            for number in range(12):
                Image.new("RGB", (20, 20), name).save(path / name / f"{number}.png")
    argv = ["--data_path", tmp_path / "images"]
    report, *_ = analyse(tmp_path / "out", checkpoints["crossmae"], *argv)
    assert [block["knn10"] for block in report["blocks"]] == [100, 100, 100]


def test_num_images_limits_both_sets(tmp_path, checkpoints, images):
    argv = ["--data_path", images, "--num_images", 13]
    report, *_ = analyse(tmp_path, checkpoints["mae"], *argv)
    assert report["num_images"] == {"training": 13, "validation": 12}
    assert report["blocks"][0]["knn20"] == report["blocks"][0]["knn100"]  # of all 13


def test_numbers_do_not_depend_on_the_batch_size(tmp_path, checkpoints, images, found):
    argv = ["--data_path", images, "--batch_size", 5]
    report, *_ = analyse(tmp_path, checkpoints["mae"], *argv)
    assert report["blocks"] == found["mae"][1]["blocks"]


# Files of weights and images


@both
def test_a_released_checkpoint_gives_the_same_numbers(tmp_path, checkpoints, images, found, method):
    path = save_released(tmp_path / "released.pth", checkpoints[method])
    report, *_ = analyse(tmp_path / "out", path, "--data_path", images)
    assert report["blocks"] == found[method][1]["blocks"]


def test_a_file_of_the_encoder_alone_gives_the_same_numbers(tmp_path, checkpoints, images, found):
    path = tmp_path / "encoder.safetensors"
    argv = ["--checkpoint", checkpoints["crossmae"], "--format", "safetensors", "--output", path]
    run(*argv, main=export_encoder.main)
    report, *_ = analyse(tmp_path / "out", path, "--data_path", images)
    assert report["blocks"] == found["crossmae"][1]["blocks"]


def test_a_vit_of_timm_is_measured(tmp_path, images):
    path = stored(tmp_path / "vit.pth", timm_nano(num_classes=3).state_dict())
    report, *_ = analyse(tmp_path / "out", path, "--data_path", images)
    assert len(report["blocks"]) == 3


def test_validation_images_may_be_elsewhere(tmp_path, checkpoints, images, found):
    argv = ["--data_path", images / "train", "--val_path", images / "val"]
    report, *_ = analyse(tmp_path, checkpoints["mae"], *argv)
    assert report["blocks"] == found["mae"][1]["blocks"]


# The table and the figures


@both
def test_the_table_has_one_line_a_block(found, method):
    _, report, lines, _ = found[method]
    rows = numbers_in(lines, r"\d  ")
    for row, block in zip(rows, report["blocks"], strict=True):
        assert row == pytest.approx(accuracies(block), abs=6e-4)


@both
def test_pictures_have_two_rows_for_each_image_and_a_column_for_it_the_input_and_each_block(
    found, method
):
    folder, *_, figures = found[method]
    assert pictures_in(folder) == ["features.png", "features_pictures.png"]
    pictures = figures["features_pictures.png"]
    assert grid_of(pictures) == (8, 4)
    titles = [axes.get_title() for axes in pictures.axes[:4]]
    assert titles == ["image", "input", "block 1", "block 2"]


def test_lines_of_the_plot_are_the_accuracies(found):
    _, report, _, figures = found["crossmae"]
    drawn = [list(line.get_ydata()) for line in figures["features.png"].axes[0].lines]
    assert drawn == [[block[f"knn{k}"] for block in report["blocks"]] for k in NEIGHBORS]


def test_given_images_are_drawn_and_not_measured(tmp_path, checkpoints, images, found):
    photos = write_images(tmp_path / "photos", 2, size=40)
    argv = ["--data_path", images, "--images", photos]
    report, _, figures = analyse(tmp_path / "out", checkpoints["mae"], *argv)
    assert grid_of(figures["features_pictures.png"])[0] == 4
    assert report["blocks"] == found["mae"][1]["blocks"]


def test_images_need_not_be_square(tmp_path, images):
    path = save_model(tmp_path / "wide.pth", "mae", img_size=(8, 24))
    argv = ["--data_path", images, "--images", images / "val" / "apple" / "000.png"]
    _, _, figures = analyse(tmp_path / "out", path, *argv)
    drawn = figures["features_pictures.png"].axes[1].images[0].get_array()
    assert drawn.shape == (2, 6, 3)


# Wrong input and the output


def test_no_images_are_refused(tmp_path, argv, capsys):
    del argv["--data_path"]
    assert refuse(tmp_path, capsys, main, argv, {}).endswith("give --data_path or --data_csv")


def test_images_without_labels_are_refused(tmp_path, argv, capsys):
    for split in ("train", "val"):
        write_images(tmp_path / "flat" / split, 3)
    changes = {"--data_path": tmp_path / "flat"}
    assert "have no labels" in refuse(tmp_path, capsys, main, argv, changes)


def test_a_folder_without_validation_images_is_refused(tmp_path, argv, images, capsys):
    changes = {"--data_path": images / "train"}
    sentence = refuse(tmp_path, capsys, main, argv, changes)
    assert "has no validation images: set --val_path" in sentence


def test_other_classes_in_the_validation_images_are_refused(tmp_path, argv, capsys):
    for name in ("dog", "eel"):
        write_images(tmp_path / "others" / name, 2)
    changes = {"--val_path": tmp_path / "others"}
    assert "differ from those of the" in refuse(tmp_path, capsys, main, argv, changes)


def test_damaged_images_are_refused_by_name(tmp_path, argv, capsys):
    for split in ("train", "val"):
        for name in ("apple", "bear"):
            write_images(tmp_path / "images" / split / name, 3)
    damaged = tmp_path / "images" / "train" / "bear" / "001.png"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    changes = {"--data_path": tmp_path / "images"}
    assert str(damaged) in refuse(tmp_path, capsys, main, argv, changes)
