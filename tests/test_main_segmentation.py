"""main_segmentation.py: what every main promises, and what only this one does."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import main_segmentation
from models import load_segmenter
from scripts import predict_segmentation
from tests.helpers import runs
from tests.helpers.files import copied, files_in, write_masked_images
from tests.helpers.processes import NANO_MAIN, command, finish, start
from tests.helpers.runs import EACH_STEP, assert_identical, refusal, run_until, state_of
from util.compute import compiling
from util.runs.checkpoint import BEST_NAME, list_checkpoints, read_checkpoint
from util.runs.epoch_log import read_log
from util.settings import model as model_settings
from util.settings.model import ModelSize

KIND = "segmentation"
TINY = ["--batch_size", 2, "--max_iters", 6, "--eval_every", 3, "--num_workers", 0]
TINY += ["--amp", "fp32", "--device", "cpu", "--crop_size", 16, "--lr", 1e-3]
LINEAR = [*TINY, "--model", "vit_tiny_patch4"]
UPERNET = [*TINY, "--model", "vit_tiny_patch16", "--head", "upernet", "--head_dim", 8]
UPERNET += ["--out_indices", 0, 1, 2, 3]
HEADS = {"linear": LINEAR, "upernet": UPERNET}
# Enough to learn the colors.
LEARNING = [
    "--max_iters",
    100,
    "--eval_every",
    50,
    "--lr",
    5e-3,
    "--layer_decay",
    1,
    "--batch_size",
    6,
]

pytestmark = pytest.mark.usefixtures("nano", "deeper")
every_head = pytest.mark.parametrize("head", HEADS)


@pytest.fixture
def deeper(monkeypatch):
    """UperNet reads four blocks, which the nano model does not have."""
    monkeypatch.setitem(model_settings.SIZES, "tiny_patch16", ModelSize(4, 32, 4, 2, img_size=16))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_masked_images(tmp_path_factory.mktemp("segmentation"))


def run(*argv):
    runs.run(*argv, main=main_segmentation.main)


def refused(capsys, *argv, code=2):
    return refusal(capsys, *argv, main=main_segmentation.main, code=code)


@pytest.fixture(scope="module")
def finished_runs():
    return {}


@pytest.fixture
def finished(request, data, finished_runs, tmp_path_factory):
    """The folder of a finished run of each head."""
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    head = values.get("head", "linear")
    if head not in finished_runs:
        finished_runs[head] = tmp_path_factory.mktemp(head)
        run(*HEADS[head], "--data_path", data, "--output_dir", finished_runs[head])
    return finished_runs[head]


# Runs that continue


@pytest.mark.parametrize(
    ("head", "stops", "options"),
    [
        ("linear", [2, 5], ["--ema", 0.5, "--drop_path", 0.5]),
        ("linear", [4], ["--amp", "bf16", "--accum_iter", 2]),
        ("upernet", [2, 5], ["--ema", 0.5]),
        ("upernet", [3, 4], ["--amp", "bf16", "--memory", "low"]),
    ],
    ids=str,
)
def test_a_stopped_run_continues_bit_for_bit(tmp_path, monkeypatch, data, head, stops, options):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    argv = [*HEADS[head], "--data_path", data, *options]
    run(*argv, "--output_dir", whole)
    for step in stops:
        place = ["--output_dir", resumed]
        run_until(step, monkeypatch, *argv, *EACH_STEP, *place, main=main_segmentation.main)
    run(*argv, "--output_dir", resumed)
    assert_identical(state_of(resumed, KIND), state_of(whole, KIND))
    assert (resumed / "segmentation.png").read_bytes() == (whole / "segmentation.png").read_bytes()


def test_a_stopped_run_continues_without_the_weights_that_it_started_from(
    tmp_path, monkeypatch, data, pretrained
):
    weights, whole, resumed = tmp_path / "weights.pth", tmp_path / "whole", tmp_path / "resumed"
    weights.write_bytes(pretrained.read_bytes())
    argv = [*HEADS["linear"], "--data_path", data, "--finetune", weights]
    run(*argv, "--output_dir", whole)
    stopped = [*argv, *EACH_STEP, "--output_dir", resumed]
    run_until(2, monkeypatch, *stopped, main=main_segmentation.main)
    weights.unlink()
    run(*argv, "--output_dir", resumed)
    assert_identical(state_of(resumed, KIND), state_of(whole, KIND))


@every_head
@pytest.mark.parametrize("memory", ["medium", "low"])
def test_memory_modes_and_workers_change_nothing(tmp_path, data, finished, head, memory):
    argv = [*HEADS[head], "--data_path", data, "--memory", memory, "--num_workers", 2]
    run(*argv, "--output_dir", tmp_path)
    assert_identical(state_of(tmp_path, KIND), state_of(finished, KIND))


def test_a_longer_run_continues_and_a_shorter_one_is_refused(tmp_path, data, finished, capsys):
    folder = copied(finished, tmp_path / "longer")
    argv = [*LINEAR, "--data_path", data, "--output_dir", folder]
    assert "--max_iters 3 is below the 6" in refused(capsys, *argv, "--max_iters", 3)
    run(*argv, "--max_iters", 9)
    assert "--max_iters increased from 6 to 9: from epoch 3 on" in capsys.readouterr().out
    assert [line["step"] for line in read_log(folder)] == [3, 6, 9]


DIFFERENCES = {
    "--seed 1": ": --seed was 0 and is now 1. ",
    "--batch_size 3": "effective batch size was 2 and is now 3",
    "--head upernet --model vit_tiny_patch16 --out_indices 0 1 2 3": "--head was 'linear'",
    "--crop_size 24": "--crop_size was [16, 16] and is now [24, 24]",
    "--scale 1 2": "--scale was [0.5, 2.0] and is now [1.0, 2.0]",
    "--no-photometric": "--photometric was True and is now False",
    "--hflip 0": "--hflip was 0.5 and is now 0.0",
    "--vflip 0.5": "--vflip was 0.0 and is now 0.5",
    "--eval_every 2": "--eval_every was 3 and is now 2",
    "--short_side 30": "--short_side was None and is now 30",
    "--resume none": "would overwrite",
}


@pytest.mark.parametrize(("options", "difference"), DIFFERENCES.items(), ids=DIFFERENCES.keys())
def test_arguments_that_contradict_the_checkpoint_are_refused_with_the_difference(
    tmp_path, data, finished, capsys, options, difference
):
    folder = copied(finished, tmp_path / "same")
    argv = [*LINEAR, "--data_path", data, *options.split(), "--output_dir", folder]
    assert difference in refused(capsys, *argv)
    assert files_in(folder) == files_in(finished)


@pytest.mark.slow
@pytest.mark.faults
def test_two_processes_train_and_count_every_pixel_once(tmp_path, data):
    argv = [*LINEAR, "--data_path", data, "--batch_size", 1, "--output_dir", tmp_path / "two"]
    code, _, err = finish(start(command(NANO_MAIN, KIND, *argv, processes=2)))
    assert code == 0, err
    last = read_log(tmp_path / "two")[-1]
    run("--eval", "--resume", list_checkpoints(tmp_path / "two")[-1], "--data_path", data,
        "--dump_json", tmp_path / "one.json", "--amp", "fp32", "--num_workers", 0)  # fmt: skip
    one = json.loads((tmp_path / "one.json").read_text())
    for name in ("val_miou", "val_mean_accuracy", "val_pixel_accuracy", "val_images"):
        assert one[name] == pytest.approx(last[name], abs=1e-9)


@pytest.mark.slow
@pytest.mark.faults
def test_a_process_without_a_validation_image_takes_part(tmp_path):
    data = write_masked_images(tmp_path / "data", num_val=1)
    argv = [*LINEAR, "--data_path", data, "--batch_size", 1, "--output_dir", tmp_path / "two"]
    code, _, err = finish(start(command(NANO_MAIN, KIND, *argv, processes=2)))
    assert code == 0, err
    assert [line["val_images"] for line in read_log(tmp_path / "two")] == [1, 1]


# What a run learns and writes


@pytest.mark.parametrize("head", HEADS)
def test_colors_are_learned_from_masks(tmp_path, data, head):
    wider = ["--head_dim", 32] if head == "upernet" else []
    run(*HEADS[head], *LEARNING, *wider, "--data_path", data, "--output_dir", tmp_path)
    log = read_log(tmp_path)
    assert log[-1]["val_miou"] > 50
    assert log[-1]["val_images"] == 3
    best = read_checkpoint(tmp_path / BEST_NAME, KIND)
    assert best["progress"]["best"]["val_miou"] == max(line["val_miou"] for line in log)


def test_the_weights_of_any_file_are_where_training_starts(tmp_path, data, weights, capsys):
    for path in weights.values():
        folder = tmp_path / path.parent.name
        run(*TINY, "--data_path", data, "--finetune", path, "--output_dir", folder)
        assert "position embeddings" not in capsys.readouterr().out
        header = read_checkpoint(list_checkpoints(folder)[-1], KIND)
        assert header["mean"] == [0.4, 0.5, 0.6]
        assert header["model_name"] == "vit_tiny_patch4"
    run(*TINY, "--data_path", data, "--finetune", path, "--crop_size", 24, 16,
        "--output_dir", tmp_path / "wide")  # fmt: skip
    assert "position embeddings resampled from 4 x 4 patches to 6 x 4" in capsys.readouterr().out


def test_an_encoder_continues_from_a_segmentation_checkpoint(tmp_path, data, finished, capsys):
    run(*TINY, "--data_path", data, "--finetune", finished / BEST_NAME, "--output_dir", tmp_path)
    assert "from the segmentation checkpoint of this project" in capsys.readouterr().out


@every_head
def test_a_run_writes_scores_of_every_class_and_a_picture(data, finished, head):
    content = json.loads((finished / "segmentation.json").read_text())
    assert [row["class"] for row in content["classes"]] == ["ground", "red", "green"]
    assert content["step"] == 6
    assert content["val_miou"] == read_log(finished)[-1]["val_miou"]
    width, height = Image.open(finished / "segmentation.png").size
    assert width == 3 * 24 + 2 * 4 or width > 3 * 24
    assert height > 3 * 20


@every_head
@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_an_evaluation_repeats_the_run_s_own(tmp_path, data, finished, capsys, head, mode):
    before = files_in(finished)
    argv = ["--eval", "--data_path", data, "--eval_mode", mode, "--amp", "fp32", "--num_workers", 0]
    run(*argv, "--finetune", list_checkpoints(finished)[-1], "--output_dir", tmp_path / "none")
    out = capsys.readouterr().out
    miou = float(re.search(r"mIoU ([\d.]+) %", out)[1])
    if mode == "slide":
        assert miou == pytest.approx(read_log(finished)[-1]["val_miou"], abs=0.005)
    assert re.search(r"^[\d:]{8} green +", out, re.MULTILINE)
    assert not (tmp_path / "none").exists()
    assert files_in(finished) == before
    run(*argv, "--output_dir", finished)
    assert f"{finished}" in capsys.readouterr().out


def test_moving_averages_are_what_is_evaluated(tmp_path, data):
    run(*LINEAR, "--data_path", data, "--ema", 0.9, "--output_dir", tmp_path)
    path = list_checkpoints(tmp_path)[-1]
    model, _ = load_segmenter(path)
    assert_identical(dict(model.state_dict()), read_checkpoint(path, KIND)["ema"])


def test_without_validation_images_a_run_says_so_and_trains(tmp_path, data, capsys):
    alone = copied(data, tmp_path / "data")
    for kind in ("images", "annotations"):
        shutil.rmtree(alone / kind / "val")
    run(*LINEAR, "--data_path", alone, "--output_dir", tmp_path / "run")
    assert "no validation images" in capsys.readouterr().out
    assert "val_miou" not in read_log(tmp_path / "run")[-1]
    assert not (tmp_path / "run" / BEST_NAME).exists()


# Predictions


@every_head
def test_predictions_are_index_masks_under_the_images_names(tmp_path, data, finished, head, capsys):
    images = copied(data / "images", tmp_path / "images")
    (images / "val" / "broken.png").write_text("no image")
    argv = ["--checkpoint", finished / BEST_NAME, "--images", images, "--amp", "fp32"]
    out = tmp_path / "out"
    runs.run(*argv, "--output_dir", out, main=predict_segmentation.main)
    text = capsys.readouterr().out
    assert "12 masks" in text and "1 broken image left out" in text and "broken.png" in text
    names = sorted(p.relative_to(images).as_posix() for p in images.rglob("[0-9]*.png"))
    assert sorted(p.relative_to(out).as_posix() for p in out.glob("[tv]*/*.png")) == names
    assert sorted(p.relative_to(out / "overlays").as_posix() for p in out.rglob("overlays/*/*.png"))
    for name in names:
        mask, overlay = Image.open(out / name), Image.open(out / "overlays" / name)
        assert mask.mode == "P" and mask.size == (24, 20) == overlay.size
        assert set(np.unique(mask)) <= {0, 1, 2}
    assert (out / "classes.txt").read_text() == "0 ground\n1 red\n2 green\n"
    sentence = refusal(capsys, *argv, "--output_dir", out, main=predict_segmentation.main)
    assert "is not empty: choose another --output_dir" in sentence


def test_predictions_agree_with_the_evaluation(tmp_path, data, finished):
    run("--eval", "--finetune", finished / BEST_NAME, "--data_path", data, "--amp", "fp32",
        "--num_workers", 0, "--dump_json", tmp_path / "scores.json")  # fmt: skip
    runs.run("--checkpoint", finished / BEST_NAME, "--images", data / "images" / "val", "--amp",
             "fp32", "--output_dir", tmp_path / "out", main=predict_segmentation.main)  # fmt: skip
    hits = total = 0
    for path in (data / "annotations" / "val").iterdir():
        labels, found = (np.asarray(Image.open(p)) for p in (path, tmp_path / "out" / path.name))
        hits += (labels == found).sum()
        total += (labels != 255).sum()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert 100 * hits / total == pytest.approx(scores["val_pixel_accuracy"])


# What is refused

REFUSED = {
    "--data_path nowhere": "nowhere does not exist",
    "--data_path EMPTY": "annotations/train",
    "--dataset imagenet": "invalid choice: 'imagenet'",
    "--crop_size 18": "a patch size of 4 does not divide 18 x 18 px",
    "--crop_size 16 16 16": "--crop_size takes one side, or a height and a width",
    "--std 0 1 1": "std must be above 0",
    "--mean 0.5": "--mean has 1 number, but the images have 3 channels",
    "--finetune nowhere.pth": "checkpoint not found: nowhere.pth",
    "--resume nowhere.pth": "checkpoint not found: nowhere.pth",
    "--nb_classes 2": "names 3 classes, but --nb_classes is 2",
    "--classes nowhere.txt": "cannot read the names of classes in nowhere.txt",
    "--ignore_index 254": "number the classes from 0 without gaps",
    "--head upernet": "UperNet reads four blocks",
    "--head upernet --batch_size 1": "cannot normalize a batch of 1: use --batch_size 2",
    "--head_dim 8": "--head_dim is for --head upernet: leave it out",
    "--scale 2 1": "--scale takes the smaller factor first",
    "--stride 17": "--stride 17 would leave gaps between windows of 16 px: lower it",
    "--eval_every 4": "the run's 6 steps are not a multiple of --eval_every 4",
    "--warmup_iters 6": "--warmup_iters 6 must be below the run's 6 steps",
    "--dump_json x.json": "--dump_json needs --eval",
    "--ema 1": "--ema 1 would never update the average",
    "--attention_backend cudnn": "--attention_backend cudnn cannot run this model",
    "--device abacus": "unknown --device abacus",
    "--output_dir FILE": "--output_dir",
    "--eval": "--eval takes --crop_size from the checkpoint: leave it out",
    "--ignore_index 1": "number the classes from 0 without gaps",
    "--ignore_index 0": "--ignore_index 0 would leave out the first class: use --reduce_zero_label",
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.items(), ids=REFUSED.keys())
def test_wrong_input_is_refused_in_one_sentence_and_nothing_is_written(
    tmp_path, data, capsys, options, reason
):
    (tmp_path / "EMPTY" / "images" / "train").mkdir(parents=True)
    (tmp_path / "EMPTY" / "classes.txt").write_text("a\nb\n")
    (tmp_path / "FILE").write_text("mine")
    for word in ("EMPTY", "FILE"):
        options = options.replace(word, str(tmp_path / word))
    argv = [*LINEAR, "--data_path", data, "--output_dir", tmp_path / "run", *options.split()]
    before = files_in(tmp_path)
    assert reason in refused(capsys, *argv)
    assert files_in(tmp_path) == before
    assert not (tmp_path / "run").exists()


def test_scores_are_never_written_over_a_file(tmp_path, data, finished, capsys, monkeypatch):
    (tmp_path / "mine.json").write_text("mine")
    monkeypatch.setattr(main_segmentation, "evaluate_only", pytest.fail)
    argv = ["--eval", "--finetune", finished / BEST_NAME, "--data_path", data, "--dump_json"]
    sentence = refused(capsys, *argv, tmp_path / "mine.json")
    assert f"{tmp_path / 'mine.json'} already exists" in sentence
    assert (tmp_path / "mine.json").read_text() == "mine"


def test_a_label_out_of_range_ends_the_run_with_the_name_of_its_mask(tmp_path, data, capsys):
    wrong = copied(data, tmp_path / "data")
    path = wrong / "annotations" / "val" / "001.png"
    Image.new("L", (24, 20), 7).save(path)
    argv = [*LINEAR, "--data_path", wrong, "--output_dir", tmp_path / "run"]
    sentence = refused(capsys, *argv)
    assert f"{path} has label 7, but the classes are 0 to 2" in sentence


def test_broken_pairs_are_named_counted_and_limited(tmp_path, data, capsys):
    broken = copied(data, tmp_path / "data")
    Image.new("L", (8, 8)).save(broken / "annotations" / "val" / "001.png")
    (broken / "images" / "train" / "004.png").write_text("no image")
    argv = [*LINEAR, "--data_path", broken, "--output_dir", tmp_path / "run"]
    assert "above the limit of 1.00%" in refused(capsys, *argv)
    run(*argv, "--max_broken", 0.5)
    out = capsys.readouterr().out
    assert "001.png" in out and "its mask has 8 x 8 px, the image 24 x 20 px" in out
    assert read_log(tmp_path / "run")[-1]["val_images"] == 2


def test_an_evaluation_reads_masks_as_the_training_did(tmp_path, data, capsys):
    shifted = copied(data, tmp_path / "data")
    for path in (shifted / "annotations").rglob("*.png"):
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 255, 9, labels).astype(np.uint8)).save(path)
    (shifted / "classes.txt").write_text("red\ngreen\n")
    argv = ["--data_path", shifted, "--output_dir", tmp_path / "run"]
    run(*LINEAR, *argv, "--reduce_zero_label", "--ignore_index", 9)
    capsys.readouterr()
    run("--eval", *argv, "--amp", "fp32", "--num_workers", 0)
    out = capsys.readouterr().out
    assert "--ignore_index 9, --reduce_zero_label True, --short_side None" in out
    assert f"mIoU {read_log(tmp_path / 'run')[-1]['val_miou']:.2f} %" in out
    assert "the checkpoint has 2 classes, but ade20k has 150" in refused(
        capsys, "--eval", "--resume", list_checkpoints(tmp_path / "run")[-1], "--dataset",
        "ade20k", "--data_path", data / "images",
    )  # fmt: skip


def test_a_partner_of_the_validation_folder_is_missed(tmp_path, data, capsys):
    half = copied(data, tmp_path / "data")
    shutil.rmtree(half / "images" / "val")
    argv = [*LINEAR, "--data_path", half, "--output_dir", tmp_path / "run"]
    assert f"{half}/images/val does not exist" in refused(capsys, *argv)


def test_a_checkpoint_that_lacks_what_its_labels_mean_is_refused(tmp_path, data, finished, capsys):
    content = torch.load(finished / BEST_NAME, weights_only=True)
    for key in ("ignore_index", "classes", "short_side"):
        torch.save({k: v for k, v in content.items() if k != key}, tmp_path / "less.pth")
        argv = ["--eval", "--finetune", tmp_path / "less.pth", "--data_path", data]
        assert "use another file" in refused(capsys, *argv)


def test_other_classes_than_the_checkpoint_s_are_refused(tmp_path, data, finished, capsys):
    other = tmp_path / "other.txt"
    other.write_text("ground\ngreen\nred\n")
    argv = ["--eval", "--finetune", finished / BEST_NAME, "--data_path", data, "--classes", other]
    assert "class 1 is green, not red" in refused(capsys, *argv, "--output_dir", tmp_path / "run")


@pytest.mark.faults
def test_a_diverging_run_saves_nothing_that_is_not_finite(tmp_path, data, capsys):
    argv = [*LINEAR, "--data_path", data, "--lr", 1e35, "--output_dir", tmp_path]
    assert "not finite: the first module to return NaN" in refused(capsys, *argv, code=1)
    assert list_checkpoints(tmp_path) == []


def test_a_compiled_model_computes_the_same(tmp_path, data, finished, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: None)
    monkeypatch.setattr(compiling, "check_compiler", lambda device: None)
    run(*LINEAR, "--data_path", data, "--compile", "--output_dir", tmp_path)
    assert_identical(state_of(tmp_path, KIND), state_of(finished, KIND))
