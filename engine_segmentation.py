"""Training on masks, and mIoU on validation images."""

import logging
from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from util.compute.distributed import broadcast_buffers, is_main_process, rank
from util.compute.precision import Precision
from util.data.broken_images import BrokenImages
from util.data.loaders import StepLoader, show_progress
from util.data.masks import UNLABELED
from util.data.sampler import evenly_spaced
from util.data.segmentation import SegmentationBatch, SegmentationImages
from util.errors import InputError
from util.eval.display import visible
from util.eval.miou import Confusion, Scores, Windows, predict, resize_logits
from util.eval.overlays import comparison
from util.runs.checkpoint import TrainState
from util.runs.run_log import RunLog
from util.runs.training import training_steps
from util.seeding import seed_everything

_logger = logging.getLogger(__name__)


def segmentation_loss(maps: Sequence[Tensor], labels: Tensor, aux_weight: float) -> Tensor:
    """Cross-entropy of the logits, plus that of auxiliary ones.

    It is the mean over all pixels, of which unlabeled ones count as 0. So every image has the same
    weight in a step, however the step is split over processes.

    Args:
        maps: logits, each (B, K, h, w); the auxiliary ones follow the first.
        labels: (B, H, W), UNLABELED where a pixel does not count.
        aux_weight: weight of the auxiliary logits.
    """
    weights = [1.0] + [aux_weight] * (len(maps) - 1)
    losses = [
        F.cross_entropy(
            resize_logits(logits.float(), labels.shape[1:]),
            labels,
            ignore_index=UNLABELED,
            reduction="none",
        ).mean()
        for logits in maps
    ]
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


def blank_loss(model: nn.Module, aux_weight: float, images: Tensor) -> Tensor:
    """Loss of a training step on images whose every pixel is of the first class."""
    labels = images.new_zeros((len(images), *images.shape[2:]), dtype=torch.long)
    return segmentation_loss(model(images), labels, aux_weight)


def train_one_epoch(
    model: nn.Module,
    loader: StepLoader,
    state: TrainState,
    *,
    aux_weight: float,
    seed: int,
    device: torch.device,
    **options: object,
) -> dict[str, float]:
    """Train until the next evaluation, or for the rest of that time after a resume.

    Drop path and dropout draw from the global generators, which are seeded at every step from the
    seed, the step and the rank.

    Args:
        model: images -> maps of logits, possibly wrapped in DDP.
        aux_weight: weight of the auxiliary loss.
        options: other arguments of `training_steps`: lr_at, log_every, run_log, checkpoints.

    Returns:
        Mean metrics of the steps.

    Raises:
        InputError: a label is not a class.
    """
    model.train()
    for step in training_steps(model, loader, state, device=device, **options):
        seed_everything("train", seed, step.number, rank())
        for batch, _ in step.micro_batches():
            images, labels = batch.to(device)  # (B, C, H, W), (B, H, W)
            with step.autocast():
                maps = model(images)
            step.backward(segmentation_loss(maps, labels, aux_weight))
    return state.end_epoch()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Collection[SegmentationBatch],
    *,
    classes: Sequence[str],
    windows: Windows,
    precision: Precision,
    broken: BrokenImages,
) -> Scores:
    """Compare predictions and labels over all processes, counting every pixel once.

    Args:
        model: images -> maps of logits, not wrapped in DDP; the running statistics of its batch
            norms become those of the main process on every process.
        classes: names.
        loader: this process's images, one at a time.
        broken: counts unreadable images, which are left out.

    Raises:
        InputError: too many images cannot be read, a label is not a class, or no pixel counts.
    """
    broadcast_buffers(model)
    confusion = Confusion(len(classes), precision.device)
    for batch in show_progress(loader, "validation"):
        broken.add(batch.broken)
        if batch.num_images:
            confusion.add(*predict_classes(model, batch, windows=windows, precision=precision))
    broken.check()
    scores = confusion.scores()
    if not scores.confusion.any():
        raise InputError("no pixel of the validation masks counts: correct them or --ignore_index")
    return scores


@torch.no_grad()
def predict_classes(
    model: nn.Module, batch: SegmentationBatch, *, windows: Windows, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Predicted classes and labels of a batch of one image, both (1, H, W) on the device."""
    model.eval()
    image, labels = batch.to(precision.device)
    with precision.autocast():
        logits = predict(model, image, windows)
    return resize_logits(logits, labels.shape[1:]).argmax(dim=1), labels


@torch.no_grad()
def draw_predictions(
    model: nn.Module,
    images: SegmentationImages,
    classes: Sequence[str],
    *,
    windows: Windows,
    precision: Precision,
    count: int = 4,
) -> np.ndarray | None:
    """Draw a few images, evenly spaced, with their labels and predictions; None if all are broken.

    Returns:
        uint8 (height, width, 3).
    """
    rows = []
    for index in evenly_spaced(len(images), count):
        batch = images.collate([images[0, index]])
        if batch.num_images:
            found = predict_classes(model, batch, windows=windows, precision=precision)
            prediction, labels = (x[0].cpu().numpy() for x in found)
            image = visible(batch.images[0], images.pixels, images.show_channels)  # (h, w, 3)
            image = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0).float()
            image = resize_logits(image, labels.shape).round().clamp(0, 255)
            rows.append((image[0].byte().permute(1, 2, 0).numpy(), labels, prediction))
    return comparison(rows, classes) if rows else None


def show(
    scores: Scores,
    model: nn.Module,
    images: SegmentationImages,
    run_log: RunLog,
    *,
    classes: Sequence[str],
    step: int,
    **how: object,
) -> None:
    """Add scores and a picture to the logs of a run: the latest are in its folder.

    Args:
        images: for the picture.
        how: windows and precision of `draw_predictions`.
    """
    if not is_main_process():
        return
    run_log.log_scalars(dict(zip(classes, (100 * scores.iou).tolist(), strict=True)), step, "iou")
    run_log.save_json("segmentation", {"step": step, **scores.as_json(classes)})
    picture = draw_predictions(model, images, classes, **how)
    if picture is not None:
        run_log.log_image("segmentation", picture, step)
