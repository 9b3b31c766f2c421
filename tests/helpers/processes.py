"""Programs of the repository in separate processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 300  # after which a test gives up; a busy machine may be slow
NANO_MAIN = "tests/helpers/nano_main.py"

_started = []


def wait_for_line(process, text):
    """Read a run's output up to a line."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return
    pytest.fail(f"never printed {text!r}: {''.join(lines)}{process.stderr.read()}")


def children_of(pid):
    """Ids of a process's children that run main_pretrain.py."""
    tasks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(n) for n in tasks if "main_pretrain" in Path(f"/proc/{n}/cmdline").read_text()]


def command(*argv, processes=None):
    """Command line of a script in the repository, for `start`."""
    python = [sys.executable]
    if processes is not None:
        python += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return [str(word) for word in (*python, *argv)]


def start(words, cwd=ROOT, stdin=None, stderr=subprocess.PIPE, **variables):
    """Start a command in the repository, with one thread, as in the tests' process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    process = subprocess.Popen(words, cwd=cwd, env=env, **pipes)
    _started.append(process)
    return process


def free_port():
    """A port that nothing uses."""
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


def finish(process):
    """Wait for a command; return its exit code, standard output and standard error."""
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def wait_until(condition, what, seconds=SECONDS):
    """Wait for a condition; return its first true value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    return pytest.fail(f"waited {seconds} s for {what}")


def tasks_of(folder):
    """Processes of a run that a launcher has started with this output folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (path / "cmdline").read_text().split("\0")
            if words[1:2] == ["-u"] and "main_" in words[2] and str(folder) in words:
                found.append(int(path.name))
    return found


def is_frozen(pid, number=None):
    """Whether a process is stopped and, on request, has not received a signal meanwhile."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    pending = int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)
    return "State:\tT" in status and not (number and pending >> (number - 1) & 1)


def interrupt(log, text, folder, *, number, send=lambda: None):
    """Make a run receive a signal right after a line of its log, however fast it is.

    Args:
        text: in the line.
        folder: the run's output folder.
        number: the signal's.
        send: sends the signal; by default it comes from elsewhere.
    """
    wait_until(lambda: log.exists() and text in log.read_text(), f"{text!r} in {log}")
    tasks = tasks_of(folder)
    assert tasks, "the run had ended before it could be interrupted"
    for pid in tasks:
        os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: all(map(is_frozen, tasks)), "processes to stop")
        send()
        wait_until(lambda: not any(is_frozen(p, number) for p in tasks), f"signal {number}")
    finally:
        for pid in tasks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def end_processes():
    """End the commands that `start` started and nobody has waited for, torchrun's processes too."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            for pid in descendants_of(process.pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.kill()
        process.communicate()


def descendants_of(pid):
    """The numbers of a process's children and theirs."""
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [n for child in map(int, children) for n in (child, *descendants_of(child))]
    return []
