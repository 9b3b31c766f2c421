"""The commands of a suite, and how they are run side by side, in any number of attempts."""

import importlib
import logging
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from scripts.ablations.suites import PRETRAIN, Setting, Step, Suite
from util.compute.launchers import LAUNCHER_PID
from util.errors import InputError, RunError
from util.json_text import parse_json
from util.progress import clock
from util.runs.checkpoint import checkpoint_name
from util.runs.files import write_json
from util.runs.lock import FolderLock

ROOT = Path(__file__).resolve().parents[2]
COMMAND, OUTPUT = "command.json", "output.txt"

_logger = logging.getLogger(__name__)


class Job(NamedTuple):
    """One command of a run, such as its pre-training; what it computes is in `folder`."""

    run: str
    """Setting and seed, such as "gamma_25-0"."""
    step: str
    program: str
    """Path below the repository's root, such as "main_pretrain.py"."""
    flags: list[str]
    data: list[str]
    """Flags of the images."""
    folder: Path
    result: Path
    """Exists once the command has ended well."""
    needs: Path | None
    """Result of the job before it."""

    @property
    def setting(self) -> str:
        """Name of the setting."""
        return self.run.rpartition("-")[0]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.run.rpartition("-")[2])

    @property
    def is_done(self) -> bool:
        """Whether it has ended well."""
        return self.result.exists()

    @property
    def is_ready(self) -> bool:
        """Whether what it starts from exists."""
        return self.needs is None or self.needs.exists()

    @property
    def own_flags(self) -> list[str]:
        """Those that its results depend on."""
        return [*self.flags, *self.data]

    @property
    def all_flags(self) -> list[str]:
        """Its flags, with those of paths."""
        start = [] if self.needs is None else ["--checkpoint", str(self.needs)]
        return [*self.flags, *start, *self.data, "--output_dir", str(self.folder)]

    def __str__(self) -> str:
        return f"{self.run}, {self.step}"


def seeds_of(suite: Suite, setting: Setting, least: int | None = None) -> range:
    """Seeds of a setting's runs, at least this many."""
    return range(max(setting.seeds or suite.seeds, least or 0))


def plan_jobs(suite: Suite, output_dir: Path, data: list[str], *, seeds: int | None) -> list[Job]:
    """List a suite's commands in the order in which they start.

    The first seed of all settings comes before the second, and what only some settings are measured
    by comes last.

    Args:
        data: flags of the images.
        seeds: the least number of them.

    Raises:
        InputError: the flags of a main are wrong, or a folder has results of others.
    """
    ordered = []
    for name, setting in suite.settings.items():
        for seed in seeds_of(suite, setting, seeds):
            for late, job in _jobs_of(suite, name, seed, output_dir, data):
                ordered.append(((late, seed), job))
    ordered.sort(key=lambda item: item[0])  # stable: otherwise the table's order
    jobs = [job for _, job in ordered]
    check_earlier(jobs)
    return jobs


def _jobs_of(
    suite: Suite, name: str, seed: int, output_dir: Path, data: list[str]
) -> Iterator[tuple[bool, Job]]:
    """Yield the jobs of a run, and whether each is only done with some settings."""
    setting, run = suite.settings[name], f"{name}-{seed}"
    steps = {PRETRAIN: Step("pretrain", f"{suite.pretrain} {setting.flags}"), **suite.steps}
    start = None
    for step_name, step in steps.items():
        if step.settings and name not in step.settings:
            continue
        folder = output_dir / run / step_name
        extra = setting.finetune if step.main == "finetune" else ""
        flags = shlex.split(f"{step.flags} {extra} --seed {seed}")
        job = Job(run, step_name, f"main_{step.main}.py", flags, data, folder, Path(), start)
        job = job._replace(result=folder / result_of(step.main, job.all_flags))
        if step_name == PRETRAIN:
            start = job.result
        yield bool(step.settings), job


def result_of(main: str, flags: list[str]) -> str:
    """Name of the file that a main writes last.

    Raises:
        InputError: its flags are wrong.
    """
    module = main_module(main)
    args = module.parse_args(flags)
    return module.REPORT if main == "knn" else checkpoint_name(args.epochs, 0)


def main_module(main: str) -> ModuleType:
    """The module of a main, whose parse_args says what is wrong with flags."""
    return importlib.import_module(f"main_{main}")


def run_jobs(jobs: Sequence[Job], output_dir: Path, *, at_once: int, num_threads: int) -> None:
    """Run the jobs that are not done; a signal ends those that run, which save before.

    Args:
        output_dir: holds the folders of all jobs, and is locked meanwhile.
        at_once: number of commands side by side.
        num_threads: CPU threads of each.

    Raises:
        InputError: another process is writing to the folder.
        RunError: a command failed. No others were started afterwards.
    """
    waiting = [job for job in jobs if not job.is_done]
    _logger.info("%d of %d commands are done", len(jobs) - len(waiting), len(jobs))
    running: dict[int, Running] = {}
    failed = None
    lock = FolderLock(output_dir)
    try:
        while running or (waiting and not failed):
            ready = [job for job in waiting if job.is_ready and not failed]
            if not ready and not running:
                raise RunError(f"{waiting[0]} needs {waiting[0].needs}, which does not exist")
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                process = start(job, num_threads=num_threads)
                running[process.pid] = Running(job, process, time.monotonic())
                _logger.info("%s: started", job)
            pid, status, usage = os.wait4(-1, 0)
            ended = running.pop(pid, None)
            if ended is None:  # not one of these
                continue
            ended.process.returncode = os.waitstatus_to_exitcode(status)
            if ended.process.returncode or not ended.job.is_done:
                failed = failed or ended
                _logger.warning("%s: failed; nothing else is started", ended.job)
                continue
            seconds = time.monotonic() - ended.start
            cost = {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}
            note_end(ended.job, **cost, peak_memory_mib=usage.ru_maxrss / 1024)  # Linux has KiB
            _logger.info("%s: %s", ended.job, progress(jobs, seconds, at_once))
    finally:
        for each in running.values():
            each.process.terminate()
        for each in running.values():
            each.process.wait()
        lock.release()
    if failed:
        raise RunError(
            f"{failed.job} failed with code {failed.process.returncode}, see "
            f"{failed.job.folder / OUTPUT}: fix that and start the same command again"
        )


class Running(NamedTuple):
    """A job that runs."""

    job: Job
    process: subprocess.Popen
    start: float


def start(job: Job, *, num_threads: int) -> subprocess.Popen:
    """Start a command in a session of its own, so that the terminal's Ctrl-C comes from here."""
    note_start(job)
    words = [sys.executable, "-u", str(ROOT / job.program), *job.all_flags]
    launched = {
        "OMP_NUM_THREADS": str(num_threads),
        LAUNCHER_PID: str(os.getpid()),
    }
    with (job.folder / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **launched},
            start_new_session=True,
        )


def check_earlier(jobs: Sequence[Job]) -> None:
    """Raise InputError if a folder has results of other flags, as of a suite that has changed."""
    for job in jobs:
        earlier = read_command(job)
        if earlier is not None and earlier["flags"] != job.own_flags:
            raise InputError(
                f"{job.folder} was made with other flags, {shlex.join(earlier['flags'])}: choose "
                "another --output_dir"
            )


def note_start(job: Job) -> None:
    """Make a job's folder, and keep the flags that its results depend on."""
    job.folder.mkdir(parents=True, exist_ok=True)
    if not (job.folder / COMMAND).exists():
        write_json(job.folder / COMMAND, {"flags": job.own_flags})


def read_command(job: Job) -> dict | None:
    """What is known of a command: its flags and, once it has ended, how long it took."""
    path = job.folder / COMMAND
    return parse_json(path.read_bytes()) if path.exists() else None


def note_end(job: Job, **cost: float) -> None:
    """Keep what a command cost, unless an earlier attempt did a part of it."""
    attempts = (job.folder / OUTPUT).read_text(errors="replace").count("continuing from ")
    content = {"flags": job.own_flags} | ({} if attempts else cost)
    write_json(job.folder / COMMAND, content, keep_earlier=False)


def progress(jobs: Sequence[Job], seconds: float, at_once: int) -> str:
    """Say how long a command took, how many are done, and when all will be."""
    known: dict[str, list[float]] = {}
    for job in jobs:
        if job.is_done and (found := read_command(job)) and "seconds" in found:
            known.setdefault(job.program, []).append(found["seconds"])
    left = [job for job in jobs if not job.is_done]
    expected = [statistics.mean(known[job.program]) for job in left if job.program in known]
    about = "about" if len(expected) == len(left) else "more than"
    text = f"done in {clock(seconds)}; {len(jobs) - len(left)} of {len(jobs)} commands"
    return f"{text}, {about} {clock(sum(expected) / at_once)} left" if left else text
