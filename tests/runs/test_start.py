"""The block that a run shows at its start."""

import logging
from types import SimpleNamespace

import pytest
import torch

from util.compute.batch_size import BatchPlan
from util.compute.precision import Precision
from util.runs import start
from util.runs.resume import MAX_ITERS, RunRecord
from util.runs.start import (
    describe_device,
    describe_recipe,
    describe_run,
    describe_step,
    log_block,
    millions,
    tensorboard_command,
)
from util.schedule import plan_learning_rate
from util.settings.optim import OptimSettings

LOADER = SimpleNamespace(effective_batch_size=32, steps_per_epoch=197, num_crops=1)


def record(fixed=None, length=("--epochs", 1)):
    return RunRecord("pretrain", fixed or {}, {}, {}, {}, (), length)


def run_text(length, *, epochs=21, steps_per_epoch=197, warmup_epochs=1.05):
    optim = OptimSettings(batch_size=32, epochs=epochs, warmup_epochs=warmup_epochs, lr=0.001)
    loader = SimpleNamespace(effective_batch_size=32, steps_per_epoch=steps_per_epoch)
    return describe_run(optim, loader, plan_learning_rate(optim, loader), record(length=length))


def test_the_length_of_a_run_is_said_in_epochs_and_steps():
    text = run_text(("--epochs", 1))
    assert text == "21 epochs of 197 steps, 4,137 steps; lr 0.001 as given, warm-up 1.05 epochs"
    text = run_text(("--epochs", 1), epochs=1, steps_per_epoch=1, warmup_epochs=0)
    assert text == "1 epoch of 1 step; lr 0.001 as given, warm-up 0 epochs"


def test_a_run_that_counts_steps_says_when_it_is_evaluated():
    text = run_text((MAX_ITERS, 400), epochs=10, steps_per_epoch=400, warmup_epochs=0.25)
    assert text == ("4,000 steps, evaluated every 400; lr 0.001 as given, warm-up 100 steps")


def test_the_images_of_a_step_are_a_product_with_the_names_of_its_flags(monkeypatch):
    monkeypatch.setattr(start, "world_size", lambda: 2)
    text = describe_step(LOADER, BatchPlan(8, 2), "about 1.4 GiB")
    assert text == "32 images = 8 x 2 (--accum_iter) x 2 (processes); memory about 1.4 GiB"


def test_the_recipe_is_named_by_flags_without_hashes_and_what_is_off():
    fixed = {
        "--model": "vit_tiny_patch4",
        "hash of the names of images": "0f3b",
        "effective batch size": 8,
        "--layer_decay": 0.65,
        "--keep_head": True,
        "--ema": None,
        "--reprob": 0.0,
        "--seed": 0,
        "--auto_augment": "rand-m9",
        "--crop_area": [0.08, 1.0],
    }
    text = describe_recipe(record(fixed))
    assert text == "layer_decay 0.65, keep_head, auto_augment rand-m9, crop_area 0.08 1"


def test_long_lines_go_on_below_their_text(caplog):
    caplog.set_level(logging.INFO)
    log_block({"run": "ab " * 40, "output": "folder"})
    assert caplog.messages == [
        "run      " + ("ab " * 33).strip(),
        "         " + ("ab " * 7).strip(),
        "output   folder",
    ]


def test_paths_and_commands_are_not_broken(caplog):
    caplog.set_level(logging.INFO)
    folder, command = "a long/" * 20, "tensorboard --logdir " + "b" * 100
    log_block({"output": [folder, command]})
    assert caplog.messages == [f"output   {folder}", f"         {command}"]


def test_the_device_is_said_with_its_number_format(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    text = describe_device(Precision("bf16", torch.device("cpu")))
    assert text.startswith("CPU (AVX2, 2 threads") and text.endswith("; bfloat16")


def test_small_models_are_counted_exactly():
    assert [millions(n) for n in (1234, 5_432_100, 86_567_656)] == ["1,234", "5.4 M", "86.6 M"]


@pytest.mark.parametrize(
    ("output_dir", "log_dir", "shown"),
    [
        ("output/tiny", None, "output"),
        ("tiny", None, "tiny"),  # the folder above is the whole working folder
        ("/large/tiny", None, "/large/tiny"),
        ("output/tiny", "logs", "logs"),
        ("/my photos/tiny", None, "'/my photos/tiny'"),
    ],
)
def test_tensorboard_shows_a_run_under_its_own_name(output_dir, log_dir, shown):
    run = start.RunSettings(
        output_dir=output_dir,
        log_dir=log_dir,
        device=None,
        seed=0,
        resume="auto",
        save_every=1,
        save_every_minutes=None,
        keep_last=3,
        log_every=20,
        timeout_minutes=30,
    )
    assert tensorboard_command(run) == f"tensorboard --logdir {shown}"


def test_a_run_of_an_older_version_goes_on_in_its_tensorboard_folder(tmp_path):
    options = {"output_dir": str(tmp_path), "log_dir": None, "device": None, "seed": 0}
    options |= {"resume": "auto", "save_every": 1, "save_every_minutes": None, "keep_last": 3}
    run = start.RunSettings(**options, log_every=20, timeout_minutes=30)
    assert run.log_folder == tmp_path
    (tmp_path / "tensorboard").mkdir()
    assert run.log_folder == tmp_path / "tensorboard"
