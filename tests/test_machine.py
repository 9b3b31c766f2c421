"""Memory that a process may use, read from small copies of /proc and /sys."""

import pytest

from util.machine import available_memory, size_text, total_memory

GIB = 2**30
MEMINFO = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {12 * GIB // 1024} kB\n"


def write(root, files):
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def new_group(folder, limit, used, cache=0):
    group = f"sys/fs/cgroup/{folder}"
    stat = f"anon 5\ninactive_file {cache // 2}\nactive_file {cache - cache // 2}"
    return {
        f"{group}/memory.max": limit,
        f"{group}/memory.current": used,
        f"{group}/memory.stat": stat,
    }


def old_group(folder, limit, used, cache=0):
    group = f"sys/fs/cgroup/memory/{folder}"
    stat = f"inactive_file 1\ntotal_inactive_file {cache}"
    return {
        f"{group}/memory.limit_in_bytes": limit,
        f"{group}/memory.usage_in_bytes": used,
        f"{group}/memory.stat": stat,
    }


GROUPS = {
    "no groups": ({}, 16, 12),
    "no limit": ({"proc/self/cgroup": "0::/a", **new_group("a", "max", 0)}, 16, 12),
    "a job": ({"proc/self/cgroup": "0::/a", **new_group("a", 8 * GIB, 3 * GIB)}, 8, 5),
    "cache of files makes room": (
        {"proc/self/cgroup": "0::/a", **new_group("a", 8 * GIB, 7 * GIB, cache=4 * GIB)},
        *(8, 5),
    ),
    "a limit further up": (
        {
            "proc/self/cgroup": "0::/user/a",
            **new_group("user", 4 * GIB, GIB),
            **new_group("user/a", "max", GIB),
        },
        *(4, 3),
    ),
    "over the limit": ({"proc/self/cgroup": "0::/a", **new_group("a", GIB, 2 * GIB)}, 1, 0),
    "a container": ({"proc/self/cgroup": "0::/", **new_group(".", 2 * GIB, GIB)}, 2, 1),
    "version 1": (
        {
            "proc/self/cgroup": "9:cpu:/b\n4:cpuset,memory:/a\n0::/",
            **old_group("a", 8 * GIB, 3 * GIB, cache=GIB),
        },
        *(8, 6),
    ),
    "version 1 in a container": (
        {"proc/self/cgroup": "4:memory:/docker/a", **old_group(".", 8 * GIB, 2 * GIB)},
        *(8, 6),
    ),
    "version 1 without a limit": (
        {"proc/self/cgroup": "4:memory:/a", **old_group("a", 9223372036854771712, GIB)},
        *(16, 12),
    ),
}


@pytest.mark.parametrize(("files", "total", "available"), GROUPS.values(), ids=GROUPS)
def test_memory_is_the_least_of_the_machines_and_every_control_groups(
    files, total, available, tmp_path
):
    root = write(tmp_path, files)
    assert total_memory(root) == total * GIB
    assert available_memory(root) == available * GIB


def test_a_system_that_says_nothing_has_unknown_memory(tmp_path):
    assert total_memory(tmp_path) is None
    assert available_memory(tmp_path) is None


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (310 * 2**20, "310 MiB"),
        (1.44 * GIB, "1.4 GiB"),
        (19.9 * GIB, "19.9 GiB"),
        (35 * GIB, "35 GiB"),
    ],
)
def test_sizes_have_two_or_three_digits(num_bytes, text):
    assert size_text(num_bytes) == text
