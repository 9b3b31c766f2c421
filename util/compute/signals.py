"""Handling of the signals that stop a run cleanly: SIGTERM, and SIGUSR1 before a time limit."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: list[int] = []  # one list is enough: a process has only one handler per signal


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Context in which stop signals are recorded instead of ending the process."""
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
    """First stop signal that this process received, or None."""
    return _received[0] if _received else None


def ignore_stop_signals(*_: object) -> None:
    """Ignore stop signals in a loader process: clusters signal all, and the run ends its own."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
