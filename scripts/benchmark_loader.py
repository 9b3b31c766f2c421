"""Measure how many images a CPU core loads for pre-training, compared with Pillow and torchvision.

    python scripts/benchmark_loader.py --data_path FOLDER_OR_TAR [--also PREPARED] [--decoders]
        [--json F.json]

Prints images per second of CPU time (this process and its loader workers, one thread each), in
rounds that measure every loader once: the median, and the median ratio to the first loader. The
measurement ends with a batch on the host. The reference's batch is normalized; this project leaves
flips and normalization to the device, where they cost a GPU next to nothing.

Also checks that the pixels of the same crops differ only by rounding, 0.1 of 255 on average.
"""

import argparse
import logging
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import (
    Parser,
    check_arguments,
    check_output_folders,
    positive_int,
    process_count,
)
from util.errors import InputError, RunError
from util.normalization import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

REPEATED_AUG = 4


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(prog="benchmark_loader.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="folder or tar of images")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="PATH", help="other images, such as prepared ones"
    )
    parser.add_argument(
        "--decoders",
        action="store_true",
        help="also measure decoding alone, by each installed library, of files in memory",
    )
    parser.add_argument(
        "--rounds", "--repeats", type=positive_int, default=7, help="turns (%(default)s)"
    )
    parser.add_argument(
        "--num_images",
        type=positive_int,
        default=1000,
        help="images to read per measurement, at least, repeating them if necessary (%(default)s)",
    )
    parser.add_argument(
        "--num_workers", type=process_count, default=1, help="loader processes (%(default)s)"
    )
    parser.add_argument(
        "--batch_size", type=positive_int, default=64, help="images per batch (%(default)s)"
    )
    parser.add_argument(
        "--input_size", type=positive_int, default=224, help="crop size in pixels (%(default)s)"
    )
    parser.add_argument("--json", metavar="PATH", help="file for all numbers and the machine")
    args = parser.parse_args(argv)
    if args.num_workers and not Path("/proc/self/stat").exists():
        raise InputError(
            "/proc, which has the CPU time of workers, was not found: use --num_workers 0"
        )
    if args.batch_size % REPEATED_AUG:
        raise InputError(
            f"--batch_size {args.batch_size} must be a multiple of {REPEATED_AUG}, because one of "
            "the loaders takes as many crops per image"
        )
    check_output_folders(args.json and Path(args.json))
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import functional

from scripts.benchmark.step import describe_machine
from util.compute.signals import ignore_signals
from util.data.batch import Sample, collate, denormalize
from util.data.broken_images import reason_of
from util.data.datasets import build_dataset
from util.data.decode import Jpeg, formats, read_record
from util.data.images import IndexedImages
from util.data.jpeg import CPU, LIBRARIES, Decoder, open_decoder
from util.data.loaders import build_train_loader
from util.data.transforms import pretrain_transform
from util.runs.files import write_json
from util.runs.run import run_main, start_logging, versions

NUM_COMPARED = 64  # images whose pixels are compared
MAX_DIFFERENCE = 0.1  # mean, on a scale of 255
NORMALIZATION = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

_logger = logging.getLogger(__name__)


def read_plainly(
    images: IndexedImages,
    index: int,
    prepare: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> tuple[Image.Image, int]:
    """Read an image by Pillow alone, in RGB, and its label.

    Raises:
        InputError: it cannot be read.
    """
    file, label = images.reader[index]
    try:
        with file:
            return prepare(Image.open(file, formats=formats())).convert("RGB"), label
    except Exception as error:  # decoders raise anything on broken files
        raise InputError(
            f"{images.name(index)} cannot be read ({reason_of(error)}), and the reference does not "
            "replace broken images: repair or remove it"
        ) from error


class Reference(Dataset):
    """Dataset with Pillow's decoder and torchvision's v1 transforms, as is common for MAE.

    Args:
        images: the source of the image files.
        size: (height, width) of the crops.
    """

    def __init__(self, images: IndexedImages, size: tuple[int, int]) -> None:
        self.images = images
        self.transform = v1.Compose(
            [
                v1.RandomResizedCrop(
                    size, scale=(0.2, 1.0), interpolation=v1.InterpolationMode.BICUBIC
                ),
                v1.RandomHorizontalFlip(),
                v1.ToTensor(),
                v1.Normalize(*NORMALIZATION),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = read_plainly(self.images, index)
        return self.transform(image), label


def open_images(path: str, size: tuple[int, int], num_crops: int = 1) -> IndexedImages:
    """Open the training images at a path as pre-training does.

    Raises:
        InputError: there are none.
    """
    transform = pretrain_transform(size, *NORMALIZATION, num_crops=num_crops)
    return build_dataset("", path, split="train", transform=transform, seed=0)


def reference_epochs(args: argparse.Namespace, images: IndexedImages) -> Iterator[int]:
    """Yield the size of each batch of the reference loader, and 0 after each epoch."""
    loader = DataLoader(
        Reference(images, (args.input_size,) * 2),
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        worker_init_fn=ignore_signals,
    )
    while True:
        try:
            yield from (len(pixels) for pixels, _ in loader)
        except InputError as error:  # in the text of a worker's, the traceback comes first
            *_, sentence = str(error).strip().splitlines()
            raise InputError(sentence.removeprefix("util.errors.InputError: ")) from error
        yield 0


def own_epochs(args: argparse.Namespace, images: IndexedImages) -> Iterator[int]:
    """Do the same as `reference_epochs` for this project's loader; crops count as images."""
    loader = build_train_loader(
        images,
        batch_size=args.batch_size,
        accum_iter=1,
        rank=0,
        world_size=1,
        seed=0,
        num_workers=args.num_workers,
        pin_memory=False,
    )
    epoch = 0
    while True:
        yield from (batch.num_images for step in loader.steps(epoch) for batch in step)
        yield 0
        epoch += 1


def decoder_epochs(decoder: Decoder, images: IndexedImages) -> Iterator[int]:
    """Do the same as `reference_epochs` for decoding alone, of the JPEGs among the images."""
    records = (read_record(images.reader[index][0]) for index in range(len(images)))
    files = [record.data for record in records if isinstance(record, Jpeg)]
    if not files:
        raise InputError("--decoders needs images that are JPEG files")
    while True:
        for file in files:
            decoder.decode(file, device=CPU)
            yield 1
        yield 0


def cpu_seconds() -> float:
    """CPU time that this process and its workers have used."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user mode and in the kernel
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def images_per_second(epochs: Iterator[int], num_images: int) -> float:
    """Measure whole epochs until at least this many images are read, after one epoch of warm-up."""
    for size in epochs:
        if size == 0:
            break
    count, start = 0, cpu_seconds()
    for size in epochs:
        count += size
        if size == 0 and count >= num_images:
            break
    return count / (cpu_seconds() - start)


def pixel_difference(images: IndexedImages, size: tuple[int, int]) -> float:
    """Mean difference, on a scale of 255, between the reference's crops and this project's."""
    differences = []
    for index in range(min(NUM_COMPARED, len(images))):
        image, _ = read_plainly(images, index, ImageOps.exif_transpose)
        seed = ("augment", 0, 0, index)
        (box,), (flip,), _ = images.transform.draw(image.height, image.width, *seed)
        crop = functional.resized_crop(image, *box, size, v1.InterpolationMode.BICUBIC)
        theirs = functional.to_tensor(functional.hflip(crop) if flip else crop)
        crops = images.transform(images.transform.read(images.reader[index][0]), *seed)
        ours, _ = collate([Sample(crops, label=None, broken=[])]).to(torch.device("cpu"))
        difference = denormalize(ours, *NORMALIZATION)[0] - theirs
        differences.append(255 * difference.abs().mean().item())
    return statistics.mean(differences)


def measure(
    loaders: dict[str, Callable[[], Iterator[int]]], *, rounds: int, num_images: int
) -> Iterator[dict[str, list[float]]]:
    """Measure every loader once per round; yield all speeds so far, in images per CPU second."""
    speeds = {name: [] for name in loaders}
    for number in range(1, rounds + 1):
        for name, epochs in loaders.items():
            speeds[name].append(images_per_second(epochs(), num_images))
        _logger.info("round %d of %d", number, rounds)
        yield speeds


def summarize(speeds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Compute medians of the speeds and of the ratios to the first loader in the same round."""
    first = next(iter(speeds.values()))
    return {
        name: {
            "images_per_second": statistics.median(values),
            "slowest": min(values),
            "fastest": max(values),
            "ratio": statistics.median(v / f for v, f in zip(values, first, strict=True)),
        }
        for name, values in speeds.items()
    }


def table(results: dict[str, dict[str, float]]) -> str:
    """Format the results as a Markdown table."""
    lines = ["| loader | images/s per core | range | ratio |", "|---|--:|--:|--:|"]
    lines += [
        f"| {name} | {r['images_per_second']:.0f} | {r['slowest']:.0f} to {r['fastest']:.0f} "
        f"| {r['ratio']:.2f} |"
        for name, r in results.items()
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and compare."""
    args = parse_args(argv)
    start_logging()
    torch.set_num_threads(1)
    size = (args.input_size,) * 2
    images = open_images(args.data_path, size)
    if isinstance(images.reader[0][0], np.ndarray):
        raise InputError(
            f"--data_path {args.data_path} contains decoded pixels, which the reference cannot "
            "read: set --data_path to the original files, and pass these with --also"
        )
    repeated = open_images(args.data_path, size, num_crops=REPEATED_AUG)
    loaders = {
        "Pillow and torchvision v1": lambda: reference_epochs(args, images),
        "this project": lambda: own_epochs(args, images),
        f"this project, --repeated_aug {REPEATED_AUG}": lambda: own_epochs(args, repeated),
    }
    for path in args.also:
        also = open_images(path, size)
        loaders[f"this project, {path}"] = lambda also=also: own_epochs(args, also)
    for library in LIBRARIES if args.decoders else ():
        if decoder := open_decoder(library, CPU):
            loaders[f"decoding by {decoder.name}"] = partial(decoder_epochs, decoder, images)

    difference = pixel_difference(images, size)
    _logger.info("mean difference of the same crops: %.4f of 255", difference)
    if not difference < MAX_DIFFERENCE:
        raise RunError(
            f"the mean difference of the same crops is {difference:.3f} of 255, not below "
            f"{MAX_DIFFERENCE}: this project reads other pixels than Pillow and torchvision v1"
        )
    content = {
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "args": vars(args),
        "pixel_difference": difference,
    }
    found = measure(loaders, rounds=args.rounds, num_images=args.num_images)
    for done, speeds in enumerate(found, start=1):
        content |= {"rounds_done": done, "results": summarize(speeds), "rounds": speeds}
        if args.json is None:
            continue
        try:  # stopping the program loses only the current round
            write_json(Path(args.json), content, keep_earlier=done == 1)
        except OSError as error:
            raise InputError(f"cannot write --json {args.json}: {error}") from error
    print(table(content["results"]))


if __name__ == "__main__":
    run_main(main)
