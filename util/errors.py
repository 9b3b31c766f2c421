"""Exceptions that end a run early, with the exit codes the mains give them."""

import itertools
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

# Control characters, line separators, marks of the direction of text, and surrogates, which stand
# for bytes of a file name that are not UTF-8.
UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class InputError(Exception):
    """The user's input is wrong; the message says what to change.

    A main prints it without a traceback and exits with code 2.
    """


class RunError(Exception):
    """The run failed; the message says what happened, when, and what is saved.

    A main prints it without a traceback and exits with code 1.
    """


class NonFiniteLossError(RunError):
    """The loss or its gradient became NaN or infinite.

    Args:
        message: what happened; names the step.
        step: number of the step in the run, counted from 0.
        process: where the loss is not finite.
        in_gradient: whether the loss is finite on all processes.
    """

    def __init__(
        self, message: str, *, step: int, process: int = 0, in_gradient: bool = False
    ) -> None:
        super().__init__(message)
        self.step, self.process, self.in_gradient = step, process, in_gradient


class StoppedError(Exception):
    """A signal ended the run after its state was saved; the same command continues it.

    A main prints the message and exits with 128 plus the signal's number, the shells' convention.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def escaped(text: str) -> str:
    r"""Write line breaks, control characters and undecodable bytes as escapes, such as \n or \x1b.

    File names may contain them, and could otherwise move the cursor or forge a line of a log.
    """
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return "1 epoch", "2 epochs" and so on; a plural is needed if it is not the noun plus s."""
    return f"{number} {noun}" if number == 1 else f"{number} {plural or noun + 's'}"


def first_few(names: Collection[str], limit: int = 3) -> str:
    """List names, with "..." after the first few."""
    listed = ", ".join(itertools.islice(names, limit))
    return f"{listed}, ..." if len(names) > limit else listed


@contextmanager
def as_input_error(
    message: str | Callable[[Exception], str], *kinds: type[Exception]
) -> Iterator[None]:
    """Re-raise errors as InputError.

    Args:
        message: what failed, put before the error's text; or a function from the error to the
            whole message.
        kinds: exception types to convert; ValueError if none are given.
    """
    expected = kinds or (ValueError,)
    try:
        yield
    except expected as error:
        text = message(error) if callable(message) else f"{message}: {error}"
        raise InputError(text) from error
