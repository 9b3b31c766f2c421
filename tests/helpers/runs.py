"""Small models, small folders of images, and runs of a main, for several test modules."""

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_pretrain
import models
import models_vit
from models_crossmae import build_crossmae
from models_mae import build_mae
from models_vit import ModelSize
from util.runs.checkpoint import list_checkpoints, read_checkpoint
from util.runs.run import run_main
from util.runs.run_log import RunLog, read_log

ROOT = Path(__file__).parents[2]

NANO = ModelSize(4, 32, 2, 2, img_size=16)
NANO_DECODER = {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
crossmae_nano = partial(build_crossmae, NANO, **NANO_DECODER)
mae_nano = partial(build_mae, NANO, **NANO_DECODER)

# Of main_pretrain.py; five steps an epoch on 40 images.
TINY = ["--model", "crossmae_vit_tiny_patch4", "--input_size", "16", "--decoder_depth", "1"]
TINY += ["--batch_size", "8", "--epochs", "2", "--num_workers", "0", "--amp", "fp32"]


def use_nano_models(monkeypatch):
    """Let the names of the tiny models stand for ones that train a step in milliseconds."""
    monkeypatch.setitem(models.MODELS, "crossmae_vit_tiny_patch4", crossmae_nano)
    monkeypatch.setitem(models.MODELS, "mae_vit_tiny_patch4", mae_nano)
    monkeypatch.setitem(models_vit.SIZES, "tiny_patch4", NANO)


class RunsCode:
    """Makes a folder when it is unpickled the usual way."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_images(folder, num_images, size=20):
    """Different images with some structure: a gradient, and noise of a few pixels' size."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(num_images)
    ramp = np.linspace(0, 128, size).reshape(1, size, 1)
    for index in range(num_images):
        noise = Image.fromarray(random.integers(0, 128, (5, 5, 3), np.uint8))
        pixels = ramp + np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return folder


CLASSES = {"apple": 12, "bear": 12, "cup": 13}


def write_classes(folder):
    """Class folders of 37 training images, in five steps of 8 an epoch, and 12 held-out ones."""
    for number, (name, num_images) in enumerate(CLASSES.items(), start=3):
        write_images(folder / "train" / name, num_images)
        write_images(folder / "val" / name, number)
    return folder


@contextmanager
def logging_restored():
    """Undo what a main does to the root logger."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


def run(*argv, main=main_pretrain.main):
    """Call a main in this process."""
    with logging_restored():
        main([str(word) for word in argv])


def refusal(capsys, *argv, main=main_pretrain.main, code=2, advice=""):
    """The one sentence on stderr with which a main ends."""
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
    """What stops a run from outside."""


def run_until(step, monkeypatch, *argv, main=main_pretrain.main):
    """A run that is stopped before it logs this step."""
    log_step = RunLog.log_step

    def stop_or_log(log, done, **values):
        if done == step:
            raise StoppedError
        log_step(log, done, **values)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(RunLog, "log_step", stop_or_log)
        run(*argv, main=main)


def log_without_time(folder):
    """The log of a run, as far as it has to repeat."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_log(folder)]


def last_checkpoint(folder):
    return read_checkpoint(list_checkpoints(folder)[-1], "pretrain")


def state_of(folder):
    """Everything that a run's last checkpoint would continue from, and its log."""
    keys = ("model", "optimizer", "scaler", "progress", "meters", "broken")
    checkpoint = last_checkpoint(folder)
    return {key: checkpoint[key] for key in keys} | {"log": log_without_time(folder)}


def command(*argv, processes=None):
    """The command line of a script in the repository, to be run by `start`."""
    python = [sys.executable]
    if processes is not None:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return [str(word) for word in (*python, *argv)]


def start(words, cwd=ROOT, **variables):
    """Start a command in the repository, with one thread as in the tests' own process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=cwd, env=env, **pipes)


def finish(process):
    """Wait for a command; return its exit code, standard output and standard error."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


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
        assert a == b, place


def files_in(folder):
    """Every file in a folder with its content, by its path from there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def copied(folder, place):
    """A copy of a folder, for a test that changes it."""
    return Path(shutil.copytree(folder, place))


def six_epochs(images, folder):
    """The arguments of a run for launchers, long enough to be interrupted."""
    argv = ["--data_path", images, *TINY, "--epochs", 6, "--log_every", 1]
    return [*argv, "--output_dir", folder]


def run_two_processes(images, folder):
    """A run of `six_epochs` by torchrun; return its folder."""
    words = command("main_pretrain.py", *six_epochs(images, folder), processes=2)
    code, _, err = finish(start(words))
    assert code == 0, err
    return folder


def assert_same_run(folder, expected):
    """The last checkpoints and the logs of two runs are the same, as far as they have to repeat."""
    states = [last_checkpoint(f) for f in (folder, expected)]
    for key in ("model", "optimizer", "progress"):
        assert_identical(*(state[key] for state in states), key)
    assert log_without_time(folder) == log_without_time(expected)


def wait_until(condition, what, seconds=90):
    """Wait for a condition; return its first value that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    return pytest.fail(f"waited {seconds} s for {what}")


def tasks_of(folder):
    """The processes of a run that a launcher has started into this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "cmdline").read_text().split("\0")
            if words[1:2] == ["-u"] and "main_" in words[2] and str(folder) in words:
                found.append(int(path.name))
    return found


def stands_still(pid, number=None):
    """Whether a process is stopped and, if so asked, has not been sent a signal meanwhile."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    pending = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)
    return "State:\tT" in status and not (number and pending >> (number - 1) & 1)


def interrupt(log, text, folder, *, number, send=lambda: None):
    """Have a run find a signal right behind a line of its log, however fast it is.

    Args:
        log: a file.
        text: in a line of it.
        folder: that the run writes to.
        number: of the signal.
        send: sends it; by itself it comes from elsewhere.
    """
    wait_until(lambda: log.exists() and text in log.read_text(), f"{text!r} in {log}")
    tasks = tasks_of(folder)
    assert tasks, "the run had ended before it could be interrupted"
    for pid in tasks:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: all(map(stands_still, tasks)), "processes to stop")
        send()
        wait_until(lambda: not any(stands_still(p, number) for p in tasks), f"signal {number}")
    finally:
        for pid in tasks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
