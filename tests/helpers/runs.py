"""Runs of a main, their results, and error messages."""

import logging
import threading
from contextlib import contextmanager

import pytest
import torch

import main_detection
import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import main_segmentation
from tests.helpers.processes import command, finish, start
from util.runs.checkpoint import BEST_NAME, list_checkpoints, read_checkpoint
from util.runs.epoch_log import read_log
from util.runs.run import run_main
from util.runs.run_log import RunLog

MAINS = {
    "pretrain": main_pretrain,
    "finetune": main_finetune,
    "linprobe": main_linprobe,
    "knn": main_knn,
    "segmentation": main_segmentation,
    "detection": main_detection,
}
# Options of main_pretrain.py: five steps per epoch on 40 images.
TINY = ["--model", "crossmae_vit_tiny_patch4", "--input_size", "16", "--decoder_depth", "1"]
QUICK = ["--batch_size", "8", "--epochs", "2", "--num_workers", "0", "--amp", "fp32"]
QUICK += ["--device", "cpu"]  # of every training main
TINY += QUICK
# Every step is logged, and saved for good.
EACH_STEP = ["--save_every_minutes", "0", "--log_every", "1", "--keep_last", "0"]


@contextmanager
def logging_restored():
    """Undo what a main does to the root logger."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers, root.level, threading.excepthook
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        threading.excepthook = hook


def run(*argv, main=main_pretrain.main):
    """Call a main in this process."""
    with logging_restored():
        main([str(word) for word in argv])


def refusal(capsys, *argv, main=main_pretrain.main, code=2, advice=""):
    """Return the single line on stderr with which a main ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught, logging_restored():
        run_main(lambda: main([str(word) for word in argv]), memory_advice=advice)
    assert caught.value.code == code
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1, message
    _, found, sentence = message.strip().partition("error: ")
    assert found
    return sentence


class StoppedError(Exception):
    """Stand-in for an interruption from outside."""


def run_until(step, monkeypatch, *argv, main=main_pretrain.main):
    """Run until just before this step is logged."""
    log_step = RunLog.log_step

    def stop_or_log(log, done, **values):
        if done == step:
            raise StoppedError
        log_step(log, done, **values)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(RunLog, "log_step", stop_or_log)
        run(*argv, main=main)


def log_without_time(folder):
    """A run's log without the values that may differ between runs."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(folder)]


def last_checkpoint(folder, kind="pretrain"):
    return read_checkpoint(list_checkpoints(folder)[-1], kind)


def state_of(folder, kind="pretrain"):
    """Everything that a run's last checkpoint continues from, the best epoch, and the log."""
    keys = ("model", "ema", "optimizer", "scaler", "progress", "meters", "broken")
    content = {"last": last_checkpoint(folder, kind)}
    if (folder / BEST_NAME).exists():
        content["best"] = read_checkpoint(folder / BEST_NAME, kind)
    state = {
        name: {key: checkpoint[key] for key in keys if key in checkpoint}
        for name, checkpoint in content.items()
    }
    return state | {"log": log_without_time(folder)}


def assert_identical(a, b, place="content"):
    """Compare nested plain values and tensors bit for bit."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert list(a) == list(b), place
        for key in a:
            assert_identical(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_identical(x, y, f"{place}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), place
    else:
        assert a == b or a != a != b != b, place  # NaN is the same as NaN


def six_epochs(images, folder):
    """Arguments of a run that is long enough to be interrupted, for launchers."""
    argv = ["--data_path", images, *TINY, "--epochs", 6, "--log_every", 1]
    return [*argv, "--output_dir", folder]


def run_two_processes(images, folder):
    """Run `six_epochs` with torchrun; return its folder."""
    words = command("main_pretrain.py", *six_epochs(images, folder), processes=2)
    code, _, err = finish(start(words))
    assert code == 0, err
    return folder


def assert_same_run(folder, expected):
    """Assert that two runs have the same last checkpoint and log."""
    states = [last_checkpoint(f) for f in (folder, expected)]
    for key in ("model", "optimizer", "progress"):
        assert_identical(*(state[key] for state in states), key)
    assert log_without_time(folder) == log_without_time(expected)


def final_state(folder):
    state = last_checkpoint(folder)
    return state["model"], state["optimizer"], state["progress"]
