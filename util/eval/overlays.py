"""Pictures of predictions beside the truth: of classes of pixels, and of objects."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from faster_coco_eval.core import mask as rle
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
    grid = Image.fromarray(_grid(cells, COLUMNS))
    font = ImageFont.load_default(size=12)
    shown = sorted({int(n) for _, *maps in rows for m in maps for n in np.unique(m) if n >= 0})
    entries = [(classes[n], class_colors(n + 1)[n]) for n in shown[:MAX_IN_LEGEND]]
    if len(shown) > MAX_IN_LEGEND:
        entries.append((f"and {len(shown) - MAX_IN_LEGEND} more", None))
    lines = _wrap(entries, grid.width, font)
    figure = Image.new("RGB", (grid.width, grid.height + TEXT_HEIGHT * len(lines)), "white")
    figure.paste(grid, (0, 0))
    draw = ImageDraw.Draw(figure)
    for number, line in enumerate(lines):
        for x, name, color in line:
            y = grid.height + number * TEXT_HEIGHT
            if color is not None:
                box = (x, y + 3, x + SWATCH, y + 3 + SWATCH)
                draw.rectangle(box, fill=tuple(map(int, color)), outline="black")
            draw.text((x + SWATCH + GAP, y + 2), name, fill="black", font=font)
    return np.asarray(figure)


def _grid(cells: Sequence[Sequence[Image.Image]], titles: Sequence[str]) -> np.ndarray:
    """Arrange pictures in rows and columns with titles: uint8 (height, width, 3)."""
    column = max(cell.width for row in cells for cell in row)
    heights = [max(cell.height for cell in row) for row in cells]
    width = len(titles) * (column + GAP) - GAP
    figure = Image.new("RGB", (width, TEXT_HEIGHT + sum(heights) + GAP * len(heights)), "white")
    draw = ImageDraw.Draw(figure)
    font = ImageFont.load_default(size=12)
    for number, title in enumerate(titles):
        draw.text((number * (column + GAP), 3), title, fill="black", font=font)
    y = TEXT_HEIGHT
    for row, height in zip(cells, heights, strict=True):
        for number, cell in enumerate(row):
            figure.paste(cell, (number * (column + GAP), y))
        y += height + GAP
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


class DrawnObject(NamedTuple):
    """An object to draw on an image."""

    name: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom, in pixels."""
    mask: dict | None = None
    """COCO's run lengths, decoded only while they are drawn."""
    score: float | None = None

    @property
    def text(self) -> str:
        """Its name, and its score in percent."""
        return self.name if self.score is None else f"{self.name} {100 * self.score:.0f}%"


def draw_objects(image: np.ndarray, objects: Sequence[DrawnObject]) -> np.ndarray:
    """Draw objects on an image uint8 (H, W, 3), each in its own color, the first on top."""
    colors = class_colors(max(1, len(objects)))
    labels = np.full(image.shape[:2], -1, dtype=np.int16)
    for number, own in reversed(list(enumerate(objects))):
        if own.mask is not None:
            labels[rle.decode(own.mask) != 0] = number
    picture = Image.fromarray(overlay(image, labels))
    draw = ImageDraw.Draw(picture)
    size = max(10, round(max(image.shape[:2]) / 50))
    font = ImageFont.load_default(size=size)
    for own, color in reversed(list(zip(objects, colors.tolist(), strict=False))):
        draw.rectangle(own.box, outline=tuple(color), width=max(1, size // 6))
        left = max(0, min(own.box[0], image.shape[1] - font.getlength(own.text)))
        top = max(0, own.box[1] - size - 3)
        background = draw.textbbox((left, top), own.text, font=font)
        draw.rectangle(background, fill=tuple(color))
        text_color = "black" if sum(color) > 3 * 128 else "white"
        draw.text((left, top), own.text, fill=text_color, font=font)
    return np.asarray(picture)


def side_by_side(
    rows: Sequence[tuple[np.ndarray, Sequence[DrawnObject], Sequence[DrawnObject]]],
) -> np.ndarray:
    """Draw the truth on the left and predictions on the right, one row per image.

    Args:
        rows: image uint8 (H, W, 3), true objects, predicted objects.

    Returns:
        uint8 (height, width, 3).
    """
    cells = [[_fit(draw_objects(image, own)) for own in both] for image, *both in rows]
    return _grid(cells, ("annotations", "predictions"))
