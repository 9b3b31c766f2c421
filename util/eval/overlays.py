"""Pictures of segmentations: class colors over an image, next to the labels, with a legend."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = ("image", "labels", "prediction")
GAP, TEXT_HEIGHT, SWATCH = 4, 20, 12
OPACITY = 0.6
UNLABELED_COLOR = (0, 0, 0)
MAX_WIDTH = 400  # pixels of a column
MAX_IN_LEGEND = 40


def class_colors(num_classes: int) -> np.ndarray:
    """Colors of classes, uint8 (num_classes, 3): those of PASCAL VOC without its background's."""
    colors = np.zeros((num_classes, 3), dtype=np.uint8)
    for number in range(num_classes):
        bits = number + 1
        for shift in range(7, -1, -1):
            for channel in range(3):
                colors[number, channel] |= (bits >> channel & 1) << shift
            bits >>= 3
    return colors


def paint(labels: np.ndarray) -> np.ndarray:
    """Labels (H, W), below 0 for none -> colors uint8 (H, W, 3)."""
    colors = np.vstack((class_colors(max(1, labels.max() + 1)), UNLABELED_COLOR)).astype(np.uint8)
    return colors[np.where(labels < 0, len(colors) - 1, labels)]


def overlay(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Colors of labels (H, W) over an image uint8 (H, W, 3), where there are labels."""
    mixed = OPACITY * paint(labels) + (1 - OPACITY) * image
    return np.where((labels < 0)[..., None], image, mixed.round()).astype(np.uint8)


def comparison(
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], classes: Sequence[str]
) -> np.ndarray:
    """Draw image | labels | prediction, one row per image, and a legend of the classes in them.

    Args:
        rows: image uint8 (H, W, 3), labels (H, W), prediction (H, W), of any sizes.
        classes: names.

    Returns:
        uint8 (height, width, 3).
    """
    cells = [[_fit(c) for c in (i, overlay(i, t), overlay(i, p))] for i, t, p in rows]
    column = max(cell.width for row in cells for cell in row)
    heights = [row[0].height for row in cells]
    font = ImageFont.load_default(size=12)
    shown = sorted({int(n) for _, *maps in rows for m in maps for n in np.unique(m) if n >= 0})
    entries = [(classes[n], class_colors(n + 1)[n]) for n in shown[:MAX_IN_LEGEND]]
    if len(shown) > MAX_IN_LEGEND:
        entries.append((f"and {len(shown) - MAX_IN_LEGEND} more", None))
    width = len(COLUMNS) * (column + GAP) - GAP
    lines = _wrap(entries, width, font)
    top = TEXT_HEIGHT + sum(heights) + GAP * len(heights)
    figure = Image.new("RGB", (width, top + TEXT_HEIGHT * len(lines)), "white")
    draw = ImageDraw.Draw(figure)
    for number, name in enumerate(COLUMNS):
        draw.text((number * (column + GAP), 3), name, fill="black", font=font)
    y = TEXT_HEIGHT
    for row, height in zip(cells, heights, strict=True):
        for number, cell in enumerate(row):
            figure.paste(cell, (number * (column + GAP), y))
        y += height + GAP
    for number, line in enumerate(lines):
        for x, name, color in line:
            y = top + number * TEXT_HEIGHT
            if color is not None:
                box = (x, y + 3, x + SWATCH, y + 3 + SWATCH)
                draw.rectangle(box, fill=tuple(map(int, color)), outline="black")
            draw.text((x + SWATCH + GAP, y + 2), name, fill="black", font=font)
    return np.asarray(figure)


def _fit(image: np.ndarray) -> Image.Image:
    picture = Image.fromarray(image)
    if picture.width > MAX_WIDTH:
        height = max(1, round(picture.height * MAX_WIDTH / picture.width))
        picture = picture.resize((MAX_WIDTH, height), Image.Resampling.BILINEAR)
    return picture


def _wrap(
    entries: Sequence[tuple[str, np.ndarray | None]], width: int, font: ImageFont.ImageFont
) -> list[list[tuple[int, str, np.ndarray | None]]]:
    """Arrange legend entries in lines: (left, name, color)."""
    lines, x = [[]], 0
    for name, color in entries:
        needed = SWATCH + GAP + round(font.getlength(name)) + 3 * GAP
        if x and x + needed > width:
            lines.append([])
            x = 0
        lines[-1].append((x, name, color))
        x += needed
    return lines
