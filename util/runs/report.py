"""The end of a run's output: its results and its files."""

import logging
from collections.abc import Callable
from pathlib import Path

from util.runs.checkpoint import BEST_NAME, Progress, last_checkpoint
from util.runs.epoch_log import LOG_NAME, read_log

MISSING_LINE = "%s lacks the line of the last epoch, so its results are not shown"

_logger = logging.getLogger(__name__)


def report(
    folder: Path,
    title: str,
    progress: Progress,
    *,
    by: str,
    describe: Callable[[dict], str],
    in_steps: bool = False,
) -> None:
    """Log the last and best results of a finished run and the paths of its checkpoints.

    Args:
        folder: of the run.
        title: what the results are of.
        progress: of the run. The weights of its best epoch were kept, if it has one.
        by: a metric of the validation images, which are missing if it is.
        describe: line of the log -> text.
        in_steps: whether the run is measured in steps, not in epochs.

    Raises:
        RunError: the last checkpoint could not be written.
    """
    path = last_checkpoint(folder, progress.epoch)
    log = {line["epoch"]: line for line in read_log(folder)}
    last, best = log.get(progress.epoch), progress.best
    if last is None:
        _logger.warning(MISSING_LINE, folder / LOG_NAME)
    elif by in last:
        what, unit, key = ("evaluation", "step ", "step") if in_steps else ("epoch", "", "epoch")
        kept = [log[best["epoch"]]] if best and best["epoch"] in log else []
        for kind, line in (("last", last), *(("best", line) for line in kept)):
            place = f"{kind} {what} ({unit}{line[key]})"
            _logger.info("%s, %s: %s", title, place, describe(line))
        if kept:
            _logger.info("checkpoint of the best %s: %s", what, folder / BEST_NAME)
    _logger.info("checkpoint: %s", path)
