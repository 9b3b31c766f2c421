"""Features of every encoder block: for k-NN, as pictures, and where the class token attends."""

from collections.abc import Iterable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from util.eval.attention import watch_layers

EPS = 1e-6  # of the norm, as in the encoder's
ROUNDING = 2e-6  # of float32 features, relative to their norm
OUTLIERS = 0.02  # fraction of patches at either end of a component that saturate its color


@torch.no_grad()
def feature_maps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Encode images (B, C, H, W) -> K = 1 + depth maps (B, 1+L, D), class token first.

    Args:
        model: a ViT.
    """
    return model.block_outputs(images, range(1 + len(model.blocks)))


def block_features(model: nn.Module, images: Tensor) -> Tensor:
    """Normalized mean of the patch tokens in every feature map, (B, C, H, W) -> (B, K*D).

    The norm has no scale or shift, as in `ViT.features`.
    """
    means = [x[:, 1:].mean(dim=1) for x in feature_maps(model, images)]  # K of (B, D)
    return torch.cat([F.layer_norm(x, x.shape[-1:], eps=EPS) for x in means], dim=1)


def mean_maps(model: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """Mean over images of every feature map, K of (1+L, D): what a token's place explains.

    Args:
        batches: images (B, C, H, W).
    """
    sums, number = [], 0
    for images in batches:
        own = [x.sum(dim=0) for x in feature_maps(model, images)]
        sums = [a + b for a, b in zip(sums, own, strict=True)] if sums else own
        number += len(images)
    return [total / number for total in sums]


def principal_colors(tokens: Tensor) -> Tensor:
    """Color patches by the first three principal components of their features.

    The components are those of all patches together, so equal colors mean similar features in all
    of the pictures. Each is scaled so that all but a few outliers fall into [0, 1].

    Args:
        tokens: (B, L, D), without class tokens.

    Returns:
        (B, L, 3) in [0, 1]; components that the features do not have are 0.5.
    """
    flat = tokens.double().flatten(0, 1)  # (B*L, D)
    rounding = ROUNDING * torch.linalg.norm(flat)
    flat = flat - flat.mean(dim=0)
    directions = torch.linalg.eigh(flat.T @ flat).eigenvectors.flip(1)[:, :3]  # largest first
    components = flat @ directions  # (B*L, 3)
    components = torch.where(components.norm(dim=0) > rounding, components, 0.0)
    components = F.pad(components, (0, 3 - components.shape[1]))
    # The sign of a component is arbitrary: make the skew positive, whatever the library returns.
    components = torch.where(components.pow(3).sum(dim=0) < 0, -components, components)
    low, high = torch.quantile(
        components, torch.tensor([OUTLIERS, 1 - OUTLIERS]).to(components), dim=0
    )
    scaled = (components - low) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    colors = torch.where(high > low, scaled, 0.5).clamp(0, 1)
    return colors.view(*tokens.shape[:2], 3).float()


@torch.no_grad()
def class_attention(model: nn.Module, images: Tensor) -> Tensor:
    """Attention of the class token to the patches, (B, C, H, W) -> (depth, B, L).

    The mean over heads; what the class token pays to itself is left out, so a map sums to less
    than 1.
    """
    maps: list[Tensor] = []

    def keep(scores: Tensor) -> None:
        maps.append(scores[:, :, :1].softmax(dim=-1)[:, :, 0, 1:].mean(dim=1))  # (B, L)

    with watch_layers((block.attn, keep) for block in model.blocks):
        model.encode(images)
    return torch.stack(maps)
