"""Handling of the signals that end a program: Ctrl-C, SIGTERM, and SIGUSR1 before a time limit.

A signal ends a program in order and at once, except while it trains: then it is only recorded, and
the run saves and ends where a step has ended. A second Ctrl-C never waits for that. The death of
the program that started a run acts like a SIGTERM (`util.compute.launchers`).
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from util.terminal import say_at_once

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
END = b"\0"  # instead of a signal's number
AGAIN = 0.3  # seconds before which a Ctrl-C is the same one: a launcher may pass it on
PATIENCE = 10.0  # seconds for a program that is to end at once, but is inside a long call

_logger = logging.getLogger(__name__)
_received: list[int] = []  # one list is enough: a process has only one handler per signal
_deferred = False
_saves = ""  # when, for the user
_cause: str | None = None  # of a signal that the program sent to itself


class SignalExit(SystemExit):
    """A signal ends the program; no `except Exception` on the way catches it.

    Attributes:
        cause: what follows the word "stopped": "by SIGTERM" and the like.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.cause = _cause or f"by {signal_name(number)}"


class StopRequest(NamedTuple):
    """What asked a run to save and end."""

    signal: int
    cause: str
    """See `SignalExit`."""


def signal_name(number: int) -> str:
    """Name of a signal for the user: "Ctrl-C", "SIGTERM" and so on."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextmanager
def handled_signals(clean_up: Callable[[], None]) -> Iterator[None]:
    """Context in which signals raise SignalExit, or are recorded after `defer_signals`.

    Args:
        clean_up: called from a thread before a second Ctrl-C ends the process.
    """
    global _deferred, _saves, _cause
    # A program in the background of a script ignores Ctrl-C, which is meant for the foreground.
    ignores = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    numbers = SIGNALS[:-1] if ignores else SIGNALS
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    # Python runs handlers only between two operations, but writes to this descriptor at once.
    descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(reading, clean_up), name="signals", daemon=True)
    thread.start()
    before = {number: signal.signal(number, _handle) for number in numbers}
    try:
        yield
    finally:
        _deferred, _saves, _cause = False, "", None
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(descriptor)
        os.write(writing, END)  # closing it would not end the thread: loader processes have it, too
        thread.join()
        os.close(writing)
        os.close(reading)


def _handle(number: int, _: object) -> None:
    _received.append(number)
    if not _deferred:
        raise SignalExit(number)


def _watch(pipe: int, clean_up: Callable[[], None]) -> None:
    """Answer every Ctrl-C as it comes, whatever the main thread is doing."""
    first = None
    while (number := os.read(pipe, 1)) != END:
        if number[0] != signal.SIGINT:
            continue
        if first is None:
            first = time.monotonic()
            if _saves:
                _logger.info(
                    "Ctrl-C: the run saves and ends %s; a second Ctrl-C ends it at once, without "
                    "saving",
                    _saves,
                )
        elif time.monotonic() - first > AGAIN:
            end_at_once(clean_up)


def end_at_once(clean_up: Callable[[], None]) -> NoReturn:
    """End the process as a second Ctrl-C does, without waiting for anything."""
    clean_up()
    say_at_once("ended by a second Ctrl-C, without saving")
    os._exit(128 + signal.SIGINT)


def defer_signals(*, saves: str = "") -> None:
    """From now on, record signals instead of ending the program.

    Args:
        saves: when the run saves and ends after a signal, for the user; "" if it is ending already.
    """
    global _deferred, _saves
    _deferred, _saves = True, saves


def stop_signal() -> int | None:
    """First signal that this process received, or None."""
    return _received[0] if _received else None


def stop_request() -> StopRequest | None:
    """What asked this process to stop, or None."""
    number = stop_signal()
    return None if number is None else StopRequest(number, _cause or f"by {signal_name(number)}")


def stop_itself(cause: str, ended: threading.Event, clean_up: Callable[[], None]) -> None:
    """Act on a reason to stop like on a SIGTERM; called from a thread.

    Args:
        cause: see `SignalExit`.
        ended: set once the program is ending.
        clean_up: called before the process is ended inside a call that lasts, which only happens
            while there is nothing to save.
    """
    global _cause
    if not _received:
        _cause = cause
    # To the main thread, whose call it interrupts if that is possible.
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    if not ended.wait(PATIENCE) and not _received and not _deferred:
        clean_up()
        say_at_once(f"stopped {cause}")
        os._exit(128 + signal.SIGTERM)


@contextmanager
def blocked_signals() -> Iterator[None]:
    """Context whose forked processes never receive the signals, not even as they start."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(*_: object) -> None:
    """Ignore signals in a loader process: terminals and clusters signal all, the run ends its own.

    Python starts processes that are not forked without the mask of `blocked_signals`.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
