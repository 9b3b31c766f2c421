"""Measurements and pictures of validation images during pre-training."""

import argparse
from collections.abc import Iterable, Sequence
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
from util.data.settings import DataSettings
from util.data.streams import StreamedImages
from util.eval.figures import draw_reconstructions
from util.eval.knn import build_knn_loaders, measure_knn
from util.masking import Masking, TokenSplit
from util.patches import denormalize_patches
from util.seeding import generator_for

KNN_EVERY = 20  # epochs
NUM_SHOWN = 8  # images in the pictures of reconstructions


def val_split(masking: Masking, ids: Sequence[int], device: torch.device) -> TokenSplit:
    """The masks of validation images, which depend on the seed and the images' numbers alone."""
    generators = [generator_for("mask", masking.seed, "held-out", i) for i in ids]
    noise = torch.stack([torch.rand(masking.num_patches, generator=g) for g in generators])
    return masking.full_split(noise.to(device))


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
        model: a MaskedAutoencoder, without the wrapper that averages gradients.
        loader: every validation image once; process r has the images r, r + world size, ...
        masking: of the run.
        mean, std: of the normalisation of channels.
        precision: for autocast, on the model's device.

    Returns:
        `val_loss`; `val_psnr` in dB, the mean over images of the PSNR of their predicted patches
        in [0, 1], which takes the patches' moments from the original where the model was trained
        on normalised pixels; `val_images`.
    """
    model.eval()
    device = precision.device
    sums = torch.zeros(3, device=device)  # loss, PSNR, images
    first, broken = rank(), BrokenImages(0, 1.0)
    for batch in loader:
        broken.add(batch.broken)
        images, _ = batch.to(device)  # (B, C, H, W)
        ids = range(first, first + len(images) * world_size(), world_size())
        first = ids.stop
        split = val_split(masking, ids, device)
        with precision.autocast():
            pred = model.predict(images, split)
        pred = pred.float()  # (B, P, p*p*C)
        loss = (pred - model.target(images, split)).square().mean(dim=(1, 2))  # (B,)
        originals = model.predicted_patches(images, split)
        pixels = denormalize_patches(model.pixels(pred, images, split), mean, std).clamp(0, 1)
        error = (pixels - denormalize_patches(originals, mean, std)).square().mean(dim=(1, 2))
        psnr = -10 * error.clamp(min=1e-10).log10()  # (B,), at most 100 dB
        sums += torch.stack((loss.sum(), psnr.sum(), torch.full_like(loss[0], len(images))))
    loss, psnr, num_images = all_gather(sums).sum(dim=0).tolist()
    return {
        "val_loss": loss / num_images,
        "val_psnr": psnr / num_images,
        "val_images": int(num_images),
    }


@dataclass(frozen=True)
class MonitorSettings:
    """How many epochs lie between measurements; see the flags."""

    eval_every: int = 20
    knn_every: int | None = None
    """0 for no k-NN; None for as often as the images allow."""
    visualize_every: int = 20


class Monitor(NamedTuple):
    """What is measured and drawn beside training, as far as there are images for it."""

    every: MonitorSettings
    masking: Masking
    mean: Sequence[float]
    std: Sequence[float]
    precision: Precision
    val_loader: Batches | None
    knn_loaders: tuple[Batches, Batches] | None
    shown: tuple[Tensor, TokenSplit] | None
    """Images (N, C, H, W), normalised, on the device, and their masks."""


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
    """Choose the images that are measured and drawn.

    Args:
        train_set, val_set: the images; None where there are none for validation. Then training
            images are drawn, if they can be picked.
        val_loader: of the validation images.
        data: of the run.
        every: how often.
        masking: of the run.
        precision: for autocast, on the model's device.
        batch_size: of a process, for k-NN.
        plain_transform: of images that are drawn.

    Raises:
        InputError: k-NN was asked for, and the images do not allow it.
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
        num_shown = min(NUM_SHOWN, len(shown_set))
        ids = [i * len(shown_set) // num_shown for i in range(num_shown)]
        images, _ = collate([shown_set[0, i] for i in ids]).to(device)
        shown = images, val_split(masking, ids, device)
    return Monitor(every, masking, data.mean, data.std, precision, val_loader, knn_loaders, shown)


def measure(
    model: nn.Module, monitor: Monitor, epoch: int, *, is_last: bool = False
) -> dict[str, float]:
    """What is due after so many epochs: loss and PSNR of validation images, k-NN accuracy.

    Args:
        model: a MaskedAutoencoder, without the wrapper that averages gradients.
        monitor: what is measured.
        epoch: how many are done; 0 measures an untrained encoder.
        is_last: everything is due.
    """
    stats, precision = {}, monitor.precision
    if monitor.val_loader and (is_last or (epoch and epoch % monitor.every.eval_every == 0)):
        colours = {"mean": monitor.mean, "std": monitor.std}
        options = {"masking": monitor.masking, "precision": precision, **colours}
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
    """The picture that is due after so many epochs, uint8 (H, W, 3); None for none.

    Args:
        model: see `measure`.
        monitor: what is drawn, by the main process.
        epoch: how many are done.
        is_last: a picture is due.
    """
    is_due = is_last or epoch % monitor.every.visualize_every == 0
    if not is_due or monitor.shown is None or not is_main_process():
        return None
    colours = {"mean": monitor.mean, "std": monitor.std}
    return draw_reconstructions(model, *monitor.shown, precision=monitor.precision, **colours)


def add_monitor_args(parser: argparse.ArgumentParser) -> None:
    """The flags of MonitorSettings."""
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval_every",
        type=positive_int,
        default=MonitorSettings.eval_every,
        help="epochs between measurements of held-out loss and PSNR (%(default)s)",
    )
    group.add_argument(
        "--knn_every",
        type=natural_int,
        help=f"epochs between measurements of k-NN accuracy, 0 for none ({KNN_EVERY} where images "
        "have labels and some are held out)",
    )
    group.add_argument(
        "--visualize_every",
        type=positive_int,
        default=MonitorSettings.visualize_every,
        help="epochs between pictures of reconstructions (%(default)s)",
    )
