"""Training on labels, for fine-tuning and linear probing, and accuracy on validation images."""

import logging
from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import Mixup

from util.compute.distributed import all_gather, rank
from util.compute.precision import Precision
from util.data.batch import Batch
from util.data.broken_images import BrokenImages
from util.data.classes import check_labels
from util.data.images import IndexedImages
from util.data.loaders import StepLoader
from util.data.mixing import mix_images
from util.data.streams import StreamedImages
from util.errors import counted
from util.runs.checkpoint import TrainState
from util.runs.training import training_steps
from util.seeding import seed_everything
from util.weights.encoder import StartingPoint

_logger = logging.getLogger(__name__)


def train_one_epoch(
    model: nn.Module,
    loader: StepLoader,
    state: TrainState,
    *,
    num_classes: int,
    seed: int,
    device: torch.device,
    mixup: Mixup | None = None,
    smoothing: float = 0.0,
    **options: object,
) -> dict[str, float]:
    """Train for one epoch, or for the rest of it after a resume.

    Drop path and mixup draw from the global generators, which are seeded at every step from the
    seed, the step and the rank.

    Args:
        model: images -> logits, possibly wrapped in DDP.
        mixup: timm's, without label smoothing; None turns it off.
        smoothing: label smoothing, in [0, 1).
        options: other arguments of `training_steps`: lr_at, log_every, run_log, checkpoints.

    Returns:
        Mean metrics of the epoch.

    Raises:
        InputError: a label is out of range.
    """
    model.train()
    for step in training_steps(model, loader, state, device=device, **options):
        seed_everything("train", seed, step.number, rank())
        for batch, _ in step.micro_batches():
            check_labels(batch.labels, num_classes)
            images, labels = batch.to(device)  # (B, C, H, W), (B,)
            with step.autocast():
                if mixup is not None:
                    images, labels = mix_images(mixup, images, labels, num_classes)
                logits = model(images).float()  # (B, num_classes)
                loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
            step.backward(loss)
    return state.end_epoch()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    precision: Precision,
    broken: BrokenImages,
) -> dict[str, float]:
    """Measure cross-entropy and accuracy over all processes, counting every image once.

    Args:
        model: images -> logits, not wrapped in DDP.
        loader: this process's part of the images.
        broken: counts unreadable images.

    Returns:
        `val_loss`, `val_top1` and `val_top5` in percent, and `val_images`.

    Raises:
        InputError: too many images cannot be read, or a label is out of range.
    """
    model.eval()
    device = precision.device
    sums = torch.zeros(4, device=device)  # loss, top-1 hits, top-5 hits, images
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
    loss, top1, top5, num_images = all_gather(sums).sum(dim=0).tolist()
    return {
        "val_loss": loss / num_images,
        "val_top1": 100 * top1 / num_images,
        "val_top5": 100 * top5 / num_images,
        "val_images": int(num_images),
    }


def describe(stats: dict[str, float]) -> str:
    """Format the results of `evaluate`."""
    return (
        f"top-1 {stats['val_top1']:.2f}%, top-5 {stats['val_top5']:.2f}%, "
        f"loss {stats['val_loss']:.4f} over {counted(stats['val_images'], 'image')}"
    )


def describe_classifier(
    start: StartingPoint,
    options: dict,
    train_set: IndexedImages | StreamedImages,
    *,
    dataset: str,
    crop_pct: float,
) -> tuple[dict, dict]:
    """Settings that must match on resume and the checkpoint header, for fine-tuning and probing.

    Args:
        options: arguments of the model, with img_size, num_classes and pool.
        crop_pct: fraction of a validation image's side that the center crop keeps.
    """
    form = {"mean": start.mean, "std": start.std}
    fixed = {
        "--model": f"vit_{start.size}",
        "hash of the weights it starts from": start.weights and start.weights.hash(),
        "--input_size": options["img_size"],
        "--pool": options["pool"],
        "number of classes": options["num_classes"],
        "--dataset": dataset,
        **{f"--{name}": value for name, value in form.items()},
        **train_set.identity(),
    }
    header = {
        "model_name": f"vit_{start.size}",
        "model_options": options,
        **form,
        "crop_pct": crop_pct,
        "classes": train_set.classes and list(train_set.classes),
    }
    return fixed, header
