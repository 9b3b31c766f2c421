"""The optimizer steps of an epoch, for every engine: accumulation, resume, log points, saves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn as nn
from torch import Tensor

from util.compute.contention import contention_watch
from util.compute.distributed import gradient_sync, rank, world_size
from util.compute.signals import stop_signal
from util.compute.watchdog import enter_step
from util.data.batch import Batch
from util.data.loaders import StepLoader
from util.optim import set_lr
from util.runs.checkpoint import CheckpointWriter, TrainState
from util.runs.run_log import RunLog, TimedIterator


class Step:
    """One optimizer update, for which an engine computes the losses of all micro-batches.

    Args:
        model: what is trained, perhaps wrapped to average gradients.
        state: of the run.
        batches: this process's micro-batches.
        num_images: of all processes in the step, where each crop counts as one.
        num_crops: K, the crops of an image, side by side in one micro-batch.
        device: where the model is.

    Attributes:
        number: of the step in the run. Everything random of a step is drawn from it.
        loss: the sum of the losses so far, such that its mean over processes is the step's loss.
    """

    def __init__(
        self,
        model: nn.Module,
        state: TrainState,
        batches: Sequence[Batch],
        *,
        num_images: int,
        num_crops: int,
        device: torch.device,
    ) -> None:
        self.model, self.state, self.batches = model, state, batches
        self.num_images, self.number = num_images, state.progress.step
        self.own_images = num_crops * len(range(rank(), num_images // num_crops, world_size()))
        self.loss = torch.zeros((), device=device)
        self.weight = 0.0  # of the micro-batch at hand

    def micro_batches(self) -> Iterator[tuple[Batch, slice]]:
        """Every micro-batch as it left its worker, and which of this process's images it has.

        Each needs one call of `backward` before the next.
        """
        first = 0
        for number, batch in enumerate(self.batches, start=1):
            # What stands in for another process's image weighs nothing.
            counts = first < self.own_images
            # Gradients are averaged over processes: an image weighs the same wherever it is.
            self.weight = counts * batch.num_images * (world_size() / self.num_images)
            start = first if counts else 0
            # They are reduced once a step, not once a micro-step.
            with gradient_sync(self.model, enabled=number == len(self.batches)):
                yield batch, slice(start, start + batch.num_images)
            if counts:
                first += batch.num_images
                self.state.broken.add(batch.broken)

    def autocast(self) -> AbstractContextManager:
        """Context for a forward pass."""
        return self.state.precision.autocast()

    def backward(self, loss: Tensor) -> None:
        """Take in the mean loss of the micro-batch at hand."""
        loss = loss * self.weight
        self.state.precision.backward(loss)
        self.loss += loss.detach()


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
    """The steps of an epoch, or of what a resume has left of it.

    The weights are updated when the engine comes back for the next step. `state.end_epoch` ends the
    epoch.

    Args:
        model: what is trained, perhaps wrapped to average gradients.
        loader: the epoch's steps, each a list of micro-batches.
        state: what training changes; its progress says where to begin.
        lr_at: learning rate of a step, by its number in the run.
        device: where the model is.
        log_every: steps between log points, the only ones at which the host waits.
        run_log: shows and keeps the metrics.
        checkpoints: saves at log points when it is time.

    Raises:
        NonFiniteLossError: on all processes at once, before anything is saved.
        InputError: too many images cannot be read.
        StoppedError: a signal told the run to stop; it is saved.
    """
    progress, precision, meters = state.progress, state.precision, state.meters
    images_shown = meters.num_images
    contention = contention_watch(device)
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
            num_images=num_images,
            num_crops=loader.num_crops,
            device=device,
        )
        yield step

        grad_norm = precision.step(state.optimizer, model)
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update(state.model)
        meters.update(
            loss=step.loss, grad_norm=grad_norm, num_images=num_images, step=progress.step
        )
        contention.end_step()
        progress.step += 1
        progress.step_in_epoch += 1
        enter_step(progress.step)

        end_of_epoch = progress.step_in_epoch == loader.steps_per_epoch
        # Told to stop, a single process does so at once, several where they meet anyway.
        stops = world_size() == 1 and stop_signal() is not None
        if end_of_epoch or progress.step_in_epoch % log_every == 0 or stops:
            stats = meters.read()  # the host waits for the device here, and nowhere else
            state.broken.check()
            run_log.log_step(
                progress.step,
                epoch=progress.epoch,
                lr=state.lr,
                num_images=meters.num_images - images_shown,
                data_seconds=steps.seconds,
                stats=stats,
            )
            images_shown, steps.seconds = meters.num_images, 0.0
            if not end_of_epoch:
                checkpoints.save_if_due()
