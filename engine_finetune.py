"""Training on labels, for fine-tuning and linear probing, and scores on validation images."""

from collections.abc import Collection, Sequence

import torch
import torch.nn as nn
from timm.data import Mixup

from util.compute.distributed import is_main_process, rank
from util.compute.precision import Precision
from util.data.batch import Batch
from util.data.broken_images import BrokenImages
from util.data.images import IndexedImages
from util.data.loaders import StepLoader, show_progress
from util.data.mixing import mix_images
from util.data.streams import StreamedImages
from util.eval.confusion import draw_confusion
from util.eval.tasks import ClassScores, Scores, Task
from util.runs.checkpoint import Progress, TrainState
from util.runs.resume import WEIGHTS_HASH
from util.runs.run_log import RunLog
from util.runs.training import training_steps
from util.seeding import seed_everything
from util.weights.encoder import StartingPoint


def train_one_epoch(
    model: nn.Module,
    loader: StepLoader,
    state: TrainState,
    *,
    task: Task,
    seed: int,
    device: torch.device,
    mixup: Mixup | None = None,
    **options: object,
) -> dict[str, float]:
    """Train for one epoch, or for the rest of it after a resume.

    Drop path and mixup draw from the global generators, which are seeded at every step from the
    seed, the step and the rank.

    Args:
        model: images -> logits, possibly wrapped in DDP.
        task: its loss is trained.
        mixup: timm's, without label smoothing, for a classification; None turns it off.
        options: other arguments of `training_steps`: lr_at, log_every, run_log, checkpoints.

    Returns:
        Mean metrics of the epoch.

    Raises:
        InputError: a label is missing or out of range.
    """
    model.train()
    for step in training_steps(model, loader, state, device=device, **options):
        seed_everything("train", seed, step.number, rank())
        for batch, _ in step.micro_batches():
            task.check(batch.labels)
            images, labels = batch.to(device)  # (B, C, H, W), (B,) or (B, N)
            with step.autocast():
                if mixup is not None:
                    images, labels = mix_images(mixup, images, labels, task.num_outputs)
                logits = model(images).float()  # (B, num_outputs)
                loss = task.loss(logits, labels)
            step.backward(loss)
    return state.end_epoch()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Collection[Batch],
    *,
    task: Task,
    precision: Precision,
    broken: BrokenImages,
) -> Scores:
    """Measure a model over all processes, counting every image once.

    Args:
        model: images -> logits, not wrapped in DDP.
        loader: this process's part of the images.
        task: what is measured.
        broken: counts unreadable images.

    Raises:
        InputError: too many images cannot be read, or a label is missing or out of range.
    """
    model.eval()
    device = precision.device
    measurement = task.measurement(device)
    for batch in show_progress(loader, "validation"):
        task.check(batch.labels)
        images, labels = batch.to(device)  # (B, C, H, W), (B,) or (B, N)
        with precision.autocast():
            logits = model(images)  # (B, num_outputs)
        measurement.add(logits.float(), labels)
        broken.add(batch.broken)
    broken.check()
    return measurement.scores()


def show(
    scores: Scores, classes: Sequence[str] | None, run_log: RunLog, *, progress: Progress
) -> None:
    """Save the latest scores of all classes, and the confusion matrix, in a run's folder.

    Args:
        classes: names, if they are known.
    """
    if not is_main_process():
        return
    run_log.save_json("classes", {"step": progress.step, **scores.as_json(classes)})
    if isinstance(scores, ClassScores) and scores.confusion is not None:
        picture = draw_confusion(scores.confusion, classes)
        run_log.log_image("confusion", picture, progress.epoch)


def describe_classifier(
    start: StartingPoint,
    origin: str | None,
    options: dict,
    train_set: IndexedImages | StreamedImages,
    *,
    dataset: str,
    crop_pct: float,
    tile: int | None,
) -> tuple[dict, dict]:
    """Settings that must match on resume and the checkpoint header, for fine-tuning and probing.

    Args:
        origin: hash of the weights that the run started from, if any.
        options: arguments of the model, with img_size, num_classes and pool.
        crop_pct: fraction of a validation image's side that the center crop keeps.
        tile: side of the windows that stand for larger images, if there are any.
    """
    colors = {"mean": start.mean, "std": start.std}
    fixed = {
        "--model": f"vit_{start.size}",
        WEIGHTS_HASH: origin,
        "--input_size": options["img_size"],
        "--pool": options["pool"],
        "--num_queries": options.get("num_queries"),
        "--layer": options.get("layers"),
        "number of classes": options["num_classes"],
        "--dataset": dataset,
        **start.pixels.recipe,
        **{f"--{name}": value for name, value in colors.items()},
        "--tile": tile,
        **train_set.identity(),
    }
    header = {
        "model_name": f"vit_{start.size}",
        "model_options": options,
        **colors,
        **start.pixels.header,
        "crop_pct": crop_pct,
        "tile": tile,
        "classes": train_set.classes and list(train_set.classes),
    }
    return fixed, header
