"""The script that shows what inter-block attention reads."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from scripts import analyse_inter_block
from tests.helpers import analyses
from tests.helpers.analyses import (
    grid_of,
    numbers_in,
    pictures_in,
    refuse,
    save_model,
    save_released,
)

main = analyse_inter_block.main
analyse = partial(analyses.analyse_checkpoint, main, "inter_block")
pytestmark = [pytest.mark.usefixtures("nano"), pytest.mark.xdist_group("analyse_inter_block")]
PLAIN, SCALED = "weight", "weight_times_size"
WEIGHT = "decoder.inter_block_attention.weight"
MODELS = {
    "crossmae": {"decoder_depth": 4},
    "softmax": {"iba_softmax": True},
    "projection": {"iba_projection": True},
    "two_maps": {"feature_maps": [0, 2]},
    "one_block": {"decoder_depth": 1},
    "mae": {"method": "mae", "feature_maps": "all"},
    "last": {"feature_maps": "last"},
    "plain_mae": {"method": "mae"},
}
with_mixes = pytest.mark.parametrize("name", [*MODELS][:-2])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: save_model(folder / f"{name}.pth", **own) for name, own in MODELS.items()}


def weights_in(checkpoint):
    return torch.load(checkpoint)["model"][WEIGHT]


@pytest.fixture
def argv(tmp_path, checkpoints, images):
    places = {"--checkpoint": checkpoints["crossmae"], "--output_dir": tmp_path / "out"}
    return {**places, "--data_path": images, "--num_images": 2}


# The report


@with_mixes
def test_weights_are_those_of_the_checkpoint_and_need_no_images(tmp_path, checkpoints, name):
    report, *_ = analyse(tmp_path, checkpoints[name])
    weights = weights_in(checkpoints[name])
    weights = weights.softmax(dim=1) if name == "softmax" else weights
    map_ids = [0, 2] if name == "two_maps" else [0, 1, 2]
    assert report["map_ids"] == map_ids
    assert report["num_images"] == 0
    assert "map_sizes" not in report
    assert list(report["readings"]) == [PLAIN]
    reading = report["readings"][PLAIN]
    assert reading["weights"] == weights.tolist()
    sizes = weights.abs().numpy().astype(float)
    shares = sizes / sizes.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(reading["shares"], shares, rtol=1e-5)
    np.testing.assert_allclose(reading["centers"], shares @ map_ids, rtol=1e-5)


@with_mixes
def test_images_add_a_reading_by_the_sizes_of_the_maps(tmp_path, checkpoints, images, name):
    report, *_ = analyse(tmp_path, checkpoints[name], "--data_path", images, "--num_images", 3)
    weights = weights_in(checkpoints[name])
    weights = weights.softmax(dim=1) if name == "softmax" else weights
    sizes = torch.tensor(report["map_sizes"])
    assert report["num_images"] == 3
    assert sizes.shape == (weights.shape[1],) and (sizes > 0).all()
    assert list(report["readings"]) == [PLAIN, SCALED]
    scaled = torch.tensor(report["readings"][SCALED]["weights"])
    torch.testing.assert_close(scaled, weights * sizes)
    plain, *_ = analyse(tmp_path, checkpoints[name])
    assert plain["readings"][PLAIN] == report["readings"][PLAIN]


def test_images_are_measured_without_data(tmp_path, checkpoints, images):
    path = checkpoints["crossmae"]
    report, *_ = analyse(tmp_path, path, "--images", images / "val")
    by_loader, *_ = analyse(tmp_path, path, "--data_path", images)
    assert report["map_sizes"] == pytest.approx(by_loader["map_sizes"])


def test_the_trend_is_the_rank_correlation_of_blocks_and_centers(tmp_path, checkpoints, images):
    argv = ["--data_path", images, "--num_images", 2]
    report, *_ = analyse(tmp_path, checkpoints["crossmae"], *argv)
    for reading in report["readings"].values():
        rho, p_value = reading["trend"]["rho"], reading["trend"]["p_value"]
        assert rho == pytest.approx(spearmanr(range(4), reading["centers"]).statistic)
        assert 0 < p_value <= 1


def test_later_blocks_that_read_earlier_maps_are_found(tmp_path):
    path = save_model(tmp_path / "checkpoint.pth", decoder_depth=5)
    content = torch.load(path)
    late = torch.linspace(1, 0, 5)
    content["model"][WEIGHT] = torch.stack((1 - late, torch.zeros(5), -late), dim=1)
    torch.save(content, path)
    report, *_ = analyse(tmp_path / "out", path)
    reading = report["readings"][PLAIN]
    assert reading["centers"] == pytest.approx((2 * late).tolist())
    assert reading["trend"]["rho"] == pytest.approx(-1)
    assert reading["trend"]["p_value"] < 0.03  # one order of 120


@pytest.mark.parametrize("name", ["one_block", "mae"])
def test_a_single_mix_has_no_trend(tmp_path, checkpoints, images, name):
    argv = ["--data_path", images, "--num_images", 2]
    report, lines, _ = analyse(tmp_path, checkpoints[name], *argv)
    assert [reading["trend"] for reading in report["readings"].values()] == [None, None]
    assert sum("no trend" in line for line in lines) == 2


def test_the_random_starts_follow_the_seed(tmp_path, checkpoints):
    one, same, other = (
        analyse(tmp_path, checkpoints["crossmae"], "--seed", seed)[0]["readings"][PLAIN]
        for seed in (0, 0, 1)
    )
    assert one == same
    assert one["trend"]["rho"] == other["trend"]["rho"]
    assert one["trend"]["p_value"] == pytest.approx(other["trend"]["p_value"], abs=0.05)
    assert one["trend"]["p_value"] != other["trend"]["p_value"]


def test_sizes_do_not_depend_on_the_batch_size(tmp_path, checkpoints, images):
    argv = ["--data_path", images, "--batch_size"]
    reports = [analyse(tmp_path, checkpoints["crossmae"], *argv, size)[0] for size in (5, 12)]
    assert [report["num_images"] for report in reports] == [12, 12]
    assert reports[0]["map_sizes"] == pytest.approx(reports[1]["map_sizes"], rel=1e-5)


def test_a_released_checkpoint_gives_the_same_numbers(tmp_path, checkpoints, images):
    released = analyses.save_released(tmp_path / "released.pth", checkpoints["crossmae"])
    argv = ["--data_path", images, "--num_images", 2]
    ours, theirs = (
        analyse(tmp_path, path, *argv)[0] for path in (checkpoints["crossmae"], released)
    )
    for name in ("map_ids", "map_sizes", "readings"):
        assert ours[name] == theirs[name]


# The table and the figure


def test_the_table_has_one_line_a_block(tmp_path, checkpoints, images):
    argv = ["--data_path", images, "--num_images", 2]
    report, lines, _ = analyse(tmp_path, checkpoints["crossmae"], *argv)
    rows = numbers_in(lines, r"\d  ")
    readings = report["readings"].values()
    pairs = [(*p, c) for r in readings for *p, c in zip(r["shares"], r["centers"], strict=True)]
    for row, (shares, center) in zip(rows, pairs, strict=True):
        assert row == pytest.approx([*shares, center], abs=6e-4)


@pytest.mark.parametrize("name", ["crossmae", "mae"])
def test_the_figure_has_a_panel_for_the_weights_and_each_reading(
    tmp_path, checkpoints, images, name
):
    weights = weights_in(checkpoints[name])
    argv = ["--data_path", images, "--num_images", 2]
    for number, more in enumerate(([], argv), start=2):
        folder = tmp_path / str(number)
        report, _, figures = analyse(folder, checkpoints[name], *more, save=True)
        assert pictures_in(folder) == ["inter_block.png"]
        figure = figures["inter_block.png"]
        assert grid_of(figure) == (1, number)
        drawn = [torch.tensor(axes.images[0].get_array()) for axes in figure.axes[:number]]
        scaled = weights / weights.abs().amax(dim=1, keepdim=True)
        shares = [torch.tensor(reading["shares"]) for reading in report["readings"].values()]
        for panel, expected in zip(drawn, [scaled, *shares], strict=True):
            torch.testing.assert_close(panel, expected)


# Wrong input and the output


@pytest.mark.parametrize("name", ["last", "plain_mae"])
def test_a_decoder_without_inter_block_attention_is_refused(
    tmp_path, checkpoints, argv, capsys, name
):
    path = checkpoints[name]
    sentence = refuse(tmp_path, capsys, main, argv, {"--checkpoint": path})
    assert f"the decoder in {path} has no inter-block attention" in sentence
    assert "--feature_maps last" in sentence


def test_a_released_mae_is_refused(tmp_path, checkpoints, argv, capsys):
    path = save_released(tmp_path / "released.pth", checkpoints["plain_mae"])
    sentence = refuse(tmp_path, capsys, main, argv, {"--checkpoint": path})
    assert f"the decoder in {path} has no inter-block attention" in sentence
