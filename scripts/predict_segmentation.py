"""Segment a folder of images with a checkpoint of main_segmentation.py.

    python scripts/predict_segmentation.py --checkpoint C --images DIR --output_dir O

O/NAME.png is the mask of DIR/NAME.jpg: its pixels are indices of classes, from 0 in the order of
O/classes.txt, and its palette makes them visible. O/overlays/NAME.png shows it over the image.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments, take
from util.errors import InputError, counted
from util.settings.compute import ComputeSettings, add_precision_args
from util.settings.data import add_axes_arg
from util.settings.evaluation import (
    WindowSettings,
    add_show_channels_arg,
    add_window_args,
    check_show_channels,
)
from util.settings.model import add_checkpoint_arg


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_checkpoint_arg(parser, "checkpoint of main_segmentation.py")
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--output_dir", required=True, help="new folder for masks and overlays")
    add_axes_arg(parser)
    add_show_channels_arg(parser)
    parser.add_argument("--device", help="cuda, cuda:N or cpu (cuda if available)")
    add_window_args(parser)
    add_precision_args(parser)
    args = parser.parse_args(argv)
    take(WindowSettings, args)
    check_show_channels(args.show_channels)
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from engine_segmentation import predict_classes
from models import load_segmenter
from util.compute.precision import blank_images
from util.compute.setup import place_model
from util.data.batch import Normalization
from util.data.broken_images import reason_of
from util.data.joint_transforms import WholeImage
from util.data.masks import list_images
from util.data.segmentation import SegmentationBatch
from util.data.values import read_values
from util.eval.display import choose_display, visible
from util.eval.miou import Windows
from util.eval.overlays import class_colors, overlay
from util.runs.run import run_main, start_run
from util.weights.files import unknown_content

OVERLAYS, CLASSES = "overlays", "classes.txt"
MEMORY_ADVICE = "use a lower --window_batch"

_logger = logging.getLogger(__name__)


def as_mask(prediction: np.ndarray, num_classes: int) -> Image.Image:
    """Make an image whose pixels are class indices: with a palette, or above 256 classes 16-bit."""
    if num_classes > 256:
        return Image.fromarray(prediction.astype(np.uint16))
    mask = Image.fromarray(prediction.astype(np.uint8), mode="P")
    mask.putpalette(class_colors(num_classes).flatten().tolist())
    return mask


def check_output(folder: Path, names: Sequence[str]) -> None:
    """Check that masks can be written, before hours of predicting.

    Raises:
        InputError: the folder has content, or two results would have the same path.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: choose another --output_dir")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: choose another --output_dir")
    folders = {parent.as_posix() for name in names for parent in Path(name).parents}
    clash = folders & {OVERLAYS, *(f"{name}.png" for name in names)}
    if clash:
        raise InputError(
            f"--images has a folder named {clash.pop()}, which the output needs: rename it"
        )


def save(image: Image.Image, path: Path) -> None:
    """Write a PNG, and the folders above it.

    Raises:
        InputError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Predict every image, and write masks and overlays."""
    args = parse_args(argv)
    device = start_run(device=args.device, seed=0)

    model, content = load_segmenter(args.checkpoint)
    pixels = replace(content["pixels"], axes=args.axes)
    choose_display(pixels.num_channels, args.show_channels)  # before hours of predicting
    files = list_images(Path(args.images), arrays=not pixels.is_rgb8)
    with unknown_content(args.checkpoint):
        classes, resize = content["classes"], WholeImage(content["short_side"]).resize
    normalization = Normalization(tuple(content["mean"]), tuple(content["std"]), pixels.value_range)
    example = blank_images(model.img_size, device, in_chans=model.in_chans)
    precision = place_model(model, take(ComputeSettings, args), device, example)
    windows = Windows.of(take(WindowSettings, args), model.img_size, model.patch_size)
    output = Path(args.output_dir)
    check_output(output, list(files))

    num_broken = 0
    for name, path in tqdm(files.items(), disable=None, unit="image", leave=False):
        try:
            with path.open("rb") as file:
                image = read_values(file, pixels)  # (C, H, W)
        except Exception as error:  # decoders raise anything on broken files
            num_broken += 1
            _logger.warning("Broken image, left out: %s (%s)", path, reason_of(error))
            continue
        size = torch.zeros(1, *image.shape[1:])  # of the prediction
        batch = SegmentationBatch(resize(image).unsqueeze(0), size, [], normalization)
        predicted, _ = predict_classes(model, batch, windows=windows, precision=precision)
        prediction = predicted[0].cpu().numpy()
        save(as_mask(prediction, len(classes)), output / f"{name}.png")
        picture = overlay(visible(image, pixels, args.show_channels), prediction)
        save(Image.fromarray(picture), output / OVERLAYS / f"{name}.png")
    if num_broken == len(files):
        raise InputError(f"none of the images in {args.images} can be read, see above")
    lines = [f"{number} {name}\n" for number, name in enumerate(classes)]
    (output / CLASSES).write_text("".join(lines), encoding="utf-8")
    left_out = f", {counted(num_broken, 'broken image')} left out" if num_broken else ""
    _logger.info("wrote %s to %s%s", counted(len(files) - num_broken, "mask"), output, left_out)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
