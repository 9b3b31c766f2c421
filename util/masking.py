"""Which patches the encoder sees and which the decoder predicts (Sec. 3.3, App. B.4)."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from util.errors import InputError
from util.settings.masking import MASK_SAMPLINGS, MaskSettings


class TokenSplit(NamedTuple):
    """Row-major patch indices of a batch, without the class token."""

    visible: Tensor
    """int64 (B, V): the encoder's patches, in input order."""
    predicted: Tensor
    """int64 (B, P): the masked patches that the decoder predicts; disjoint from `visible`."""


class TokenCounts(NamedTuple):
    """Numbers of patches in an image: all, visible, and predicted."""

    patches: int
    visible: int
    predicted: int

    @property
    def masked(self) -> int:
        """Patches that the encoder does not see."""
        return self.patches - self.visible


def count_tokens(num_patches: int, mask_ratio: float, pred_ratio: float | None) -> TokenCounts:
    """Turn the ratios p and γ into counts: V = floor(L (1 - p)), P = round(L γ) (Sec. 3.3).

    The ratios are treated as exact decimals, so that 100 patches at p = 0.9 leave 10 visible;
    floating-point arithmetic would leave 9.

    Args:
        num_patches: L, patches per image.
        mask_ratio: p in (0, 1), the fraction of all patches that is masked.
        pred_ratio: γ in (0, p], the fraction of all patches that is predicted; None predicts every
            masked patch, which differs from γ = p by at most one patch of rounding.

    Raises:
        InputError: a ratio is out of range or leaves no patch visible or predicted.
    """
    if not 0 < mask_ratio < 1:
        raise InputError(f"the mask ratio must be strictly between 0 and 1, not {mask_ratio}")
    if pred_ratio is not None and not 0 < pred_ratio <= mask_ratio:
        raise InputError(
            f"the prediction ratio must be above 0 and at most the mask ratio {mask_ratio}, "
            f"not {pred_ratio}: only masked patches can be predicted"
        )
    num_visible = math.floor(num_patches * (1 - Fraction(str(mask_ratio))))
    if pred_ratio is None:
        num_predicted = num_patches - num_visible
    else:
        num_predicted = round(num_patches * Fraction(str(pred_ratio)))
    if num_visible == 0:
        raise InputError(
            f"a mask ratio of {mask_ratio} leaves none of {num_patches} patches visible: lower it"
        )
    if num_predicted == 0:
        raise InputError(
            f"a prediction ratio of {pred_ratio} predicts none of {num_patches} patches: raise it"
        )
    return TokenCounts(num_patches, num_visible, num_predicted)


def random_split(noise: Tensor, counts: TokenCounts) -> TokenSplit:
    """Split patches at random: those with the lowest noise are visible, the next ones predicted.

    Args:
        noise: (B, L), independent uniform numbers in [0, 1).
    """
    order = noise.argsort(dim=1)  # (B, L)
    visible, predicted = order[:, : counts.visible], order[:, counts.visible :]
    return TokenSplit(visible, predicted[:, : counts.predicted])


def grid_split(noise: Tensor, counts: TokenCounts, grid_size: tuple[int, int]) -> TokenSplit:
    """Keep the top-left patch of every 2 x 2; draw the predicted ones at random (Table 15).

    Args:
        noise: (B, L), independent uniform numbers in [0, 1).
        counts: with V = L / 4.
        grid_size: patches (down, across), both even.
    """
    down, across = grid_size
    ids = torch.arange(down * across, device=noise.device).view(down, across)
    visible = ids[::2, ::2].flatten().expand(noise.shape[0], -1)  # (B, V)
    # Noise above every other's keeps the visible patches from being predicted.
    order = noise.scatter(1, visible, 2.0).argsort(dim=1)  # (B, L)
    return TokenSplit(visible, order[:, : counts.predicted])


def check_grid(grid_size: tuple[int, int], mask_ratio: float) -> None:
    """Raise InputError unless grid masking, which masks three of every four patches, can work."""
    if mask_ratio != 0.75:
        raise InputError(
            f"--mask_sampling grid needs --mask_ratio 0.75, not {mask_ratio}: change one of them"
        )
    if grid_size[0] % 2 or grid_size[1] % 2:
        raise InputError(
            f"grid masking needs an even number of patches in both directions, not "
            f"{grid_size[0]} x {grid_size[1]}: change --input_size, or use --mask_sampling random"
        )


def split_tokens(
    noise: Tensor, counts: TokenCounts, grid_size: tuple[int, int], sampling: str
) -> TokenSplit:
    """Split the patches of a batch by one of MASK_SAMPLINGS.

    Args:
        noise: (B, L), independent uniform numbers in [0, 1), the only source of randomness.
        grid_size: patches (down, across).
        sampling: "random" (Sec. 3.3) or "grid" (Table 15).
    """
    if sampling == "random":
        return random_split(noise, counts)
    if sampling == "grid":
        return grid_split(noise, counts, grid_size)
    raise ValueError(f"mask sampling must be one of {', '.join(MASK_SAMPLINGS)}, not {sampling!r}")


@dataclass(frozen=True)
class Masking:
    """The split of patches in a run.

    Args:
        grid_size: patches (down, across).
        counts: numbers for training, where only some masked patches may be predicted.
        sampling: one of MASK_SAMPLINGS.
    """

    grid_size: tuple[int, int]
    counts: TokenCounts
    sampling: str
    seed: int

    @classmethod
    def of(
        cls,
        settings: MaskSettings,
        grid_size: tuple[int, int],
        *,
        seed: int,
        all_masked: bool = False,
    ) -> "Masking":
        """Build the masking for a model with this grid of patches.

        Args:
            grid_size: patches (down, across).
            all_masked: predict every masked patch, as MAE does. γ = p may differ by one patch of
                rounding.

        Raises:
            InputError: the settings do not suit the number of patches.
        """
        if settings.mask_sampling == "grid":
            check_grid(grid_size, settings.mask_ratio)
        pred_ratio = None if all_masked else settings.predicted
        counts = count_tokens(math.prod(grid_size), settings.mask_ratio, pred_ratio)
        return cls(grid_size, counts, settings.mask_sampling, seed)

    @property
    def num_patches(self) -> int:
        """L, patches per image."""
        return self.counts.patches

    def split(self, noise: Tensor) -> TokenSplit:
        """Split a training batch by noise (B, L), see `split_tokens`."""
        return split_tokens(noise, self.counts, self.grid_size, self.sampling)

    def full_split(self, noise: Tensor) -> TokenSplit:
        """Split likewise, but predict every masked patch."""
        counts = self.counts._replace(predicted=self.counts.masked)
        return split_tokens(noise, counts, self.grid_size, self.sampling)


def is_masked(split: TokenSplit, num_patches: int) -> Tensor:
    """Bool (B, L), True where a patch is masked; for display."""
    mask = torch.ones(split.visible.shape[0], num_patches, dtype=torch.bool)
    return mask.to(split.visible.device).scatter(1, split.visible, False)
