"""Labels as files and columns hold them: indices of classes, as numbers or digits, or words."""

import numbers
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from util.data.folders import sorted_naturally
from util.errors import first_few

INDEX = re.compile(r"\s*(\d+)(\.0*)?\s*")
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.IGNORECASE)
SEVERAL = re.compile(r"[\[(]?\s*\d+(\s*[,; ]\s*\d+)+\s*[\])]?")
MISSING = (None, "", "-1", -1)


class Labels(NamedTuple):
    """The labels of a set of images."""

    indices: list[int]
    """Of the classes; empty if there are none."""
    classes: tuple[str, ...] | None = None
    """Names, if labels are words."""
    fault: str | None = None
    """Why there are no labels."""


def index_of(label: object) -> int | None:
    """Return the index that a label is, such as 1, 1.0, True or "1.0"; None if it is none."""
    if isinstance(label, bytes):
        label = label.decode(errors="replace")
    if isinstance(label, str):
        digits = INDEX.fullmatch(label)
        return int(digits[1]) if digits else None
    if isinstance(label, numbers.Real) and label >= 0 and label == label // 1:
        return int(label)
    return None


def read_labels(values: Sequence[object]) -> Labels:
    """Return the labels that these values are.

    Words become classes in natural order. Numbers other than indices are no labels, and one value
    that is missing is a fault of all.
    """
    values = [value.strip() if isinstance(value, str) else value for value in values]
    counts = Counter(values)
    missing = [value for value in counts if value in MISSING or value != value]  # NaN, too
    num_missing = sum(counts[value] for value in missing)
    if num_missing:
        verb = "is" if num_missing == 1 else "are"
        return Labels([], fault=f"{num_missing} of {len(values)} {verb} missing (-1 or null)")
    several = [value for value in counts if isinstance(value, str) and SEVERAL.fullmatch(value)]
    if several:
        return Labels([], fault=f"some images have several ({first_few(several)})")
    label_of = {value: index_of(value) for value in counts}
    classes = None
    if None in label_of.values():
        if not all(isinstance(value, str) for value in counts) or all(map(_is_number, counts)):
            wrong = [str(value) for value, label in label_of.items() if label is None]
            return Labels([], fault=f"{first_few(wrong)} cannot be the index of a class")
        classes = tuple(sorted_naturally(counts))
        label_of = {name: label for label, name in enumerate(classes)}
    return Labels([label_of[value] for value in values], classes)


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None
