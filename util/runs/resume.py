"""Resuming of runs: choice of the checkpoint, check that it is of the same run, and output."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from util.compute.distributed import (
    all_gather_objects,
    broadcast_object,
    is_main_process,
    world_size,
)
from util.compute.precision import Precision
from util.data.images import HELD_OUT, TRAINING_IMAGES
from util.data.loaders import StepLoader
from util.errors import InputError, counted
from util.normalization import RGB8
from util.runs.checkpoint import (
    CheckpointWriter,
    Progress,
    TrainState,
    checkpoint_position,
    list_checkpoints,
    read_checkpoint,
)
from util.runs.epoch_log import is_count
from util.runs.lock import lock_folder
from util.runs.log_file import open_log_file
from util.runs.run import device_name, libraries, write_args
from util.runs.run_log import RunLog
from util.settings.data import DataSettings
from util.settings.optim import OptimSettings
from util.settings.run import RunSettings
from util.settings.segmentation import SegmentationSettings
from util.weights.encoder import StartingPoint
from util.weights.files import (
    WeightsNotFoundError,
    check_format,
    read_weights_file,
    unknown_content,
)
from util.weights.metadata import check_pixels

# Keys in the fixed settings.
EFFECTIVE_BATCH = "effective batch size"
WEIGHTS_HASH = "hash of the weights it starts from"
# Keys in the settings that may change. Checkpoints without the second are of a version whose
# average did not follow the weights more closely at first, so it counts as given.
CONTENT = "hash of the content of 100 images, by class"
EMA_DECAY = "decay of the first steps with --ema"
# The same, of what changes only the last bits. With them do the versions and kernels of
# `util.runs.run.libraries`, two of which matter on a CPU only, and some arguments.
THREADS = "--num_threads"
DEVICE = "device"
CPU_KERNELS = ("cpu_capability", "cpu_linear")
ROUNDING_ARGS = ("batch_size", "attention_backend", "compile")

MAX_ITERS = "--max_iters"  # the length of runs that are measured in steps
SOURCES = ("data_path", "val_path", "data_csv", "val_csv")  # settings of the data
CLASSIFIERS = ("finetune", "linprobe")  # kinds of checkpoints that `read_encoder` reads
DEAD_ENDS = ("segmentation", "detection")  # kinds of checkpoints that nothing starts from

T = TypeVar("T")

_logger = logging.getLogger(__name__)


def changeable_settings(
    optim: OptimSettings,
    data: DataSettings | SegmentationSettings,
    *,
    lr: float,
    precision: Precision,
    fsdp: bool | None = None,
    ema: float | None = None,
) -> dict[str, object]:
    """Collect the settings that may change on resume.

    Args:
        optim: with all defaults filled in.
        lr: peak learning rate.
        precision: of the run, and its device.
        fsdp: whether the model is sharded; None if the program has no such option.
        ema: decay of a moving average; None if there is none.
    """
    settings = {
        "--epochs": optim.epochs,
        "--warmup_epochs": optim.warmup_epochs,
        "lr": lr,
        "--min_lr": optim.min_lr,
        "--clip_grad": optim.clip_grad,
        "--amp": precision.amp,
        **{f"--{name}": getattr(data, name) for name in SOURCES if hasattr(data, name)},
        "processes": world_size(),
        DEVICE: device_name(precision.device),
        # What a GPU computes does not depend on it.
        THREADS: torch.get_num_threads() if precision.device.type == "cpu" else None,
    }
    settings |= {} if ema is None else {EMA_DECAY: "n / (n + 9)"}
    return settings if fsdp is None else {**settings, "--fsdp": fsdp}


class RunRecord(NamedTuple):
    """Settings that a run saves in its checkpoints, to check them on resume."""

    kind: str
    """One of util.weights.files.KINDS."""
    fixed: dict[str, object]
    """Settings that must match on resume, see `check_same_run`."""
    may_change: dict[str, object]
    """Settings that may change, "--epochs" among them."""
    header: dict[str, object]
    """Further content of every checkpoint: the model's name and options, mean, std."""
    args: dict[str, object]
    """All command-line arguments."""
    given: Collection[str]
    """Options that differ from their defaults."""
    length: tuple[str, int] = ("--epochs", 1)
    """The option for the length of the run, for messages, and its value per epoch."""
    data: dict[str, object] | None = None
    """What was found of the images, see `util.data.report`."""
    evaluated_every: int = 0
    """Epochs between evaluations, for the log; 0 for none."""
    notes: Mapping[str, str] | None = None
    """What the log says beside metrics, see `util.runs.rows.cells`."""
    at_start: str = "untrained"
    """What the log calls the network before the first step."""

    @property
    def in_steps(self) -> bool:
        """Whether the length of the run is a number of steps."""
        return self.length[0] == MAX_ITERS


def start_flag(kind: str) -> str:
    """Return the flag for weights that a new run of a kind starts from."""
    return "--init_from" if kind == "pretrain" else "--finetune"


@contextmanager
def open_run(
    state: TrainState, loader: StepLoader, run: RunSettings, record: RunRecord
) -> Iterator[tuple[CheckpointWriter, RunLog]]:
    """Context of a run: resumes it if there is a checkpoint, and opens its checkpoints and log.

    The output folder is locked inside the context.

    Args:
        state: the initial state; overwritten on resume.

    Raises:
        InputError: the run cannot be continued, or the output folder cannot be written to.
        RunError: `log.jsonl` is incomplete when the context closes.
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
            check_left(state, path, run.folder, record)
        if run.folder not in (run.log_folder, *run.log_folder.parents):
            try:
                run.log_folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot write to --log_dir {run.log_folder}: {error}") from error
        versions = write_args(run.folder, record.args, record.data)
        if lock is not None:
            open_log_file(run.folder, lock.is_in_place)
        settings = {"identity": record.fixed, "recipe": record.may_change, "args": record.args}
        checkpoints = CheckpointWriter(
            run.folder,
            state,
            {**record.header, **settings, "versions": versions},
            kind=record.kind,
            every_epochs=run.save_every,
            every_minutes=run.save_every_minutes,
            keep_last=run.keep_last,
            lock=lock,
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
            evaluated_every=record.evaluated_every,
            in_steps=record.in_steps,
            notes=record.notes,
            at_start=record.at_start,
            lock=lock,
        )
        yield checkpoints, run_log
        run_log.close()
    finally:
        if lock is not None:
            lock.release()


def _read_good(path: Path, kind: str) -> dict | None:
    try:
        content = read_weights_file(path)
    except InputError as error:
        _logger.warning("%s; trying the previous checkpoint", error)
        return None
    return check_format(content, path, kind)


def _position_in(content: dict) -> tuple[int, int] | None:
    """Return (epoch, step in epoch) of a checkpoint's content; None if that is damaged."""
    progress = content.get("progress")
    if not isinstance(progress, dict):
        return None
    position = progress.get("epoch"), progress.get("step_in_epoch")
    return position if all(map(is_count, position)) else None


def _read_newest_good(paths: Sequence[Path], kind: str) -> tuple[Path, dict] | None:
    """Read the checkpoint that is furthest in the run, by its content: it may have been renamed.

    Args:
        paths: in the order of their names.
    """
    found = newest = None
    for path in reversed(paths):
        named = checkpoint_position(path)
        if found is not None and named < newest:
            break
        content = _read_good(path, kind)
        if content is None:
            continue
        position = _position_in(content) or named
        if position != named:
            done = Progress(*position).describe()
            _logger.warning("%s is from after %s of the run, whatever its name says", path, done)
        if found is None or position >= newest:
            found, newest = (path, content), position
    if paths and found is None:
        raise InputError(
            f"no checkpoint in {paths[0].parent} can be read ({len(paths)} tried): choose another "
            "--output_dir, or move the files away to start from scratch"
        )
    return found


def newest_good_checkpoint(folder: Path, kind: str) -> Path | None:
    """Find the newest readable checkpoint in a folder; None if the folder has no checkpoints.

    Raises:
        InputError: there are checkpoints, but none can be read.
    """
    found = _read_newest_good(list_checkpoints(folder), kind)
    return found and found[0]


def checkpoint_to_evaluate(run: RunSettings, finetune: str | None, kind: str) -> str | Path:
    """Path of the checkpoint that --eval measures: --finetune, --resume or the run's newest.

    Args:
        kind: one of KINDS, of the newest.

    Raises:
        InputError: none is found, or two are given.
    """
    resumed = None if run.resume in ("auto", "none") else run.resume
    if finetune and resumed:
        raise InputError("--eval takes one checkpoint: leave --finetune or --resume out")
    if finetune or resumed:
        return finetune or resumed
    path = newest_good_checkpoint(run.folder, kind)
    if path is None:
        raise InputError(
            f"--eval found no checkpoint in {run.folder}: give a fine-tuned one with --finetune"
        )
    return path


class Origin(NamedTuple):
    """What a run once started from."""

    digest: str | None
    """Hash of the weights; None if they were random."""
    is_gone: bool = False
    """Whether they were not found: the run's own checkpoint has all weights."""

    @property
    def at_start(self) -> str:
        """What the log calls the network before the first step."""
        return "untrained" if self.digest is None else "at the start"


def start_or_continue(
    find_start: Callable[..., StartingPoint],
    finetune: str | None,
    run: RunSettings,
    kind: str,
    **given: object,
) -> tuple[StartingPoint, Origin]:
    """Find what a run starts from; if its weights are gone, the run's own checkpoint is enough.

    Args:
        find_start: `models.starting_point`.
        finetune: path or address of the weights; None for random ones.
        kind: one of KINDS.
        given: model, img_size, mean and std as the user gave them, each of which may be None.

    Returns:
        The starting point, of the run's own checkpoint if the weights are gone, and the origin.

    Raises:
        WeightsNotFoundError: the weights are gone, and the run has no checkpoint.
        InputError: see `find_start` and `read_resume`.
    """
    start, found = _read_unless_gone(partial(find_start, finetune, **given), run, kind)
    if found is None:
        return start, Origin(start.weights and start.weights.hash())
    path, checkpoint = found
    with unknown_content(path):
        origin = Origin(checkpoint["identity"][WEIGHTS_HASH], is_gone=True)
        if kind in CLASSIFIERS:
            return find_start(path, **given), origin
        known = {"model": checkpoint["model_name"]}
        known["img_size"] = checkpoint["model_options"]["img_size"]
        known |= {name: checkpoint[name] for name in ("mean", "std")}
        trained_on = check_pixels(checkpoint, checkpoint["model_options"])
        given["pixels"] = given.get("pixels", RGB8).or_those_of(trained_on)
        given = {name: known[name] if value is None else value for name, value in given.items()}
        return find_start(None, **given), origin


def colors_of_run(run: RunSettings, kind: str) -> tuple[list[float], list[float]] | None:
    """Return the mean and std of the run that will be continued; None for a new run.

    Args:
        kind: one of KINDS.

    Raises:
        InputError: see `read_resume`.
    """
    found = read_resume(run.folder, run.resume, kind, list_checkpoints(run.folder))
    if found is None:
        return None
    path, checkpoint = found
    with unknown_content(path):
        return list(checkpoint["mean"]), list(checkpoint["std"])


def init_or_continue(load: Callable[[str], str], run: RunSettings, kind: str) -> Origin:
    """Load the weights of --init_from; if they are gone, the run's own checkpoint is enough.

    Args:
        load: loads the weights at a path or address into the model; returns their hash.
        kind: one of KINDS.

    Raises:
        WeightsNotFoundError: the weights are gone, and the run has no checkpoint.
        InputError: they are the run's own, or see `load` and `read_resume`.
    """
    if run.init_from is None:
        return Origin(None)
    path = Path(run.init_from)
    if checkpoint_position(path) and path.resolve().parent == run.folder.resolve():
        raise InputError(
            f"--init_from {path} is a checkpoint of the run in --output_dir: leave --init_from out "
            "to continue that run, or choose another --output_dir for a new one"
        )
    digest, found = _read_unless_gone(partial(load, run.init_from), run, kind)
    if found is None:
        return Origin(digest)
    path, checkpoint = found
    with unknown_content(path):
        return Origin(checkpoint["identity"].get(WEIGHTS_HASH), is_gone=True)


def _read_unless_gone(
    read: Callable[[], T], run: RunSettings, kind: str
) -> tuple[T | None, tuple[Path, dict] | None]:
    """Call `read`; if the weights that it reads are gone on any process, read a checkpoint instead.

    Returns:
        What `read` returns and None; else None, and path and content of the run's checkpoint.

    Raises:
        WeightsNotFoundError: the weights are gone, and the run has no checkpoint.
    """
    result = missing = None
    try:
        result = read()
    except WeightsNotFoundError as error:
        missing = error
    missing = next(filter(None, all_gather_objects([missing])), None)
    if missing is None:
        return result, None
    found = read_resume(run.folder, run.resume, kind, list_checkpoints(run.folder))
    if found is None:
        raise missing
    _logger.info("%s; that is not needed: %s has all weights of this run", missing, found[0])
    return None, found


def read_resume(
    folder: Path, resume: str, kind: str, own: Sequence[Path]
) -> tuple[Path, dict] | None:
    """Path and content of the checkpoint to continue from, the same on every process.

    A run's own checkpoints come first, so that a restarted job with `--resume PATH` of another
    run continues from its own progress.

    Args:
        folder: the run's output folder.
        resume: "auto" for the run's own newest good checkpoint, "none", or a path.
        kind: one of KINDS.
        own: the folder's checkpoints, oldest first; only the main process's list is used.

    Raises:
        InputError: the checkpoint cannot be read, or the choice would overwrite checkpoints.
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
                f"{folder} contains checkpoints that a new run would overwrite: continue from them "
                "with --resume auto, or choose another --output_dir"
            )
        return None
    path = Path(resume)
    if path.resolve().parent != folder.resolve():
        return _read_newest_good(own, kind) or (path, _read_given(path, kind))
    content = _read_given(path, kind)
    position = _position_in(content) or checkpoint_position(path) or (0, 0)
    newer = [p for p in own if p.name != path.name and checkpoint_position(p) > position]
    if newer:
        raise InputError(
            f"{folder} contains checkpoints newer than {path.name}, which would be overwritten: "
            f"move them away ({newer[0].name} and later), or choose another --output_dir"
        )
    return path, content


def _read_given(path: Path, kind: str) -> dict:
    """Read the checkpoint that --resume names.

    Raises:
        InputError: see `read_checkpoint`; of other weights, it says how to start a run from them.
    """
    content = read_weights_file(path)
    try:
        return check_format(content, path, kind)
    except InputError as error:
        other = str(content.get("format", ""))
        if other.endswith((kind, *DEAD_ENDS)):  # of a newer version, or no plain encoder
            raise
        raise InputError(
            f"{error}, so --resume cannot continue from it: start a new run from its weights with "
            f"{start_flag(kind)}"
        ) from error


def continue_run(state: TrainState, path: Path, checkpoint: dict, record: RunRecord) -> None:
    """Restore the state from a checkpoint of the same run.

    Raises:
        InputError: the checkpoint is of another run, or has weights only.
    """
    if "optimizer" not in checkpoint:
        raise InputError(
            f"{path} contains only the weights, such as those of the best epoch, so training "
            "cannot continue from it: resume another checkpoint, or start a new run from it with "
            f"{start_flag(record.kind)}"
        )
    with unknown_content(path):
        check_same_run(checkpoint, record, path)
        state.load_state_dict(checkpoint)


def check_left(state: TrainState, path: Path, folder: Path, record: RunRecord) -> None:
    """Log where a run continues, and whether anything is left to train.

    Raises:
        InputError: the checkpoint is from another folder and has all epochs done.
    """
    epochs = record.may_change["--epochs"]
    if state.progress.epoch < epochs:
        _logger.info("continuing from %s after %s", path, state.progress.describe())
    elif path.resolve().parent != folder.resolve():
        raise InputError(
            f"{path} has completed {counted(epochs, 'epoch')} already: raise {record.length[0]}"
        )
    else:
        _logger.info("%s is the final checkpoint of this run: nothing is left to train", path)


def check_same_run(checkpoint: dict, record: RunRecord, path: Path) -> None:
    """Refuse a checkpoint of another run, and log the settings that change.

    A setting that the checkpoint lacks was added in a newer version. It counts as unchanged unless
    it was given, because its default is what the older version did.

    Args:
        checkpoint: has the settings of its run as `identity` (fixed) and `recipe` (may change).

    Raises:
        InputError: fixed settings differ, or --epochs is lower than before and done already.
    """
    fixed, may_change, given = record.fixed, record.may_change, record.given
    known, before = (
        {**{name: value for name, value in now.items() if name not in given}, **saved}
        for now, saved in ((fixed, checkpoint["identity"]), (may_change, checkpoint["recipe"]))
    )
    different = changes(known, fixed)
    if different:
        size = checkpoint["identity"].get(EFFECTIVE_BATCH)
        advice = "Use the same settings"
        if fixed.get(EFFECTIVE_BATCH) != size:
            advice += f" (--effective_batch_size {size} works with any number of processes)"
        if fixed.get(WEIGHTS_HASH) != checkpoint["identity"].get(WEIGHTS_HASH):
            args = checkpoint.get("args", {})
            flag = next((name for name in ("init_from", "finetune") if args.get(name)), None)
            advice += f" (it started with --{flag} {args[flag]})" if flag else ""
        held_out, number = fixed.get(HELD_OUT, 0), checkpoint["identity"].get(TRAINING_IMAGES)
        if held_out and number == fixed[TRAINING_IMAGES] + held_out:
            advice += " (--val_fraction 0 trains on all images, as before)"
        elif HELD_OUT in checkpoint["identity"] and held_out != checkpoint["identity"][HELD_OUT]:
            advice += " (the same --val_fraction, or none if none was given)"
        raise InputError(
            f"{path} was trained with other settings: {'; '.join(different)}. {advice}, or start a "
            "new run in another --output_dir"
        )
    done, epochs = checkpoint["progress"]["epoch"], may_change["--epochs"]
    flag, per_epoch = record.length
    length, length_before, length_done = (
        per_epoch * number for number in (epochs, before["--epochs"], done)
    )
    if length < length_before and epochs <= done:
        raise InputError(
            f"{flag} {length} is below the {length_before} of the run that wrote {path}, of which "
            f"{length_done} are done, so nothing would be left to train: give more, or start a new "
            "run in another --output_dir"
        )
    if not is_main_process():
        return
    if length != length_before:
        is_longer = length > length_before
        word, kind = ("increased", "longer") if is_longer else ("decreased", "shorter")
        _logger.warning(
            "%s %s from %d to %d: from epoch %d on, the learning rate follows the %s schedule, so "
            "the run differs from one started with %s %d",
            *(flag, word, length_before, length, done + 1, kind, flag, length),
        )
    processes = may_change.get("processes")
    if before.get("processes") != processes:
        _logger.warning(
            "the number of processes was %s and is now %s: steps have the same images and masks as "
            "before, but sums are rounded in a different order, and drop path and mixup, if used, "
            "draw different numbers, so the result is not bit-identical",
            *(before["processes"], processes),
        )
    warn_of_rounding(checkpoint, record)
    named = ("--epochs", "processes", THREADS, DEVICE)
    before |= {name: may_change.get(name) for name in named}
    for change in changes(before, may_change):
        _logger.warning("continuing with a change: %s", change)


def warn_of_rounding(checkpoint: dict, record: RunRecord) -> None:
    """Log what changes the last bits, besides the number of processes.

    What a checkpoint of an older version does not say counts as unchanged.
    """
    threads, threads_before = record.may_change.get(THREADS), checkpoint["recipe"].get(THREADS)
    if None not in (threads, threads_before) and threads != threads_before:
        _logger.warning(
            "the number of threads was %s and is now %s: sums are rounded in a different order, so "
            "the result is not bit-identical (%s %s is as before)",
            *(threads_before, threads, THREADS, threads_before),
        )
    used = libraries()
    if threads is None:  # on a GPU
        used = {name: value for name, value in used.items() if name not in CPU_KERNELS}
    now = {DEVICE: record.may_change.get(DEVICE), **used}
    now |= {f"--{name}": record.args[name] for name in ROUNDING_ARGS if name in record.args}
    before = {**checkpoint["recipe"], **checkpoint.get("versions", {})}
    before |= {f"--{name}": value for name, value in checkpoint.get("args", {}).items()}
    different = changes({name: before.get(name, value) for name, value in now.items()}, now)
    if different:
        _logger.warning("the result may not be bit-identical: %s", "; ".join(different))


def changes(before: dict, now: dict) -> list[str]:
    """Describe the values that differ; a missing value counts as None."""
    return [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
