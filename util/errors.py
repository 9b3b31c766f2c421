"""The ways in which a run ends early, and the exit codes they stand for."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """What the user gave cannot work: the message is a sentence that says what to change.

    A main prints it without a traceback and exits with code 2.
    """


class RunError(Exception):
    """The run itself went wrong: the message says what happened, when, and what is safe.

    A main prints it without a traceback and exits with code 1.
    """


class NonFiniteLossError(RunError):
    """The loss became NaN or infinite; the message names the step."""


class StoppedError(Exception):
    """A signal ended the run after its state was saved; the same command continues it.

    A main prints the message and exits with the code by which shells know the signal.

    Args:
        message: where it stopped.
        signal: number of the signal.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def one_line(message: str) -> str:
    """A message without the line breaks and broken characters that a name in it may hold."""
    return " ".join(message.splitlines()).encode(errors="backslashreplace").decode()


@contextmanager
def value_errors_are_input_errors(what: str) -> Iterator[None]:
    """Turn a ValueError of a model or another pure function into wrong input.

    Args:
        what: did not work, for the message: "vit_tiny_patch16 cannot be built".
    """
    try:
        yield
    except ValueError as error:
        raise InputError(f"{what}: {error}") from error
