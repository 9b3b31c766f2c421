"""The pre-training step: masks are drawn, a part of the patches is predicted."""

import logging
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from util.compute.distributed import rank, world_size
from util.data.batch import Normalization
from util.data.loaders import StepLoader
from util.eval.knn import describe_knn
from util.masking import Masking, TokenSplit
from util.patches import RawImages
from util.runs.checkpoint import TrainState, last_checkpoint
from util.runs.run import RunSettings
from util.runs.run_log import read_log
from util.runs.training import training_steps
from util.seeding import generator_for

FIGURE = "reconstructions"

_logger = logging.getLogger(__name__)


def step_noise(
    masking: Masking,
    step: int,
    num_images: int,
    num_crops: int,
    device: torch.device,
) -> Tensor:
    """This process's rows of a step's noise, from which its token splits follow.

    Every process draws the rows of all, so that a step's splits do not depend on how many
    processes and micro-steps share its images.

    Args:
        masking: of the run.
        step: in the run.
        num_images: of all processes in the step; each crop counts as one.
        num_crops: K, the crops that come of one image, next to each other.
        device: of the noise.

    Returns:
        (B, L) uniform in [0, 1) for the images of this process, in the loader's order.
    """
    generator = generator_for("mask", masking.seed, step, device=device)
    # A process without an image has a stand-in.
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
    """The inputs of a step on black images, to try a device with."""
    pixels = torch.zeros((num_images, 3, *img_size), dtype=torch.uint8, device=device)
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
    """Train for one epoch, or for what a resume has left of it.

    Args:
        model: `model(images, split) -> loss`, perhaps wrapped to average gradients.
        loader: the epoch's steps.
        state: what training changes.
        masking: of the run.
        device: where the model is.
        options: the others of `training_steps`: lr_at, log_every, run_log, checkpoints.

    Returns:
        Mean metrics of the epoch.
    """
    model.train()
    for step in training_steps(model, loader, state, device=device, **options):
        place = (step.number, step.num_images, loader.num_crops)
        noise = step_noise(masking, *place, device)  # (own images, L)
        for batch, rows in step.micro_batches():
            images = batch.raw(device)  # (B, C, H, W)
            with step.autocast():
                loss = model(images, masking.split(noise[rows]))
            step.backward(loss)
    return state.end_epoch()


def report(run: RunSettings) -> None:
    """Say what a finished run reached, and where it is.

    Raises:
        RunError: the last checkpoint could not be written.
    """
    last = read_log(run.folder)[-1]
    path = last_checkpoint(run.folder, last["epoch"])
    if "val_loss" in last:
        _logger.info(
            "held-out loss %.4f, masked-patch PSNR %.2f dB over %d images",
            *(last["val_loss"], last["val_psnr"], last["val_images"]),
        )
    if "knn10" in last:
        _logger.info("pre-trained encoder: %s", describe_knn(last))
    _logger.info("checkpoint: %s", path)
    _logger.info("TensorBoard: %s", run.log_folder)
    figure = run.folder / f"{FIGURE}.png"
    if figure.exists():
        _logger.info("figure: %s", figure)
