"""What inter-block attention reads: its weights, and their trend over the decoder (Fig. 5c)."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from scipy.stats import rankdata
from torch import Tensor

from util.masking import TokenSplit

NUM_ORDERS = 10_000
TINY = 1e-30


def mixing_weights(mixer: nn.Module) -> Tensor:
    """Weights of an InterBlockAttention as they are applied, (J, K) on the CPU."""
    weight = mixer.weight.detach().cpu()
    return weight.softmax(dim=1) if mixer.softmax else weight


def shares(weights: Tensor) -> Tensor:
    """Absolute weights (J, K), each row divided by its sum; a row of zeros stays."""
    return weights.abs() / weights.abs().sum(dim=1, keepdim=True).clamp(min=TINY)


def scaled_rows(weights: Tensor) -> Tensor:
    """Weights (J, K), each row divided by its largest absolute value.

    A mix is normalized before it is read, so the scale of its row means nothing.
    """
    return weights / weights.abs().amax(dim=1, keepdim=True).clamp(min=TINY)


@torch.no_grad()
def map_sizes(model: nn.Module, batches: Iterable[tuple[Tensor, TokenSplit]]) -> Tensor:
    """Root mean square of each feature map that the decoder mixes, (K,) on the CPU.

    Args:
        model: a MaskedAutoencoder with inter-block attention.
        batches: images (B, C, H, W) and their splits.
    """
    sums, number = torch.zeros(len(model.mixer.map_ids), dtype=torch.float64), 0

    def add(mixer: nn.Module, inputs: tuple[list[Tensor]]) -> None:
        nonlocal number
        maps = [inputs[0][i] for i in mixer.map_ids]
        if mixer.projections is not None:
            maps = [project(x) for project, x in zip(mixer.projections, maps, strict=True)]
        sums.add_(torch.stack([x.square().sum() for x in maps]).cpu().double())
        number += maps[0].numel()

    handle = model.mixer.register_forward_pre_hook(add)
    try:
        for images, split in batches:
            model.mixer(model.encoder(images, split))
    finally:
        handle.remove()
    return (sums / number).sqrt().float()


def centers(weights: Tensor, map_ids: Sequence[int]) -> np.ndarray:
    """Center of mass of each row's shares on the axis of encoder blocks, (J,)."""
    return (shares(weights.double()) @ torch.tensor(map_ids, dtype=torch.float64)).numpy()


class Trend(NamedTuple):
    """Whether later decoder blocks read earlier feature maps."""

    rho: float
    """Spearman's rank correlation of a decoder block's number and its center, from -1 to 1."""
    p_value: float
    """Probability that a random start has a rho at least as low (one-sided)."""


def depth_trend(weights: Tensor, map_ids: Sequence[int], *, seed: int) -> Trend | None:
    """Compare the trend of weights (J, K) with what a random start gives.

    The rows of a random start are drawn independently from one distribution, so their centers come
    in every order with equal probability. The p-value is estimated from NUM_ORDERS random orders;
    with J blocks it cannot be below 1 / J!.

    Args:
        seed: of the orders.

    Returns:
        None with fewer than two mixes or maps, which have no trend.
    """
    if min(weights.shape) < 2:
        return None
    ranks = rankdata(centers(weights, map_ids))
    ranks -= ranks.mean()
    order = np.arange(len(ranks)) - (len(ranks) - 1) / 2
    norm = np.linalg.norm(ranks) * np.linalg.norm(order)
    rho = ranks @ order / norm if norm else 0.0
    random = np.random.default_rng(seed).permuted(np.tile(ranks, (NUM_ORDERS, 1)), axis=1)
    lower = int((random @ order <= ranks @ order + 1e-9).sum())
    return Trend(float(rho), (1 + lower) / (1 + NUM_ORDERS))
