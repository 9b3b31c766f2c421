"""The pre-training loop, and what is measured on held-out images."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from util.broken_images import BrokenImages
from util.checkpoint import TrainState
from util.distributed import rank, stack_over_processes, world_size
from util.figures import MOMENTS_NOTE, draw_figure, reconstruction_panels
from util.images import Batch
from util.knn import extract_features, knn_accuracy
from util.loaders import Batches, StepLoader
from util.masking import TokenSplit
from util.patches import denormalize_patches
from util.precision import Precision
from util.seeding import generator_for
from util.training import LossOfImages, train_epoch
from util.transforms import denormalize


def step_noise(
    seed: int, step: int, num_images: int, num_patches: int, device: torch.device
) -> Tensor:
    """This process's rows of a step's noise, from which its token splits follow.

    Every process draws the rows of all, so that a step's splits do not depend on how many
    processes and micro-steps share its images.

    Returns:
        (B, L) uniform in [0, 1) for the images of this process, in the loader's order.
    """
    generator = generator_for("mask", seed, step, device=device)
    num_rows = max(num_images, world_size())  # a process without an image has a stand-in
    noise = torch.rand(num_rows, num_patches, generator=generator, device=device)
    return noise[rank() :: world_size()]


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
    """Train for one epoch, or for what a resume has left of it; see `util.training.train_epoch`.

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

    def start_step(step: int, num_images: int) -> LossOfImages:
        noise = step_noise(seed, step, num_images, num_patches, device)  # (own images, L)

        def loss_of(images: Tensor, _: Tensor, first: int) -> Tensor:
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
        images = batch.images.to(device, non_blocking=True)  # (B, C, H, W)
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
