"""Export a trained encoder to timm, Hugging Face, MAE's layout, ONNX or an encoder-only file.

    python scripts/export_encoder.py --checkpoint C --format F --output O [--encoder_only]

timm: a folder for `timm.create_model("local-dir:O", pretrained=True)`, or the bare weights in a
.pth or .safetensors file. hf: a folder for transformers' `from_pretrained`. mae: a .pth file in
the layout of the released code. onnx: a graph. safetensors: the trained weights, under timm's
names, for this project. The log has the line that loads the output. C is any file that
`util.weights.encoder.read_encoder` reads.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments, check_new
from util.errors import InputError
from util.settings.model import add_checkpoint_arg

FORMATS = ("timm", "hf", "mae", "onnx", "safetensors")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_checkpoint_arg(
        parser, "checkpoint of this project, released weights, or weights of timm or Hugging Face"
    )
    parser.add_argument("--format", required=True, choices=FORMATS, help="kind of output")
    parser.add_argument(
        "--output",
        required=True,
        help="new folder for timm and hf; new file, with its usual suffix, for the others",
    )
    parser.add_argument(
        "--encoder_only", action="store_true", help="leave out the head or the decoder"
    )
    args = parser.parse_args(argv)
    check_new(Path(args.output), flag="--output")
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

from scripts.export.source import Source, build, check_features, read_source
from scripts.export.to_hugging_face import write_hugging_face
from scripts.export.to_mae import write_mae
from scripts.export.to_onnx import write_onnx
from scripts.export.to_timm import write_timm
from util.runs.run import run_main, start_run
from util.weights.encoder import fit_encoder, save_encoder
from util.weights.files import write_new

_logger = logging.getLogger(__name__)


def write_own(source: Source, output: Path) -> None:
    """Write the trained weights and what is known about them, for this project.

    Raises:
        InputError: the suffix is not .safetensors, or the weights do not fit the size.
    """
    if output.suffix != ".safetensors":
        raise InputError(f"--output {output} must end in .safetensors with --format safetensors")
    fit_encoder(build(source.weights, source.size, head=False), source.weights, head=False)
    write_new(output, partial(save_encoder, source.weights))


WRITERS: dict[str, Callable[[Source, Path], None]] = dict(
    zip(FORMATS, (write_timm, write_hugging_face, write_mae, write_onnx, write_own), strict=True)
)


def main(argv: Sequence[str] | None = None) -> None:
    """Export one checkpoint."""
    args = parse_args(argv)
    start_run(device="cpu", seed=0)
    source = read_source(args.checkpoint, encoder_only=args.encoder_only)
    if args.format != "safetensors":
        check_features(source.weights)
    _logger.info("images: %s", source.images)
    WRITERS[args.format](source, Path(args.output))
    _logger.info("wrote %s", args.output)


if __name__ == "__main__":
    run_main(main)
