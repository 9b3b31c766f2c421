"""Start and end of a run: devices, logging, records of versions and arguments, exit codes."""

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
    escaped,
    is_out_of_memory,
    out_of_memory_message,
)
from util.kernels import cpu_linear

TIME_FORMAT = "%Y%m%d-%H%M%S"
REPORT_DELAY = 5  # seconds
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BAD_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """Settings for device, output, resume and logging of a run; see the flags."""

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
        """Folder of checkpoints, logs and figures."""
        return Path(self.output_dir)

    @property
    def log_folder(self) -> Path:
        """Folder of TensorBoard's logs."""
        return Path(self.log_dir or self.folder / "tensorboard")


def add_run_args(parser: argparse.ArgumentParser, *, output_dir: str, save_every: int = 20) -> None:
    """Add the flags of RunSettings."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir",
        default=output_dir,
        help="folder for checkpoints, logs and figures (%(default)s)",
    )
    group.add_argument("--log_dir", help="TensorBoard's folder (OUTPUT_DIR/tensorboard)")
    group.add_argument("--device", help="cuda, cuda:N or cpu (cuda if available)")
    group.add_argument(
        "--seed", type=seed_number, default=0, help="seed of all random numbers (%(default)s)"
    )
    group.add_argument(
        "--resume",
        default="auto",
        help="auto: continue from the newest readable checkpoint in OUTPUT_DIR, if there is one; a "
        "path: from that checkpoint, unless OUTPUT_DIR has its own; none: start from scratch, in a "
        "folder without checkpoints (%(default)s)",
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
        help="also save within epochs, at the first log point after this many minutes (off)",
    )
    group.add_argument(
        "--keep_last",
        type=natural_int,
        default=3,
        help="number of checkpoints to keep, 0 for all (%(default)s)",
    )
    group.add_argument(
        "--log_every", type=positive_int, default=20, help="steps between log points (%(default)s)"
    )
    group.add_argument(
        "--timeout_minutes",
        type=positive_float,
        default=TIMEOUT_MINUTES,
        help="end the run if a process makes no progress for this long (%(default)s)",
    )


class TerminalHandler(logging.Handler):
    """Log handler that prints to stdout without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        encoding = sys.stdout.encoding or "utf-8"
        # Not every encoding of a terminal has the characters of all file names.
        line = self.format(record).encode(encoding, "backslashreplace")
        with suppress(OSError):  # stdout may be a file on a full disk, which must not stop a run
            tqdm.write(line.decode(encoding), file=sys.stdout)
            sys.stdout.flush()


class LineFormatter(logging.Formatter):
    """Log formatter that writes a message in one line; a traceback keeps its lines."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line of a record, with unprintable characters escaped."""
        return escaped(super().formatMessage(record))


def start_logging() -> None:
    """Log to stdout; processes other than the main one log only warnings."""
    handler = TerminalHandler()
    handler.setFormatter(LineFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    for client in ("httpx", "httpx2"):  # of huggingface_hub, with a line for every request
        logging.getLogger(client).setLevel(logging.WARNING)


def log_lines(text: str) -> None:
    """Log a text of several lines, such as a table, line by line."""
    for line in text.split("\n"):
        _logger.info("%s", line)


def git_commit() -> str:
    """Commit of this code, with "+" for local changes; "unknown" without a repository.

    The environment variable COMMIT takes precedence, for copies of the code without a repository.
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
    """Collect what a result depends on besides its arguments: commit, versions and kernels.

    Raises:
        InputError: the environment requests an unknown kernel.
    """
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a TorchVersion is not a plain value
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_linear": cpu_linear(),
    }


def start_run(
    *, device: str | None, seed: int, timeout_minutes: float | None = None
) -> torch.device:
    """Set up processes and logging, and seed the initialization; return the device.

    Args:
        device: None: the GPU if there is one, else the CPU.
        timeout_minutes: with several processes, how long one may make no progress before the run
            is ended; None: no watchdog.

    Raises:
        InputError: the device is not available, or the environment requests an unknown kernel.
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
        # cuDNN's attention is PyTorch's first choice on recent GPUs. If it has no plan for a shape,
        # it raises an error instead of falling back to FlashAttention. --attention_backend cudnn
        # enables it again.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if chosen.type == "cpu":
        _logger.info(
            "CPU: %s, threads: %d, large float32 layers by %s",
            *(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), cpu_linear()),
        )
    return chosen


def write_args(output_dir: Path, args: dict, data: dict | None) -> dict[str, str]:
    """Record a start in `args.json`: arguments, versions, commit, command, time and images.

    An earlier start's record is renamed to include its time.

    Raises:
        InputError: the folder cannot be created or written to.
    """
    start = {"time": time.strftime(TIME_FORMAT), "command": sys.argv, "versions": versions()}
    if not is_main_process():
        return start["versions"]
    path = output_dir / "args.json"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, {**start, "args": args, "data": data})
    except OSError as error:
        raise InputError(f"cannot write {path} ({error}): choose another --output_dir") from error
    return start["versions"]


def write_json(path: Path, content: dict, *, keep_earlier: bool = True) -> None:
    """Write a JSON file; an earlier one is renamed to include its time, or replaced.

    Raises:
        OSError: the write failed; the earlier file is unchanged.
    """
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    if keep_earlier:
        set_aside(path)
    temporary.replace(path)


def set_aside(path: Path) -> None:
    """Rename a file that exists to include its time."""
    if path.exists():
        when = time.strftime(TIME_FORMAT, time.localtime(path.stat().st_mtime))
        path.rename(path.with_name(f"{path.stem}-{when}{path.suffix}"))


def run_main(
    main: Callable[[], None], *, trains: bool = False, memory_advice: str = "use fewer images"
) -> NoReturn:
    """Run a main and exit: 0, or 2 with one sentence for wrong input, 1 for a failed run.

    A run stopped by a signal exits with 128 plus its number, as in a shell.

    Args:
        trains: the main saves and stops on a signal; otherwise a signal ends it at once.
        memory_advice: what to change if the device runs out of memory.
    """
    try:
        # Deferred until the error is reported: torchrun signals all processes once one has ended.
        with deferred_signals() if trains else nullcontext():
            code = exit_code(main, memory_advice)
    finally:
        end_loaders()
        stop_watchdog()
        stop_processes()
    sys.exit(code)


def exit_code(main: Callable[[], None], memory_advice: str) -> int:
    """Run a main and return its exit code; if several processes fail, only one reports why."""
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
            claim_report()  # the traceback is the report
            raise
        wrong_input = isinstance(error, InputError) or getattr(error, "errno", None) in BAD_PATH
        program = Path(sys.argv[0]).name
        if not is_main_process():
            # If the main process fails too, it reports first.
            time.sleep(REPORT_DELAY)
            program += f" (process {rank()})"
        if claim_report():
            with suppress(OSError):
                sys.stdout.flush()
            sys.stderr.write(f"{program}: error: {escaped(message)}\n")
            sys.stderr.flush()
        if death:  # normal cleanup may wait for a lock that the dead process held
            end_loaders()
            os._exit(1)
        return 2 if wrong_input else 1
    return 0


def failure(error: Exception) -> str | None:
    """Message for an expected error; None for a likely bug."""
    if isinstance(error, InputError | RunError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{error}: free disk space and start the same command again"
    if isinstance(error, OSError) and error.errno in BAD_PATH:
        return f"{error}: correct this path or its permissions"
    return None
