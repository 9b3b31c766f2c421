"""The script that compares the reconstructions of several checkpoints."""

from functools import partial

import numpy as np
import pytest
from PIL import Image

import models
from models_crossmae import build_crossmae
from scripts import compare_reconstructions
from tests.helpers import analyses
from tests.helpers.analyses import (
    QUICK,
    WRONG_INPUT,
    WRONG_MASKS,
    WRONG_PICTURES,
    flags_of,
    flat,
    hide_matplotlib,
    numbers_in,
    refuse,
    save_model,
    save_released,
)
from tests.helpers.figures import cells_of
from tests.helpers.files import write_images
from tests.helpers.models import NANO_DECODER, use_nano_models
from tests.helpers.runs import TINY, refusal, run
from tests.helpers.weights import pretrained, stored
from util.runs.checkpoint import list_checkpoints
from util.runs.epoch_log import read_log
from util.settings.model import ModelSize

main = compare_reconstructions.main
pytestmark = [pytest.mark.usefixtures("nano"), pytest.mark.xdist_group("compare_reconstructions")]
RUNS = {
    "crossmae": ["--pred_ratio", 0.25],
    "mae": ["--model", "mae_vit_tiny_patch4", "--no-norm_pix_loss", "--mean", 0.4, 0.5, 0.6],
}
SEED = 3


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Checkpoints of a CrossMAE with normalized pixels and an MAE with plain ones."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        for name, options in RUNS.items():
            argv = [*TINY, *options, "--data_path", images, "--epochs", 1, "--seed", SEED]
            run(*argv, "--output_dir", root / name)
    return [list_checkpoints(root / name)[-1] for name in RUNS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints that differ from what others are compared with in one way each."""
    folder = tmp_path_factory.mktemp("saved")
    changes = {
        "usual": {},
        "wide": {"img_size": (16, 24)},
        "small": {"img_size": (8, 8)},
        "half": {"header": {"mask_ratio": 0.5}},
        "grid": {"header": {"mask_sampling": "grid"}},
    }
    return {name: save_model(folder / f"{name}.pth", **own) for name, own in changes.items()}


@pytest.fixture
def photos(tmp_path):
    folder = write_images(tmp_path / "photos", 2, size=30)
    Image.new("L", (40, 20), 200).save(folder / "gray.png")
    return folder


@pytest.fixture
def argv(tmp_path, saved, photos):
    places = {"--checkpoints": saved["usual"], "--output": tmp_path / "f.png"}
    return {**places, "--images": photos}


def compare(output, checkpoints, *argv):
    """Run the script; return its report, printed lines and figure."""
    argv = ["--checkpoints", *checkpoints, "--output", output, *argv]
    report, lines, _ = analyses.analyse(main, output.with_suffix(".json"), *argv)
    with Image.open(output) as figure:
        return report, lines, np.asarray(figure)


# The figure


def test_columns_are_the_original_the_masked_and_each_checkpoint(tmp_path, trained, photos):
    normalized, plain = trained
    for chosen in ([plain, normalized], [normalized], [plain]):
        _, _, figure = compare(tmp_path / "f.png", chosen, "--images", photos)
        assert len(cells_of(figure, 3, 2 + len(chosen))) == 3


def test_the_title_says_what_is_masked_and_what_comes_from_the_original(
    tmp_path, trained, photos, monkeypatch
):
    titles, draw_figure = [], compare_reconstructions.draw_figure

    def keep(panels, labels, *, title):
        titles.append(title)
        return draw_figure(panels, labels, title=title)

    monkeypatch.setattr(compare_reconstructions, "draw_figure", keep)
    normalized, plain = trained
    for chosen in ([plain], [normalized], [plain, normalized]):
        compare(tmp_path / "f.png", chosen, "--images", photos)
    moments = "each patch's mean and deviation from the original"
    assert titles == [
        "75% of the patches are masked",
        f"75% of the patches are masked; {moments}",
        f"75% of the patches are masked; {moments} in crossmae",
    ]


def test_it_is_said_which_checkpoints_had_the_moments_of_patches(tmp_path, trained, photos):
    report, lines, _ = compare(tmp_path / "f.png", trained, "--images", photos)
    moments = [result["patch_moments"] for result in report["checkpoints"].values()]
    assert sorted(moments) == ["original", "predicted"]
    assert sum("not comparable" in line for line in lines) == 1
    _, lines, _ = compare(tmp_path / "f.png", trained[:1], "--images", photos)
    assert not any("not comparable" in line for line in lines)


def test_visible_patches_are_the_originals_and_masks_the_same_in_every_column(
    tmp_path, trained, photos
):
    _, _, figure = compare(tmp_path / "f.png", trained, "--images", photos)
    for original, masked, first, second in cells_of(figure, 3, 4):
        hidden = (masked == 128).all(axis=2)
        assert hidden.sum() == 12 * 16  # 12 of 16 patches
        for picture in (masked, first, second):
            assert np.array_equal(picture[~hidden], original[~hidden])
        for one, other in ((first, original), (second, original), (first, second)):
            assert (one[hidden] != other[hidden]).any(axis=1).mean() > 0.9


def test_a_column_does_not_depend_on_the_others(tmp_path, trained, photos):
    draw = partial(compare, tmp_path / "f.png")
    report, _, together = draw(trained, "--images", photos)
    for number, checkpoint in enumerate(trained):
        alone_report, _, alone = draw([checkpoint], "--images", photos)
        for one, all_of_it in zip(cells_of(alone, 3, 3), cells_of(together, 3, 4), strict=True):
            assert np.array_equal(one[2], all_of_it[2 + number])
        (name, expected), *_ = alone_report["checkpoints"].items()
        assert report["checkpoints"][name] == expected


def test_masks_follow_the_seed(tmp_path, saved, photos):
    draw = partial(compare, tmp_path / "f.png", [saved["usual"]], "--images", photos)
    first, same, other = (draw("--seed", seed)[2] for seed in (0, 0, 1))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_images_of_the_data_are_drawn_if_none_are_given(tmp_path, saved, images):
    draw = partial(compare, tmp_path / "f.png", [saved["usual"]], "--data_path", images)
    for more, num_images in (([], 8), (["--num_images", 3], 3)):
        report, _, figure = draw(*more)
        assert len(cells_of(figure, num_images, 3)) == report["num_images"] == num_images


def test_the_figure_may_have_another_format(tmp_path, saved, photos):
    shapes = {
        compare(tmp_path / name, [saved["usual"]], "--images", photos)[2].shape
        for name in ("f.jpg", "f.png")
    }
    assert len(shapes) == 1


# The table


def test_psnr_is_what_pre_training_logged(tmp_path, trained, images):
    argv = ["--table", "--data_path", images, "--seed", SEED]
    report, lines, _ = compare(tmp_path / "f.png", trained, *argv)
    assert report["num_images"] == 12
    assert list(report["checkpoints"]) == ["crossmae", "mae"]
    for checkpoint, result in zip(trained, report["checkpoints"].values(), strict=True):
        logged = read_log(checkpoint.parent)[-1]
        assert logged["val_images"] == 12
        assert result["psnr"] == pytest.approx(logged["val_psnr"], abs=1e-3)
        assert result["checkpoint"] == str(checkpoint)
        assert -1 < result["ssim"] < 1
    rows = [numbers_in(lines, name + " +") for name in report["checkpoints"]]
    for (row,), result in zip(rows, report["checkpoints"].values(), strict=True):
        assert row == pytest.approx([result["psnr"], result["ssim"]], abs=6e-4)


def test_the_table_is_of_the_data_and_the_figure_of_given_images(tmp_path, trained, images, photos):
    argv = ["--table", "--data_path", images, "--seed", SEED]
    report, _, figure = compare(tmp_path / "f.png", trained, *argv, "--images", photos)
    plain, _, _ = compare(tmp_path / "g.png", trained, *argv)
    assert len(cells_of(figure, 3, 4)) == 3
    assert report["checkpoints"] == plain["checkpoints"]


def test_without_a_table_the_drawn_images_are_measured(tmp_path, saved, images):
    files = [images / "val" / name for name in ("apple/000.png", "bear/001.png", "cup/001.png")]
    draw = partial(compare, tmp_path / "f.png", [saved["usual"]])
    report, _, _ = draw("--images", *files)
    # These are three of the twelve validation images, evenly spaced.
    same, _, _ = draw("--table", "--data_path", images, "--num_images", 3)
    also, _, _ = draw("--data_path", images, "--images", *files)
    for one in (report, same, also):
        assert one["num_images"] == 3
        assert one["checkpoints"]["saved0"] == pytest.approx(report["checkpoints"]["saved0"])


def test_numbers_do_not_depend_on_the_batch_size(tmp_path, saved, images):
    argv = ["--table", "--data_path", images, "--batch_size"]
    results = [
        compare(tmp_path / "f.png", [saved["usual"]], *argv, size)[0]["checkpoints"]["saved0"]
        for size in (5, 12)
    ]
    for name in ("psnr", "ssim"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-5)


def test_a_released_checkpoint_gives_the_same_numbers_and_figure(tmp_path, saved, photos):
    released = save_released(tmp_path / "released.pth", saved["usual"])
    ours, theirs = (
        compare(tmp_path / "f.png", [path], "--images", photos)
        for path in (saved["usual"], released)
    )
    for one, other in zip(*(own[0]["checkpoints"].values() for own in (ours, theirs)), strict=True):
        assert (one["psnr"], one["ssim"]) == (other["psnr"], other["ssim"])
    assert np.array_equal(cells_of(ours[2], 3, 3), cells_of(theirs[2], 3, 3))


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/x/c.pth", "/a/y/c.pth"], ["x", "y"]),
        (["/a/x/c.pth", "/a/x/d.pth"], ["c", "d"]),
        (["/a/x/c.pth", "/b/x/c.pth"], ["/a/x/c.pth", "/b/x/c.pth"]),
        (["/a/x/c.pth"], ["x"]),
    ],
    ids=str,
)
def test_checkpoints_have_the_shortest_names_that_differ(paths, names):
    assert compare_reconstructions.label_checkpoints(paths) == names


# Checkpoints that cannot be compared


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wide", "is for 16 x 24 px with patches of 4"),
        ("small", "is for 8 x 8 px with patches of 4"),
        ("half", "were trained with different masks: set --mask_ratio"),
        ("grid", "were trained with different masks"),
    ],
)
def test_other_sizes_and_masks_are_refused(tmp_path, saved, argv, capsys, name, reason):
    paths = [saved["usual"], saved[name]]
    sentence = refuse(tmp_path, capsys, main, argv, {"--checkpoints": paths})
    assert reason in sentence
    for path in paths:
        assert str(path) in sentence


def test_other_patch_sizes_are_refused(tmp_path, saved, argv, capsys, monkeypatch):
    build = partial(build_crossmae, ModelSize(8, 32, 2, 2, img_size=16), **NANO_DECODER)
    monkeypatch.setitem(models.MODELS, "crossmae_vit_tiny_patch16", build)
    content = pretrained(build()) | {"model_name": "crossmae_vit_tiny_patch16"}
    path = stored(tmp_path / "coarse.pth", content)
    changes = {"--checkpoints": [saved["usual"], path]}
    sentence = refuse(tmp_path, capsys, main, argv, changes)
    assert f"{path} is for 16 x 16 px with patches of 8" in sentence


def test_other_mask_ratios_can_be_compared_at_one(tmp_path, saved, photos):
    argv = ["--images", photos, "--mask_ratio", 0.5]
    _, _, figure = compare(tmp_path / "f.png", [saved["usual"], saved["half"]], *argv)
    assert (cells_of(figure, 3, 4)[0][1] == 128).all(axis=2).sum() == 8 * 16


def test_images_smaller_than_the_window_of_ssim_are_refused(tmp_path, saved, argv, capsys):
    changes = {"--checkpoints": saved["small"]}
    sentence = refuse(tmp_path, capsys, main, argv, changes)
    assert "SSIM needs images of at least 11 px" in sentence


# Wrong input and the output


@pytest.mark.parametrize(
    ("changes", "reason"),
    [case for case in WRONG_INPUT if case[0] != {"--data_path": "DAMAGED"}]
    + WRONG_MASKS
    + WRONG_PICTURES,
    ids=flags_of,
)
def test_wrong_input_is_refused_in_one_sentence(tmp_path, argv, capsys, changes, reason):
    changes = {{"--checkpoint": "--checkpoints"}.get(flag, flag): v for flag, v in changes.items()}
    assert reason in refuse(tmp_path, capsys, main, argv, changes)


@pytest.mark.parametrize("table", [True, False], ids=["measured", "drawn"])
def test_damaged_images_of_the_data_are_refused_by_name(tmp_path, argv, capsys, table):
    damaged = write_images(tmp_path / "images", 3) / "001.png"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    argv |= {"--data_path": tmp_path / "images"} | ({"--table": []} if table else {})
    if not table:
        del argv["--images"]
    assert str(damaged) in refusal(capsys, *flat(argv), *QUICK, main=main)
    assert not (tmp_path / "f.json").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere/f.png", "nowhere does not exist"),
        ("photos/gray.png/f.png", "gray.png"),
        ("photos", "is a folder"),
        ("f.xyz", "f.xyz is not a picture"),
        ("f", "is not a picture"),
        ("f.json", "f.json is not a picture"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(tmp_path, argv, capsys, name, reason):
    changes = {"--output": tmp_path / name}
    assert reason in refuse(tmp_path, capsys, main, argv, changes)


def test_a_file_that_is_no_picture_is_left_alone(tmp_path, argv, capsys, saved):
    content = saved["usual"].read_bytes()
    argv["--output"] = saved["usual"]
    assert "is not a picture" in refusal(capsys, *flat(argv), *QUICK, main=main)
    assert saved["usual"].read_bytes() == content


def test_no_images_are_refused(tmp_path, argv, capsys):
    del argv["--images"]
    assert refuse(tmp_path, capsys, main, argv, {}).startswith("no images: give --data_path")


def test_a_table_without_data_is_refused(tmp_path, argv, capsys):
    sentence = refuse(tmp_path, capsys, main, argv, {"--table": []})
    assert sentence == "--table needs images to measure: give --data_path"


def test_a_checkpoint_that_is_named_twice_is_refused(tmp_path, saved, argv, capsys):
    changes = {"--checkpoints": [saved["usual"], saved["usual"]]}
    assert "names a file twice" in refuse(tmp_path, capsys, main, argv, changes)


def test_earlier_results_are_kept(tmp_path, saved, photos):
    draw = partial(compare, tmp_path / "f.png", [saved["usual"]], "--images", photos)
    first, _, _ = draw("--seed", 0)
    second, _, _ = draw("--seed", 1)
    (earlier,) = tmp_path.glob("f-*.json")
    assert analyses.read_strictly(earlier) == first != second
    assert len(list(tmp_path.glob("f-*.png"))) == 1


def test_it_needs_no_matplotlib(tmp_path, argv, monkeypatch):
    hide_matplotlib(monkeypatch)
    run(*flat(argv), *QUICK, main=main)
    assert (tmp_path / "f.png").exists() and (tmp_path / "f.json").exists()
