"""Evaluation and figures during pre-training."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from util.arguments import natural_int, positive_int
from util.compute.distributed import all_gather, is_main_process, rank, world_size
from util.compute.precision import Precision
from util.data.batch import Batch, collate
from util.data.broken_images import BrokenImages
from util.data.images import IndexedImages, Transform
from util.data.loaders import Batches
from util.data.sampler import evenly_spaced
from util.data.settings import DataSettings
from util.data.streams import StreamedImages
from util.eval.figures import draw_reconstructions
from util.eval.knn import build_knn_loaders, measure_knn
from util.eval.reconstructions import original_pixels, predicted_pixels, psnr
from util.masking import Masking, TokenSplit
from util.seeding import generator_for

KNN_EVERY = 20  # epochs
NUM_SHOWN = 8  # images in the figure of reconstructions


def val_split(
    masking: Masking, ids: Sequence[int], device: torch.device, *, masked: Sequence[int] = ()
) -> TokenSplit:
    """Draw masks of validation images, which depend only on the seed and the images' indices.

    Args:
        masked: patches to mask in any case, at most as many as are masked anyway. A grid's visible
            patches stay visible.
    """
    # "held-out" is part of the seed: another word would change every mask.
    generators = [generator_for("mask", masking.seed, "held-out", i) for i in ids]
    noise = torch.stack([torch.rand(masking.num_patches, generator=g) for g in generators])
    noise[:, list(masked)] = 1.0  # the highest, and the lowest are visible
    return masking.full_split(noise.to(device))


def masked_batches(
    loader: Iterable[Batch], masking: Masking, device: torch.device, broken: BrokenImages
) -> Iterator[tuple[Tensor, TokenSplit]]:
    """Yield this process's validation images, normalized, and splits that predict all masked ones.

    Args:
        loader: yields every image once; process r gets images r, r + world size, ...
        broken: counts unreadable images.
    """
    first = rank()
    for batch in loader:
        broken.add(batch.broken)
        images, _ = batch.to(device)  # (B, C, H, W)
        ids = range(first, first + len(images) * world_size(), world_size())
        first = ids.stop
        yield images, val_split(masking, ids, device)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    masking: Masking,
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
) -> dict[str, float]:
    """Measure how well validation images are reconstructed (App. B.2).

    Args:
        model: a MaskedAutoencoder, not wrapped in DistributedDataParallel.
        loader: see `masked_batches`.
        mean, std: of the channel normalization.

    Returns:
        `val_loss`; `val_psnr` in dB, the mean over images of the PSNR of their predicted patches in
        [0, 1], with the patches' moments taken from the original if the model was trained on
        normalized pixels; and `val_images`, their number.
    """
    model.eval()
    device, colors = precision.device, (mean, std)
    sums = torch.zeros(3, device=device)  # loss, PSNR, images
    for images, split in masked_batches(loader, masking, device, BrokenImages(0, 1.0)):
        with precision.autocast():
            pred = model.predict(images, split)
        pred = pred.float()  # (B, P, p*p*C)
        loss = (pred - model.target(images, split)).square().mean(dim=(1, 2))  # (B,)
        pixels = predicted_pixels(model, pred, images, split, colors)
        quality = psnr(pixels, original_pixels(model, images, split, colors))  # (B,)
        sums += torch.stack((loss.sum(), quality.sum(), torch.full_like(loss[0], len(images))))
    loss, quality, num_images = all_gather(sums).sum(dim=0).tolist()
    return {
        "val_loss": loss / num_images,
        "val_psnr": quality / num_images,
        "val_images": int(num_images),
    }


@dataclass(frozen=True)
class MonitorSettings:
    """Epochs between measurements; see the flags."""

    eval_every: int = 20
    knn_every: int | None = None
    """0: never; None: KNN_EVERY if the images allow it."""
    visualize_every: int = 20


class Monitor(NamedTuple):
    """Images and settings for evaluation and figures; None where there are no images."""

    every: MonitorSettings
    masking: Masking
    mean: Sequence[float]
    std: Sequence[float]
    precision: Precision
    val_loader: Batches | None
    knn_loaders: tuple[Batches, Batches] | None
    shown: tuple[Tensor, TokenSplit] | None
    """Normalized images (N, C, H, W) on the device, and their masks."""


def open_monitor(
    train_set: IndexedImages | StreamedImages,
    val_set: IndexedImages | None,
    val_loader: Batches | None,
    data: DataSettings,
    every: MonitorSettings,
    *,
    masking: Masking,
    precision: Precision,
    batch_size: int,
    plain_transform: Transform,
) -> Monitor:
    """Choose the images for evaluation and figures.

    Args:
        val_set: None without validation images. Figures then show training images, if these can
            be read by index.
        batch_size: per process, for k-NN.
        plain_transform: for training images in figures.

    Raises:
        InputError: k-NN was requested, but the images do not allow it.
    """
    device = precision.device
    knn_loaders = build_knn_loaders(
        train_set,
        val_set,
        every=every.knn_every,
        batch_size=batch_size,
        num_workers=data.num_workers,
        device=device,
    )
    shown, shown_set = None, val_set
    if val_set is None and isinstance(train_set, IndexedImages):
        shown_set = train_set.with_transform(plain_transform)
    if shown_set:
        ids = evenly_spaced(len(shown_set), NUM_SHOWN)
        images, _ = collate([shown_set[0, i] for i in ids]).to(device)
        shown = images, val_split(masking, ids, device)
    return Monitor(every, masking, data.mean, data.std, precision, val_loader, knn_loaders, shown)


def measure(
    model: nn.Module, monitor: Monitor, epoch: int, *, is_last: bool = False
) -> dict[str, float]:
    """Measure what is due: loss and PSNR of validation images, k-NN accuracy.

    Args:
        model: a MaskedAutoencoder, not wrapped in DistributedDataParallel.
        epoch: epochs done; 0 for an untrained encoder.
        is_last: measure everything.
    """
    stats, precision = {}, monitor.precision
    # A process without images has an empty loader, which is false, but has to take part.
    has_images = monitor.val_loader is not None
    if has_images and (is_last or (epoch and epoch % monitor.every.eval_every == 0)):
        channels = {"mean": monitor.mean, "std": monitor.std}
        options = {"masking": monitor.masking, "precision": precision, **channels}
        stats |= evaluate(model, monitor.val_loader, **options)
    if monitor.knn_loaders and (is_last or epoch % (monitor.every.knn_every or KNN_EVERY) == 0):
        device = precision.device
        stats |= measure_knn(
            model.encoder, *monitor.knn_loaders, device=device, precision=precision
        )
    return stats


def draw(
    model: nn.Module, monitor: Monitor, epoch: int, *, is_last: bool = False
) -> np.ndarray | None:
    """Draw the figure, uint8 (H, W, 3), on the main process; None if none is due.

    Args:
        model: see `measure`.
        epoch: epochs done.
        is_last: draw in any case.
    """
    is_due = is_last or epoch % monitor.every.visualize_every == 0
    if not is_due or monitor.shown is None or not is_main_process():
        return None
    channels = {"mean": monitor.mean, "std": monitor.std}
    return draw_reconstructions(model, *monitor.shown, precision=monitor.precision, **channels)


def add_monitor_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of MonitorSettings."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval_every",
        type=positive_int,
        default=MonitorSettings.eval_every,
        help="epochs between measurements of validation loss and PSNR (%(default)s)",
    )
    group.add_argument(
        "--knn_every",
        type=natural_int,
        help=f"epochs between measurements of k-NN accuracy, 0 for none ({KNN_EVERY} with labels "
        "and validation images)",
    )
    group.add_argument(
        "--visualize_every",
        type=positive_int,
        default=MonitorSettings.visualize_every,
        help="epochs between figures of reconstructions (%(default)s)",
    )
