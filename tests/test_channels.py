"""Images of other channels and types than 8-bit RGB, through all that follows pre-training."""

import csv
import json

import numpy as np
import pytest
import tifffile
import timm
import torch
import transformers

import main_finetune
import main_knn
import main_linprobe
from scripts import predict
from scripts.analysis.inputs import Subject
from tests.helpers import runs
from tests.helpers.arrays import CLASSES, write_gray_png, write_npy, write_set, write_tiff
from tests.helpers.exports import export
from tests.helpers.models import crossmae_nano
from tests.helpers.runs import EACH_STEP, QUICK, assert_identical, refusal, run, run_until, state_of
from tests.helpers.weights import finetuned, pretrained, randomized, stored, timm_nano, vit_nano
from util.normalization import PixelFormat
from util.runs.epoch_log import read_log
from util.weights.encoder import read_encoder

pytestmark = pytest.mark.usefixtures("nano")

FIVE = PixelFormat(5, (0.0, 4095.0))
ONE = PixelFormat(1, (-1.0, 1.0))
NANO_IN_TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 2}
ON_CPU = ["--num_workers", 0, "--amp", "fp32", "--device", "cpu"]
ONE_EPOCH = [*QUICK, "--epochs", 1, "--lr", 1e-3, "--mixup", 0, "--cutmix", 0]


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """TIFF files of five 12-bit bands."""
    return write_set(tmp_path_factory.mktemp("five"), write_tiff)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """NumPy files of one floating-point channel."""
    return write_set(tmp_path_factory.mktemp("one"), write_npy)


def encoder_of(pixels, path):
    """Write a pre-training checkpoint of images of this format, with a mean of its own."""
    channels = pixels.num_channels
    options = {"in_chans": channels, "decoder_depth": 1}
    content = pretrained(randomized(crossmae_nano(**options)), **options) | pixels.header
    colors = {"mean": [0.3 + 0.01 * c for c in range(channels)], "std": [0.2] * channels}
    return stored(path, content | colors)


def finetune(*argv):
    run(*argv, main=main_finetune.main)


def last_checkpoint(folder, kind="finetune"):
    return runs.last_checkpoint(folder, kind)


def described(content):
    return {key: content[key] for key in ("channels", "value_range", "mean", "std")}


# The whole way


@pytest.mark.parametrize(("kind", "pixels"), [("five", FIVE), ("one", ONE)], ids=["tiff", "npy"])
def test_a_set_goes_from_weights_to_exports_without_a_flag_that_the_weights_know(
    tmp_path, request, kind, pixels
):
    data, weights = request.getfixturevalue(kind), encoder_of(pixels, tmp_path / "w.pth")
    header = described(torch.load(weights))
    argv = ["--finetune", weights, "--data_path", data]

    finetune(*argv, *ONE_EPOCH, "--pool", "cls", "--output_dir", tmp_path / "finetune")
    checkpoint = runs.list_checkpoints(tmp_path / "finetune")[-1]
    content = last_checkpoint(tmp_path / "finetune")
    assert described(content) == header
    assert content["model"]["patch_embed.proj.weight"].shape[1] == pixels.num_channels

    dump = tmp_path / "eval.json"
    words = ["--eval", "--finetune", checkpoint, "--data_path", data, *ON_CPU, "--dump_json", dump]
    finetune(*words)
    measured = read_log(tmp_path / "finetune")[-1]["val_loss"]
    assert json.loads(dump.read_text())["val_loss"] == pytest.approx(measured, rel=1e-6)

    words = [*argv, *QUICK, "--epochs", 1, "--output_dir", tmp_path / "linprobe"]
    run(*words, main=main_linprobe.main)
    assert described(last_checkpoint(tmp_path / "linprobe", "linprobe")) == header

    words = ["--checkpoint", weights, "--data_path", data, *ON_CPU, "--k", 3]
    run(*words, "--output_dir", tmp_path / "knn", main=main_knn.main)
    assert described(json.loads((tmp_path / "knn" / "knn.json").read_text())) == header

    features = predicted_features(tmp_path / "features.npy", checkpoint, data / "val")
    x = prepared(data / "val", pixels, header)
    for theirs in libraries_features(tmp_path, checkpoint, x):
        torch.testing.assert_close(theirs, features, rtol=1e-4, atol=1e-4)


def predicted_features(path, checkpoint, images):
    words = ["--checkpoint", checkpoint, "--images", images, *ON_CPU]
    run(*words, "--features", path, "--output", path.with_suffix(".csv"), main=predict.main)
    with path.with_suffix(".csv").open(newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} <= set(CLASSES)
    return torch.from_numpy(np.load(path))


def prepared(folder, pixels, header):
    """Prepare images as their model card says it, (N, C, H, W)."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    read = np.load if pixels is ONE else tifffile.imread
    values = torch.from_numpy(np.stack([read(path) for path in paths]).astype(np.float32))
    values = values.reshape(len(paths), 20, 20, pixels.num_channels).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(values, (18, 18), mode="bicubic", antialias=True)
    resized = resized.round() if pixels is FIVE else resized
    low, high = pixels.value_range
    unit = (resized[..., 1:17, 1:17] - low) / (high - low)
    mean, std = (torch.tensor(header[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (unit - mean) / std


@torch.no_grad()
def libraries_features(folder, checkpoint, x):
    """The features of a fine-tuned model's exports, in the libraries that read them."""
    channels = x.shape[1]
    path, _ = export(folder, checkpoint, "timm", "timm")
    model = timm.create_model(f"local-dir:{path}", pretrained=True, **NANO_IN_TIMM).eval()
    assert model.pretrained_cfg["input_size"] == (channels, 16, 16)
    yield model.forward_head(model.forward_features(x), pre_logits=True)

    path, _ = export(folder, checkpoint, "hf", "hf")
    model = transformers.ViTForImageClassification.from_pretrained(path).eval()
    assert model.config.num_channels == channels
    yield model.vit(x).last_hidden_state[:, 0]


# What the weights do not know


def test_weights_of_timm_without_metadata_are_normalized_as_measured(tmp_path, capsys):
    data = write_set(tmp_path / "data", lambda p, x: write_tiff(p, x[..., :4]))
    path = stored(tmp_path / "timm.pth", timm_nano(num_classes=2, in_chans=4).state_dict())
    argv = ["--finetune", path, "--data_path", data, "--value_range", 0, 4095]
    finetune(*argv, *ONE_EPOCH, "--output_dir", tmp_path / "out")
    content = last_checkpoint(tmp_path / "out")
    assert (content["channels"], content["value_range"]) == (4, [0, 4095])
    values = [tifffile.imread(p) / 4095 for p in sorted((data / "train").rglob("*.tif"))]
    mean, std = (f(values, axis=(0, 1, 2)) for f in (np.mean, np.std))
    assert content["mean"] == pytest.approx(list(mean), rel=1e-4)
    assert content["std"] == pytest.approx(list(std), rel=1e-4)

    words = ["--eval", *argv, *ON_CPU]
    sentence = "no training images to measure mean and std on: give 4 numbers each by --mean and"
    assert sentence in refusal(capsys, *words, main=main_finetune.main)


def test_weights_of_rgb_are_adapted_to_the_channels_that_are_asked_for(tmp_path, five, capsys):
    path = stored(tmp_path / "w.pth", pretrained(randomized(crossmae_nano()), decoder_depth=2))
    flags = ["--data_path", five, "--channels", 5, "--value_range", 0, 4095]
    finetune("--finetune", path, *flags, *ONE_EPOCH, "--output_dir", tmp_path / "out")
    assert "patch embedding adapted from 3 channels to 5" in capsys.readouterr().out
    content = last_checkpoint(tmp_path / "out")
    assert len(content["mean"]) == content["channels"] == 5
    words = ["--checkpoint", path, *flags, *ON_CPU, "--untrained", "--k", 3]
    run(*words, "--output_dir", tmp_path / "knn", main=main_knn.main)
    assert len(json.loads((tmp_path / "knn" / "knn.json").read_text())["mean"]) == 5


def classifier_of(path, **options):
    """Write a fine-tuned model of the two classes."""
    content = finetuned(vit_nano(num_classes=2, **options))
    content["model_options"] |= {"num_classes": 2, **options}
    if "in_chans" in options:
        content |= FIVE.header | {"mean": [0.3] * 5, "std": [0.2] * 5}
    return stored(path, content)


def test_a_head_is_evaluated_on_its_own_channels_only(tmp_path, five, capsys):
    path = classifier_of(tmp_path / "w.pth", in_chans=5)
    words = ["--eval", "--finetune", path, "--data_path", five, *ON_CPU, "--channels", 4]
    message = refusal(capsys, *words, main=main_finetune.main)
    assert "has 5 channels, but the model has 4 channels: leave out --channels" in message


def test_a_run_continues_with_the_mean_that_was_measured(tmp_path, five, monkeypatch):
    argv = ["--data_path", five, "--channels", 5, "--value_range", 0, 4095, "--mean", "auto"]
    argv += ["--std", "auto", *ONE_EPOCH, "--epochs", 2, "--model", "vit_tiny_patch4"]
    argv += ["--input_size", 16, *EACH_STEP, "--output_dir"]
    finetune(*argv, tmp_path / "whole")
    run_until(3, monkeypatch, *argv, tmp_path / "stopped", main=main_finetune.main)
    finetune(*argv, tmp_path / "stopped")
    states = [state_of(tmp_path / name, "finetune") for name in ("whole", "stopped")]
    assert_identical(*states)


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_run_continues_with_its_mean_although_an_image_was_damaged(tmp_path, kind):
    data, main = write_set(tmp_path / "data", write_tiff), runs.MAINS[kind].main
    argv = ["--data_path", data, "--channels", 5, "--value_range", 0, 4095, *QUICK]
    argv += ["--max_broken", 0.5, "--output_dir", tmp_path / "out"]
    prefix = "crossmae_" if kind == "pretrain" else ""
    argv += ["--input_size", 16, "--model", f"{prefix}vit_tiny_patch4"]
    run(*argv, "--epochs", 1, main=main)
    before = last_checkpoint(tmp_path / "out", kind)
    file = next((data / "train").rglob("*.tif"))
    file.write_bytes(file.read_bytes()[:300])
    run(*argv, "--epochs", 2, main=main)
    after = last_checkpoint(tmp_path / "out", kind)
    assert after["progress"]["epoch"] == 2
    assert (after["mean"], after["std"]) == (before["mean"], before["std"])


@pytest.mark.parametrize("kind", ["finetune", "linprobe"])
def test_a_run_whose_weights_are_gone_continues_on_their_channels(tmp_path, five, kind):
    path, main = encoder_of(FIVE, tmp_path / "w.pth"), runs.MAINS[kind].main
    argv = ["--finetune", path, "--data_path", five, *QUICK, "--output_dir", tmp_path / "out"]
    run(*argv, "--epochs", 1, main=main)
    header = described(torch.load(path))
    path.unlink()
    run(*argv, "--epochs", 2, main=main)
    content = last_checkpoint(tmp_path / "out", kind)
    assert described(content) == header
    assert content["progress"]["epoch"] == 2


def test_12_bits_in_16_bit_files_do_not_turn_black_unnoticed(tmp_path, capsys):
    data = write_set(tmp_path / "data", write_gray_png)
    encoder = stored(tmp_path / "encoder.pth", timm_nano(num_classes=0).state_dict())
    argv = ["--finetune", encoder, "--data_path", data, *ONE_EPOCH]
    message = refusal(capsys, *argv, "--output_dir", tmp_path / "out", main=main_finetune.main)
    assert "almost black: use --value_range 0 4095" in message

    path = classifier_of(tmp_path / "trained.pth")
    finetune("--eval", "--finetune", path, "--data_path", data, *ON_CPU)
    assert "almost black: use --value_range 0 4095" in capsys.readouterr().out
    words = ["--checkpoint", path, "--images", data / "val", *ON_CPU]
    run(*words, "--features", tmp_path / "features.npy", main=predict.main)
    assert "almost black: use --value_range 0 4095" in capsys.readouterr().out


# Augmentation


def test_augmentation_of_colors_is_off_and_refused_if_it_is_asked_for(tmp_path, five, capsys):
    argv = ["--finetune", encoder_of(FIVE, tmp_path / "w.pth"), "--data_path", five, *ONE_EPOCH]
    for flag in ("--auto_augment=original", "--color_jitter=0.4"):
        words = [*argv, "--output_dir", tmp_path / "refused", flag]
        message = refusal(capsys, *words, main=main_finetune.main)
        assert f"{flag.split('=')[0]} changes colors, which needs 8-bit RGB images" in message
    finetune(*argv, "--output_dir", tmp_path / "out")
    assert "--auto_augment is off" in capsys.readouterr().out
    assert last_checkpoint(tmp_path / "out")["identity"]["--auto_augment"] == "none"


# Broken images


def test_a_file_of_other_channels_is_named(tmp_path, capsys):
    data = write_set(tmp_path / "data", write_tiff)
    write_tiff(data / "val" / "dark" / "000", np.zeros((20, 20, 4), np.uint16))
    path = classifier_of(tmp_path / "w.pth", in_chans=5)
    reason = "it has 4 channels, but --channels is 5"
    words = ["--eval", "--finetune", path, "--data_path", data, *ON_CPU]
    message = refusal(capsys, *words, main=main_finetune.main)
    assert "val/dark/000.tif" in message
    table = tmp_path / "predictions.csv"
    words = ["--checkpoint", path, "--images", data / "val", "--output", table, *ON_CPU]
    run(*words, main=predict.main)
    with table.open(newline="") as file:
        errors = {row["path"]: row["error"] for row in csv.DictReader(file)}
    assert errors.pop("dark/000.tif") == reason
    assert len(errors) == 7 and not any(errors.values())


# Windows of large images


def test_a_model_of_windows_is_evaluated_on_windows(tmp_path, five):
    path, dumps = encoder_of(FIVE, tmp_path / "w.pth"), []
    argv = ["--data_path", five, "--finetune"]
    flags = [*ONE_EPOCH, "--tile", 16, "--output_dir", tmp_path / "out"]
    finetune(*argv, path, *flags)
    checkpoint = runs.list_checkpoints(tmp_path / "out")[-1]
    assert read_encoder(checkpoint).tile == 16
    for number, flags in enumerate(([], ["--tile", 20])):
        dump = tmp_path / f"{number}.json"
        finetune("--eval", *argv, checkpoint, *ON_CPU, "--dump_json", dump, *flags)
        dumps.append(json.loads(dump.read_text())["val_loss"])
    assert dumps[0] == pytest.approx(read_log(tmp_path / "out")[-1]["val_loss"], rel=1e-6)
    assert dumps[1] != pytest.approx(dumps[0], rel=1e-6)


def test_pictures_of_a_model_of_windows_show_windows(tmp_path, five, capsys):
    argv = ["--data_path", five, "--channels", 5, "--value_range", 0, 4095, *QUICK, "--epochs", 1]
    argv += ["--model", "crossmae_vit_tiny_patch4", "--input_size", 16, "--tile", 16]
    run(*argv, "--output_dir", tmp_path, main=runs.MAINS["pretrain"].main)
    path = runs.list_checkpoints(tmp_path)[-1]
    subject = Subject.load(str(path), device=torch.device("cpu"), seed=0)
    assert subject.transform.tile == 16
    knn = ["--checkpoint", path, "--data_path", five, "--no-logistic", "--k", 1, *ON_CPU]
    run(*knn, "--output_dir", tmp_path / "knn", main=main_knn.main)
    assert "was trained on windows of 16 px of larger images (--tile)" in capsys.readouterr().out
