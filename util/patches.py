"""Conversion between images and patches, and selection of patches and tokens by index."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PATCH_EPS = 1e-6  # added to a patch's variance, as in MAE


# Values that become 0 and 1.
TYPE_RANGES: dict[torch.dtype, tuple[float, float]] = {
    torch.uint8: (0, 255),
    torch.uint16: (0, 65535),
    torch.int16: (-32768, 32767),
    torch.float32: (0, 1),
}


def scale_to_unit(pixels: Tensor, value_range: tuple[float, float] | None = None) -> Tensor:
    """Scale pixels of any type in TYPE_RANGES to float32 such that a range becomes [0, 1].

    Args:
        value_range: None for that of the type.
    """
    low, high = TYPE_RANGES[pixels.dtype] if value_range is None else value_range
    scaled = pixels.to(torch.float32, copy=True)
    if low:
        scaled.sub_(low)
    return scaled.mul_(1 / (high - low))


def normalize(
    pixels: Tensor, mean: Tensor, std: Tensor, value_range: tuple[float, float] | None = None
) -> Tensor:
    """Normalize pixels to float32 (x / 255 - mean) / std, in torchvision's operation order.

    Args:
        pixels: of a type in TYPE_RANGES.
        mean, std: per channel, for pixels in [0, 1]; broadcastable to `pixels`.
        value_range: see `scale_to_unit`.
    """
    return scale_to_unit(pixels, value_range).sub_(mean).div_(std)


def as_movable(pixels: Tensor) -> Tensor:
    """View uint16, for which PyTorch hardly has any operations, as int16 of the same bits."""
    return pixels.view(torch.int16) if pixels.dtype == torch.uint16 else pixels


@dataclass(frozen=True)
class RawImages:
    """Images in the type of their files, whose patches are normalized when they are gathered.

    The patches are bit-identical to those of normalized images.

    Args:
        pixels: (B, C, H, W) of a type in TYPE_RANGES, preferably channels-last in memory.
        mean, std: (C,), see `normalize`.
        value_range: see `scale_to_unit`.
    """

    pixels: Tensor
    mean: Tensor
    std: Tensor
    value_range: tuple[float, float] | None = None

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
    grid = patch_grid(images if raw is None else as_movable(raw.pixels), patch_size)
    rows, columns = ids // grid.shape[2], ids % grid.shape[2]
    batch = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
    patches = grid[batch, rows, columns]  # (B, N, p, p, C)
    if raw is not None:
        patches = patches.view(raw.pixels.dtype)
        patches = normalize(patches, raw.mean, raw.std, raw.value_range)
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
