"""Mixup and CutMix of the images of a batch and their labels (Table 11)."""

import argparse
from dataclasses import dataclass

import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from util.arguments import fraction, natural_float
from util.errors import InputError


@dataclass(frozen=True)
class MixSettings:
    """Mixup, CutMix and label smoothing (Table 11); see the flags.

    Raises:
        InputError: smoothing is 1.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.smoothing == 1:
            raise InputError("--smoothing 1 would erase the labels: lower it")


def build_mixup(mix: MixSettings, num_classes: int) -> Mixup | None:
    """Build timm's mixup and CutMix; None if both are off."""
    if not (mix.mixup or mix.cutmix) or not mix.mixup_prob:
        return None
    return Mixup(
        mixup_alpha=mix.mixup,
        cutmix_alpha=mix.cutmix,
        prob=mix.mixup_prob,
        switch_prob=mix.mixup_switch_prob,
        mode=mix.mixup_mode,
        label_smoothing=0.0,  # the cross-entropy smooths them
        num_classes=num_classes,
    )


def mix_images(
    mixup: Mixup, images: Tensor, labels: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Mix the images of a micro-batch with each other, and their labels likewise (Table 11).

    timm mixes the i-th image with the i-th last and needs an even number of images. The last image
    of an odd number is not mixed.

    Args:
        mixup: without label smoothing; it draws from NumPy's global generator.
        images: (B, C, H, W), modified in place.
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
    """Add the flags of MixSettings."""
    group = parser.add_argument_group("mixing")
    group.add_argument(
        "--mixup",
        type=natural_float,
        default=MixSettings.mixup,
        help="alpha of mixup, 0 to disable it (%(default)s)",
    )
    group.add_argument(
        "--cutmix",
        type=natural_float,
        default=MixSettings.cutmix,
        help="alpha of CutMix, 0 to disable it (%(default)s)",
    )
    group.add_argument(
        "--mixup_prob",
        type=fraction,
        default=MixSettings.mixup_prob,
        help="fraction of batches to mix (%(default)s)",
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=fraction,
        default=MixSettings.mixup_switch_prob,
        help="fraction of mixed batches that use CutMix (%(default)s)",
    )
    group.add_argument(
        "--mixup_mode",
        choices=("batch", "pair", "elem"),
        default=MixSettings.mixup_mode,
        help="images that share one mixing ratio: all of a batch, a pair, or none (elem) "
        "(%(default)s)",
    )
    group.add_argument(
        "--smoothing",
        type=fraction,
        default=MixSettings.smoothing,
        help="label smoothing (%(default)s)",
    )
