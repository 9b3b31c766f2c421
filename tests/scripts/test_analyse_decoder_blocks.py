"""The script that splits reconstructions into what each decoder block adds."""

from functools import partial

import pytest
import torch

from scripts import analyse_decoder_blocks, compare_reconstructions
from scripts.analysis.inputs import ImageSettings, Subject, open_images
from tests.helpers import analyses
from tests.helpers.analyses import (
    QUICK,
    grid_of,
    numbers_in,
    pictures_in,
    read_strictly,
    refuse,
    save_model,
    save_released,
)
from tests.helpers.checkpoints import CPU
from tests.helpers.files import write_images
from tests.helpers.runs import run
from tests.helpers.weights import stored

main = analyse_decoder_blocks.main
analyse = partial(analyses.analyse_checkpoint, main, "decoder_blocks")
pytestmark = [pytest.mark.usefixtures("nano"), pytest.mark.xdist_group("analyse_decoder_blocks")]
close = partial(pytest.approx, rel=1e-5, abs=1e-6)
MODELS = {
    "crossmae": {},
    "plain": {"norm_pix_loss": False},
    "mae": {"method": "mae"},
    "plain_mae": {"method": "mae", "norm_pix_loss": False},
}
every_model = pytest.mark.parametrize("name", MODELS)
SHARES = ("share", "low_share", "high_share")
PARTS = ("block 1", "block 2")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: save_model(folder / f"{name}.pth", **own) for name, own in MODELS.items()}


@pytest.fixture(scope="module")
def found(checkpoints, images, tmp_path_factory):
    """Folder, report and printed lines of each model, on three images."""
    results = {}
    for name, path in checkpoints.items():
        folder = tmp_path_factory.mktemp(name)
        argv = ["--data_path", images, "--num_images", 3]
        save = not name.startswith("plain")
        results[name] = (folder, *analyse(folder, path, *argv, save=save))
    return results


@pytest.fixture
def argv(tmp_path, checkpoints, images):
    places = {"--checkpoint": checkpoints["crossmae"], "--output_dir": tmp_path / "out"}
    return {**places, "--data_path": images, "--num_images": 2}


def assert_same_numbers(reports, tolerance):
    for blocks in zip(*(report["blocks"] for report in reports), strict=True):
        for name in (*SHARES, "detail", "psnr", "energy"):
            one, other = (block[name] for block in blocks)
            assert one == pytest.approx(other, rel=tolerance, abs=tolerance), name


# The report


@every_model
def test_shares_of_the_input_and_all_blocks_sum_to_one(found, name):
    _, report, *_ = found[name]
    assert report["num_images"] == 3
    assert [block["block"] for block in report["blocks"]] == [0, 1, 2]
    for share in SHARES:
        assert sum(block[share] for block in report["blocks"]) == close(1)
    for block in report["blocks"]:
        energy = block["energy"]
        assert len(energy) == 4 and min(energy) > 0  # patches of 4 pixels
        assert block["detail"] == close(sum(energy[2:]) / sum(energy))


@every_model
def test_psnr_after_the_last_block_is_that_of_the_reconstruction(
    tmp_path, checkpoints, images, found, name
):
    output = tmp_path / "f.png"
    argv = ["--checkpoints", checkpoints[name], "--table", "--data_path", images]
    argv += ["--num_images", 3, "--output", output]
    run(*argv, *QUICK, main=compare_reconstructions.main)
    (result,) = read_strictly(tmp_path / "f.json")["checkpoints"].values()
    quality = [block["psnr"] for block in found[name][1]["blocks"]]
    assert quality[-1] == pytest.approx(result["psnr"], abs=1e-4)
    assert len(set(quality)) == 3


def test_a_block_that_adds_nothing_has_no_share(tmp_path, checkpoints, images):
    content = torch.load(checkpoints["crossmae"])
    for name, weight in content["model"].items():
        if "decoder.blocks.1." in name and ("attn.proj" in name or "mlp.fc2" in name):
            weight.zero_()
    path = stored(tmp_path / "zero.pth", content)
    report, *_ = analyse(tmp_path / "out", path, "--data_path", images, "--num_images", 2)
    _, before, last = report["blocks"]
    assert [last[name] for name in (*SHARES, "detail")] == close([0, 0, 0, 0])
    assert last["energy"] == close([0] * 4)
    assert last["psnr"] == close(before["psnr"])


# The table and the figures


@every_model
def test_the_table_has_one_line_for_the_input_and_each_block(found, name):
    _, report, lines, _ = found[name]
    rows = [numbers_in(lines, start) for start in ("positions and mask token", *PARTS)]
    for (row,), block in zip(rows, report["blocks"], strict=True):
        expected = [block[column] for column in (*SHARES, "detail", "psnr")]
        assert row == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("name", ["crossmae", "mae"])
def test_pictures_have_two_rows_for_each_image_and_a_column_for_it_the_input_and_each_block(
    found, name
):
    folder, *_, figures = found[name]
    assert pictures_in(folder) == ["decoder_blocks.png", "decoder_blocks_pictures.png"]
    pictures = figures["decoder_blocks_pictures.png"]
    assert grid_of(pictures) == (6, 4)
    titles = [axes.get_title() for axes in pictures.axes]
    assert titles == ["image", "input", "block 1", "block 2", *[""] * 20]


@every_model
def test_the_last_sum_that_is_drawn_is_the_reconstruction(checkpoints, images, found, name):
    subject = Subject.load(checkpoints[name], device=CPU, seed=0)
    settings = ImageSettings(str(images), num_images=3)
    opened = open_images(settings, subject.transform, seed=0, device=CPU)
    original, masked, _, whole = compare_reconstructions.draw(subject, opened)
    axes = found[name][3]["decoder_blocks_pictures.png"].axes
    for row, column, panels in ((0, 0, original), (1, 0, masked), (1, 3, whole)):
        for image, panel in enumerate(panels):
            drawn = axes[4 * (2 * image + row) + column].images[0].get_array()
            torch.testing.assert_close(torch.tensor(drawn), panel.permute(1, 2, 0))


def test_images_need_not_be_square(tmp_path, images):
    path = save_model(tmp_path / "wide.pth", "mae", img_size=(8, 24))
    argv = ["--data_path", images, "--num_images", 2]
    report, _, figures = analyse(tmp_path / "out", path, *argv, save=True)
    assert sum(block["share"] for block in report["blocks"]) == close(1)
    axes = figures["decoder_blocks_pictures.png"].axes[-1]
    assert axes.images[0].get_array().shape == (8, 24, 3)


# Images, masks and checkpoints


def test_images_alone_are_measured_too(tmp_path, checkpoints, images, found):
    files = [images / "val" / name for name in ("apple/000.png", "bear/001.png", "cup/001.png")]
    report, *_ = analyse(tmp_path, checkpoints["mae"], "--images", *files)
    assert report["num_images"] == 3
    assert_same_numbers([report, found["mae"][1]], 1e-5)


def test_images_to_draw_are_not_measured_if_there_are_others(tmp_path, checkpoints, images, found):
    photos = write_images(tmp_path / "photos", 2, size=40)
    argv = ["--data_path", images, "--num_images", 3, "--images", photos]
    report, *_ = analyse(tmp_path / "out", checkpoints["mae"], *argv)
    assert report["blocks"] == found["mae"][1]["blocks"]


def test_no_images_are_refused(tmp_path, argv, capsys):
    del argv["--data_path"]
    assert refuse(tmp_path, capsys, main, argv, {}).startswith("no images: give --data_path")


def test_numbers_follow_the_seed(tmp_path, checkpoints, images, found):
    argv = ["--data_path", images, "--num_images", 3, "--seed"]
    same, other = (analyse(tmp_path, checkpoints["crossmae"], *argv, s)[0] for s in (0, 1))
    assert same["blocks"] == found["crossmae"][1]["blocks"]
    assert other["blocks"] != same["blocks"]


def test_numbers_do_not_depend_on_the_batch_size(tmp_path, checkpoints, images):
    argv = ["--data_path", images, "--images", images / "val" / "apple" / "000.png"]
    argv += ["--batch_size"]
    reports = [analyse(tmp_path, checkpoints["crossmae"], *argv, size)[0] for size in (5, 12)]
    assert [report["num_images"] for report in reports] == [12, 12]
    assert_same_numbers(reports, 1e-5)


@pytest.mark.parametrize("name", ["crossmae", "mae"])
def test_a_released_checkpoint_gives_the_same_numbers(tmp_path, checkpoints, images, found, name):
    path = save_released(tmp_path / "released.pth", checkpoints[name])
    report, *_ = analyse(tmp_path / "out", path, "--data_path", images, "--num_images", 3)
    assert report["blocks"] == found[name][1]["blocks"]
