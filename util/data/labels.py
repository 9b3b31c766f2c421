"""Labels as files and columns hold them: indices of classes, as numbers or digits, or words.

What a model learns is one of TASKS: one class an image (an index), several or none of the classes
(a list of indices), or a number.
"""

import itertools
import math
import numbers
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from util.data.folders import sorted_naturally
from util.errors import first_few

INDEX = re.compile(r"\s*(\d+)(\.0*)?\s*")
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.IGNORECASE)
SEPARATOR = re.compile(r"[|;]")  # of several labels of an image
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
        fault = f"{num_missing} of {len(values)} {verb} missing (empty, -1 or null)"
        return Labels([], fault=fault)
    several = [value for value in counts if isinstance(value, str) and SEVERAL.fullmatch(value)]
    if several:
        return Labels([], fault=f"some images have several ({first_few(several)})")
    label_of = {value: index_of(value) for value in counts}
    classes = None
    if None in label_of.values():
        if not all(isinstance(value, str) for value in counts) or all(map(is_number, counts)):
            wrong = [str(value) for value, label in label_of.items() if label is None]
            return Labels([], fault=f"{first_few(wrong)} cannot be the index of a class")
        classes = tuple(sorted_naturally(counts))
        label_of = {name: label for label, name in enumerate(classes)}
    return Labels([label_of[value] for value in values], classes)


class LabelSets(NamedTuple):
    """The labels of images that may have several."""

    indices: list[list[int]]
    """Of the classes, ascending; empty if there are none."""
    classes: tuple[str, ...] | None = None
    """Names, if labels are words."""
    fault: str | None = None
    """Why there are no labels."""


def read_label_sets(values: Sequence[object]) -> LabelSets:
    """Return the labels of images that may have several, or none.

    A text separates them by | or ;, and an empty one is none. See `read_labels`.
    """
    sets = [split_labels(value) for value in values]
    missing = sum(items is None for items in sets)
    if missing:
        verb = "is" if missing == 1 else "are"
        return LabelSets([], fault=f"{missing} of {len(values)} {verb} missing (null)")
    labels = list(itertools.chain.from_iterable(sets))
    if not labels:
        return LabelSets([], fault="no image has any")
    joined = _joined_by_commas(labels)
    if joined:
        return LabelSets([], fault=f"commas separate the labels of some images ({joined[0]})")
    found = read_labels(labels)
    if found.fault:
        return LabelSets([], fault=found.fault)
    indices = iter(found.indices)
    own = [sorted(set(itertools.islice(indices, len(items)))) for items in sets]
    return LabelSets(own, found.classes)


def _joined_by_commas(labels: Sequence[object]) -> list[str]:
    """Return labels with commas whose parts are labels on their own, too."""
    texts = {label for label in labels if isinstance(label, str)}
    parts_of = {text: {part.strip() for part in text.split(",")} for text in texts if "," in text}
    parts = Counter(itertools.chain.from_iterable(parts_of.values()))
    shared = {part for part, count in parts.items() if count > 1} | texts
    return sorted(text for text, own in parts_of.items() if own & shared)


def split_labels(value: object) -> list[object] | None:
    """Return the labels of an image, which are separated or in a list; None if that is unknown."""
    if isinstance(value, str):
        items = [item.strip() for item in SEPARATOR.split(value)]
        return [item for item in items if item]
    if value is None or value != value:  # NaN
        return None
    return list(value) if isinstance(value, list | tuple) else [value]


def has_several(value: object) -> bool:
    """Whether a label looks like several."""
    if isinstance(value, str):
        return bool(SEPARATOR.search(value) or SEVERAL.fullmatch(value))
    return isinstance(value, list | tuple)


def is_number(value: object) -> bool:
    """Whether a label is a number, or a text that is one."""
    if isinstance(value, str):
        return NUMBER.fullmatch(value) is not None
    return isinstance(value, numbers.Real)


def number_of(value: object) -> float | None:
    """Return the finite number that a label is; None if it is none."""
    if not is_number(value) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(float(value)) else None
