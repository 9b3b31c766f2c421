import fcntl
import json
import os
import signal

import pytest

from tests.helpers.files import write_images
from tests.helpers.processes import command, finish, start
from tests.helpers.runs import TINY, run
from util.errors import InputError
from util.runs.lock import LOCK_NAME, FolderLock

HOLD = """
import sys, time
from pathlib import Path
from util.runs.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder's lock."""
    process = start([*command()[:1], "-c", HOLD, str(tmp_path / "run")], PYTHONPATH=".")
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_owner_is_refused_with_the_name_of_the_first(other, tmp_path):
    with pytest.raises(InputError, match=rf"another run, process {other.pid} on \S+ since .*"):
        FolderLock(tmp_path / "run")


def test_the_lock_of_a_killed_process_is_free(other, tmp_path):
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    lock = FolderLock(tmp_path / "run")
    owner = json.loads((tmp_path / "run" / LOCK_NAME).read_bytes())
    assert owner["process"] == os.getpid()
    lock.release()
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    FolderLock(tmp_path / "a" / "run").release()
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    FolderLock(tmp_path / "b").release()
    assert (tmp_path / "b").exists()
    lock = FolderLock(tmp_path / "c")
    (tmp_path / "c" / "args.json").touch()
    lock.release()
    assert (tmp_path / "c" / "args.json").exists()


def test_a_lock_that_its_owner_removes_in_the_meantime_is_taken_again(tmp_path, monkeypatch):
    first, lockf = FolderLock(tmp_path), fcntl.lockf

    def release_then_lock(*args):
        monkeypatch.setattr(fcntl, "lockf", lockf)
        first.release()
        lockf(*args)

    monkeypatch.setattr(fcntl, "lockf", release_then_lock)
    second = FolderLock(tmp_path)
    assert second.path.samefile(f"/proc/self/fd/{second.file.fileno()}")


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(tmp_path):
    images = write_images(tmp_path / "images", 200)
    words = command("main_pretrain.py", "--data_path", images, *TINY, "--log_every", 1)
    words += ["--output_dir", str(tmp_path / "run"), "--epochs", "50"]
    first = start(words)
    for line in first.stdout:
        if "epoch  1/50" in line:
            break
    args = (tmp_path / "run" / "args.json").read_bytes()
    code, _, err = finish(start(words))
    assert code == 2
    assert err.startswith(f"main_pretrain.py: error: another run, process {first.pid} on ")
    assert len(err.splitlines()) == 1
    assert (tmp_path / "run" / "args.json").read_bytes() == args
    first.send_signal(signal.SIGTERM)
    assert finish(first)[0] == 128 + signal.SIGTERM


def test_a_finished_run_leaves_no_lock(tmp_path):
    images = write_images(tmp_path / "images", 16)
    run("--data_path", images, *TINY, "--output_dir", tmp_path / "run", "--epochs", 1)
    assert not (tmp_path / "run" / LOCK_NAME).exists()
