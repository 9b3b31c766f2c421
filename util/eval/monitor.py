"""Evaluation and figures during pre-training."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from util.compute.distributed import all_gather, is_main_process, rank, world_size
from util.compute.precision import Precision
from util.data.batch import Batch, collate
from util.data.broken_images import BrokenImages
from util.data.images import IndexedImages, Transform
from util.data.loaders import Batches, show_progress
from util.data.sampler import evenly_spaced
from util.data.streams import StreamedImages
from util.eval.display import Display, choose_display, is_deep
from util.eval.figures import draw_reconstructions, readable_name
from util.eval.knn import build_knn_loaders, measure_knn
from util.eval.reconstructions import Colors, blind_prediction, patch_psnr
from util.masking import Masking, TokenSplit
from util.seeding import generator_for
from util.settings.data import DataSettings
from util.settings.evaluation import KNN_EVERY, MonitorSettings

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
        normalized pixels; `blind_loss` and `blind_psnr`, those of a prediction that knows nothing,
        see `blind_prediction`; and `val_images`, their number.
    """
    model.eval()
    device, colors = precision.device, (mean, std)
    sums = torch.zeros(5, device=device)  # loss and PSNR, the same of a blind prediction, images
    for images, split in masked_batches(
        show_progress(loader, "validation"), masking, device, BrokenImages(0, 1.0)
    ):
        with precision.autocast():
            pred = model.predict(images, split)
        target = model.target(images, split)  # (B, P, p*p*C)
        for i, values in enumerate((pred.float(), blind_prediction(model, images, split))):
            sums[2 * i] += (values - target).square().mean(dim=(1, 2)).sum()
            sums[2 * i + 1] += patch_psnr(model, values, images, split, colors).sum()
        sums[4] += len(images)
    *totals, num_images = all_gather(sums).sum(dim=0).tolist()
    names = ("val_loss", "val_psnr", "blind_loss", "blind_psnr")
    means = {name: total / num_images for name, total in zip(names, totals, strict=True)}
    return means | {"val_images": int(num_images)}


class Monitor(NamedTuple):
    """Images and settings for evaluation and figures; None where there are no images."""

    model_name: str
    every: MonitorSettings
    masking: Masking
    mean: Sequence[float]
    std: Sequence[float]
    precision: Precision
    val_loader: Batches | None
    knn_loaders: tuple[Batches, Batches] | None
    shown: tuple[Tensor, TokenSplit] | None
    """Normalized images (N, C, H, W) on the device, and their masks."""
    display: Display
    """How they are shown."""
    at_start: str = "untrained"
    """What figures call the model before the first step."""

    @property
    def knn_every(self) -> int:
        """Epochs between measurements of k-NN accuracy; 0 for none."""
        return (self.every.knn_every or KNN_EVERY) if self.knn_loaders else 0

    @property
    def evaluated_every(self) -> int:
        """Epochs between measurements of anything; 0 for none."""
        has_images = self.val_loader is not None
        return min(filter(None, (self.every.eval_every * has_images, self.knn_every)), default=0)

    def first_judged(self, epochs: int) -> int:
        """Return the first epoch, from a tenth of a run on, with a measurement of k-NN accuracy.

        Args:
            epochs: of the run.
        """
        every = self.knn_every or epochs
        return min(epochs, every * math.ceil(epochs / 10 / every))


def open_monitor(
    train_set: IndexedImages | StreamedImages,
    val_set: IndexedImages | None,
    val_loader: Batches | None,
    data: DataSettings,
    every: MonitorSettings,
    *,
    model_name: str,
    masking: Masking,
    colors: Colors,
    precision: Precision,
    batch_size: int,
    plain_transform: Transform,
    at_start: str = "untrained",
) -> Monitor:
    """Choose the images for evaluation and figures.

    Args:
        val_set: None without validation images. Figures then show training images, if these can
            be read by index.
        model_name: such as crossmae_vit_base_patch16, for the title of figures.
        colors: mean and std of the images' channels.
        batch_size: per process, for k-NN.
        plain_transform: for training images in figures.
        at_start: what the model before the first step is called in figures.

    Raises:
        InputError: k-NN was requested, but the images do not allow it; there is no such channel
            as those to show.
    """
    device = precision.device
    display = choose_display(len(colors[0]), every.show_channels)
    knn_loaders = build_knn_loaders(
        train_set,
        val_set,
        every=every.knn_every,
        num_images=every.knn_images,
        batch_size=batch_size,
        num_workers=data.num_workers,
        device=device,
    )
    shown, shown_set = None, val_set
    if val_set is None and isinstance(train_set, IndexedImages):
        shown_set = train_set.with_transform(plain_transform)
    if shown_set:
        ids = evenly_spaced(len(shown_set), NUM_SHOWN)
        batch = collate([shown_set[0, i] for i in ids])
        display = replace(display, stretch=is_deep(batch))
        shown = batch.to(device)[0], val_split(masking, ids, device)
    settings = model_name, every, masking, *colors, precision
    return Monitor(*settings, val_loader, knn_loaders, shown, display, at_start)


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
    if monitor.knn_every and (is_last or epoch % monitor.knn_every == 0):
        device = precision.device
        stats |= measure_knn(
            model.encoder, *monitor.knn_loaders, device=device, precision=precision
        )
    return stats


def is_picture_due(epoch: int, every: int | None) -> bool:
    """Whether reconstructions are drawn after this number of epochs.

    Args:
        every: None for 0, 1, 2, 5, 10, 20, 50, ... epochs, since pictures change most at first.
    """
    if every is None:
        return str(epoch).rstrip("0") in ("", "1", "2", "5")
    return epoch % every == 0


def draw(
    model: nn.Module, monitor: Monitor, epoch: int, *, is_last: bool = False
) -> np.ndarray | None:
    """Draw the figure, uint8 (H, W, 3), on the main process; None if none is due.

    Args:
        model: see `measure`.
        epoch: epochs done; 0 for an untrained model.
        is_last: draw in any case.
    """
    is_due = is_last or is_picture_due(epoch, monitor.every.visualize_every)
    if not is_due or monitor.shown is None or not is_main_process():
        return None
    return draw_reconstructions(
        model,
        *monitor.shown,
        mean=monitor.mean,
        std=monitor.std,
        precision=monitor.precision,
        name=readable_name(monitor.model_name, epoch, at_start=monitor.at_start),
        display=monitor.display,
    )
