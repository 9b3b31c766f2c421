"""Pre-training runs that start from existing weights: what they log, and how they go on."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from main_pretrain import parse_args
from models import load_model, start_from
from tests.helpers.files import copied, files_in, write_classes, write_images
from tests.helpers.models import crossmae_nano, mae_nano, use_nano_models
from tests.helpers.runs import (
    EACH_STEP,
    TINY,
    assert_identical,
    last_checkpoint,
    refusal,
    run,
    run_until,
    state_of,
)
from tests.helpers.weights import pretrained, randomized, released, stored
from util.errors import InputError
from util.normalization import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from util.runs.checkpoint import list_checkpoints
from util.runs.resume import WEIGHTS_HASH

SETTINGS = {"decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture(autouse=True)
def _nano(monkeypatch):
    use_nano_models(monkeypatch)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 37 images, in five steps of 8 per epoch, and 5 validation images."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", 37)
    write_images(folder / "val", 5)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A released checkpoint and the checkpoint of a model of our own."""
    folder = tmp_path_factory.mktemp("weights")
    model = randomized(crossmae_nano(decoder_depth=1))
    return {
        "own": stored(folder / "own.pth", pretrained(model, **SETTINGS)),
        "released": stored(folder / "released.pth", released(model)),
        "other": stored(folder / "other.pth", released(randomized(crossmae_nano()))),
    }


@pytest.fixture(scope="module")
def finished(images, weights, tmp_path_factory):
    """The output folder of a finished run of two epochs, and its arguments."""
    folder = tmp_path_factory.mktemp("finished")
    argv = [*TINY, *EACH_STEP, "--lr", 1e-3, "--data_path", images]
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        run(*argv, "--init_from", weights["own"], "--output_dir", folder)
    return folder, argv


# The start


@pytest.mark.parametrize("kind", ["own", "released"])
def test_a_run_that_hardly_moves_ends_with_the_weights(tmp_path, images, weights, kind):
    argv = [*TINY, "--epochs", 1, "--lr", 1e-30]
    argv += ["--data_path", images, "--init_from", weights[kind]]
    run(*argv, "--output_dir", tmp_path)
    model, _ = load_model(list_checkpoints(tmp_path)[-1])
    assert_identical(dict(model.state_dict()), dict(load_model(weights[kind])[0].state_dict()))


def test_the_weights_are_in_the_log_and_in_the_checkpoint(finished, weights):
    folder, _ = finished
    log = (folder / "log.txt").read_text()
    assert f"; from {weights['own']}" in re.sub(r"\n\S+ \S+ {10}", " ", log)
    model = crossmae_nano(decoder_depth=1)
    colors = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    digest = start_from(model, "crossmae_vit_tiny_patch4", weights["own"], **colors)
    assert last_checkpoint(folder)["identity"][WEIGHTS_HASH] == digest
    args = json.loads((folder / "args.json").read_text())["args"]
    assert args["init_from"] == str(weights["own"])


def test_the_network_of_epoch_0_is_not_called_untrained(tmp_path, weights, capsys):
    argv = [*TINY, "--data_path", write_classes(tmp_path / "classes"), "--epochs", 1]
    run(*argv, "--init_from", weights["own"], "--output_dir", tmp_path / "run")
    out = capsys.readouterr().out
    assert "epoch 0/1  at the start  k-NN" in out
    assert "% (at the start) -> " in out
    assert "untrained" not in out


@pytest.mark.parametrize("model", ["crossmae_vit_tiny_patch4", "mae_vit_tiny_patch4"])
def test_gray_images_of_another_size_start_from_a_network_for_rgb(tmp_path, weights, model, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(8):
        gray = torch.randint(256, (20, 40)).to(torch.uint8)
        Image.fromarray(gray.numpy()).save(folder / f"{number}.png")
    argv = [*TINY, "--model", model, "--data_path", folder, "--epochs", 1, "--channels", 1]
    argv += ["--input_size", 8, 24, "--init_from", weights["own"]]
    run(*argv, "--output_dir", tmp_path / "run")
    out = capsys.readouterr().out
    assert "position embeddings resampled from 4 x 4 patches to 2 x 6" in out
    assert "patch embedding adapted from 3 channels to 1" in out
    assert ("prediction layer adapted from 3 channels to 1" in out) == model.startswith("cross")
    trained, _ = load_model(list_checkpoints(tmp_path / "run")[-1])
    assert (trained.encoder.in_chans, trained.encoder.grid_size) == (1, (2, 6))


# Going on


def test_a_stopped_run_goes_on_exactly_without_its_weights(
    tmp_path, finished, weights, monkeypatch
):
    expected, argv = finished
    path = shutil.copy(weights["own"], tmp_path / "w.pth")
    argv = [*argv, "--init_from", path, "--output_dir", tmp_path / "run"]
    run_until(7, monkeypatch, *argv)
    path.unlink()
    run(*argv)
    assert_identical(state_of(tmp_path / "run"), state_of(expected))


def test_a_run_goes_on_from_its_own_checkpoint_not_from_the_weights(
    tmp_path, finished, weights, capsys
):
    before, argv = finished
    folder = copied(before, tmp_path / "run")
    kept = list_checkpoints(folder)[-1].read_bytes()
    run(*argv, "--init_from", weights["own"], "--output_dir", folder)
    assert list_checkpoints(folder)[-1].read_bytes() == kept
    assert "nothing is left to train" in capsys.readouterr().out


def test_other_weights_or_none_are_refused_in_a_started_run(tmp_path, finished, weights, capsys):
    before, argv = finished
    folder = copied(before, tmp_path / "run")
    place = ["--output_dir", folder]
    digest = last_checkpoint(before)["identity"][WEIGHTS_HASH]
    sentence = refusal(capsys, *argv, "--init_from", weights["other"], *place)
    assert f"{WEIGHTS_HASH} was '{digest}' and is now '" in sentence
    sentence = refusal(capsys, *argv, *place)
    assert f"{WEIGHTS_HASH} was '{digest}' and is now None" in sentence
    assert files_in(folder) == files_in(before)


def without_hash(folder, place):
    """Copy a run as if an older version had written its checkpoints."""
    folder = copied(folder, place)
    for path in list_checkpoints(folder):
        content = torch.load(path, weights_only=True)
        del content["identity"][WEIGHTS_HASH]
        torch.save(content, path)
    return folder


def test_a_run_of_an_older_version_goes_on_but_not_from_weights(
    tmp_path, images, finished, weights, capsys
):
    _, argv = finished
    run(*argv, "--epochs", 1, "--output_dir", tmp_path / "scratch")
    place = ["--output_dir", without_hash(tmp_path / "scratch", tmp_path / "older")]
    sentence = refusal(capsys, *argv, "--init_from", weights["own"], *place)
    assert f"{WEIGHTS_HASH} was None and is now '" in sentence
    run(*argv, "--epochs", 2, *place)
    assert len(list_checkpoints(tmp_path / "older")) > len(list_checkpoints(tmp_path / "scratch"))


# The one flag where the other is meant


def test_a_checkpoint_of_the_run_itself_is_refused(tmp_path, finished, capsys):
    before, argv = finished
    folder = copied(before, tmp_path / "run")
    path = list_checkpoints(folder)[-1]
    sentence = refusal(capsys, *argv, "--init_from", path, "--output_dir", folder)
    assert "leave --init_from out to continue that run" in sentence
    run(*argv, "--init_from", path, "--output_dir", tmp_path / "new", "--epochs", 1)


def test_both_flags_are_refused_before_anything_is_read(tmp_path):
    words = ["--init_from", "a.pth", "--resume", "b.pth"]
    with pytest.raises(InputError, match=r"--init_from starts a new run and --resume PATH"):
        parse_args([*map(str, TINY), *words])
    for choice in ("auto", "none"):
        parse_args([*map(str, TINY), "--init_from", "a.pth", "--resume", choice])


def test_weights_given_to_resume_are_refused_with_init_from(tmp_path, finished, weights, capsys):
    _, argv = finished
    place = ["--resume", weights["released"], "--output_dir", tmp_path / "run"]
    sentence = refusal(capsys, *argv, *place)
    assert sentence.endswith("start a new run from its weights with --init_from")


def test_weights_that_are_not_there_are_refused(tmp_path, finished, capsys):
    _, argv = finished
    place = ["--init_from", tmp_path / "nowhere.pth", "--output_dir", tmp_path / "run"]
    assert "nowhere.pth" in refusal(capsys, *argv, *place)
    assert not (tmp_path / "run").exists() or not list_checkpoints(tmp_path / "run")


def test_weights_of_another_size_are_refused_with_the_model(tmp_path, finished, capsys):
    _, argv = finished
    other = stored(tmp_path / "w.pth", released(mae_nano()))
    argv = [*argv, "--model", "crossmae_vit_micro_patch4", "--init_from", other]
    sentence = refusal(capsys, *argv, "--output_dir", tmp_path / "run")
    assert "--model crossmae_vit_tiny_patch4" in sentence
