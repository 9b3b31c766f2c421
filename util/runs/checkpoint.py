"""Checkpoints: written atomically, read without running code, resumed exactly.

A checkpoint is a dict of tensors and plain values. It contains the progress of the run instead of
random state, because everything random is derived from the progress (`util.seeding`).
"""

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from timm.utils import ModelEmaV3
from torch.optim import Optimizer

from util.compute.distributed import all_gather_objects, broadcast_object, is_main_process
from util.compute.precision import Precision
from util.compute.sharding import gather_state, load_model_state, load_optimizer_state
from util.compute.signals import stop_request
from util.compute.watchdog import activity
from util.compute.worker_deaths import dead_loader
from util.data.broken_images import BrokenImages
from util.errors import RunError, StoppedError, counted
from util.runs.files import replace_file
from util.runs.lock import FolderLock
from util.runs.meters import EpochMeters
from util.weights.files import VERSION, check_format, read_weights_file

NAME = re.compile(r"checkpoint-e(\d+)-s(\d+)\.pth")
BEST_NAME = "checkpoint-best.pth"

_logger = logging.getLogger(__name__)


class Best(NamedTuple):
    """How the best epoch is chosen: by a metric, and among equals by the lower validation loss."""

    metric: str
    lowest: bool = False

    def rank(self, stats: dict[str, float]) -> tuple[float, float]:
        """Return what is highest in the best epoch."""
        value = stats[self.metric]
        return -value if self.lowest else value, -stats.get("val_loss", 0.0)


@dataclass
class Progress:
    """Number of epochs and steps done so far in a run."""

    epoch: int = 0
    """Complete epochs."""
    step_in_epoch: int = 0
    """Optimizer steps in the current epoch."""
    step: int = 0
    """Optimizer steps in the run."""
    best: dict[str, float] | None = None
    """Metrics of the best epoch, in runs that track it."""

    def describe(self) -> str:
        """Describe what is done, such as "1 epoch and 20 steps"."""
        return f"{counted(self.epoch, 'epoch')} and {counted(self.step_in_epoch, 'step')}"


@dataclass
class TrainState:
    """Everything that a training step changes."""

    model: nn.Module
    optimizer: Optimizer
    precision: Precision
    broken: BrokenImages
    ema: ModelEmaV3 | None = None
    lr: float = 0.0
    """Learning rate of the last step; not saved."""
    unwritten: list[dict] = field(default_factory=list)
    """Lines of `log.jsonl` that could not be written yet because the disk was full."""
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        skips_steps = self.precision.scaler.is_enabled()
        self.meters = EpochMeters(self.precision.device, skips_steps=skips_steps)

    def state_dict(self) -> dict:
        """Tensors and plain values for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "progress": asdict(self.progress),
            "meters": self.meters.state_dict(),
            "broken": self.broken.state_dict(),
            "unwritten": list(self.unwritten),
        }

    def load_state_dict(self, content: dict) -> None:
        """Restore the state from a checkpoint.

        Raises:
            AttributeError, LookupError, RuntimeError, TypeError, ValueError: the checkpoint is of
                another model or was not written by `state_dict`.
        """
        load_model_state(self.model, content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        groups = self.optimizer.param_groups
        settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        load_optimizer_state(self.optimizer, content["optimizer"])
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)  # settings come from the command, never from a file
        for parameter, state in self.optimizer.state.items():
            if any(t.ndim and t.shape != parameter.shape for t in state.values()):
                raise ValueError("the shapes of optimizer state and weights differ")
        if self.precision.scaler.is_enabled() and content["scaler"]:
            self.precision.scaler.load_state_dict(content["scaler"])
        progress = asdict(Progress(**content["progress"]))
        counts = [number for name, number in progress.items() if name != "best"]
        best = (progress["best"] or {}).values()
        counts_fit = all(isinstance(n, int) and 0 <= n < 2**53 for n in counts)
        if not counts_fit or not all(isinstance(n, int | float) for n in best):
            raise ValueError(f"invalid progress {progress}")
        vars(self.progress).update(progress)
        self.meters.load_state_dict(content["meters"])
        self.broken.load_state_dict(content["broken"])
        lines = content.get("unwritten", [])
        if not all(isinstance(line, dict) and isinstance(line.get("epoch"), int) for line in lines):
            raise ValueError("log lines without an epoch")
        self.unwritten[:] = lines

    def end_epoch(self) -> dict[str, float]:
        """Move to the next epoch; return the mean metrics of the finished one."""
        means = {
            **self.meters.means(),
            "lr": self.lr,
            "broken_images": self.broken.take_count(),
        }
        self.meters.reset()
        self.progress.epoch, self.progress.step_in_epoch = self.progress.epoch + 1, 0
        return means

    def rewind_epoch(self) -> None:
        """Return to the start of the current epoch, for data that cannot start within one."""
        if self.progress.step_in_epoch:
            _logger.warning(
                "streamed images cannot be resumed within an epoch: the weights keep %s of epoch "
                "%d, and the epoch starts over",
                *(counted(self.progress.step_in_epoch, "step"), self.progress.epoch + 1),
            )
        self.progress.step -= self.progress.step_in_epoch
        self.progress.step_in_epoch = 0
        self.meters.reset()
        self.broken.take_count()


def read_checkpoint(path: str | Path, kind: str) -> dict:
    """Read a checkpoint of this program; `kind` is one of KINDS.

    Raises:
        InputError: the file is missing, damaged, or from another program or a newer version.
    """
    return check_format(read_weights_file(path), path, kind)


def checkpoint_name(epoch: int, step_in_epoch: int) -> str:
    """Name of the checkpoint of a position in a run."""
    return f"checkpoint-e{epoch:04d}-s{step_in_epoch:06d}.pth"


def checkpoint_position(path: Path) -> tuple[int, int] | None:
    """Parse (epoch, step in epoch) from a checkpoint's name; None for other files."""
    match = NAME.fullmatch(path.name)
    return match and (int(match[1]), int(match[2]))


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints in a folder, oldest first."""
    paths = filter(checkpoint_position, folder.glob("checkpoint-*.pth"))
    return sorted(paths, key=checkpoint_position)


def last_checkpoint(folder: Path, epoch: int) -> Path:
    """Return the final checkpoint of a finished run.

    Args:
        epoch: number of epochs in the run.

    Raises:
        RunError: it could not be written.
    """
    path = folder / checkpoint_name(epoch, 0)
    if path.is_file():
        return path
    paths = list(filter(Path.is_file, list_checkpoints(folder)))
    if not paths or checkpoint_position(paths[-1])[0] < epoch:
        raise RunError(
            "the last checkpoint could not be written, see above: free disk space and start the "
            "same command again to continue from the checkpoint before it"
        )
    return paths[-1]


class CheckpointWriter:
    """Checkpoint writer for a run, which writes from the main process.

    Args:
        state: the changing content, read at every save.
        header: the constant content: plain values stored with the state.
        kind: one of KINDS.
        every_epochs: epochs between saves of `end_epoch`.
        every_minutes: minutes between saves of `save_if_due`; None: only on signals.
        keep_last: number of checkpoints to keep, 0 for all; deletions are logged.
        lock: on the folder, of the main process.
    """

    def __init__(
        self,
        folder: Path,
        state: TrainState,
        header: dict,
        *,
        kind: str,
        every_epochs: int = 1,
        every_minutes: float | None,
        keep_last: int,
        lock: FolderLock | None = None,
    ) -> None:
        self.folder, self.state, self.lock = folder, state, lock
        self.every_epochs = every_epochs
        self.header = {"format": f"crossmae-{kind}", "version": VERSION, **header}
        self.every_minutes, self.keep_last = every_minutes, keep_last
        self.last_save = time.monotonic()
        self.not_deleted: set[Path] = set()
        if is_main_process():
            for unfinished in folder.glob("checkpoint-*.pth.tmp"):
                self._delete(unfinished, "left unfinished by an earlier start")

    def save_if_due(self) -> None:
        """Save if `every_minutes` have passed or a process received a stop signal.

        The main process's clock decides for all. Every process must call it.

        Raises:
            StoppedError: after a signal to any process, on all at once.
        """
        requests = [request for request in all_gather_objects([stop_request()]) if request]
        minutes = (time.monotonic() - self.last_save) / 60
        is_time = self.every_minutes is not None and minutes >= self.every_minutes
        if requests or broadcast_object(is_time):
            self.save()
        if requests:
            broadcast_object(None)  # launchers end all once one exits: wait for the save
            done = self.state.progress.describe()
            raise StoppedError(
                f"stopped {requests[0].cause} after {done}: "
                "start the same command again to continue",
                requests[0].signal,
            )

    def end_epoch(self, *, is_last: bool) -> None:
        """Save after the last epoch and every `every_epochs`; otherwise only if due.

        Raises:
            RunError, StoppedError: see `save` and `save_if_due`.
        """
        if is_last or self.state.progress.epoch % self.every_epochs == 0:
            self.save()
        else:
            self.save_if_due()

    def save(self) -> Path | None:
        """Write a checkpoint named after the progress of the run; return its path.

        A failed write, for instance on a full disk, is logged, leaves earlier checkpoints intact,
        and returns None.

        Raises:
            RunError: a weight is not finite; nothing is written.
        """
        self.last_save = time.monotonic()
        progress = self.state.progress
        name = checkpoint_name(progress.epoch, progress.step_in_epoch)
        path = self._write(self.folder / name, self.state.state_dict)
        if path:
            self._delete_old(path)
        return path

    def save_if_best(self, stats: dict[str, float], *, by: Best) -> None:
        """Save the weights that were measured, without the optimizer, if they are the best so far.

        Args:
            stats: metrics of the epoch that was just finished; without that of `by`, nothing is
                saved.
        """
        progress = self.state.progress
        before = progress.best
        known = before is not None and by.metric in before  # a run may change its metric
        if by.metric in stats and (not known or by.rank(stats) > by.rank(before)):
            progress.best = {"epoch": progress.epoch, **stats}
            written = self._write(self.folder / BEST_NAME, self._weights)
            if not broadcast_object(bool(written)):
                progress.best = before  # so that the next good epoch is saved

    def _weights(self) -> dict:
        """The weights that are measured: averaged ones, if there are any."""
        state = self.state.state_dict()
        return {"model": state["ema"] or state["model"], "progress": state["progress"]}

    def _write(self, path: Path, take_state: Callable[[], dict]) -> Path | None:
        state = gather_state(take_state())
        if not is_main_process():
            return None
        if self.lock is not None:
            self.lock.keep()
        bad = next(not_finite(state), None)
        if bad:
            raise RunError(
                f"{bad} is not finite after step {self.state.progress.step}, and nothing was "
                "saved: lower the learning rate, then continue from the last checkpoint"
            )
        try:
            with activity("saving"):
                content = {**self.header, **state}
                replace_file(path, lambda file: torch.save(content, file), durable=True)
        except (OSError, RuntimeError) as error:
            if dead_loader(error):
                raise
            while error.__context__:  # torch's errors hide the file's
                error = error.__context__
            _logger.warning("could not save %s: %s. Earlier checkpoints are intact", path, error)
            return None
        _logger.info("saved %s", path)
        return path

    def _delete_old(self, newest: Path) -> None:
        if self.keep_last == 0:
            return
        # A later name belongs to a damaged file that a resume skipped.
        last = checkpoint_position(newest)
        paths = [p for p in list_checkpoints(self.folder) if checkpoint_position(p) <= last]
        for path in paths[: -self.keep_last]:
            self._delete(path, f"--keep_last {self.keep_last}")

    def _delete(self, path: Path, why: str) -> None:
        """Delete a file that is not needed; if that is impossible, say so once."""
        try:
            path.unlink()
        except FileNotFoundError:  # somebody was faster
            return
        except OSError as error:
            if path not in self.not_deleted:
                _logger.warning("could not delete %s (%s): it stays", path, error)
            self.not_deleted.add(path)
        else:
            _logger.info("deleted %s (%s)", path, why)


def not_finite(content: object, name: str = "state") -> Iterator[str]:
    """Yield the names of tensors in nested dicts that contain NaN or infinity."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from not_finite(value, f"{name}.{key}")
    elif isinstance(content, torch.Tensor) and not content.isfinite().all():
        yield name
