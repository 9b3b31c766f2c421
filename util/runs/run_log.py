"""Logs of a run: progress, TensorBoard and `log.jsonl`."""

import json
import logging
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util.compute.distributed import is_main_process
from util.errors import InputError, RunError, counted
from util.runs.run import write_json

LOG_NAME = "log.jsonl"

T = TypeVar("T")

_logger = logging.getLogger(__name__)


class TimedIterator(Iterator[T]):
    """Iterator that measures the time spent waiting for items.

    Attributes:
        seconds: total wait; may be reset.
    """

    def __init__(self, items: Iterable[T]) -> None:
        self.items = iter(items)
        self.seconds = 0.0

    def __next__(self) -> T:
        start = time.monotonic()
        try:
            return next(self.items)
        finally:
            self.seconds += time.monotonic() - start


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far, in GiB: allocated on a GPU, otherwise resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def read_log(output_dir: Path) -> list[dict]:
    """Read a run's `log.jsonl`, one line per epoch; a truncated line is skipped."""
    path = output_dir / LOG_NAME
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


class RunLog:
    """Logger of a run's progress and metrics: terminal, TensorBoard and `log.jsonl`.

    On a terminal the progress is a bar, elsewhere a line at every log point. Only the main process
    shows and writes anything. A full disk does not stop a run: lines of `log.jsonl` are written
    once there is space, while TensorBoard and figures are dropped.

    Args:
        output_dir: for `log.jsonl`, one line per epoch, and the latest of each figure.
        log_dir: for TensorBoard.
        epoch: complete epochs; later lines of an interrupted run are dropped.
        step: steps done; later TensorBoard points of an interrupted run are purged.
        device: its memory use is shown.
        unwritten: lines of `log.jsonl` that could not be written yet; checkpoints contain them.
    """

    def __init__(
        self,
        output_dir: Path,
        log_dir: Path,
        *,
        num_epochs: int,
        steps_per_epoch: int,
        epoch: int,
        step: int,
        device: torch.device,
        unwritten: list[dict],
    ) -> None:
        self.unwritten = unwritten
        self.num_epochs, self.steps_per_epoch, self.device = num_epochs, steps_per_epoch, device
        self.output_dir, self.path = output_dir, output_dir / LOG_NAME
        self.bar = None
        self.first_step, self.start_time = step, time.monotonic()
        self.window_step, self.window_time = step, self.start_time
        self.tensorboard = None
        if is_main_process():
            try:
                self.tensorboard = SummaryWriter(log_dir, purge_step=step + 1)
            except OSError as error:
                raise InputError(f"cannot write to --log_dir {log_dir}: {error}") from error
            # Lines unwritten at the time of the checkpoint may have been written since.
            lines = {line["epoch"]: line for line in [*unwritten, *read_log(output_dir)]}
            kept = [line for number, line in sorted(lines.items()) if number <= epoch]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self.path)
            unwritten.clear()
            self.size = self.path.stat().st_size

    def start_epoch(self, epoch: int, step_in_epoch: int) -> None:
        """Open the progress bar of an epoch, counted from 0; a resumed epoch starts partway."""
        self.window_time = time.monotonic()
        if is_main_process() and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.steps_per_epoch,
                initial=step_in_epoch,
                desc=f"epoch {epoch + 1}/{self.num_epochs}",
                unit="step",
                dynamic_ncols=True,
                leave=False,
            )

    def log_step(
        self,
        step: int,
        *,
        epoch: int,
        lr: float,
        num_images: int,
        data_seconds: float,
        stats: dict[str, float],
    ) -> None:
        """Show the progress and metrics at a log point.

        Args:
            step: steps done in the run.
            epoch: the current one, counted from 0.
            num_images: over all processes, since the last call.
            data_seconds: time that this process waited for its loader since the last call.
            stats: means since the last call.
        """
        if not is_main_process():
            return
        now = time.monotonic()
        seconds = max(1e-9, now - self.window_time)
        images_per_s, data_wait = num_images / seconds, data_seconds / seconds
        seconds_per_step = (now - self.start_time) / max(1, step - self.first_step)
        steps_left = self.num_epochs * self.steps_per_epoch - step
        shown = {
            "loss": f"{stats['loss']:.4f}",
            "lr": f"{lr:.2e}",
            "images/s": f"{images_per_s:.0f}",
            "waiting for data": f"{data_wait:.0%}",
            "ETA": str(timedelta(seconds=round(steps_left * seconds_per_step))),
            "memory": f"{peak_memory_gb(self.device):.1f} GiB",
        }
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.window_step)
        else:
            text = ", ".join(f"{name} {value}" for name, value in shown.items())
            step_in_epoch = step - epoch * self.steps_per_epoch
            _logger.info(
                "epoch %d/%d step %d/%d: %s",
                *(epoch + 1, self.num_epochs, step_in_epoch, self.steps_per_epoch, text),
            )
        speed = {"images_per_s": images_per_s, "data_wait": data_wait}
        self.log_scalars({**stats, "lr": lr, **speed}, step, "train")
        self.window_step, self.window_time = step, now

    def log_scalars(self, values: dict[str, float], step: int, group: str) -> None:
        """Add TensorBoard scalars at a step of the run."""
        with self._writing_tensorboard() as tensorboard:
            for name, value in values.items() if tensorboard else ():
                tensorboard.add_scalar(f"{group}/{name}", value, step)

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Add an image, uint8 (H, W, 3), to TensorBoard, and save the latest as `<name>.png`."""
        if not is_main_process():
            return
        with self._writing_tensorboard() as tensorboard:
            if tensorboard:
                tensorboard.add_image(name, image, step, dataformats="HWC")
        path = self.output_dir / f"{name}.png"
        temporary = path.with_suffix(".tmp")
        try:
            Image.fromarray(image).save(temporary, format="PNG")
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            _logger.warning("could not save %s: %s", path, error)

    def save_json(self, name: str, content: dict) -> None:
        """Save the latest of some results as `<name>.json`."""
        path = self.output_dir / f"{name}.json"
        try:
            write_json(path, content, keep_earlier=False)
        except OSError as error:
            _logger.warning("could not save %s: %s", path, error)

    @contextmanager
    def _writing_tensorboard(self) -> Iterator[SummaryWriter | None]:
        # The writer's thread ends at its first error; later calls raise that error.
        try:
            yield self.tensorboard
        except OSError as error:
            self.tensorboard = None
            _logger.warning(
                "cannot write to --log_dir (%s): TensorBoard is off until the next start", error
            )

    def end_epoch(self, values: dict[str, float | int], *, epoch: int, step: int) -> None:
        """Close the bar; write the epoch's metrics to `log.jsonl`, TensorBoard and the log.

        Args:
            epoch: epochs done.
            step: steps done in the run.
        """
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if is_main_process():
            seconds = round(time.monotonic() - self.start_time, 1)  # since this start
            line = {"epoch": epoch, "step": step, **values, "seconds": seconds}
            self.unwritten.append(line)
            self._write_lines()
            numbers = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
            _logger.info("epoch %d/%d done: %s", epoch, self.num_epochs, numbers)
            self.log_scalars(values, step, "epoch")

    def close(self) -> None:
        """Finish writing.

        Raises:
            RunError: `log.jsonl` is incomplete; the last checkpoint has the missing lines.
        """
        if self.bar is not None:
            self.bar.close()
        with self._writing_tensorboard() as tensorboard:
            if tensorboard:
                tensorboard.close()
        if self.unwritten:
            self._write_lines()
        if self.unwritten:
            epochs = counted(len(self.unwritten), "epoch")
            raise RunError(
                f"{self.path} lacks the lines of {epochs}, see above: free "
                "disk space and start the same command again"
            )

    def _write_lines(self) -> None:
        try:
            with self.path.open("a") as file:
                # Removes a line that an earlier attempt left half-written.
                file.truncate(min(file.tell(), self.size))
                file.writelines(json.dumps(line) + "\n" for line in self.unwritten)
        except OSError as error:
            _logger.warning(
                "could not write %s: %s. %s will be written once there is space",
                *(self.path, error, counted(len(self.unwritten), "line")),
            )
        else:
            self.size = self.path.stat().st_size
            self.unwritten.clear()
