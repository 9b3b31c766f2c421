"""The script that measures where masked tokens attend."""

from functools import partial

import numpy as np
import pytest
import torch

from models_crossmae import build_crossmae
from scripts import analyse_attention
from scripts.analysis.inputs import ImageSettings, Subject, open_images
from tests.helpers import analyses
from tests.helpers.analyses import (
    grid_of,
    numbers_in,
    pictures_in,
    refuse,
    save_model,
    save_released,
)
from tests.helpers.checkpoints import CPU
from tests.helpers.files import write_images
from tests.helpers.processes import command, finish, start
from tests.helpers.weights import pretrained, stored
from util.eval.attention import KEYS, READINGS
from util.eval.monitor import val_split
from util.masking import Masking
from util.settings.masking import MaskSettings
from util.settings.model import SIZES

main = analyse_attention.main
analyse = partial(analyses.analyse_checkpoint, main, "attention")
TINY_PATCH4 = SIZES["tiny_patch4"]
pytestmark = [pytest.mark.usefixtures("nano"), pytest.mark.xdist_group("analyse_attention")]
both = pytest.mark.parametrize("method", ["crossmae", "mae"])
close = partial(pytest.approx, rel=1e-5, abs=1e-6)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {method: save_model(folder / f"{method}.pth", method) for method in ("crossmae", "mae")}


@pytest.fixture(scope="module")
def found(checkpoints, images, tmp_path_factory):
    """Folder, report and printed lines of each method, on three images."""
    results = {}
    for method, path in checkpoints.items():
        folder = tmp_path_factory.mktemp(method)
        argv = ["--data_path", images, "--num_images", 3]
        results[method] = (folder, *analyse(folder, path, *argv, save=True))
    return results


@pytest.fixture
def argv(tmp_path, checkpoints, images):
    places = {"--checkpoint": checkpoints["mae"], "--output_dir": tmp_path / "out"}
    return {**places, "--data_path": images, "--num_images": 2}


def assert_same_numbers(a, b, tolerance=1e-5):
    """Compare the blocks and heads of two reports."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same_numbers(x, y, tolerance)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    else:
        assert a == b


# The report


@both
def test_attention_of_every_block_and_head_sums_to_one(found, method):
    _, report, *_ = found[method]
    assert [block["block"] for block in report["blocks"]] == [1, 2]
    for block in report["blocks"]:
        assert block["attention"] == {"crossmae": "cross", "mae": "self"}[method]
        assert [head["head"] for head in block["heads"]] == [1, 2]
        for own in (block, *block["heads"]):
            assert sum(own[kind] for kind in ("class", "visible", "masked")) == close(1)
            assert all(0 <= own[kind] <= 1 for kind in KEYS)
            assert own["itself"] <= own["masked"]
            assert (own["masked"] > 0) == (method == "mae")


@both
def test_a_block_is_the_mean_of_its_heads(found, method):
    for block in found[method][1]["blocks"]:
        first, second = block["heads"]
        assert first["class"] != second["class"]
        for part in (lambda x: x, lambda x: x["per_key"], lambda x: x["logits"]):
            for kind in KEYS:
                values = [part(head)[kind] for head in block["heads"]]
                mean = None if None in values else close(sum(values) / 2)
                assert part(block)[kind] == mean


def test_attention_per_key_is_relative_to_that_of_uniform_attention(found):
    for method, counts in {"crossmae": [1, 4, 0, 0], "mae": [1, 4, 12, 1]}.items():
        report = found[method][1]
        for block in report["blocks"]:
            assert block["num_keys"] == dict(zip(KEYS, counts, strict=True))
            for kind, count in zip(KEYS, counts, strict=True):
                expected = close(block[kind] / count * sum(counts[:3])) if count else None
                assert block["per_key"][kind] == expected
                assert (block["logits"][kind] is None) == (count == 0)


def test_uniform_attention_is_one_per_key(tmp_path, images):
    path = save_model(tmp_path / "zero.pth", "mae")
    content = torch.load(path)
    for name, weight in content["model"].items():
        if "decoder" in name and "attn.qkv" in name:
            weight.zero_()
    stored(path, content)
    report, *_ = analyse(tmp_path / "out", path, "--data_path", images, "--num_images", 2)
    for block in report["blocks"]:
        assert [block[kind] for kind in KEYS] == close([1 / 17, 4 / 17, 12 / 17, 1 / 17])
        assert list(block["per_key"].values()) == close([1, 1, 1, 1])
    for name, means in list(report["comparison"].items())[:2]:
        assert means["ratio"] == close(1), name


def test_an_mae_is_compared_as_in_the_paper(found):
    report = found["mae"][1]
    readings = {name: report["comparison"][name] for name in READINGS}
    for means in readings.values():
        assert means.keys() == {"visible", "masked", "ratio"}
        positive = min(means["visible"], means["masked"]) > 0
        expected = close(means["visible"] / means["masked"]) if positive else None
        assert means["ratio"] == expected
    blocks = report["blocks"]
    for kind in ("visible", "masked"):
        relative, logits = ([b[part][kind] for b in blocks] for part in ("per_key", "logits"))
        received = [block[kind] / block["num_keys"][kind] * 12 for block in blocks]
        assert [block["received"][kind] for block in blocks] == close(received)
        for means, values in zip(readings.values(), (received, relative, logits), strict=True):
            assert means[kind] == close(sum(values) / 2)
    per_key = [block["per_key"] for block in blocks]
    more = sum(own["visible"] > own["masked"] for own in per_key)
    assert report["comparison"]["blocks_with_more_on_visible"] == more
    slope = per_key[1]["masked"] - per_key[0]["masked"]
    assert report["comparison"]["slope_of_masked"] == close(slope)


def test_cross_attention_has_nothing_to_compare(found):
    _, report, lines, _ = found["crossmae"]
    assert report["comparison"] == {}
    assert "no layer attends to both visible and masked tokens: nothing to compare" in lines


def test_an_mae_of_one_block_has_no_slope(tmp_path, images):
    path = save_model(tmp_path / "mae.pth", "mae", decoder_depth=1)
    report, *_ = analyse(tmp_path / "out", path, "--data_path", images, "--num_images", 2)
    assert report["comparison"]["slope_of_masked"] is None


def test_self_attention_of_crossmae_is_measured_beside_its_cross_attention(tmp_path, images):
    path = save_model(tmp_path / "both.pth", decoder_self_attention=True)
    report, lines, _ = analyse(tmp_path / "out", path, "--data_path", images, "--num_images", 2)
    layers = [(block["block"], block["attention"]) for block in report["blocks"]]
    assert layers == [(1, "self"), (1, "cross"), (2, "self"), (2, "cross")]
    for block in report["blocks"]:
        counts = [0, 0, 12, 1] if block["attention"] == "self" else [1, 4, 0, 0]
        assert block["num_keys"] == dict(zip(KEYS, counts, strict=True))
        assert block["masked"] == close(1.0 if counts[2] else 0.0)
    assert len(numbers_in(lines, r"\d (self|cross) ")) == 4 * 4  # a table for each reading
    assert report["comparison"] == {}


# The table and the figures


@both
def test_every_table_has_one_line_a_block(found, method):
    _, report, lines, _ = found[method]
    kind = report["blocks"][0]["attention"]
    rows = iter(numbers_in(lines, rf"\d {kind} "))
    for part in (None, *READINGS):
        for block in report["blocks"]:
            values = block[part] if part else {key: block[key] for key in KEYS}
            expected = [value for value in values.values() if value is not None]
            assert next(rows) == pytest.approx(expected, abs=6e-4)
    assert next(rows, None) is None


@both
def test_maps_have_a_row_for_each_image_and_a_column_for_masked_patches_if_they_are_read(
    found, method
):
    folder, *_, figures = found[method]
    assert pictures_in(folder) == ["attention.png", "attention_maps.png"] == [*figures]
    assert grid_of(figures["attention_maps.png"]) == (3, 4 if method == "mae" else 3)


@both
def test_maps_show_each_patch_once_in_the_column_of_its_kind(found, method):
    figure = found[method][3]["attention_maps.png"]
    columns = grid_of(figure)[1]
    for image in range(3):
        row = figure.axes[image * columns :][:columns]
        blank = (row[1].images[0].get_array() == 0.5).all(axis=2)[::4, ::4]
        maps = [axes.images[-1].get_array() for axes in row[2:]]
        for own, left_out in zip(maps, (blank, ~blank), strict=False):
            assert np.array_equal(own.mask, left_out)
        assert 0 < sum(own.sum() for own in maps) < 1  # the rest is the class token's


def test_images_need_not_be_square(tmp_path, images):
    path = save_model(tmp_path / "wide.pth", "mae", img_size=(8, 24))
    argv = ["--data_path", images, "--num_images", 2]
    report, _, figures = analyse(tmp_path / "out", path, *argv, save=True)
    assert report["blocks"][0]["num_keys"] == {"class": 1, "visible": 3, "masked": 9, "itself": 1}
    assert figures["attention_maps.png"].axes[2].images[-1].get_array().shape == (2, 6)


# Chosen patches


@pytest.fixture
def drawn(monkeypatch):
    """Splits and patches that are drawn."""
    calls, draw = [], analyse_attention.draw_maps

    def record(subject, images, split, chosen, display):
        calls.append((split, chosen))
        return draw(subject, images, split, chosen, display)

    monkeypatch.setattr(analyse_attention, "draw_maps", record)
    return calls


def test_the_masked_patch_nearest_to_the_center_is_drawn(tmp_path, checkpoints, images, drawn):
    analyse(tmp_path, checkpoints["mae"], "--data_path", images, "--num_images", 3)
    ((split, chosen),) = drawn
    rows, columns = np.divmod(np.arange(16), 4)
    distance = np.hypot(rows - 1.5, columns - 1.5)
    for masked, (patch,) in zip(split.predicted.tolist(), chosen, strict=True):
        assert patch in masked
        assert distance[patch] == distance[masked].min()


def test_chosen_patches_are_drawn_and_change_nothing_that_is_measured(
    tmp_path, checkpoints, images, found, drawn
):
    argv = ["--data_path", images, "--num_images", 3, "--patches", 15, 0]
    report, _, figures = analyse(tmp_path, checkpoints["mae"], *argv)
    ((split, chosen),) = drawn
    assert chosen == [[15, 0]] * 3
    for masked in split.predicted.tolist():
        assert {0, 15} < set(masked)
    assert grid_of(figures["attention_maps.png"]) == (6, 4)
    assert report["blocks"] == found["mae"][1]["blocks"]


def test_chosen_patches_are_masked_and_masks_change_only_where_they_were_visible():
    masking = Masking.of(MaskSettings(0.75), (4, 4), seed=0, all_masked=True)
    before = val_split(masking, range(100), CPU)
    assert torch.equal(val_split(masking, range(100), CPU, masked=()).visible, before.visible)
    after = val_split(masking, range(100), CPU, masked=(3, 7))
    assert after.visible.shape == before.visible.shape
    for old, new, predicted in zip(before.visible, after.visible, after.predicted, strict=True):
        old, new = set(old.tolist()), set(new.tolist())
        assert {3, 7} <= set(predicted.tolist()) == set(range(16)) - new
        assert old - {3, 7} <= new
        assert old == new or old & {3, 7}
    most = val_split(masking, range(100), CPU, masked=range(12))
    assert most.visible.sort(dim=1).values.tolist() == [[12, 13, 14, 15]] * 100


def test_only_what_is_drawn_has_chosen_patches(checkpoints, images):
    subject = Subject.load(checkpoints["mae"], device=CPU, seed=4)
    settings = ImageSettings(images=[images / "val" / "cup"])
    opened = open_images(settings, subject.transform, seed=4, device=CPU)
    pixels, split = subject.shown(opened)
    same_pixels, chosen = subject.shown(opened, masked=[5])
    assert torch.equal(pixels, same_pixels) and pixels.shape == (5, 3, 16, 16)
    assert torch.equal(split.visible, val_split(subject.masking, range(5), CPU).visible)
    assert (split.visible == 5).any() and not (chosen.visible == 5).any()
    ((_, measured),) = subject.batches(opened)
    assert torch.equal(measured.visible, split.visible)


@pytest.mark.parametrize(
    ("patches", "reason"),
    [
        ([16], "--patches 16 does not exist: the last one is 15"),
        ([3, 99], "--patches 99 does not exist"),
        ([*range(9)], "--patches can name at most 8 patches"),
        ([-1], "must be at least 0, not -1"),
        (["center"], "must be a whole number, not center"),
    ],
    ids=str,
)
def test_patches_that_cannot_be_masked_are_refused(tmp_path, argv, capsys, patches, reason):
    assert reason in refuse(tmp_path, capsys, main, argv, {"--patches": patches})


def test_a_visible_patch_of_a_grid_is_refused(tmp_path, argv, capsys):
    path = save_model(tmp_path / "grid.pth", "mae", header={"mask_sampling": "grid"})
    changes = {"--checkpoint": path, "--patches": [1, 2]}
    assert "--patches 2 is visible" in refuse(tmp_path, capsys, main, argv, changes)


# Images, masks and checkpoints


def test_images_alone_are_measured_too(tmp_path, checkpoints, images, found):
    files = [images / "val" / name for name in ("apple/000.png", "bear/001.png", "cup/001.png")]
    report, *_ = analyse(tmp_path, checkpoints["mae"], "--images", *files)
    assert report["num_images"] == 3
    # These are three of the twelve validation images, evenly spaced.
    assert_same_numbers(report["blocks"], found["mae"][1]["blocks"])


def test_all_images_are_measured_if_there_are_no_others(tmp_path, checkpoints, images, drawn):
    argv = ["--images", images / "val", "--batch_size", 5]
    report, *_ = analyse(tmp_path / "a", checkpoints["mae"], *argv)
    assert report["num_images"] == 12
    assert len(drawn[0][1]) == 8
    by_loader, *_ = analyse(tmp_path / "b", checkpoints["mae"], "--data_path", images)
    assert_same_numbers(report["blocks"], by_loader["blocks"])


def test_images_to_draw_are_not_measured_if_there_are_others(
    tmp_path, checkpoints, images, found, drawn
):
    photos = write_images(tmp_path / "photos", 2, size=40)
    argv = ["--data_path", images, "--num_images", 3, "--images", photos]
    report, *_ = analyse(tmp_path / "out", checkpoints["mae"], *argv)
    assert report["blocks"] == found["mae"][1]["blocks"]
    assert len(drawn[0][1]) == 2


def test_a_folder_without_validation_images_is_measured_as_it_is(tmp_path, checkpoints, images):
    report, *_ = analyse(tmp_path, checkpoints["mae"], "--data_path", images / "val")
    assert report["num_images"] == 12
    whole, *_ = analyse(tmp_path, checkpoints["mae"], "--data_path", images)
    assert report["blocks"] == whole["blocks"]


def test_damaged_images_are_replaced_up_to_the_limit(tmp_path, checkpoints):
    damaged = write_images(tmp_path / "images", 4) / "001.png"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    argv = ["--data_path", tmp_path / "images", "--max_broken", 0.25]
    report, lines, _ = analyse(tmp_path / "out", checkpoints["mae"], *argv)
    assert report["num_images"] == 4
    assert sum(str(damaged) in line for line in lines) == 1


def test_no_images_are_refused(tmp_path, argv, capsys):
    del argv["--data_path"]
    assert refuse(tmp_path, capsys, main, argv, {}).startswith("no images: give --data_path")


def test_numbers_follow_the_seed_and_the_mask_ratio(tmp_path, checkpoints, images, found):
    argv = ["--data_path", images, "--num_images", 3]
    blocks = found["mae"][1]["blocks"]
    same, other, half = (
        analyse(tmp_path, checkpoints["mae"], *argv, *more)[0]
        for more in (["--seed", 0], ["--seed", 1], ["--mask_ratio", 0.5])
    )
    assert same["blocks"] == blocks
    assert other["blocks"] != blocks
    assert half["blocks"][0]["num_keys"] == {"class": 1, "visible": 8, "masked": 8, "itself": 1}


@both
def test_numbers_do_not_depend_on_the_batch_size(tmp_path, checkpoints, images, method):
    argv = ["--data_path", images, "--images", images / "val" / "apple" / "000.png"]
    reports = [
        analyse(tmp_path, checkpoints[method], *argv, "--batch_size", size)[0] for size in (5, 12)
    ]
    assert [report["num_images"] for report in reports] == [12, 12]
    assert_same_numbers(reports[0]["blocks"], reports[1]["blocks"])


@both
def test_a_released_checkpoint_gives_the_same_numbers(tmp_path, checkpoints, images, found, method):
    path = save_released(tmp_path / "released.pth", checkpoints[method])
    report, *_ = analyse(tmp_path / "out", path, "--data_path", images, "--num_images", 3)
    assert report["blocks"] == found[method][1]["blocks"]


# Wrong input and the output


def test_it_runs_as_a_script(tmp_path, images):
    path = tmp_path / "checkpoint.pth"
    stored(path, pretrained(build_crossmae(TINY_PATCH4, decoder_depth=1), decoder_depth=1))
    script = command("scripts/analyse_attention.py", "--checkpoint", path)
    places = ["--images", images / "val" / "apple", "--output_dir", tmp_path / "out"]
    code, out, err = finish(start([*script, *map(str, places)]))
    assert (code, err) == (0, "")
    assert f"wrote {tmp_path}/out/attention.json" in out
    assert pictures_in(tmp_path / "out") == ["attention.png", "attention_maps.png"]
