"""Draw a set of synthetic microscope images to try commands on: round cells, and long ones.

    python scripts/draw_cells.py --format tif --output_dir data/cells

It writes class folders `round` and `long` below `train` and `val`. Cells of both classes have the
same area, so only their shape tells them apart. The same arguments write the same images.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments, positive_float, positive_int

FORMATS = {
    "png": "three bands in 8 bits, as RGB",
    "tif": "five bands of 12 bits in 16",
    "npy": "one band as int16, from -1000 to 1000, as X-rays are kept",
}
CLASSES = {"round": 1.0, "long": 3.0}  # length over width of a cell


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to be written")
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    parser.add_argument("--format", choices=FORMATS, default="png", help=f"{formats} (png)")
    parser.add_argument("--images", type=positive_int, default=1000, help="to train (%(default)s)")
    parser.add_argument("--val_images", type=positive_int, default=200, help="(%(default)s)")
    parser.add_argument("--size", type=positive_int, default=32, help="in pixels (%(default)s)")
    parser.add_argument(
        "--diameter", type=positive_float, default=6.0, help="of a cell, in pixels (%(default)s)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take a moment

import numpy as np
import tifffile
from PIL import Image

from util.errors import InputError
from util.runs.run import run_main, start_logging

_logger = logging.getLogger(__name__)


def draw_image(
    random: np.random.Generator, size: int, diameter: float, elongation: float
) -> np.ndarray:
    """Draw cells at random places on an uneven ground; return five bands (size, size, 5) in [0, 1].

    Args:
        elongation: length over width of the cells.
    """
    y, x = np.mgrid[:size, :size]
    slope = random.normal(0, 0.1, 2)
    ground = 0.2 + (slope[0] * y + slope[1] * x) / size
    body, nucleus = np.zeros((2, size, size))
    for _ in range(max(1, round(0.25 * (size / diameter) ** 2))):
        top, left, angle = random.uniform((0, 0, 0), (size, size, np.pi))
        along = (x - left) * np.cos(angle) + (y - top) * np.sin(angle)
        across = (y - top) * np.cos(angle) - (x - left) * np.sin(angle)
        distance = np.hypot(along / elongation**0.5, across * elongation**0.5)
        body = np.maximum(body, random.uniform(0.5, 0.8) * (distance < diameter / 2))
        nucleus = np.maximum(nucleus, random.uniform(0.5, 0.9) * (distance < diameter / 5))
    bands = [ground + 0.6 * body, ground + 0.8 * nucleus, ground + 0.3 * (body - nucleus)]
    bands += [np.hypot(*np.gradient(body)), ground]
    noise = random.normal(0, 0.02, (size, size, len(bands)))
    return (np.stack(bands, axis=-1) + noise).clip(0, 1)


def write_image(path: Path, bands: np.ndarray) -> None:
    """Write bands in [0, 1] in the format that the suffix of the path stands for."""
    if path.suffix == ".png":
        Image.fromarray((255 * bands[..., :3]).round().astype(np.uint8)).save(path)
    elif path.suffix == ".tif":
        values = (4095 * bands).round().astype(np.uint16)
        tifffile.imwrite(path, values, planarconfig="contig", photometric="minisblack")
    else:
        np.save(path, (2000 * bands[..., 0] - 1000).round().astype(np.int16))


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the images.

    Raises:
        InputError: the folder exists.
    """
    args = parse_args(argv)
    start_logging()
    if args.output_dir.exists():
        raise InputError(f"{args.output_dir} exists: give another --output_dir, or delete it")
    random = np.random.default_rng(0)
    for split, count in (("train", args.images), ("val", args.val_images)):
        for name in CLASSES:
            (args.output_dir / split / name).mkdir(parents=True)
        for index in range(count):
            name = list(CLASSES)[index % len(CLASSES)]
            bands = draw_image(random, args.size, args.diameter, CLASSES[name])
            write_image(args.output_dir / split / name / f"{index:05d}.{args.format}", bands)
    _logger.info("wrote %d images to %s", args.images + args.val_images, args.output_dir)


if __name__ == "__main__":
    run_main(main)
