"""Figures of reconstructions (Fig. 2)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.compute.precision import Precision
from util.data.batch import denormalize
from util.eval.display import Display
from util.eval.reconstructions import (
    MOMENTS_NOTE,
    blind_prediction,
    patch_psnr,
    predicted_pixels,
)
from util.masking import TokenSplit, is_masked
from util.patches import scatter_patches, unpatchify

LABELS = ("original", "masked", "result")
METHODS = {"crossmae": "CrossMAE", "mae": "MAE"}
SMALLEST_CELL = 128  # pixels; smaller images are enlarged by an integer factor
GAP, GROUP_GAP, MARGIN = 4, 16, 8  # pixels between pictures, between images, and around all
WIDE = 1.5  # width of a figure over its height, at least
TEXTS_ACROSS = 50  # heights of the text in a figure's width
SMALLEST_TEXT = 12
GRAY = 0.5


def reconstruction_panels(
    images: Tensor, pixels: Tensor, split: TokenSplit, patch_size: int
) -> list[Tensor]:
    """Build four pictures of every image, each (B, C, H, W) in [0, 1].

    Args:
        images: originals (B, C, H, W) in [0, 1].
        pixels: predictions (B, P, p*p*C) for the same range, clipped here.

    Returns:
        The originals, their visible patches, the predicted patches, and both together.
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


def images_in_row(num_images: int, num_panels: int, size: tuple[int, int]) -> int:
    """Number of images side by side in a figure: the fewest that make it wide.

    Args:
        num_panels: pictures of each image.
        size: (height, width) of an image.
    """
    height, width = size
    for number in range(1, num_images):
        num_rows = -(-num_images // number)
        if number * num_panels * width >= WIDE * num_rows * height:
            return number
    return num_images


def draw_figure(
    panels: list[Tensor], labels: Sequence[str] = LABELS, *, title: str = ""
) -> np.ndarray:
    """Arrange pictures in a wide grid: those of an image beside each other, several images a row.

    Args:
        panels: pictures of the images, each (B, 3, H, W) in [0, 1].
        labels: above the panels, one for each; of one that is too long, the end is shown.
        title: above all, in as many lines as it takes.

    Returns:
        uint8 (height, width, 3).
    """
    pictures = [(panel.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1) for panel in panels]
    num_images, height, width = pictures[0].shape[:3]
    in_row = images_in_row(num_images, len(panels), (height, width))
    factor = -(-SMALLEST_CELL // width)
    height, width = height * factor, width * factor
    group_width = len(panels) * (width + GAP) - GAP
    total_width = in_row * (group_width + GROUP_GAP) - GROUP_GAP

    text_size = max(SMALLEST_TEXT, total_width // TEXTS_ACROSS)
    title_font = ImageFont.load_default(size=text_size)
    lines = _wrap(title, total_width, title_font)
    label_font = _fitting_font(labels, width, text_size)
    line_height = round(1.4 * text_size)
    top = MARGIN + line_height * (len(lines) + 1)
    total_height = top + -(-num_images // in_row) * (height + GAP) - GAP

    figure = Image.new("RGB", (total_width + 2 * MARGIN, total_height + MARGIN), "white")
    draw = ImageDraw.Draw(figure)
    for number, line in enumerate(lines):
        draw.text((MARGIN, MARGIN + number * line_height), line, fill="black", font=title_font)
    for column, (label, arrays) in enumerate(zip(labels, pictures, strict=True)):
        for image, array in enumerate(arrays.cpu().numpy()):
            row, group = divmod(image, in_row)
            left = MARGIN + group * (group_width + GROUP_GAP) + column * (width + GAP)
            if row == 0:
                text = _end_of(label, width, label_font)
                draw.text((left, top - line_height), text, fill="black", font=label_font)
            cell = Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST)
            figure.paste(cell, (left, top + row * (height + GAP)))
    return np.asarray(figure)


def _fitting_font(texts: Sequence[str], width: int, size: int) -> ImageFont.ImageFont:
    """Font of this size, or the largest below it that fits each text into a width, in pixels."""
    font = ImageFont.load_default(size=size)
    while size > SMALLEST_TEXT and max(map(font.getlength, texts)) > width:
        size -= 1
        font = ImageFont.load_default(size=size)
    return font


def _end_of(text: str, width: int, font: ImageFont.ImageFont) -> str:
    """The longest end of a text that is at most this many pixels wide."""
    while font.getlength(text) > width:
        text = text[1:]
    return text


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


def readable_name(model_name: str, epoch: int | None = None, *, at_start: str = "untrained") -> str:
    """Name of a model such as crossmae_vit_tiny_patch16, as a title shows it.

    Args:
        epoch: epochs of training; None if unknown.
        at_start: what the model is before the first.
    """
    method, _, size = model_name.partition("_vit_")
    name = f"{METHODS.get(method, method)} ViT-{size.replace('_patch', '/')}"
    if epoch is None:
        return name
    return f"{name}, epoch {epoch}" if epoch else f"{name}, {at_start}"


def masked_share(split: TokenSplit) -> str:
    """How many of the patches are masked, in words.

    Args:
        split: predicts every masked patch.
    """
    masked, visible = split.predicted.shape[1], split.visible.shape[1]
    return f"{100 * masked / (masked + visible):.0f}% of the patches are masked"


@torch.no_grad()
def draw_reconstructions(
    model: nn.Module,
    images: Tensor,
    split: TokenSplit,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    precision: Precision,
    name: str,
    display: Display | None = None,
) -> np.ndarray:
    """Draw images, their visible patches, and these with the predictions for all others (Fig. 2).

    Args:
        model: a MaskedAutoencoder, not wrapped in DistributedDataParallel.
        images: (B, C, H, W), normalized by `mean` and `std`, on the model's device.
        split: predicts every masked patch.
        name: of the model; begins the title, which also has the PSNR of the masked patches.
        display: None for 8-bit RGB.

    Returns:
        uint8 (height, width, 3).
    """
    model.eval()
    colors = (mean, std)
    with precision.autocast():
        pred = model.predict(images, split)
    pred = pred.float()
    blind = blind_prediction(model, images, split)
    quality, blind_quality = (
        patch_psnr(model, values, images, split, colors).mean().item() for values in (pred, blind)
    )
    moments = f" with {MOMENTS_NOTE}" if model.norm_pix_loss else ""
    flat = "flat patches" if model.norm_pix_loss else "one flat color"
    title = (
        f"{name}: {masked_share(split)}, their PSNR is {quality:.1f} dB{moments} "
        f"({flat}: {blind_quality:.1f} dB)"
    )
    display = display or Display()
    title += f"; {display.note}" if display.note else ""
    pixels = predicted_pixels(model, pred, images, split, colors)
    originals = denormalize(images, *colors)
    rendering = display.of(originals)
    original, masked, _, result = reconstruction_panels(
        rendering.images(originals), rendering.patches(pixels), split, model.encoder.patch_size
    )
    return draw_figure([original, masked, result], title=title)
