"""Run a job's processes on this machine like torchrun, and restart them after SIGUSR1.

    python scripts/local_job.py LOG NUM_TASKS COMMAND...

LOG is a path in which %j is replaced by this process's id and %t by a task's number. SIGUSR1 and
SIGTERM are passed on. If tasks end by SIGUSR1, after saving, all tasks start again; otherwise the
job ends with the code of the first task that failed. scripts/launch.py starts this script.

If LOG is "-", tasks write to the terminal, Ctrl-C is passed on, too, and nothing starts again.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.compute.launchers import LAUNCHER_PID

HERE = "-"  # instead of a log
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)
# For the other tasks after one has failed: to end on their own, until a SIGTERM, and as under SLURM
# until a SIGKILL.
SECONDS_TO_NOTICE = 5
SECONDS_TO_END = 30


def job_port(number: int) -> int:
    """Port on which process 0 of a job listens, by the job's number.

    Outgoing connections get theirs from 32768 upward, at any moment, so a port found free there may
    be taken when process 0 opens it. Below that, only jobs 10000 apart have the same.
    """
    return 20000 + number % 10000


def recorded(*numbers: int) -> list[int]:
    """Record signals from now on, unless they are ignored; return the list that grows."""
    received = []
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: received.append(number))
    return received


def run_tasks(words: list[str], logs: Sequence[Path | None], received: list[int]) -> list[int]:
    """Run one task per log until all have ended.

    Returns:
        Their exit codes as in a shell, in the order in which they ended.

    Args:
        words: the command of every task.
        logs: are appended to; None for this process's own output.
        received: signals to pass on; may grow while tasks run.
    """
    shared = {
        **os.environ,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(job_port(os.getpid())),
        "WORLD_SIZE": str(len(logs)),
        "LOCAL_WORLD_SIZE": str(len(logs)),
        LAUNCHER_PID: str(os.getpid()),  # so that tasks notice if this process dies
    }
    # Otherwise each task would use all cores.
    shared.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // len(logs), 1)))
    # Otherwise PyTorch prints pages about a process that has ended, below the run's last line.
    shared.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    tasks = []
    for rank, log in enumerate(logs):
        env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        # In a session of its own, a task receives a terminal's Ctrl-C once: from this process.
        with nullcontext() if log is None else log.open("ab") as file:
            process = subprocess.Popen(
                words, stdout=file, stderr=file, env=env, start_new_session=True
            )
        tasks.append(process)

    passed_on, failed_at, terminated = 0, math.inf, False
    ended = {}  # the exit code of each task
    while len(ended) < len(tasks):
        codes = [task.poll() for task in tasks]
        for rank, code in enumerate(codes):
            if code is not None:
                ended.setdefault(rank, code)
        for number in received[passed_on:]:
            passed_on += 1
            for task in tasks:
                task.send_signal(number)
        if any(codes):
            failed_at = min(failed_at, time.monotonic())
        seconds = time.monotonic() - failed_at
        if seconds > SECONDS_TO_NOTICE and not terminated:
            # A task that has not joined the others yet would wait for the one that failed.
            terminated = True
            for task in tasks:
                task.terminate()
        if seconds > SECONDS_TO_END:
            for task in tasks:
                task.kill()
        time.sleep(0.1)
    if failed_at < math.inf and not received and all(code < 0 for code in ended.values()):
        # No task was able to say anything, as during its imports.
        number = next((rank for rank, code in ended.items() if code != -signal.SIGTERM), 0)
        name = signal.Signals(-ended[number]).name
        print(f"local_job.py: error: {name} ended process {number} of the job", file=sys.stderr)
    return [code if code >= 0 else 128 - code for code in ended.values()]


def main(pattern: str, num_tasks: str, *words: str) -> int:
    """Run a job; return its exit code."""
    if pattern == HERE:
        codes = run_tasks(list(words), [None] * int(num_tasks), recorded(*SIGNALS, *OF_A_TERMINAL))
        return next(filter(None, codes), 0)
    received = recorded(*SIGNALS)
    pattern = pattern.replace("%j", str(os.getpid()))
    logs = [Path(pattern.replace("%t", str(rank))) for rank in range(int(num_tasks))]
    logs[0].parent.mkdir(parents=True, exist_ok=True)
    with logs[0].open("ab") as file:  # so that the launcher's output is not kept open
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    while True:
        codes = run_tasks(list(words), logs, received)
        if 128 + signal.SIGUSR1 not in codes or signal.SIGTERM in received:
            return next(filter(None, codes), 0)
        received.clear()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
