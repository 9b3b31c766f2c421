"""The end of a run's output: its results and its files."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from util.runs.checkpoint import BEST_NAME, last_checkpoint
from util.runs.epoch_log import read_log

_logger = logging.getLogger(__name__)


def report(
    folder: Path,
    title: str,
    best: Mapping[str, float] | None,
    *,
    by: str,
    describe: Callable[[dict], str],
    in_steps: bool = False,
) -> None:
    """Log the last and best results of a finished run and the paths of its checkpoints.

    Args:
        folder: of the run.
        title: what the results are of.
        best: metrics of the best epoch, whose weights were kept; None if there is none.
        by: a metric of the validation images, which are missing if it is.
        describe: line of the log -> text.
        in_steps: whether the run is measured in steps, not in epochs.

    Raises:
        RunError: the last checkpoint could not be written.
    """
    log = read_log(folder)
    last = log[-1]
    path = last_checkpoint(folder, last["epoch"])
    if by in last:
        what, unit, key = ("evaluation", "step ", "step") if in_steps else ("epoch", "", "epoch")
        kept = [line for line in log if best and line["epoch"] == best["epoch"]]
        for kind, line in (("last", last), *(("best", line) for line in kept)):
            place = f"{kind} {what} ({unit}{line[key]})"
            _logger.info("%s, %s: %s", title, place, describe(line))
        if kept:
            _logger.info("checkpoint of the best %s: %s", what, folder / BEST_NAME)
    _logger.info("checkpoint: %s", path)
