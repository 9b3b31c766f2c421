"""Says which images a run reads, where they are and what was passed over, and checks that all
processes read the same."""

import logging
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from util.compute.distributed import all_gather_objects, broadcast_object, rank, world_size
from util.data.arrays import has_further_pages
from util.data.images import names_hash
from util.data.layout import ImageList
from util.data.sampler import evenly_spaced
from util.data.tiff import num_pages
from util.errors import InputError, counted, first_few

MAX_FOLDERS = 10
MAX_PASSED_OVER = 5  # names and suffixes, the commonest
MAX_TIFFS = 1000  # looked at for further pages
EXTREMES = ("smallest", "largest")  # classes
COMMON = 1.5  # times the even share, from which the share of the largest class is told

_logger = logging.getLogger(__name__)


class Images(Protocol):
    """A set of images.

    Attributes:
        num_samples: their number.
        place: where they are from.
        classes: names in the order of labels, if they are known.
        listed: what was found in their folders; None if they are not from folders.
        notes: sentences for the log about a table.
    """

    num_samples: int
    place: str
    classes: Sequence[str] | None
    listed: ImageList | None
    notes: Sequence[str]

    def file_names(self) -> list[str]:
        """Return the names of the images' files, or of their shards."""

    def class_sizes(self) -> Counter[int] | None:
        """Count the images of each label; None if that is not known before they are read."""


def report_images(
    train_set: Images | None,
    val_set: Images | None,
    classes: Sequence[str] | None = None,
) -> dict[str, dict[str, object] | None]:
    """Log what was found, after checking that all processes found the same; also return it.

    Args:
        classes: of both sets; None if they know their own.

    Raises:
        InputError: a process found other images.
    """
    report = {}
    for role, images in (("training", train_set), ("validation", val_set)):
        if world_size() > 1:  # names of some sources take long to read
            found = Found(0, [], []) if images is None else Found.of(images, classes)
            check_processes(found, role)
        if images is None:
            report[role] = None
            continue
        report[role] = describe(images, classes)
        for line in lines_of(role, report[role]):
            _logger.info("%s", line)
    if val_set is None and train_set is not None:
        _logger.info("no validation images")
    return report


def describe(images: Images, classes: Sequence[str] | None = None) -> dict[str, object]:
    """Describe a set of images in plain values, for `args.json`.

    Args:
        classes: see `report_images`.
    """
    described: dict[str, object] = {"from": images.place, "images": images.num_samples}
    listed = images.listed
    if listed is not None:
        folders = list(listed.num_images.items())
        described["folders"] = {name or ".": count for name, count in folders[:MAX_FOLDERS]}
        described["further_folders"] = max(0, len(folders) - MAX_FOLDERS)
        suffixes = Counter({suffix or "no suffix": n for suffix, n in listed.others.items()})
        described["hidden"] = _commonest(listed.hidden)
        described["other_suffixes"] = _commonest(suffixes)
        described["links_that_lead_back"] = listed.loops
        described["not_read"] = listed.left
    notes = [] if listed is None else listed.notes + _notes(images, listed)
    described["notes"] = [*notes, *images.notes]
    if names := classes or images.classes:
        sizes = images.class_sizes()
        described["classes"] = _describe_classes(names, sizes, images.num_samples)
    return described


def _notes(images: Images, listed: ImageList) -> list[str]:
    """Tell how many images and pages are not read; of TIFF files, only some are looked at."""
    notes = []
    number = len(listed.paths) - images.num_samples
    if number > 0:
        verb = "is" if number == 1 else "are"
        notes.append(f"{counted(number, 'more image')} there, which {verb} not read")
    tiffs = [i for i, path in enumerate(listed.paths) if path.lower().endswith((".tif", ".tiff"))]
    looked_at = [tiffs[i] for i in evenly_spaced(len(tiffs), MAX_TIFFS)]
    with_more = 0
    for index in looked_at:
        path = Path(listed.root, listed.paths[index])
        file = path if path.is_file() else images.stored(index)[0]
        with_more += num_pages(file) > 1 and has_further_pages(file, listed.pixels)
    if with_more:
        text = counted(with_more, "TIFF file has", "TIFF files have")
        text += " further pages, which are not read (--channels N reads N as channels)"
        if len(looked_at) < len(tiffs):
            text += f" (of {len(looked_at)} of {len(tiffs)} looked at)"
        notes.append(text)
    return notes


def _commonest(counts: Counter[str]) -> dict[str, int]:
    found = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_PASSED_OVER])
    rest = counts.total() - sum(found.values())
    return {**found, "others": rest} if rest else found


def _describe_classes(
    names: Sequence[str], sizes: Counter[int] | None, num_images: int
) -> dict[str, object]:
    names = [name or "(no class)" for name in names]  # of images outside class folders
    described = {"number": len(names), "first": names[0], "last": names[-1]}
    if sizes is not None:
        counts = [sizes[label] for label in range(len(names))]
        for what, count in zip(EXTREMES, (min(counts), max(counts)), strict=True):
            described[what] = {"name": names[counts.index(count)], "images": count}
        if max(counts) > COMMON * sizes.total() / len(names):
            described["share_of_largest"] = max(counts) / num_images
    return described


def lines_of(role: str, described: Mapping[str, object]) -> list[str]:
    """Return the lines of the log about a set of images.

    Args:
        described: see `describe`.
    """
    number = counted(described["images"], "image").replace(" ", f" {role} ", 1)
    line = f"{number} from {described['from']}"
    folders = described.get("folders", {})
    if folders and list(folders) != ["."]:
        further = described["further_folders"]
        line += f": {_counts(folders)}" + (f", and {further} more folders" if further else "")
    lines = [line]
    if classes := described.get("classes"):
        line = f"  classes: {classes['number']}, from {classes['first']} to {classes['last']}"
        if "smallest" in classes:
            ends = [(classes[what]["name"], classes[what]["images"]) for what in EXTREMES]
            line += (
                f", {counted(ends[0][1], 'image')} each"
                if ends[0][1] == ends[1][1]
                else f"; smallest {ends[0][0]} ({ends[0][1]}), largest {ends[1][0]} ({ends[1][1]})"
            )
        lines.append(line)
        if share := classes.get("share_of_largest"):
            percent = f"{100 * share:.0f}%" if share > 0.1 else f"{100 * share:.2g}%"
            name = classes["largest"]["name"]
            lines.append(f"  the commonest class, {name}, has {percent} of the images")
    passed_over = [
        f"{what}: {_counts(described[key])}"
        for what, key in (("hidden", "hidden"), ("other files", "other_suffixes"))
        if described.get(key)
    ]
    if loops := described.get("links_that_lead_back"):
        passed_over.append(f"links that lead back: {', '.join(loops[:MAX_PASSED_OVER])}")
    if passed_over:
        lines.append(f"  passed over {'; '.join(passed_over)}")
    if left := described.get("not_read"):
        lines.append(f"  not read: {', '.join(left[:MAX_FOLDERS])}")
    return lines + [f"  {note}" for note in described.get("notes", [])]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


class Found(NamedTuple):
    """What one process has found."""

    number: int
    names: list[str]
    classes: list[str]

    @classmethod
    def of(cls, images: Images, classes: Sequence[str] | None = None) -> "Found":
        """Return what was found of a set of images; `classes` if it does not know its own."""
        return cls(images.num_samples, images.file_names(), list(classes or images.classes or []))

    def difference_from(self, expected: "Found") -> str | None:
        """Return a difference from what another process has found, for a message."""
        if self[:2] == expected[:2]:
            ours, theirs = first_few(self.classes), first_few(expected.classes)
            return None if self == expected else f"its classes are {ours}, not {theirs}"
        text = "their names differ"
        if self.number != expected.number:
            text = f"{self.number} instead of {expected.number}"
        for word, some, others in (
            ("without", expected.names, self.names),
            ("with", self.names, expected.names),
        ):
            if alone := set(some) - set(others):
                text += f", {word} {min(alone)}"
        return text


def check_processes(found: Found, role: str) -> None:
    """Refuse to go on if a process found other images than the main process.

    Raises:
        InputError: with the first such process, and a difference.
    """
    hashes = [found.number, names_hash(found.names), names_hash(found.classes)]
    if len(set(map(tuple, all_gather_objects([hashes])))) == 1:
        return
    difference = found.difference_from(broadcast_object(found))
    place = f"process {rank()} on {socket.gethostname()}"
    place, text = all_gather_objects([(place, difference)] if difference else [])[0]
    raise InputError(
        f"{place} finds other {role} images than process 0: {text}; give all processes the same "
        "files"
    )
