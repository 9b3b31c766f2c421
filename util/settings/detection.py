"""Settings and flags of the images and annotations of detection."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from util.arguments import positive_float, positive_int
from util.errors import InputError
from util.settings.data import (
    PixelSettings,
    add_color_args,
    add_flip_args,
    add_pixel_args,
    add_reading_args,
)
from util.settings.evaluation import add_show_channels_arg, check_show_channels

MIN_SCORE = 0.5  # of what pictures show
SPLITS = {"train": ("train2017", "train"), "val": ("val2017", "val")}


@dataclass(frozen=True)
class DetectionSettings(PixelSettings):
    """Which images and annotations to read, and how; see the flags.

    Raises:
        InputError: the normalization or the scales are invalid.
    """

    data_path: str | None = None
    train_ann: str | None = None
    train_images: str | None = None
    val_ann: str | None = None
    val_images: str | None = None
    limit_images: int | None = None
    lsj_scale: tuple[float, float] = (0.1, 2.0)
    aug: bool = True
    hflip: float = 0.5
    vflip: float = 0.0
    show_channels: list[int] | None = None
    """In pictures, numbered from 1."""
    max_broken: float = 0.01
    num_workers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_show_channels(self.show_channels)
        if self.lsj_scale[0] > self.lsj_scale[1]:
            raise InputError(f"--lsj_scale takes the smaller factor first, not {self.lsj_scale}")
        for split in SPLITS:
            if getattr(self, f"{split}_images") and not getattr(self, f"{split}_ann"):
                raise InputError(f"--{split}_images needs --{split}_ann")

    def recipe(self) -> dict[str, object]:
        """What has to stay the same within a run, besides the images."""
        augmentation = {
            "--lsj_scale": list(self.lsj_scale),
            "--hflip": self.hflip,
            "--vflip": self.vflip,
        }
        return {
            "augmentation": self.aug,
            **{flag: value if self.aug else None for flag, value in augmentation.items()},
        }

    def find(self, split: str) -> tuple[Path, Path] | None:
        """Annotation file and folder of images of "train" or "val"; None if there is no such split.

        Raises:
            InputError: a path that is given does not exist, or no data is given.
        """
        annotations, images = (getattr(self, f"{split}_{kind}") for kind in ("ann", "images"))
        if annotations:
            found = Path(annotations), Path(images) if images else Path(annotations).parent
        elif self.data_path is None:
            if split == "train" or not self.train_ann:
                raise InputError(
                    "--data_path is missing: give a folder in COCO's layout, or --train_ann and "
                    "--train_images, --val_ann and --val_images"
                )
            return None
        else:
            root = Path(self.data_path)
            if not root.is_dir():
                raise InputError(f"{root} does not exist: give a folder in COCO's layout")
            pairs = [
                (root / "annotations" / f"instances_{name}.json", root / name)
                for name in SPLITS[split]
            ]
            found = next((pair for pair in pairs if pair[0].is_file()), None)
            if found is None:
                return None
        kinds = ((Path.is_file, "an existing file"), (Path.is_dir, "an existing folder"))
        for path, (is_right, what) in zip(found, kinds, strict=True):
            if not is_right(path):
                raise InputError(f"{path} is not {what}: correct the path")
        return found


def add_detection_data_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of DetectionSettings."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        help="folder with annotations/instances_train2017.json, instances_val2017.json, train2017 "
        "and val2017, with or without the 2017",
    )
    for split, what in (("train", "training"), ("val", "validation")):
        group.add_argument(
            f"--{split}_ann",
            metavar="FILE",
            help=f"annotations of {what} images in COCO's format (in DATA_PATH)",
        )
        group.add_argument(
            f"--{split}_images",
            metavar="FOLDER",
            help=f"{what} images (in DATA_PATH, else the folder of --{split}_ann)",
        )
    group.add_argument(
        "--limit_images",
        type=positive_int,
        metavar="N",
        help="use only the first N training images (all)",
    )
    group.add_argument(
        "--lsj_scale",
        type=positive_float,
        nargs=2,
        default=DetectionSettings.lsj_scale,
        metavar=("MIN", "MAX"),
        help="large-scale jitter: range of an image's longer side over INPUT_SIZE (0.1 2)",
    )
    add_flip_args(group)
    group.add_argument(
        "--no_aug",
        dest="aug",
        action="store_false",
        help="neither jitter nor flip training images, but fit them into INPUT_SIZE (jitter)",
    )
    inherited = "from --finetune's file, else "
    add_pixel_args(group, inherited=inherited)
    add_color_args(group, inherited=inherited)
    add_show_channels_arg(group)
    add_reading_args(group)
