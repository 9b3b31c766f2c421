"""The programs that start a run's processes: a process's place in its run, and its launcher's end.

A process that outlives its launcher would train on while nobody knows of it, and nobody could stop
or restart all processes together. So the death of torchrun, or of a script that sets LAUNCHER_PID,
stops a run.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from util.compute.signals import stop_itself
from util.errors import InputError
from util.machine import whole_number

LAUNCHER_PID = "CROSSMAE_LAUNCHER_PID"  # set by scripts that wait for the end of mains
OF_TORCHRUN = "TORCHELASTIC_RUN_ID"
PERIOD = 1.0  # seconds between two looks at the launcher


class Place(NamedTuple):
    """A process's place among those of its run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    """Number among the processes on this machine; None without LOCAL_RANK."""
    launched_rank: int | None = None
    """The same, as a launcher of LAUNCHERS says it."""


def is_first() -> bool:
    """Whether this is process 0 by the variables of a launcher, or alone."""
    return os.environ.get("RANK", "").strip() in ("", "0")


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


def listed(names: Sequence[str]) -> str:
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
            f"WORLD_SIZE requests several processes, which also need {listed(missing)}: "
            "start the run with torchrun, or unset WORLD_SIZE"
        )
    port = whole_number("MASTER_PORT")
    if not 1 <= port < 2**16:
        raise InputError(f"MASTER_PORT must be between 1 and {2**16 - 1}, not {port}: correct it")
    knows = launched is not None and launched.world_size == world_size
    return Place(rank, world_size, local_rank, launched.local_rank if knows else None)


@dataclass
class Starter:
    """The program that started this process and waits for its end.

    A shell is none: a run that it starts in the background is meant to outlive it.
    """

    name: str
    pid: int | None
    """None: it had died before this process looked for it."""

    def __str__(self) -> str:
        return self.name if self.pid is None else f"{self.name} (process {self.pid})"

    def has_died(self) -> bool:
        """Whether it has; the system then gives its processes another parent."""
        return os.getppid() != self.pid


_starter: Starter | None = None  # one is enough: a process has one parent


def find_starter() -> Starter | None:
    """The launcher that started this process; None for a shell, or a script of the launcher.

    Raises:
        InputError: a variable that launchers set is wrong.
    """
    parent = os.getppid()
    of_job = whole_number(LAUNCHER_PID)
    if of_job is not None and not _sets(parent, LAUNCHER_PID):
        return Starter("the launcher", of_job)
    if OF_TORCHRUN not in os.environ or _sets(parent, OF_TORCHRUN):
        return None
    return Starter("torchrun", None if _store_is_closed() else parent)


def _sets(pid: int, name: str) -> bool:
    """Whether a process was itself started with this environment variable; False if unknown."""
    with suppress(OSError):  # another user's, or a system without /proc
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return any(variable.startswith(f"{name}=".encode()) for variable in variables)
    return False


def _store_is_closed() -> bool:
    """Whether the store of torchrun, which is open as long as it lives, refuses a connection."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    address = os.environ.get("MASTER_ADDR", ""), whole_number("MASTER_PORT") or 0
    try:
        socket.create_connection(address, timeout=5).close()
    except ConnectionRefusedError:
        return True
    except (OSError, OverflowError, UnicodeError):  # says nothing about torchrun
        pass
    return False


def dead_launcher() -> str | None:
    """The launcher that started this process, such as "torchrun (process 123)", if it has died."""
    return str(_starter) if _starter is not None and _starter.has_died() else None


@contextmanager
def stopped_with_launcher(clean_up: Callable[[], None]) -> Iterator[None]:
    """Context in which the death of the launcher acts like a SIGTERM; within `handled_signals`.

    Args:
        clean_up: see `stop_itself`.
    """
    global _starter
    _starter = find_starter()
    if _starter is None:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(ended, clean_up), name="launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _watch(ended: threading.Event, clean_up: Callable[[], None]) -> None:
    while (launcher := dead_launcher()) is None:
        if ended.wait(PERIOD):
            return
    stop_itself(f"by the death of {launcher}", ended, clean_up)
