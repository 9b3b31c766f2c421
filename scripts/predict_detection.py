"""Find objects in a folder of images with a checkpoint of main_detection.py.

    python scripts/predict_detection.py --checkpoint C --images DIR --output_dir O

O/NAME.png shows the objects in DIR/NAME.jpg: masks, boxes, names and scores. O/detections.json has
all of them in COCO's result format, with file_name beside image_id, and O/categories.json the names
of their categories.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments, fraction, take
from util.errors import InputError, counted
from util.settings.compute import ComputeSettings, add_precision_args
from util.settings.data import add_axes_arg
from util.settings.detection import MIN_SCORE
from util.settings.evaluation import add_show_channels_arg, check_show_channels
from util.settings.model import add_checkpoint_arg


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_checkpoint_arg(parser, "checkpoint of main_detection.py")
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--output_dir", required=True, help="new folder for pictures and results")
    parser.add_argument(
        "--min_score",
        type=fraction,
        default=MIN_SCORE,
        help="lowest score of an object that is drawn (%(default)s)",
    )
    add_axes_arg(parser)
    add_show_channels_arg(parser)
    parser.add_argument("--device", help="cuda, cuda:N or cpu (cuda if available)")
    add_precision_args(parser, compile_modes=())
    args = parser.parse_args(argv)
    check_show_channels(args.show_channels)
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch
from PIL import Image
from tqdm import tqdm

from engine_detection import found_objects
from models import load_detector
from util.compute.precision import blank_images
from util.compute.setup import place_model
from util.data.batch import Normalization
from util.data.broken_images import reason_of
from util.data.jitter import WholeImage
from util.data.masks import list_images
from util.data.values import read_values
from util.eval.coco_ap import as_results, scale_to_image
from util.eval.display import choose_display, visible
from util.eval.overlays import draw_objects
from util.runs.run import run_main, start_run
from util.weights.files import unknown_content

RESULTS, CATEGORIES = "detections.json", "categories.json"

_logger = logging.getLogger(__name__)


def new_folder(path: str) -> Path:
    """Create the output folder.

    Raises:
        InputError: it has content, or cannot be created.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to --output_dir {folder}: {error}") from error
    if any(folder.iterdir()):
        raise InputError(f"{folder} is not empty: choose another --output_dir")
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    """Predict every image, and write pictures and results."""
    args = parse_args(argv)
    device = start_run(device=args.device, seed=0)

    model, content = load_detector(args.checkpoint)
    pixels = replace(content["pixels"], axes=args.axes)
    choose_display(pixels.num_channels, args.show_channels)  # before hours of predicting
    files = list_images(Path(args.images), arrays=not pixels.is_rgb8)
    with unknown_content(args.checkpoint):
        classes = tuple(content["classes"])
        colors = tuple(content["mean"]), tuple(content["std"])
    normalization = Normalization(*colors, pixels.value_range)
    example = blank_images((model.input_size,) * 2, device, in_chans=model.in_chans)
    precision = place_model(
        model, take(ComputeSettings, args), device, example, forward=model.feature_map
    )
    output = new_folder(args.output_dir)

    results, broken = [], 0
    names = dict(enumerate(classes, start=1))
    for number, (name, path) in enumerate(tqdm(files.items(), disable=None, leave=False)):
        try:
            with path.open("rb") as file:
                image = read_values(file, pixels)  # (C, H, W)
        except Exception as error:  # decoders raise anything on broken files
            broken += 1
            _logger.warning("Broken image, left out: %s (%s)", path, reason_of(error))
            continue
        size = tuple(image.shape[1:])
        view = WholeImage(model.input_size).view(size)
        shown = view.image(image, normalization.mean, pixels.value_range)
        with torch.no_grad(), precision.autocast():
            (found,) = model(normalization(shown.unsqueeze(0).to(device)), [view.size])
        found = scale_to_image(found, view.size, size)
        file_name = path.relative_to(args.images).as_posix()
        own = as_results(found, size, number, list(names))
        results += [{"file_name": file_name, **result} for result in own]
        objects = found_objects(own, names, args.min_score)
        picture = output / f"{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        ground = visible(image, pixels, args.show_channels)
        Image.fromarray(draw_objects(ground, objects)).save(picture)
    if broken == len(files):
        raise InputError(f"none of the images in {args.images} can be read, see above")
    categories = [{"id": number, "name": name} for number, name in names.items()]
    for file, written in ((RESULTS, results), (CATEGORIES, categories)):
        (output / file).write_text(json.dumps(written), encoding="utf-8")
    drawn = sum(result["score"] >= args.min_score for result in results)
    left_out = f", {counted(broken, 'broken image')} left out" if broken else ""
    _logger.info(
        "drew %s with a score of at least %g in %s, wrote %s to %s%s",
        *(counted(drawn, "object"), args.min_score, counted(len(files) - broken, "image")),
        *(counted(len(results), "detection"), output / RESULTS, left_out),
    )


if __name__ == "__main__":
    run_main(main)
