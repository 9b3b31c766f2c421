"""Resize a folder of images once, so that training reads them faster.

    python scripts/prepare_dataset.py --data_path IMAGES --output_dir OUT [--format raw]
    python scripts/prepare_dataset.py --verify --output_dir OUT
    python main_pretrain.py --data_path OUT ...

jpeg writes OUT/train.tar and OUT/val.tar, with the folders and names of the original files. raw
writes OUT/train/ and OUT/val/, with pixels that need no decoding, about six times as large; with
--channels or --value_range, in the type of the files. Both are the same for any number of
processes; OUT/prepared.json lists the settings and broken images.
"""

import argparse
import hashlib
import io
import json
import logging
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import (
    Parser,
    check_arguments,
    integer,
    natural_float,
    positive_int,
    process_count,
)
from util.errors import InputError, RunError, counted
from util.settings.data import add_class_folder_arg, add_pixel_args, check_pixel_flags, pixel_format

FORMATS = {"jpeg": "jpeg", "raw": "raw", "uint8": "raw"}  # as given -> as meant; uint8 is older


def jpeg_quality(text: str) -> int:
    """Parse a JPEG quality."""
    value = integer(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be between 1 and 100, not {text}")
    return value


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data_path", help="folder of images, optionally in train/ and val/, or a .tar file")
    add("--output_dir", help="new folder for the prepared images")
    side = "size to which the short side of larger images is resized (%(default)s)"
    add("--short_side", type=positive_int, default=256, metavar="PX", help=side)
    add_class_folder_arg(parser)
    kinds = "JPEG files or raw pixels (jpeg, but raw with --channels or --value_range)"
    add("--format", choices=FORMATS, metavar="{jpeg,raw}", help=kinds)
    add_pixel_args(parser)
    add("--quality", type=jpeg_quality, default=95, help="of JPEG files, 1 to 100 (%(default)s)")
    limit = "fraction of unreadable files above which to stop (%(default)s)"
    add("--max_broken", type=natural_float, default=0.01, help=limit)
    add(
        "--num_workers",
        type=process_count,
        default=os.cpu_count() or 1,
        help="processes (%(default)s)",
    )
    text = "only compare the files of an earlier OUTPUT_DIR with their checksums (off)"
    add("--verify", action="store_true", help=text)
    add("word", nargs="?", help=argparse.SUPPRESS)  # earlier, --verify took the folder
    args = parser.parse_args(argv)
    if args.word:
        flag = "--output_dir" if args.verify else "--data_path or --output_dir"
        raise InputError(f"{args.word} stands without a flag: write {flag} before it")
    if args.verify and args.data_path:
        raise InputError("--verify reads only OUTPUT_DIR: leave --data_path out")
    if not (args.output_dir and (args.data_path or args.verify)):
        raise InputError("give --data_path and --output_dir, or --verify and --output_dir")
    check_pixel_flags(pixel_format(args.channels, args.value_range), None, None)
    args.pixels = pixel_format(args.channels, args.value_range, args.axes)
    usual = "jpeg" if args.pixels.is_rgb8 else "raw"
    args.format = FORMATS[args.format or usual]
    if args.format == "jpeg" and not args.pixels.is_rgb8:
        raise InputError(
            "JPEG files cannot keep the channels and values of --channels and --value_range: use "
            "--format raw"
        )
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from util.compute.signals import ignore_signals
from util.data.batch import Box, resize_crop
from util.data.broken_images import BrokenImages, reason_of
from util.data.colors import check_depth, highest_deep_value
from util.data.datasets import build_dataset
from util.data.decode import read_rgb
from util.data.images import IndexedImages, class_names
from util.data.packed import PackedImage, write_packed
from util.data.report import report_images
from util.data.values import read_values
from util.normalization import RGB8, PixelFormat
from util.runs.run import run_main, start_run
from util.weights.files import write_new

SPLITS = {"train": "train", "val": "validation"}  # names in the output -> names here
RECORD, CHECKSUMS = "prepared.json", "checksums.txt"
BLOCK = 1 << 20  # bytes

_logger = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """A prepared image: label, size, and a JPEG file or numbers (height, width, C) of a type."""

    label: int
    height: int
    width: int
    dtype: str
    content: bytes


class PreparedImages(Dataset):
    """Prepared images of a reader; for an unreadable image, the reason instead.

    Args:
        reader: gives open files and labels.
        short_side: in pixels; smaller images are not resized.
        quality: JPEG quality, 1 to 100; None for raw pixels.
        pixels: how images are read.
    """

    def __init__(
        self, reader: Dataset, *, short_side: int, quality: int | None, pixels: PixelFormat = RGB8
    ) -> None:
        self.reader = reader
        self.short_side = short_side
        self.quality = quality
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Prepared | str:
        try:
            file, label = self.reader[index]
            with file:
                content = file.read()
            prepare = self._prepare_rgb if self.pixels.is_rgb8 else self._prepare_values
            return Prepared(int(label), *prepare(content))
        except Exception as error:  # decoders raise anything on broken files
            return reason_of(error)

    def _prepare_rgb(self, content: bytes) -> tuple[int, int, str, bytes]:
        """Return the height, width, type and content of an image as 8-bit RGB."""
        is_jpeg = content.startswith(b"\xff\xd8")
        image = read_rgb(io.BytesIO(content))
        is_small = min(image.size) <= self.short_side
        if not is_small:
            image = v2.functional.resize(
                image, [self.short_side], InterpolationMode.BICUBIC, antialias=True
            )
        if self.quality is None:
            content = image.tobytes()
        elif not (is_jpeg and is_small):
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=self.quality)
            content = encoded.getvalue()
        return image.height, image.width, "|u1", content

    def _prepare_values(self, content: bytes) -> tuple[int, int, str, bytes]:
        """Return the same of the file's own numbers."""
        values = read_values(io.BytesIO(content), self.pixels)  # (C, h, w)
        height, width = values.shape[1:]
        short = min(height, width)
        if short > self.short_side:
            size = [self.short_side * side // short for side in (height, width)]
            values = resize_crop(values, Box(0, 0, height, width), size)
        array = values.permute(1, 2, 0).contiguous().numpy()
        little_endian = array.dtype.newbyteorder("<")
        return *array.shape[:2], little_endian.str, array.astype(little_endian).tobytes()


def readable(
    images: IndexedImages, prepared: PreparedImages, broken: BrokenImages, num_workers: int
) -> Iterator[tuple[int, Prepared]]:
    """Prepare images in parallel; yield the readable ones in order, with their index.

    Raises:
        InputError: too many are broken, or all of a class, so that labels would shift.
    """
    classes = class_names(images.reader)
    labels_left = set(range(len(classes)))
    loader = DataLoader(
        prepared, batch_size=None, num_workers=num_workers, worker_init_fn=ignore_signals
    )
    for index, image in enumerate(tqdm(loader, unit=" images", disable=None)):
        if isinstance(image, str):
            name = images.name(index)
            _logger.warning("Broken image, left out: %s (%s)", name, image)
            broken.reasons[name] = image
            broken.check()
            continue
        labels_left.discard(image.label)
        yield index, image
    if labels_left:
        raise InputError(
            f"no image of the class '{classes[min(labels_left)]}' can be read: repair one, or "
            "remove the class"
        )


def write_tar(path: Path, images: Iterable[tuple[str, bytes]]) -> None:
    """Write (name, content) pairs into a new .tar file."""
    with tarfile.open(path, "w") as tar:
        for name, content in images:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            tar.members.clear()  # else it would keep an entry for every file


def jpeg_names(names: Sequence[str]) -> list[str]:
    """Replace the suffixes of file names by .jpg, or append it where two names would collide."""
    stems = [os.path.splitext(name)[0] for name in names]  # noqa: PTH122, pathlib is slow
    counts = Counter(stems)
    return [
        f"{stem if counts[stem] == 1 else name}.jpg"
        for stem, name in zip(stems, names, strict=True)
    ]


def prepare(
    splits: dict[str, IndexedImages],
    folder: Path,
    *,
    short_side: int,
    quality: int | None,
    pixels: PixelFormat,
    num_workers: int,
    max_broken: float,
) -> None:
    """Write a new folder with the prepared images of all splits.

    Args:
        short_side, quality, pixels: see `PreparedImages`.
        max_broken: fraction of a split's images that may be left out.

    Raises:
        InputError: see `readable`.
    """
    folder.mkdir()
    record = {"short_side": short_side, "quality": quality, **pixels.header, "splits": {}}
    for split, images in splits.items():
        names = [images.reader.filename(index) for index in range(len(images))]
        sizes = {"short_side": short_side, "quality": quality}
        prepared = PreparedImages(images.reader, **sizes, pixels=pixels)
        broken = BrokenImages(len(images), max_broken)
        kept = readable(images, prepared, broken, num_workers)
        if quality is None:
            rows = (PackedImage(names[index], *image) for index, image in kept)
            index = {"classes": class_names(images.reader), "short_side": short_side}
            write_packed(folder / split, rows, **index, channels=pixels.num_channels)
        else:
            names = jpeg_names(names)
            write_tar(folder / f"{split}.tar", ((names[i], image.content) for i, image in kept))
        count = len(images) - len(broken.reasons)
        record["splits"][split] = {"images": count, "left_out": broken.reasons}
        _logger.info("%s: %s, %d left out", split, counted(count, "image"), len(broken.reasons))
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    write_checksums(folder)


def checksums_of(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the BLAKE2b digest of each file in hexadecimal."""
    size = sum(path.stat().st_size for path in paths)
    with tqdm(desc="checksums", total=size, unit="B", unit_scale=True, disable=None) as bar:
        for path in paths:
            digest = hashlib.blake2b()
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    bar.update(len(block))
            yield digest.hexdigest()


def write_checksums(folder: Path) -> None:
    """Write the checksums of a folder's files in the format of `b2sum --check`, RECORD's last."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    paths = sorted(files, key=lambda path: (path.name == RECORD, path))
    lines = [
        f"{digest}  {path.relative_to(folder)}\n"
        for path, digest in zip(paths, checksums_of(paths), strict=True)
    ]
    (folder / CHECKSUMS).write_text("".join(lines))


def verify(folder: Path) -> None:
    """Compare the files of a prepared folder with their checksums.

    Raises:
        InputError: the folder was not written by this script.
        RunError: a file differs or is missing.
    """
    try:
        text = (folder / CHECKSUMS).read_text(errors="replace")
    except OSError as error:
        raise InputError(
            f"{folder / CHECKSUMS} cannot be read ({error.strerror}): give a folder that this "
            "script wrote"
        ) from error
    parts = (line.partition("  ") for line in text.removesuffix("\n").split("\n"))
    expected = {name: digest for digest, _, name in parts}
    paths = [folder / name for name in expected]
    try:
        found = dict(zip(expected, checksums_of(paths), strict=True))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is damaged: prepare or copy it again ({error})") from error
    differing = [name for name in expected if found[name] != expected[name]]
    if differing or RECORD not in expected:
        names = ", ".join(differing) or CHECKSUMS
        raise RunError(f"{folder} is damaged in {names}: prepare or copy it again")
    _logger.info("%s: %s checked against the checksums", folder, counted(len(found), "file"))


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare or verify a dataset."""
    args = parse_args(argv)
    start_run(device="cpu", seed=0)
    if args.verify:
        verify(Path(args.output_dir))
        return
    options = {"transform": None, "seed": 0, "class_folder": args.class_folder}
    options["pixels"] = args.pixels
    splits = {
        name: build_dataset("folder", args.data_path, split=split, **options)
        for name, split in SPLITS.items()
    }
    report_images(splits["train"], splits["val"])
    if args.pixels.is_rgb8 and (highest := highest_deep_value(splits["train"])) is not None:
        check_depth(highest, is_chosen=False)
    if any(
        getattr(images.reader, "has_label_files", False) for images in splits.values() if images
    ):
        raise InputError(
            "labels in .cls files would be lost, because only folders are kept: read the archive "
            "as it is, or sort its images into one folder per class"
        )
    ambiguity = splits["train"].listed.ambiguity
    if ambiguity and args.format == "raw":
        raise InputError(f"the classes of the images are not clear: {ambiguity}")
    write = partial(
        prepare,
        {name: images for name, images in splits.items() if images is not None},
        short_side=args.short_side,
        quality=None if args.format == "raw" else args.quality,
        pixels=args.pixels,
        num_workers=args.num_workers,
        max_broken=args.max_broken,
    )
    write_new(Path(args.output_dir), write, flag="--output_dir")
    flags = f"--data_path {args.output_dir}"
    if args.channels:
        flags += f" --channels {args.channels}"
    if args.value_range:
        flags += " --value_range {:g} {:g}".format(*args.value_range)
    _logger.info("wrote %s: train on it with %s", args.output_dir, flags)


if __name__ == "__main__":
    run_main(main)
