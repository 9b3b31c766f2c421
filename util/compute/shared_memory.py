"""Shared memory, through which loader processes pass batches; containers often have little."""

import os
import re
from pathlib import Path

from util.errors import InputError
from util.machine import size_text, whole_number

FOLDER = Path("/dev/shm")
PREFETCHED = 2  # batches of each loader process, PyTorch's default
FULL = re.compile(r"unable to (allocate shared memory\(shm\) for|write to|resize) file </torch_")


def check_shared_memory(
    batch_bytes: int, *, num_workers: int, num_batches: int, folder: Path = FOLDER
) -> None:
    """Check that /dev/shm has room for the batches that loader processes prepare.

    Args:
        batch_bytes: of one batch.
        num_batches: how many there are in an epoch.

    Raises:
        InputError: it has not; the message has the number of processes that would fit.
    """
    if num_workers == 0 or not folder.is_dir():
        return
    place = os.statvfs(folder)
    free = place.f_frsize * place.f_bavail
    processes = whole_number("LOCAL_WORLD_SIZE") or 1
    needed = processes * batch_bytes * min(PREFETCHED * num_workers, num_batches)
    if needed > free:
        enough = needed // 2**20 + 64
        fitting = free // (processes * batch_bytes * PREFETCHED)
        raise InputError(
            f"the batches that --num_workers {num_workers} prepare need {size_text(needed)} of "
            f"{folder}, which has {size_text(free)} left: use --num_workers {fitting}, a lower "
            f"--batch_size, or a container with more (docker run --shm-size {enough}m)"
        )


def shared_memory_is_full(error: Exception) -> bool:
    """Whether a loader process found no room for a batch; some are killed by SIGBUS instead."""
    return isinstance(error, RuntimeError) and FULL.search(str(error)) is not None


def shared_memory_message() -> str:
    """Message for the user if /dev/shm is full."""
    return (
        f"{FOLDER}, through which loader processes pass batches, is full: start the command again "
        "with --num_workers 0, or in a container with more of it (docker run --shm-size 8g)"
    )
