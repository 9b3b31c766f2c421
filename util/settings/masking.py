"""Settings and flags of masks (Sec. 3.3)."""

import argparse
from dataclasses import dataclass

from util.arguments import ratio
from util.errors import InputError

MASK_SAMPLINGS = ("random", "grid")


@dataclass(frozen=True)
class MaskSettings:
    """Settings for how many patches are masked and predicted, and how they are sampled.

    Raises:
        InputError: pred_ratio is above mask_ratio.
    """

    mask_ratio: float
    pred_ratio: float | None = None
    """None: the mask ratio."""
    mask_sampling: str = "random"

    def __post_init__(self) -> None:
        if self.pred_ratio is not None and self.pred_ratio > self.mask_ratio:
            raise InputError(
                f"--pred_ratio {self.pred_ratio} is above --mask_ratio {self.mask_ratio}, but only "
                "masked patches can be predicted: lower --pred_ratio or raise --mask_ratio"
            )

    @property
    def predicted(self) -> float:
        """γ, the fraction of all patches that is predicted."""
        return self.pred_ratio or self.mask_ratio


def add_masking_args(parser: argparse.ArgumentParser, *, mask_ratio: float) -> None:
    """Add the flags of MaskSettings."""
    group = parser.add_argument_group("masking")
    group.add_argument(
        "--mask_ratio",
        type=ratio,
        default=mask_ratio,
        help="fraction of patches that is masked (%(default)s)",
    )
    group.add_argument(
        "--pred_ratio",
        "--kept_mask_ratio",
        type=ratio,
        help="fraction of all patches that is predicted; the paper's efficiency claims use 0.25 "
        "(the mask ratio)",
    )
    group.add_argument(
        "--mask_sampling",
        choices=MASK_SAMPLINGS,
        default=MaskSettings.mask_sampling,
        help="how masks are drawn; grid is from Table 15 (%(default)s)",
    )
