"""Sets up a run's processes and their communication; all of it also works with a single one."""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from util.compute.launchers import Place, find_place, listed
from util.compute.signals import SignalExit
from util.errors import InputError, RunError
from util.settings.run import TIMEOUT_MINUTES

POLL = 0.1  # seconds between two looks for other processes
OVERTIME = 5.0  # seconds after which a call that lasts longer than the deadline is ended
MAX_NAMED = 8

T = TypeVar("T")


def init_distributed(device: str, *, timeout_minutes: float | None = None) -> torch.device:
    """Join the other processes of the run, if there are any; return this process's device.

    Args:
        device: "cuda", "cuda:1", "cpu", "mps", ...; with several processes on GPUs, each uses the
            GPU of its local rank.
        timeout_minutes: maximum wait until all processes have joined, and later for another
            process; None: TIMEOUT_MINUTES.

    Raises:
        InputError: the device is not available, or the environment is wrong (see `find_place`).
        RunError: some processes did not join.
    """
    place = find_place()
    chosen = _choose_device(device, place)
    try:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise InputError(
            f"--device {device} is not available on this machine: use cuda, cuda:N or cpu"
        ) from error
    if place.world_size > 1 and not dist.is_initialized():
        _join_processes(place, chosen, timeout_minutes or TIMEOUT_MINUTES)
    return chosen


def _choose_device(name: str, place: Place) -> torch.device:
    """Return the device of a name, and of several processes on GPUs, this one's.

    Raises:
        InputError: the name is unknown, or this machine lacks the GPU, or several could be meant.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown --device {name}: use cuda, cuda:N or cpu") from error
    if device.type != "cuda":
        return device
    num_gpus = torch.cuda.device_count()
    index = _gpu_index(device.index, place, num_gpus)
    if index >= num_gpus:
        advice = "use a lower N in cuda:N" if index == device.index else "start fewer processes"
        raise InputError(
            f"cuda:{index} not found (GPUs on this machine: {num_gpus}): "
            + (f"{advice}, or --device cpu" if num_gpus else "use --device cpu")
        )
    return torch.device("cuda", index)


def _gpu_index(chosen: int | None, place: Place, num_gpus: int) -> int:
    """Return the number of this process's GPU, which may not exist.

    Args:
        chosen: the user's choice, for processes whose local rank nothing says.
        num_gpus: that this process sees; a launcher may show each process only its own.
    """
    if place.local_rank is not None:
        return place.local_rank
    if place.world_size > 1 and num_gpus > 1:
        if place.launched_rank is not None:
            return place.launched_rank
        if chosen is None:
            raise InputError(
                f"process {place.rank} cannot tell which of the {num_gpus} GPUs is its own: set "
                "LOCAL_RANK to its number among the processes on this machine, as torchrun does"
            )
    return chosen or 0


class Meeting:
    """Meeting of a run's processes in a store, from their start until they form a group.

    One deadline holds for all of it. Until all have come, each only makes short calls, so that
    signals end the program meanwhile.

    Args:
        place: of this process.
        minutes: until the deadline.

    Attributes:
        store: where processes exchange addresses, hosted by process 0; None until that has come.
    """

    def __init__(self, place: Place, minutes: float) -> None:
        self.place, self.minutes = place, minutes
        self.deadline = time.monotonic() + 60 * minutes
        # A minute longer than the watchdog waits (util.compute.watchdog): its message says more.
        self.timeout = timedelta(minutes=minutes + 1)
        self.host, self.port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.torchruns: dist.Store | None = None
        self.store: dist.Store | None = None

    def gather(self) -> dist.Store:
        """Wait until all processes have come; return their store.

        Raises:
            RunError: the deadline has passed.
            DistError, RuntimeError: process 0 has left, or cannot listen.
        """
        self.store = self._wait_for(self._open_store)
        self.store.set(self._key(self.place.rank), "")
        if self.place.rank == 0:
            keys = [self._key(number) for number in range(self.place.world_size)]
            self._wait_for(lambda: self.store.check(keys))
            self.store.set("complete", "")
        else:  # asking for every key would be much for the store of many processes
            self._wait_for(lambda: self.store.check(["complete"]))
        return self.store

    def missing(self) -> list[int]:
        """Ranks of the processes that have not come; [0] if process 0 has not."""
        if self.store is None:
            return [0]
        numbers = range(self.place.world_size)
        return [number for number in numbers if not self.store.check([self._key(number)])]

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Context that ends the process if a call in it lasts beyond the deadline."""
        ended = threading.Event()

        def watch() -> None:
            if not ended.wait(self.deadline + OVERTIME - time.monotonic()):
                sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {self._unconnected()}\n")
                sys.stderr.flush()
                os._exit(1)  # the main thread cannot be reached

        threading.Thread(target=watch, name="meeting", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _key(self, number: int) -> str:
        return f"process {number} has come"

    def _wait_for(self, condition: Callable[[], T]) -> T:
        """Return a condition's first true value."""
        while not (value := condition()):
            gives_up = self.store is not None and self.store.check(["too late"])
            if gives_up or time.monotonic() > self.deadline:
                raise self._too_late()
            time.sleep(POLL)
        return value

    def _too_late(self) -> RunError:
        missing = self.missing()
        limit = f"within {self.minutes:g} minutes (--timeout_minutes)"
        if self.store is not None:
            self.store.set("too late", "")
            if self.place.rank == 0:  # its end is the store's: let the others read that
                time.sleep(10 * POLL)
            advice = "check that all have started"
        else:
            advice = f"check that it has started, and can be reached at {self.host}:{self.port}"
        if not missing:
            return RunError(
                f"process {self.place.rank} came when others had stopped waiting: not all of the "
                f"{self.place.world_size} processes have come {limit}, so start them together"
            )
        names = named_processes(missing)
        return RunError(f"{names} of {self.place.world_size} did not come {limit}: {advice}")

    def _unconnected(self) -> str:
        return (
            f"process {self.place.rank} could not connect to the others within {self.minutes:g} "
            f"minutes (--timeout_minutes): check that all have started and still run, and that "
            f"{self.host}:{self.port} is where process 0 listens"
        )

    def _open_store(self) -> dist.Store | None:
        """Open the store; None if it does not answer yet.

        torchrun's own store survives restarts, with the addresses of dead processes in it (PyTorch
        issue 135712). So process 0 starts a new store and puts only its port into torchrun's.
        """
        is_host = self.place.rank == 0
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return self._host(self.port) if is_host else self._connect(self.port)
        self.torchruns = self.torchruns or self._connect(self.port)
        if self.torchruns is None:
            return None
        if is_host:
            store = self._host(0)
            self.torchruns.set("port", str(store.port))
            return store
        if not self.torchruns.check(["port"]):
            return None
        return self._connect(int(self.torchruns.get("port")))  # may be a dead process's

    def _host(self, port: int) -> dist.Store:
        options = {"is_master": True, "wait_for_workers": False, "timeout": self.timeout}
        return dist.TCPStore(self.host, port, **options)

    def _connect(self, port: int) -> dist.Store | None:
        try:  # because a store would wait for a connection in a call that no signal interrupts
            socket.create_connection((self.host, port), timeout=5).close()
        except (OSError, UnicodeError):  # the second for what cannot be a name
            return None
        try:
            store = dist.TCPStore(self.host, port, is_master=False, timeout=timedelta(seconds=5))
        except dist.DistError as error:
            if "invalid value" in str(error):
                raise RunError(
                    f"another program listens at {self.host}:{port}, where process "
                    f"{self.place.rank} expects process 0: set another MASTER_PORT"
                ) from error
            time.sleep(1)  # such as a proxy's, whose process has not started yet
            return None
        store.set_timeout(self.timeout)
        return store


_meeting: Meeting | None = None  # one is enough: a process joins one run


def named_processes(numbers: Sequence[int]) -> str:
    """Name processes: "process 1", or "processes 1, 2 and 5"; of many only the first."""
    if len(numbers) > MAX_NAMED:
        shown = ", ".join(map(str, numbers[:MAX_NAMED]))
        return f"{len(numbers)} processes ({shown}, ...)"
    return f"process{'es' * (len(numbers) > 1)} {listed([str(number) for number in numbers])}"


def meeting_store() -> dist.Store | None:
    """The store in which processes meet; torchrun's until process 0 has come; None if alone."""
    if _meeting is None:
        return None
    if _meeting.store is None and _meeting.torchruns is not None:
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # it survives restarts
        return dist.PrefixStore(f"start {start}", _meeting.torchruns)
    return _meeting.store


def has_joined() -> bool:
    """Whether this process is one of several that have formed a group."""
    return dist.is_initialized()


def is_joining() -> bool:
    """Whether this process waits for others of its run."""
    return _meeting is not None and not dist.is_initialized()


def _join_processes(place: Place, device: torch.device, timeout_minutes: float) -> None:
    global _meeting
    _meeting = Meeting(place, timeout_minutes)
    # NCCL would otherwise guess which GPU a process uses.
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    try:
        with _meeting.limited():
            group = {"rank": place.rank, "world_size": place.world_size, "device_id": device_id}
            group["store"] = _meeting.gather()
            dist.init_process_group(backend, timeout=_meeting.timeout, **group)
    except SignalExit as end:
        end.cause += f" while waiting for {_awaited(_meeting)}"
        raise
    except RuntimeError as error:
        explained = _explained(error, _meeting)
        if explained is None:
            raise
        raise explained from error


def _awaited(meeting: Meeting) -> str:
    try:
        return named_processes(meeting.missing() or [0])
    except dist.DistError:
        return "process 0"


def _explained(error: RuntimeError, meeting: Meeting) -> RunError | None:
    """Why processes could not join; None for a likely bug."""
    number, host = meeting.place.rank, meeting.host
    if "EADDRINUSE" in str(error):
        return RunError(
            f"port {meeting.port} of {host}, which process {number} needs, is already in use: set "
            "another MASTER_PORT, or start a new job, which gets another port"
        )
    if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
        return None
    if "Duplicate GPU" in str(error):
        return RunError(
            f"process {number} has the same GPU as another: set LOCAL_RANK to its number among "
            "the processes on this machine, or start one process per GPU"
        )
    return RunError(
        f"process {number} could not reach the other processes of the run, "
        f"{meeting.place.world_size} in total, through {host}: check that all have started and "
        "still run"
    )


def stop_processes() -> None:
    """Leave the process group, if there is one."""
    global _meeting
    _meeting = None
    if dist.is_initialized():
        # PyTorch 2.6 waits for gloo's threads while it holds the GIL, which one of them may need to
        # release the tensors of the last operation: without a moment for that, most runs hang here.
        if dist.get_backend() == "gloo":
            time.sleep(0.1)
        dist.destroy_process_group()


def rank() -> int:
    """Rank of this process; rank 0 writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def all_gather(values: Tensor) -> Tensor:
    """Stack the (N,) tensors of all processes to (world size, N), on every process."""
    if not dist.is_initialized():
        return values.unsqueeze(0)
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def all_sum(values: Tensor) -> Tensor:
    """Sum a tensor, of one shape in all processes, over them, on every process."""
    if not dist.is_initialized():
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def all_gather_objects(values: list) -> list:
    """Concatenate the processes' lists of picklable objects, on every process."""
    if not dist.is_initialized():
        return values
    lists = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, values)
    return [value for part in lists for value in part]


def broadcast_object(value: object) -> object:
    """Give every process the main process's value, any picklable object."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap the model in DistributedDataParallel.

    A single process or a sharded model, which averages gradients itself, needs no wrapper.
    """
    if not dist.is_initialized() or isinstance(model, FSDPModule):
        return model
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def gradient_sync(model: nn.Module, *, enabled: bool) -> AbstractContextManager:
    """Context that enables or postpones the reduction of gradients over processes.

    With the reduction postponed, a sharded model keeps whole gradients between micro-steps, four
    bytes per parameter, for one reduction per step instead of one per micro-step.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    elif isinstance(model, DistributedDataParallel) and not enabled:
        return model.no_sync()
    return nullcontext()


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the main process's buffers, such as running statistics."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
