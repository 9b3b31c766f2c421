"""Scale of the mean and std by which pixels are normalized."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from util.errors import InputError

IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1], as in timm
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)
# Of pixels in [0, 1], a mean is at most 1 and a std at most 0.5, or 1 without scaling. Of pixels
# from 0 to 255, values are below 2 only if all images are almost black.
MAX_UNIT = 2.0


def check_scale(
    mean: Sequence[float] | None, std: Sequence[float] | None, path: str | Path | None = None
) -> None:
    """Raise InputError for a mean or std of pixels from 0 to 255, instead of [0, 1].

    Args:
        path: file that has them; None if they are from flags.
    """
    dashes, owner = ("--", "") if path is None else ("", f"{path} has ")
    given = {f"{dashes}mean": mean, f"{dashes}std": std}
    large = {name: values for name, values in given.items() if values and max(values) > MAX_UNIT}
    if large:
        theirs = " and ".join(f"{name} {_listed(values)}" for name, values in large.items())
        ours = " ".join(f"{n} {_listed(x / 255 for x in values)}" for n, values in large.items())
        verb = "," if owner else " is" if len(large) == 1 else " are"
        raise InputError(
            f"{owner}{theirs}{verb} for pixels from 0 to 255, but here they lie in [0, 1]: "
            f"{'write there' if owner else 'use'} {ours}"
        )


def _listed(values: Iterable[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)
