"""Submit the commands of a suite to SLURM, each to start after the one that it needs."""

import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

from scripts.ablations.jobs import ROOT, Job, note_start
from util.errors import InputError
from util.json_text import parse_json
from util.runs.files import write_json

NUMBER = re.compile(r"^job (\d+):", re.MULTILINE)
SUBMITTED = "submitted.json"

_logger = logging.getLogger(__name__)


def submit_jobs(jobs: Sequence[Job], launcher_flags: Sequence[str]) -> None:
    """Submit the jobs that are neither done nor in the queue.

    Args:
        launcher_flags: of scripts/launch.py, the same for all.

    Raises:
        InputError: the launcher or SLURM refuses one.
    """
    if not shutil.which("squeue"):
        raise InputError("--submit needs SLURM: run this on a machine of the cluster")
    numbers = {}  # of what is in the queue, by the result
    for job in jobs:
        if job.is_done:
            continue
        if (number := queued(job)) is not None:
            _logger.info("%s: in the queue as job %s", job, number)
        else:
            after = numbers.get(job.needs)
            number = submit(job, [*launcher_flags, *dependency(after)])
            write_json(job.folder / SUBMITTED, {"job": number}, keep_earlier=False)
            _logger.info("%s: submitted as job %s", job, number)
        numbers[job.result] = number


def dependency(number: str | None) -> list[str]:
    """Flags that make a job wait for another's success."""
    if number is None:
        return []
    return [f"--slurm_dependency=afterok:{number}", "--slurm_kill-on-invalid-dep=yes"]


def submit(job: Job, launcher_flags: Sequence[str]) -> str:
    """Submit a job and return its number.

    Raises:
        InputError: the launcher refuses it.
    """
    note_start(job)
    main = job.program.removeprefix("main_").removesuffix(".py")
    launch = [sys.executable, str(ROOT / "scripts" / "launch.py"), "--main", main]
    words = [*launch, "--cluster", "slurm", *launcher_flags, "--", *job.all_flags]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    found = NUMBER.search(ended.stdout)
    if ended.returncode or not found:
        lines = (ended.stderr or ended.stdout).strip().splitlines() or ["no reason was given"]
        raise InputError(f"{job} was not submitted: {lines[-1]}")
    return found[1]


def queued(job: Job) -> str | None:
    """Number under which a job waits or runs; None if it does not.

    Raises:
        InputError: SLURM does not say.
    """
    path = job.folder / SUBMITTED
    if not path.exists():
        return None
    number = parse_json(path.read_bytes())["job"]
    words = ["squeue", "--noheader", "--jobs", number]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode and "Invalid job id" not in ended.stderr:  # which it has forgotten
        raise InputError(f"squeue failed: {ended.stderr.strip()}")
    return number if ended.stdout.strip() else None
