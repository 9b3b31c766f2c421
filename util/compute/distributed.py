"""Sets up a run's processes and their communication; all of it also works with a single one."""

import os
import socket
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from util.compute.launchers import Place, find_place
from util.errors import InputError, RunError
from util.settings.run import TIMEOUT_MINUTES


def init_distributed(device: str, *, timeout_minutes: float | None = None) -> torch.device:
    """Join the other processes of the run, if there are any; return this process's device.

    Args:
        device: "cuda", "cuda:1", "cpu", "mps", ...; with several processes on GPUs, each uses the
            GPU of its local rank.
        timeout_minutes: maximum wait for another process; None: TIMEOUT_MINUTES.

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


def _join_processes(place: Place, device: torch.device, timeout_minutes: float) -> None:
    number, count = place.rank, place.world_size
    # NCCL would otherwise guess which GPU a process uses.
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    # A minute longer than the watchdog waits (util.compute.watchdog): its message says more.
    timeout = timedelta(minutes=timeout_minutes + 1)
    try:
        store = _open_store(number, timeout)
        group = {"store": store, "rank": number, "world_size": count, "device_id": device_id}
        dist.init_process_group(backend, timeout=timeout, **group)
    except RuntimeError as error:
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error):
            raise RunError(
                f"port {port} of {host}, which process {number} needs, is already in use: set "
                "another MASTER_PORT, or start a new job, which gets another port"
            ) from error
        if not isinstance(error, dist.DistError):
            raise
        if "Duplicate GPU" in str(error):
            raise RunError(
                f"process {number} has the same GPU as another: set LOCAL_RANK to its number among "
                "the processes on this machine, or start one process per GPU"
            ) from error
        raise RunError(
            f"process {number} could not reach the other processes of the run, {count} in total, "
            f"through {host}: check that all have started"
        ) from error


def _open_store(number: int, timeout: timedelta) -> dist.Store:
    """Open the store in which processes exchange addresses, hosted by process 0.

    torchrun's own store survives restarts, with the addresses of dead processes in it (PyTorch
    issue 135712). So process 0 starts a new store and puts only its port into torchrun's.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, port, is_master=number == 0, timeout=timeout)
    torchruns = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    if number == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        torchruns.set("port", str(store.port))
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        port = int(torchruns.get("port"))  # blocks until set; may be a dead process's
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise dist.DistNetworkError(str(error)) from error
            time.sleep(0.1)
        else:
            return dist.TCPStore(host, port, is_master=False, timeout=timeout)


def stop_processes() -> None:
    """Leave the process group, if there is one."""
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
