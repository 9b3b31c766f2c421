"""Mixing the images of a batch with each other, and their labels alike (Table 11)."""

import argparse
from dataclasses import dataclass

import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from util.arguments import natural_float, share
from util.errors import InputError


@dataclass(frozen=True)
class MixSettings:
    """Mixup, CutMix and label smoothing (Table 11); see the flags.

    Raises:
        InputError: the smoothing leaves nothing of the labels.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.smoothing == 1:
            raise InputError("--smoothing 1 would leave nothing of the labels: lower it")


def build_mixup(mix: MixSettings, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix; None if both are off."""
    if not (mix.mixup or mix.cutmix) or not mix.mixup_prob:
        return None
    return Mixup(
        mixup_alpha=mix.mixup,
        cutmix_alpha=mix.cutmix,
        prob=mix.mixup_prob,
        switch_prob=mix.mixup_switch_prob,
        mode=mix.mixup_mode,
        label_smoothing=0.0,  # cross-entropy smooths
        num_classes=num_classes,
    )


def mix_images(
    mixup: Mixup, images: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Mix the images of a micro-batch with each other, and their labels alike (Table 11).

    timm mixes the i-th with the i-th last, of an even number. The last of an odd number stays as it
    is.

    Args:
        mixup: timm's, drawing from numpy's global generator; without label smoothing.
        images: (B, C, H, W); changed.
        labels: (B,).
        num_classes: N.

    Returns:
        images (B, C, H, W) and targets (B, N), whose rows sum to 1.
    """
    even = len(images) // 2 * 2
    targets = F.one_hot(labels, num_classes).to(images.dtype)  # (B, N)
    if even:
        images[:even], targets[:even] = mixup(images[:even], labels[:even])
    return images, targets


def add_mix_args(parser: argparse.ArgumentParser) -> None:
    """The flags of MixSettings."""
    group = parser.add_argument_group("mixing")
    group.add_argument(
        "--mixup",
        type=natural_float,
        default=MixSettings.mixup,
        help="alpha, 0 for none (%(default)s)",
    )
    group.add_argument(
        "--cutmix",
        type=natural_float,
        default=MixSettings.cutmix,
        help="alpha, 0 for none (%(default)s)",
    )
    group.add_argument(
        "--mixup_prob",
        type=share,
        default=MixSettings.mixup_prob,
        help="share of batches mixed (%(default)s)",
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=share,
        default=MixSettings.mixup_switch_prob,
        help="share of those that are cut (%(default)s)",
    )
    group.add_argument(
        "--mixup_mode",
        choices=("batch", "pair", "elem"),
        default=MixSettings.mixup_mode,
        help="what shares one mixing ratio (%(default)s)",
    )
    group.add_argument(
        "--smoothing",
        type=share,
        default=MixSettings.smoothing,
        help="of labels over all classes (%(default)s)",
    )
