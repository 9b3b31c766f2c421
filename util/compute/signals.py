"""Signals that end a run where it can be continued: SIGTERM, and SIGUSR1 before a time limit."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: list[int] = []  # a process has only one handler for a signal, so one list will do


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Note signals inside instead of ending at once."""
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, _: object) -> None:
    _received.append(number)


def stop_signal() -> int | None:
    """The first signal that this process was sent, if there was one."""
    return _received[0] if _received else None


def ignore_stop_signals(*_: object) -> None:
    """Ignore the signals in a loader process: clusters send them to all, and its run ends it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
