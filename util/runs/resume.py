"""How a run resumes: which checkpoint it continues, whether it is the same run, where it writes."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from util.compute.distributed import broadcast_object, is_main_process, world_size
from util.data.loaders import StepLoader
from util.data.settings import DataSettings
from util.errors import InputError
from util.optim import OptimSettings
from util.runs.checkpoint import (
    CheckpointWriter,
    TrainState,
    checkpoint_place,
    list_checkpoints,
    read_checkpoint,
)
from util.runs.lock import lock_folder
from util.runs.run import RunSettings, write_args
from util.runs.run_log import RunLog
from util.weights.files import check_format, read_weights_file, unknown_content

EFFECTIVE_BATCH = "effective batch size"  # among what makes a run the run it is

_logger = logging.getLogger(__name__)


def changeable_settings(
    optim: OptimSettings, data: DataSettings, *, lr: float, amp: str, fsdp: bool | None = None
) -> dict[str, object]:
    """What may change when a run is continued.

    Args:
        optim: with all its values.
        data: whose place may change.
        lr: the peak rate.
        amp: the number format that was chosen.
        fsdp: whether the model is sharded; None where that is not an option.
    """
    settings = {
        "--epochs": optim.epochs,
        "--warmup_epochs": optim.warmup_epochs,
        "lr": lr,
        "--min_lr": optim.min_lr,
        "--clip_grad": optim.clip_grad,
        "--amp": amp,
        "--data_path": data.data_path,
        "--val_path": data.val_path,
        "processes": world_size(),
    }
    return settings if fsdp is None else {**settings, "--fsdp": fsdp}


class RunRecord(NamedTuple):
    """What a run records about itself, so that a resume recognises it."""

    kind: str
    """One of util.weights.files.KINDS."""
    fixed: dict[str, object]
    """Settings that must match on resume, see `check_same_run`."""
    may_change: dict[str, object]
    """Settings that may change, "--epochs" among them."""
    header: dict[str, object]
    """What else every checkpoint keeps: the model's name and options, mean, std."""
    args: dict[str, object]
    """Of the command line."""
    given: Collection[str]
    """The options that are not at their defaults."""


@contextmanager
def open_run(
    state: TrainState, loader: StepLoader, run: RunSettings, record: RunRecord
) -> Iterator[tuple[CheckpointWriter, RunLog]]:
    """Context of a run: put where it was stopped, with its checkpoints and its log.

    The output folder is locked as long as it lasts.

    Args:
        state: of a run that starts; changed where it continues.
        loader: of its steps.
        run: where it writes, and what it continues.
        record: what the run is.

    Raises:
        InputError: the run cannot be continued, or nothing can be written.
        RunError: at the end, `log.jsonl` lacks lines.
    """
    lock = lock_folder(run.folder)
    try:
        own = list_checkpoints(run.folder)
        found = read_resume(run.folder, run.resume, record.kind, own)
        epochs = record.may_change["--epochs"]
        if found is not None:
            path, checkpoint = found
            continue_run(state, path, checkpoint, record)
            if not loader.resumes_mid_epoch:
                state.rewind_epoch()
            check_left(state, path, run.folder, epochs)
        if run.folder not in run.log_folder.parents:
            try:
                run.log_folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot write to --log_dir {run.log_folder}: {error}") from error
        versions = write_args(run.folder, record.args)
        settings = {"identity": record.fixed, "recipe": record.may_change, "args": record.args}
        checkpoints = CheckpointWriter(
            run.folder,
            state,
            {**record.header, **settings, "versions": versions},
            kind=record.kind,
            every_epochs=run.save_every,
            every_minutes=run.save_every_minutes,
            keep_last=run.keep_last,
        )
        run_log = RunLog(
            run.folder,
            run.log_folder,
            num_epochs=epochs,
            steps_per_epoch=loader.steps_per_epoch,
            epoch=state.progress.epoch,
            step=state.progress.step,
            device=state.precision.device,
            unwritten=state.unwritten,
        )
        yield checkpoints, run_log
        run_log.close()
    finally:
        if lock is not None:
            lock.release()


def log_settings(settings: dict) -> None:
    """Say what a run is going to do, defaults that depend on something included."""
    _logger.info("recipe: %s", ", ".join(f"{k.lstrip('-')} {v}" for k, v in settings.items()))


def _read_good(path: Path, kind: str) -> dict | None:
    try:
        content = read_weights_file(path)
    except InputError as error:
        _logger.warning("%s; trying the checkpoint before it", error)
        return None
    return check_format(content, path, kind)


def _read_newest_good(paths: Sequence[Path], kind: str) -> tuple[Path, dict] | None:
    contents = ((path, _read_good(path, kind)) for path in reversed(paths))
    found = next(((path, content) for path, content in contents if content is not None), None)
    if paths and found is None:
        raise InputError(
            f"none of the {len(paths)} checkpoints in {paths[0].parent} can be read: choose "
            "another --output_dir, or move them away to start again"
        )
    return found


def newest_good_checkpoint(folder: Path, kind: str) -> Path | None:
    """The newest checkpoint of a folder that can be read; None where there is none at all.

    Raises:
        InputError: there are checkpoints and none can be read.
    """
    found = _read_newest_good(list_checkpoints(folder), kind)
    return found and found[0]


def read_resume(
    folder: Path, resume: str, kind: str, own: Sequence[Path]
) -> tuple[Path, dict] | None:
    """The checkpoint that a run continues from, the same on every process, and its content.

    A run's own checkpoints come first, so that a restarted job with `--resume PATH` of another
    run goes on where it was.

    Args:
        folder: the run's output folder.
        resume: "auto" for the run's own newest good checkpoint, "none", or a path.
        kind: one of KINDS.
        own: the folder's checkpoints, oldest first; those of the main process count.

    Raises:
        InputError: nothing can be read, or the choice would overwrite checkpoints.
    """
    answer = found = None
    if is_main_process():
        try:
            found = _read_resume(folder, resume, kind, own)
            answer = found and found[0]
        except InputError as error:
            answer = error
    answer = broadcast_object(answer)
    if isinstance(answer, InputError):
        raise answer
    if answer is None or found is not None:
        return found
    return answer, read_checkpoint(answer, kind)


def _read_resume(
    folder: Path, resume: str, kind: str, own: Sequence[Path]
) -> tuple[Path, dict] | None:
    if resume == "auto":
        return _read_newest_good(own, kind)
    if resume == "none":
        if own:
            raise InputError(
                f"{folder} holds checkpoints that a new run would overwrite: continue them with "
                "--resume auto, or choose another --output_dir"
            )
        return None
    path = Path(resume)
    found = None
    if path.resolve().parent != folder.resolve():
        found = _read_newest_good(own, kind)
    else:
        place = checkpoint_place(path)
        newer = [other for other in own if place is None or checkpoint_place(other) > place]
        if newer:
            raise InputError(
                f"{folder} holds checkpoints newer than {path.name}, which would be overwritten: "
                f"move them away ({newer[0].name} and later), or choose another --output_dir"
            )
    return found or (path, read_checkpoint(path, kind))


def continue_run(state: TrainState, path: Path, checkpoint: dict, record: RunRecord) -> None:
    """Put the state where a checkpoint was written.

    Args:
        state: of a run that starts.
        path: of the checkpoint.
        checkpoint: its content.
        record: of the run.

    Raises:
        InputError: the checkpoint is of another run, or not one that training can go on from.
    """
    if "optimizer" not in checkpoint:
        raise InputError(
            f"{path} holds the weights of the best epoch, which training cannot go on from: resume "
            "another checkpoint, or start anew from these by --finetune"
        )
    with unknown_content(path):
        check_same_run(checkpoint, record, path)
        state.load_state_dict(checkpoint)


def check_left(state: TrainState, path: Path, folder: Path, epochs: int) -> None:
    """Say where a run goes on, and whether anything is left to train.

    Raises:
        InputError: another run's checkpoint has all epochs done.
    """
    progress = state.progress
    if progress.epoch < epochs:
        place = (progress.epoch, progress.step_in_epoch)
        _logger.info("continuing %s after %d epochs and %d steps", path, *place)
    elif path.resolve().parent != folder.resolve():
        raise InputError(f"{path} has all {epochs} epochs done: raise --epochs")
    else:
        _logger.info("%s is the end of this run: nothing is left to train", path)


def check_same_run(checkpoint: dict, record: RunRecord, path: Path) -> None:
    """Refuse to continue a checkpoint as another run; say which settings change on the way.

    A setting that the checkpoint does not have is one of a newer version. It counts as unchanged
    unless it was given, because its default is what the older version did.

    Args:
        checkpoint: with the settings of the start that wrote it, as `identity` and `recipe`.
        record: of this start.
        path: of the checkpoint, for the message.

    Raises:
        InputError: with the list of differences.
    """
    fixed, may_change, given = record.fixed, record.may_change, record.given
    known, before = (
        {**{name: value for name, value in now.items() if name not in given}, **saved}
        for now, saved in ((fixed, checkpoint["identity"]), (may_change, checkpoint["recipe"]))
    )
    different = changes(known, fixed)
    if different:
        size = checkpoint["identity"].get(EFFECTIVE_BATCH)
        advice = "Give it the same arguments"
        if fixed.get(EFFECTIVE_BATCH) != size:
            advice += f" (--effective_batch_size {size} holds on any number of processes)"
        raise InputError(
            f"{path} was written by another run: {'; '.join(different)}. {advice}, or start anew "
            "in another --output_dir"
        )
    done, epochs = checkpoint["progress"]["epoch"], may_change["--epochs"]
    if epochs < before["--epochs"]:
        raise InputError(
            f"--epochs {epochs} is below the {before['--epochs']} that {path} was started with, "
            f"{done} of them done: a schedule cannot shrink, so start anew in another --output_dir"
        )
    if not is_main_process():
        return
    if epochs > before["--epochs"]:
        _logger.warning(
            "--epochs grew from %d to %d: from epoch %d on the learning rate follows the longer "
            "schedule, so the run differs from one started with %d epochs",
            *(before["--epochs"], epochs, done, epochs),
        )
    processes = may_change.get("processes")
    if before.get("processes") != processes:
        _logger.warning(
            "the number of processes was %s and is now %s: steps have the same images and masks as "
            "before, but sums are rounded in another order, and drop path and mixup, where there "
            "are any, draw other numbers, so the result is not the same to the bit",
            *(before["processes"], processes),
        )
    for change in changes({**before, "--epochs": epochs, "processes": processes}, may_change):
        _logger.warning("continuing with a change: %s", change)


def changes(before: dict, now: dict) -> list[str]:
    """The values that differ, as text; what one of the two leaves out counts as None."""
    return [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
