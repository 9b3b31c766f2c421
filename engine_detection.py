"""Training on boxes and masks, and average precision on validation images."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from util.compute.distributed import (
    all_gather_objects,
    broadcast_object,
    is_main_process,
    rank,
)
from util.compute.precision import Precision
from util.data.broken_images import BrokenImages
from util.data.coco import CocoImage
from util.data.detection import DetectionBatch, DetectionImages
from util.data.loaders import StepLoader, show_progress
from util.data.sampler import evenly_spaced
from util.errors import InputError
from util.eval.coco_ap import (
    DetectionScores,
    as_results,
    scale_to_image,
    score_detections,
)
from util.eval.display import visible
from util.eval.overlays import DrawnObject, side_by_side
from util.runs.checkpoint import TrainState
from util.runs.run_log import RunLog
from util.runs.training import training_steps
from util.seeding import seed_everything
from util.settings.detection import MIN_SCORE


def blank_losses(model: nn.Module, images: Tensor) -> Tensor:
    """Sum of a training step's losses on images with as many objects as the heads take at most."""
    side, device = images.shape[-1], images.device
    sampler = model.roi_heads.fg_bg_sampler
    count = int(sampler.batch_size_per_image * sampler.positive_fraction)
    target = {
        "boxes": torch.tensor([0.0, 0.0, side, side], device=device).expand(count, 4),
        "labels": torch.ones(count, dtype=torch.long, device=device),
    }
    if model.has_masks:
        target["masks"] = images.new_zeros((), dtype=torch.uint8).expand(count, side, side)
    sizes, targets = [(side, side)] * len(images), [target] * len(images)
    return sum(model(images, sizes, targets).values())


def train_one_epoch(
    model: nn.Module,
    loader: StepLoader,
    state: TrainState,
    *,
    seed: int,
    device: torch.device,
    **options: object,
) -> dict[str, float]:
    """Train until the next evaluation, or for the rest of that time after a resume.

    Drop path and the sampling of proposals draw from the global generators, which are seeded at
    every step from the seed, the step and the rank.

    Args:
        model: images, sizes, targets -> losses by name, possibly wrapped in DDP.
        options: other arguments of `training_steps`: lr_at, log_every, run_log, checkpoints.

    Returns:
        Mean metrics of the steps.
    """
    model.train()
    for step in training_steps(model, loader, state, device=device, **options):
        seed_everything("detect", seed, step.number, rank())
        for batch, _ in step.micro_batches():
            images, sizes, targets = batch.to(device)  # (B, C, S, S)
            with step.autocast():
                losses = model(images, sizes, targets)
            step.backward(sum(losses.values()))
    return state.end_epoch()


@torch.no_grad()
def detect(
    model: nn.Module, batch: DetectionBatch, images: DetectionImages, *, precision: Precision
) -> list[tuple[CocoImage, list[dict]]]:
    """Detect objects in a batch.

    Args:
        model: images, sizes -> detections, not wrapped in DDP.
        images: where the batch is from.

    Returns:
        Each image with its detections in COCO's result format, in pixels of the original.
    """
    model.eval()
    pixels, sizes, _ = batch.to(precision.device)
    with precision.autocast():
        detections = model(pixels, sizes)
    detected = []
    for number, found, shown in zip(batch.ids, detections, sizes, strict=True):
        image = images.images[number]
        found = scale_to_image(found, shown, image.size)
        results = as_results(found, image.size, image.id, images.file.category_ids)
        detected.append((image, results))
    return detected


def evaluate(
    model: nn.Module,
    loader: Collection[DetectionBatch],
    images: DetectionImages,
    *,
    precision: Precision,
    broken: BrokenImages,
) -> tuple[DetectionScores, list[dict]]:
    """Detect objects in every validation image once, over all processes, and score them.

    Args:
        model: see `detect`.
        loader: this process's images.
        images: all of them.
        broken: counts unreadable images, which are left out.

    Returns:
        The scores, and all detections in COCO's result format, by image.

    Raises:
        InputError: too many images cannot be read, or there is nothing to score.
    """
    results: list[tuple[int, list[dict]]] = []  # of each image, by its position
    for batch in show_progress(loader, "validation"):
        broken.add(batch.broken)
        if batch.num_images:
            detected = detect(model, batch, images, precision=precision)
            results += [(n, own) for n, (_, own) in zip(batch.ids, detected, strict=True)]
    broken.check()
    results = sorted(all_gather_objects(results), key=lambda entry: entry[0])
    scored = [images.images[number] for number, _ in results]
    if not any(not own.is_crowd for image in scored for own in image.objects):
        raise InputError(
            f"the validation images that can be read have no objects in {images.file.path}: "
            "repair the others"
        )
    flat = [result for _, own in results for result in own]
    scores = None
    if is_main_process():
        truth = images.file.ground_truth(scored)
        scores = score_detections(truth, flat, masks=images.masks)
    return broadcast_object(scores), flat


def true_objects(image: CocoImage, classes: Sequence[str], *, masks: bool) -> list[DrawnObject]:
    """The annotated objects of an image, for a picture."""
    objects = []
    for own in image.objects:
        left, top, width, height = own.box
        mask = own.mask(image.size) if masks else None
        name = f"{classes[own.label - 1]}{' (crowd)' if own.is_crowd else ''}"
        objects.append(DrawnObject(name, (left, top, left + width, top + height), mask))
    return objects


def found_objects(
    results: Sequence[dict], names: dict[int, str], min_score: float = MIN_SCORE
) -> list[DrawnObject]:
    """Detections of an image, for a picture.

    Args:
        results: in COCO's result format.
        names: of categories, by their ids.
    """
    objects = []
    for result in results:
        if result["score"] >= min_score:
            left, top, width, height = result["bbox"]
            box, name = (left, top, left + width, top + height), names[result["category_id"]]
            objects.append(DrawnObject(name, box, result.get("segmentation"), result["score"]))
    return objects


def draw_detections(
    model: nn.Module, images: DetectionImages, *, precision: Precision, count: int = 4
) -> np.ndarray | None:
    """Draw a few images, evenly spaced, with their objects and what the model finds.

    Returns:
        uint8 (height, width, 3); None if all of these images are broken.
    """
    rows = []
    file = images.file
    names = dict(zip(file.category_ids, file.classes, strict=True))
    for index in evenly_spaced(len(images), count):
        batch = images.collate([images[0, index]])
        if batch.num_images:
            ((image, results),) = detect(model, batch, images, precision=precision)
            pixels = visible(images.read(index), images.pixels, images.show_channels)
            true = true_objects(image, file.classes, masks=images.masks)
            rows.append((pixels, true, found_objects(results, names)))
    return side_by_side(rows) if rows else None


def show(
    scores: DetectionScores,
    model: nn.Module,
    images: DetectionImages,
    run_log: RunLog,
    *,
    step: int,
    precision: Precision,
) -> None:
    """Add scores and a picture to the logs of a run: the latest are in its folder.

    Args:
        images: for the picture.
    """
    if not is_main_process():
        return
    classes = images.file.classes
    for kind, own in scores.kinds.items():
        run_log.log_scalars(dict(zip(classes, own.by_class, strict=True)), step, f"{kind}_ap")
    run_log.save_json("detection", {"step": step, **scores.as_json(classes)})
    picture = draw_detections(model, images, precision=precision)
    if picture is not None:
        run_log.log_image("detection", picture, step)
