"""Differences between two settings with 95% intervals, and what they say about a claim."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 10_000
SHOWN, OPEN, CONTRADICTED = "shown", "not resolved", "contradicted"


class Difference(NamedTuple):
    """The first setting's mean minus the second's, with the ends of a 95% interval."""

    mean: float
    low: float
    high: float


def bootstrap_images(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> Difference:
    """Difference of two accuracies in points, with a paired bootstrap over images.

    It says how far another set of images would have moved the mean of these very runs; how far
    other seeds would, the spread of the runs says.

    Args:
        first, second: whether each image is classified correctly, (runs, images) of each setting.
        seed: of the resamples.
    """
    differences = 100 * (first.mean(axis=0) - second.mean(axis=0))  # (images,)
    # There are few different values, so images are drawn by their numbers.
    values, counts = np.unique(differences, return_counts=True)
    num_images = len(differences)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(num_images, counts / num_images, size=RESAMPLES)  # (R, values)
    low, high = np.quantile(drawn @ values / num_images, [0.025, 0.975])
    return Difference(float(differences.mean()), float(low), float(high))


def pair_runs(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Mean difference of runs with the same seeds, with Student's t interval; needs two or more."""
    differences = np.subtract(first, second)
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    mean = float(differences.mean())
    return Difference(mean, mean - float(half), mean + float(half))


def judge(difference: Difference, relation: str, margin: float) -> str:
    """Say whether a claim is shown, contradicted, or neither.

    Args:
        difference: of values of which more is better, but for the relation "lower".
        relation, margin: see Claim.
    """
    _, low, high = difference
    if relation == "lower":
        return judge(Difference(0, -high, -low), "higher", margin)
    if relation == "equal":
        if -margin < low and high < margin:
            return SHOWN
        return CONTRADICTED if low > margin or high < -margin else OPEN
    least = 0 if relation == "higher" else -margin
    return SHOWN if low > least else CONTRADICTED if high < least else OPEN
