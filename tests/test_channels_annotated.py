"""Images of other channels and types than 8-bit RGB in segmentation and detection."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import main_detection
import main_segmentation
from models import load_detector, load_segmenter
from scripts import predict_detection, predict_segmentation
from tests.helpers import runs
from tests.helpers.arrays import rewrite_in_bands, write_npy, write_tiff
from tests.helpers.files import write_coco, write_masked_images
from tests.helpers.models import crossmae_nano
from tests.helpers.runs import EACH_STEP, assert_identical, refusal, run_until, state_of
from tests.helpers.weights import pretrained, randomized, stored
from util.data.detection import open_detection
from util.data.joint_transforms import JointAugmentation
from util.data.masks import UNLABELED
from util.data.segmentation import open_segmentation
from util.errors import InputError
from util.normalization import PixelFormat
from util.runs.checkpoint import BEST_NAME, list_checkpoints, read_checkpoint
from util.runs.epoch_log import read_log
from util.settings.detection import DetectionSettings
from util.settings.segmentation import SegmentationSettings

pytestmark = pytest.mark.usefixtures("nano")

FIVE, ONE = PixelFormat(5, (0.0, 4095.0)), PixelFormat(1, (-1.0, 1.0))
MAINS = {"segmentation": main_segmentation.main, "detection": main_detection.main}
ON_CPU = ["--num_workers", 0, "--amp", "fp32", "--device", "cpu"]
TINY = [*ON_CPU, "--batch_size", 2, "--max_iters", 4, "--eval_every", 2, "--lr", 1e-3]
OF_MAIN = {
    "segmentation": [*TINY, "--crop_size", 16],
    "detection": [
        *TINY, "--input_size", 32, "--window_size", 3, "--global_blocks", 1, "--fpn_dim", 16,
        "--box_convs", 1, "--roi_batch", 8,
    ],
}  # fmt: skip
every_main = pytest.mark.parametrize("kind", MAINS)


def flags_of(pixels):
    return ["--channels", pixels.channels, "--value_range", *pixels.value_range]


def write_images(folder, kind, write):
    """Write the images of a main, in five bands or one."""
    if kind == "segmentation":
        write_masked_images(folder)
        rewrite_in_bands(folder / "images", write)
        return folder
    write_coco(folder)
    for split in ("train", "val"):
        rewrite_in_bands(folder / split, write)
        path = folder / "annotations" / f"instances_{split}.json"
        suffix = next((folder / split).iterdir()).suffix
        path.write_text(path.read_text().replace(".png", suffix))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders of each main's images: five bands as TIFF, one as NumPy's arrays."""
    root = tmp_path_factory.mktemp("sets")
    writers = {"tiff": write_tiff, "npy": write_npy}
    return {
        (kind, name): write_images(root / f"{kind} {name}", kind, write)
        for kind in MAINS
        for name, write in writers.items()
    }


def encoder_of(pixels, path):
    """Write a pre-training checkpoint of images of this format, with a mean of its own."""
    options = {"in_chans": pixels.channels, "decoder_depth": 1}
    content = pretrained(randomized(crossmae_nano(**options)), **options) | pixels.header
    colors = {"mean": [0.3] * pixels.channels, "std": [0.2] * pixels.channels}
    return stored(path, content | colors)


# Reading and augmentation


def opened_pairs(folder, pixels, **options):
    settings = SegmentationSettings(str(folder), **options)
    form = {"mean": "auto", "std": "auto", "pixels": pixels}
    return open_segmentation(settings, crop_size=(40, 40), seed=0, **form)


def opened_objects(folder, pixels):
    settings = DetectionSettings(str(folder))
    form = {"mean": "auto", "std": "auto", "pixels": pixels}
    return open_detection(settings, side=80, masks=True, seed=0, **form)


OPENERS = {"segmentation": opened_pairs, "detection": opened_objects}


@every_main
@pytest.mark.parametrize(
    ("name", "pixels", "dtype"), [("tiff", FIVE, torch.uint16), ("npy", ONE, torch.float32)]
)
def test_images_keep_their_type_and_what_is_padded_is_zero(sets, kind, name, pixels, dtype):
    images = OPENERS[kind](sets[kind, name], pixels).train
    batch = images.collate([images[0, index] for index in range(len(images))])
    assert (batch.images.dtype, batch.images.shape[1]) == (dtype, pixels.channels)
    normalized = batch.to(torch.device("cpu"))[0]
    corner = normalized[:, :, -1, -1].abs().amin(dim=0)  # padding in some of the images
    assert corner.max() < 0.01
    assert 0.3 < normalized.std() < 3


def test_the_mean_is_that_of_the_training_images(sets):
    images = opened_pairs(sets["segmentation", "tiff"], FIVE)
    values = torch.stack([images.train.read(i)[0].float() for i in range(len(images.train))])
    normalization = images.train.normalization
    expected = (values / 4095).mean(dim=(0, 2, 3)).tolist()
    assert normalization.mean == pytest.approx(expected, rel=1e-4)
    assert normalization == images.val.normalization
    assert normalization.value_range == (0.0, 4095.0)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int16, torch.float32])
def test_an_augmented_image_of_any_type_is_that_of_real_numbers(dtype):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 4096, (5, 20, 24), generator=generator)
    labels = torch.randint(0, 3, (20, 24), generator=generator).short()
    options = {"photometric": False, "value_range": (0.0, 4095.0), "vflip": 0.5}
    augment = JointAugmentation((32, 32), (0.2,) * 5, **options)
    for seed in range(20):
        got, got_labels = augment(image.to(dtype), labels, seed)
        expected, expected_labels = augment(image.float(), labels, seed)
        assert got.dtype == dtype
        assert torch.equal(got_labels, expected_labels)
        step = 0 if dtype == torch.float32 else 0.51
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=step)
        if (got_labels == UNLABELED).any():
            padded = got[:, got_labels == UNLABELED].float()
            torch.testing.assert_close(padded, torch.full_like(padded, 819.0), rtol=0, atol=step)


def test_types_that_differ_are_named_unless_a_range_says_what_they_mean(tmp_path):
    write_masked_images(tmp_path)
    path = tmp_path / "images" / "train" / "000.png"
    values = np.asarray(Image.open(path)).astype(np.int16)
    path.unlink()
    np.save(path.with_suffix(".npy"), values)
    settings = SegmentationSettings(str(tmp_path))
    form = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_size": (16, 16), "seed": 0}
    images = open_segmentation(settings, pixels=PixelFormat(3), **form).train
    error = images.collate([images[0, index] for index in range(3)])
    assert isinstance(error, InputError)
    assert "different types (int16 and uint8): give --value_range" in str(error)
    images = open_segmentation(settings, pixels=PixelFormat(3, (0.0, 255.0)), **form).train
    batch = images.collate([images[0, index] for index in range(3)])
    assert batch.images.dtype == torch.float32


def test_a_number_of_channels_that_is_not_the_one_asked_for_is_a_broken_image(sets):
    images = opened_pairs(sets["segmentation", "tiff"], FIVE).val
    images.pixels = PixelFormat(4, (0.0, 4095.0))
    (broken,) = images[0, 0].broken
    assert broken[1] == "it has 5 channels, but --channels is 4"


# Whole runs


@every_main
@pytest.mark.parametrize(("name", "pixels"), [("tiff", FIVE), ("npy", ONE)])
def test_runs_train_evaluate_and_predict(tmp_path, sets, capsys, kind, name, pixels):
    data, encoder = sets[kind, name], encoder_of(pixels, tmp_path / "encoder.pth")
    where = ["--data_path", data, "--output_dir", tmp_path / "run"]
    runs.run(*OF_MAIN[kind], *where, "--finetune", encoder, main=MAINS[kind])
    metric = {"segmentation": "val_miou", "detection": "val_box_ap"}[kind]
    log = read_log(tmp_path / "run")
    assert metric in log[-1]
    picture = np.asarray(Image.open(tmp_path / "run" / f"{kind}.png"))
    assert picture.std() > 20  # 12 bits in 16 are not black
    best = tmp_path / "run" / BEST_NAME
    content = read_checkpoint(best, kind)
    assert (content["channels"], content["value_range"]) == (
        pixels.channels,
        list(pixels.value_range),
    )
    assert content["mean"] == [0.3] * pixels.channels  # that of the weights
    load = {"segmentation": load_segmenter, "detection": load_detector}[kind]
    model, loaded = load(best)
    assert (model.in_chans, loaded["pixels"]) == (pixels.channels, pixels)
    argv = ["--eval", "--finetune", best, "--data_path", data, *ON_CPU]
    runs.run(*argv, "--dump_json", tmp_path / "results.json", main=MAINS[kind])
    assert json.loads((tmp_path / "results.json").read_text())
    script = {"segmentation": predict_segmentation, "detection": predict_detection}[kind]
    images = data / "images" / "val" if kind == "segmentation" else data / "val"
    argv = ["--checkpoint", best, "--images", images, "--amp", "fp32", "--device", "cpu"]
    runs.run(*argv, "--output_dir", tmp_path / "out", main=script.main)
    assert len(list((tmp_path / "out").glob("*.png"))) == len(list(images.iterdir()))
    sentence = refusal(
        capsys,
        *argv,
        *["--show_channels", pixels.channels + 1, "--output_dir", tmp_path / "none"],
        main=script.main,
    )
    assert f"the images have only {pixels.channels} channel" in sentence


@every_main
def test_a_stopped_run_continues_bit_for_bit(tmp_path, monkeypatch, sets, kind):
    argv = [*OF_MAIN[kind], "--model", "vit_tiny_patch4", "--data_path", sets[kind, "tiff"]]
    argv += [*flags_of(FIVE), "--mean", "auto", "--std", "auto"]
    runs.run(*argv, "--output_dir", tmp_path / "whole", main=MAINS[kind])
    place = ["--output_dir", tmp_path / "resumed"]
    run_until(3, monkeypatch, *argv, *EACH_STEP, *place, main=MAINS[kind])
    runs.run(*argv, *place, main=MAINS[kind])
    assert_identical(state_of(tmp_path / "resumed", kind), state_of(tmp_path / "whole", kind))


@every_main
def test_another_format_is_another_run(tmp_path, capsys, sets, kind):
    argv = [*OF_MAIN[kind], "--model", "vit_tiny_patch4", "--data_path", sets[kind, "tiff"]]
    argv += ["--mean", *[0.1] * 5, "--std", *[0.1] * 5, "--output_dir", tmp_path / "run"]
    runs.run(*argv, "--max_iters", 2, *flags_of(FIVE), main=MAINS[kind])
    other = flags_of(PixelFormat(5, (0.0, 65535.0)))
    assert "--value_range" in refusal(capsys, *argv, *other, main=MAINS[kind])


def test_photometric_augmentation_is_off_and_refused_if_asked_for(tmp_path, capsys, sets):
    argv = [*OF_MAIN["segmentation"], "--model", "vit_tiny_patch4", *flags_of(FIVE)]
    argv += ["--data_path", sets["segmentation", "tiff"], "--output_dir", tmp_path / "run"]
    sentence = refusal(capsys, *argv, "--photometric", main=main_segmentation.main)
    assert sentence.startswith("--photometric changes colors, which needs 8-bit RGB images")
    assert not list_checkpoints(tmp_path / "run")
    runs.run(*argv, "--max_iters", 2, main=main_segmentation.main)
    assert "--photometric is off: it changes colors" in capsys.readouterr().out


@every_main
def test_an_evaluation_takes_the_format_from_the_checkpoint(tmp_path, capsys, kind):
    sentence = refusal(capsys, "--eval", "--channels", 5, main=MAINS[kind])
    assert sentence == "--eval takes --channels from the checkpoint: leave it out"


@every_main
def test_a_channel_that_does_not_exist_cannot_be_shown(tmp_path, capsys, sets, kind):
    argv = [*OF_MAIN[kind], "--model", "vit_tiny_patch4", "--data_path", sets[kind, "tiff"]]
    argv += [*flags_of(FIVE), "--show_channels", 1, 2, 6, "--output_dir", tmp_path / "run"]
    assert "the images have only 5 channels" in refusal(capsys, *argv, main=MAINS[kind])
    assert not (tmp_path / "run").exists()
