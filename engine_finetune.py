"""Training on labels, for fine-tuning and linear probing, and accuracy on held-out images."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from util.compute.distributed import rank, stack_over_processes
from util.compute.precision import Precision
from util.data.batch import Batch
from util.data.broken_images import BrokenImages
from util.data.classes import check_labels
from util.data.loaders import StepLoader
from util.runs.checkpoint import BEST_NAME, TrainState, last_checkpoint
from util.runs.run_log import read_log
from util.runs.training import LossOfBatch, train_epoch
from util.seeding import seed_everything

_logger = logging.getLogger(__name__)


def mix_images(
    mixup: Mixup, images: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Mix the images of a micro-batch with each other, and their labels alike (Table 11).

    timm mixes the i-th with the i-th last, of an even number. The last of an odd number stays as it
    is.

    Args:
        mixup: timm's, drawing from numpy's global generator; without label smoothing.
        images: (B, C, H, W); changed.
        labels: (B,).
        num_classes: N.

    Returns:
        images (B, C, H, W) and targets (B, N), whose rows sum to 1.
    """
    even = len(images) // 2 * 2
    targets = F.one_hot(labels, num_classes).to(images.dtype)  # (B, N)
    if even:
        images[:even], targets[:even] = mixup(images[:even], labels[:even])
    return images, targets


def train_one_epoch(
    model: nn.Module,
    loader: StepLoader,
    state: TrainState,
    *,
    mixup: Mixup | None,
    smoothing: float,
    num_classes: int,
    seed: int,
    device: torch.device,
    **options: object,
) -> dict[str, float]:
    """Train for one epoch, or for what a resume has left of it: see `util.runs.training`.

    Drop path and mixup draw from the global generators, which start every step from the seed, the
    step and the process.

    Args:
        model: images -> logits, perhaps wrapped to average gradients.
        loader: the epoch's steps.
        state: what training changes.
        mixup: timm's, without label smoothing; None leaves images as they are.
        smoothing: share of every target that is spread over all classes.
        num_classes: of the head.
        seed: of the run.
        device: where the model is.
        options: the others of `train_epoch`: lr_at, log_every, run_log, checkpoints.

    Returns:
        Mean metrics of the epoch.
    """

    def start_step(step: int, _: int) -> LossOfBatch:
        seed_everything("train", seed, step, rank())

        def loss_of(batch: Batch, _: int) -> Tensor:
            images, labels = batch.to(device)  # (B, C, H, W), (B,)
            if mixup is not None:
                images, labels = mix_images(mixup, images, labels, num_classes)
            return F.cross_entropy(model(images).float(), labels, label_smoothing=smoothing)

        return loss_of

    return train_epoch(
        model,
        loader,
        state,
        start_step=start_step,
        num_classes=num_classes,
        device=device,
        **options,
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    device: torch.device,
    precision: Precision,
    broken: BrokenImages,
) -> dict[str, float]:
    """Measure cross-entropy and accuracy; over all processes, every image counts once.

    Args:
        model: images -> logits, without the wrapper that averages gradients.
        loader: this process's share of the images.
        device: where the model is.
        precision: for autocast.
        broken: keeps the books on images that cannot be read.

    Returns:
        `val_loss`, `val_top1` and `val_top5` in percent, `val_images`.

    Raises:
        InputError: too many images cannot be read, or a label is no class.
    """
    model.eval()
    sums = torch.zeros(4, device=device)  # of losses, hits, hits among the best five, images
    for batch in loader:
        images, labels = batch.to(device)  # (B, C, H, W), (B,)
        with precision.autocast():
            logits = model(images)  # (B, num_classes)
        logits = logits.float()
        check_labels(batch.labels, logits.shape[1])
        best = logits.topk(min(5, logits.shape[1])).indices  # (B, 5)
        hits = best == labels.unsqueeze(1)
        sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        sums[1] += hits[:, 0].sum()
        sums[2] += hits.sum()
        sums[3] += len(labels)
        broken.add(batch.broken)
    broken.check()
    loss, top1, top5, num_images = stack_over_processes(sums).sum(dim=0).tolist()
    return {
        "val_loss": loss / num_images,
        "val_top1": 100 * top1 / num_images,
        "val_top5": 100 * top5 / num_images,
        "val_images": int(num_images),
    }


def describe(stats: dict[str, float]) -> str:
    """What `evaluate` measured, in words."""
    return (
        f"top-1 {stats['val_top1']:.2f} %, top-5 {stats['val_top5']:.2f} %, "
        f"loss {stats['val_loss']:.4f} over {stats['val_images']} images"
    )


def report(output_dir: Path, title: str) -> None:
    """Say what a finished run reached, in the last epoch and in the best, and where it is.

    Args:
        output_dir: of the run.
        title: what it was.

    Raises:
        RunError: the last checkpoint could not be written.
    """
    log = read_log(output_dir)
    last = log[-1]
    path = last_checkpoint(output_dir, last["epoch"])
    if "val_top1" in last:
        best = max((line for line in log if "val_top1" in line), key=lambda line: line["val_top1"])
        _logger.info("%s, last epoch, %d: %s", title, last["epoch"], describe(last))
        _logger.info("%s, best epoch, %d: %s", title, best["epoch"], describe(best))
        _logger.info("checkpoint of the best epoch: %s", output_dir / BEST_NAME)
    _logger.info("checkpoint: %s", path)
