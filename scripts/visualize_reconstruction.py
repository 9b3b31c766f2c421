"""Draw a pre-trained model's reconstructions of images (Fig. 2).

    python scripts/visualize_reconstruction.py --checkpoint C --images DIR|FILES

Each image is shown as the original, with its visible patches only, and as the result: the visible
patches and the predictions for all others, even if the model was trained to predict some of them.
The title has the PSNR of the predicted patches, and that of one color in their place.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.analysis.flags import CHECKPOINT_HELP, add_mask_args
from scripts.analysis.pictures import check_picture_path
from util.arguments import Parser, check_arguments, positive_int
from util.settings.evaluation import add_show_channels_arg, check_show_channels
from util.settings.model import add_checkpoint_arg


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_checkpoint_arg(parser, CHECKPOINT_HELP)
    parser.add_argument(
        "--images", "--data_path", required=True, nargs="+", help="image files or folders"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("reconstruction.png"),
        help="picture to write; an earlier one is renamed to include its time (%(default)s)",
    )
    parser.add_argument(
        "--num_images", type=positive_int, default=8, help="maximum number of images (%(default)s)"
    )
    add_show_channels_arg(parser)
    add_mask_args(parser)
    args = parser.parse_args(argv)
    check_show_channels(args.show_channels)
    check_picture_path(args.output)
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

from scripts.analysis.inputs import Subject, list_images, read_images
from scripts.analysis.outputs import save_picture
from util.compute.precision import Precision
from util.errors import counted
from util.eval.figures import draw_reconstructions
from util.eval.monitor import val_split
from util.runs.run import run_main, start_run

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figure."""
    args = parse_args(argv)
    device = start_run(device=args.device, seed=args.seed)

    subject = Subject.load(
        args.checkpoint, device=device, seed=args.seed, mask_ratio=args.mask_ratio
    )
    files = list_images(args.images, args.num_images, arrays=not subject.pixels.is_rgb8)
    batch = read_images(files, subject.transform)
    images, _ = batch.to(device)  # (B, C, H, W)
    mean, std = subject.colors
    figure = draw_reconstructions(
        subject.model,
        images,
        val_split(subject.masking, range(len(images)), device),
        mean=mean,
        std=std,
        precision=Precision("fp32", device),
        name=subject.name,
        display=subject.display(batch, args.show_channels),
    )
    save_picture(figure, args.output)
    _logger.info("wrote %s with %s", args.output, counted(len(files), "image"))


if __name__ == "__main__":
    run_main(main)
