"""Settings and flags of what training images go through: crops, flips, augmentation, mixing."""

import argparse
import re
from dataclasses import dataclass

from util.arguments import finite_float, fraction, natural_float, positive_int
from util.errors import InputError
from util.settings.data import add_flip_args

# timm silently ignores sections that it does not know.
AUTO_AUGMENT = (
    r"rand(-(m|n|mmax|inc)\d+|-(p|mstd)\d+(\.\d+)?|-t(3a|3aw|weights))*"
    r"|augmix(-(m|w|d|b)\d+|-(a|mstd)\d+(\.\d+)?)*"
    r"|(v0r?|originalr?|3a)(-mstd\d+(\.\d+)?)?"
)


@dataclass(frozen=True)
class ViewSettings:
    """How training images are cropped and flipped; see the flags.

    Raises:
        InputError: the range of areas is empty, or not in (0, 1].
    """

    hflip: float = 0.5
    """Fraction that is flipped left to right."""
    vflip: float = 0.0
    """Fraction that is flipped top to bottom."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Range of a crop's area, as fractions of the image's."""

    def __post_init__(self) -> None:
        smallest, largest = self.crop_area
        if not 0 < smallest <= largest <= 1:
            raise InputError(
                "--crop_area takes the smallest and the largest fraction of an image's area, above "
                f"0 and up to 1, such as 0.2 1, not {smallest:g} {largest:g}"
            )

    def recipe(self) -> dict[str, object]:
        """What has to stay the same within a run."""
        flips = {"--hflip": self.hflip, "--vflip": self.vflip}
        return {**flips, "--crop_area": list(self.crop_area)}


PRETRAIN_VIEW = ViewSettings(crop_area=(0.2, 1.0))  # MAE's


LABELED_VIEW = ViewSettings()  # of fine-tuning and linear probes, MAE's and torchvision's


@dataclass(frozen=True)
class AugmentSettings:
    """timm's augmentation in fine-tuning (Table 11); see the flags.

    Raises:
        InputError: auto_augment is not in timm's syntax.
    """

    auto_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment, AugMix or AutoAugment in timm's syntax, or "none"."""
    color_jitter: float | None = None
    """Used only if auto_augment is "none" or of the 3a kind."""
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1

    @property
    def changes_colors(self) -> bool:
        """Whether images have to be 8-bit RGB."""
        return self.auto_augment != "none" or bool(self.color_jitter)

    def __post_init__(self) -> None:
        if self.auto_augment != "none" and not re.fullmatch(AUTO_AUGMENT, self.auto_augment):
            raise InputError(
                f"unknown --auto_augment '{self.auto_augment}': write it like "
                "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original-mstd0.5"
            )


def add_view_args(parser: argparse.ArgumentParser, *, crop_area: tuple[float, float]) -> None:
    """Add the flags of ViewSettings; `crop_area` is the default."""
    group = parser.add_argument_group("random views")
    group.add_argument(
        "--crop_area",
        "--scale",
        type=finite_float,
        nargs=2,
        default=list(crop_area),
        metavar=("LO", "HI"),
        help="smallest and largest area of a random crop, as fractions of the image's "
        f"({crop_area[0]:g} {crop_area[1]:g})",
    )
    add_flip_args(group)


def add_augmentation_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of AugmentSettings."""
    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--auto_augment",
        "--aa",
        default=AugmentSettings.auto_augment,
        help="augmentation in timm's syntax, or none (%(default)s)",
    )
    group.add_argument(
        "--color_jitter", type=natural_float, help="strength, if --auto_augment is none or 3a (off)"
    )
    group.add_argument(
        "--reprob",
        type=fraction,
        default=AugmentSettings.reprob,
        help="fraction of images with erased regions (%(default)s)",
    )
    group.add_argument(
        "--remode",
        choices=("const", "rand", "pixel"),
        default=AugmentSettings.remode,
        help="how to fill erased regions (%(default)s)",
    )
    group.add_argument(
        "--recount",
        type=positive_int,
        default=AugmentSettings.recount,
        help="maximum number of erased regions (%(default)s)",
    )


@dataclass(frozen=True)
class MixSettings:
    """Mixup, CutMix and label smoothing (Table 11); see the flags.

    Raises:
        InputError: smoothing is 1.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.smoothing == 1:
            raise InputError("--smoothing 1 would erase the labels: lower it")


def add_mix_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of MixSettings."""
    group = parser.add_argument_group("mixing")
    group.add_argument(
        "--mixup",
        type=natural_float,
        default=MixSettings.mixup,
        help="alpha of mixup, 0 to disable it (%(default)s)",
    )
    group.add_argument(
        "--cutmix",
        type=natural_float,
        default=MixSettings.cutmix,
        help="alpha of CutMix, 0 to disable it (%(default)s)",
    )
    group.add_argument(
        "--mixup_prob",
        type=fraction,
        default=MixSettings.mixup_prob,
        help="fraction of batches to mix (%(default)s)",
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=fraction,
        default=MixSettings.mixup_switch_prob,
        help="fraction of mixed batches that use CutMix (%(default)s)",
    )
    group.add_argument(
        "--mixup_mode",
        choices=("batch", "pair", "elem"),
        default=MixSettings.mixup_mode,
        help="images that share one mixing ratio: all of a batch, a pair, or none (elem) "
        "(%(default)s)",
    )
    group.add_argument(
        "--smoothing",
        type=fraction,
        default=MixSettings.smoothing,
        help="label smoothing (%(default)s)",
    )
