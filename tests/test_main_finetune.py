"""Fine-tuning from the command line: what it starts from, leaves, measures and refuses."""

import argparse
import json
import re

import pytest
import timm
import torch
from timm.data import ImageNetInfo

import main_finetune
import main_linprobe
from main_finetune import Recipe, parse_args, resolve_recipe
from models_vit import build_vit
from tests.helpers import runs
from tests.helpers.data import write_shards
from tests.helpers.files import copied, files_in, write_classes, write_images
from tests.helpers.models import NANO, use_nano_models
from tests.helpers.processes import NANO_MAIN, command, finish, start
from tests.helpers.runs import (
    EACH_STEP,
    QUICK,
    StoppedError,
    log_without_time,
    refusal,
    run,
    run_until,
)
from util.runs.checkpoint import BEST_NAME, list_checkpoints, read_checkpoint
from util.runs.epoch_log import read_log
from util.settings.model import SIZES, ModelSize
from util.weights.encoder import read_encoder

SCRATCH = [*QUICK, "--model", "vit_tiny_patch4", "--input_size", "16"]
PLAIN = ["--mixup", "0", "--cutmix", "0", "--drop_path", "0", "--reprob", "0"]
PLAIN += ["--auto_augment", "none"]
MEASURED = ("val_loss", "val_top1", "val_top5", "val_balanced", "val_images")


@pytest.fixture(scope="module")
def finished(images, pretrained, tmp_path_factory):
    """The output folder of a finished run of three epochs, its arguments, and what it said."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        argv = [*QUICK, "--finetune", pretrained, "--data_path", images]
        argv += ["--epochs", 3, "--lr", 1e-3]
        run(*argv, "--output_dir", folder, main=main_finetune.main)
    return folder, argv


def finetune(*argv):
    run(*argv, main=main_finetune.main)


pytestmark = pytest.mark.usefixtures("nano")


def last_checkpoint(folder):
    return runs.last_checkpoint(folder, "finetune")


def refused(capsys, *argv):
    return refusal(capsys, *argv, main=main_finetune.main)


def assert_close(a, b, tolerance):
    """Weights agree. Adam makes a gradient of zero a step of either sign, so: in the mean."""
    assert list(a) == list(b)
    for name in a:
        assert (a[name] - b[name]).abs().mean() < tolerance, name


# What a run starts from


def nano_of(**changes):
    return ModelSize(**{**NANO._asdict(), **changes})


def timm_nano():
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes).state_dict()


def released_like():
    """Weights as MAE's code stores them, with a decoder."""
    state = build_vit(NANO, num_classes=0, pool="cls").state_dict()
    state |= {"mask_token": torch.zeros(1, 1, 32), "decoder_embed.weight": torch.zeros(32, 32)}
    return {"model": state, "optimizer": {}, "args": argparse.Namespace(norm_pix_loss=True)}


WRITERS = {"released.pth": released_like, "timm.pth": timm_nano}
SAID = {
    "pretrained": ("the pre-training checkpoint of this project", "fc_norm.weight, fc_norm.bias"),
    "released.pth": ("the released or timm checkpoint", "not needed here: norm.weight, norm.bias"),
    "timm.pth": (
        "the released or timm checkpoint",
        "not needed here: norm.weight, norm.bias, head.weight",
    ),
}


@pytest.mark.parametrize("source", SAID)
def test_a_run_starts_from_the_weights_of_a_file_and_says_what_is_new(
    tmp_path, images, pretrained, capsys, source
):
    path = pretrained
    if source in WRITERS:
        path = tmp_path / source
        torch.save(WRITERS[source](), path)
    argv = [*QUICK, "--finetune", path, "--data_path", images, "--epochs", 1]
    # So small a rate changes nothing.
    finetune(*argv, "--lr", 1e-30, "--min_lr", 0, "--output_dir", tmp_path / "run")
    weights = read_encoder(path)
    model = last_checkpoint(tmp_path / "run")["model"]
    for name, tensor in weights.encoder.items():
        assert torch.allclose(model[name], tensor, rtol=0, atol=1e-20), name
    out = capsys.readouterr().out
    assert all(words in out for words in SAID[source])
    assert f"loaded {len(weights.encoder)} tensors from " in out
    assert "new for this task: fc_norm.weight, fc_norm.bias, head.weight, head.bias" in out
    assert "fine-tuning, last epoch (1): top-1" in out


def test_the_norm_of_the_file_is_taken_where_its_pooling_is(tmp_path, images, capsys):
    torch.save(released_like(), tmp_path / "released.pth")
    argv = [*QUICK, "--finetune", tmp_path / "released.pth", "--data_path", images, "--epochs", 1]
    finetune(*argv, "--pool", "cls", "--output_dir", tmp_path / "run")
    assert "new for this task: head.weight, head.bias\n" in capsys.readouterr().out
    assert last_checkpoint(tmp_path / "run")["model_options"]["pool"] == "cls"


def test_images_come_as_in_pre_training_unless_given(tmp_path, images, finished, pretrained):
    checkpoint = last_checkpoint(finished[0])
    assert checkpoint["mean"] == [0.4, 0.5, 0.6]
    assert checkpoint["model_options"]["img_size"] == [16, 16]
    argv = [*QUICK, "--finetune", pretrained, "--data_path", images, "--epochs", 1]
    finetune(*argv, "--mean", 0, 0, 0, "--std", 1, 1, 1, "--output_dir", tmp_path)
    assert (last_checkpoint(tmp_path)["mean"], last_checkpoint(tmp_path)["std"]) == (
        [0] * 3,
        [1] * 3,
    )


@pytest.mark.parametrize(("size", "grid"), [(["24"], "6 x 6"), (["24", "20"], "6 x 5")])
def test_another_image_size_resamples_positions(tmp_path, images, pretrained, capsys, size, grid):
    argv = [*QUICK, "--finetune", pretrained, "--data_path", images, "--epochs", 1]
    finetune(*argv, "--input_size", *size, "--output_dir", tmp_path)
    assert f"position embeddings resampled from 4 x 4 patches to {grid}" in capsys.readouterr().out
    rows, columns = map(int, grid.split(" x "))
    assert last_checkpoint(tmp_path)["model"]["pos_embed"].shape == (1, 1 + rows * columns, 32)
    finetune(*QUICK, "--eval", "--data_path", images, "--output_dir", tmp_path)
    assert "over 12 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"embed_dim": 48}, "a ViT of depth 2 and width 48 with patches of 4 px is not one of the"),
        ({"patch_size": 8}, "a ViT of depth 2 and width 32 with patches of 8 px is not one of the"),
        ({"depth": 3}, "a ViT of depth 3 and width 32 with patches of 4 px is not one of the"),
    ],
)
def test_weights_of_no_known_size_are_refused(tmp_path, images, capsys, changes, reason):
    torch.save(
        build_vit(nano_of(**changes), num_classes=0, pool="cls").state_dict(), tmp_path / "w"
    )
    argv = [*QUICK, "--finetune", tmp_path / "w", "--data_path", images]
    assert reason in refused(capsys, *argv, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"embed_dim": 48}, "a width of 32, but the model has a width of 48"),
        ({"patch_size": 8}, "patches of 4 px, but the model has patches of 8 px"),
        ({"depth": 3}, "2 blocks, but the model has 3 blocks"),
    ],
)
def test_a_model_that_contradicts_the_file_is_refused_by_name(
    tmp_path, images, pretrained, capsys, monkeypatch, changes, reason
):
    monkeypatch.setitem(SIZES, "tiny_patch16", nano_of(**changes))
    argv = [*QUICK, "--finetune", pretrained, "--data_path", images, "--model", "vit_tiny_patch16"]
    sentence = refused(capsys, *argv, "--output_dir", tmp_path / "run")
    assert f"the pre-training checkpoint of this project has {reason}" in sentence
    assert not (tmp_path / "run").exists()


def test_a_fine_tuned_classifier_can_be_fine_tuned_with_a_new_head(tmp_path, finished, capsys):
    argv = [*QUICK, *PLAIN, "--finetune", finished[0] / BEST_NAME, "--dataset", "digits"]
    finetune(*argv, "--batch_size", 256, "--epochs", 1, "--output_dir", tmp_path)
    out = capsys.readouterr().out
    assert "new for this task: head.weight, head.bias\n" in out
    assert "not needed here: head.weight, head.bias\n" in out
    assert last_checkpoint(tmp_path)["model_options"]["num_classes"] == 10
    assert read_log(tmp_path)[-1]["val_images"] == 360


# The recipe


SMALL = Recipe(epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.1)
LARGE = Recipe(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2)
RELEASED = {
    "micro_patch4": SMALL,
    "tiny_patch4": SMALL,
    "tiny_patch16": SMALL,
    "small_patch16": SMALL,
    "base_patch16": SMALL,
    "large_patch16": LARGE,
    "huge_patch14": LARGE._replace(drop_path=0.3),
    "giant_patch14": LARGE._replace(drop_path=0.3),  # of ViT-H: the authors have no ViT-g
}


@pytest.mark.parametrize("size", SIZES)
def test_each_size_has_the_recipe_of_the_authors_commands_and_flags_come_first(size):
    assert resolve_recipe(parse_args([]), size) == RELEASED[size]
    for name, value in {"epochs": 7, "blr": 0.25, "layer_decay": 0.0, "drop_path": 0.0}.items():
        args = parse_args([f"--{name}", str(value)])
        assert resolve_recipe(args, size) == RELEASED[size]._replace(**{name: value})


def test_defaults_are_those_of_table_11():
    args = parse_args([])
    assert (args.weight_decay, args.min_lr, args.pool) == (0.05, 1e-6, None)
    assert (args.mixup, args.cutmix, args.smoothing, args.reprob) == (0.8, 1.0, 0.1, 0.25)
    assert args.auto_augment == "rand-m9-mstd0.5-inc1"
    assert (args.ema, args.clip_grad) == (None, None)


def start_block(monkeypatch, capsys, *argv):
    """What a run says that it is going to do, before it does anything: label -> text."""

    def stop(*args, **options):
        raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(main_finetune, "open_run", stop)
        finetune(*argv)
    out = re.sub(r"\n\S+ {10}", " ", capsys.readouterr().out)  # long lines go on in the next
    labels = "device|model|images|step|run|recipe|output"
    return dict(re.findall(rf"^\S+ ({labels}) +(.*)$", out, re.MULTILINE))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        # blr x effective batch / 256; warm-up of 5 epochs, at most a tenth of the run
        (
            [],
            {"run": {"100 epochs", "lr 1.563e-05 =", "warm-up 5 "}, "recipe": {"layer_decay 0.65"}},
        ),
        (["--epochs", "20"], {"run": {"20 epochs", "warm-up 2 "}, "recipe": {"drop_path 0.1"}}),
        (["--epochs", "20", "--warmup_epochs", "7"], {"run": {"warm-up 7 "}}),
        (
            ["--model", "vit_large_patch16"],
            {
                "run": {"50 epochs", "lr 3.125e-05 =", "warm-up 5 "},
                "model": {"vit_large_patch16, "},
            },
        ),
        (["--model", "vit_huge_patch14"], {"recipe": {"layer_decay 0.75", "drop_path 0.3"}}),
        (["--accum_iter", "4"], {"step": {"32 images = 8 x 4 "}, "run": {"lr 6.25e-05 ="}}),
        (["--blr", "0.1", "--batch_size", "16"], {"run": {"lr 0.00625 ="}}),
        (["--lr", "0.3", "--accum_iter", "4"], {"run": {"lr 0.3 as given"}}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_run_says_its_recipe_with_what_was_resolved(
    tmp_path, images, monkeypatch, capsys, argv, expected
):
    for name in SIZES:
        monkeypatch.setitem(SIZES, name, NANO)
    place = ["--data_path", images, "--output_dir", tmp_path / "run"]
    options = [*SCRATCH[:2], *SCRATCH[4:], *argv]
    block = start_block(monkeypatch, capsys, *options, *place)
    for label, parts in expected.items():
        assert all(part in block[label] for part in parts), block[label]
    assert "auto_augment rand-m9-mstd0.5-inc1" in block["recipe"]
    assert "hash" not in " ".join(block.values())


def test_the_learning_rate_falls_by_layer_and_follows_the_schedule(finished):
    groups = last_checkpoint(finished[0])["optimizer"]["param_groups"]
    scales = {group["lr_scale"] for group in groups}
    assert scales == {0.65**i for i in range(4)}  # head, two blocks, embeddings
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    rate = read_log(finished[0])[-1]["lr"]
    assert [group["lr"] for group in groups] == [rate * group["lr_scale"] for group in groups]
    assert {group["betas"] for group in groups} == {(0.9, 0.999)}


# A run from start to end


def test_each_epoch_is_measured_and_last_and_best_are_told_apart(tmp_path, finished, capsys):
    before, argv = finished
    folder = copied(before, tmp_path / "again")
    finetune(*argv, "--output_dir", folder)
    out = capsys.readouterr().out
    log = read_log(folder)
    assert [line["epoch"] for line in log] == [1, 2, 3]
    for line in log:
        assert {"step", "loss", "grad_norm", "lr", "broken_images", *MEASURED} <= set(line)
        assert line["val_images"] == 12
        assert 0 <= line["val_top1"] <= line["val_top5"] == 100  # three classes
    best = best_of(log)
    for name, line in {"last": log[-1], "best": best}.items():
        assert f"fine-tuning, {name} epoch ({line['epoch']}): {logged(line)}\n" in out
    assert f"checkpoint of the best epoch: {folder}/checkpoint-best.pth" in out
    assert out.endswith(f"checkpoint: {folder}/checkpoint-e0003-s000000.pth\n")
    progress = read_checkpoint(folder / BEST_NAME, "finetune")["progress"]
    assert progress["epoch"] == progress["best"]["epoch"] == best["epoch"]
    assert last_checkpoint(folder)["progress"]["best"] == progress["best"]
    # It had finished before: nothing was trained, and nothing has changed.
    assert "nothing is left to train" in out
    same = [name for name in files_in(before) if name.endswith((".pth", ".jsonl"))]
    assert {n: files_in(folder)[n] for n in same} == {n: files_in(before)[n] for n in same}


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [3]), (2, [2, 3]), (0, [1, 2, 3])])
def test_old_checkpoints_are_deleted_and_the_best_is_kept(tmp_path, finished, keep_last, kept):
    argv = [*finished[1], "--keep_last", keep_last, "--output_dir", tmp_path]
    finetune(*argv)
    names = [f"checkpoint-e{epoch:04d}-s000000.pth" for epoch in kept]
    assert [path.name for path in list_checkpoints(tmp_path)] == names
    assert (tmp_path / BEST_NAME).is_file()


def test_digits_from_scratch(tmp_path, capsys):
    argv = [*SCRATCH, "--dataset", "digits", "--batch_size", 64, "--epochs", 2, "--lr", 1e-2]
    finetune(*argv, *PLAIN, "--output_dir", tmp_path)
    log = read_log(tmp_path)
    assert log[-1]["val_images"] == 360
    assert log[-1]["val_top1"] > 30  # 10 by chance
    assert log[-1]["val_top1"] < log[-1]["val_top5"]
    out = capsys.readouterr().out
    assert "images   1,437 for training, 360 for validation" in out
    assert re.search(r" epoch 2/2  loss \S+  val \S+  top-1 +\S+%", out)
    assert "training from scratch, last epoch (2)" in out


def test_val_images_may_come_later(tmp_path, images, capsys):
    argv = [*SCRATCH, "--data_path", images / "train", "--output_dir", tmp_path]
    finetune(*argv, "--epochs", 1)
    finetune(*argv, "--val_path", images / "val")
    assert "best epoch (2): top-1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["--amp", "bf16"],
        ["--smoothing", "0", "--accum_iter", "2"],
        ["--mixup", "0"],
        ["--cutmix", "0", "--mixup_mode", "elem"],
        ["--mixup_mode", "pair", "--mixup_prob", "0.5", "--mixup_switch_prob", "0.9"],
        ["--auto_augment", "none", "--color_jitter", "0.4"],
        ["--auto_augment", "rand-m10-n9-inc1"],  # the strongest, which a default run draws at times
        ["--aa", "augmix-m5-w4-d2", "--remode", "const", "--recount", "3", "--reprob", "1"],
        ["--batch_size", "36", "--pool", "cls"],  # one image is left over
        ["--nb_classes", "3", "--layer_decay", "1", "--crop_pct", "1", "--num_workers", "1"],
    ],
    ids=" ".join,
)
def test_options_train_an_epoch_and_are_evaluated_again(tmp_path, images, capsys, options):
    argv = [*SCRATCH, "--data_path", images, "--epochs", 1, *options, "--output_dir", tmp_path]
    finetune(*argv)
    assert_evaluates_as_logged(capsys, read_log(tmp_path)[-1], *argv)


def test_gradients_are_clipped(tmp_path, images):
    argv = [*SCRATCH, "--data_path", images, "--epochs", 1, "--clip_grad", 1e-6]
    finetune(*argv, "--output_dir", tmp_path)
    moments = last_checkpoint(tmp_path)["optimizer"]["state"].values()
    assert 0 < sum(state["exp_avg"].norm() ** 2 for state in moments) < 1e-12
    assert read_log(tmp_path)[-1]["grad_norm"] > 1e-3


def test_accumulation_equals_the_large_batch(tmp_path, images):
    argv = [*SCRATCH, *PLAIN, "--data_path", images, "--lr", 1e-3]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune(*argv, "--output_dir", whole)
    finetune(*argv, "--batch_size", 4, "--accum_iter", 2, "--output_dir", parts)
    for line, expected in zip(log_without_time(parts), log_without_time(whole), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    assert_close(last_checkpoint(parts)["model"], last_checkpoint(whole)["model"], 1e-5)


# Starting again


def test_a_longer_run_goes_on_with_a_warning_and_the_best_so_far(tmp_path, finished, capsys):
    before, argv = finished
    folder = copied(before, tmp_path / "longer")
    kept = (folder / BEST_NAME).read_bytes()
    progress = last_checkpoint(before)["progress"]
    finetune(*argv, "--epochs", 4, "--lr", 0.01, "--output_dir", folder)
    out = capsys.readouterr().out
    assert "--epochs increased from 3 to 4: from epoch 4 on" in out
    assert "continuing with a change: lr was 0.001 and is now 0.01" in out
    log = read_log(folder)
    assert log[:3] == read_log(before)
    best = best_of([progress["best"], log[3]])
    is_better = best is log[3]
    assert last_checkpoint(folder)["progress"]["best"]["epoch"] == best["epoch"]
    assert ((folder / BEST_NAME).read_bytes() == kept) != is_better


def test_labels_that_mean_another_class_are_refused(tmp_path, capsys):
    for name in ("apple", "bear"):
        write_images(tmp_path / "images" / name, 8)
    argv = [*SCRATCH, "--data_path", tmp_path / "images", "--output_dir", tmp_path / "run"]
    finetune(*argv, "--epochs", 1)
    (tmp_path / "images" / "apple").rename(tmp_path / "images" / "crow")  # bear becomes the first
    assert "classes" in refused(capsys, *argv)


DIFFERENCES = {
    "--finetune OTHER": "hash of the weights it starts from was '",
    "--mixup 0.5": "--mixup was 0.8 and is now 0.5",
    "--cutmix 0": "--cutmix was 1.0 and is now 0.0",
    "--smoothing 0": "--smoothing was 0.1 and is now 0.0",
    "--reprob 0": "--reprob was 0.25 and is now 0.0",
    "--aa none": "--auto_augment was 'rand-m9-mstd0.5-inc1' and is now 'none'",
    "--pool cls": "--pool was 'avg' and is now 'cls'",
    "--drop_path 0.2": "--drop_path was 0.1 and is now 0.2",
    "--layer_decay 0.75": "--layer_decay was 0.65 and is now 0.75",
    "--ema 0.9": "--ema was None and is now 0.9",
    "--dataset digits": "number of classes was 3 and is now 10",
    "--mixup 0 --pool cls --seed 3": "--pool was 'avg' and is now 'cls'; --mixup was 0.8",
}


@pytest.mark.parametrize(("options", "difference"), DIFFERENCES.items(), ids=DIFFERENCES.keys())
def test_arguments_that_contradict_the_checkpoint_are_refused_with_the_difference(
    tmp_path, images, finished, capsys, options, difference
):
    before, argv = finished
    folder = copied(before, tmp_path / "same")
    torch.save(released_like(), tmp_path / "other.pth")
    if "FEWER" in options:
        copied(images, tmp_path / "fewer")
        (tmp_path / "fewer" / "train" / "cup" / "000.png").unlink()
    options = options.replace("OTHER", str(tmp_path / "other.pth"))
    options = options.replace("FEWER", str(tmp_path / "fewer")).split()
    sentence = refused(capsys, *argv, *options, "--output_dir", folder)
    assert difference in sentence
    assert files_in(folder) == files_in(before)


def test_the_best_epoch_is_no_checkpoint_to_continue(tmp_path, finished, capsys):
    before, argv = finished
    place = ["--resume", before / BEST_NAME, "--output_dir", tmp_path / "run"]
    assert "start a new run from it with --finetune" in refused(capsys, *argv, *place)
    assert not (tmp_path / "run").exists()


# Evaluation


def measured(capsys, *argv):
    """What --eval says, without the time, and from which file."""
    capsys.readouterr()
    finetune(*argv, "--eval")
    path, numbers = re.findall(r"\d\d (\S+): (top-1 .*)", capsys.readouterr().out)[-1]
    return path, numbers


def best_of(lines):
    """The best epoch of a log: of equals, the one with the lower loss."""
    return max(lines, key=lambda line: (line["val_top1"], -line["val_loss"]))


def logged(line):
    top1, top5 = (f"top-{k} {line[f'val_top{k}']:.2f}%" for k in (1, 5))
    text = f"{top1}, {top5}, balanced {line['val_balanced']:.2f}%, loss {line['val_loss']:.4f}"
    return f"{text} over {line['val_images']} images"


def assert_evaluates_as_logged(capsys, line, *argv):
    assert measured(capsys, *argv)[1] == logged(line)


WAYS = {
    "OUTPUT_DIR": ["--output_dir", "RUN"],
    "--finetune": ["--finetune", "LAST"],
    "--resume": ["--resume", "LAST"],
    "OUTPUT_DIR by --resume none": ["--output_dir", "RUN", "--resume", "none"],
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_evaluation_gives_the_numbers_of_the_last_epoch_and_writes_nothing(
    tmp_path, images, finished, capsys, monkeypatch, way
):
    folder = finished[0]
    before, last = files_in(folder), list_checkpoints(folder)[-1]
    places = {"RUN": folder, "LAST": last}
    monkeypatch.chdir(tmp_path)
    argv = [*QUICK, "--data_path", images, *(places.get(word, word) for word in way)]
    path, numbers = measured(capsys, *argv)
    assert path == str(last)
    assert numbers == logged(read_log(folder)[-1])
    assert files_in(folder) == before
    assert list(tmp_path.iterdir()) == []


def test_the_best_epoch_evaluates_as_logged(images, finished, capsys):
    log = read_log(finished[0])
    best = best_of(log)
    argv = [*QUICK, "--data_path", images, "--finetune", finished[0] / BEST_NAME]
    assert_evaluates_as_logged(capsys, best, *argv)


def test_evaluation_shards_nothing(images, finished, capsys):
    argv = [*QUICK, "--data_path", images, "--finetune", list_checkpoints(finished[0])[-1]]
    assert_evaluates_as_logged(capsys, read_log(finished[0])[-1], *argv, "--fsdp")


def test_no_training_images_are_needed(tmp_path, images, finished, capsys):
    folder, _ = finished
    copied(images / "val", tmp_path / "val")
    for paths in (["--data_path", tmp_path], ["--val_path", images / "val"]):
        argv = [*QUICK, *paths, "--output_dir", folder]
        assert_evaluates_as_logged(capsys, read_log(folder)[-1], *argv)


def test_the_moving_average_is_what_is_measured(tmp_path, images, pretrained, capsys):
    argv = [*QUICK, "--finetune", pretrained, "--data_path", images, "--lr", 0.01, "--ema", 0.9]
    finetune(*argv, "--output_dir", tmp_path / "run")
    path = list_checkpoints(tmp_path / "run")[-1]
    argv = [*QUICK, "--data_path", images]
    assert_evaluates_as_logged(capsys, read_log(tmp_path / "run")[-1], *argv, "--finetune", path)
    content = torch.load(path)
    torch.save({**content, "ema": None}, tmp_path / "weights.pth")
    last = measured(capsys, *argv, "--finetune", tmp_path / "weights.pth")[1]
    assert last != logged(read_log(tmp_path / "run")[-1])


def test_an_average_that_is_too_slow_for_a_run_follows_the_weights_and_says_so(
    tmp_path, images, pretrained, capsys
):
    argv = [*QUICK, "--finetune", pretrained, "--data_path", images, "--epochs", 3]
    argv += ["--lr", 0.01, "--ema", 0.9999, *PLAIN]
    finetune(*argv, "--output_dir", tmp_path / "run")
    out = capsys.readouterr().out
    assert "--ema 0.9999 averages over about 10000 steps, but the run has 15" in out
    log = read_log(tmp_path / "run")
    for line in log:  # both are measured
        assert line["val_loss"] != line["raw_val_loss"]
        assert abs(line["val_loss"] - line["raw_val_loss"]) < 0.5  # not the random start's
    last = log[-1]
    assert f"without averaging top-1 {last['raw_val_top1']:.2f}%" in out


def test_the_best_epoch_of_an_average_holds_what_was_measured(tmp_path, images, pretrained, capsys):
    argv = [*QUICK, "--finetune", pretrained, "--data_path", images, "--epochs", 3, "--lr", 0.01]
    finetune(*argv, "--ema", 0.9, "--output_dir", tmp_path / "run")
    best = best_of(read_log(tmp_path / "run"))
    content = torch.load(tmp_path / "run" / BEST_NAME)
    assert "ema" not in content
    torch.save({"model": content["model"]}, tmp_path / "weights.pth")  # as other programs read it
    argv = [*QUICK, "--data_path", images, "--pool", "avg"]
    argv += ["--mean", *content["mean"], "--std", *content["std"]]
    assert_evaluates_as_logged(capsys, best, *argv, "--finetune", tmp_path / "weights.pth")


def test_a_classifier_of_timms_is_evaluated(tmp_path, images, capsys):
    state = timm_nano()
    state["head.weight"], state["head.bias"] = torch.zeros(3, 32), torch.tensor([0.0, 1.0, 2.0])
    torch.save(state, tmp_path / "timm.pth")
    argv = [*QUICK, "--finetune", tmp_path / "timm.pth", "--data_path", images]
    assert "top-1 41.67%" in measured(capsys, *argv)[1]  # all five cups, of twelve


def test_a_head_without_class_names_is_not_evaluated_in_an_order_that_is_not_clear(
    tmp_path, capsys
):
    for number in range(12):
        write_images(tmp_path / "data" / "val" / str(number), 6 if number == 10 else 1)
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=12, **sizes)
    state = model.state_dict()
    state["head.weight"].zero_()
    state["head.bias"].zero_()[2] = 10  # the class 10 in torchvision's order, 2 in the natural one
    torch.save(state, tmp_path / "timm.pth")
    argv = [*QUICK, "--finetune", tmp_path / "timm.pth", "--data_path", tmp_path / "data"]
    message = refused(capsys, "--eval", *argv)
    assert "sort these folders as 0, 1, 10, 11, 2 and so on" in message
    assert "this code as 0, 1, 2, 3, 4 and so on" in message
    for dataset, percent in (("torch/folder", "35.29"), ("folder", "5.88")):
        assert f"--dataset {dataset}" in message
        assert f"top-1 {percent}%" in measured(capsys, *argv, "--dataset", dataset)[1]


@pytest.mark.parametrize(
    ("layout", "options", "reasons"),
    [
        (
            ["train2017", "val2017", "test2017"],
            [],
            [
                "{0}/train2017 has no class folders: sort the images into one per class",
                "--data_path (now {0}/train2017) and --val_path (now {0}/val2017)",
            ],
        ),
        (["cars_train", "cars_test"], [], ["{0}/cars_train has no class folders"]),
        (["images", "annotations/trimaps"], [], ["{0}/images has no class folders"]),
        (["p1/a", "p1/b", "p2/a"], [], ["--class_folder last", "--class_folder first"]),
    ],
)
def test_splits_and_masks_are_not_classes(tmp_path, capsys, layout, options, reasons):
    for name in layout:
        write_images(tmp_path / "data" / name, 2)
    argv = [*SCRATCH, "--data_path", tmp_path / "data", "--output_dir", tmp_path / "run", *options]
    message = refused(capsys, *argv)
    assert [r for r in reasons if r.format(tmp_path / "data") not in message] == []
    assert not (tmp_path / "run").exists()


UNFIT = {
    "--finetune PRETRAINED": "has no head: fine-tune it first",
    "--output_dir EMPTY": "--eval found no checkpoint in",
    "--output_dir RUN --resume nowhere.pth": "checkpoint not found: nowhere.pth",
    "--output_dir RUN --dataset digits": "10 classes of the validation images (0, 1, 2, ...) are",
    "--output_dir RUN --val_path OTHER": "(dog) is not among the 3 of the checkpoint (apple, bear",
    "--output_dir RUN --task regression": "was trained for --task classification: leave --task",
    "--output_dir RUN --val_path UNSORTED": "no labels",
    "--output_dir RUN --data_path IMAGES/train": "has no validation images",
    "--output_dir RUN --num_classes 2": "has a head of 3 classes: correct --num_classes 2",
    "--output_dir RUN --num_classes 5": "has a head of 3 classes: correct --num_classes 5",
    "--output_dir RUN --attention_backend cudnn": "--attention_backend cudnn cannot run this",
    "--output_dir RUN --pool cls": "which --pool cls needs: leave out --pool",
    "--output_dir RUN --input_size 18": "a patch size of 4 does not divide 18 x 18 px",
    "--output_dir RUN --model vit_tiny_patch16": "but the model has patches of 16 px",
    "--finetune PRETRAINED --resume PRETRAINED": "leave --finetune or --resume out",
    "--output_dir PRETRAINING": "is not a fine-tuning checkpoint of this project",
}


@pytest.mark.parametrize(("options", "reason"), UNFIT.items(), ids=UNFIT.keys())
def test_what_cannot_be_evaluated_is_refused(
    tmp_path, images, finished, pretrained, capsys, options, reason
):
    for name in ("apple", "cup", "dog"):
        write_images(tmp_path / "other" / name, 2)
    places = {
        "PRETRAINED": pretrained,
        "PRETRAINING": pretrained.parent,
        "EMPTY": tmp_path / "empty",
        "RUN": finished[0],
        "OTHER": tmp_path / "other",
        "UNSORTED": write_images(tmp_path / "unsorted", 3),
        "IMAGES/train": images / "train",
    }
    options = [places.get(word, word) for word in options.split()]
    argv = [*QUICK, "--eval", "--data_path", images, "--output_dir", tmp_path / "run", *options]
    before = files_in(finished[0])
    assert reason in refused(capsys, *argv)
    assert files_in(finished[0]) == before
    assert not (tmp_path / "run").exists()


# A run whose weights are gone


def test_a_run_continues_without_the_weights_that_it_started_from(
    tmp_path, images, pretrained, capsys, monkeypatch
):
    weights = tmp_path / "pretrained.pth"
    argv = [*QUICK, "--finetune", weights, "--data_path", images, "--ema", 0.9, "--lr", 1e-3]
    weights.write_bytes(pretrained.read_bytes())
    finetune(*argv, "--epochs", 2, "--output_dir", tmp_path / "whole")

    folder = tmp_path / "run"
    stopped = [*argv, "--epochs", 2, *EACH_STEP, "--output_dir", folder]
    run_until(2, monkeypatch, *stopped, main=main_finetune.main)
    weights.unlink()
    finetune(*argv, "--epochs", 2, "--output_dir", folder)
    out = capsys.readouterr().out
    assert f"checkpoint not found: {weights}; that is not needed: {folder}/checkpoint-" in out
    assert "new for this task" not in out.partition("that is not needed")[2]
    for part in ("model", "ema", "optimizer"):
        runs.assert_identical(
            last_checkpoint(folder)[part], last_checkpoint(tmp_path / "whole")[part]
        )

    # Other weights under that name are still refused, and so is a new run without any.
    torch.save(released_like(), weights)
    message = refused(capsys, *argv, "--epochs", 3, "--output_dir", folder)
    assert "hash of the weights it starts from was" in message
    assert f"(it started with --finetune {weights})" in message
    weights.unlink()
    assert "not found" in refused(capsys, *argv, "--output_dir", tmp_path / "new")
    assert "input_size was" in refused(capsys, *argv, "--input_size", 24, "--output_dir", folder)


# A head to train on from


def test_a_kept_head_starts_where_it_ended(tmp_path, images, finished, capsys):
    folder, _ = finished
    argv = [*QUICK, "--data_path", images, "--finetune", list_checkpoints(folder)[-1]]
    argv += ["--keep_head", "--epochs", 1, "--lr", 1e-12]
    finetune(*argv, "--output_dir", tmp_path / "run")
    line, before = read_log(tmp_path / "run")[-1], read_log(folder)[-1]
    assert {name: line[name] for name in MEASURED} == pytest.approx(
        {name: before[name] for name in MEASURED}, rel=1e-4
    )
    assert "new for this task" not in capsys.readouterr().out


def test_a_kept_head_without_names_needs_an_order_that_is_clear(tmp_path, capsys):
    for split in ("train", "val"):
        for number in range(12):
            write_images(tmp_path / "data" / split / str(number), 1)
    path = head_that_answers(tmp_path / "timm.pth", *[0.0] * 12)
    argv = [*QUICK, "--finetune", path, "--data_path", tmp_path / "data", "--keep_head"]
    message = refused(capsys, *argv, "--output_dir", tmp_path / "run")
    assert "sort these folders as 0, 1, 10, 11, 2" in message


@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_probe_can_be_fine_tuned_from_its_head(tmp_path, images, pretrained, capsys, kind):
    argv = [*QUICK, "--finetune", pretrained, "--data_path", images, "--epochs", 2, "--lr", 1]
    run(*argv, "--probe", kind, "--output_dir", tmp_path / "probe", main=main_linprobe.main)
    before = read_log(tmp_path / "probe")[-1]
    path = list_checkpoints(tmp_path / "probe")[-1]
    argv = [*QUICK, "--data_path", images, "--finetune", path, "--keep_head", "--epochs", 1]
    finetune(*argv, "--lr", 1e-12, "--output_dir", tmp_path / "run")
    line = read_log(tmp_path / "run")[-1]
    assert line["val_top1"] == before["val_top1"]
    assert line["val_loss"] == pytest.approx(before["val_loss"], rel=1e-4)


def test_a_head_of_an_earlier_block_cannot_be_kept(tmp_path, images, pretrained, capsys):
    argv = [*QUICK, "--finetune", pretrained, "--data_path", images, "--layer", 1]
    run(*argv, "--output_dir", tmp_path / "probe", main=main_linprobe.main)
    path = list_checkpoints(tmp_path / "probe")[-1]
    argv = [*QUICK, "--data_path", images, "--finetune", path]
    message = refused(capsys, *argv, "--keep_head", "--output_dir", tmp_path / "run")
    assert "reads no features after block 1, so later blocks would not be trained" in message
    assert "leave --keep_head out" in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--finetune PRETRAINED", "has no head to keep"),
        ("", "--keep_head needs a classifier"),
        ("--finetune CLASSIFIER --data_path OTHER", "1 missing (bear) and 1 new (dog)"),
        ("--finetune CLASSIFIER --pool cls", "which --pool cls needs"),
        ("--finetune CLASSIFIER --num_classes 2", "head of 3 classes: correct --num_classes 2"),
        ("--finetune CLASSIFIER --eval", "leave --keep_head out"),
    ],
)
def test_a_head_that_cannot_be_kept_is_refused(
    tmp_path, images, pretrained, finished, capsys, options, reason
):
    for name in ("apple", "cup", "dog"):
        write_images(tmp_path / "other" / name, 2)
    places = {"PRETRAINED": pretrained, "CLASSIFIER": list_checkpoints(finished[0])[-1]}
    places["OTHER"] = tmp_path / "other"
    options = [places.get(word, word) for word in options.split()]
    argv = [*QUICK, "--data_path", images, "--keep_head", "--output_dir", tmp_path / "run"]
    assert reason in refused(capsys, *argv, *options)
    assert not (tmp_path / "run").exists()


# Evaluation on some of a classifier's classes


def head_that_answers(path, *values):
    """Weights of timm's whose outputs are these for every image, saved without class names."""
    state = timm_nano()
    state["head.weight"] = torch.zeros(len(values), 32)
    state["head.bias"] = torch.tensor(values)
    torch.save(state, path)
    return path


def test_some_of_a_classifiers_classes_are_matched_by_name(tmp_path, images, finished, capsys):
    for name in ("apple", "cup"):
        copied(images / "val" / name, tmp_path / "some" / name)
    argv = [*QUICK, "--val_path", tmp_path / "some", "--eval", "--output_dir", finished[0]]
    finetune(*argv, "--dump_json", tmp_path / "all.json")
    assert "2 of the head's 3 classes: all outputs compete" in capsys.readouterr().out
    finetune(*argv, "--only_these_classes", "--dump_json", tmp_path / "some.json")
    assert "only their outputs compete" in capsys.readouterr().out

    whole = json.loads((finished[0] / "classes.json").read_text())
    among_all = json.loads((tmp_path / "all.json").read_text())
    among_some = json.loads((tmp_path / "some.json").read_text())
    assert list(whole["classes"]) == list(among_all["classes"]) == ["apple", "bear", "cup"]
    assert list(among_some["classes"]) == ["apple", "cup"]
    for name in ("apple", "cup"):
        assert among_all["classes"][name] == whole["classes"][name]
        assert among_some["classes"][name]["accuracy"] >= whole["classes"][name]["accuracy"]
    assert among_all["classes"]["bear"]["images"] == 0
    assert among_some["val_loss"] < among_all["val_loss"]


def test_classes_of_imagenet_are_known_to_heads_without_names(tmp_path, capsys):
    names = ImageNetInfo("imagenet-1k").label_names()
    for name in (names[3], names[7], names[500]):
        write_images(tmp_path / "val" / name, 4)
    answers = [0.0] * 1000
    answers[3] = answers[500] = -1.0
    answers[7], answers[600] = 5.0, 9.0
    path = head_that_answers(tmp_path / "timm.pth", *answers)
    argv = [*QUICK, "--finetune", path, "--val_path", tmp_path / "val"]
    assert "top-1 0.00%, top-5 33.33%" in measured(capsys, *argv)[1]
    assert "top-1 33.33%" in measured(capsys, *argv, "--only_these_classes")[1]


# Unbalanced classes


def test_classes_can_be_weighted_and_decide_by_balanced_accuracy(tmp_path, pretrained, capsys):
    for split in ("train", "val"):
        for name, number in (("common", 20), ("rare", 2)):
            write_images(tmp_path / "data" / split / name, number)
    argv = [*QUICK, "--finetune", pretrained, "--data_path", tmp_path / "data", "--epochs", 2]
    argv += ["--lr", 1e-3, *PLAIN]
    finetune(*argv, "--output_dir", tmp_path / "plain")
    options = ["--class_weights", "balanced", "--best_by", "balanced"]
    finetune(*argv, *options, "--output_dir", tmp_path / "weighted")
    plain, weighted = (read_log(tmp_path / name) for name in ("plain", "weighted"))
    assert plain[0]["loss"] != weighted[0]["loss"]
    out = capsys.readouterr().out
    assert re.search(r"rare +\d+\.\d\d% +2\n", out)
    found = json.loads((tmp_path / "weighted" / "classes.json").read_text())
    assert sum(found["confusion"][0]) == 20
    assert sum(found["confusion"][1]) == 2
    assert (tmp_path / "weighted" / "confusion.png").is_file()
    best = max(weighted, key=lambda line: (line["val_balanced"], -line["val_loss"]))
    progress = last_checkpoint(tmp_path / "weighted")["progress"]
    assert progress["best"]["epoch"] == best["epoch"]
    message = refused(capsys, *argv, "--output_dir", tmp_path / "weighted")
    assert "--class_weights was 'balanced' and is now None" in message


# Several labels, and numbers


def write_table(folder, header, rows):
    """Noise images 0.png, 1.png, ... and their labels in a table."""
    write_images(folder, len(rows))
    names = sorted(path.name for path in folder.glob("*.png"))
    lines = [",".join(map(str, (name, *row))) for name, row in zip(names, rows, strict=True)]
    path = folder / "labels.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def assert_goes_through(tmp_path, capsys, monkeypatch, table, task, words):
    """A run is trained, stopped and continued, measured again, and trained on from."""
    argv = [*SCRATCH, "--data_csv", table, "--task", task, "--lr", 1e-3, "--epochs", 2]
    finetune(*argv, "--output_dir", tmp_path / "whole")
    folder = tmp_path / "run"
    stopped = [*argv, *EACH_STEP, "--output_dir", folder]
    run_until(2, monkeypatch, *stopped, main=main_finetune.main)
    finetune(*argv, "--output_dir", folder)
    runs.assert_identical(
        last_checkpoint(folder)["model"], last_checkpoint(tmp_path / "whole")["model"]
    )
    capsys.readouterr()
    finetune(*QUICK, "--data_csv", table, "--eval", "--output_dir", folder)
    line = read_log(folder)[-1]
    text = words.format(**line)
    assert text in capsys.readouterr().out
    argv = [*QUICK, "--data_csv", table, "--task", task, "--keep_head", "--epochs", 1]
    argv += ["--finetune", list_checkpoints(folder)[-1], "--lr", 1e-12]
    finetune(*argv, "--output_dir", tmp_path / "on")
    assert read_log(tmp_path / "on")[-1]["val_loss"] == pytest.approx(line["val_loss"], rel=1e-4)
    assert "was trained for --task" in refused(
        capsys, *argv[:-1], 1, "--task", "classification", "--output_dir", tmp_path / "no"
    )


def test_images_with_several_labels(tmp_path, capsys, monkeypatch):
    labels = ["cat|dog", "dog", "", "cat", "bird|dog", "bird"] * 4
    rows = [(text, "train" if i < 16 else "val") for i, text in enumerate(labels)]
    table = write_table(tmp_path / "data", "path,label,split", rows)
    words = "mAP {val_map:.2f}%, loss {val_loss:.4f} over 8 images"
    assert_goes_through(tmp_path, capsys, monkeypatch, table, "multilabel", words)
    found = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert list(found["classes"]) == ["bird", "cat", "dog"]
    # Other images may have only some of the classes, which keep their outputs.
    rows = [row for row in rows if row[1] == "val"]
    lines = [f"{16 + i:03d}.png,{text}" for i, (text, _) in enumerate(rows) if "bird" not in text]
    some = tmp_path / "data" / "some.csv"
    some.write_text("\n".join(["path,label", *lines]) + "\n")
    argv = [*QUICK, "--val_csv", some, "--eval", "--output_dir", tmp_path / "run"]
    finetune(*argv, "--dump_json", tmp_path / "some.json")
    part = json.loads((tmp_path / "some.json").read_text())["classes"]
    expected = {name: sum(name in line for line in lines) for name in ("bird", "cat", "dog")}
    assert {name: row["images"] for name, row in part.items()} == expected


def test_a_regressor_is_trained_on_from_another_scale(tmp_path):
    rows = [(20.5 + i, "train" if i % 3 else "val") for i in range(24)]
    table = write_table(tmp_path / "data", "path,label,split", rows)
    argv = [*QUICK, "--data_csv", table, "--task", "regression"]
    finetune(*SCRATCH, *argv, "--lr", 1e-3, "--epochs", 2, "--output_dir", tmp_path / "run")
    before = read_log(tmp_path / "run")[-1]
    content = torch.load(list_checkpoints(tmp_path / "run")[-1])
    mean, std = content["target_scale"]  # as exports have it: outputs are values
    head = content["model"]
    head["head.weight"] *= std
    head["head.bias"] = head["head.bias"] * std + mean
    torch.save({**content, "target_scale": [0.0, 1.0]}, tmp_path / "values.pth")
    argv += ["--finetune", tmp_path / "values.pth", "--keep_head", "--epochs", 1, "--lr", 1e-12]
    finetune(*argv, "--output_dir", tmp_path / "on")
    line = read_log(tmp_path / "on")[-1]
    for name in ("val_mae", "val_loss"):
        assert line[name] == pytest.approx(before[name], rel=1e-4)


def test_images_with_numbers(tmp_path, capsys, monkeypatch):
    rows = [(20.5 + i, "train" if i % 3 else "val") for i in range(24)]
    table = write_table(tmp_path / "data", "path,label,split", rows)
    words = "mean absolute error {val_mae:.5g}, R2 {val_r2:.4f}, loss {val_loss:.4f}"
    assert_goes_through(tmp_path, capsys, monkeypatch, table, "regression", words)
    assert last_checkpoint(tmp_path / "run")["target_scale"][0] == pytest.approx(32.5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--task multilabel", "--data_csv"),
        ("--task regression --mixup 0.5", "--mixup is for --task classification"),
        ("--task regression --best_by top1", "choose mae or loss"),
        ("--task regression --num_classes 5", "has one output: leave --num_classes out"),
        ("--only_these_classes", "needs --eval"),
        ("--dump_json x.json", "needs --eval"),
    ],
)
def test_options_of_another_task_are_refused(tmp_path, images, capsys, options, reason):
    argv = [*SCRATCH, "--data_path", images, "--output_dir", tmp_path / "run"]
    assert reason in refused(capsys, *argv, *options.split())
    assert not (tmp_path / "run").exists()


# Several processes


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, images, pretrained):
    argv = [*QUICK, "--finetune", pretrained, "--data_path", images, "--lr", 1e-3]
    argv += ["--mixup", 0, "--cutmix", 0, "--drop_path", 0]
    one, two = tmp_path / "one", tmp_path / "two"
    words = command(
        NANO_MAIN, "finetune", *argv, "--batch_size", 4, "--output_dir", two, processes=2
    )
    process = start(words)
    finetune(*argv, "--output_dir", one)
    code, out, err = finish(process)
    assert code == 0, out + err
    assert len(read_log(two)) == 2
    for line, expected in zip(log_without_time(two), log_without_time(one), strict=True):
        assert line["val_images"] == 12
        assert line == pytest.approx(expected, rel=1e-4)
    assert_close(last_checkpoint(two)["model"], last_checkpoint(one)["model"], 1e-5)
    assert out.count("fine-tuning, last epoch") == 1
    names = [{re.sub(r"tfevents.*", "tfevents", name) for name in files_in(f)} for f in (one, two)]
    assert names[0] == names[1]


# What is refused


REFUSED = {
    "--finetune EMPTY": "model.safetensors or pytorch_model.bin not found in",
    "--model vit_tiny_patch16 --input_size 20": "a patch size of 16 does not divide 20 x 20 px",
    "--nb_classes 4": "a head of 4 classes does not match the 3 of the training images",
    "--ema 1": "--ema 1 would never update",
    "--data_path IMAGES/train/cup": "no labels",
    "--drop_path 1": "--drop_path 1 would skip the last block",
    "--drop_path -0.1": "--drop_path",
    "--smoothing 1": "--smoothing 1 would erase the labels",
    "--mixup_mode image": "invalid choice: 'image'",
    "--auto_augment random": "unknown --auto_augment 'random'",
    "--remode noise": "invalid choice: 'noise'",
    "--crop_pct 0": "must be between 0.1 and 1, not 0",
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.items(), ids=REFUSED.keys())
def test_wrong_input_is_refused_in_one_sentence_and_nothing_is_written(
    tmp_path, images, capsys, options, reason
):
    for name in ("apple", "cup", "dog"):
        write_images(tmp_path / "other" / name, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    places = {"EMPTY": "empty", "OTHER": "other", "UNSORTED": "unsorted", "FILE": "file"}
    write_images(tmp_path / "unsorted", 3)
    for word, name in places.items():
        options = options.replace(word, str(tmp_path / name))
    options = options.replace("IMAGES", str(images)).split()
    argv = [*SCRATCH, "--data_path", images, "--output_dir", tmp_path / "run", *options]
    before = files_in(tmp_path)
    assert reason in refused(capsys, *argv)
    assert files_in(tmp_path) == before
    assert not (tmp_path / "run").exists()


# Streams


def stream(tmp_path, *options):
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", [12, 12])
    place = ["--dataset", "wds/train-{0..1}.tar", "--data_path", tmp_path / "shards"]
    argv = [*SCRATCH, *PLAIN, *place, "--num_samples", 24, "--output_dir", tmp_path / "run"]
    return [*argv, *options]


def test_streams_are_trained_on_and_measured_on_a_folder(tmp_path):
    val_images = write_classes(tmp_path / "validation") / "val"
    finetune(*stream(tmp_path, "--num_classes", 3, "--val_path", val_images))
    log = read_log(tmp_path / "run")
    assert [line["step"] for line in log] == [3, 6]
    assert log[-1]["val_images"] == sum(1 for _ in val_images.rglob("*.png"))


def test_a_stopped_stream_starts_its_epoch_again(tmp_path, capsys, monkeypatch):
    argv = [*stream(tmp_path, "--num_classes", 3), *EACH_STEP]
    run_until(6, monkeypatch, *argv, main=main_finetune.main)
    finetune(*argv)
    assert "the weights keep 2 steps of epoch 2" in capsys.readouterr().out
    assert [line["step"] for line in read_log(tmp_path / "run")] == [3, 6]


@pytest.mark.parametrize(
    ("options", "reason"),
    [([], "give --num_classes"), (["--num_classes", 2], "label 2 is not one of the 2 classes")],
)
def test_streams_do_not_tell_their_classes(tmp_path, capsys, options, reason):
    assert reason in refused(capsys, *stream(tmp_path, *options))
