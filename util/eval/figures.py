"""Figures of reconstructions (Fig. 2)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.compute.precision import Precision
from util.data.batch import denormalize
from util.eval.reconstructions import predicted_pixels
from util.masking import TokenSplit, is_masked
from util.patches import scatter_patches, unpatchify

COLUMNS = ("original", "masked", "reconstruction", "+ visible patches")
MOMENTS_NOTE = "Trained on normalized pixels: each patch's mean and deviation are the true ones."
SMALLEST_CELL = 128  # pixels; smaller images are enlarged by an integer factor
GAP, TEXT_HEIGHT = 4, 20
GRAY = 0.5


def reconstruction_panels(
    images: Tensor, pixels: Tensor, split: TokenSplit, patch_size: int
) -> list[Tensor]:
    """Build the four columns of the figure, each (B, C, H, W) in [0, 1].

    Args:
        images: originals (B, C, H, W) in [0, 1].
        pixels: predictions (B, P, p*p*C) for the same range, clipped here.
    """
    grid_size = (images.shape[2] // patch_size, images.shape[3] // patch_size)
    mask = is_masked(split, grid_size[0] * grid_size[1])  # (B, L)
    per_pixel = images.shape[1] * patch_size**2
    mask = mask.unsqueeze(-1).expand(-1, -1, per_pixel)
    mask = unpatchify(mask, patch_size, grid_size)  # (B, C, H, W)
    masked = torch.where(mask, GRAY, images)
    blank = torch.full_like(images, GRAY)
    pixels = pixels.clamp(0, 1)
    reconstruction = scatter_patches(blank, pixels, split.predicted, patch_size)
    with_visible = scatter_patches(masked, pixels, split.predicted, patch_size)
    return [images, masked, reconstruction, with_visible]


def draw_figure(
    panels: list[Tensor], titles: Sequence[str] = COLUMNS, *, note: str = ""
) -> np.ndarray:
    """Arrange panels (B, 3, H, W) in [0, 1] as titled columns, with one row per image.

    Args:
        titles: one for each panel; of a longer one, the end is shown.
        note: text below.

    Returns:
        uint8 (height, width, 3).
    """
    columns = [(panel.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1) for panel in panels]
    num_rows, height, width = columns[0].shape[:3]
    factor = max(1, -(-SMALLEST_CELL // width))
    height, width = height * factor, width * factor
    font = ImageFont.load_default(size=12)
    total_width = len(columns) * (width + GAP) - GAP
    top = TEXT_HEIGHT + num_rows * (height + GAP)  # of the note
    lines = _wrap(note, total_width, font)
    figure = Image.new("RGB", (total_width, top + TEXT_HEIGHT * len(lines)), "white")
    draw = ImageDraw.Draw(figure)
    for x, (name, column) in enumerate(zip(titles, columns, strict=True)):
        left = x * (width + GAP)
        while font.getlength(name) > width:
            name = name[1:]
        draw.text((left, 3), name, fill="black", font=font)
        for y, array in enumerate(column.cpu().numpy()):
            cell = Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST)
            figure.paste(cell, (left, TEXT_HEIGHT + y * (height + GAP)))
    for number, line in enumerate(lines):
        draw.text((0, top + TEXT_HEIGHT * number + 3), line, fill="black", font=font)
    return np.asarray(figure)


def _wrap(text: str, width: int, font: ImageFont.ImageFont) -> list[str]:
    """Break text into lines of at most this many pixels, between words."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@torch.no_grad()
def draw_reconstructions(
    model: nn.Module,
    images: Tensor,
    split: TokenSplit,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
) -> np.ndarray:
    """Draw images, their visible patches, and their reconstructions (Fig. 2).

    Args:
        model: a MaskedAutoencoder, not wrapped in DistributedDataParallel.
        images: (B, C, H, W), normalized by `mean` and `std`, on the model's device.

    Returns:
        uint8 (height, width, 3).
    """
    model.eval()
    with precision.autocast():
        pred = model.predict(images, split)
    pixels = predicted_pixels(model, pred.float(), images, split, (mean, std))
    originals = denormalize(images, mean, std)
    panels = reconstruction_panels(originals, pixels, split, model.encoder.patch_size)
    return draw_figure(panels, note=MOMENTS_NOTE if model.norm_pix_loss else "")
