"""Detection of loader processes that died unexpectedly, and cleanup of the remaining ones."""

import re
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from weakref import WeakSet

from util.compute.shared_memory import shared_memory_message

LEAVING = 2.0  # seconds for loader processes to end on their own

_processes: WeakSet[BaseProcess] = WeakSet()  # of all loaders


def note_workers() -> None:
    """Watch the loader processes that exist now."""
    _processes.update(child for child in active_children() if child.daemon)


@contextmanager
def _sigchld_handler_disabled() -> Iterator[None]:
    """Disable torch's signal handler, which raises an error when a loader process dies."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


@_sigchld_handler_disabled()
def dead_loader(error: Exception, seconds: float = 0.0) -> str | None:
    """Message about a loader process that died unexpectedly; None if all are alive.

    A death can surface as nearly any error anywhere: torch raises one in a signal handler, and
    reading the process's data fails.

    Args:
        seconds: maximum wait, because the error may come before the process has ended.
    """
    named = re.match(r"DataLoader worker \(pid\D+(\d+)", str(error))  # by torch's handler
    pid, end = named and int(named[1]), time.monotonic() + seconds
    while pid is None:
        pid = next((process.pid for process in _processes if process.exitcode), None)
        if pid is None and (not _processes or time.monotonic() >= end):
            return None
        time.sleep(0.02)
    if "Bus error" in str(error) or any(p.exitcode == -signal.SIGBUS for p in _processes):
        return shared_memory_message()
    return (
        f"loader process {pid} was killed or crashed, usually because the machine ran out of "
        "memory: start the command again with a lower --num_workers"
    )


def kill_loaders() -> None:
    """Kill the remaining loader processes without waiting; may be called from any thread."""
    for process in list(_processes):
        process.kill()


@_sigchld_handler_disabled()
def release_loaders(error: BaseException) -> None:
    """End the loaders in the frames that an error has left, and forget the frames' variables.

    A loader that is no longer used waits until each of its processes has loaded its batch, for up
    to five seconds each. By the time they are killed here it waits for nothing else of theirs.
    """
    timer = threading.Timer(LEAVING, kill_loaders)
    timer.daemon = True
    timer.start()
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        timer.cancel()


@_sigchld_handler_disabled()
def end_loaders() -> None:
    """Kill the remaining loader processes: Python would wait for them, and they ignore SIGTERM."""
    kill_loaders()
    for process in _processes:  # each may take a while to release its memory
        process.join()
