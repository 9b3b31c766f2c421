"""A run that receives a stop signal saves, and continues bit for bit."""

import multiprocessing
import os
import re
import signal
import textwrap
from pathlib import Path

import pytest

from tests.helpers.files import write_images
from tests.helpers.processes import (
    children_of,
    command,
    finish,
    start,
    wait_for_line,
    wait_until,
)
from tests.helpers.runs import (
    TINY,
    assert_identical,
    final_state,
    log_without_time,
    run,
)
from util.compute.signals import (
    SIGNALS,
    StopRequest,
    blocked_signals,
    defer_signals,
    handled_signals,
    signal_name,
    stop_signal,
)
from util.errors import StoppedError
from util.runs import checkpoint
from util.runs.checkpoint import list_checkpoints

PLACE = re.compile(r"stopped by ([\w-]+) after (\d+) epochs? and (\d+) steps?")
every_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 96)


def options(images, folder):
    argv = ["--data_path", images, "--val_fraction", 0, *TINY, "--epochs", 3, "--log_every", 1]
    return [*argv, "--output_dir", folder]


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
    wait_for_line(process, "epoch 1/3")
    process.send_signal(number)
    code, out, err = finish(process)
    assert code == 128 + number, err
    assert err == ""
    name, epochs, steps = PLACE.search(out).groups()
    assert (name, epochs) == (signal_name(number), "1")
    assert 0 <= int(steps) < 12
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        f"checkpoint-e0001-s{int(steps):06d}.pth"
    ]
    code, out, err = finish(start(words))
    assert code == 0, err
    assert_identical(final_state(tmp_path), final_state(undisturbed))
    assert log_without_time(tmp_path) == log_without_time(undisturbed)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(images, tmp_path):
    words = command("main_pretrain.py", *options(images, tmp_path), processes=2)
    process = start(words)
    wait_for_line(process, "epoch 1/3")
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
    wait_for_line(process, "epoch 1/3")
    workers = children_of(process.pid)
    assert len(workers) == 2
    for pid in workers:
        for number in SIGNALS:
            os.kill(pid, number)
    code, _, err = finish(process)
    assert code == 0, err
    assert_identical(final_state(tmp_path), final_state(undisturbed))


def test_a_signal_during_evaluation_stops_after_the_epoch_is_saved(images, tmp_path, monkeypatch):
    # No signal during the epoch's steps, only after them.
    monkeypatch.setattr(checkpoint, "stop_request", lambda: StopRequest(15, "by SIGTERM"))
    every_step = ["--log_every", 1000, "--save_every", 2]
    with pytest.raises(StoppedError, match="stopped by SIGTERM after 1 epoch and 0 steps"):
        run(*options(images, tmp_path), *every_step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-e0001-s000000.pth"]


def test_signals_are_recorded_once_there_is_something_to_save():
    before = [signal.getsignal(number) for number in SIGNALS]
    with handled_signals(lambda: None):
        assert stop_signal() is None
        defer_signals(saves="soon")
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop_signal() == signal.SIGUSR1
    assert stop_signal() is None
    assert [signal.getsignal(number) for number in SIGNALS] == before


def outcome_of(program, **variables):
    """Exit code, standard output and error of a program that imports what the tests below need."""
    imports = """
        import os, signal, sys, tempfile, threading, time
        from util.arguments import check_arguments
        from util.compute.signals import blocked_signals, defer_signals
        sys.argv = ["program.py"]
    """
    if "run_main" in program:
        imports += "    from util.runs.run import run_main, start_logging\n"
    words = [*command(), "-c", textwrap.dedent(imports) + textwrap.dedent(program)]
    return finish(start(words, PYTHONPATH=".", **variables))


@every_signal
def test_a_program_that_does_not_train_ends_in_one_sentence_and_leaves_nothing(number, tmp_path):
    program = f"""
        def main():
            with tempfile.TemporaryDirectory():
                try:
                    signal.raise_signal({int(number)})
                except Exception:  # as around a decoder
                    pass

        run_main(main)
    """
    code, _, err = outcome_of(program, TMPDIR=str(tmp_path))
    assert code == 128 + number
    assert err == f"program.py: stopped by {signal_name(number)}\n"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_during_the_imports_is_one_sentence():
    program = """
        check_arguments(lambda: None)
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:  # as in some libraries
            pass
    """
    assert outcome_of(program) == (130, "", "program.py: stopped by Ctrl-C\n")


def test_a_process_forked_in_the_context_never_sees_the_signals():
    with blocked_signals():
        process = multiprocessing.get_context("fork").Process(target=signal_itself, daemon=True)
        process.start()
    process.join()
    assert process.exitcode == 0


def signal_itself():
    for number in SIGNALS:
        os.kill(os.getpid(), number)


def is_running(pid):
    try:
        return ") Z " not in Path("/proc", pid, "stat").read_text()
    except OSError:
        return False


def test_a_second_ctrl_c_ends_a_run_at_once_and_kills_loader_processes():
    program = """
        import multiprocessing
        from util.compute.worker_deaths import note_workers

        def press():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)

        def main():
            start_logging()
            with blocked_signals():
                context = multiprocessing.get_context("fork")
                worker = context.Process(target=time.sleep, args=(600,), daemon=True)
                worker.start()
            note_workers()
            print(worker.pid, flush=True)
            defer_signals(saves="soon")
            threading.Thread(target=press).start()
            while True:
                time.sleep(600)

        run_main(main)
    """
    code, out, err = outcome_of(program)
    assert code == 130
    assert err.endswith(": ended by a second Ctrl-C, without saving\n") and err.count("\n") == 1
    pid, sentence = out.splitlines()
    assert sentence.endswith(
        "Ctrl-C: the run saves and ends soon; a second Ctrl-C ends it at once, without saving"
    )
    wait_until(lambda: not is_running(pid), "the end of the loader process")


def test_a_ctrl_c_that_a_launcher_passes_on_is_no_second_one():
    program = """
        def main():
            defer_signals(saves="soon")
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.5)

        run_main(main)
    """
    assert outcome_of(program) == (0, "", "")


def test_a_program_in_the_background_goes_on_ignoring_ctrl_c():
    program = """
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for `program &`
        check_arguments(lambda: None)
        run_main(lambda: signal.raise_signal(signal.SIGINT))
    """
    assert outcome_of(program) == (0, "", "")


@pytest.mark.faults
@pytest.mark.parametrize("trains", [False, True])
def test_a_stopped_program_does_not_wait_for_the_batches_of_its_loader_processes(trains):
    program = f"""
        import torch
        from torch.utils.data import _utils
        from util.compute.signals import stop_signal
        from util.data.loaders import Batches
        from util.errors import StoppedError

        _utils.MP_STATUS_CHECK_INTERVAL = 10_000  # five seconds for each process

        class Slow(torch.utils.data.Dataset):
            collate = staticmethod(list)
            def __len__(self):
                return 100
            def __getitem__(self, index):
                if index > 1:
                    time.sleep(10_000)
                return index

        def main():
            batches = iter(Batches(Slow(), batch_size=1, num_workers=2))
            next(batches)
            if {trains}:
                defer_signals(saves="soon")
            signal.raise_signal(signal.SIGTERM)
            raise StoppedError("saved", signal.SIGTERM)

        run_main(main)
    """
    code, _, err = outcome_of(program)
    assert code == 128 + signal.SIGTERM, err
    assert err == ("" if trains else "program.py: stopped by SIGTERM\n")
