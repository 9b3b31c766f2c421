"""Predict the classes of a folder of images, or write their features.

    python scripts/predict.py --checkpoint C --images DIR --output predictions.csv
    python scripts/predict.py --checkpoint C --images DIR --features features.npy

predictions.csv has a row for each image: its path below DIR, the most likely classes with their
scores, and for a broken image, the reason in the column `error`. A score is a probability (softmax,
or of each class on its own if images may have several); a regression has one column, `value`.

features.npy is a float32 array (images, width) of what the head of C takes; a C without a head is
enough, and gives the features that main_knn.py measures. Its rows are those of predictions.csv, or
without --output, of features.csv, which has paths and errors only; those of broken images are NaN.
"""

import argparse
import csv
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments, check_new, positive_int, process_count, take
from util.errors import InputError, RunError, counted
from util.machine import default_workers
from util.settings.compute import ComputeSettings, add_precision_args
from util.settings.data import (
    DataSettings,
    add_color_args,
    add_crop_pct_arg,
    add_pixel_args,
    add_tile_arg,
)
from util.settings.model import ATTENTION, POOLS, add_checkpoint_arg

TOP = 5  # classes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; the result has the path of the `table`, too."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_checkpoint_arg(
        parser,
        "any file that main_finetune.py evaluates, or for features alone, any that it starts from",
    )
    parser.add_argument("--images", required=True, type=Path, help="folder of images")
    parser.add_argument("--output", type=Path, help="new CSV file of predictions (none)")
    parser.add_argument("--features", type=Path, help="new .npy file of features (none)")
    parser.add_argument(
        "--top", type=positive_int, default=TOP, help="classes to name for an image (%(default)s)"
    )
    parser.add_argument(
        "--pool",
        choices=POOLS,
        help="what the features are, see main_knn.py (the head's, or avg without a head)",
    )
    parser.add_argument("--device", help="cuda, cuda:N or cpu (cuda if available)")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--batch_size", type=positive_int, default=64, help="images at a time (%(default)s)"
    )
    group.add_argument(
        "--num_workers",
        type=process_count,
        default=default_workers(),
        help="loader processes (seven eighths of the CPU cores, %(default)s on this machine)",
    )
    group.add_argument(
        "--input_size",
        type=positive_int,
        nargs="+",
        metavar="PX",
        help="side of the square input, or height and width (as trained)",
    )
    inherited = "from --checkpoint, else "
    add_pixel_args(group, inherited=inherited)
    add_color_args(group, inherited=inherited)
    add_tile_arg(group, inherited=inherited)
    add_crop_pct_arg(group, inherited=inherited)
    add_precision_args(parser, compile_modes=())
    args = parser.parse_args(argv)
    if not (args.output or args.features):
        raise InputError("nothing to write: give --output, --features or both")
    if args.features and args.features.suffix != ".npy":
        raise InputError(f"--features {args.features} is an array: give it the suffix .npy")
    args.table = args.output or args.features.with_suffix(".csv")
    check_new(args.table, flag="--output" if args.output else "--features")
    if args.features:
        check_new(args.features, flag="--features")
    if args.table == args.features:
        raise InputError(f"--output and --features are both {args.table}: choose another one")
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from models import build_classifier, load_classifier, starting_point
from models_vit import VisionTransformer
from util.compute.distributed import world_size
from util.compute.precision import Precision, blank_images
from util.compute.setup import place_model
from util.data.annotated import StoredImages
from util.data.batch import Batch, Crops, Sample, collate
from util.data.broken_images import reason_of
from util.data.colors import choose_colors
from util.data.layout import images_below
from util.data.loaders import build_eval_loader
from util.data.transforms import (
    CenterCrop,
    default_crop_pct,
    eval_transform,
)
from util.runs.run import run_main, start_run
from util.weights.encoder import EncoderWeights, StartingPoint, load_encoder

MEMORY_ADVICE = "lower --batch_size"

_logger = logging.getLogger(__name__)


class ImageFiles(Dataset):
    """The images of a folder, in the order of their paths; a broken one is black and says why.

    Attributes:
        names: paths below the folder.

    Raises:
        InputError: the folder is missing, or has no images.
    """

    def __init__(self, folder: Path, transform: CenterCrop) -> None:
        if not folder.is_dir():
            raise InputError(f"--images {folder} is not a folder: give the folder of the images")
        self.paths = images_below(folder, arrays=not transform.pixels.is_rgb8)
        if not self.paths:
            raise InputError(f"no images found in --images {folder}: give another folder")
        self.names = [path.relative_to(folder).as_posix() for path in self.paths]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the image of (epoch, index); if it is broken, its `broken` has name and reason."""
        _, index = key
        try:
            with self.paths[index].open("rb") as file:
                crops = self.transform(self.transform.read(file))
        except Exception as error:  # decoders raise anything on broken files
            crops = Crops([], [False], self.transform.normalization)
            return Sample(crops, None, [(self.names[index], reason_of(error))])
        return Sample(crops, None, [])

    def collate(self, samples: Sequence[Sample]) -> Batch | InputError | RunError:
        """Combine samples, with black images of the others' type in place of broken ones."""
        dtype = next((s.crops.pixels[0].dtype for s in samples if not s.broken), torch.uint8)
        shape = (self.transform.pixels.num_channels, *self.transform.size)
        for sample in samples:
            if sample.broken:
                sample.crops.pixels.append(torch.zeros(shape, dtype=dtype))
        return collate(samples)


_CELLS = ("class", "score")


@dataclass(frozen=True)
class Reading:
    """How a head's outputs are read, as cells of a table.

    Args:
        top: number of classes to name, unless it is a regression.
    """

    task: str
    classes: Sequence[str]
    target_scale: tuple[float, float]
    top: int

    @classmethod
    def of(cls, weights: EncoderWeights, top: int) -> "Reading":
        """Read the head of these weights; classes without names are numbers."""
        classes = weights.classes or [str(number) for number in range(weights.num_classes)]
        task, scale = weights.task or "classification", weights.target_scale or (0.0, 1.0)
        return cls(task, classes, scale, min(top, len(classes)))

    @property
    def header(self) -> list[str]:
        """Names of the cells."""
        if self.task == "regression":
            return ["value"]
        others = [f"{name}_{place}" for place in range(2, self.top + 1) for name in _CELLS]
        return [*_CELLS, *others]

    def cells(self, outputs: Tensor) -> list[list[str]]:
        """The cells of each image's outputs, (B, outputs)."""
        if self.task == "regression":
            mean, std = self.target_scale
            return [[_text(value * std + mean)] for value in outputs[:, 0].tolist()]
        scores = outputs.sigmoid() if self.task == "multilabel" else outputs.softmax(dim=1)
        best = scores.topk(self.top)  # (B, top)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            [cell for i, x in zip(labels, own, strict=True) for cell in (self.classes[i], _text(x))]
            for labels, own in rows
        ]


def _text(value: float) -> str:
    return f"{value:.6g}"


def load(
    path: str, data: DataSettings, pool: str | None, *, needs_head: bool
) -> tuple[VisionTransformer, StartingPoint]:
    """Load a classifier, or only its encoder, which any file of weights has.

    Args:
        pool: None is the head's, and without a head, the mean of the patch tokens.

    Raises:
        InputError: see `load_classifier`.
    """
    if needs_head:
        return load_classifier(path, pool=pool, **data.input_form)
    start = starting_point(path, **data.input_form)
    if start.weights.pool == ATTENTION and pool is None:  # its queries are trained
        return load_classifier(path, **data.input_form)
    start.check_colors()
    options = {"img_size": start.img_size, **start.pixels.model_options}
    options |= {"pool": pool or start.weights.pool or "avg", "layers": start.weights.layers}
    model = build_classifier(start.size, num_classes=0, **options)
    load_encoder(model, start.weights, head=False)
    return model.eval(), start


class Predicted(NamedTuple):
    """The results of a batch of images, on the CPU."""

    features: Tensor  # (B, D), float32; NaN for broken images
    outputs: Tensor  # (B, outputs) of the head, float32
    errors: list[str]  # why an image is broken, "" if it is not


@torch.no_grad()
def predict(
    model: VisionTransformer, loader: Iterable[Batch], names: Sequence[str], precision: Precision
) -> Iterator[Predicted]:
    """Yield the results of every batch.

    Args:
        names: of all images, in the order of the loader.

    Raises:
        InputError: results are not finite.
    """
    done = 0
    for batch in loader:
        reasons = dict(batch.broken)
        errors = [reasons.get(name, "") for name in names[done : done + batch.num_images]]
        done += batch.num_images
        images, _ = batch.to(precision.device)  # (B, C, H, W)
        with precision.autocast():
            features = model.features(images)  # (B, D)
            outputs = model.head(features)
        features, outputs = features.float().cpu(), outputs.float().cpu()
        is_broken = torch.tensor([bool(error) for error in errors])
        if not all(values[~is_broken].isfinite().all() for values in (features, outputs)):
            raise InputError(
                f"results computed in {precision.amp} are not finite: use --amp fp32 or other "
                "weights"
            )
        features[is_broken] = torch.nan
        yield Predicted(features, outputs, errors)


@contextmanager
def new_file(path: Path, mode: str, *, flag: str, **options: str) -> Iterator[IO]:
    """Open a file that appears under its name, which the user gave as `flag`, once it is complete.

    Raises:
        InputError: it already exists, or cannot be written.
    """
    check_new(path, flag=flag)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            unfinished = Path(folder, path.name)
            with unfinished.open(mode, **options) as file:
                yield file
            unfinished.rename(path)
    except OSError as error:
        raise InputError(f"cannot write {flag} {path}: {error}") from error


def open_table(path: Path, *, flag: str) -> AbstractContextManager[IO]:
    """Open a new table; characters of a file's name that are not text are escaped."""
    options = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
    return new_file(path, "w", flag=flag, **options)


def write_results(
    results: Iterable[Predicted],
    names: Sequence[str],
    reading: Reading | None,
    table: IO,
    array: IO | None,
    width: int,
) -> int:
    """Write the results as they come, so that memory does not limit the number of images.

    Args:
        names: of all images.
        reading: None leaves out what the head says.
        table, array: the open files; the array's is for features of this width.

    Returns:
        The number of broken images.
    """
    rows = csv.writer(table, lineterminator="\n")
    header = reading.header if reading else []
    rows.writerow(["path", *header, "error"])
    if array:
        shape = (len(names), width)
        layout = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(array, layout)
    done = num_broken = 0
    for result in results:
        answers = reading.cells(result.outputs) if reading else [[]] * len(result.errors)
        for cells, error in zip(answers, result.errors, strict=True):
            rows.writerow([names[done], *(["" for _ in header] if error else cells), error])
            if error:
                num_broken += 1
                _logger.warning("Broken image: %s (%s)", names[done], error)
            done += 1
        if array:
            array.write(result.features.numpy().astype("<f4").tobytes())
    return num_broken


def main(argv: Sequence[str] | None = None) -> None:
    """Predict every image, and write a table and features."""
    args = parse_args(argv)
    data = take(DataSettings, args)
    device = start_run(device=args.device, seed=0)
    if world_size() > 1:
        raise InputError("predictions are made by one process: use python instead of torchrun")

    model, start = load(args.checkpoint, data, args.pool, needs_head=args.output is not None)
    weights = start.weights
    crop = data.crop_pct or weights.crop_pct or default_crop_pct(start.img_size)
    reading = {"pixels": start.pixels, "tile": data.tile or weights.tile}
    transform = eval_transform(*start.input_format, crop, **weights.resizing, **reading)
    images = ImageFiles(args.images, transform)
    # Compared with the images:
    choose_colors(StoredImages(images.paths), start.mean, start.std, **reading)
    outputs = Reading.of(weights, args.top) if args.output else None
    example = blank_images(start.img_size, device, in_chans=start.pixels.num_channels)
    precision = place_model(model, take(ComputeSettings, args), device, example)
    sizes = {"batch_size": args.batch_size, "num_workers": data.num_workers}
    loader = build_eval_loader(images, **sizes, device=device)
    progress = tqdm(loader, unit="batch", disable=None, leave=False)

    with ExitStack() as files:
        flag = "--output" if args.output else "--features"
        table = files.enter_context(open_table(args.table, flag=flag))
        array = None
        if args.features:
            array = files.enter_context(new_file(args.features, "wb", flag="--features"))
        results = predict(model, progress, images.names, precision)
        num_broken = write_results(results, images.names, outputs, table, array, model.embed_dim)
        if num_broken == len(images):
            raise InputError(f"none of the images in {args.images} can be read, see above")
    written = " and ".join(str(path) for path in (args.table, args.features) if path)
    broken = f", {counted(num_broken, 'broken image')} among them" if num_broken else ""
    _logger.info("wrote %s to %s%s", counted(len(images), "row"), written, broken)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
