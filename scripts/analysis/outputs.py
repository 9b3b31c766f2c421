"""The table, the JSON file, the figure and the picture of an analysis."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from util.errors import InputError
from util.eval.plots import new_figure, save_figure
from util.runs.files import set_aside, write_json
from util.runs.run import versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_logger = logging.getLogger(__name__)


def open_output(folder: str) -> Path:
    """Make the output folder, and check that figures can be drawn, before anything is measured.

    Raises:
        InputError: it cannot be made, or matplotlib is missing.
    """
    new_figure(1, 1)
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {path} ({error}): choose another --output_dir") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"cannot write to {path}: choose another --output_dir")
    return path


def log_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Log a table; numbers get three digits, None an empty cell."""
    lines = [header, *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        _logger.info("%s  %s", first.ljust(widths[0]), "  ".join(cells))


def _cell(value: object) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def save_picture(pixels: np.ndarray, path: Path) -> None:
    """Write a picture uint8 (H, W, 3); an earlier file is renamed to include its time.

    Raises:
        InputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        Image.fromarray(pixels).save(temporary)
        set_aside(path)
        temporary.replace(path)
    except (OSError, ValueError) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write --output {path}: {error}") from error


def write_report(folder: Path, name: str, args: dict, results: dict, **figures: "Figure") -> None:
    """Write NAME.json, and each figure; earlier files are renamed to include their time.

    Args:
        args: arguments of the program.
        figures: NAME.png for `plot`, and NAME_PART.png for other parts.
    """
    path = folder / f"{name}.json"
    try:
        write_json(path, {"args": args, "versions": versions(), **results})
        for part, figure in figures.items():
            own = name if part == "plot" else f"{name}_{part}"
            set_aside(folder / f"{own}.png")
            save_figure(figure, folder / f"{own}.png", "choose another --output_dir")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error}): choose another --output_dir") from error
    _logger.info("wrote %s", path)
