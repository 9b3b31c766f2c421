"""Quality of reconstructions (Table 13)."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from util.data.batch import denormalize
from util.masking import TokenSplit
from util.patches import denormalize_patches, gather_patches, scatter_patches

# What PSNR and pictures take from the original where a model predicts normalized pixels.
MOMENTS_NOTE = "each patch's mean and deviation from the original"
# What is predicted without any knowledge, of raw and of normalized pixels.
BLIND = ("the mean color of the visible patches", "flat patches of the right mean")

Colors = tuple[Sequence[float], Sequence[float]]
"""Mean and std of the channel normalization."""


def psnr(pixels: Tensor, originals: Tensor) -> Tensor:
    """PSNR of patches (B, P, p*p*C) on the [0, 1] scale, in dB, at most 100 -> (B,)."""
    error = (pixels.clamp(0, 1) - originals).square().mean(dim=(1, 2))
    return -10 * error.clamp(min=1e-10).log10()


def predicted_pixels(
    model: nn.Module, pred: Tensor, images: Tensor, split: TokenSplit, colors: Colors
) -> Tensor:
    """Convert predictions (B, P, p*p*C) to the [0, 1] scale, without clipping.

    Args:
        model: a MaskedAutoencoder; see its `pixels` for patch moments.
        images: (B, C, H, W), normalized.
    """
    return denormalize_patches(model.pixels(pred, images, split), *colors)


def original_pixels(model: nn.Module, images: Tensor, split: TokenSplit, colors: Colors) -> Tensor:
    """Pixels (B, P, p*p*C) of the predicted patches on the [0, 1] scale."""
    return denormalize_patches(model.predicted_patches(images, split), *colors)


def patch_psnr(
    model: nn.Module, pred: Tensor, images: Tensor, split: TokenSplit, colors: Colors
) -> Tensor:
    """PSNR of predictions (B, P, p*p*C), see `predicted_pixels` and `psnr` -> (B,)."""
    pixels = predicted_pixels(model, pred, images, split, colors)
    return psnr(pixels, original_pixels(model, images, split, colors))


def blind_prediction(model: nn.Module, images: Tensor, split: TokenSplit) -> Tensor:
    """What a model that has learned nothing could predict, (B, P, p*p*C).

    Every pixel has the mean color of the image's visible patches; where pixels are normalized per
    patch, it is zero, which stands for the patch's mean. The mean color is a better guess than the
    mean patch, which keeps details of the few visible patches.
    """
    channels, patch_size = images.shape[1], model.encoder.patch_size
    if model.norm_pix_loss:
        color = images.new_zeros(len(images), channels)
    else:
        visible = gather_patches(images, split.visible, patch_size)  # (B, V, p*p*C)
        color = visible.unflatten(2, (-1, channels)).mean(dim=(1, 2))  # (B, C)
    flat = color.repeat(1, patch_size**2).unsqueeze(1)  # (B, 1, p*p*C)
    return flat.expand(-1, split.predicted.shape[1], -1)


@torch.no_grad()
def reconstruction_scores(
    model: nn.Module, images: Tensor, split: TokenSplit, colors: Colors
) -> tuple[Tensor, Tensor]:
    """PSNR of the masked patches, and SSIM of the images with visible patches, twice (B,).

    Args:
        model: a MaskedAutoencoder.
        images: (B, C, H, W), normalized.
        split: predicts every masked patch.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # takes seconds

    pred = model.predict(images, split)
    pixels = predicted_pixels(model, pred, images, split, colors)
    whole = denormalize(images, *colors)
    patch_size = model.encoder.patch_size
    drawn = scatter_patches(whole, pixels.clamp(0, 1), split.predicted, patch_size)
    ssim = structural_similarity_index_measure(drawn, whole, data_range=1.0, reduction="none")
    return patch_psnr(model, pred, images, split, colors), ssim.view(-1)
