"""Which checkpoint a run goes on from, and whether it is still the same run."""

import logging
from pathlib import Path

from util.compute.distributed import from_main_process, is_main_process
from util.errors import InputError
from util.runs.checkpoint import TrainState, checkpoint_place, list_checkpoints, read_checkpoint
from util.weights.files import check_format, read_weights_file, strange_content_is_input_error

EFFECTIVE_BATCH = "effective batch size"  # among what makes a run the run it is

_logger = logging.getLogger(__name__)


def _read_good(path: Path, kind: str) -> dict | None:
    try:
        content = read_weights_file(path)
    except InputError as error:
        _logger.warning("%s; trying the checkpoint before it", error)
        return None
    return check_format(content, path, kind)


def _read_newest_good(folder: Path, kind: str) -> tuple[Path, dict] | None:
    paths = list_checkpoints(folder)
    contents = ((path, _read_good(path, kind)) for path in reversed(paths))
    found = next(((path, content) for path, content in contents if content is not None), None)
    if paths and found is None:
        raise InputError(
            f"none of the {len(paths)} checkpoints in {folder} can be read: choose another "
            "--output_dir, or move them away to start again"
        )
    return found


def newest_good_checkpoint(folder: Path, kind: str) -> Path | None:
    """The newest checkpoint of a folder that can be read; None where there is none at all.

    Raises:
        InputError: there are checkpoints and none can be read.
    """
    found = _read_newest_good(folder, kind)
    return found and found[0]


def read_resume(folder: Path, resume: str, kind: str) -> tuple[Path, dict] | None:
    """The checkpoint that a run continues from, the same on every process, and its content.

    A run's own checkpoints come first, so that a restarted job with `--resume PATH` of another
    run goes on where it was.

    Args:
        folder: the run's output folder.
        resume: "auto" for the run's own newest good checkpoint, "none", or a path.
        kind: one of KINDS.

    Raises:
        InputError: nothing can be read, or the choice would overwrite checkpoints.
    """
    answer = found = None
    if is_main_process():
        try:
            found = _read_resume(folder, resume, kind)
            answer = found and found[0]
        except InputError as error:
            answer = error
    answer = from_main_process(answer)
    if isinstance(answer, InputError):
        raise answer
    if answer is None or found is not None:
        return found
    return answer, read_checkpoint(answer, kind)


def _read_resume(folder: Path, resume: str, kind: str) -> tuple[Path, dict] | None:
    if resume == "auto":
        return _read_newest_good(folder, kind)
    own = list_checkpoints(folder)
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
        found = _read_newest_good(folder, kind)
    else:
        place = checkpoint_place(path)
        newer = [other for other in own if place is None or checkpoint_place(other) > place]
        if newer:
            raise InputError(
                f"{folder} holds checkpoints newer than {path.name}, which would be overwritten: "
                f"move them away ({newer[0].name} and later), or choose another --output_dir"
            )
    return found or (path, read_checkpoint(path, kind))


def resume_run(
    state: TrainState,
    folder: Path,
    resume: str,
    *,
    kind: str,
    identity: dict,
    recipe: dict,
    resumes_mid_epoch: bool,
) -> None:
    """Put the state where the run was stopped, or leave it at the start; the log says which.

    Args:
        state: of a run that starts.
        folder, resume, kind: see `read_resume`.
        identity, recipe: see `check_same_run`; the recipe has "--epochs".
        resumes_mid_epoch: False goes back to the start of the epoch under way.

    Raises:
        InputError: the checkpoint cannot be read, is of another run, or has nothing left to do.
    """
    found = read_resume(folder, resume, kind)
    if found is None:
        return
    path, checkpoint = found
    if "optimizer" not in checkpoint:
        raise InputError(
            f"{path} holds the weights of the best epoch, which training cannot go on from: resume "
            "another checkpoint, or start anew from these by --finetune"
        )
    with strange_content_is_input_error(path):
        check_same_run(checkpoint, identity, recipe, path)
        state.load_state_dict(checkpoint)
    progress, epochs = state.progress, recipe["--epochs"]
    if progress.epoch >= epochs and path.resolve().parent != folder.resolve():
        raise InputError(f"{path} has all {epochs} epochs done: raise --epochs")
    if not resumes_mid_epoch:
        state.rewind_epoch()
    place = (progress.epoch, progress.step_in_epoch)
    if progress.epoch < epochs:
        _logger.info("continuing %s after %d epochs and %d steps", path, *place)
    else:
        _logger.info("%s is the end of this run: nothing is left to train", path)


def check_same_run(checkpoint: dict, identity: dict, recipe: dict, path: Path) -> None:
    """Refuse to continue a checkpoint as another run; say which settings change on the way.

    Args:
        checkpoint: with the `identity` and `recipe` of the start that wrote it.
        identity: name -> plain value, what must not change: model, ratios, data.
        recipe: name -> plain value, what may: learning rate, schedule, precision.
        path: of the checkpoint, for the message.

    Raises:
        InputError: with the list of differences.
    """
    different = changes(checkpoint["identity"], identity)
    if different:
        size = checkpoint["identity"].get(EFFECTIVE_BATCH)
        advice = "Give it the same arguments"
        if identity.get(EFFECTIVE_BATCH) != size:
            advice += f" (--effective_batch_size {size} holds on any number of processes)"
        raise InputError(
            f"{path} was written by another run: {'; '.join(different)}. {advice}, or start anew "
            "in another --output_dir"
        )
    done, epochs, before = checkpoint["progress"]["epoch"], recipe["--epochs"], checkpoint["recipe"]
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
    processes = recipe.get("processes")
    if before.get("processes", processes) != processes:
        _logger.warning(
            "the number of processes was %s and is now %s: steps have the same images and masks as "
            "before, but sums are rounded in another order, and drop path and mixup, where there "
            "are any, draw other numbers, so the result is not the same to the bit",
            *(before["processes"], processes),
        )
    for change in changes({**before, "--epochs": epochs, "processes": processes}, recipe):
        _logger.warning("continuing with a change: %s", change)


def changes(before: dict, now: dict) -> list[str]:
    """The values that differ, as text; what one of the two leaves out counts as None."""
    return [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
