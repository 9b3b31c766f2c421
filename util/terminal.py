"""Standard output and error whose end does not end the program."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A pipe without a reader, such as one to `head`, and a terminal that was closed.
GONE = (errno.EPIPE, errno.EIO)


class LastingStream(io.TextIOWrapper):
    """Text stream that never raises an OSError, and discards what nobody can read any more."""

    def write(self, text: str) -> int:
        """Write a text; a full disk takes as much of it as fits."""
        with self._lasting():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with self._lasting():
            super().flush()

    @contextmanager
    def _lasting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in GONE:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.fileno())
                os.close(null)


def say_at_once(what: str) -> None:
    """Write "PROGRAM: what" on standard error after a Ctrl-C, in the first of several processes.

    It goes past Python's stream, which a signal may have interrupted.
    """
    if os.environ.get("RANK", "0") == "0":
        sentence = f"{Path(sys.argv[0]).name}: {what}\n"
        with suppress(OSError):  # a terminal shows ^C in the line that has begun
            os.write(2, (f"\n{sentence}" if os.isatty(2) else sentence).encode())


def keep_streams() -> None:
    """Make standard output and error survive a reader that goes away, and a full disk.

    Descriptors that the shell closed (`>&-`) are opened: the next file would get their number, and
    with it whatever a library prints.
    """
    null = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    while null <= 2:
        null = os.dup(null)
    os.close(null)
    sys.stdout, sys.stderr = _lasting(sys.stdout, 1), _lasting(sys.stderr, 2)


def _lasting(stream: io.TextIOBase | None, number: int) -> io.TextIOBase:
    """Return a stream that lasts in place of a standard one; a test's capture stays as it is."""
    if stream is not None and stream not in (sys.__stdout__, sys.__stderr__):
        return stream
    settings = {"encoding": "utf-8"}
    if stream is not None:
        stream.flush()
        settings = {"encoding": stream.encoding, "errors": stream.errors}
    raw = open(number, "wb", closefd=False)  # noqa: SIM115 - for as long as the program runs
    return LastingStream(raw, **settings, line_buffering=number == 2 or raw.isatty())
