"""The script that draws a pre-trained model's reconstructions."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image

from models import load_model
from scripts import visualize_reconstruction
from tests.helpers.figures import cells_of
from tests.helpers.files import write_images
from tests.helpers.processes import command, finish, start
from tests.helpers.runs import TINY, refusal, run
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


def test_a_folder_is_searched_and_sampled_evenly(tmp_path, checkpoint, photos):
    everything = cells_of(draw(checkpoint, tmp_path / "all.png", photos), 6, 3)
    few = draw(checkpoint, tmp_path / "few.png", photos, options=["--num_images", 2])
    for image, own in zip((0, 3), cells_of(few, 2, 3), strict=True):
        assert np.array_equal(own[0], everything[image][0])


def test_files_are_drawn_in_their_order(tmp_path, checkpoint, photos):
    a, b = photos / "000.png", photos / "001.png"
    one, other = (
        cells_of(draw(checkpoint, tmp_path / "a.png", *x), 2, 3) for x in ([a, b], [b, a])
    )
    assert np.array_equal(one[0][0], other[1][0])
    assert not np.array_equal(one[0][0], one[1][0])


def test_every_masked_patch_is_decoded_even_if_training_predicted_a_third(
    tmp_path, checkpoint, photos
):
    figure = draw(checkpoint, tmp_path / "f.png", photos)
    for original, masked, result in cells_of(figure, 6, 3):
        hidden = (masked == 128).all(axis=2)
        assert hidden.sum() == 12 * 16  # 12 of 16 patches
        assert np.array_equal(masked[~hidden], original[~hidden])
        assert np.array_equal(result[~hidden], original[~hidden])
        assert (result[hidden] != 128).mean() > 0.9


def test_masks_follow_the_seed_and_the_ratio(tmp_path, checkpoint, photos):
    first = draw(checkpoint, tmp_path / "a.png", photos)
    assert np.array_equal(draw(checkpoint, tmp_path / "b.png", photos), first)
    other = draw(checkpoint, tmp_path / "b.png", photos, options=["--seed", 1])
    assert not np.array_equal(other, first)
    half = draw(checkpoint, tmp_path / "b.png", photos, options=["--mask_ratio", 0.5])
    assert (cells_of(half, 6, 3)[0][1] == 128).all(axis=2).sum() == 8 * 16


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


def test_a_released_checkpoint_gives_the_same_pictures(tmp_path, checkpoint, photos):
    released = released_style(checkpoint, tmp_path / "released.pth")
    ours, theirs = (
        cells_of(draw(path, tmp_path / "f.png", photos), 6, 3) for path in (checkpoint, released)
    )
    assert np.array_equal(ours, theirs)


def test_the_title_names_the_model_and_its_epoch_if_known(
    tmp_path, checkpoint, photos, monkeypatch
):
    names = []
    draw_as_usual = visualize_reconstruction.draw_reconstructions

    def keep(*args, name, **options):
        names.append(name)
        return draw_as_usual(*args, name=name, **options)

    monkeypatch.setattr(visualize_reconstruction, "draw_reconstructions", keep)
    for path in (checkpoint, released_style(checkpoint, tmp_path / "released.pth")):
        draw(path, tmp_path / "f.png", photos)
    assert names == ["CrossMAE ViT-tiny/4, epoch 1", "CrossMAE ViT-tiny/4"]


def test_without_an_output_the_picture_is_written_here_and_an_earlier_one_kept(
    tmp_path, checkpoint, photos, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    argv = ["--checkpoint", checkpoint, "--images", photos, "--num_images"]
    for number in (1, 2):
        run(*argv, number, main=main)
    (earlier,) = tmp_path.glob("reconstruction-*.png")
    for path, number in ((earlier, 1), (tmp_path / "reconstruction.png", 2)):
        with Image.open(path) as figure:
            assert len(cells_of(np.asarray(figure), number, 3)) == number


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
        ({"--output": "nowhere/f.png"}, "nowhere does not exist"),
        ({"--output": "f.xyz"}, "f.xyz is not a picture"),
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
