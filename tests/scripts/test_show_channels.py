"""The scripts that draw images read and show any number of channels, in the type of the files."""

import shutil

import numpy as np
import pytest
from PIL import Image

from scripts import (
    analyse_attention,
    analyse_decoder_blocks,
    analyse_features,
    compare_reconstructions,
    visualize_reconstruction,
)
from scripts.analysis import outputs
from tests.helpers.analyses import QUICK, save_model
from tests.helpers.figures import cells_of
from tests.helpers.models import use_nano_models
from tests.helpers.runs import refusal, run

HIGHEST = 4000  # of 65535: almost black


@pytest.fixture(autouse=True)
def nano_models(monkeypatch):
    use_nano_models(monkeypatch)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model for five channels of 16 bits, and such images of two classes."""
    root = tmp_path_factory.mktemp("bands")
    header = {"mean": [0.03] * 5, "std": [0.02] * 5, "channels": 5, "value_range": None}
    save_model(root / "model.pth", in_chans=5, img_size=16, header=header)
    rng = np.random.default_rng(0)
    for index in range(8):
        split, label = ("train", "val")[index // 4], "ab"[index % 2]
        path = root / "images" / split / label / f"{index}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, rng.integers(0, HIGHEST, (16, 16, 5)).astype(np.uint16))
    return root


def draw(places, output, *argv):
    images = ["--images", places / "images" / "val"]
    argv = ["--checkpoint", places / "model.pth", *images, "--output", output, *argv]
    run(*argv, main=visualize_reconstruction.main)
    with Image.open(output) as figure:
        return [own[0] for own in cells_of(np.asarray(figure), 4, 3)]


def test_originals_show_the_chosen_channels_over_their_range(places, tmp_path):
    files = sorted((places / "images" / "val").rglob("*.npy"))
    for argv, channels in ([], [0, 1, 2]), (["--show_channels", 5, 1, 3], [4, 0, 2]):
        originals = draw(places, tmp_path / "f.png", *argv)
        for original, file in zip(originals, files, strict=True):
            values = np.load(file)[..., channels].astype(float)
            low, high = np.quantile(values, [0.01, 0.99], axis=(0, 1))
            expected = 255 * ((values - low) / (high - low)).clip(0, 1)
            shown = original[:: original.shape[0] // 16, :: original.shape[1] // 16]
            assert np.abs(shown - expected).max() < 2


def test_one_channel_is_shown_in_gray(places, tmp_path):
    for original in draw(places, tmp_path / "f.png", "--show_channels", 4):
        assert (original == original[..., :1]).all()
        assert original.std() > 30


@pytest.mark.parametrize("numbers", [(6,), (1, 2), (0, 1, 2), (1, 2, 3, 4)])
def test_channels_that_cannot_be_shown_are_refused(places, tmp_path, capsys, numbers):
    argv = ["--checkpoint", places / "model.pth", "--images", places / "images" / "val"]
    argv += ["--output", tmp_path / "f.png", "--show_channels", *numbers]
    assert "show_channels" in refusal(capsys, *argv, main=visualize_reconstruction.main)
    assert not (tmp_path / "f.png").exists()


def test_checkpoints_for_such_images_are_compared(places, tmp_path):
    model, output = places / "model.pth", tmp_path / "f.png"
    shutil.copy(model, tmp_path / "copy.pth")
    argv = [
        "--checkpoints",
        model,
        tmp_path / "copy.pth",
        "--images",
        places / "images" / "val",
        *QUICK,
    ]
    run(*argv, "--output", output, "--show_channels", 3, main=compare_reconstructions.main)
    with Image.open(output) as figure:
        for original, *_ in cells_of(np.asarray(figure), 4, 4):
            assert (original == original[..., :1]).all()


def test_checkpoints_for_other_images_are_not_compared(places, tmp_path, capsys):
    save_model(tmp_path / "rgb.pth", img_size=16)
    argv = ["--checkpoints", places / "model.pth", tmp_path / "rgb.pth", *QUICK]
    argv += ["--images", places / "images" / "val", "--output", tmp_path / "f.png"]
    sentence = refusal(capsys, *argv, main=compare_reconstructions.main)
    assert "rgb.pth is for images of 3 channels" in sentence


@pytest.mark.parametrize(
    "script",
    [analyse_attention, analyse_decoder_blocks, analyse_features],
    ids=lambda s: s.__name__,
)
def test_analyses_draw_such_images_and_say_what_they_show(places, tmp_path, monkeypatch, script):
    notes = []
    save = outputs.save_figure
    monkeypatch.setattr(
        outputs, "save_figure", lambda f, *a: (notes.append(f.get_supxlabel()), save(f, *a))
    )
    argv = ["--checkpoint", places / "model.pth", "--data_path", places / "images", *QUICK]
    run(*argv, "--output_dir", tmp_path / "out", "--show_channels", 5, 4, 1, main=script.main)
    shown = "channels 5, 4, 1 of 5, each from the original's 1st to its 99th percentile"
    assert any(shown in note for note in notes)
