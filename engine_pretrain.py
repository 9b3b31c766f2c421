"""The pre-training step: draw masks, encode visible patches, predict a part of the masked ones."""

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from util.compute.distributed import rank, world_size
from util.data.batch import Normalization
from util.data.loaders import StepLoader
from util.errors import counted
from util.eval.knn import describe_knn
from util.masking import Masking, TokenSplit
from util.patches import RawImages
from util.runs.checkpoint import TrainState, last_checkpoint
from util.runs.epoch_log import LOG_NAME, read_log
from util.runs.report import MISSING_LINE
from util.runs.rows import UNTRAINED, cells
from util.runs.start import tensorboard_command
from util.runs.training import training_steps
from util.seeding import generator_for
from util.settings.run import RunSettings

FIGURE = "reconstructions"

_logger = logging.getLogger(__name__)


def step_noise(
    masking: Masking,
    step: int,
    num_images: int,
    num_crops: int,
    device: torch.device,
) -> Tensor:
    """Draw this process's part of a step's noise, which determines its token splits.

    Every process draws the noise of all processes and keeps its own rows, so a step's splits do not
    depend on the number of processes or micro-steps.

    Args:
        step: number of the step in the run.
        num_images: images of all processes in the step; each crop counts as one.
        num_crops: crops per image, adjacent in the batch.

    Returns:
        (B, L) uniform in [0, 1) for the images of this process, in the loader's order.
    """
    generator = generator_for("mask", masking.seed, step, device=device)
    # A process without an image computes on a stand-in.
    shape = (max(num_images // num_crops, world_size()), num_crops, masking.num_patches)
    noise = torch.rand(shape, generator=generator, device=device)
    return noise[rank() :: world_size()].flatten(0, 1)


def blank_batch(
    masking: Masking,
    img_size: Sequence[int],
    num_images: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> tuple[RawImages, TokenSplit]:
    """Build the inputs of a step from black images, to find what fits and runs on a device."""
    shape = (num_images, len(mean), *img_size)
    pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
    noise = torch.zeros(num_images, masking.num_patches, device=device)
    return Normalization(tuple(mean), tuple(std)).later(pixels), masking.split(noise)


def train_one_epoch(
    model: nn.Module,
    loader: StepLoader,
    state: TrainState,
    *,
    masking: Masking,
    device: torch.device,
    **options: object,
) -> dict[str, float]:
    """Train for one epoch, or for the rest of it after a resume.

    Args:
        model: `model(images, split) -> loss`, possibly wrapped in DDP.
        options: other arguments of `training_steps`: lr_at, log_every, run_log, checkpoints.

    Returns:
        Mean metrics of the epoch.
    """
    model.train()
    for step in training_steps(model, loader, state, device=device, **options):
        images_of_step = (step.number, step.num_images, loader.num_crops)
        noise = step_noise(masking, *images_of_step, device)  # (own images, L)
        for batch, rows in step.micro_batches():
            images = batch.raw(device)  # (B, C, H, W)
            with step.autocast():
                loss = model(images, masking.split(noise[rows]))
            step.backward(loss)
    return state.end_epoch()


def report(
    run: RunSettings, epoch: int, notes: Mapping[str, str] | None, *, at_start: str = UNTRAINED
) -> None:
    """Log the results of a finished run and the paths of its files.

    Args:
        epoch: the last one.
        notes, at_start: see `util.runs.rows.cells`.

    Raises:
        RunError: the last checkpoint could not be written.
    """
    path = last_checkpoint(run.folder, epoch)
    log = {line["epoch"]: line for line in read_log(run.folder)}
    first, last = log.get(0, {}), log.get(epoch, {})
    if not last:
        _logger.warning(MISSING_LINE, run.folder / LOG_NAME)
    if "val_loss" in last:
        measured = {name: last[name] for name in last if name.startswith(("val_", "blind_"))}
        number = counted(last["val_images"], "validation image")
        _logger.info("%s: %s", number, ", ".join(cells(measured, notes)))
    if "knn20" in last:
        _logger.info("%s", describe_knn(last, first, at_start=at_start))
    _logger.info("checkpoint: %s", path)
    _logger.info("TensorBoard: %s", tensorboard_command(run))
    figure = run.folder / f"{FIGURE}.png"
    if figure.exists():
        _logger.info("figure: %s", figure)
