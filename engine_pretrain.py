"""The pre-training loop, and what is measured on held-out images."""

import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from util.compute.distributed import rank, stack_over_processes, world_size
from util.compute.precision import Precision
from util.data.batch import Batch, denormalize
from util.data.broken_images import BrokenImages
from util.data.classes import check_classes
from util.data.images import IndexedImages
from util.data.loaders import Batches, StepLoader, build_own_eval_loader
from util.data.streams import StreamedImages
from util.errors import InputError
from util.eval.figures import MOMENTS_NOTE, draw_figure, reconstruction_panels
from util.eval.knn import extract_features, knn_accuracy
from util.masking import TokenSplit
from util.patches import denormalize_patches
from util.runs.checkpoint import TrainState
from util.runs.training import LossOfBatch, train_epoch
from util.seeding import generator_for

KNN_EVERY = 20  # epochs
KNN_IMAGES = {"training": 50_000, "held-out": 10_000}  # at most

logger = logging.getLogger(__name__)


def step_noise(
    seed: int,
    step: int,
    num_images: int,
    num_patches: int,
    device: torch.device,
    *,
    num_crops: int = 1,
) -> Tensor:
    """This process's rows of a step's noise, from which its token splits follow.

    Every process draws the rows of all, so that a step's splits do not depend on how many
    processes and micro-steps share its images.

    Args:
        seed: of the run.
        step: in the run.
        num_images: of all processes in the step; each crop counts as one.
        num_patches: L.
        device: of the noise.
        num_crops: K, the crops that come of one image, next to each other.

    Returns:
        (B, L) uniform in [0, 1) for the images of this process, in the loader's order.
    """
    generator = generator_for("mask", seed, step, device=device)
    # A process without an image has a stand-in.
    shape = (max(num_images // num_crops, world_size()), num_crops, num_patches)
    noise = torch.rand(shape, generator=generator, device=device)
    return noise[rank() :: world_size()].flatten(0, 1)


def train_one_epoch(
    model: nn.Module,
    loader: StepLoader,
    state: TrainState,
    *,
    split_tokens: Callable[[Tensor], TokenSplit],
    num_patches: int,
    seed: int,
    device: torch.device,
    **options: object,
) -> dict[str, float]:
    """Train for one epoch, or for what a resume has left of it: see `util.runs.training`.

    Args:
        model: `model(images, split) -> loss`, perhaps wrapped to average gradients.
        loader: the epoch's steps.
        state: what training changes.
        split_tokens: noise (B, L) -> which patches are seen and predicted.
        num_patches: L.
        seed: of the run.
        device: where the model is.
        options: the others of `train_epoch`: lr_at, log_every, run_log, checkpoints.

    Returns:
        Mean metrics of the epoch.
    """

    def start_step(step: int, num_images: int) -> LossOfBatch:
        noise = step_noise(  # (own images, L)
            seed, step, num_images, num_patches, device, num_crops=loader.num_crops
        )

        def loss_of(batch: Batch, first: int) -> Tensor:
            images = batch.raw(device)  # (B, C, H, W)
            split = split_tokens(noise[first : first + len(images)])  # visible (B, V), ...
            return model(images, split)

        return loss_of

    return train_epoch(model, loader, state, start_step=start_step, device=device, **options)


def heldout_split(
    ids: Sequence[int],
    split_tokens: Callable[[Tensor], TokenSplit],
    *,
    num_patches: int,
    seed: int,
    device: torch.device,
) -> TokenSplit:
    """The masks of held-out images, which depend on the seed and the images' numbers alone."""
    generators = [generator_for("mask", seed, "held-out", i) for i in ids]
    noise = torch.stack([torch.rand(num_patches, generator=g) for g in generators])
    return split_tokens(noise.to(device))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    split_tokens: Callable[[Tensor], TokenSplit],
    num_patches: int,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
    device: torch.device,
) -> dict[str, float]:
    """Measure how well held-out images are reconstructed (App. B.2).

    Args:
        model: a MaskedAutoencoder, without the wrapper that averages gradients.
        loader: every held-out image once; process r has the images r, r + world size, ...
        split_tokens: noise (B, L) -> which patches are seen and predicted.
        num_patches: L.
        seed: of the run.
        mean, std: of the normalisation of channels.
        precision: for autocast.
        device: where the model is.

    Returns:
        `val_loss`; `val_psnr` in dB, the mean over images of the PSNR of their predicted patches
        in [0, 1], which takes the patches' moments from the original where the model was trained
        on normalised pixels; `val_images`.
    """
    model.eval()
    sums = torch.zeros(3, device=device)  # loss, PSNR, images
    first, broken = rank(), BrokenImages(0, 1.0)
    for batch in loader:
        broken.add(batch.broken)
        images, _ = batch.to(device)  # (B, C, H, W)
        ids = range(first, first + len(images) * world_size(), world_size())
        first = ids.stop
        split = heldout_split(ids, split_tokens, num_patches=num_patches, seed=seed, device=device)
        with precision.autocast():
            pred = model.predict(images, split)
        pred = pred.float()  # (B, P, p*p*C)
        loss = (pred - model.target(images, split)).square().mean(dim=(1, 2))  # (B,)
        originals = model.predicted_patches(images, split)
        pixels = denormalize_patches(model.pixels(pred, images, split), mean, std).clamp(0, 1)
        error = (pixels - denormalize_patches(originals, mean, std)).square().mean(dim=(1, 2))
        psnr = -10 * error.clamp(min=1e-10).log10()  # (B,), at most 100 dB
        sums += torch.stack((loss.sum(), psnr.sum(), torch.full_like(loss[0], len(images))))
    loss, psnr, num_images = stack_over_processes(sums).sum(dim=0).tolist()
    return {
        "val_loss": loss / num_images,
        "val_psnr": psnr / num_images,
        "val_images": int(num_images),
    }


@torch.no_grad()
def draw_reconstructions(
    model: nn.Module,
    images: Tensor,
    split: TokenSplit,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
) -> np.ndarray:
    """Draw images, what the encoder saw of them, and what the decoder made of that (Fig. 2).

    Args:
        model: a MaskedAutoencoder, without the wrapper that averages gradients.
        images: (B, C, H, W), normalised, on the model's device.
        split: which patches are seen and predicted.
        mean, std: of the normalisation of channels.
        precision: for autocast.

    Returns:
        uint8 (height, width, 3).
    """
    model.eval()
    with precision.autocast():
        pred = model.predict(images, split)
    pixels = denormalize_patches(model.pixels(pred.float(), images, split), mean, std)
    originals = denormalize(images, mean, std)
    panels = reconstruction_panels(originals, pixels, split, model.encoder.patch_size)
    return draw_figure(panels, note=MOMENTS_NOTE if model.norm_pix_loss else "")


def check_knn_images(
    train_set: IndexedImages | StreamedImages, val_set: IndexedImages | None
) -> None:
    """Refuse images that k-NN cannot be measured on."""
    if val_set is None or not isinstance(train_set, IndexedImages):
        raise InputError(
            "--knn_every needs training images that are no stream, and held-out ones: name some "
            "by --val_path, or leave it out"
        )
    check_classes(train_set, val_set, None)


def build_knn_loaders(
    train_set: IndexedImages | StreamedImages,
    val_set: IndexedImages | None,
    *,
    every: int | None,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> tuple[Batches, Batches] | None:
    """Loaders of labelled images, training and held-out, not augmented, for `measure_knn`.

    Args:
        train_set, val_set: the images; None where none are held out.
        every: epochs between measurements; 0 for none, None for as often as the images allow.
        batch_size: of a process.
        num_workers: loader processes.
        device: where the batches go.

    Returns:
        None for no k-NN.

    Raises:
        InputError: k-NN was asked for, and the images do not allow it.
    """
    if every == 0:
        return None
    try:
        check_knn_images(train_set, val_set)
    except InputError as error:
        if every is None:
            logger.info("k-NN accuracy is not measured: %s", error)
            return None
        raise
    options = {"batch_size": batch_size, "num_workers": num_workers, "device": device}
    plain_train_set = train_set.with_transform(val_set.transform)
    return (
        build_own_eval_loader(plain_train_set, limit=KNN_IMAGES["training"], **options),
        build_own_eval_loader(val_set, limit=KNN_IMAGES["held-out"], **options),
    )


def measure_knn(
    encoder: nn.Module,
    train_loader: Batches,
    val_loader: Batches,
    *,
    device: torch.device,
    precision: Precision,
) -> dict[str, float]:
    """Classify held-out images by their nearest training images in the encoder's features.

    Args:
        encoder: with `features(images) -> (B, D)`.
        train_loader: this process's share of labelled training images, not augmented.
        val_loader: the same of held-out images.
        device: where the encoder is.
        precision: for autocast.

    Returns:
        `knn10`, `knn20`, `knn100`: accuracy in percent with so many neighbours.
    """
    encoder.eval()
    sets = []
    for loader in (train_loader, val_loader):
        broken = BrokenImages(len(loader.dataset), max_share=1.0)
        sets += extract_features(
            encoder.features, loader, device=device, precision=precision, broken=broken
        )
    accuracy = knn_accuracy(*sets, device=device)
    return {f"knn{k}": percent for k, percent in accuracy.items()}


def describe_knn(stats: dict[str, float]) -> str:
    """What `measure_knn` measured, in words."""
    values = ", ".join(f"{name[3:]}-NN {stats[name]:.1f} %" for name in stats if "knn" in name)
    return f"accuracy on held-out images {values}"
