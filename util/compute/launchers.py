"""What the programs that start processes say in the environment: a process's place in its run."""

import os
from collections.abc import Sequence
from typing import NamedTuple

from util.errors import InputError
from util.machine import whole_number


class Place(NamedTuple):
    """A process's place among those of its run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    """Number among the processes on this machine; None without LOCAL_RANK."""
    launched_rank: int | None = None
    """The same, as a launcher of LAUNCHERS says it."""


class Launcher(NamedTuple):
    """A program that starts processes, but sets variables of its own instead of torchrun's."""

    name: str
    world_size: str
    """Variable with the number of processes."""
    local_rank: str


LAUNCHERS = (
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    Launcher("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    Launcher("mpirun", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
)
# `srun --pty` starts several tasks, too, but only the first gets a terminal; the others end.
TERMINAL = "SLURM_PTY_PORT"


class Launched(NamedTuple):
    """A process that a launcher has started with others."""

    launcher: str
    world_size: int
    local_rank: int


def find_launched() -> Launched | None:
    """What a launcher of LAUNCHERS says; None if it has started a single process."""
    if os.environ.get(TERMINAL):
        return None
    for launcher in LAUNCHERS:
        size, local_rank = whole_number(launcher.world_size), whole_number(launcher.local_rank)
        if size is not None and size > 1 and local_rank is not None:
            return Launched(launcher.name, size, local_rank)
    return None


def _listed(names: Sequence[str]) -> str:
    """Join names as in a sentence: A, B and C."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def find_place() -> Place:
    """Find the place of this process, by the variables that torchrun sets.

    Kubernetes' PyTorchJob and Volcano set them without LOCAL_RANK.

    Raises:
        InputError: the variables are incomplete or wrong, or a launcher that does not set them has
            started several processes, each of which would run as if it were alone.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    rank, world_size, local_rank = map(whole_number, names)
    launched = find_launched()
    if world_size is None and launched:
        raise InputError(
            f"{launched.launcher} has started {launched.world_size} processes that do not know "
            "each other: start them with torchrun or scripts/launch.py, or set WORLD_SIZE "
            "to 1 if each is a run of its own"
        )
    is_alone = world_size is None and rank is not None and "MASTER_ADDR" in os.environ
    if is_alone or (rank or 0) >= (1 if world_size is None else world_size):
        size = "not set" if world_size is None else world_size
        raise InputError(
            f"RANK is {rank or 0}, but WORLD_SIZE is {size}: correct or unset both of them"
        )
    if world_size in (None, 1):
        return Place()
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name, "").strip()]
    if missing:
        raise InputError(
            f"WORLD_SIZE requests several processes, which also need {_listed(missing)}: "
            "start the run with torchrun, or unset WORLD_SIZE"
        )
    port = whole_number("MASTER_PORT")
    if not 1 <= port < 2**16:
        raise InputError(f"MASTER_PORT must be between 1 and {2**16 - 1}, not {port}: correct it")
    knows = launched is not None and launched.world_size == world_size
    return Place(rank, world_size, local_rank, launched.local_rank if knows else None)
