"""A /dev/shm that is too small for the batches of loader processes."""

import os
from types import SimpleNamespace

import pytest

from tests.helpers.runs import refusal
from util.compute import worker_deaths
from util.compute.shared_memory import check_shared_memory
from util.errors import InputError

MB = 10**6
MESSAGES = [
    "unable to allocate shared memory(shm) for file </torch_12935_2344970309_0>: Success (0)",
    "unable to write to file </torch_12935_2344970309_0>: No space left on device (28)",
]


@pytest.fixture
def container(monkeypatch, tmp_path):
    """A folder in place of /dev/shm, with 64 MB left."""
    place = SimpleNamespace(f_frsize=MB, f_bavail=64)
    monkeypatch.setattr(os, "statvfs", lambda _: place)
    return tmp_path


def check(folder, batch=20 * MB, num_workers=2, num_batches=100):
    check_shared_memory(batch, num_workers=num_workers, num_batches=num_batches, folder=folder)


def test_batches_that_do_not_fit_are_refused_with_what_would_fit(container):
    with pytest.raises(InputError, match=r"need 76 MiB .* has 61 MiB left: use --num_workers 1, "):
        check(container)
    with pytest.raises(InputError, match=r"use --num_workers 0, .*--shm-size 369m"):
        check(container, batch=160 * MB, num_workers=1)


def test_processes_of_a_machine_share_it(container, monkeypatch):
    check(container, batch=10 * MB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="need 76 MiB"):
        check(container, batch=10 * MB)


def test_what_fits_is_not_refused(container, tmp_path):
    check(container, batch=16 * MB)
    check(container, batch=60 * MB, num_batches=1)
    check(container, batch=999 * MB, num_workers=0)
    check(tmp_path / "missing", batch=999 * MB)  # macOS


@pytest.mark.parametrize("message", MESSAGES)
def test_a_batch_without_room_is_one_sentence(capsys, message):
    def main(_):
        raise RuntimeError(f"Caught RuntimeError in DataLoader worker process 0.\n{message}")

    sentence = refusal(capsys, main=main, code=1)
    assert sentence.startswith("/dev/shm, through which loader processes pass batches, is full")
    assert "--num_workers 0" in sentence


def test_a_loader_process_killed_by_a_bus_error_names_shared_memory():
    death = "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that ..."
    assert "/dev/shm" in worker_deaths.dead_loader(RuntimeError(death))
    death = "DataLoader worker (pid 5) is killed by signal: Killed."
    assert "ran out of memory" in worker_deaths.dead_loader(RuntimeError(death))
