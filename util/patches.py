"""Conversion between images and patches, and selection of patches and tokens by index."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PATCH_EPS = 1e-6  # added to a patch's variance, as in MAE


def normalize(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalize uint8 pixels to float32 (x / 255 - mean) / std, in torchvision's operation order.

    Args:
        mean, std: per channel, for pixels in [0, 1]; broadcastable to `pixels`.
    """
    return pixels.to(torch.float32).mul_(1 / 255).sub_(mean).div_(std)


@dataclass(frozen=True)
class RawImages:
    """uint8 images whose patches are normalized when they are gathered.

    The patches are bit-identical to those of normalized images.

    Args:
        pixels: uint8 (B, C, H, W), preferably channels-last in memory.
        mean, std: (C,), see `normalize`.
    """

    pixels: Tensor
    mean: Tensor
    std: Tensor

    @property
    def shape(self) -> torch.Size:
        """(B, C, H, W)."""
        return self.pixels.shape

    def __len__(self) -> int:
        return len(self.pixels)


def patch_grid(images: Tensor, patch_size: int) -> Tensor:
    """View images as a grid of patches, (B, C, H, W) -> (B, H/p, W/p, p, p, C), without a copy.

    Works in any memory format; with channels last, a patch's rows are contiguous in the view.
    """
    B, C, H, W = images.shape
    p = patch_size
    return images.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Split images into patches in row-major order, each flattened row by row, channels last.

    Args:
        images: (B, C, H, W), with H and W divisible by the patch size p.

    Returns:
        (B, L, p*p*C) with L = H/p * W/p.
    """
    return patch_grid(images, patch_size).flatten(1, 2).flatten(2)


def unpatchify(patches: Tensor, patch_size: int, grid_size: tuple[int, int]) -> Tensor:
    """Undo `patchify`: (B, L, p*p*C) -> (B, C, H, W)."""
    B, p = patches.shape[0], patch_size
    down, across = grid_size
    grid = patches.view(B, down, across, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return grid.reshape(B, -1, down * p, across * p)  # (B, C, H, W)


def gather_patches(images: Tensor | RawImages, ids: Tensor, patch_size: int) -> Tensor:
    """Copy the chosen patches out of the images, in the layout of `patchify`.

    Args:
        images: (B, C, H, W), or raw images, whose patches are normalized.
        ids: int64 (B, N), row-major patch indices.

    Returns:
        (B, N, p*p*C).
    """
    raw = images if isinstance(images, RawImages) else None
    grid = patch_grid(images if raw is None else raw.pixels, patch_size)
    rows, columns = ids // grid.shape[2], ids % grid.shape[2]
    batch = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
    patches = grid[batch, rows, columns]  # (B, N, p, p, C)
    if raw is not None:
        patches = normalize(patches, raw.mean, raw.std)
    return patches.flatten(2)  # (B, N, p*p*C)


def scatter_patches(images: Tensor, patches: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """Copy the images and replace the chosen patches; undoes `gather_patches`."""
    images = images.clone(memory_format=torch.contiguous_format)
    grid = patch_grid(images, patch_size)
    rows, columns = ids // grid.shape[2], ids % grid.shape[2]
    batch = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
    grid[batch, rows, columns] = patches.view(*ids.shape, *grid.shape[3:]).to(images.dtype)
    return images


def gather_tokens(tokens: Tensor, ids: Tensor) -> Tensor:
    """Pick tokens by index, (1 or B, L, D) and int64 (B, N) -> (B, N, D)."""
    if tokens.shape[0] == 1:
        return tokens[0][ids]
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def patch_moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each patch, (B, N, p*p*C) -> twice (B, N, 1).

    PATCH_EPS is added to the variance.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return mean, (variance + PATCH_EPS).sqrt()


def denormalize_patches(patches: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the channel normalization of patches (B, N, p*p*C), back to the range [0, 1]."""
    mean, std = (torch.tensor(values, device=patches.device) for values in (mean, std))
    return (patches.unflatten(-1, (-1, len(mean))) * std + mean).flatten(2)
