"""The ways in which a run ends early, and the exit codes they stand for."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

# How libraries below PyTorch say that memory ran out, in errors that are not OutOfMemoryError.
OUT_OF_MEMORY = (
    "out of memory",  # CUDA itself, NCCL, MPS
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # no room for its workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # cuDNN 9
    "DefaultCPUAllocator",  # a CPU
)


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU, in one of its libraries, or on a CPU.

    Not in a loader process, whose memory is another matter than the batch's.
    """
    if "DataLoader worker" in str(error):
        return False
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)
    )


def out_of_memory_message(error: BaseException, advice: str) -> str:
    """A sentence for the user, with the size that was asked for where the error names one.

    Args:
        error: see `is_out_of_memory`.
        advice: what to change.
    """
    size = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    asked_for = f" ({size[0][0].lower() + size[0][1:]})" if size else ""
    return f"the device ran out of memory{asked_for}: {advice}"


def one_line(message: str) -> str:
    """A message without the line breaks and broken characters that a name in it may hold."""
    return " ".join(message.splitlines()).encode(errors="backslashreplace").decode()


@contextmanager
def as_input_error(
    message: str | Callable[[Exception], str], *kinds: type[Exception]
) -> Iterator[None]:
    """Turn errors of pure functions into wrong input.

    Args:
        message: what did not work, before the error's own text; or the whole sentence, made of the
            error.
        kinds: which errors; none given stands for ValueError.
    """
    expected = kinds or (ValueError,)
    try:
        yield
    except expected as error:
        text = message(error) if callable(message) else f"{message}: {error}"
        raise InputError(text) from error
