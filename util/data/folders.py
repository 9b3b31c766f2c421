"""Lists folders of images, and decides what a folder is from its name and its neighbors.

A folder is a split (`train2017`), holds masks or lists (`annotations` beside `images`), is hidden
or a system's (`__MACOSX`), or belongs to the images, of which the folders may be classes.
"""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from util.errors import InputError

# The formats of images, by Pillow's names, and the suffixes of their files. Pillow knows others,
# some of which start programs (EPS) or are decoded by code that hardly anybody uses.
IMAGE_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG2000": (".jp2",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
}
# By default timm finds only .png, .jpg and .jpeg, and silently skips the others.
IMAGE_SUFFIXES = tuple(itertools.chain.from_iterable(IMAGE_FORMATS.values()))
ARRAY_SUFFIXES = (".npy", ".npz")  # of images if their format is stated
SYSTEM_NAMES = {
    *("__macosx", "@eadir", "lost+found", "$recycle.bin", "thumbs.db", "desktop.ini"),
    *("system volume information", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
}

Role = Literal["train", "validation", "test"]
ROLES: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trainset", "trainval"), "train"),
    **dict.fromkeys(("val", "validation", "valid", "validate", "valset", "dev"), "validation"),
    **dict.fromkeys(("eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing", "testset", "tests"), "test"),
}
ORDER: tuple[Role, ...] = ("train", "validation", "test")
# Words that leave the meaning of a folder's name as it is.
FILLERS = {
    *("image", "images", "img", "imgs", "jpg", "jpeg", "png", "photo", "photos", "picture"),
    *("pictures", "data", "dataset", "set", "sets", "split", "part", "x", "v"),
}
IMAGE_WORDS = FILLERS - {"set", "sets", "split", "part", "x", "v"} | {"rgb", "frames", "jpegimages"}
SURE_IMAGE_WORDS = {"image", "images", "img", "imgs", "rgb"}  # also among other words
# Folders of these, beside the images, are not images to learn from.
ANNOTATION_WORDS = {
    *("annotation", "annotations", "annot", "annots", "mask", "masks", "label", "labels"),
    *("segmentation", "segmentations", "segmim", "trimap", "trimaps", "gt", "groundtruth"),
    *("imagesets", "lists", "attributes", "parts", "thumbnail", "thumbnails", "thumbs"),
    *("trainannot", "valannot", "testannot", "labelids", "instances"),
    *("ann", "anns", "bbox", "bboxes", "semantic", "instance"),
}
# Of these, names of folders that are no classes, whatever is beside them.
NO_CLASSES = {"annotations", "segmentations", "trimaps", "groundtruth", "imagesets", "thumbnails"}
ANNOTATION_FILLERS = {"ground", "truth", "class", "object", "fine", "coarse", "color"}


def natural_key(text: str) -> list[str | int]:
    """Return a key that sorts numbers within names by their value, whatever the case.

    Different names may have equal keys ("a1", "A01"): the name itself has to decide between them.
    """
    pieces: list[str | int] = re.split(r"(\d+)", text.lower())
    pieces[1::2] = map(int, pieces[1::2])
    return pieces


def sorted_naturally(names: Iterable[str]) -> list[str]:
    """Sort names by `natural_key`, equal ones by themselves: one order on every machine."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or belongs to an operating system."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_image(name: str, *, arrays: bool = False) -> bool:
    """Whether a file's suffix is an image's, or an array's of NumPy if these are images."""
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122, pathlib is slow
    return suffix in IMAGE_SUFFIXES or (arrays and suffix in ARRAY_SUFFIXES)


@dataclass
class Listing:
    """What a folder holds, by name."""

    folders: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    """Files with other suffixes."""
    hidden: list[str] = field(default_factory=list)
    loops: list[str] = field(default_factory=list)
    """Links that lead back, see `DiskTree`."""

    def add_file(self, name: str, *, arrays: bool) -> None:
        """Add a file that is not hidden; `arrays`: whether those of NumPy are images."""
        (self.images if is_image(name, arrays=arrays) else self.others).append(name)


class Tree(Protocol):
    """Folders on a disk or in an archive.

    Attributes:
        root: path of the whole.
    """

    root: str

    def listing(self, path: str) -> Listing:
        """List the folder at this path below the root, "" for the root itself."""


class DiskTree:
    """The folders below a path; links are followed, except those that lead back.

    Back is to a folder above the link, or, from a linked folder, to one that was read already: so
    the walk ends.

    Args:
        arrays: whether arrays of NumPy are images.

    Raises:
        InputError: a folder cannot be listed.
    """

    def __init__(self, root: str, *, arrays: bool = False) -> None:
        self.root = root
        self._arrays = arrays
        self._listings: dict[str, Listing] = {}
        self._linked: set[str] = set()  # real paths of the folders that links lead to

    def listing(self, path: str) -> Listing:
        """List a folder, once."""
        if path not in self._listings:
            self._listings[path] = self._list(path)
        return self._listings[path]

    def _list(self, path: str) -> Listing:
        found, links, folder = Listing(), [], full_path(self, path)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        found.hidden.append(entry.name)
                    elif _is_folder(entry):
                        (links if entry.is_symlink() else found.folders).append(entry.name)
                    elif entry.is_symlink() or entry.is_file():  # one to nothing is a broken image
                        found.add_file(entry.name, arrays=self._arrays)
                    else:
                        found.others.append(entry.name)  # reading from a pipe would wait forever
        except OSError as error:
            raise InputError(
                f"{folder} cannot be listed ({error.strerror}): correct its permissions, or move "
                "it out of the images"
            ) from error
        for name in sorted(links):
            (found.loops if self._leads_back(path, name) else found.folders).append(name)
        found.folders.sort()
        return found

    def _leads_back(self, path: str, link: str) -> bool:
        target = os.path.realpath(os.path.join(self.root, path, link))  # noqa: PTH118
        parts = path.split("/") if path else []
        logical = [os.path.join(self.root, *parts[:n]) for n in range(len(parts) + 1)]  # noqa: PTH118
        above = [os.path.realpath(folder) for folder in logical]
        is_linked = above[-1] != os.path.join(above[0], *parts)  # noqa: PTH118
        back = any(Path(folder).is_relative_to(target) for folder in above)
        back = back or (is_linked and target in self._linked)
        self._linked.add(target)
        return back


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def joined(path: str, name: str) -> str:
    """Join a path below a tree's root and a name."""
    return f"{path}/{name}" if path else name


def full_path(tree: Tree, path: str) -> str:
    """Join a tree's root and a path below it."""
    return f"{tree.root.rstrip('/')}/{path}".rstrip("/") or "/"


def words_of(name: str) -> list[str]:
    """Split a name into lower-case words and numbers: "cars_train2017" -> cars, train, 2017."""
    pieces = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^\W\d_a-zA-Z]+", name)
    return [piece.lower() for piece in pieces]


def _parts_of(word: str) -> list[str]:
    """Split "traindata" into train and data."""
    starts = (role for role in ROLES if word.startswith(role) and word[len(role) :] in FILLERS)
    start = next(starts, None)
    return [word] if start is None else [start, word[len(start) :]]


@cache
def split_of(name: str) -> tuple[Role, tuple[str, ...]] | None:
    """Return the split that a name may mean, and its other words; None if it means none.

    "train.X1" and "Training_images" are (train, ()), "cars_test" is (test, (cars,)).
    """
    words = [part for word in words_of(name) for part in _parts_of(word)]
    roles = {ROLES[word] for word in words if word in ROLES}
    if not roles or is_annotation(name):
        return None
    rest = _rest_of(words)
    return ("train" if "train" in roles else min(roles)), rest


@cache
def is_annotation(name: str) -> bool:
    """Whether a folder of this name, beside images, holds masks, lists or thumbnails."""
    words = [word for word in words_of(name) if not word.isdigit()]
    known = ANNOTATION_WORDS | ANNOTATION_FILLERS | FILLERS | ROLES.keys()
    is_about = any(w in ANNOTATION_WORDS for w in words) or words == ["ground", "truth"]
    return is_about and all(word in known for word in words)


def annotations_beside(listing: Listing) -> list[str]:
    """Return the folders that hold masks, lists or thumbnails of the images beside them.

    Without images beside them, they are images themselves: a class may be called "mask".
    """
    about = sorted_naturally(name for name in listing.folders if is_annotation(name))
    others = [name for name in listing.folders if name not in about]
    has_images = listing.images or any(
        split_of(name)
        or IMAGE_WORDS.issuperset(w for w in words_of(name) if not w.isdigit())
        or not SURE_IMAGE_WORDS.isdisjoint(words_of(name))
        for name in others
    )
    never_classes = [name for name in about if others and NO_CLASSES.issuperset(words_of(name))]
    return about if has_images else never_classes


def are_unclear_splits(names: Collection[str]) -> bool:
    """Whether names mean splits that cannot be told apart.

    These are of several datasets (`trainA`, `trainB`, `testA`, `testB`), or one lacks the word
    (`rps` beside `rps-test-set`).
    """
    meanings = {name: split_of(name) for name in names}
    found: dict[tuple[str, ...], set[Role]] = defaultdict(set)
    for role, rest in filter(None, meanings.values()):
        found[rest].add(role)
    roles = set().union(*found.values())
    others = [_rest_of(words_of(name)) for name, known in meanings.items() if known is None]
    named_alike = any(rest and rest in found for rest in others)
    return (
        (all(meanings.values()) and bool(roles - {"train"}))
        or sum(len(own) > 1 for own in found.values()) > 1
        or named_alike
    )


def _rest_of(words: Iterable[str]) -> tuple[str, ...]:
    return tuple(w for w in words if w not in ROLES and w not in FILLERS and not w.isdigit())


class SplitNames(NamedTuple):
    """Folders whose names mean splits of one dataset, and the others beside them."""

    names: dict[Role, list[str]]
    others: list[str]


def splits_among(names: Collection[str]) -> SplitNames | None:
    """Find names that mean splits: `train` on its own, `cars_train` only beside `cars_test`.

    None without any, or if they belong to several datasets.
    """
    found: dict[tuple[str, ...], dict[Role, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        if meaning := split_of(name):
            role, rest = meaning
            found[rest][role].append(name)
    groups = [roles for rest, roles in found.items() if len(roles) > 1 or not rest]
    complete = [roles for roles in groups if len(roles) > 1] or groups
    if len(complete) != 1:
        return None
    splits = {role: complete[0][role] for role in ORDER if role in complete[0]}
    chosen = {name for folders in splits.values() for name in folders}
    return SplitNames(splits, [name for name in names if name not in chosen])
