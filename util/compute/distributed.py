"""The processes of a run, as torchrun starts them; every call also works in a single process."""

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

from util.errors import InputError, RunError

MAX_DEFAULT_WORKERS = 32  # of a process: more would feed no GPU faster, and each takes memory
TIMEOUT_MINUTES = 30.0  # that processes wait for each other, unless they are told otherwise


def init_distributed(device: str, *, timeout_minutes: float | None = None) -> torch.device:
    """Join the other processes where torchrun started several; return this process's device.

    Only torchrun's variables count, so that a shell inside a SLURM job stays a single process.

    Args:
        device: "cuda", "cuda:1", "cpu", "mps", ...; several processes on GPUs each take the one
            of their local rank.
        timeout_minutes: how long the processes wait for each other at most; None is
            TIMEOUT_MINUTES.

    Raises:
        InputError: the device is not there, or torchrun's variables are not complete.
        RunError: not all processes came.
    """
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(
            f"--device {device} is none that PyTorch knows: try cuda or cpu"
        ) from error
    starts_several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ
    if chosen.type == "cuda":
        num_gpus = torch.cuda.device_count()
        local_rank = os.environ.get("LOCAL_RANK", "0") if starts_several else chosen.index or 0
        chosen = torch.device("cuda", int(local_rank))
        if chosen.index >= num_gpus:
            raise InputError(
                f"--device {chosen} needs {chosen.index + 1} GPUs and {num_gpus} are there: start "
                "fewer processes or use --device cpu"
            )
    try:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise InputError(f"--device {device} cannot compute here: try cuda or cpu") from error
    if starts_several and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        # NCCL would otherwise guess which GPU is a process's own.
        device_id = chosen if chosen.type == "cuda" else None
        _join_processes(backend, timeout_minutes or TIMEOUT_MINUTES, device_id)
    return chosen


def _join_processes(backend: str, timeout_minutes: float, device_id: torch.device | None) -> None:
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE asks for several processes, and {', '.join(missing)} is not set: start "
            "them by torchrun, or unset WORLD_SIZE"
        )
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # A minute more than the watchdog waits (util.compute.watchdog), whose message says more.
    timeout = timedelta(minutes=timeout_minutes + 1)
    try:
        store = _open_store(number, timeout)
        group = {"store": store, "rank": number, "world_size": count, "device_id": device_id}
        dist.init_process_group(backend, timeout=timeout, **group)
    except dist.DistError as error:
        raise RunError(
            f"process {number} did not find the {count} processes of the run at "
            f"{os.environ['MASTER_ADDR']}: see whether all have started"
        ) from error


def _open_store(number: int, timeout: timedelta) -> dist.Store:
    """Where processes leave their addresses for each other, kept by process 0.

    torchrun has one as well, but keeps it over restarts, with the addresses of dead processes in it
    (PyTorch's issue 135712). So process 0 only leaves the port of a new one there.
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
        port = int(torchruns.get("port"))  # waits for it, and may be a dead process's
        try:
            socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise dist.DistNetworkError(str(error)) from error
            time.sleep(0.1)
        else:
            return dist.TCPStore(host, port, is_master=False, timeout=timeout)


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_of_cores() -> int:
    """CPU cores for this process, where several share the machine's."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")  # such as 8(x2),4
    tasks = {node.partition("(")[0] for node in nodes}
    if processes > 1 and str(processes) in tasks:  # each is a task of SLURM's with its own cores
        return min(available_cores(), int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
    return available_cores() // processes


def default_workers() -> int:
    """Loader processes that suit this machine: a process's share of the cores, less an eighth.

    At least one core is left for the process itself, which launches kernels and copies batches.
    """
    share = share_of_cores()
    return min(MAX_DEFAULT_WORKERS, max(1, share - max(1, share // 8)))


def stop_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 for the one that writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def all_gather(values: Tensor) -> Tensor:
    """Put every process's (N,) tensor below each other, (world size, N), on all processes."""
    if not dist.is_initialized():
        return values.unsqueeze(0)
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def all_gather_objects(values: list) -> list:
    """Join every process's list of picklable objects, on all processes."""
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
    """Wrap the model so that gradients are averaged over processes, unless one does without.

    That is a single process, and a sharded model, which averages by itself.
    """
    if not dist.is_initialized() or isinstance(model, FSDPModule):
        return model
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)


def gradient_sync(model: nn.Module, *, enabled: bool) -> AbstractContextManager:
    """Context in which backward reduces gradients over processes, or leaves that for later.

    A sharded model then keeps whole gradients from one micro-step to the next: four bytes for each
    parameter, for one reduction a step instead of one a micro-step.
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
