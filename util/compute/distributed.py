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

from util.errors import InputError, RunError

MAX_DEFAULT_WORKERS = 32  # per process: more would not feed a GPU faster, and each takes memory
TIMEOUT_MINUTES = 30.0  # default for how long processes wait for each other


def init_distributed(device: str, *, timeout_minutes: float | None = None) -> torch.device:
    """Join the other processes if torchrun started several; return this process's device.

    Only torchrun's variables count, so that a shell inside a SLURM job stays a single process.

    Args:
        device: "cuda", "cuda:1", "cpu", "mps", ...; with several processes on GPUs, each uses the
            GPU of its local rank.
        timeout_minutes: maximum wait for another process; None: TIMEOUT_MINUTES.

    Raises:
        InputError: the device is not available, or some of torchrun's variables are not set.
        RunError: some processes did not join.
    """
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown --device {device}: use cuda, cuda:N or cpu") from error
    starts_several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ
    if chosen.type == "cuda":
        num_gpus = torch.cuda.device_count()
        local_rank = os.environ.get("LOCAL_RANK", "0") if starts_several else chosen.index or 0
        chosen = torch.device("cuda", int(local_rank))
        if chosen.index >= num_gpus:
            advice = "start fewer processes" if starts_several else "use a lower N in cuda:N"
            raise InputError(
                f"{chosen} not found (GPUs on this machine: {num_gpus}): "
                + (f"{advice}, or --device cpu" if num_gpus else "use --device cpu")
            )
    try:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise InputError(
            f"--device {device} is not available on this machine: use cuda, cuda:N or cpu"
        ) from error
    if starts_several and not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        # NCCL would otherwise guess which GPU a process uses.
        device_id = chosen if chosen.type == "cuda" else None
        _join_processes(backend, timeout_minutes or TIMEOUT_MINUTES, device_id)
    return chosen


def _join_processes(backend: str, timeout_minutes: float, device_id: torch.device | None) -> None:
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE requests several processes, which also need {' and '.join(missing)}: "
            "start the run with torchrun, or unset WORLD_SIZE"
        )
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
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


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_per_process() -> int:
    """CPU cores for this process if several run on the machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")  # such as 8(x2),4
    tasks = {node.partition("(")[0] for node in nodes}
    if processes > 1 and str(processes) in tasks:  # each is a SLURM task with its own cores
        return min(available_cores(), int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
    return available_cores() // processes


def default_workers() -> int:
    """Default number of loader workers: seven eighths of the process's cores.

    At least one core is left for the process itself, which launches kernels and copies batches.
    """
    cores = cores_per_process()
    return min(MAX_DEFAULT_WORKERS, max(1, cores - max(1, cores // 8)))


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
