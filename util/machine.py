"""What this process may use of the machine: cores and memory."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from util.errors import InputError


def whole_number(name: str) -> int | None:
    """Value of an environment variable; None if it is not set, or empty.

    Raises:
        InputError: it is not a whole number.
    """
    text = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[0-9]{0,9}", text):
        raise InputError(f"{name} must be a whole number, not {text!r}: correct or unset it")
    return int(text) if text else None


MAX_DEFAULT_WORKERS = 32  # per process: more would not feed a GPU faster, and each takes memory


def available_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_per_process() -> int:
    """CPU cores for this process if several run on the machine."""
    processes = whole_number("LOCAL_WORLD_SIZE") or 1
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


def size_text(num_bytes: float) -> str:
    """Write a number of bytes as people do: "310 MiB", "1.4 GiB", "35 GiB"."""
    mib, gib = num_bytes / 2**20, num_bytes / 2**30
    if mib < 1000:
        return f"{mib:.0f} MiB"
    return f"{gib:.1f} GiB" if gib < 20 else f"{gib:.0f} GiB"


def total_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may use at most: the machine's, or its control group's limit.

    Args:
        root: where /proc and /sys are.
    """
    machine = _meminfo(root, "MemTotal")
    if machine is None and root == Path("/") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [group.limit for group in _groups(root)]
    return min(limits if machine is None else [machine, *limits], default=None)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be used without swapping; None if the system does not say.

    Args:
        root: where /proc and /sys are.
    """
    machine = _meminfo(root, "MemAvailable")
    rooms = [max(0, group.limit - group.used) for group in _groups(root)]
    return min(rooms if machine is None else [machine, *rooms], default=None)


def _meminfo(root: Path, key: str) -> int | None:
    file = root / "proc" / "meminfo"
    if not file.exists():
        return None
    found = re.search(rf"^{key}:\s*(\d+) kB", file.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


class Group(NamedTuple):
    """A control group's limit of memory, and its use without the cache of files, both in bytes."""

    limit: int
    used: int


def _groups(root: Path) -> Iterator[Group]:
    """Yield the control groups of this process that limit memory, of either version.

    In a container, the path of the process's own group may not exist, only the one above.
    """
    groups, mounts = root / "proc/self/cgroup", root / "sys/fs/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = mounts / "memory" if controllers else mounts
        folder = mount / path.lstrip("/")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        if not controllers:
            names = ("memory.max", "memory.current", "")
        for group in (folder, *folder.parents):
            found = _read_group(group, *names) if mount in (group, *group.parents) else None
            if found is not None:
                yield found


def _read_group(folder: Path, limit: str, usage: str, prefix: str) -> Group | None:
    try:
        text = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not a group that limits memory
        return None
    cache = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    return None if text == "max" else Group(int(text), used - cache)
