"""A picture of a confusion matrix."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from util.errors import escaped

MAX_NAMED = 40  # classes; of more, only every tenth has its number
SIDE = 1000  # of the matrix, at most, unless it has more classes; in pixels
MAX_CELL, MIN_NUMBERED_CELL = 36, 24  # pixels
MAX_NAME = 20  # characters
GAP, FONT_SIZE = 6, 12
TITLE = "rows: classes of the images; columns: predicted; each row in percent of its images"


def draw_confusion(confusion: Tensor, classes: Sequence[str] | None) -> np.ndarray:
    """Draw a confusion matrix (N, N), each row relative to its images: the darker, the more.

    Args:
        classes: names of the rows and columns; None numbers them.

    Returns:
        uint8 (height, width, 3).
    """
    number = len(confusion)
    shares = (confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    cell = max(1, min(MAX_CELL, SIDE // number))
    matrix = Image.fromarray(_blues(shares)).resize((number * cell,) * 2, Image.Resampling.NEAREST)

    font = ImageFont.load_default(size=FONT_SIZE)
    names = _labels(classes, number)
    margin = GAP + max(int(font.getlength(name)) + GAP for name in names)
    top = margin + FONT_SIZE + GAP
    width = max(margin + matrix.width, int(font.getlength(TITLE)) + GAP) + GAP
    picture = Image.new("RGB", (width, top + matrix.height + GAP), "white")
    picture.paste(matrix, (margin, top))
    draw = ImageDraw.Draw(picture)
    edge = (margin - 1, top - 1, margin + matrix.width, top + matrix.height)
    draw.rectangle(edge, outline="gray")
    draw.text((GAP, GAP // 2), TITLE, fill="black", font=font)
    for index, name in enumerate(names):
        middle = index * cell + cell // 2
        draw.text((margin - GAP, top + middle), name, fill="black", font=font, anchor="rm")
        column = Image.new("L", (margin - GAP, FONT_SIZE + 2), 0)
        ImageDraw.Draw(column).text((0, FONT_SIZE // 2), name, fill=255, font=font, anchor="lm")
        column = column.rotate(90, expand=True)
        place = (margin + middle - column.width // 2, top - GAP - column.height)
        picture.paste("black", place, column)
    if cell >= MIN_NUMBERED_CELL:
        for row, column in np.argwhere(shares >= 0.005):
            color = "white" if shares[row, column] > 0.5 else "black"
            center = (margin + column * cell + cell // 2, top + row * cell + cell // 2)
            text = f"{100 * shares[row, column]:.0f}"
            draw.text(center, text, fill=color, font=font, anchor="mm")
    return np.asarray(picture)


def _labels(classes: Sequence[str] | None, number: int) -> list[str]:
    """Return the texts beside rows and columns: the numbers of classes, and names where they fit.

    Pillow's font has ASCII letters only.
    """
    if number > MAX_NAMED:
        return ["" if index % 10 else str(index) for index in range(number)]
    if classes is None:
        return [str(index) for index in range(number)]
    labels = []
    for index, name in enumerate(classes):
        text = escaped(name)
        text = text if len(text) <= MAX_NAME else f"{text[: MAX_NAME - 2]}.."
        labels.append(f"{text} {index}" if text.isascii() else str(index))
    return labels


def _blues(shares: np.ndarray) -> np.ndarray:
    """White for 0 to dark blue for 1, (N, N) -> uint8 (N, N, 3)."""
    light, dark = np.array([255, 255, 255]), np.array([8, 48, 107])
    shades = np.sqrt(shares)[..., None]  # so that rare mistakes show
    return np.round(light + shades * (dark - light)).astype(np.uint8)
