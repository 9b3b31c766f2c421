"""Pre-training from the command line: what a run leaves, how it goes on, and what it refuses."""

import argparse
import errno
import json
import math
import re
import shutil

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_knn
import main_pretrain
from engine_pretrain import train_one_epoch
from main_pretrain import parse_args
from models import MODELS, load_model
from tests.helpers.files import RunsCode, copied, files_in, write_classes, write_images
from tests.helpers.models import NANO, use_nano_models
from tests.helpers.processes import command, finish, start
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
from util.data.images import HELD_OUT
from util.errors import InputError
from util.eval import monitor
from util.eval.monitor import evaluate, is_picture_due
from util.eval.reconstructions import MOMENTS_NOTE
from util.normalization import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from util.runs.checkpoint import list_checkpoints, read_checkpoint
from util.runs.epoch_log import read_log
from util.runs.run import versions
from util.settings.model import SIZES

MAE = ["--model", "mae_vit_tiny_patch4"]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 37 images, in five steps of 8 per epoch, and 5 validation images."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "train", 37)
    write_images(folder / "val", 5)
    return folder


@pytest.fixture(scope="session")
def finished(images, tmp_path_factory):
    """The output folder of a finished run of two epochs, and its arguments."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        argv = [*TINY, "--data_path", images, "--save_every", 1]
        run(*argv, "--output_dir", folder)
    return folder, argv


def is_finite(content):
    if isinstance(content, dict | list):
        values = content.values() if isinstance(content, dict) else content
        return all(map(is_finite, values))
    if isinstance(content, torch.Tensor):
        return bool(content.isfinite().all())
    return not isinstance(content, float) or math.isfinite(content)


def test_a_copy_without_a_repository_can_be_told_its_commit(monkeypatch):
    monkeypatch.setenv("COMMIT", "1234abc")
    assert versions()["commit"] == "1234abc"


# A run from start to end


def assert_complete(folder, num_epochs, *, has_val):
    """A folder has all that a run leaves."""
    records = json.loads((folder / "args.json").read_text())
    assert records["args"]["output_dir"] == str(folder)
    assert {"commit", "python", "torch", "torchvision", "timm"} < set(records["versions"])
    assert re.fullmatch(r"[0-9a-f]{40}\+?|unknown", records["versions"]["commit"])
    log = [line for line in read_log(folder) if line["epoch"]]  # 0: the untrained network
    assert [line["epoch"] for line in log] == list(range(1, num_epochs + 1))
    assert all({"step", "loss", "grad_norm", "lr", "broken_images"} <= set(line) for line in log)
    assert ("val_loss" in log[-1]) == has_val
    with Image.open(folder / "reconstructions.png") as figure:
        assert figure.mode == "RGB"
    events = EventAccumulator(str(folder)).Reload()
    learning = {"loss", "loss_by_step", "lr_by_step"}
    learning |= {"val_loss", "val_psnr", "blind_loss"} if has_val else set()
    scalars = {f"1_learning/{name}" for name in learning} | {"2_speed/images_per_s_by_step"}
    assert scalars <= set(events.Tags()["scalars"])
    point = events.Scalars("1_learning/loss")[-1]
    assert (point.step, point.value) == (num_epochs, pytest.approx(log[-1]["loss"]))
    epochs = [n for n in range(num_epochs + 1) if is_picture_due(n, None) or n == num_epochs]
    assert [picture.step for picture in events.Images("reconstructions")] == epochs
    name = f"checkpoint-e{num_epochs:04d}-s000000.pth"
    assert [path.name for path in list_checkpoints(folder)] == [name]
    assert is_finite(read_checkpoint(folder / name, "pretrain"))
    return log


def test_the_optimizer_is_that_of_table_10(finished):
    groups = last_checkpoint(finished[0])["optimizer"]["param_groups"]
    assert [group["betas"] for group in groups] == [(0.9, 0.95)] * 2
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}


@pytest.mark.parametrize(
    ("argv", "num_predicted"),
    [
        (["--pred_ratio", "0.25"], 4),
        (["--mask_ratio", "0.66"], 11),  # round(16 x .66)
        (["--mask_ratio", "0.66", *MAE], 11),  # 16 - floor(16 x .34)
        (["--mask_ratio", "0.65", *MAE], 11),  # where round(16 x .65) is 10
    ],
)
def test_a_run_predicts_its_share_and_validation_images_are_decoded_whole(
    images, tmp_path, monkeypatch, nano, argv, num_predicted
):
    seen = {}

    def predicted_by(split):
        return split(torch.rand(2, 16)).predicted.shape[1]

    def train(model, loader, state, *, masking, **options):
        seen["training"] = predicted_by(masking.split)
        return train_one_epoch(model, loader, state, masking=masking, **options)

    def measure(model, loader, *, masking, **options):
        seen["validation"] = predicted_by(masking.full_split)
        return evaluate(model, loader, masking=masking, **options)

    monkeypatch.setattr(main_pretrain, "train_one_epoch", train)
    monkeypatch.setattr(monitor, "evaluate", measure)
    run(*TINY, *argv, "--epochs", 1, "--data_path", images, "--output_dir", tmp_path)
    mask_ratio = float(argv[1]) if argv[0] == "--mask_ratio" else 0.75
    num_masked = 16 - math.floor(16 * (1 - mask_ratio))
    assert seen == {"training": num_predicted, "validation": num_masked}


def test_digits_from_start_to_end(tmp_path, capsys, nano):
    run(*TINY, "--dataset", "digits", "--batch_size", 128, "--output_dir", tmp_path)
    log = assert_complete(tmp_path, 2, has_val=True)
    assert log[-1]["val_images"] == 360
    assert log[-1]["step"] == 2 * 12
    out = capsys.readouterr().out
    first, last = read_log(tmp_path)[0], log[-1]
    (block,) = re.findall(r" device   .*(?:\n.*)+ output   .*\n.*", out)
    assert block.endswith(f"          tensorboard --logdir {tmp_path}")
    for line in (
        "images   1,437 for training, 360 for validation; 4 of 16 patches seen, 12 predicted",
        "step     128 images = 128 x 1 (--accum_iter) x 1 (processes)",
        "run      2 epochs of 12 steps, 24 steps; lr ",
        f"output   {tmp_path} (with log.txt)\n",
    ):
        assert line in block
    rows = re.findall(r" (epoch \d/2  .*)", out)
    assert [row.split("  ")[0] for row in rows] == ["epoch 0/2", "epoch 1/2", "epoch 2/2"]
    assert f"untrained  k-NN {first['knn20']:5.1f}%" in rows[0]
    assert f"loss {last['loss']:.4f}  val {last['val_loss']:.4f} (blind " in rows[2]
    assert f"PSNR {last['val_psnr']:.1f} dB ({MOMENTS_NOTE}; blind " in rows[2]
    *_, summary, knn, checkpoint, tensorboard, figure = out.splitlines()
    assert f"360 validation images: val {last['val_loss']:.4f} (blind " in summary
    assert checkpoint.endswith(f"checkpoint: {tmp_path}/checkpoint-e0002-s000000.pth")
    assert knn.endswith(f"k-NN {first['knn20']:.1f}% (untrained) -> {last['knn20']:.1f}%")
    assert tensorboard.endswith(f"TensorBoard: tensorboard --logdir {tmp_path}")
    assert figure.endswith(f"figure: {tmp_path}/reconstructions.png")


def test_a_run_shows_whether_it_learns_by_nearest_neighbors(tmp_path, capsys, monkeypatch, nano):
    monkeypatch.setitem(SIZES, "tiny_patch4", NANO)
    argv = [*TINY, "--dataset", "digits", "--batch_size", 128, "--epochs", 4, "--lr", "3e-3"]
    run(*argv, "--knn_every", 2, "--output_dir", tmp_path)
    events = EventAccumulator(str(tmp_path)).Reload()
    for k in (10, 20, 100):
        points = events.Scalars(f"1_learning/knn{k}")
        assert [point.step for point in points] == [0, 2, 4]  # the untrained encoder first
        logged = {line["epoch"]: line.get(f"knn{k}") for line in read_log(tmp_path)}
        values = {point.step: pytest.approx(point.value) for point in points}
        assert logged == {1: None, 3: None, **values}
    assert "measuring the k-NN accuracy before training" in capsys.readouterr().out

    # The same as main_knn.py measures on the checkpoint.
    argv = ["--finetune", list_checkpoints(tmp_path)[-1], "--dataset", "digits", "--no-logistic"]
    argv += ["--amp", "fp32", "--crop_pct", 1, "--num_workers", 0, "--output_dir", tmp_path]
    run(*argv, main=main_knn.main)
    report = json.loads((tmp_path / "knn.json").read_text())["results"]["pre-trained"]
    assert report == {f"{k}-NN": read_log(tmp_path)[-1][f"knn{k}"] for k in (10, 20, 100)}


def test_nearest_neighbors_change_nothing_in_training(tmp_path, images, nano):
    states = []
    for every in (0, 1):
        folder = tmp_path / str(every)
        run(*TINY, "--dataset", "digits", "--knn_every", every, "--output_dir", folder)
        states.append(last_checkpoint(folder)["model"])
    assert_identical(*states)


@pytest.mark.parametrize(
    ("options", "reason"), [([], "validation images"), (["--val_path", "VAL"], "no labels")]
)
def test_nearest_neighbors_need_labels_and_validation_images(
    tmp_path, capsys, nano, options, reason
):
    images = write_images(tmp_path / "images", 8)
    places = {"VAL": write_images(tmp_path / "val", 3)}
    argv = [*TINY, "--data_path", images, "--output_dir", tmp_path / "run"]
    argv += [places.get(word, word) for word in options]
    assert reason in refusal(capsys, *argv, "--knn_every", 1)
    run(*argv)  # left to itself, a run does without
    assert "knn10" not in read_log(tmp_path / "run")[-1]


@pytest.mark.parametrize("model", [[], MAE])
def test_folder_with_validation_images(tmp_path, images, capsys, nano, model):
    run(*TINY, *model, "--data_path", images, "--eval_every", 1, "--output_dir", tmp_path)
    log = assert_complete(tmp_path, 2, has_val=True)
    assert [line["val_images"] for line in log] == [5, 5]
    out = capsys.readouterr().out
    assert "images   37 for training, 5 for validation" in out
    assert "2 epochs of 5 steps, 10 steps" in out


def test_folder_without_validation_images(tmp_path, images, capsys, nano):
    argv = ["--data_path", images / "train", "--val_fraction", 0]
    run(*TINY, *argv, "--output_dir", tmp_path)
    assert_complete(tmp_path, 2, has_val=False)
    out = capsys.readouterr().out
    assert "no validation images" in out
    assert "validation loss" not in out


def test_val_images_from_elsewhere(tmp_path, images, nano):
    paths = ["--data_path", images / "train", "--val_path", images / "val"]
    run(*TINY, *paths, "--output_dir", tmp_path)
    assert assert_complete(tmp_path, 2, has_val=True)[-1]["val_images"] == 5


@pytest.mark.parametrize(
    "options",
    [
        ["--decoder_self_attention"],
        ["--feature_maps", "0,2"],
        ["--feature_maps", "last"],
        ["--iba_softmax", "--iba_projection", "--iba_init", "xavier"],
        ["--mask_sampling", "grid", "--pred_ratio", "0.25"],
        ["--no-norm_pix_loss", "--mask_ratio", "0.5", "--clip_grad", "0.1"],
        ["--input_size", "8", "24", "--mean", "0", "0", "0", "--std", "1", "1", "1"],
        ["--amp", "bf16", "--accum_iter", "2", "--attention_backend", "math"],
        ["--amp", "fp16", "--lr", "1e-3", "--min_lr", "1e-4", "--warmup_epochs", "0"],
        [*MAE, "--feature_maps", "all"],
    ],
    ids=" ".join,
)
def test_options_train_an_epoch_and_load_again(tmp_path, images, nano, options):
    argv = [*TINY, "--data_path", images, "--epochs", "1", *options]
    run(*argv, "--output_dir", tmp_path)
    assert_complete(tmp_path, 1, has_val=True)
    model, training = load_model(list_checkpoints(tmp_path)[-1])
    assert not model.training
    assert model.encoder(torch.zeros(1, 3, *model.encoder.img_size))[-1].isfinite().all()
    args = parse_args(list(map(str, argv)))
    for name in ("mask_ratio", "mask_sampling"):
        assert training[name] == getattr(args, name)
    assert training["mean"] == (args.mean or list(IMAGENET_DEFAULT_MEAN))
    assert training["std"] == (args.std or list(IMAGENET_DEFAULT_STD))


@pytest.mark.parametrize(
    ("options", "effective", "scale"),
    [
        (
            ["--pred_ratio", "0.25"],
            "16 images = 8 x 2 (--accum_iter) x 1",
            16 / 256 / 3,
        ),
        ([], "16 images = 8 x 2 (--accum_iter) x 1", 16 / 256),
        (MAE, "16 images = 8 x 2 (--accum_iter) x 1", 16 / 256),
        (["--mask_ratio", "0.5", "--blr", "0.1"], "16 images = 8 x 2", 16 / 256),
    ],
)
def test_the_learning_rate_is_scaled_and_shown(
    tmp_path, images, capsys, nano, options, effective, scale
):
    argv = [*TINY, "--data_path", images, "--accum_iter", 2, "--warmup_epochs", 1, *options]
    run(*argv, "--log_every", 1, "--output_dir", tmp_path)
    blr = 0.1 if "--blr" in options else 1.5e-4
    out = capsys.readouterr().out
    assert f"step     {effective}" in out
    out = re.sub(r"\n\S+ {10}", " ", out)  # long lines go on in the next
    shown = re.search(r"lr (\S+) = (\S+) x (\S+) \(batch / 256 x pred_ratio / mask_ratio\)", out)
    assert [float(x) for x in shown.groups()] == pytest.approx([blr * scale, blr, scale], rel=1e-3)
    # Three steps up from 0 and three down, as the optimizer saw them.
    events = EventAccumulator(str(tmp_path)).Reload()
    rates = [point.value / (blr * scale) for point in events.Scalars("1_learning/lr_by_step")]
    assert rates == pytest.approx([0, 1 / 3, 2 / 3, 1, 0.75, 0.25], abs=1e-5)
    groups = last_checkpoint(tmp_path)["optimizer"]["param_groups"]
    assert {group["lr"] for group in groups} == {read_log(tmp_path)[-1]["lr"]}


def test_a_learning_rate_that_is_given_is_not_scaled(tmp_path, images, capsys, nano):
    argv = [*TINY, "--data_path", images, "--lr", 0.01, "--epochs", 1]
    run(*argv, "--output_dir", tmp_path)
    assert "lr 0.01 as given" in capsys.readouterr().out


def test_the_checkpoint_of_a_run_loads_with_weights_only(finished):
    path = list_checkpoints(finished[0])[-1]
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    assert torch.load(path, weights_only=True)["versions"]["torch"] == torch.__version__


# The same numbers whatever the micro-steps and workers


def test_accumulation_equals_the_large_batch(tmp_path, images, nano):
    # 37 images: steps of 16, 16 and 5.
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = [*TINY, "--data_path", images, "--lr", 1e-3, "--eval_every", 1]
    run(*argv, "--batch_size", 16, "--output_dir", whole)
    run(*argv, "--batch_size", 8, "--accum_iter", 2, "--output_dir", parts)
    for line, expected in zip(read_log(parts), read_log(whole), strict=True):
        line["seconds"] = expected["seconds"]
        assert line == pytest.approx(expected, rel=1e-5)


def test_a_stopped_run_with_several_crops_of_an_image_continues_bit_for_bit(
    tmp_path, monkeypatch, images, capsys, nano
):
    argv = [*TINY, "--data_path", images, "--lr", 1e-3, "--epochs", 1, "--repeated_aug", 4]
    run(*argv, "--output_dir", tmp_path / "whole")
    num_images = len(list((images / "train").iterdir()))
    out = capsys.readouterr().out
    steps = -(-num_images // 2)  # of two images, four crops each
    assert f"1 epoch of {steps} steps;" in out
    assert "8 images = 8 x 1 (--accum_iter) x 1 (processes), 4 crops of each image" in out
    stopped = tmp_path / "stopped"
    run_until(7, monkeypatch, *argv, *EACH_STEP, "--output_dir", stopped)
    run(*argv, "--num_workers", 1, "--output_dir", stopped)
    assert_identical(state_of(stopped), state_of(tmp_path / "whole"))


def test_the_crops_of_an_image_are_part_of_what_a_run_is(tmp_path, images, capsys, nano):
    place = ["--data_path", images, "--output_dir", tmp_path / "run", "--epochs", 1]
    run(*TINY, *place, "--repeated_aug", 2)
    assert "--repeated_aug was 2 and is now 1" in refusal(capsys, *TINY, *place)


def test_a_stopped_run_over_a_table_continues_bit_for_bit_wherever_the_table_is(
    tmp_path, monkeypatch, images, nano
):
    names = sorted(path.name for path in (images / "train").iterdir())
    rows = [f"{name},{index % 2}" for index, name in enumerate(names)]
    for table in (tmp_path / "a.csv", tmp_path / "b.csv"):
        table.write_text("\n".join(["path,label", *rows[::-1]]))
    argv = [*TINY, "--data_path", images / "train", "--epochs", 1, "--val_fraction", 0.3]
    run(*argv, "--data_csv", tmp_path / "a.csv", "--output_dir", tmp_path / "whole")
    stopped = tmp_path / "stopped"
    options = ["--output_dir", stopped, "--vflip", 0]
    run_until(1, monkeypatch, *argv, *EACH_STEP, *options, "--data_csv", tmp_path / "a.csv")
    run(*argv, *options, "--data_csv", tmp_path / "b.csv")
    assert_identical(state_of(stopped), state_of(tmp_path / "whole"))


def test_a_stopped_run_with_held_out_images_continues_bit_for_bit(
    tmp_path, monkeypatch, images, nano
):
    argv = [*TINY, "--data_path", images / "train", "--epochs", 1, "--vflip", 0]
    run(*argv, "--output_dir", tmp_path / "whole")
    stopped = [*argv, *EACH_STEP, "--output_dir", tmp_path / "stopped"]
    run_until(1, monkeypatch, *stopped)
    run(*stopped)
    assert_identical(state_of(tmp_path / "stopped"), state_of(tmp_path / "whole"))
    assert last_checkpoint(tmp_path / "whole")["identity"][HELD_OUT] == 3
    assert "val_loss" in read_log(tmp_path / "whole")[-1]


def test_a_run_that_trained_on_all_images_before_some_were_held_out_is_not_changed_silently(
    tmp_path, images, capsys, nano
):
    argv = [*TINY, "--data_path", images / "train", "--output_dir", tmp_path, "--save_every", 1]
    run(*argv, "--val_fraction", 0, "--epochs", 1)
    path = list_checkpoints(tmp_path)[-1]
    content = torch.load(path, weights_only=False)
    assert content["identity"].pop(HELD_OUT) == 0  # as in older versions
    torch.save(content, path)
    sentence = refusal(capsys, *argv)
    assert "number of training images was 37 and is now 34" in sentence
    assert "(--val_fraction 0 trains on all images, as before)" in sentence
    run(*argv, "--val_fraction", 0)
    assert read_log(tmp_path)[-1]["epoch"] == 2


def test_knn_accuracy_is_measured_on_held_out_images_of_class_folders(tmp_path, nano):
    write_classes(tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "val")
    run(*TINY, "--data_path", tmp_path / "images", "--output_dir", tmp_path / "run", "--epochs", 1)
    assert {"knn10", "val_loss"} <= set(read_log(tmp_path / "run")[-1])


def test_a_table_with_other_labels_or_another_order_is_another_run(tmp_path, images, capsys, nano):
    names = sorted(path.name for path in (images / "train").iterdir())
    table = tmp_path / "a.csv"
    argv = [*TINY, "--data_path", images / "train", "--epochs", 1, "--data_csv", table]
    argv += ["--output_dir", tmp_path / "run"]

    def write(names, labels):
        rows = (f"{name},{label}" for name, label in zip(names, labels, strict=True))
        table.write_text("\n".join(["path,label", *rows]))

    labels = [index % 2 for index in range(len(names))]
    write(names, labels)
    run(*argv)
    write(names[::-1], labels[::-1])
    assert "hash of their names was" in refusal(capsys, *argv)
    write(names, [1 - label for label in labels])
    assert "hash of the labels was" in refusal(capsys, *argv)


# Starting again


def test_a_finished_run_started_again_changes_nothing(tmp_path, finished, capsys, nano):
    before, argv = finished
    folder = copied(before, tmp_path / "again")
    run(*argv, "--output_dir", folder)
    out = capsys.readouterr().out
    assert "5 validation images: val " in out
    assert f"checkpoint: {folder}/checkpoint-e0002-s000000.pth" in out
    same = [name for name in files_in(before) if name.endswith((".pth", ".jsonl", ".png"))]
    assert {n: files_in(folder)[n] for n in same} == {n: files_in(before)[n] for n in same}
    for tag in ("1_learning/val_loss", "1_learning/loss_by_step"):
        expected, points = (
            [point.step for point in EventAccumulator(str(f)).Reload().Scalars(tag)]
            for f in (before, folder)
        )
        assert points == expected


def test_a_run_that_starts_from_a_finished_one_is_told_that_nothing_is_left(
    tmp_path, finished, capsys, nano
):
    folder, argv = finished
    path = list_checkpoints(folder)[-1]
    sentence = refusal(capsys, *argv, "--resume", path, "--output_dir", tmp_path / "run")
    assert "--epochs" in sentence


def test_each_start_is_recorded(tmp_path, finished, nano):
    before, argv = finished
    folder = copied(before, tmp_path / "again")
    run(*argv, "--log_every", 7, "--output_dir", folder)
    (earlier,) = folder.glob("args-*.json")
    starts = [json.loads(path.read_text()) for path in (earlier, folder / "args.json")]
    assert [start["args"]["log_every"] for start in starts] == [20, 7]


@pytest.mark.faults
def test_a_record_that_was_cut_off_does_not_stop_the_next_start(tmp_path, finished, nano):
    before, argv = finished
    folder = copied(before, tmp_path / "again")
    (folder / "args.json").write_text('{"time": "20')
    run(*argv, "--epochs", 3, "--output_dir", folder)
    assert len(read_log(folder)) == 3


def test_a_path_elsewhere_starts_a_run_and_its_own_checkpoints_continue_it(
    tmp_path, monkeypatch, finished, capsys, nano
):
    folder, argv = finished
    argv = [*argv, "--epochs", 3, *EACH_STEP, "--resume", list_checkpoints(folder)[-1]]
    argv += ["--output_dir", tmp_path]
    before = files_in(folder)
    run_until(13, monkeypatch, *argv)
    assert f"continuing from {folder}/" in capsys.readouterr().out
    run(*argv)
    assert f"continuing from {tmp_path}/checkpoint-e0002-s000002.pth" in capsys.readouterr().out
    progress = last_checkpoint(tmp_path)["progress"]
    assert progress == {"epoch": 3, "step_in_epoch": 0, "step": 15, "best": None}
    assert files_in(folder) == before


def test_changes_of_the_recipe_are_named_and_take_effect(tmp_path, finished, capsys, nano):
    before, argv = finished
    folder = copied(before, tmp_path / "changed")
    changes = ["--lr", 0.01, "--min_lr", 1e-3, "--clip_grad", 1e-9]
    run(*argv, *changes, "--epochs", 3, "--output_dir", folder)
    out = capsys.readouterr().out
    assert re.search(r"change: lr was 4\.68\S+ and is now 0\.01", out)
    assert "change: --min_lr was 0.0 and is now 0.001" in out
    assert "change: --clip_grad was None and is now 1e-09" in out
    assert read_log(folder)[-1]["lr"] > 1e-3
    old, new = (last_checkpoint(f)["optimizer"]["state"][0]["exp_avg"] for f in (before, folder))
    assert new.norm() < 0.9**5 * old.norm() * 1.01  # five steps without a gradient worth the name


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (MAE, "--model was 'crossmae_vit_tiny_patch4' and is now 'mae_vit_tiny_patch4'"),
        (["--mask_ratio", "0.5"], "--mask_ratio was 0.75 and is now 0.5"),
        (["--pred_ratio", "0.25"], "--pred_ratio was 0.75 and is now 0.25"),
        (["--mask_sampling", "grid"], "--mask_sampling was 'random' and is now 'grid'"),
        (["--batch_size", "2"], "settings (--effective_batch_size 8 works with any number"),
        (["--feature_maps", "last"], "--feature_maps was None and is now 'last'"),
        (["--no-norm_pix_loss"], "--norm_pix_loss was True and is now False"),
        (["--hflip", "0"], "--hflip was 0.5 and is now 0.0"),
        (["--vflip", "0.5"], "--vflip was 0.0 and is now 0.5"),
        (["--scale", "0.5", "1"], "--crop_area was [0.2, 1.0] and is now [0.5, 1.0]"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_arguments_that_contradict_the_checkpoint_are_refused_with_the_difference(
    tmp_path, finished, capsys, nano, options, difference
):
    before, argv = finished
    folder = copied(before, tmp_path / "same")
    sentence = refusal(capsys, *argv, *options, "--output_dir", folder)
    assert difference in sentence
    assert files_in(folder) == files_in(before)


def test_an_option_that_is_left_out_counts_as_a_difference(tmp_path, images, capsys, nano):
    place = ["--data_path", images, "--output_dir", tmp_path / "run", "--epochs", 1]
    run(*TINY, *place, "--feature_maps", "0,2")
    assert "--feature_maps was [0, 2] and is now None" in refusal(capsys, *TINY, *place)


def test_all_differences_are_listed_and_named_as_on_the_command_line(tmp_path, finished, capsys):
    folder, argv = finished
    changes = [*MAE, "--seed", 1, "--std", 1, 1, 1, "--mask_ratio", 0.5, "--input_size", 32]
    sentence = refusal(capsys, *argv, *changes, "--output_dir", folder)
    for flag in ("--model", "--seed", "--std", "--mask_ratio", "--input_size"):
        assert f"{flag} was" in sentence
    flags = set(re.findall(r"--\w+", sentence)) - {"--output_dir"}
    known = {f"--{name}" for name in vars(parse_args([]))}
    assert flags <= known


@pytest.mark.faults
def test_damaged_checkpoints_alone_are_refused(tmp_path, finished, capsys, nano):
    before, argv = finished
    folder = copied(before, tmp_path / "damaged")
    for path in list_checkpoints(folder):
        path.write_bytes(path.read_bytes()[:-1000])
    sentence = refusal(capsys, *argv, "--output_dir", folder)
    assert "can be read (2 tried)" in sentence


# What goes wrong on the way


def fail_saving(monkeypatch, *numbers):
    """Let the disk be full at these saves, counted from 1."""
    save, calls = torch.save, iter(range(1, 100))

    def save_or_fail(content, file):
        if next(calls) in numbers:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", save_or_fail)


@pytest.mark.faults
def test_a_run_goes_on_although_a_checkpoint_cannot_be_written(
    tmp_path, images, monkeypatch, capsys, nano
):
    fail_saving(monkeypatch, 2)
    argv = [*TINY, "--data_path", images, "--epochs", 3, "--save_every", 1, "--keep_last", 1]
    run(*argv, "--output_dir", tmp_path)
    out = capsys.readouterr().out
    assert "could not save" in out
    assert "No space left on device" in out
    assert last_checkpoint(tmp_path)["progress"]["epoch"] == 3
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.faults
def test_a_run_whose_last_checkpoint_cannot_be_written_fails_and_continues_later(
    tmp_path, images, monkeypatch, capsys, nano
):
    argv = [*TINY, "--data_path", images, "--save_every", 1, "--output_dir", tmp_path]
    with monkeypatch.context() as patch:
        fail_saving(patch, 2)
        sentence = refusal(capsys, *argv, code=1)
    assert "last checkpoint could not be written" in sentence
    assert last_checkpoint(tmp_path)["progress"]["epoch"] == 1
    assert not list(tmp_path.glob("*.tmp"))
    run(*argv)
    assert [line["epoch"] for line in read_log(tmp_path)] == [1, 2]
    assert last_checkpoint(tmp_path)["progress"]["epoch"] == 2


DIVERGES = ["--lr", "1e30", "--log_every", "3"]


@pytest.mark.faults
@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_a_diverging_run_saves_nothing_that_is_not_finite(tmp_path, images, capsys, nano, amp):
    argv = [*TINY, "--data_path", images, *EACH_STEP, *DIVERGES, "--amp", amp]
    sentence = refusal(capsys, *argv, "--output_dir", tmp_path, code=1)
    assert re.search(r"step \d+ of the run is not finite: the first module to return ", sentence)
    assert all(is_finite(read_checkpoint(path, "pretrain")) for path in list_checkpoints(tmp_path))
    assert read_log(tmp_path) == []


@pytest.mark.slow
@pytest.mark.faults
def test_a_diverging_run_ends_with_one_sentence_and_code_1(tmp_path, images):
    argv = [*TINY, "--data_path", images, *DIVERGES, "--output_dir", tmp_path]
    code, out, err = finish(start(command("main_pretrain.py", *argv)))
    assert code == 1
    assert re.fullmatch(
        r"main_pretrain\.py: error: the loss of step \d+ of the run is not finite.*\n", err
    )
    assert "Traceback" not in out
    assert list_checkpoints(tmp_path) == []


@pytest.mark.faults
def test_too_many_broken_images_end_the_run_in_one_sentence(tmp_path, images, capsys, nano):
    folder = copied(images, tmp_path / "images")
    (folder / "train" / "007.png").write_bytes(b"")
    argv = [*TINY, "--data_path", folder, "--output_dir", tmp_path / "run"]
    sentence = refusal(capsys, *argv)
    assert "007.png" in sentence
    run(*argv, "--max_broken", 0.1)
    assert read_log(tmp_path / "run")[-1]["broken_images"] >= 1


@pytest.mark.faults
def test_broken_validation_images_are_named(tmp_path, images, capsys, nano):
    folder = copied(images, tmp_path / "images")
    (folder / "val" / "003.png").write_bytes(b"")
    run(*TINY, "--data_path", folder, "--max_broken", 0.5, "--output_dir", tmp_path / "run")
    assert "003.png" in capsys.readouterr().out


# What is refused


REFUSED = {
    "--pred_ratio 0.8": "--pred_ratio 0.8 is above --mask_ratio 0.75",
    "--mask_ratio 0.99": "none of 16 patches visible",
    "--pred_ratio 0.01": "predicts none of 16 patches",
    "--model mae_vit_tiny_patch4 --pred_ratio 0.25": "MAE's decoder predicts all masked patches",
    "--model mae_vit_tiny_patch4 --decoder_self_attention": "--decoder_self_attention",
    "--mask_sampling grid --mask_ratio 0.6": "--mask_sampling grid needs --mask_ratio 0.75",
    "--mask_sampling grid --input_size 20": "even number of patches",
    "--feature_maps some": "must be all, last or indices",
    "--feature_maps 1,13": "not [1, 13]",
    "--feature_maps 3,3,12": "not [3, 3, 12]",
    "--feature_maps 0,6": "--feature_maps without 12, the last block's",
    "--model mae_vit_tiny_patch4 --feature_maps 0,6": "--feature_maps without 12",
    "--decoder_num_heads 3": "a width of 128 is not divisible by 3 attention heads",
    "--decoder_embed_dim 30 --decoder_num_heads 3": "30",
    "--val_path nowhere": "nowhere does not exist",
    "--repeated_aug 3": "--batch_size 8 must be a multiple of --repeated_aug 3",
    "--decode gpu --device cpu": "--decode gpu needs a CUDA device, but this run is on cpu",
    "--hflip 1.5": "must be between 0 and 1, not 1.5",
    "--crop_area 1 0.2": "--crop_area takes the smallest and the largest fraction",
    "--data_csv nowhere.csv": "nowhere.csv does not exist: correct the path of the table",
    "--val_fraction 0.1": "because there are validation images already",
    "--val_share 1": "must be at least 0 and below 1, not 1",
    "--decode both": "invalid choice: 'both'",
    "--decoder_depth 2000": "decoder_depth must be between 1 and 1000, not 2000",
    "--decoder_embed_dim 20000": "decoder_embed_dim must be between 1 and 16384, not 20000",
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.items(), ids=REFUSED.keys())
def test_wrong_input_is_refused_in_one_sentence_and_nothing_is_written(
    tmp_path, images, capsys, options, reason
):
    folder = tmp_path / "run"
    argv = [*TINY, "--data_path", images, "--output_dir", folder, *options.split()]
    sentence = refusal(capsys, *argv)
    assert reason in sentence
    assert not folder.exists(), f"written: {list(files_in(folder))}"


def test_validation_images_alone_are_refused(tmp_path, images, capsys):
    argv = [*TINY, "--val_path", images, "--output_dir", tmp_path / "run"]
    assert "give the training images with --data_path" in refusal(capsys, *argv)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(tmp_path, images, capsys, device):
    argv = [*TINY, "--data_path", images, "--output_dir", tmp_path / "run"]
    sentence = refusal(capsys, *argv, "--device", device)
    assert "GPUs on this machine: 0" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(
    tmp_path, images, capsys, nano, zipped
):
    path, marker = tmp_path / "evil.pth", tmp_path / "marker"
    torch.save(
        {"format": "crossmae-pretrain", "version": 1, "model": RunsCode(marker)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    argv = [*TINY, "--data_path", images, "--output_dir", tmp_path / "run"]
    sentence = refusal(capsys, *argv, "--resume", path)
    assert "refusing to load" in sentence
    assert not marker.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"w": torch.ones(2)}},
        {"model": {}, "args": argparse.Namespace(norm_pix_loss=True)},
        {"model": 3},
        {},
    ],
)
def test_weights_of_something_else_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(InputError, match="masked autoencoder"):
        load_model(tmp_path / "other.pth")


def test_defaults_are_the_papers(monkeypatch):
    args = parse_args([])  # Table 10
    assert (args.epochs, args.blr, args.weight_decay, args.mask_ratio) == (800, 1.5e-4, 0.05, 0.75)
    assert args.norm_pix_loss
    assert args.input_size == [224]
    assert args.model in MODELS
