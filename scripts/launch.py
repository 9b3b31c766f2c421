"""Start a main on this machine or on a SLURM cluster.

    python scripts/launch.py --main pretrain --nodes 2 --gpus_per_node 8 --partition P \\
        --time 3-00:00:00 -- --data_path IMAGES --output_dir output/base

Flags after `--` are the main's and are checked before anything starts. A job has one process per
GPU, with torchrun's environment variables. After SIGUSR1, which SLURM sends before the time limit,
a job saves and is requeued to continue; after SIGTERM it saves and ends.

--cluster foreground starts the processes here and waits for them, as torchrun does, but without a
traceback of its own at the end.
"""

import argparse
import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.local_job import HERE, job_port
from util.arguments import Parser, check_arguments, natural_int, positive_int
from util.errors import UNPRINTABLE, InputError

ROOT = Path(__file__).resolve().parents[1]
MAINS = sorted(path.stem.removeprefix("main_") for path in ROOT.glob("main_*.py"))
LOCAL_JOB = [sys.executable, str(ROOT / "scripts" / "local_job.py")]
SBATCH_FLAGS = ("partition", "time", "account", "qos", "constraint", "mem", "cpus_per_task")
# What SLURM or scripts/local_job.py would replace or drop in the path of a log, besides %j.
REPLACED = {"slurm": r"\\|%(?!j)", "local": "%t"}
# A task ended by SIGUSR1 has saved, or had not started to train. The job is requeued after all have
# ended, so that none is cut off; where SLURM does not allow that, the job fails visibly.
REQUEUE = f"""code=$?
[ $code -ne {128 + signal.SIGUSR1} ] || scontrol requeue $SLURM_JOB_ID
exit $code"""


def check_value(flag: str, value: str) -> None:
    """Check a value that is quoted for a line of a batch script.

    sbatch reads such a line as a shell would, except for backslashes: it drops them, and one that
    precedes a quote makes the rest of a value further options. A line break begins a new line.

    Raises:
        InputError: it is empty, or has a character that sbatch would not read as it is.
    """
    if not value:
        raise InputError(f"{flag} is empty: give a value, or leave it out")
    if "\\" in value:
        raise InputError(f"{flag} {value} has a backslash, which sbatch does not keep: remove it")
    if UNPRINTABLE.search(value):
        raise InputError(
            f"{flag} {value} has a line break or another character that is not printed: remove it"
        )


def check_job_dir(job_dir: Path, cluster: str) -> None:
    """Raise InputError if logs would not be in this folder, or its name cannot be printed."""
    advice = "give another folder for logs by --job_dir"
    if UNPRINTABLE.search(str(job_dir)):
        raise InputError(
            f"{job_dir} has a line break or another character that is not printed: {advice}"
        )
    if found := re.search(REPLACED[cluster], str(job_dir)):
        raise InputError(
            f"{job_dir} has {found[0]}, which does not stay as it is in names of logs: {advice}"
        )


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the launcher's flags, with sbatch's in the dict `sbatch`, and split off the main's.

    Raises:
        InputError: the launcher's flags are wrong; the main checks its own.
    """
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--main", choices=MAINS, required=True, help="starts main_NAME.py")
    parser.add_argument(
        "--cluster",
        choices=("auto", "slurm", "local", "foreground", "debug"),
        default="auto",
        help="local: this machine, in the background; foreground (or its earlier name, debug): "
        "this machine, in this terminal; auto: slurm if sbatch is found, else local (%(default)s)",
    )
    parser.add_argument("--nodes", type=positive_int, default=1, help="(%(default)s)")
    parser.add_argument(
        "--gpus_per_node",
        type=natural_int,
        help="one process per GPU; 0 uses the CPU (1, or 0 with --tasks_per_node)",
    )
    parser.add_argument("--tasks_per_node", type=positive_int, help="processes on the CPU (1)")
    parser.add_argument(
        "--job_dir",
        help="folder for logs; %%j in it is replaced by the job's number (the main's "
        "OUTPUT_DIR/jobs)",
    )
    group = parser.add_argument_group(
        "sbatch", "any other flag --X=Y of sbatch is given as --slurm_X=Y"
    )
    for name in SBATCH_FLAGS:
        group.add_argument(f"--{name}", help=f"sbatch's --{name.replace('_', '-')}")
    group.add_argument(
        "--signal_seconds",
        type=positive_int,
        default=120,
        help="time before the limit at which the job starts to save (%(default)s)",
    )
    own, main_argv = list(argv), []
    if "--" in own:
        split = own.index("--")
        own, main_argv = own[:split], own[split + 1 :]
    foreign = "give sbatch's flags as --slurm_NAME=VALUE, and those of the main after a --"
    named = [word for word in own if not word.startswith("--slurm_")]
    parser.check_flags(named, foreign, likeness=0.8)  # most are of sbatch or of the main
    args, others = parser.parse_known_args(own)
    if len(own) == len(argv):
        raise InputError(f"-- not found: put the flags of main_{args.main}.py after it")

    args.sbatch = {name: vars(args)[name] for name in SBATCH_FLAGS if vars(args)[name] is not None}
    for name, value in args.sbatch.items():
        check_value(f"--{name}", value)
    for word in others:
        found = re.fullmatch(r"--slurm_([A-Za-z][\w-]*)(?:=(.*))?", word, re.ASCII | re.DOTALL)
        if not found:
            raise InputError(f"{word} is not a flag of the launcher: {foreign}")
        if found[2] is not None:
            check_value(f"--slurm_{found[1]}", found[2])
        args.sbatch[found[1].replace("-", "_")] = True if found[2] is None else found[2]
    if args.job_dir == "":
        raise InputError("--job_dir is empty: give a folder, or leave it out")
    if args.gpus_per_node and args.tasks_per_node not in (None, args.gpus_per_node):
        raise InputError(
            f"--tasks_per_node {args.tasks_per_node} contradicts --gpus_per_node "
            f"{args.gpus_per_node}: every GPU has one process, so leave it out"
        )
    if args.gpus_per_node is None:
        args.gpus_per_node = 0 if args.tasks_per_node else 1
    if args.cluster == "auto":
        args.cluster = "slurm" if shutil.which("sbatch") else "local"
    elif args.cluster == "debug":
        args.cluster = "foreground"
    return args, main_argv


if __name__ == "__main__":
    check_arguments(lambda: parse_args(sys.argv[1:]))  # before imports that take seconds

import torch
from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths
from submitit.helpers import TorchDistributedEnvironment

from util.runs.run import run_main


def check_machine(args: argparse.Namespace, job_dir: Path) -> None:
    """Check that this machine can start the job.

    Raises:
        InputError: sbatch, nodes or GPUs are missing, or the folder cannot be written to.
    """
    if args.cluster == "slurm":
        for program in ("sbatch", "srun"):
            if not shutil.which(program):
                raise InputError(
                    f"--cluster slurm needs {program}, not found here: run this on a machine of "
                    "the cluster, or use --cluster local"
                )
    elif args.nodes > 1:
        raise InputError(
            f"--nodes {args.nodes} needs --cluster slurm: --cluster {args.cluster} has one node"
        )
    elif args.gpus_per_node > max(torch.cuda.device_count(), 1):  # a single process needs no GPU
        raise InputError(
            f"--gpus_per_node {args.gpus_per_node} is above the number of GPUs, "
            f"{torch.cuda.device_count()}: lower it, or use 0 for the CPU"
        )
    if args.cluster == "foreground":
        return
    folder = JobPaths.get_first_id_independent_folder(job_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}): choose another --job_dir") from error


def start_task(words: list[str]) -> NoReturn:
    """Replace this process by the main, with the environment that torchrun would set."""
    environment = TorchDistributedEnvironment()
    environment.master_port = job_port(int(os.environ["SLURM_JOB_ID"]))
    environment.export(set_cuda_visible_devices=False, overwrite=True)
    # When a task fails or finishes first, srun sends SIGTERM to the others, which should end on
    # their own and with their own exit code. While a main trains, it has its own handler.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.execv(words[0], words)


def submit(args: argparse.Namespace, words: list[str], job_dir: Path, num_tasks: int) -> JobPaths:
    """Submit a job; return its number and paths.

    Raises:
        InputError: sbatch rejects the job; the message has its reason.
    """
    srun_args = ["--kill-on-bad-exit=1"]
    if "cpus_per_task" in args.sbatch:  # srun no longer inherits it from sbatch
        srun_args.append(f"--cpus-per-task={args.sbatch['cpus_per_task']}")
    executor = SlurmExecutor(job_dir)
    executor.update_parameters(
        job_name=args.main,
        nodes=args.nodes,
        ntasks_per_node=num_tasks,
        gpus_per_node=args.gpus_per_node or None,  # clusters without GPUs reject 0
        time=None,  # the partition's default, unless --time is given
        wckey=None,
        stderr_to_stdout=True,
        setup=None if args.gpus_per_node else ["export CUDA_VISIBLE_DEVICES="],
        teardown=[REQUEUE],
        srun_args=srun_args,
        additional_parameters={
            "requeue": True,
            "signal": f"USR1@{args.signal_seconds}",
            **args.sbatch,
        },
    )
    try:
        with redirect_stderr(StringIO()):  # submitit prints the error's text there, too
            return executor.submit(start_task, words).paths
    except (FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).replace("sbatch: error: ", "").split())
        raise InputError(f"sbatch rejected the job: {reason}") from error


def start_here(words: list[str], job_dir: Path, num_tasks: int) -> JobPaths:
    """Start a job in the background on this machine; return its number and paths."""
    job = subprocess.Popen(
        [*LOCAL_JOB, str(JobPaths(job_dir).stdout), str(num_tasks), *words],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # so that it outlives the terminal
    )
    return JobPaths(job_dir, str(job.pid))


def main(argv: Sequence[str] | None = None) -> None:
    """Check everything, start the job, and print how to watch and stop it."""
    args, main_argv = parse_args(sys.argv[1:] if argv is None else argv)
    main_args = importlib.import_module(f"main_{args.main}").parse_args(main_argv)
    job_dir = Path(args.job_dir or Path(main_args.output_dir, "jobs")).absolute()
    if args.cluster != "foreground":  # which has no logs
        check_job_dir(job_dir, args.cluster)
    check_machine(args, job_dir)
    if args.cluster != "slurm" and args.sbatch:
        unused = [name if name in SBATCH_FLAGS else f"slurm_{name}" for name in args.sbatch]
        print(f"ignored without SLURM: --{', --'.join(unused)}")

    words = [sys.executable, "-u", str(ROOT / f"main_{args.main}.py"), *main_argv]
    num_tasks = args.tasks_per_node or args.gpus_per_node or 1
    if args.gpus_per_node == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.cluster == "foreground":
        sys.stdout.flush()
        if num_tasks > 1:
            words = [*LOCAL_JOB, HERE, str(num_tasks), *words]
        os.execv(words[0], words)
    if args.cluster == "slurm":
        paths = submit(args, words, job_dir, num_tasks)
        number = paths.job_id
        again, end = f"scancel --signal=USR1 {number}", f"scancel {number}"
        watch = f"squeue -j {number}; "
    else:
        paths = start_here(words, job_dir, num_tasks)
        number, watch = paths.job_id, ""
        again, end = f"kill -USR1 {number}", f"kill {number}"
    print(f"job {number}: main_{args.main}.py, nodes: {args.nodes}, tasks per node: {num_tasks}")
    print(f"log of task 0: {paths.stdout}")
    print(f"folder of all logs: {paths.folder}")
    print(f"to watch it: {watch}tail -F {shlex.quote(str(paths.stdout))}")
    print(f"to save and restart: {again}")
    print(f"to save and end: {end}")


if __name__ == "__main__":
    run_main(main)
