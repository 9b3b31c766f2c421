"""Chooses the images that are held out for validation where a data set has none of its own."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from util.errors import InputError, counted
from util.seeding import fold_seed
from util.settings.data import LEAST_HELD_OUT, MOST_HELD_OUT, USUAL_FRACTION, DataSettings


@dataclass(frozen=True)
class HoldOut:
    """How many images are held out."""

    fraction: float | None
    """Of the names; None for the usual number, see `USUAL_FRACTION`."""

    @classmethod
    def of(cls, data: DataSettings, *, by_default: bool) -> "HoldOut | None":
        """Return what the flags ask for; None if no images are to be held out.

        Args:
            by_default: whether the usual number is held out without a flag.
        """
        if data.val_fraction is None:
            return cls(None) if by_default else None
        return cls(data.val_fraction) if data.val_fraction else None

    def choose(self, names: Sequence[str]) -> list[bool]:
        """Tell which images are held out.

        The hash of its name decides about an image, so that it stays on its side on every machine,
        with every order and seed, and when images are added.

        Args:
            names: of the images, or of the groups that stay together.
        """
        sizes = Counter(names)
        ranks = {name: fold_seed("val_fraction", name) for name in sizes}
        limit = 2**63 * (USUAL_FRACTION if self.fraction is None else self.fraction)
        chosen = {name for name, rank in ranks.items() if rank < limit}
        if self.fraction is None:
            chosen = _within_bounds(chosen, ranks, sizes)
        return [name in chosen for name in names]

    def check(self, chosen: Sequence[bool], number: str, place: object) -> None:
        """Raise InputError if a fraction that was asked for holds out none or all of the images.

        Args:
            number: of images or groups, with the word.
            place: where they are from.
        """
        if self.fraction is not None and len(set(chosen)) == 1:
            which = "all" if chosen[0] else "none"
            raise InputError(
                f"--val_fraction {self.fraction:g} holds out {which} of the {number} of {place}: "
                "give another fraction"
            )

    def describe(self, number: int, groups: str = "") -> str:
        """Describe what was held out, for the log.

        Args:
            number: of images.
            groups: how many of how many groups these are; "" if there are none.
        """
        text = f"{groups}, {counted(number, 'image')}" if groups else counted(number, "image")
        if self.fraction is not None:
            return f"held out by --val_fraction {self.fraction:g}: {text}"
        if not number:
            return "too few to hold some out for validation: --val_fraction F does it anyway"
        return f"held out for validation: {text} (--val_fraction 0 trains on all)"


def _within_bounds(chosen: set[str], ranks: dict[str, int], sizes: Counter[str]) -> set[str]:
    """Add or leave out names, in the order of their ranks, for a usual number of images.

    Args:
        sizes: images of each name.
    """
    tenth = sizes.total() // 10
    least, most = min(LEAST_HELD_OUT, tenth), min(MOST_HELD_OUT, tenth)
    kept, number = set(), 0
    for name in sorted(ranks, key=ranks.get):
        if number >= least and name not in chosen:
            break
        if number + sizes[name] <= most:
            kept.add(name)
            number += sizes[name]
    return kept
