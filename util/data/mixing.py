"""Mixup and CutMix of the images of a batch and their labels (Table 11)."""

import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from util.settings.views import MixSettings


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
