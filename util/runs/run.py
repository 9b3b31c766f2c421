"""Start and end of a run: devices, logging, records of versions and arguments, exit codes."""

import atexit
import errno
import gc
import logging
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import timm
import torch
import torchvision
from tqdm import tqdm

from util.compute.distributed import (
    has_joined,
    init_distributed,
    is_joining,
    is_main_process,
    rank,
    stop_processes,
)
from util.compute.launchers import is_first, stopped_with_launcher
from util.compute.out_of_memory import is_out_of_memory, out_of_memory_message
from util.compute.shared_memory import shared_memory_is_full, shared_memory_message
from util.compute.signals import SignalExit, defer_signals, handled_signals
from util.compute.watchdog import (
    await_report,
    claim_report,
    lost_process,
    start_watchdog,
    stop_watchdog,
)
from util.compute.worker_deaths import dead_loader, end_loaders, kill_loaders, release_loaders
from util.data.jpeg import CPU, decoder_on
from util.errors import InputError, RunError, StoppedError, escaped
from util.kernels import cpu_linear
from util.runs.files import TIME_FORMAT, write_json
from util.runs.log_file import LineFormatter, LogFile, write_to_log_file
from util.terminal import keep_streams

REPORT_DELAY = 5  # seconds
CPU_INFO = Path("/proc/cpuinfo")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BAD_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
BAD_PATH += (errno.EACCES, errno.EPERM)

_logger = logging.getLogger(__name__)


class TerminalHandler(logging.Handler):
    """Log handler that prints to stdout without breaking a progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(LineFormatter("%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        encoding = sys.stdout.encoding or "utf-8"
        # Not every encoding of a terminal has the characters of all file names.
        line = self.format(record).encode(encoding, "backslashreplace")
        with suppress(OSError):  # stdout may be a file on a full disk, which must not stop a run
            tqdm.write(line.decode(encoding), file=sys.stdout)
            sys.stdout.flush()


def start_logging() -> None:
    """Log to stdout, and keep the log for a file; other processes only print their warnings."""
    root = logging.getLogger()
    root.handlers = [TerminalHandler(), LogFile()] if is_main_process() else [TerminalHandler()]
    root.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    logging.captureWarnings(True)
    threading.excepthook = _report_thread
    for client in ("httpx", "httpx2"):  # of huggingface_hub, with a line for every request
        logging.getLogger(client).setLevel(logging.WARNING)


def _report_thread(end: threading.ExceptHookArgs) -> None:
    """Print a thread's error, but not that of TensorBoard's: its next call raises it again."""
    if not type(end.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(end)


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


def libraries() -> dict[str, str]:
    """Versions and kernels of the libraries that compute; with others the last bits may differ.

    Raises:
        InputError: the environment requests an unknown kernel or decoder.
    """
    return {
        "torch": str(torch.__version__),  # a TorchVersion is not a plain value
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_linear": cpu_linear(),
        "jpeg_decoder": decoder_on(CPU).name,
    }


def versions() -> dict[str, str]:
    """Collect what a result depends on besides its arguments: commit, versions and kernels.

    Raises:
        InputError: see `libraries`.
    """
    return {"commit": git_commit(), "python": platform.python_version(), **libraries()}


def device_name(device: torch.device) -> str:
    """Name of the GPU or, if the system says it, of the processor that a run computes on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    with suppress(OSError):  # not Linux
        found = re.search(r"^model name\s*: (.+)$", CPU_INFO.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return f"CPU ({platform.machine()})"


def start_run(
    *,
    device: str | None,
    seed: int,
    timeout_minutes: float | None = None,
    num_threads: int | None = None,
) -> torch.device:
    """Set up processes and logging, and seed the initialization; return the device.

    Args:
        device: None: the GPU if there is one, else the CPU.
        timeout_minutes: with several processes, how long one may make no progress before the run
            is ended; None: no watchdog.
        num_threads: CPU threads of this process; None: as many as before, first PyTorch's choice.

    Raises:
        InputError: the device is not available, or the environment requests an unknown kernel or
            decoder.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
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
        cpu_linear()  # refuses an unknown kernel before anything is read
    decoder_on(CPU)  # likewise an unknown decoder
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


def run_main(main: Callable[[], None], *, memory_advice: str = "use fewer images") -> NoReturn:
    """Run a main and exit: 0, or 2 with one sentence for wrong input, 1 for a failed run.

    A program that a signal ended exits with 128 plus its number, as in a shell. A run that trains
    saves before.

    Args:
        memory_advice: what to change if the device runs out of memory.
    """
    keep_streams()
    # Otherwise the interpreter searches all that was imported for garbage, for seconds.
    atexit.register(gc.freeze)
    try:
        with handled_signals(kill_loaders):
            try:
                code = exit_code(main, memory_advice)
            except SignalExit as end:
                code = end.code
                defer_signals()
                if _may_say_what_stopped():
                    if sys.stderr.isatty():  # which shows ^C, or the rest of a progress bar
                        sys.stderr.write("\n")
                    report_end(f"{Path(sys.argv[0]).name}: stopped {end.cause}")
                release_loaders(end)
    finally:
        end_loaders()
        stop_watchdog()
        stop_processes()
    sys.exit(code)


def _may_say_what_stopped() -> bool:
    """Whether this process reports a signal, which usually all processes of a run get."""
    if is_joining():
        return claim_report()
    return (is_main_process() and claim_report()) if has_joined() else is_first()


def exit_code(main: Callable[[], None], memory_advice: str) -> int:
    """Run a main and return its exit code; if several processes fail, only one reports why."""
    try:
        with stopped_with_launcher(kill_loaders):
            main()
    except StoppedError as error:
        _logger.info("%s", error)
        release_loaders(error)
        return 128 + error.signal
    except Exception as error:
        # Report first: torchrun signals all processes once one has ended.
        defer_signals()
        if is_out_of_memory(error):
            error = InputError(out_of_memory_message(error, memory_advice))
        message = failure(error)
        death = None if message else dead_loader(error, seconds=1)
        message = message or death or lost_process(error)
        if message is None:
            claim_report()  # the traceback is the report
            write_to_log_file(f"{Path(sys.argv[0]).name}: error:", error=error)
            raise
        wrong_input = isinstance(error, InputError) or getattr(error, "errno", None) in BAD_PATH
        program = Path(sys.argv[0]).name
        if not is_main_process():
            # If the main process fails too, it reports first.
            await_report(REPORT_DELAY)
            program += f" (process {rank()})"
        if claim_report():
            report_end(f"{program}: error: {escaped(message)}")
        if death:  # normal cleanup may wait for a lock that the dead process held
            end_loaders()
            os._exit(1)
        return 2 if wrong_input else 1
    return 0


def report_end(sentence: str) -> None:
    """Print why the program ends, as the last line of its screen and of its log."""
    sys.stdout.flush()
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()
    write_to_log_file(sentence)


def failure(error: Exception) -> str | None:
    """Message for an expected error; None for a likely bug."""
    if isinstance(error, InputError | RunError):
        return str(error)
    if shared_memory_is_full(error):
        return shared_memory_message()
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return f"{error}: free disk space and start the same command again"
    if isinstance(error, OSError) and error.errno in BAD_PATH:
        return f"{error}: correct this path or its permissions"
    return None
