"""Runs that are killed or run out of disk space end bit-identical to any other."""

import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

import main_pretrain
from tests.helpers.files import copied, write_images
from tests.helpers.models import use_nano_models
from tests.helpers.runs import (
    TINY,
    assert_identical,
    last_checkpoint,
    refusal,
    run,
    run_until,
    state_of,
)
from util.runs import resume, run_log
from util.runs.checkpoint import checkpoint_position, list_checkpoints, read_checkpoint
from util.runs.resume import newest_good_checkpoint
from util.runs.run import run_main
from util.runs.run_log import RunLog

pytestmark = [pytest.mark.faults]

EACH_STEP = ["--save_every_minutes", 0, "--log_every", 1, "--keep_last", 2]
EPOCHS, STEPS = 12, 5


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """Arguments of a run with five steps per epoch."""
    images = tmp_path_factory.mktemp("images")
    write_images(images / "train", 37)
    write_images(images / "val", 5)
    measured = ["--lr", 1e-3, "--eval_every", 1, "--visualize_every", 2]
    return [*TINY, "--data_path", images, *measured, *EACH_STEP, "--epochs", EPOCHS]


@pytest.fixture(scope="module")
def undisturbed(argv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        run(*argv, "--output_dir", folder)
    return folder


def assert_same_end(folder, undisturbed):
    """Assert that a run has the same weights, optimizer state, log and figure."""
    assert_identical(state_of(folder), state_of(undisturbed))
    pictures = [(f / "reconstructions.png").read_bytes() for f in (folder, undisturbed)]
    assert pictures[0] == pictures[1]
    assert not list(folder.glob("*.tmp"))


# Runs in separate processes, forked from one that has imported everything


def play(words, output, moments=()):
    """Run after setting up `moments`."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    multiprocessing.set_start_method("fork", force=True)  # for loaders, as in an ordinary run
    torch.set_num_threads(1)
    use_nano_models(pytest.MonkeyPatch())
    sys.argv = ["main_pretrain.py"]
    for moment in moments:
        moment()
    run_main(lambda: main_pretrain.main(list(map(str, words))))


@pytest.fixture(scope="module")
def forked():
    """Start `play` in a separate process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.runs"])
    processes = []

    def start(*arguments):
        processes.append(context.Process(target=play, args=arguments))
        processes[-1].start()
        return processes[-1]

    with (
        pytest.MonkeyPatch.context() as patch
    ):  # of the fork server, which the first start launches
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, sys.path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield start
    for process in processes:
        process.kill()
        process.join()


def end_of(process):
    """Wait for a process to end on its own; return its exit code."""
    process.join(60)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_loader():
    """Kill one of this process's loader processes, if there are any."""
    loaders = [child for child in multiprocessing.active_children() if child.is_alive()]
    if loaders:
        print("loaders", *(child.pid for child in loaders), flush=True)
        loaders[0].kill()


def before_event(pattern, number, act=kill_self):
    """Act right before the n-th opening, renaming or removal of a file that matches a pattern."""
    count = itertools.count(1)

    def notice(event, arguments):
        if event in ("open", "os.rename", "os.remove"):
            mode = arguments[1] if event == "open" else ""
            if re.search(pattern, f"{event} {arguments[0]} {mode}") and next(count) == number:
                act()

    sys.addaudithook(notice)


def halfway_through_a_save(number):
    """Be killed when half of the n-th checkpoint is written."""
    save, count = torch.save, itertools.count(1)

    def save_or_die(content, file):
        save(content, file)
        if next(count) == number:
            file.truncate(file.tell() // 2)
            file.flush()
            kill_self()

    torch.save = save_or_die


def after_log_point(number, share):
    """Be killed after the n-th log point, by a fraction of the time since the previous one."""
    log_step, times = RunLog.log_step, [time.monotonic()]

    def log_and_set_timer(log, step, **values):
        log_step(log, step, **values)
        times.append(time.monotonic())
        if len(times) == number + 1:
            threading.Timer(share * (times[-1] - times[-2]), kill_self).start()

    RunLog.log_step = log_and_set_timer


def while_it_starts(seconds):
    """Be killed this many seconds after the start."""
    threading.Timer(seconds, kill_self).start()


# Repeated kills

AIMED = [
    partial(before_event, r"open .*/lock ", 1),
    partial(before_event, r"open .*/args\.json\.tmp x", 1),
    partial(before_event, r"rename .*/args\.json\.tmp", 1),
    partial(before_event, r"open .*tfevents", 1),
    partial(before_event, r"open .*/log\.jsonl\.tmp x", 1),
    partial(before_event, r"rename .*/log\.jsonl\.tmp", 1),
    partial(before_event, r"open .*/log\.jsonl a", 1),
    partial(before_event, r"rename .*/reconstructions\.png\.tmp", 1),
    partial(before_event, r"open .*\.pth\.tmp x", 2),
    partial(before_event, r"rename .*\.pth\.tmp", 1),
    partial(before_event, r"remove .*\d\.pth ", 1),  # both the new and the old one exist
    partial(before_event, r"remove .*\d\.pth ", 3),
    partial(halfway_through_a_save, 4),
]


def steps_in(place):
    return place[0] * STEPS + place[1]


def last_step_of(text):
    """Last step in a run's output, 0 for none."""
    rows = re.findall(r"epoch +(\d+)/\d+  loss", text)
    steps = re.findall(rf"epoch +(\d+)/\d+, step (\d+)/{STEPS}:", text)
    places = [(int(epoch), 0) for epoch in rows]
    places += [(int(epoch) - 1, int(step)) for epoch, step in steps]
    return max(map(steps_in, places), default=0)


def show_every_step():
    """Log a line at every log point, as if steps took long."""
    run_log.PERIOD = 0.0


@pytest.mark.slow
def test_a_run_that_is_killed_20_times_ends_with_the_same_bits(tmp_path, argv, undisturbed, forked):
    draw = random.Random(0)
    moments = [(moment, 0) for moment in AIMED]
    moments += [(partial(while_it_starts, draw.uniform(0, 0.1)), 0)]
    for num_workers in (0, 0, 2, 2):
        moments.append(
            (partial(after_log_point, draw.randint(1, 5), 2 * draw.random()), num_workers)
        )
    draw.shuffle(moments)
    moments.append((partial(halfway_through_a_save, 1), 0))  # leaves a record of the start
    moments.append((partial(before_event, r"rename .*/args\.json", 1), 0))
    assert len(moments) == 20
    words = [*argv, "--output_dir", tmp_path / "run"]
    newest, reached, lost = None, 0, []
    for number, (moment, num_workers) in enumerate(moments):
        output = tmp_path / f"{number}.txt"
        code = end_of(
            forked([*words, "--num_workers", num_workers], output, [show_every_step, moment])
        )
        text = output.read_text()
        assert code == -signal.SIGKILL, f"{moment}: {text}"
        if newest:  # never from scratch
            assert f"continuing from {newest} after" in text or not last_step_of(text)
        assert "trying the previous checkpoint" not in text
        paths = list_checkpoints(tmp_path / "run")
        assert len(paths) <= 3
        for path in paths:  # each is complete
            read_checkpoint(path, "pretrain")
        before, newest = newest, paths[-1] if paths else None
        assert not before or checkpoint_position(newest) >= checkpoint_position(before)
        reached = max(reached, last_step_of(text))
        lost.append(reached - steps_in(checkpoint_position(newest)) if newest else reached)
    assert max(lost) <= 1  # the step that was being saved
    output = tmp_path / "last.txt"
    assert end_of(forked(words, output)) == 0, output.read_text()
    assert f"continuing from {newest}" in output.read_text()
    assert_same_end(tmp_path / "run", undisturbed)


# Full disks


class SmallDisk:
    """Separate file system in memory, of 4 MB."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
        mounted = subprocess.run(words, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"tmpfs cannot be mounted: {mounted.stderr.strip()}")

    def fill(self):
        with (self.folder / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    def make_room(self):
        (self.folder / "filler").unlink()

    def close(self):
        subprocess.run(["umount", self.folder], check=True)


class SizeLimit:
    """Folder whose files can be limited in size, so that a line of a log is cut off."""

    def __init__(self, folder):
        self.folder = folder
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, self.limits[1]))

    def make_room(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    close = make_room


@pytest.fixture(params=[SmallDisk, SizeLimit])
def disk(request, tmp_path):
    disk = request.param(tmp_path / "disk")
    yield disk
    disk.close()


def full_from_step(monkeypatch, disk, full, room=None):
    """Keep the disk full between two steps of a run; collect the newest good checkpoints."""
    log_step, newest = RunLog.log_step, {}

    def fill_and_log(log, step, **values):
        if step == full:
            disk.fill()
        if step == room:
            disk.make_room()
        newest[step] = newest_good_checkpoint(log.output_dir, "pretrain")
        log_step(log, step, **values)

    monkeypatch.setattr(RunLog, "log_step", fill_and_log)
    return newest


# TensorBoard's thread ends with an error that pytest warns about.
in_thread = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@in_thread
def test_a_run_continues_while_the_disk_is_full_and_loses_nothing(
    argv, undisturbed, disk, capsys, monkeypatch, nano
):
    folder = disk.folder / "run"
    with monkeypatch.context() as patch:
        newest = full_from_step(patch, disk, full=3, room=12)
        run(*argv, "--output_dir", folder)
    out = capsys.readouterr().out
    assert {newest[step].name for step in range(3, 13)} == {"checkpoint-e0000-s000002.pth"}
    assert newest[15].name == "checkpoint-e0002-s000004.pth"
    assert len(re.findall(r"could not save \S+\.pth: ", out)) == 9
    assert re.search(
        r"could not save \S+-s000003\.pth: \[Errno \d+\] (No space|File too large)", out
    )
    assert re.findall(r"log\.jsonl: .*\. (\d) lines? will be written", out) == ["1", "2"]
    assert out.count("TensorBoard is off until the next start") == 1
    assert "could not save " + str(folder / "reconstructions.png") in out
    assert_same_end(folder, undisturbed)


@in_thread
def test_a_run_that_ends_on_a_full_disk_fails_in_one_sentence_and_continues_later(
    argv, undisturbed, disk, capsys, monkeypatch, nano
):
    folder = disk.folder / "run"
    with monkeypatch.context() as patch:
        full_from_step(patch, disk, full=3)
        ending = refusal(capsys, *argv, "--output_dir", folder, code=1)
    assert f"lacks the lines of {EPOCHS} epochs" in ending
    assert "free disk space and start the same command again" in ending
    refused = refusal(capsys, *argv, "--output_dir", folder)
    assert re.search("cannot write .*(No space|File too large)", refused)
    disk.make_room()
    run(*argv, "--output_dir", folder)
    assert "e0000-s000002.pth after 0 epochs and 2 steps" in capsys.readouterr().out
    assert_same_end(folder, undisturbed)


@pytest.mark.parametrize("written", [False, True])
def test_an_unwritten_line_is_in_the_checkpoint_until_it_is_in_the_log(
    tmp_path, argv, undisturbed, monkeypatch, nano, written
):
    argv = [*argv, "--output_dir", tmp_path]
    run_until(8, monkeypatch, *argv)
    line = (tmp_path / "log.jsonl").read_text()
    newest = list_checkpoints(tmp_path)[-1]
    torch.save(last_checkpoint(tmp_path) | {"unwritten": [json.loads(line)]}, newest)
    (tmp_path / "log.jsonl").write_text(line if written else line[:20])
    run(*argv)
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.parametrize("disk", [SmallDisk], indirect=True)
def test_a_full_disk_for_stdout_does_not_end_a_run(tmp_path, argv, undisturbed, disk, forked):
    disk.fill()
    end_of(forked([*argv, "--output_dir", tmp_path / "run"], disk.folder / "out.txt"))
    assert_same_end(tmp_path / "run", undisturbed)


# Damaged checkpoints


@pytest.fixture(scope="module")
def two_checkpoints(argv, tmp_path_factory):
    """Folder with a checkpoint and a newer one."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        run_until(13, patch, *argv, "--output_dir", folder)
    return folder


def truncated(content, place):
    return content[:place]


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


def places_in(size, num):
    """Offsets spread over a file, including its first two and last two bytes."""
    draw = random.Random(0)
    width = size // (num - 4)
    return [0, 1, *(i * width + draw.randrange(width) for i in range(num - 4)), size - 2, size - 1]


@pytest.mark.parametrize("damage", [truncated, flipped])
def test_a_damaged_checkpoint_is_refused_or_has_the_same_content(
    tmp_path, two_checkpoints, caplog, damage
):
    folder = copied(two_checkpoints, tmp_path / "run")
    before, newest = list_checkpoints(folder)
    content, whole = last_checkpoint(folder), newest.read_bytes()
    refused = 0
    for place in places_in(len(whole), 20):
        newest.write_bytes(damage(whole, place))
        caplog.clear()
        if newest_good_checkpoint(folder, "pretrain") == before:
            refused += 1
            (warning,) = caplog.messages
            assert str(newest) in warning
            assert "trying the previous checkpoint" in warning
        else:  # bytes without a checksum, such as dates
            assert_identical(last_checkpoint(folder), content)
    assert refused == 20 if damage is truncated else refused >= 12


@pytest.mark.parametrize("damage", [truncated, flipped])
def test_a_damaged_newest_checkpoint_costs_only_what_came_after_the_one_before(
    tmp_path, argv, undisturbed, two_checkpoints, capsys, nano, damage
):
    folder = copied(two_checkpoints, tmp_path / "run")
    before, newest = list_checkpoints(folder)
    whole = newest.read_bytes()
    newest.write_bytes(damage(whole, len(whole) // 2))
    run(*argv, "--output_dir", folder)
    out = capsys.readouterr().out
    assert re.search(rf"{newest} is (truncated|damaged).*; trying the previous checkpoint", out)
    assert f"continuing from {before} after" in out
    assert_same_end(folder, undisturbed)


# Two runs at once


def test_of_two_starts_at_the_same_moment_one_runs(tmp_path, argv, undisturbed, forked):
    words = [*argv, "--output_dir", tmp_path / "run"]
    outputs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    barrier = multiprocessing.get_context("forkserver").Barrier(2)
    together = partial(before_event, r"open .*/lock ", 1, barrier.wait)
    starts = [forked(words, output, [together]) for output in outputs]
    codes = [end_of(process) for process in starts]
    assert sorted(codes) == [0, 2]
    *_, ending = outputs[codes.index(2)].read_text().splitlines()
    assert re.search("another run, .* is writing to", ending)
    assert_same_end(tmp_path / "run", undisturbed)


def test_a_start_during_which_another_run_saved_and_ended_finds_its_checkpoint(
    tmp_path, argv, undisturbed, capsys, monkeypatch, nano
):
    argv = [*argv, "--output_dir", tmp_path]
    lock_folder = resume.lock_folder

    def run_and_lock(folder):
        monkeypatch.setattr(resume, "lock_folder", lock_folder)
        run(*argv)  # the other
        return lock_folder(folder)

    monkeypatch.setattr(resume, "lock_folder", run_and_lock)
    run(*argv)
    assert "nothing is left to train" in capsys.readouterr().out
    assert_same_end(tmp_path, undisturbed)


# Loader processes


def is_alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    "moment",
    [
        partial(before_event, r"open .*\.pth\.tmp x", 2, kill_loader),
        partial(before_event, r"rename .*\.pth\.tmp", 8, kill_loader),
        partial(before_event, r"remove .*\d\.pth ", 10, kill_loader),
        partial(before_event, r"open .*\.jsonl a", 2, kill_loader),
    ],
    ids=["first epoch", "save", "delete", "log"],
)
def test_a_killed_loader_process_ends_the_run_in_one_sentence(
    tmp_path, argv, undisturbed, forked, moment
):
    words = [*argv, "--output_dir", tmp_path / "run"]
    output = tmp_path / "out.txt"
    code = end_of(forked([*words, "--num_workers", 2], output, [moment]))
    text = output.read_text()
    pids = re.search(r"^loaders (\d+) (\d+)$", text, re.MULTILINE).groups()
    assert code == 1, text
    # Another loader may complain that its data was not read.
    assert 'main_pretrain.py", line' not in text
    (ending,) = re.findall(r"^main_pretrain.py: error: (.*)", text, re.MULTILINE)
    assert ending.startswith(f"loader process {pids[0]} was killed or crashed, usually because")
    assert "start the command again with a lower --num_workers" in ending
    assert not any(map(is_alive, pids))
    output = tmp_path / "again.txt"
    assert end_of(forked(words, output)) == 0, output.read_text()
    assert "continuing" in output.read_text()
    assert_same_end(tmp_path / "run", undisturbed)


def fail_at_log_point(number):
    """Raise an unexpected error at the n-th log point."""
    log_step = RunLog.log_step

    def fail_or_log(log, step, **values):
        if step == number:
            raise RuntimeError("a fault of the program")
        log_step(log, step, **values)

    RunLog.log_step = fail_or_log


def test_another_error_ends_a_run_and_is_not_mistaken_for_the_death_of_a_loader(
    tmp_path, argv, forked
):
    words = [*argv, "--num_workers", 2, "--output_dir", tmp_path / "run"]
    output = tmp_path / "out.txt"
    assert end_of(forked(words, output, [partial(fail_at_log_point, 3)])) == 1
    text = output.read_text()
    assert "RuntimeError: a fault of the program" in text
    assert "loader process" not in text
