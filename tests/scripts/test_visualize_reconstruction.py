"""The script that draws a pre-trained model's reconstructions."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from models import load_model
from scripts import visualize_reconstruction
from tests.helpers.files import write_images
from tests.helpers.processes import command, finish, start
from tests.helpers.runs import TINY, refusal, run
from util.eval.figures import GAP, TEXT_HEIGHT
from util.runs.checkpoint import list_checkpoints
from util.weights.released import RELEASED_PREFIXES

main = visualize_reconstruction.main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Checkpoint of a tiny model trained to predict a third of the masked patches."""
    root = tmp_path_factory.mktemp("trained")
    images = write_images(root / "images", 8)
    argv = [*TINY, "--data_path", images, "--epochs", 1, "--pred_ratio", 0.25]
    run(*argv, "--no-norm_pix_loss", "--output_dir", root)
    return list_checkpoints(root)[-1]


@pytest.fixture
def photos(tmp_path):
    """Nested folders with images of different sizes and formats, and a text file."""
    folder = write_images(tmp_path / "photos", 3, size=30)
    write_images(folder / "more", 2, size=17)
    Image.new("L", (40, 20), 200).save(folder / "gray.JPG")
    (folder / "notes.txt").write_text("no image")
    return folder


def draw(checkpoint, output, *images, options=()):
    argv = ["--checkpoint", checkpoint, "--output", output, *options, "--images", *images]
    run(*argv, main=main)
    with Image.open(output) as figure:
        return np.asarray(figure)


def num_rows(figure, note=False):
    return (figure.shape[0] - TEXT_HEIGHT * (2 if note else 1)) / (128 + GAP)


def cell(figure, row, column):
    """Panel at the images' original size; 16 pixels are drawn as 128."""
    top, left = TEXT_HEIGHT + row * (128 + GAP), column * (128 + GAP)
    return figure[top : top + 128 : 8, left : left + 128 : 8].astype(int)


def test_a_folder_is_searched_and_sampled_evenly(tmp_path, checkpoint, photos):
    assert num_rows(draw(checkpoint, tmp_path / "all.png", photos)) == 6
    few = draw(checkpoint, tmp_path / "few.png", photos, options=["--num_images", 2])
    assert num_rows(few) == 2


def test_files_are_drawn_in_their_order(tmp_path, checkpoint, photos):
    a, b = photos / "000.png", photos / "001.png"
    one, other = (draw(checkpoint, tmp_path / "a.png", *x) for x in ([a, b], [b, a]))
    assert num_rows(one) == 2
    assert np.array_equal(cell(one, 0, 0), cell(other, 1, 0))
    assert not np.array_equal(cell(one, 0, 0), cell(one, 1, 0))


def test_every_masked_patch_is_decoded_even_if_training_predicted_a_third(
    tmp_path, checkpoint, photos
):
    figure = draw(checkpoint, tmp_path / "f.png", photos)
    for row in range(6):
        original, masked, reconstruction, joined = (cell(figure, row, i) for i in range(4))
        hidden = (masked == 128).all(axis=2)
        assert hidden.sum() == 12 * 16  # 12 of 16 patches
        assert np.array_equal(masked[~hidden], original[~hidden])
        assert np.array_equal(joined[~hidden], original[~hidden])
        assert np.array_equal(joined[hidden], reconstruction[hidden])
        assert (reconstruction[~hidden] == 128).all()
        assert (reconstruction[hidden] != 128).mean() > 0.9


def test_masks_follow_the_seed_and_the_ratio(tmp_path, checkpoint, photos):
    first = draw(checkpoint, tmp_path / "a.png", photos)
    assert np.array_equal(draw(checkpoint, tmp_path / "b.png", photos), first)
    other = draw(checkpoint, tmp_path / "b.png", photos, options=["--seed", 1])
    assert not np.array_equal(other, first)
    half = draw(checkpoint, tmp_path / "b.png", photos, options=["--mask_ratio", 0.5])
    assert (cell(half, 0, 1) == 128).all(axis=2).sum() == 8 * 16


def released_style(checkpoint, path):
    """Save a checkpoint's weights under the released names, with their arguments."""
    model, _ = load_model(checkpoint)
    theirs = {ours: name for name, ours in RELEASED_PREFIXES.items()}
    state = {}
    for name, weight in model.state_dict().items():
        prefix = max(filter(name.startswith, theirs), key=len)
        state[theirs[prefix] + name.removeprefix(prefix)] = weight
    args = argparse.Namespace(norm_pix_loss=False, weight_fm=True, use_input=True, use_fm=[-1])
    torch.save({"model": state, "optimizer": {}, "epoch": 799, "args": args}, path)
    return path


def test_a_released_checkpoint_gives_the_same_figure(tmp_path, checkpoint, photos):
    released = released_style(checkpoint, tmp_path / "released.pth")
    ours, theirs = (draw(path, tmp_path / "f.png", photos) for path in (checkpoint, released))
    assert np.array_equal(ours, theirs)


def test_normalized_pixels_are_noted(tmp_path, photos):
    images = write_images(tmp_path / "images", 4)
    run(*TINY, "--data_path", images, "--epochs", 1, "--output_dir", tmp_path / "run")
    trained = list_checkpoints(tmp_path / "run")[-1]
    assert num_rows(draw(trained, tmp_path / "f.png", photos), note=True) == 6


def test_it_runs_as_a_script(tmp_path, checkpoint, photos):
    script = command("scripts/visualize_reconstruction.py", "--checkpoint", checkpoint)
    code, out, err = finish(start([*script, "--images", photos, "--output", tmp_path / "f.png"]))
    assert (code, err) == (0, "")
    assert f"wrote {tmp_path}/f.png with 6 images" in out
    assert (tmp_path / "f.png").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"--images": "nowhere"}, "--images nowhere does not exist"),
        ({"--images": "EMPTY"}, "no images found in"),
        ({"--images": "NOTES"}, "cannot read image"),
        ({"--checkpoint": "nowhere.pth"}, "checkpoint not found: nowhere.pth"),
        ({"--checkpoint": "NOTES"}, "notes.txt"),
        ({"--output": "nowhere/f.png"}, "cannot write --output"),
        ({"--output": "f.xyz"}, "cannot write --output"),
        ({"--mask_ratio": "1"}, "must be strictly between 0 and 1"),
        ({"--mask_ratio": "0.99"}, "none of 16 patches visible"),
        ({"--num_images": "0"}, "must be at least 1, not 0"),
        ({"--device": "abacus"}, "--device abacus"),
        ({"--picture": "a"}, "--picture"),
    ],
    ids=lambda value: " ".join(*value.items()) if isinstance(value, dict) else "",
)
def test_wrong_input_is_refused_in_one_sentence(
    tmp_path, checkpoint, photos, capsys, changes, reason
):
    (tmp_path / "empty").mkdir()
    places = {"EMPTY": tmp_path / "empty", "NOTES": photos / "notes.txt"}
    argv = {"--checkpoint": checkpoint, "--images": photos, "--output": tmp_path / "f.png"}
    argv |= {flag: places.get(value, value) for flag, value in changes.items()}
    words = [word for pair in argv.items() for word in pair]
    assert reason in refusal(capsys, *words, main=main)
    assert not (tmp_path / "f.png").exists()


def test_a_truncated_image_is_refused_by_its_name(tmp_path, checkpoint, photos, capsys):
    path = photos / "001.png"
    path.write_bytes(path.read_bytes()[:-300])
    argv = ["--checkpoint", checkpoint, "--output", tmp_path / "f.png", "--images", photos]
    assert f"cannot read image {path}" in refusal(capsys, *argv, main=main)
