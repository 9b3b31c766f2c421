"""Exports of checkpoints, and photographs to prepare for the exported models."""

from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import torch
from PIL import Image

from models_vit import build_vit
from scripts.export_encoder import main
from tests.helpers.runs import run
from tests.helpers.weights import randomized, stored
from util.settings.model import SIZES

TINY_PATCH4 = SIZES["tiny_patch4"]


def export(folder, content, form, name="out", *flags):
    """Export a checkpoint, given by its content or path; return where to, and the log."""
    path = content
    if isinstance(content, dict):
        path = stored(folder / "checkpoint.pth", content)
    words = ["--checkpoint", path, "--format", form, "--output", folder / name, *flags]
    with redirect_stdout(StringIO()) as log:
        run(*words, main=main)
    return folder / name, log.getvalue()


def called(log, name):
    """The call of a function that the log shows, as Python code without the last parenthesis."""
    line = next(line for line in log.splitlines() if f"{name}(" in line)
    return name + line.partition(name)[2].removesuffix(")")


def tiny_vit(*, pool="cls", num_classes=3, img_size=16):
    """A ViT of a size that timm and transformers build without more arguments."""
    options = {"pool": pool, "num_classes": num_classes, "img_size": img_size}
    return randomized(build_vit(TINY_PATCH4, **options))


def photograph(height, width):
    """Random colors that vary slowly, with noise."""
    rng = np.random.default_rng(height + width)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(-20, 20, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def assert_same_pixels(actual, transform, image, *, levels=2):
    """Compare normalized images (3, H, W) to a transform's pixels, in levels from 0 to 255."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    (expected,) = transform(pixels).pixels
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (transform.normalization.mean, transform.normalization.std)
    )
    assert ((actual * std + mean) * 255 - expected).abs().max() < levels + 0.1
