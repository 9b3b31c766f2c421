"""Progress of whatever may take longer than a few seconds: a bar on a terminal, else lines."""

import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

PERIOD = 10.0  # seconds between two lines
QUIET = 2.0  # seconds before anything appears

T = TypeVar("T")

_logger = logging.getLogger(__name__)


def clock(seconds: float) -> str:
    """Return a duration as m:ss, or as h:mm:ss from an hour on."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def on_terminal() -> bool:
    """Whether bars can be drawn on stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """Shows how far a task is: a bar on a terminal, else a line every PERIOD seconds.

    Nothing is shown of a task that is done sooner.

    Args:
        what: names the task, such as "k-NN, features".
        total: amount of work.
        unit: of work, in the plural.
        shown: whether this process shows anything.
    """

    def __init__(self, what: str, total: int, *, unit: str = "images", shown: bool = True) -> None:
        self.what, self.total, self.unit, self.shown = what, total, unit, shown
        self.done = 0
        self.start = self.last_line = time.monotonic()
        self.bar = None
        if shown and on_terminal():
            self.bar = tqdm(
                desc=what,
                total=total,
                unit=f" {unit}",
                dynamic_ncols=True,
                leave=False,
                delay=QUIET,
            )

    def add(self, amount: int = 1) -> None:
        """Count work that is done."""
        self.done = min(self.total, self.done + amount)
        if self.bar is not None:
            self.bar.update(self.done - self.bar.n)
            return
        now = time.monotonic()
        if self.shown and self.done < self.total and now - self.last_line >= PERIOD:
            self.last_line = now
            left = (now - self.start) * (self.total / self.done - 1)
            _logger.info(
                "%s: %s of %s %s, %s left",
                *(self.what, f"{self.done:,}", f"{self.total:,}", self.unit, clock(left)),
            )

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


def with_progress(items: Iterable[T], what: str, total: int, **options: object) -> Iterator[T]:
    """Yield items, each of which counts as one in a Progress.

    Args:
        what, total, options: see `Progress`.
    """
    progress = Progress(what, total, **options)
    try:
        for item in items:
            yield item
            progress.add()
    finally:
        progress.close()


@contextmanager
def waiting(what: str, after: float = QUIET) -> Iterator[None]:
    """Context, or decorator, of a call whose progress is unknown: lines show that it is running.

    Args:
        what: names the call, such as "listing images".
        after: seconds until the first line; others follow every PERIOD seconds.
    """
    done, start = threading.Event(), time.monotonic()

    def tell() -> None:
        if not done.wait(after):
            _logger.info("%s", what)
        while not done.wait(PERIOD):
            _logger.info("%s: %s so far", what, clock(time.monotonic() - start))

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
