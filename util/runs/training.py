"""Training steps for every engine: gradient accumulation, resume, log points and saves."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn as nn
from torch import Tensor

from util.compute.contention import contention_watch
from util.compute.distributed import all_gather_objects, gradient_sync, rank, world_size
from util.compute.precision import Precision
from util.compute.signals import defer_signals, stop_signal
from util.compute.watchdog import enter_step
from util.data.batch import Batch
from util.data.loaders import StepLoader
from util.errors import NonFiniteLossError
from util.optim import set_lr
from util.runs.checkpoint import CheckpointWriter, TrainState
from util.runs.nonfinite import CauseSearch
from util.runs.run_log import RunLog, TimedIterator

CHECK_SECONDS = 5.0
MAX_UNCHECKED = 20  # steps between two checks, because steps may become slower

_logger = logging.getLogger(__name__)


class Step:
    """One optimizer update, for which an engine computes the loss of each micro-batch.

    Args:
        model: the trained model, possibly wrapped in DistributedDataParallel.
        batches: this process's micro-batches.
        num_images: over all processes, each crop counted as an image.
        num_crops: number of crops of each image, adjacent in one micro-batch.

    Attributes:
        number: step in the run, counted from 0; seeds everything random in the step.
        loss: the sum of the losses so far, such that its mean over processes is the step's loss.
    """

    def __init__(
        self,
        model: nn.Module,
        state: TrainState,
        batches: Sequence[Batch],
        *,
        number: int,
        num_images: int,
        num_crops: int,
        device: torch.device,
        run_log: RunLog,
    ) -> None:
        self.model, self.state, self.batches, self.run_log = model, state, batches, run_log
        self.number, self.num_images, self.num_crops = number, num_images, num_crops
        self.own_images = num_crops * len(range(rank(), num_images // num_crops, world_size()))
        self.loss = torch.zeros((), device=device)
        self.weight = 0.0  # of the current micro-batch

    def micro_batches(self) -> Iterator[tuple[Batch, slice]]:
        """Yield each micro-batch as it was loaded, with its slice of this process's images.

        Call `backward` once for each micro-batch before the next.
        """
        first = 0
        for number, batch in enumerate(self.batches, start=1):
            # Padding for processes with fewer images has weight 0.
            counts = first < self.own_images
            # Gradients are averaged over processes, and every image must have the same weight.
            self.weight = counts * batch.num_images * (world_size() / self.num_images)
            start = first if counts else 0
            # Gradients are reduced once per step, not once per micro-step.
            with gradient_sync(self.model, enabled=number == len(self.batches)):
                yield batch, slice(start, start + batch.num_images)
            if counts:
                first += batch.num_images
                self.state.broken.add(batch.broken)
            if number < len(self.batches):
                self.run_log.end_micro_step(self.state.progress, number, len(self.batches))

    def autocast(self) -> AbstractContextManager:
        """Context for a forward pass."""
        return self.state.precision.autocast()

    def backward(self, loss: Tensor) -> None:
        """Backpropagate the mean loss of the current micro-batch."""
        loss = loss * self.weight
        self.state.precision.backward(loss)
        self.loss += loss.detach()


class RepeatedStep(Step):
    """A step computed once more, forward only, to find what is not finite in it.

    Weights are those that it was computed with, because none are updated from a bad step on
    (`Precision.update` has the exceptions), and its number draws the same masks and noise.

    Args:
        last: the step before the log point.
        batches: of the repeated step.
        changed: its number and num_images.
    """

    def __init__(self, last: Step, batches: Sequence[Batch], **changed: int) -> None:
        same = {"num_crops": last.num_crops, "device": last.loss.device, "run_log": last.run_log}
        super().__init__(last.model, last.state, batches, **same, **changed)
        self.search = CauseSearch(last.state.model, last.num_crops)

    def micro_batches(self) -> Iterator[tuple[Batch, slice]]:
        """Yield each micro-batch, and watch the model until the next."""
        for batch, rows in super().micro_batches():
            with self.search.micro_batch(batch.num_images):
                yield batch, rows

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Context for a forward pass, without gradients and compiled code."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), super().autocast():
            yield

    def backward(self, loss: Tensor) -> None:
        """Check the loss of the current micro-batch instead."""
        self.search.check_loss(loss)


def explain(error: NonFiniteLossError, last: Step, loader: StepLoader) -> Iterator[Step]:
    """Yield the bad step once more, then raise the error with its cause.

    All processes take part, because sharded models need them all. A stream cannot be read again, so
    the last step is repeated instead, whose images may be innocent.

    Args:
        last: the step before the log point.
    """
    progress, advice = last.state.progress, lower_rate(last.state.precision)
    cause = ""
    if not error.in_gradient:
        _logger.warning("%s: it is computed once more to find the cause", error)
        step_in_epoch = progress.step_in_epoch - 1 - (last.number - error.step)
        keys = loader.keys_in_step(progress.epoch, step_in_epoch)
        if keys:
            own = {"number": error.step, "num_images": loader.images_in_step(step_in_epoch)}
            step = RepeatedStep(last, loader.read(keys), **own)
        else:
            own = {"number": last.number, "num_images": last.num_images}
            step = RepeatedStep(last, last.batches, **own)
        yield step
        name_of = (lambda number, image: loader.name(keys[number][image])) if keys else None
        found = (step.search.describe(name_of), step.search.blames_images)
        found, blames_images = all_gather_objects([found])[error.process]
        replaced = f" of step {step.number + 1}, since a stream cannot be read again"
        cause = f": {found}{replaced if step.number != error.step else ''}"
        if blames_images:
            advice = f"look at these images, or {advice}"
    raise NonFiniteLossError(
        f"{error}{cause}; nothing has been saved since, so {advice}, then continue from the last "
        "checkpoint",
        **vars(error),
    ) from error


def lower_rate(precision: Precision) -> str:
    """Advice against values that grow too large."""
    if precision.amp == "fp16":
        return "lower the learning rate or use --amp bf16 or fp32"
    clip = "use --clip_grad 1" if precision.clip_grad is None else "lower --clip_grad"
    return f"lower the learning rate or {clip}"


class StopChecks:
    """Tells after which step a run stops early, the same one on all processes.

    A single process stops after any step. Several ask each other, for which the host waits for the
    device: at log points, where it waits anyway, and between them every CHECK_SECONDS by the main
    process's clock, or every MAX_UNCHECKED steps if that is sooner.
    """

    def __init__(self) -> None:
        self.start, self.steps, self.interval = time.monotonic(), 0, 1

    def requested(self, *, is_log_point: bool) -> bool:
        """Whether a process has received a stop signal; call it after each step.

        Args:
            is_log_point: whether this step is one in any case.
        """
        if world_size() == 1:
            return stop_signal() is not None
        self.steps += 1
        if self.steps < self.interval and not is_log_point:
            return False
        own = stop_signal() is not None, (time.monotonic() - self.start) / self.steps
        answers = all_gather_objects([own])
        (_, seconds), *_ = answers
        self.start, self.steps = time.monotonic(), 0
        self.interval = max(1, int(CHECK_SECONDS / max(seconds, CHECK_SECONDS / MAX_UNCHECKED)))
        return any(stops for stops, _ in answers)


def training_steps(
    model: nn.Module,
    loader: StepLoader,
    state: TrainState,
    *,
    lr_at: Callable[[int], float],
    device: torch.device,
    log_every: int,
    run_log: RunLog,
    checkpoints: CheckpointWriter,
) -> Iterator[Step]:
    """Yield the steps of an epoch, or the remaining ones after a resume.

    The weights are updated when the engine requests the next step. The caller then ends the epoch
    with `state.end_epoch`.

    Args:
        model: the trained model, possibly wrapped in DistributedDataParallel.
        state: its progress says where to start.
        lr_at: learning rate of a step, by its number in the run.
        log_every: steps between log points, where the host waits for the device.
        checkpoints: saves at log points when due.

    Raises:
        NonFiniteLossError: on all processes at once, before anything is saved.
        InputError: too many images cannot be read.
        StoppedError: a process of the run received a stop signal, and the run was saved.
    """
    progress, precision, meters = state.progress, state.precision, state.meters
    images_logged = meters.num_images
    contention = contention_watch(device)
    defer_signals(saves="after this step" if world_size() == 1 else "after one of the next steps")
    stops = StopChecks()
    run_log.start_epoch(progress.epoch, progress.step_in_epoch)
    steps = TimedIterator(loader.steps(progress.epoch, progress.step_in_epoch))
    enter_step(progress.step)
    for batches in steps:
        contention.start_step()
        state.lr = lr_at(progress.step)
        set_lr(state.optimizer, state.lr)
        num_images = loader.images_in_step(progress.step_in_epoch)
        step = Step(
            model,
            state,
            batches,
            number=progress.step,
            num_images=num_images,
            num_crops=loader.num_crops,
            device=device,
            run_log=run_log,
        )
        yield step

        grad_norm = precision.clip(state.optimizer, model)
        meters.update(
            loss=step.loss, grad_norm=grad_norm, num_images=num_images, step=progress.step
        )
        # From a bad step on, the weights stay what it was computed with, see `RepeatedStep`.
        precision.update(state.optimizer, skip=meters.found_bad)
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update(state.model, step=progress.step + 1)
        contention.end_step()
        progress.step += 1
        progress.step_in_epoch += 1
        enter_step(progress.step)

        end_of_epoch = progress.step_in_epoch == loader.steps_per_epoch
        is_log_point = end_of_epoch or progress.step_in_epoch % log_every == 0
        is_log_point |= stops.requested(is_log_point=is_log_point)
        run_log.end_step(progress.step, epoch=progress.epoch, is_log_point=is_log_point)
        if is_log_point:
            try:
                stats = meters.read()  # the host waits for the device here
            except NonFiniteLossError as error:
                yield from explain(error, step, loader)  # and raise it
            state.broken.check()
            run_log.log_step(
                progress.step,
                epoch=progress.epoch,
                lr=state.lr,
                num_images=meters.num_images - images_logged,
                data_seconds=steps.seconds,
                stats=stats,
            )
            images_logged, steps.seconds = meters.num_images, 0.0
            if not end_of_epoch:
                checkpoints.save_if_due()
