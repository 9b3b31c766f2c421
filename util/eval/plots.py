"""Plots with matplotlib, which is not among the requirements: see requirements-figures.txt."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from util.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

DPI = 110

# Readable without color vision, and in gray.
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"

_logger = logging.getLogger(__name__)


def new_figure(width: float, height: float) -> "Figure":
    """Make an empty figure of a size in inches.

    Raises:
        InputError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "matplotlib is missing: pip install -r requirements-figures.txt"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path, advice: str = "correct --output") -> None:
    """Write a figure; the suffix of the path is its format.

    Raises:
        InputError: it cannot be written.
    """
    try:
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {path}: {advice} ({error})") from error
    _logger.info("wrote %s", path)


def picture_grid(
    rows: int,
    columns: int,
    img_size: tuple[int, int],
    *,
    side: float = 0.75,
    right: float = 0.0,
    bottom: float = 0.45,
) -> tuple["Figure", np.ndarray]:
    """Make a figure of cells for pictures, with room for titles.

    Args:
        img_size: (height, width) of the pictures, for the cells' shape.
        side: width of a cell in inches.
        right: room for a color bar in inches.
        bottom: room for a note in inches.

    Returns:
        The figure and its axes (rows, columns).
    """
    height = (side * img_size[0] / img_size[1] + 0.05) * rows
    figure = new_figure(side * columns + right, 0.25 + height + bottom)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    return figure, figure.subplots(rows, columns, squeeze=False)


def show_picture(axes: "Axes", picture: np.ndarray, title: str = "", **options: object) -> None:
    """Show a picture (H, W, 3) or (H, W) without axes, its pixels as squares."""
    axes.imshow(picture, interpolation="nearest", **options)
    axes.set_axis_off()
    axes.set_title(title, fontsize=8)


def heat_map(
    axes: "Axes", values: np.ndarray, columns: Sequence[int], rows: Sequence[int], **options: object
) -> "AxesImage":
    """Draw values (J, K) as colored squares with these numbers along the axes."""
    image = axes.imshow(values, aspect="auto", **options)
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    return image
