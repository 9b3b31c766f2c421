"""main_detection.py: what every main promises, and what only this one does."""

import json
import re
import shutil
from contextlib import redirect_stdout
from functools import partial
from io import StringIO

import pytest
import timm
import torch
from PIL import Image
from pycocotools.coco import COCO

import main_detection
from models import load_detector
from models_vit import build_vit
from scripts import predict_detection
from scripts.predict_detection import CATEGORIES, RESULTS
from tests.helpers import runs
from tests.helpers.files import copied, files_in, write_coco, write_json
from tests.helpers.models import NANO
from tests.helpers.processes import NANO_MAIN, command, finish, start
from tests.helpers.runs import EACH_STEP, assert_identical, refusal, run_until, state_of
from util.compute import memory
from util.runs.checkpoint import BEST_NAME, list_checkpoints, read_checkpoint
from util.runs.epoch_log import read_log

KIND = "detection"
TINY = ["--model", "vit_tiny_patch4", "--input_size", 32, "--window_size", 3, "--global_blocks", 1]
TINY += ["--fpn_dim", 16, "--box_convs", 1, "--roi_batch", 8, "--batch_size", 2, "--max_iters", 4]
TINY += ["--eval_every", 2, "--num_workers", 0, "--amp", "fp32", "--device", "cpu", "--lr", 1e-3]
EVAL = ["--eval", "--amp", "fp32", "--num_workers", 0, "--device", "cpu", "--batch_size", 2]

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"))


def run(*argv):
    runs.run(*argv, main=main_detection.main)


def refused(capsys, *argv, code=2):
    return refusal(capsys, *argv, main=main_detection.main, code=code)


@pytest.fixture(scope="module")
def finished_runs():
    return {}


@pytest.fixture
def finished(data, finished_runs, tmp_path_factory):
    """The folder of a finished run."""
    if not finished_runs:
        finished_runs["it"] = tmp_path_factory.mktemp("finished")
        run(*TINY, "--data_path", data, "--output_dir", finished_runs["it"])
    return finished_runs["it"]


def test_memory_is_said_and_a_step_that_cannot_fit_is_refused(tmp_path, data, capsys, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 2**36)
    run(*TINY, "--data_path", data, "--output_dir", tmp_path / "fits")
    assert "x 1 (processes); memory about " in capsys.readouterr().out
    monkeypatch.setattr(memory, "available_memory", lambda: 2**20)
    place = ["--data_path", data, "--output_dir", tmp_path / "large"]
    sentence = refused(capsys, *TINY, *place)
    assert sentence.startswith("a step of 2 images needs about ")
    assert not (tmp_path / "large").exists()


# Runs that continue


@pytest.mark.parametrize(
    ("stops", "options"),
    [
        ([2, 3], ["--ema", 0.5, "--drop_path", 0.5]),
        ([1], ["--amp", "bf16", "--accum_iter", 2, "--no_masks"]),
        ([3], ["--memory", "low", "--num_workers", 2]),
    ],
    ids=str,
)
def test_a_stopped_run_continues_bit_for_bit(tmp_path, monkeypatch, data, stops, options):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    argv = [*TINY, "--data_path", data, *options]
    run(*argv, "--output_dir", whole)
    for step in stops:
        place = ["--output_dir", resumed]
        run_until(step, monkeypatch, *argv, *EACH_STEP, *place, main=main_detection.main)
    run(*argv, "--output_dir", resumed)
    assert_identical(state_of(resumed, KIND), state_of(whole, KIND))
    assert (resumed / "detection.png").read_bytes() == (whole / "detection.png").read_bytes()


def test_a_stopped_run_continues_without_the_weights_that_it_started_from(
    tmp_path, monkeypatch, data, pretrained
):
    weights, whole, resumed = tmp_path / "weights.pth", tmp_path / "whole", tmp_path / "resumed"
    weights.write_bytes(pretrained.read_bytes())
    argv = [*TINY, "--data_path", data, "--finetune", weights]
    run(*argv, "--output_dir", whole)
    stopped = [*argv, *EACH_STEP, "--output_dir", resumed]
    run_until(2, monkeypatch, *stopped, main=main_detection.main)
    weights.unlink()
    run(*argv, "--output_dir", resumed)
    assert_identical(state_of(resumed, KIND), state_of(whole, KIND))


@pytest.mark.parametrize("memory", ["medium", "low"])
def test_memory_modes_change_nothing(tmp_path, data, finished, memory):
    run(*TINY, "--data_path", data, "--memory", memory, "--output_dir", tmp_path)
    assert_identical(state_of(tmp_path, KIND), state_of(finished, KIND))


def test_a_longer_run_continues_and_a_shorter_one_is_refused(tmp_path, data, finished, capsys):
    folder = copied(finished, tmp_path / "longer")
    argv = [*TINY, "--data_path", data, "--output_dir", folder]
    assert "--max_iters 2 is below the 4" in refused(capsys, *argv, "--max_iters", 2)
    run(*argv, "--max_iters", 6)
    assert [line["step"] for line in read_log(folder)] == [2, 4, 6]


DIFFERENCES = {
    "--seed 1": ": --seed was 0 and is now 1. ",
    "--window_size 2": "--window_size was 3 and is now 2",
    "--global_blocks 0 1": "--global_blocks was [1] and is now [0, 1]",
    "--no_masks": "masks was True and is now False",
    "--no_rel_pos": "relative positions was True and is now False",
    "--lsj_scale 1 2": "--lsj_scale was [0.1, 2.0] and is now [1.0, 2.0]",
    "--hflip 0": "--hflip was 0.5 and is now 0.0",
    "--vflip 0.5": "--vflip was 0.0 and is now 0.5",
    "--no_aug": "augmentation was True and is now False",
    "--limit_images 3": "number of training images was 6 and is now 3",
    "--resume none": "would overwrite",
}


@pytest.mark.parametrize(("options", "difference"), DIFFERENCES.items(), ids=DIFFERENCES.keys())
def test_arguments_that_contradict_the_checkpoint_are_refused_with_the_difference(
    tmp_path, data, finished, capsys, options, difference
):
    folder = copied(finished, tmp_path / "same")
    argv = [*TINY, "--data_path", data, *options.split(), "--output_dir", folder]
    assert difference in refused(capsys, *argv)
    assert files_in(folder) == files_in(finished)


@pytest.mark.slow
@pytest.mark.faults
def test_two_processes_train_and_score_every_image_once(tmp_path):
    data = write_coco(tmp_path / "data", num_val=5)  # which two does not divide
    argv = [*TINY, "--data_path", data, "--batch_size", 1, "--output_dir", tmp_path / "two"]
    code, _, err = finish(start(command(NANO_MAIN, KIND, *argv, processes=2)))
    assert code == 0, err
    own = json.loads((tmp_path / "two" / "detection.json").read_text())
    assert own["val_images"] == 5
    path = tmp_path / "one.json"
    run(*EVAL, "--resume", list_checkpoints(tmp_path / "two")[-1], "--data_path", data,
        "--dump_json", path)  # fmt: skip
    one = path.read_bytes()
    argv = [*EVAL, "--resume", list_checkpoints(tmp_path / "two")[-1], "--data_path", data]
    argv += ["--dump_json", tmp_path / "both.json"]
    code, out, err = finish(start(command(NANO_MAIN, KIND, *argv, processes=2)))
    assert code == 0, err
    assert (tmp_path / "both.json").read_bytes() == one
    assert f"box AP {own['val_box_ap']:.2f} (AP50" in out


# What a run starts from


def timm_file():
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes).state_dict()


def test_the_weights_of_any_file_are_where_training_starts(tmp_path, data, weights, capsys):
    plain = build_vit(NANO, num_classes=0, pool="cls")
    torch.save({"model": plain.state_dict()}, tmp_path / "released.pth")
    torch.save(timm_file(), tmp_path / "timm.pth")
    argv = [*TINY[2:], "--data_path", data, "--max_iters", 2]
    for path in (*weights.values(), tmp_path / "released.pth", tmp_path / "timm.pth"):
        folder = tmp_path / path.parent.name / path.stem
        run(*argv, "--finetune", path, "--lr", 1e-12, "--output_dir", folder)
        model, content = load_detector(list_checkpoints(folder)[-1])
        assert content["model_name"] == "vit_tiny_patch4"
        assert content["model_options"]["img_size"] == [16, 16]  # of the positions
        file = torch.load(path, weights_only=False)
        state = file.get("model", file)
        names = {n.removeprefix("encoder."): t for n, t in state.items()}
        for name in ("pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight"):
            torch.testing.assert_close(model.state_dict()[name], names[name], msg=name)
        out = capsys.readouterr().out
        new = "blocks.*.attn.rel_pos_h, blocks.*.attn.rel_pos_w, pyramid, rpn, roi_heads"
        assert re.search(rf"new for this task: {re.escape(new)}$", out, re.MULTILINE)
        if path in weights.values():
            assert content["mean"] == [0.4, 0.5, 0.6]


def test_a_detector_is_no_encoder_to_start_from(tmp_path, data, finished, capsys):
    argv = [*TINY, "--data_path", data, "--finetune", finished / BEST_NAME]
    sentence = refused(capsys, *argv, "--output_dir", tmp_path)
    assert "which a plain ViT does not have: use another file" in sentence


# What a run learns and writes


@pytest.mark.slow
def test_colored_objects_are_found(tmp_path, data):
    argv = [*TINY, "--max_iters", 120, "--eval_every", 120, "--lr", 3e-3, "--layer_decay", 1]
    argv += ["--fpn_dim", 32, "--input_size", 64, "--roi_batch", 32, "--batch_size", 4]
    run(*argv, "--lsj_scale", 0.8, 1.25, "--data_path", data, "--output_dir", tmp_path)
    last = read_log(tmp_path)[-1]
    assert last["val_box_ap50"] > 50 and last["val_mask_ap50"] > 50


def test_a_run_writes_scores_pictures_and_checkpoints(data, finished):
    content = json.loads((finished / "detection.json").read_text())
    assert [row["class"] for row in content["classes"]] == ["box", "disc"]
    assert [row["objects"] for row in content["classes"]] == [3, 3]
    assert (content["step"], content["val_images"]) == (4, 4)
    log = read_log(finished)
    assert [line["step"] for line in log] == [2, 4]
    json.loads((finished / "log.jsonl").read_text().splitlines()[-1], parse_constant=pytest.fail)
    for key in ("val_box_ap", "val_mask_ap50", "val_mask_ap_small"):
        assert content[key] == log[-1][key]
    width, height = Image.open(finished / "detection.png").size
    assert width >= 2 * 64 and height >= 2 * 48 + 2 * 64
    best = read_checkpoint(finished / BEST_NAME, KIND)
    assert best["progress"]["best"]["val_box_ap"] == max(line["val_box_ap"] for line in log)
    assert best["classes"] == ["box", "disc"]


def test_a_run_is_as_many_epochs_as_asked_for(tmp_path, data):
    at = TINY.index("--max_iters")
    argv = [*TINY[:at], *TINY[at + 4 :], "--batch_size", 4]  # without a number of steps
    run(*argv, "--data_path", data, "--epochs", 2, "--output_dir", tmp_path)
    assert [line["step"] for line in read_log(tmp_path)] == [2, 4]


def test_moving_averages_are_what_is_evaluated(tmp_path, data):
    run(*TINY, "--data_path", data, "--ema", 0.9, "--output_dir", tmp_path)
    path = list_checkpoints(tmp_path)[-1]
    model, _ = load_detector(path)
    content = read_checkpoint(path, KIND)
    assert_identical(dict(model.state_dict()), content["ema"])
    assert not torch.equal(content["ema"]["pos_embed"], content["model"]["pos_embed"])


def test_without_validation_images_a_run_says_so_and_trains(tmp_path, data, capsys):
    alone = copied(data, tmp_path / "data")
    (alone / "annotations" / "instances_val.json").unlink()
    run(*TINY, "--data_path", alone, "--output_dir", tmp_path / "run")
    assert "no validation images" in capsys.readouterr().out
    assert "val_box_ap" not in read_log(tmp_path / "run")[-1]
    assert not (tmp_path / "run" / BEST_NAME).exists()


@pytest.mark.parametrize("masks", [True, False])
def test_an_evaluation_repeats_the_run_s_own_and_writes_coco_results(
    tmp_path, data, finished, capsys, masks
):
    if not masks:
        finished = tmp_path / "boxes"
        run(*TINY, "--no_masks", "--data_path", data, "--output_dir", finished)
    before, path = files_in(finished), tmp_path / "results.json"
    last = read_log(finished)[-1]
    assert ("val_mask_ap" in last) == masks
    capsys.readouterr()
    checkpoint = list_checkpoints(finished)[-1]
    run(*EVAL, "--data_path", data, "--finetune", checkpoint, "--dump_json", path)
    out = capsys.readouterr().out
    assert f"box AP {last['val_box_ap']:.2f} (AP50 {last['val_box_ap50']:.2f})" in out
    assert re.search(r"^[\d:]{8} disc +", out, re.MULTILINE)
    assert files_in(finished) == before
    with redirect_stdout(StringIO()):
        coco = COCO(data / "annotations" / "instances_val.json")
        results = json.loads(path.read_text())
        assert results or last["val_box_ar"] == 0
        if results:
            assert len(coco.loadRes(str(path)).anns) == len(results)
    assert all(("segmentation" in result) == masks for result in results)
    run(*EVAL, "--data_path", data, "--output_dir", finished)
    assert f"{finished}" in capsys.readouterr().out


def predict(checkpoint, images, out):
    argv = ["--checkpoint", checkpoint, "--images", images, "--amp", "fp32", "--device", "cpu"]
    return [*argv, "--min_score", 0.1, "--output_dir", out]


def test_predictions_are_what_the_evaluation_finds(tmp_path, data, finished, capsys):
    path, out = tmp_path / "results.json", tmp_path / "out"
    run(*EVAL, "--data_path", data, "--finetune", finished / BEST_NAME, "--dump_json", path)
    images = copied(data / "val", tmp_path / "val")
    (images / "broken.png").write_text("no image")
    runs.run(*predict(finished / BEST_NAME, images, out), main=predict_detection.main)
    text = capsys.readouterr().out
    assert "1 broken image left out" in text and "broken.png" in text
    truth = json.loads((data / "annotations" / "instances_val.json").read_text())
    names = {entry["id"]: entry["file_name"] for entry in truth["images"]}
    ids = {entry["id"]: entry["name"] for entry in truth["categories"]}
    own = {entry["id"]: entry["name"] for entry in json.loads((out / CATEGORIES).read_text())}
    expected, found = (json.loads(p.read_text()) for p in (path, out / RESULTS))
    assert expected and [f["segmentation"] for f in found] == [e["segmentation"] for e in expected]
    for result, wanted in zip(found, expected, strict=True):
        assert result["file_name"] == names[wanted["image_id"]]
        assert own[result["category_id"]] == ids[wanted["category_id"]]
        assert (result["bbox"], result["score"]) == (wanted["bbox"], wanted["score"])
    for name in names.values():
        with Image.open(out / name) as picture, Image.open(images / name) as image:
            assert picture.size == image.size
    again = predict(finished / BEST_NAME, images, out)
    assert "is not empty: choose another" in refusal(capsys, *again, main=predict_detection.main)


def test_nothing_is_written_where_predictions_are_impossible(tmp_path, finished, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    refused = partial(refusal, capsys, main=predict_detection.main)
    assert "no images found" in refused(*predict(finished / BEST_NAME, images, out))
    Image.new("RGB", (9, 9)).save(images / "a.png")
    assert "checkpoint not found" in refused(*predict(tmp_path / "nothing.pth", images, out))
    assert not out.exists()


def test_broken_images_and_annotations_are_named_counted_and_limited(tmp_path, data, capsys):
    broken = copied(data, tmp_path / "data")
    (broken / "train" / "004.png").write_text("no image")
    (broken / "val" / "001.png").write_text("no image")
    argv = [*TINY, "--data_path", broken, "--output_dir", tmp_path / "run"]
    assert "above the limit of 1.00%" in refused(capsys, *argv)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    path = broken / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["annotations"][3]["bbox"] = [0, 0, 0, 0]
    write_json(path, content)
    run(*argv, "--max_broken", 0.5)
    out = capsys.readouterr().out
    assert "001.png" in out and "annotation 3 (its bbox is 0 x 0 px)" in out
    assert read_log(tmp_path / "run")[-1]["val_images"] == 3


# What is refused

REFUSED = {
    "--data_path nowhere": "nowhere does not exist",
    "--data_path EMPTY": "has neither annotations/instances_train2017.json nor",
    "--train_ann nowhere.json": "nowhere.json is not an existing file: correct the path",
    "--val_images nowhere": "--val_images needs --val_ann",
    "--finetune nowhere.pth": "checkpoint not found: nowhere.pth",
    "--finetune FILE": "FILE",
    "--resume nowhere.pth": "checkpoint not found: nowhere.pth",
    "--epochs 3": "--max_iters and --epochs both set the length: give only one of them",
    "--eval": "--roi_batch, --window_size from the checkpoint: leave them out",
    "--global_blocks 0 12": "global blocks are numbered from 0 to 1, not 0, 12",
    "--global_blocks -1": "--global_blocks",
    "--input_size 30": "a patch size of 4 does not divide 30 px",
    "--lsj_scale 2 1": "--lsj_scale takes the smaller factor first",
    "--std 0 1 1": "std must be above 0",
    "--eval_every 3": "the run's 4 steps are not a multiple of --eval_every 3",
    "--warmup_iters 4": "--warmup_iters 4 must be below the run's 4 steps",
    "--dump_json x.json": "--dump_json needs --eval",
    "--ema 1": "--ema 1 would never update the average",
    "--drop_path 1": "--drop_path 1 would skip the last block",
    "--device abacus": "unknown --device abacus",
    "--output_dir FILE": "--output_dir",
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.items(), ids=REFUSED.keys())
def test_wrong_input_is_refused_in_one_sentence_and_nothing_is_written(
    tmp_path, data, capsys, options, reason
):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("mine")
    for word in ("EMPTY", "FILE"):
        options = options.replace(word, str(tmp_path / word))
    argv = [*TINY, "--data_path", data, "--output_dir", tmp_path / "run", *options.split()]
    before = files_in(tmp_path)
    assert reason in refused(capsys, *argv)
    assert files_in(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--no_masks", "--no_rel_pos", "--mean 0.1 0.2 0.3"])
def test_an_evaluation_takes_the_model_from_the_checkpoint(data, finished, capsys, option):
    argv = [*EVAL, "--finetune", finished / BEST_NAME, "--data_path", data, *option.split()]
    flag = option.split()[0]
    assert f"--eval takes {flag} from the checkpoint: leave it out" in refused(capsys, *argv)


def test_scores_are_never_written_over_a_file_or_a_folder(
    tmp_path, data, finished, capsys, monkeypatch
):
    (tmp_path / "mine.json").write_text("mine")
    monkeypatch.setattr(main_detection, "evaluate_only", pytest.fail)
    argv = [*EVAL, "--finetune", finished / BEST_NAME, "--data_path", data, "--dump_json"]
    sentence = refused(capsys, *argv, tmp_path / "mine.json")
    assert f"{tmp_path / 'mine.json'} already exists" in sentence
    assert "is a folder: give the path of a file" in refused(capsys, *argv, tmp_path)
    assert (tmp_path / "mine.json").read_text() == "mine"


def test_validation_images_with_nothing_but_crowds_are_refused(tmp_path, data, finished, capsys):
    other = copied(data, tmp_path / "data")
    path = other / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["annotations"] = [entry for entry in content["annotations"] if entry["iscrowd"]]
    write_json(path, content)
    argv = [*EVAL, "--finetune", finished / BEST_NAME, "--data_path", other]
    assert f"4 images used from {path} have no objects" in refused(capsys, *argv)


def test_other_classes_than_the_checkpoint_s_are_refused(tmp_path, data, finished, capsys):
    other = copied(data, tmp_path / "data")
    path = other / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "ring"
    write_json(path, content)
    argv = [*EVAL, "--finetune", finished / BEST_NAME, "--data_path", other]
    assert "differ from the checkpoint's (ring instead of disc)" in refused(capsys, *argv)
    assert "differ from those of" in refused(
        capsys, *TINY, "--data_path", other, "--output_dir", tmp_path / "run"
    )


def test_a_checkpoint_without_its_classes_or_weights_is_refused(tmp_path, data, finished, capsys):
    content = torch.load(finished / BEST_NAME, weights_only=True)
    model = {**content["model"], "pos_embed": content["model"]["pos_embed"][:, 1:]}
    less = [{k: v for k, v in content.items() if k != key} for key in ("classes", "mean")]
    for wrong in (*less, {**content, "model": model}):
        torch.save(wrong, tmp_path / "less.pth")
        argv = [*EVAL, "--finetune", tmp_path / "less.pth", "--data_path", data]
        assert "use another file" in refused(capsys, *argv)


@pytest.mark.faults
def test_a_diverging_run_saves_nothing_that_is_not_finite(tmp_path, data, capsys):
    argv = [*TINY, "--data_path", data, "--lr", 1e35, "--output_dir", tmp_path]
    assert "not finite: the first module to return NaN" in refused(capsys, *argv, code=1)
    assert list_checkpoints(tmp_path) == []
