"""A run that receives a stop signal saves, and continues bit for bit."""

import os
import re
import signal

import pytest

from tests.helpers.files import write_images
from tests.helpers.processes import children_of, command, finish, start, wait_for_line
from tests.helpers.runs import (
    TINY,
    assert_identical,
    final_state,
    log_without_time,
    run,
)
from util.compute.signals import SIGNALS, deferred_signals, stop_signal
from util.errors import StoppedError
from util.runs import checkpoint
from util.runs.checkpoint import list_checkpoints

PLACE = re.compile(r"stopped by (\w+) after (\d+) epochs? and (\d+) steps?")
every_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 96)


def options(images, folder):
    return ["--data_path", images, *TINY, "--epochs", 3, "--log_every", 1, "--output_dir", folder]


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run(*options(images, folder))
    return folder


@pytest.mark.slow
@every_signal
def test_a_signal_saves_within_an_epoch_and_the_run_continues(
    images, undisturbed, tmp_path, number
):
    words = command("main_pretrain.py", *options(images, tmp_path))
    process = start(words)
    wait_for_line(process, "epoch 2/3 step 3/12")
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number, err
    assert err == ""
    name, epochs, steps = PLACE.search(out).groups()
    assert (name, epochs) == (number.name, "1")
    assert 3 <= int(steps) < 12
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        f"checkpoint-e0001-s{int(steps):06d}.pth"
    ]
    code, out, err = finish(start(words))
    assert code == 0, err
    assert f"after 1 epoch and {steps} steps" in out
    assert_identical(final_state(tmp_path), final_state(undisturbed))
    assert log_without_time(tmp_path) == log_without_time(undisturbed)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(images, tmp_path):
    words = command("main_pretrain.py", *options(images, tmp_path), processes=2)
    process = start(words)
    wait_for_line(process, "epoch 1/3 step 2/6")
    (child, *_) = children_of(process.pid)
    os.kill(child, signal.SIGUSR1)
    code, out, err = finish(process)
    assert code != 0  # torchrun's exit code; it also prints a traceback
    assert "StoppedError" not in err and 'main_pretrain.py", line' not in err
    (saved,) = list_checkpoints(tmp_path)
    assert PLACE.search(out)[1] == "SIGUSR1"
    code, out, err = finish(start(words))
    assert code == 0, err
    assert f"continuing from {saved}" in out
    assert list_checkpoints(tmp_path)[-1].name.startswith("checkpoint-e0003")


@pytest.mark.slow
def test_a_signal_to_loader_processes_does_not_end_them(images, undisturbed, tmp_path):
    words = command("main_pretrain.py", *options(images, tmp_path), "--num_workers", 2)
    process = start(words)
    wait_for_line(process, "epoch 2/3 step 1/12")
    workers = children_of(process.pid)
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 0, err
    assert_identical(final_state(tmp_path), final_state(undisturbed))


def test_a_signal_during_evaluation_stops_after_the_epoch_is_saved(images, tmp_path, monkeypatch):
    # No signal during the epoch's steps, only after them.
    monkeypatch.setattr(checkpoint, "stop_signal", lambda: signal.SIGTERM)
    every_step = ["--log_every", 1000, "--save_every", 2]
    with pytest.raises(StoppedError, match="stopped by SIGTERM after 1 epoch and 0 steps"):
        run(*options(images, tmp_path), *every_step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-e0001-s000000.pth"]


def test_signals_are_deferred_and_handlers_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with deferred_signals():
        assert stop_signal() is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop_signal() == signal.SIGUSR1
    assert stop_signal() is None
    assert [signal.getsignal(number) for number in SIGNALS] == before


@every_signal
def test_a_program_that_does_not_train_is_ended_at_once(number):
    program = "import signal; from util.runs.run import run_main; "
    program += f"run_main(lambda: signal.raise_signal({int(number)}))"
    code, _, _ = finish(start([*command()[:1], "-c", program], PYTHONPATH="."))
    assert code == -number
