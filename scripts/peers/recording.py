"""Flags and records that the scripts here share; it imports nothing that takes seconds."""

import argparse
import json
import logging
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from util.arguments import (
    Parser,
    positive_float,
    positive_int,
    process_count,
    seed_number,
    thread_count,
)
from util.errors import InputError
from util.runs.epoch_log import LOG_NAME
from util.runs.files import set_aside

_logger = logging.getLogger(__name__)


def parse_peer_args(
    argv: Sequence[str] | None,
    description: str,
    *,
    batch_size: int,
    num_workers: int,
    lr: str,
) -> argparse.Namespace:
    """Read and check the command line, which is the same for all peers.

    Args:
        batch_size, num_workers: the recipe's, which are the defaults.
        lr: the recipe's learning rate, for the help.
    """
    parser = Parser(description=description)
    add = parser.add_argument
    add("--data_path", type=Path, required=True, help="folder with class folders in train/")
    add("--output_dir", type=Path, required=True, help="folder for log.jsonl and encoders")
    add("--epochs", type=positive_int, required=True, help="passes over the images")
    add("--seed", type=seed_number, default=0, help="of weights, crops and masks (%(default)s)")
    add("--num_threads", type=thread_count, default=1, help="CPU threads (%(default)s)")
    add(
        "--save_every",
        type=positive_int,
        default=10,
        help="epochs from one kept encoder to the next; the last is always kept (%(default)s)",
    )
    add(
        "--batch_size",
        type=positive_int,
        default=batch_size,
        help="images per step (%(default)s, the recipe's)",
    )
    add(
        "--num_workers",
        type=process_count,
        default=num_workers,
        help="processes that load images, 0 for none (%(default)s, the recipe's)",
    )
    add("--lr", type=positive_float, help=f"peak learning rate ({lr}, the recipe's)")
    args = parser.parse_args(argv)
    if not (args.data_path / "train").is_dir():
        raise InputError(f"{args.data_path} has no folder train: correct --data_path")
    return args


class EpochRecorder:
    """Writes a line of `log.jsonl` per epoch, and says where to save which encoders.

    Args:
        folder: of the run; the log of an earlier one is renamed to include its time.
        epochs: of the whole run.
        save_every: epochs from one kept encoder to the next.
    """

    def __init__(self, folder: Path, *, epochs: int, save_every: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        set_aside(folder / LOG_NAME)
        self.folder, self.epochs, self.save_every = folder, epochs, save_every
        self.epoch = 0
        self.started = self.seconds = 0.0

    def start(self) -> None:
        """Start the clock: imports, model and list of images are done."""
        self.started = time.perf_counter()

    def end_epoch(self, *, step: int, loss: float, num_images: int) -> Path | None:
        """Write an epoch's line; return the path of its encoder, None if it is not kept.

        Args:
            step: steps since the start of the run.
            loss: mean over the epoch.
            num_images: that were trained on in the epoch.
        """
        self.epoch += 1
        before, self.seconds = self.seconds, time.perf_counter() - self.started
        line = {
            "epoch": self.epoch,
            "step": step,
            "loss": loss,
            "seconds": self.seconds,
            "images": num_images,
            "images_per_second": num_images / (self.seconds - before),
            # Of this process, without those that load images; Linux has it in KiB.
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        with (self.folder / LOG_NAME).open("a") as file:
            file.write(json.dumps(line) + "\n")
        _logger.info(
            "epoch %d: loss %.4f, %.0f s since the start, %.1f images/s",
            *(self.epoch, loss, self.seconds, line["images_per_second"]),
        )
        is_kept = self.epoch % self.save_every == 0 or self.epoch == self.epochs
        return self.folder / f"encoder-e{self.epoch:04}" if is_kept else None


def keep(path: Path, save: Callable[[Path], object]) -> None:
    """Save an encoder under another name first, so that `path` never holds half of one.

    Args:
        path: of a file or a folder, which may be left from a run that was stopped.
        save: writes to the path that it gets.
    """
    part = path.with_name(f"{path.name}.part")
    save(part)
    if path.is_dir():
        shutil.rmtree(path)
    part.replace(path)
