"""The frame of a run: how it starts, what it records about itself, and how it ends."""

import argparse
import errno
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import timm
import torch
import torchvision
from tqdm import tqdm

from util.arguments import natural_float, natural_int, positive_float, positive_int, seed_number
from util.compute.distributed import (
    TIMEOUT_MINUTES,
    init_distributed,
    is_main_process,
    rank,
    stop_processes,
)
from util.compute.signals import deferred_signals
from util.compute.watchdog import claim_report, lost_process, start_watchdog, stop_watchdog
from util.compute.worker_deaths import dead_loader, end_loaders
from util.errors import (
    InputError,
    RunError,
    StoppedError,
    is_out_of_memory,
    one_line,
    out_of_memory_message,
)
from util.kernels import cpu_linear

TIME_FORMAT = "%Y%m%d-%H%M%S"
SECONDS_BEFORE_SPEAKING = 5
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BAD_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """Where a run computes, writes and continues; see the flags."""

    output_dir: str
    log_dir: str | None
    device: str | None
    seed: int
    resume: str
    save_every: int
    save_every_minutes: float | None
    keep_last: int
    log_every: int
    timeout_minutes: float

    @property
    def folder(self) -> Path:
        """Of checkpoints, logs and figures."""
        return Path(self.output_dir)

    @property
    def log_folder(self) -> Path:
        """TensorBoard's."""
        return Path(self.log_dir or self.folder / "tensorboard")


def add_run_args(parser: argparse.ArgumentParser, *, output_dir: str, save_every: int = 20) -> None:
    """The flags of RunSettings."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir",
        default=output_dir,
        help="folder of checkpoints, logs and figures (%(default)s)",
    )
    group.add_argument("--log_dir", help="TensorBoard's folder (OUTPUT_DIR/tensorboard)")
    group.add_argument("--device", help="such as cuda, cuda:1 or cpu (cuda where there is one)")
    group.add_argument(
        "--seed", type=seed_number, default=0, help="decides everything random (%(default)s)"
    )
    group.add_argument(
        "--resume",
        default="auto",
        help="auto continues the newest good checkpoint in OUTPUT_DIR, a path that checkpoint, "
        "none starts anew (%(default)s)",
    )
    group.add_argument(
        "--save_every",
        type=positive_int,
        default=save_every,
        help="epochs between checkpoints (%(default)s)",
    )
    group.add_argument(
        "--save_every_minutes",
        type=natural_float,
        help="also save within epochs, at the first log point after so many minutes (off)",
    )
    group.add_argument(
        "--keep_last",
        type=natural_int,
        default=3,
        help="how many checkpoints to keep, 0 for all (%(default)s)",
    )
    group.add_argument(
        "--log_every", type=positive_int, default=20, help="steps between log points (%(default)s)"
    )
    group.add_argument(
        "--timeout_minutes",
        type=positive_float,
        default=TIMEOUT_MINUTES,
        help="a process that does nothing for so long ends those that wait for it (%(default)s)",
    )


class TerminalHandler(logging.Handler):
    """Prints log lines to stdout without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        encoding = sys.stdout.encoding or "utf-8"
        line = self.format(record).encode(encoding, "backslashreplace")  # of any file name
        with suppress(OSError):  # stdout may be a file on a full disk, which ends no run
            tqdm.write(line.decode(encoding), file=sys.stdout)
            sys.stdout.flush()


def start_logging() -> None:
    """Log to stdout; processes other than the main one only warn."""
    handler = TerminalHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO if is_main_process() else logging.WARNING)


def git_commit() -> str:
    """The commit this code is at, with "+" for local changes; "unknown" if nothing says.

    The environment's COMMIT comes first: a copy of the code may have no repository beside it.
    """
    if given := os.environ.get("COMMIT"):
        return given
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """What a result depends on beside its arguments.

    Raises:
        InputError: the environment asks for kernels that do not exist.
    """
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # by itself no plain value
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_linear": cpu_linear(),
    }


def start_run(
    *, device: str | None, seed: int, timeout_minutes: float | None = None
) -> torch.device:
    """Start processes, logging and the random state of initialisation; return the device.

    Args:
        device: None takes the GPU where there is one, else the CPU.
        seed: of the run.
        timeout_minutes: of several processes, before one that does nothing ends all; None lets
            them wait.

    Raises:
        InputError: the device is not there, or the environment asks for kernels that do not exist.
    """
    chosen = init_distributed(
        device or ("cuda" if torch.cuda.is_available() else "cpu"), timeout_minutes=timeout_minutes
    )
    start_logging()
    if timeout_minutes is not None:
        start_watchdog(timeout_minutes)
    torch.manual_seed(seed)
    if chosen.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in fp32
        # PyTorch's first choice on recent GPUs. Where it has no plan for a shape, it ends the run
        # instead of leaving the shape to FlashAttention. --attention_backend cudnn has it back.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if chosen.type == "cpu":
        _logger.info(
            "CPU: %s, threads: %d, large float32 layers by %s",
            *(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), cpu_linear()),
        )
    return chosen


def write_args(output_dir: Path, args: dict) -> dict[str, str]:
    """Record a start in `args.json`: arguments, versions, commit, command and time.

    The record of an earlier start is kept beside it under its own time.

    Raises:
        InputError: the folder cannot be made or written.
    """
    start = {"time": time.strftime(TIME_FORMAT), "command": sys.argv, "versions": versions()}
    if not is_main_process():
        return start["versions"]
    path = output_dir / "args.json"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, {**start, "args": args})
    except OSError as error:
        raise InputError(f"cannot write {path} ({error}): choose another --output_dir") from error
    return start["versions"]


def write_json(path: Path, content: dict, *, keep_earlier: bool = True) -> None:
    """Write a record; an earlier one is kept beside it under its own time, or replaced.

    Raises:
        OSError: it cannot be written; the earlier one is as it was.
    """
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    if keep_earlier and path.exists():
        when = time.strftime(TIME_FORMAT, time.localtime(path.stat().st_mtime))
        path.rename(path.with_name(f"{path.stem}-{when}{path.suffix}"))
    temporary.replace(path)


def run_main(
    main: Callable[[], None], *, trains: bool = False, memory_advice: str = "give it less at once"
) -> NoReturn:
    """Run a main and exit: 0, or 2 with one sentence for wrong input, 1 for a failed run.

    A signal that stopped the run gives its number and 128, as in a shell.

    Args:
        main: to run.
        trains: whether it saves and ends when it finds a signal; others are ended by it at once.
        memory_advice: what to change where the device runs out of memory.
    """
    try:
        # Noted until all is told, because torchrun ends all processes as soon as one has ended.
        with deferred_signals() if trains else nullcontext():
            code = exit_code(main, memory_advice)
    finally:
        end_loaders()
        stop_watchdog()
        stop_processes()
    sys.exit(code)


def exit_code(main: Callable[[], None], memory_advice: str) -> int:
    """Run a main and tell how it ended; of several processes that fail, one tells why."""
    try:
        main()
    except StoppedError as error:
        _logger.info("%s", error)
        return 128 + error.signal
    except Exception as error:
        if is_out_of_memory(error):
            error = InputError(out_of_memory_message(error, memory_advice))
        message = failure(error)
        death = None if message else dead_loader(error, seconds=1)
        message = message or death or lost_process(error)
        if message is None:
            claim_report()  # the traceback does
            raise
        wrong_input = isinstance(error, InputError) or getattr(error, "errno", None) in BAD_PATH
        program = Path(sys.argv[0]).name
        if not is_main_process():
            # If the main process fails too, it says so meanwhile.
            time.sleep(SECONDS_BEFORE_SPEAKING)
            program += f" (process {rank()})"
        if claim_report():
            with suppress(OSError):
                sys.stdout.flush()
            sys.stderr.write(f"{program}: error: {one_line(message)}\n")
            sys.stderr.flush()
        if death:  # cleaning up after it may wait for a lock that it held
            end_loaders()
            os._exit(1)
        return 2 if wrong_input else 1
    return 0


def failure(error: Exception) -> str | None:
    """What an error tells the user; None for one that may be a fault of the program."""
    if isinstance(error, InputError | RunError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{error}: make room and start the same command again"
    if isinstance(error, OSError) and error.errno in BAD_PATH:
        return f"{error}: correct this path, or who may read and write there"
    return None
