"""Finds loader processes that died by themselves, and ends those that are left."""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from weakref import WeakSet

_processes: WeakSet[BaseProcess] = WeakSet()  # of all loaders


def note_workers() -> None:
    """Add the loader processes that there are now to those that are watched."""
    _processes.update(child for child in active_children() if child.daemon)


@contextmanager
def _deaths_unnoticed() -> Iterator[None]:
    """Keep torch's signal handler, which raises an error when a loader process ends, from it."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


@_deaths_unnoticed()
def dead_loader(error: Exception, seconds: float = 0.0) -> str | None:
    """Tell of a loader process that died by itself, and what to do; None if there is none.

    Its death can show as nearly any error at any place: torch raises one from a signal handler, and
    reading what the process was sending fails.

    Args:
        error: that came up.
        seconds: to wait for a death, which may show before it is complete.
    """
    told = re.match(r"DataLoader worker \(pid\D+(\d+)", str(error))  # by torch's handler
    pid, end = told and int(told[1]), time.monotonic() + seconds
    while pid is None:
        pid = next((process.pid for process in _processes if process.exitcode), None)
        if pid is None and (not _processes or time.monotonic() >= end):
            return None
        time.sleep(0.02)
    return (
        f"loader process {pid} was killed or crashed, often for lack of memory: lower "
        "--num_workers and start the same command again"
    )


@_deaths_unnoticed()
def end_loaders() -> None:
    """End what loader processes are left: Python would wait for them, and they ignore SIGTERM."""
    for process in _processes:
        process.kill()
        process.join()
