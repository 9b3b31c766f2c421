"""Draw a pre-trained model's reconstructions of images (Fig. 2).

    python scripts/visualize_reconstruction.py --checkpoint C --images DIR|FILES --output F.png

Columns: original, masked, reconstruction, reconstruction with the visible patches. All masked
patches are decoded, even if the model was trained to predict only some of them.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.analysis.inputs import CHECKPOINT_HELP, Subject, list_images, read_images
from util.arguments import Parser, positive_int, ratio, seed_number
from util.compute.precision import Precision
from util.errors import InputError, counted
from util.eval.figures import draw_reconstructions
from util.eval.monitor import val_split
from util.runs.run import run_main, start_run

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the figure."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument("--images", required=True, nargs="+", help="image files or folders")
    parser.add_argument("--output", required=True, help="output file, such as figure.png")
    parser.add_argument(
        "--num_images", type=positive_int, default=8, help="maximum number of images (%(default)s)"
    )
    parser.add_argument(
        "--mask_ratio", type=ratio, help="fraction of patches that is masked (as trained)"
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="of the masks (%(default)s)")
    parser.add_argument("--device", help="cuda, cuda:N or cpu (cuda if available)")
    args = parser.parse_args(argv)
    device = start_run(device=args.device, seed=args.seed)

    files = list_images(args.images, args.num_images)
    subject = Subject.load(
        args.checkpoint, device=device, seed=args.seed, mask_ratio=args.mask_ratio
    )
    images, _ = read_images(files, subject.transform).to(device)  # (B, 3, H, W)
    split = val_split(subject.masking, range(len(images)), device)
    mean, std = subject.colors
    figure = draw_reconstructions(
        subject.model, images, split, mean=mean, std=std, precision=Precision("fp32", device)
    )
    try:
        Image.fromarray(figure).save(args.output)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write --output {args.output}: {error}") from error
    _logger.info("wrote %s with %s", args.output, counted(len(files), "image"))


if __name__ == "__main__":
    run_main(main)
