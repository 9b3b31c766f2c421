"""The loop over an epoch's steps that every engine shares: accumulation, resume, log points."""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from util.compute.contention import contention_watch
from util.compute.distributed import gradient_sync, rank, world_size
from util.compute.signals import stop_signal
from util.compute.watchdog import enter_step
from util.data.batch import Batch, CopyStream
from util.data.classes import check_labels
from util.data.loaders import StepLoader
from util.optim import set_lr
from util.runs.checkpoint import CheckpointWriter, TrainState
from util.runs.run_log import RunLog, TimedIterator

LossOfBatch = Callable[[Batch, int], Tensor]
"""(micro-batch, how many images of the step came before) -> mean loss."""


def train_epoch(
    model: nn.Module,
    loader: StepLoader,
    state: TrainState,
    *,
    start_step: Callable[[int, int], LossOfBatch],
    lr_at: Callable[[int], float],
    device: torch.device,
    log_every: int,
    run_log: RunLog,
    checkpoints: CheckpointWriter,
    num_classes: int | None = None,
) -> dict[str, float]:
    """Train for one epoch, or for what a resume has left of it.

    Args:
        model: what is trained, perhaps wrapped to average gradients.
        loader: the epoch's steps, each a list of micro-batches.
        state: what training changes; its progress says where to begin.
        start_step: (step in the run, images of all processes in it) -> the loss of a micro-batch.
            Everything random of a step is drawn from its number.
        lr_at: learning rate of a step, by its number in the run.
        device: where the model is.
        log_every: steps between log points, the only ones at which the host waits.
        run_log: shows and keeps the metrics.
        checkpoints: saves at log points when it is time.
        num_classes: labels that are no class are refused; None if labels are not used.

    Returns:
        Mean metrics of the epoch.

    Raises:
        NonFiniteLossError: on all processes at once, before anything is saved.
        InputError: too many images cannot be read, or a label is no class.
        StoppedError: a signal told the run to stop; it is saved.
    """
    progress, precision, meters = state.progress, state.precision, state.meters
    images_shown = meters.num_images
    copies, contention = CopyStream(device), contention_watch(device)
    model.train()
    run_log.start_epoch(progress.epoch, progress.step_in_epoch)
    steps = TimedIterator(loader.steps(progress.epoch, progress.step_in_epoch))
    enter_step(progress.step)
    for micro_batches in steps:
        contention.start_step()
        lr = lr_at(progress.step)
        set_lr(state.optimizer, lr)
        num_images = loader.images_in_step(progress.step_in_epoch)
        loss_of = start_step(progress.step, num_images)
        # Gradients are averaged over processes: an image weighs the same wherever it is.
        weight = world_size() / num_images
        own_images = loader.num_crops * len(
            range(rank(), num_images // loader.num_crops, world_size())
        )

        step_loss = torch.zeros((), device=device)
        first = 0
        for micro_step, batch in enumerate(micro_batches, start=1):
            if num_classes is not None:
                check_labels(batch.labels, num_classes)
            # What stands in for another process's image weighs nothing.
            num_counted = len(batch.labels) if first < own_images else 0
            # Gradients are reduced once a step, not once a micro-step.
            with gradient_sync(model, enabled=micro_step == len(micro_batches)):
                with precision.autocast():
                    loss = loss_of(copies.copy(batch), first if num_counted else 0)
                    loss = loss * (num_counted * weight)
                precision.backward(loss)
            step_loss += loss.detach()
            first += num_counted
            if num_counted:
                state.broken.add(batch.broken)

        grad_norm = precision.step(state.optimizer, model)
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema is not None:
            state.ema.update(state.model)
        meters.update(
            loss=step_loss, grad_norm=grad_norm, num_images=num_images, step=progress.step
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
                lr=lr,
                num_images=meters.num_images - images_shown,
                data_seconds=steps.seconds,
                stats=stats,
            )
            images_shown, steps.seconds = meters.num_images, 0.0
            if not end_of_epoch:
                checkpoints.save_if_due()
    means = {**meters.means(), "lr": lr, "broken_images": state.broken.take_count()}
    meters.reset()
    progress.epoch, progress.step_in_epoch = progress.epoch + 1, 0
    return means
