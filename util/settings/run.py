"""Settings and flags of a run: device, output, resume, logging."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from util.arguments import (
    natural_float,
    natural_int,
    positive_float,
    positive_int,
    seed_number,
    thread_count,
)
from util.errors import InputError

MAX_MINUTES = 10**7
TIMEOUT_MINUTES = 30.0  # default for how long processes wait for each other


@dataclass(frozen=True)
class RunSettings:
    """Settings for device, output, resume and logging of a run; see the flags.

    Raises:
        InputError: two settings say where to begin.
    """

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
    init_from: str | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.init_from and self.resume not in ("auto", "none"):
            raise InputError(
                "--init_from starts a new run and --resume PATH continues one: leave one out"
            )

    @property
    def folder(self) -> Path:
        """Folder of checkpoints, logs and figures."""
        return Path(self.output_dir)

    @property
    def log_folder(self) -> Path:
        """Folder of TensorBoard's logs: OUTPUT_DIR, unless an older version used one inside it."""
        older = self.folder / "tensorboard"
        return Path(self.log_dir or (older if older.is_dir() else self.folder))


def minutes(text: str) -> float:
    """Minutes above 0 that clocks can count."""
    value = positive_float(text)
    if value > MAX_MINUTES:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_MINUTES}, not {text}")
    return value


def add_run_args(
    parser: argparse.ArgumentParser,
    *,
    output_dir: str,
    save_every: int = 20,
    has_init_from: bool = False,
) -> None:
    """Add the flags of RunSettings; `has_init_from` adds that of pre-training, too."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir",
        default=output_dir,
        help="folder for checkpoints, logs and figures (%(default)s)",
    )
    group.add_argument("--log_dir", help="folder for TensorBoard's files (OUTPUT_DIR)")
    group.add_argument("--device", help="cuda, cuda:N or cpu (cuda if available)")
    group.add_argument(
        "--num_threads",
        type=thread_count,
        help="CPU threads of each process, besides its loader's; the number changes the last bits "
        "of what a CPU computes (PyTorch's choice: OMP_NUM_THREADS, else the cores)",
    )
    group.add_argument(
        "--seed", type=seed_number, default=0, help="seed of all random numbers (%(default)s)"
    )
    if has_init_from:
        group.add_argument(
            "--init_from",
            metavar="PATH",
            help="weights that a new run starts from, with the decoder if it has the same layers: "
            "a pre-training checkpoint of this project or of the released CrossMAE or MAE code, or "
            "any encoder that main_finetune.py takes; a path, hf-hub:OWNER/NAME, or an https:// "
            "address (none: random weights)",
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
        type=minutes,
        default=TIMEOUT_MINUTES,
        help="end the run if a process makes no progress for this long, or has not joined the "
        "others by then (%(default)s)",
    )
