"""Logs of a run: progress, TensorBoard and `log.jsonl`."""

import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from util.compute.distributed import is_main_process
from util.errors import InputError, RunError, counted
from util.progress import clock, on_terminal
from util.runs.checkpoint import Progress
from util.runs.epoch_log import EpochLog
from util.runs.files import replace_file, write_json
from util.runs.lock import FolderLock
from util.runs.rows import UNTRAINED, cells

RECENT = 100  # steps, and evaluations, whose time counts for the time left
PERIOD = 10.0  # seconds from the last line until a log point within an epoch is shown
SILENCE = 20.0  # seconds without a line, after which any step is
# TensorBoard's groups, in this order.
LEARNING, SPEED, HEALTH = "1_learning", "2_speed", "3_health"
HEALTH_OF_EPOCHS = ("grad_norm", "broken_images", "lr")

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


class StepClock:
    """Time of a run's steps, and of what comes between its epochs: evaluation and saves.

    Args:
        evaluated_every: epochs between evaluations, the last of which follows the last epoch; 0
            for none.
    """

    def __init__(self, num_epochs: int, steps_per_epoch: int, evaluated_every: int) -> None:
        self.num_epochs, self.steps_per_epoch = num_epochs, steps_per_epoch
        self.evaluated_every = evaluated_every
        self.first: float | None = None
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.evaluations: deque[float] = deque(maxlen=RECENT)
        self.last = time.monotonic()
        self.evaluates = False

    def start_epoch(self, epoch: int) -> None:
        """Start the steps after this many epochs; what came before is an evaluation, if one was."""
        now = time.monotonic()
        if self.evaluates:
            self.evaluations.append(now - self.last)
        self.last = now
        self.evaluates = self._is_evaluated(epoch + 1)

    def end_step(self) -> float:
        """Note that a step has ended, and return when."""
        now = time.monotonic()
        seconds, self.last = now - self.last, now
        if self.first is None:
            self.first = seconds  # it starts the loader, and compiles
        else:
            self.recent.append(seconds)
        return now

    def _is_evaluated(self, epoch: int) -> bool:
        every = self.evaluated_every
        return every > 0 and (epoch == self.num_epochs or epoch % every == 0)

    @property
    def seconds_per_step(self) -> float:
        """Mean time of the recent steps; the run's first counts only until there is another."""
        return sum(self.recent) / len(self.recent) if self.recent else self.first or 0.0

    def left(self, step: int, epoch: int) -> str:
        """Describe the time left, such as "12:30, 1:10 of it evaluation".

        Args:
            step: steps done in the run.
            epoch: epochs done.
        """
        training = (self.num_epochs * self.steps_per_epoch - step) * self.seconds_per_step
        to_come = sum(map(self._is_evaluated, range(epoch + 1, self.num_epochs + 1)))
        if not to_come:
            return clock(training)
        if not self.evaluations:
            return f"{clock(training)} and evaluation"
        evaluation = to_come * sum(self.evaluations) / len(self.evaluations)
        text = clock(training + evaluation)
        return f"{text}, {clock(evaluation)} of it evaluation" if evaluation >= 1 else text


class RunLog:
    """Logger of a run's progress and metrics: terminal, TensorBoard and `log.jsonl`.

    The terminal shows a row for each epoch. Within an epoch, it shows a bar, or a line every few
    seconds if it is no terminal. TensorBoard's scalars are over epochs, except for those named
    `..._by_step`; over steps if `in_steps`. Only the main process shows and writes anything.
    A full disk does not stop a run: lines of `log.jsonl` are written once there is space, while
    TensorBoard and figures are dropped.

    Args:
        output_dir: for `log.jsonl`, one line per epoch, and the latest of each figure.
        log_dir: for TensorBoard.
        epoch: complete epochs; later lines of an interrupted run are dropped.
        step: steps done; later TensorBoard points of an interrupted run are purged.
        device: its memory use is shown.
        unwritten: lines of `log.jsonl` that could not be written yet; checkpoints contain them.
        evaluated_every: epochs between evaluations, for the time left; 0 for none.
        in_steps: whether rows count steps, for runs whose epochs only say when they are evaluated.
        notes, at_start: see `util.runs.rows.cells`.
        lock: on `output_dir`, of the main process.

    Attributes:
        untrained: metrics before the first step, if any were measured.
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
        evaluated_every: int = 0,
        in_steps: bool = False,
        notes: Mapping[str, str] | None = None,
        at_start: str = UNTRAINED,
        lock: FolderLock | None = None,
    ) -> None:
        self.lock = lock
        self.notes, self.at_start = notes, at_start
        self.num_epochs, self.steps_per_epoch, self.device = num_epochs, steps_per_epoch, device
        self.output_dir, self.bar, self.in_steps = output_dir, None, in_steps
        self.start_time = self.window_time = self.last_line = time.monotonic()
        self.clock = StepClock(num_epochs, steps_per_epoch, evaluated_every)
        self.tensorboard = self.lines = None
        self.untrained: dict[str, float] = {}
        if is_main_process():
            try:
                self.tensorboard = SummaryWriter(log_dir, purge_step=step + 1)
            except UnicodeEncodeError:
                _logger.warning(
                    "TensorBoard is off, since it cannot write to %s, which is not UTF-8: give "
                    "another --log_dir",
                    log_dir,
                )
            except OSError as error:
                raise InputError(f"cannot write to --log_dir {log_dir}: {error}") from error
            self.lines = EpochLog(output_dir, epoch=epoch, step=step, unwritten=unwritten)
            self.untrained = self.lines.untrained

    def start(self, values: dict[str, float]) -> None:
        """Log what was measured before the first step; nothing if that is nothing."""
        if values and is_main_process():
            self.untrained = values
            self._add_line(values, epoch=0, step=0)
            self._show_row(values, epoch=0, step=0, remark=self.at_start)

    def start_epoch(self, epoch: int, step_in_epoch: int) -> None:
        """Open the progress bar of an epoch, counted from 0; a resumed epoch starts partway."""
        self.clock.start_epoch(epoch)
        self.window_time = self.clock.last
        if is_main_process() and on_terminal():
            what = "evaluation" if self.in_steps else "epoch"
            self.bar = tqdm(
                total=self.steps_per_epoch,
                initial=step_in_epoch,
                desc=f"{what} {epoch + 1}/{self.num_epochs}",
                unit="step",
                dynamic_ncols=True,
                leave=False,
            )

    def end_step(self, step: int, *, epoch: int, is_log_point: bool) -> None:
        """Show that a step is done, without waiting for the device.

        Args:
            step: steps done in the run.
            epoch: the current one, counted from 0.
            is_log_point: whether `log_step` follows, which knows more.
        """
        now = self.clock.end_step()
        if self.bar is not None:
            self.bar.update(step - epoch * self.steps_per_epoch - self.bar.n)
            if step == (epoch + 1) * self.steps_per_epoch:
                self._close_bar()  # makes room for that of an evaluation
        elif now - self.last_line >= SILENCE and not is_log_point:
            seconds = f"{self.clock.seconds_per_step:.3g} s a step"
            self._show_step(step, epoch, [seconds, f"ETA {self.clock.left(step, epoch)}"])

    def end_micro_step(self, progress: Progress, done: int, total: int) -> None:
        """Show that this many micro-steps of a step are done, if nothing was shown for long.

        Args:
            progress: of the run before the step.
        """
        if self.bar is None and time.monotonic() - self.last_line >= SILENCE:
            texts = [f"{done} of {counted(total, 'micro-step')}"]
            if self.clock.first is not None:
                texts.append(f"ETA {self.clock.left(progress.step, progress.epoch)}")
            self._show_step(progress.step + 1, progress.epoch, texts)

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
        seconds, self.window_time = max(1e-9, now - self.window_time), now
        images_per_s, data_wait = num_images / seconds, data_seconds / seconds
        memory = peak_memory_gb(self.device)
        shown = {
            "loss": f"{stats['loss']:.4f}",
            "lr": f"{lr:.2e}" if lr else "0, where the warm-up starts",
            "images/s": f"{images_per_s:.0f}",
            "waiting for data": f"{data_wait:.0%}",
            "memory": f"{memory:.1f} GiB",
            "ETA": self.clock.left(step, epoch),
        }
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
        elif now - self.last_line >= PERIOD and step < (epoch + 1) * self.steps_per_epoch:
            self._show_step(step, epoch, [f"{name} {value}" for name, value in shown.items()])
        self.log_scalars({"loss": stats["loss"], "lr": lr}, step, LEARNING, by_step=True)
        speed = {"images_per_s": images_per_s, "data_wait": data_wait, "memory_gib": memory}
        self.log_scalars(speed, step, SPEED, by_step=True)
        health = {name: value for name, value in stats.items() if name != "loss"}
        self.log_scalars(health, step, HEALTH, by_step=True)

    def log_scalars(
        self, values: Mapping[str, float], x: int, group: str, *, by_step: bool = False
    ) -> None:
        """Add TensorBoard scalars.

        Args:
            x: epochs done, or steps if `in_steps`.
            group: such as LEARNING.
            by_step: x is always steps, and the names say so.
        """
        with self._writing_tensorboard() as tensorboard:
            for name, value in values.items() if tensorboard else ():
                tag = f"{group}/{name}_by_step" if by_step else f"{group}/{name}"
                tensorboard.add_scalar(tag, value, x)

    def log_image(self, name: str, image: np.ndarray, x: int) -> None:
        """Add an image, uint8 (H, W, 3), to TensorBoard, and save the latest as `<name>.png`.

        Args:
            x: epochs done, or steps if `in_steps`.
        """
        if not is_main_process():
            return
        with self._writing_tensorboard() as tensorboard:
            if tensorboard:
                tensorboard.add_image(name, image, x, dataformats="HWC")
        self._keep_lock()
        path = self.output_dir / f"{name}.png"
        try:
            replace_file(path, partial(Image.fromarray(image).save, format="PNG"))
        except OSError as error:
            _logger.warning("could not save %s: %s", path, error)

    def save_json(self, name: str, content: dict) -> None:
        """Save the latest of some results as `<name>.json`."""
        self._keep_lock()
        path = self.output_dir / f"{name}.json"
        try:
            write_json(path, content, keep_earlier=False)
        except OSError as error:
            _logger.warning("could not save %s: %s", path, error)

    def _keep_lock(self) -> None:
        if self.lock is not None:
            self.lock.keep()

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
        self._close_bar()
        if is_main_process():
            self._add_line(values, epoch=epoch, step=step)
            beside = {f"untrained_{name}": value for name, value in self.untrained.items()}
            self._show_row({**values, **beside}, epoch=epoch, step=step)

    def _add_line(self, values: dict[str, float | int], *, epoch: int, step: int) -> None:
        """Add metrics over epochs to `log.jsonl` and TensorBoard."""
        self._keep_lock()
        seconds = round(time.monotonic() - self.start_time, 1)  # since this start
        self.lines.add({"epoch": epoch, "step": step, **values, "seconds": seconds})
        health = {name: value for name, value in values.items() if name in HEALTH_OF_EPOCHS}
        rest = {name: value for name, value in values.items() if name not in health}
        x = step if self.in_steps else epoch
        self.log_scalars(rest, x, LEARNING)
        self.log_scalars(health, x, HEALTH)

    def _show_row(
        self, values: Mapping[str, float], *, epoch: int, step: int, remark: str = ""
    ) -> None:
        """Log the row of an epoch; its last column is the time since this start."""
        texts = cells(values, self.notes, at_start=self.at_start)
        self.last_line = time.monotonic()
        elapsed = clock(self.last_line - self.start_time)
        row = [self._place(epoch, step), *filter(None, [remark]), *texts, elapsed]
        _logger.info("%s", "  ".join(row))

    def _place(self, epoch: int, step: int) -> str:
        """Return where in the run a row is."""
        if not self.in_steps:
            return f"epoch {epoch:{len(str(self.num_epochs))}}/{self.num_epochs}"
        steps = f"{self.num_epochs * self.steps_per_epoch:,}"
        return f"step {step:{len(steps)},}/{steps}"

    def _show_step(self, step: int, epoch: int, texts: Sequence[str]) -> None:
        """Log a line within an epoch."""
        if not is_main_process():
            return
        self.last_line = time.monotonic()
        place = self._place(epoch, step)
        if not self.in_steps:
            step_in_epoch = step - epoch * self.steps_per_epoch
            place = f"{self._place(epoch + 1, step)}, step {step_in_epoch}/{self.steps_per_epoch}"
        _logger.info("%s: %s", place, ", ".join(texts))

    def close(self) -> None:
        """Finish writing.

        Raises:
            RunError: `log.jsonl` is incomplete; the last checkpoint has the missing lines.
        """
        self._close_bar()
        with self._writing_tensorboard() as tensorboard:
            if tensorboard:
                tensorboard.close()
        if self.lines is None:
            return
        if self.lines.unwritten:
            self._keep_lock()
            self.lines.write()
        if self.lines.unwritten:
            epochs = counted(len(self.lines.unwritten), "epoch")
            raise RunError(
                f"{self.lines.path} lacks the lines of {epochs}, see above: free "
                "disk space and start the same command again"
            )

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
