"""What each decoder block adds to a reconstruction (Fig. 5a-b, App. D)."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from util.eval.reconstructions import Colors, original_pixels, predicted_pixels, psnr
from util.masking import TokenSplit


@contextmanager
def watch_blocks(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Context with a list that gets the first block's input and every block's output.

    The list grows with each forward pass.
    """
    seen: list[Tensor] = []
    handles = [blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))]
    handles += [b.register_forward_hook(lambda *call: seen.append(call[-1])) for b in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def block_levels(model: nn.Module, images: Tensor, split: TokenSplit) -> Tensor:
    """Split predictions into what the decoder's input and each of its blocks add (App. D).

    Level i is what the last norm and the last layer make of the residual that block i adds; level
    0 is that of position and mask token. The norm divides every level by the standard deviation of
    the full sum, since with their own the levels would not sum to the prediction; its shift and the
    last layer's bias belong to level 0.

    Args:
        model: a MaskedAutoencoder whose decoder has `blocks`, `norm` and `pred`.
        images: (B, C, H, W), normalized.

    Returns:
        (1+J, B, P, p*p*C) in target space; the sum over the first axis is `model.predict`.
    """
    decoder, num_predicted = model.decoder, split.predicted.shape[1]
    with watch_blocks(decoder.blocks) as seen:
        model.predict(images, split)
    tokens = torch.stack([x[:, -num_predicted:] for x in seen])  # (1+J, B, P, E)
    added = torch.cat((tokens[:1], tokens.diff(dim=0)))
    norm, pred = decoder.norm, decoder.pred
    std = (tokens[-1].var(dim=-1, unbiased=False, keepdim=True) + norm.eps).sqrt()  # (B, P, 1)
    normalized = (added - added.mean(dim=-1, keepdim=True)) / std * norm.weight
    levels = F.linear(normalized, pred.weight)  # (1+J, B, P, p*p*C)
    levels[0] += pred(norm.bias)
    return levels


def level_pixels(
    model: nn.Module, levels: Tensor, images: Tensor, split: TokenSplit, colors: Colors
) -> tuple[Tensor, Tensor]:
    """Convert levels to the [0, 1] scale.

    Args:
        levels: see `block_levels`.

    Returns:
        Levels (1+J, B, P, p*p*C), and what to add once to their sum, (B, P, p*p*C): the mean of the
        channels and, with norm_pix_loss, of each original patch.
    """
    offset = predicted_pixels(model, torch.zeros_like(levels[0]), images, split, colors)
    pixels = [predicted_pixels(model, x, images, split, colors) - offset for x in levels]
    return torch.stack(pixels), offset


def cosine_transform(patches: Tensor, patch_size: int) -> Tensor:
    """Orthonormal DCT-II of each channel of patches (..., p*p*C) -> (..., p, p, C)."""
    n = torch.arange(patch_size, dtype=patches.dtype, device=patches.device)
    basis = torch.cos(math.pi / patch_size * n[:, None] * (n + 0.5))  # (frequency, place)
    basis *= (2 / patch_size) ** 0.5
    basis[0] /= 2**0.5
    grid = patches.unflatten(-1, (patch_size, patch_size, -1))
    return torch.einsum("up,...pqc,vq->...uvc", basis, grid, basis)


def frequency_bands(patch_size: int) -> Tensor:
    """Band of each DCT coefficient (p, p): the larger of its two frequencies, 0 to p - 1."""
    n = torch.arange(patch_size)
    return torch.maximum(n[:, None], n)


class BlockShares(NamedTuple):
    """What each level of a decoder adds to its reconstructions, averaged over images."""

    energy: Tensor
    """(1+J, p): mean square of the pixels on the [0, 1] scale, in each band. Band i is i / 2
    cycles per patch; half the bands are below a quarter of a cycle per pixel."""
    projection: Tensor
    """(1+J, p): part of the whole reconstruction's energy that is due to the level; the sum over
    levels is that energy."""
    psnr: Tensor
    """(1+J,): of the levels up to this one, in dB."""

    @property
    def share(self) -> Tensor:
        """(1+J,): part of the reconstruction that is due to each level; they sum to 1."""
        return self._shares(slice(None))

    @property
    def low_share(self) -> Tensor:
        """(1+J,): `share` of the lower half of the bands."""
        return self._shares(slice(0, self.projection.shape[1] // 2))

    @property
    def high_share(self) -> Tensor:
        """(1+J,): `share` of the upper half of the bands, the details."""
        return self._shares(slice(self.projection.shape[1] // 2, None))

    @property
    def detail(self) -> Tensor:
        """(1+J,): part of a level's own energy in the upper half of the bands."""
        half = self.energy.shape[1] // 2
        return self.energy[:, half:].sum(dim=1) / self.energy.sum(dim=1).clamp(min=1e-30)

    def _shares(self, bands: slice) -> Tensor:
        part = self.projection[:, bands].sum(dim=1)
        return part / part.sum()


@torch.no_grad()
def measure_blocks(
    model: nn.Module, batches: Iterable[tuple[Tensor, TokenSplit]], colors: Colors
) -> BlockShares:
    """Measure what each decoder block adds to the reconstructions of many images.

    The mean of the channels, and with norm_pix_loss that of each patch, which the model does not
    predict, count for PSNR only.

    Args:
        model: see `block_levels`.
        batches: images (B, C, H, W), normalized, and splits that predict every masked patch.
    """
    size = model.encoder.patch_size
    bands = frequency_bands(size).flatten()
    energy = projection = quality = 0.0
    num_images = 0
    for images, split in batches:
        levels = block_levels(model, images, split)
        levels, offset = level_pixels(model, levels, images, split, colors)
        originals = original_pixels(model, images, split, colors)
        whole = cosine_transform(levels.sum(dim=0), size)  # (B, P, p, p, C)
        own, parts = [], []
        for level in levels:
            spectrum = cosine_transform(level, size)
            own.append(_by_band(spectrum.square(), bands))
            parts.append(_by_band(spectrum * whole, bands))
        energy, projection = energy + torch.stack(own), projection + torch.stack(parts)
        sums = [psnr(offset + x, originals).sum() for x in levels.cumsum(dim=0)]
        quality = quality + torch.stack(sums).cpu().double()
        num_images += len(images)
    pixels = num_images * split.predicted.shape[1] * size**2 * model.encoder.in_chans
    return BlockShares(energy / pixels, projection / pixels, quality / num_images)


def _by_band(spectrum: Tensor, bands: Tensor) -> Tensor:
    """Sum a spectrum (B, P, p, p, C) over everything but bands -> float64 (p,) on the CPU."""
    by_place = spectrum.sum(dim=(0, 1, 4)).flatten().cpu().double()  # (p*p,)
    size = spectrum.shape[-2]
    return torch.zeros(size, dtype=torch.float64).index_add(0, bands, by_place)
