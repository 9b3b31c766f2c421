"""Finds the images of a path: in which of its folders they are, and which class each has."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from torch.utils.data import Dataset

from util.data.folders import (
    IMAGE_WORDS,
    DiskTree,
    Listing,
    Role,
    Tree,
    annotations_beside,
    are_unclear_splits,
    full_path,
    is_annotation,
    joined,
    natural_key,
    sorted_naturally,
    split_of,
    splits_among,
    words_of,
)
from util.errors import InputError, counted, first_few
from util.normalization import RGB8, PixelFormat
from util.settings.data import ClassFolder

TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".mat", ".xml", ".xlsx")
MAX_DEPTH = 5  # folders to descend to the images or their splits
MAX_PEEKED = 20  # folders beside each other that are searched for splits; more are classes


class Layout(NamedTuple):
    """Where the images of a path are, below the root of its tree."""

    base: str
    """The folder of the images or of their splits."""
    splits: dict[Role, list[str]]
    """Paths of folders or .tar files; empty if all images are one set."""
    left: list[str]
    """Paths beside them that are not read."""
    tables: list[str]
    """Files beside them that may hold labels."""
    note: str | None = None


def find_layout(
    tree: Tree, class_folder: ClassFolder = "auto", *, start: str = "", tars: bool = False
) -> Layout:
    """Decide which folders of a tree are splits, and where the images are.

    Args:
        start: path below the root to start from.
        class_folder: other than "auto", it says that names which may be splits or classes are
            classes.
        tars: whether `train.tar` and the like count as splits.

    Raises:
        InputError: two readings are possible; the message has the command for each.
    """
    path, left, tables = start, [], []
    for _ in range(MAX_DEPTH):
        listing = tree.listing(path)
        tables += [joined(path, n) for n in listing.others if n.lower().endswith(TABLES)]
        annotations = annotations_beside(listing)
        left += [joined(path, name) for name in annotations]
        children = [name for name in listing.folders if name not in annotations]
        splits, others = _splits_of(listing, children, tars=tars)
        if splits:
            filled = [name for name in others if _shape(tree, joined(path, name)) != "empty"]
            if _are_splits(tree, path, splits, filled, class_folder):
                left += [joined(path, name) for name in filled]
                if listing.images:
                    left.append(f"{counted(len(listing.images), 'image')} beside them")
                paths = {role: [joined(path, n) for n in names] for role, names in splits.items()}
                return Layout(path, paths, left, tables)
            names = ", ".join(name for found in splits.values() for name in found)
            note = (
                f"{names} is read as a class, because it stands among others: if it is a split, "
                "give its path"
            )
            return Layout(path, {}, left, tables, note)
        if class_folder == "auto" and are_unclear_splits(children):
            raise _unclear_splits(tree, path, children)
        below = _folder_to_descend(tree, path, children, listing, class_folder)
        if below is None:
            break
        path = below
    return Layout(path, {}, left, tables)


def _splits_of(
    listing: Listing, children: Sequence[str], *, tars: bool
) -> tuple[dict[Role, list[str]], list[str]]:
    """Return the splits of a folder, folders before .tar files, and its other folders."""
    archives = [n for n in listing.others if tars and n.lower().endswith(".tar")]
    stems = {name[:-4]: name for name in archives if name[:-4] not in children}
    found = splits_among([*children, *stems])
    if found is None:
        return {}, list(children)
    splits: dict[Role, list[str]] = {}
    for role, names in found.names.items():
        folders = [name for name in names if name not in stems]
        if folders or len(names) == 1:  # several archives are shards
            splits[role] = sorted_naturally(folders or [stems[names[0]]])
    return splits, [name for name in found.others if name not in stems]


def _shape(tree: Tree, path: str) -> Literal["flat", "deep", "empty"]:
    """Whether a folder holds images directly, only in folders below it, or not at all."""
    if path.lower().endswith(".tar"):
        return "deep"
    listing = tree.listing(path)
    if listing.images:
        return "flat"
    below = (_shape(tree, joined(path, name)) for name in listing.folders)
    return "deep" if any(shape != "empty" for shape in below) else "empty"


def _are_splits(
    tree: Tree,
    path: str,
    splits: dict[Role, list[str]],
    others: Sequence[str],
    class_folder: ClassFolder,
) -> bool:
    """Whether folders named like splits are splits, and not classes like `others` beside them.

    Raises:
        InputError: they may be either.
    """
    if not others:
        return True
    names = [name for found in splits.values() for name in found]
    shapes = {_shape(tree, joined(path, name)) for name in (*names, *others)}
    like_classes = len(shapes) == 1
    if len(splits) > 1 and not (like_classes and len(others) > 1):
        return True
    meaning = split_of(Path(tree.root, path).absolute().name)
    within_split = meaning is not None and not meaning[1]
    is_among_many = len(splits) == 1 and like_classes and (len(others) > 1 or within_split)
    if is_among_many or class_folder != "auto":
        return False
    folder = full_path(tree, path)
    if len(others) == 1:
        splits = {"train": list(others), **splits}
    raise InputError(
        f"{folder} has {' and '.join(names)} beside {first_few(others)}: if "
        f"{'these are splits' if len(names) > 1 else 'that is a split'}, give "
        f"{_command(folder, splits)}; if they are all classes, give "
        f"--data_path {shlex.quote(folder)} --class_folder last"
    )


def _unclear_splits(tree: Tree, path: str, names: Sequence[str]) -> InputError:
    folder = full_path(tree, path)
    splits: dict[Role, list[str]] = {}
    for name in sorted_naturally(names):
        if meaning := split_of(name):
            splits.setdefault(meaning[0], []).append(name)
    return InputError(
        f"{folder} has folders named like splits ({first_few(sorted_naturally(names))}), but not "
        f"of one dataset: give those that are meant, such as {_command(folder, splits)}; if they "
        f"are all classes, give --data_path {shlex.quote(folder)} --class_folder last"
    )


def _command(folder: str, splits: dict[Role, list[str]]) -> str:
    """Flags that name splits of a folder."""

    def quoted(role: Role) -> str:
        return shlex.quote(f"{folder}/{splits[role][0]}")

    val = next((role for role in ("validation", "test") if role in splits), None)
    flags = [f"--data_path {quoted('train')}" if "train" in splits else "--data_path TRAIN"]
    flags += [f"--val_path {quoted(val)}"] if val else []
    return " ".join(flags)


def _folder_to_descend(
    tree: Tree, path: str, children: Sequence[str], listing: Listing, class_folder: ClassFolder
) -> str | None:
    """Return the only folder of `path` in which the images or their splits are, if there is one.

    Raises:
        InputError: there are splits in one of several folders that hold images.
    """
    if listing.images or len(children) > MAX_PEEKED:
        return None
    filled = [name for name in children if _shape(tree, joined(path, name)) != "empty"]
    if len(filled) == 1:
        below = joined(path, filled[0])
        is_class = tree.listing(below).images and not IMAGE_WORDS.issuperset(words_of(filled[0]))
        return None if is_class else below
    holders = [name for name in filled if _has_splits(tree.listing(joined(path, name)))]
    if len(holders) == 1 and class_folder == "auto":
        folder = full_path(tree, joined(path, holders[0]))
        others = [name for name in filled if name != holders[0]]
        raise InputError(
            f"{folder} has training and other splits, but {first_few(others)} beside it holds "
            f"images too: give the folder that is meant, such as --data_path {shlex.quote(folder)}"
        )
    return None


def _has_splits(listing: Listing) -> bool:
    found = splits_among(listing.folders)
    return are_unclear_splits(listing.folders) or (found is not None and len(found.names) > 1)


@dataclass
class ImageList:
    """The images below a folder of a tree, in natural order, and what was passed over."""

    root: str
    """The folder, with the tree's root."""
    paths: list[str]
    """Of the images, below `root`."""
    labels: list[int]
    """Indices into `classes`."""
    classes: tuple[str, ...]
    """In natural order; only "" if the images are in no folders of classes."""
    num_images: Counter[str] = field(default_factory=Counter)
    """By the folder's path below `root`."""
    others: Counter[str] = field(default_factory=Counter)
    """Files that are not images, by suffix."""
    hidden: Counter[str] = field(default_factory=Counter)
    """Hidden and system folders and files, by name."""
    loops: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    """Folders that are not read: other splits, masks, lists."""
    tables: list[str] = field(default_factory=list)
    """Files beside the images that may hold their labels."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the log."""
    ambiguity: str | None = None
    """Why the classes are not known for certain."""
    pixels: PixelFormat = RGB8
    """How the images are read."""

    def part(self, ids: Sequence[int], *, bare: bool) -> "ImageList":
        """Return some of the images.

        Args:
            bare: without what was found beside them.
        """
        paths = [self.paths[index] for index in ids]
        labels = [self.labels[index] for index in ids]
        counts = Counter(path.rpartition("/")[0] for path in paths)
        if bare:
            return ImageList(self.root, paths, labels, self.classes, counts, pixels=self.pixels)
        return replace(self, paths=paths, labels=labels, num_images=counts)

    @property
    def unlabeled(self) -> str | None:
        """Why the images have no labels; None if they have."""
        if self.classes != ("",):
            return None
        tables = (
            f" ({first_few(self.tables)} may hold labels, see --data_csv)" if self.tables else ""
        )
        return f"{self.root} has no class folders{tables}: sort the images into one per class"


class ListedImages(Dataset):
    """Images found in folders, on a disk or in an archive.

    Attributes:
        listed: what was found.
        labels: of the images, indices into `classes`.
        classes: names in the order of labels; only "" if the images are in no folders of classes.
        unlabeled: why there are no labels, or None.
    """

    def __init__(self, images: ImageList) -> None:
        self.listed = images
        self.labels = images.labels
        self.classes: tuple[str, ...] | None = images.classes
        self.unlabeled = images.unlabeled

    def __len__(self) -> int:
        return len(self.listed.paths)

    def filename(self, index: int, *, absolute: bool = False) -> str:
        """Return an image's path, below the folder of all images or not."""
        path = self.listed.paths[index]
        return f"{self.listed.root}/{path}" if absolute else path


def find_images(
    tree: Tree,
    base: str,
    class_folder: ClassFolder = "auto",
    *,
    order: Literal["natural", "torchvision"] = "natural",
) -> ImageList:
    """List the images below a folder, and name their classes.

    Args:
        base: path below the tree's root.
        class_folder: see `name_classes`.
        order: of classes and images: natural, or by name as torchvision's ImageFolder has it.

    Raises:
        InputError: folders below are named like splits, so that classes and sets would be mixed.
    """
    found = ImageList(full_path(tree, base), [], [], ())
    images_of: dict[str, list[str]] = {}
    with_splits = []
    for path, listing, annotations in walk(tree, base):
        folder = path[len(base) :].lstrip("/")
        if listing.images:
            images_of[folder] = listing.images
        found.others.update(os.path.splitext(n)[1].lower() for n in listing.others)  # noqa: PTH122
        found.hidden.update(listing.hidden)
        found.loops += [joined(folder, name) for name in listing.loops]
        found.left += [joined(path, name) for name in annotations]
        if _has_splits(listing):
            with_splits.append(folder)
    if with_splits and class_folder == "auto":
        raise _splits_within(tree, base, with_splits)
    images_of = {folder: images_of[folder] for folder in sorted_naturally(images_of)}
    found.num_images.update({folder: len(images) for folder, images in images_of.items()})
    named = name_classes(list(images_of), class_folder)
    roles = {meaning and meaning[0] for meaning in map(split_of, named.names.values())}
    if with_splits and "" not in with_splits and None not in roles and len(roles) > 1:
        raise _splits_within(tree, base, with_splits, offer_first=False)
    found.ambiguity = named.ambiguity
    found.notes += [named.note] if named.note else []
    names = set(named.names.values())
    found.classes = tuple(sorted(names) if order == "torchvision" else sorted_naturally(names))
    label_of = {name: label for label, name in enumerate(found.classes)}
    entries = [
        (joined(folder, name), label_of[named.names[folder]])
        for folder, images in images_of.items()
        for name in images
    ]
    if order == "torchvision":
        entries.sort(key=lambda entry: (entry[1], *os.path.split(entry[0])))
    else:
        entries.sort(key=lambda entry: (natural_key(entry[0]), entry[0]))
    found.paths, found.labels = map(list, zip(*entries, strict=True)) if entries else ([], [])
    return found


def images_below(folder: Path, *, arrays: bool = False) -> list[Path]:
    """List the images of a folder and those below it, sorted; see `DiskTree`."""
    found = walk(DiskTree(str(folder), arrays=arrays), "")
    return sorted(folder / path / name for path, listing, _ in found for name in listing.images)


def walk(tree: Tree, base: str) -> Iterator[tuple[str, Listing, list[str]]]:
    """Yield every folder that holds no annotations: path, listing, folders of annotations."""
    waiting = [base]
    while waiting:
        path = waiting.pop()
        listing = tree.listing(path)
        annotations = annotations_beside(listing)
        yield path, listing, annotations
        waiting += [joined(path, name) for name in listing.folders if name not in annotations]


def _splits_within(
    tree: Tree, base: str, folders: Sequence[str], *, offer_first: bool = True
) -> InputError:
    # Images first: gtFine has the splits of leftImg8bit.
    folders = sorted(sorted_naturally(folders), key=lambda name: is_annotation(name.split("/")[0]))
    path = joined(base, folders[0]) if folders[0] else base
    first = full_path(tree, path)
    splits = splits_among(tree.listing(path).folders)
    if splits is None:
        return _unclear_splits(tree, path, tree.listing(path).folders)
    names = " and ".join(name for found in splits.names.values() for name in found)
    number = len(folders) - 1
    also = f", as {'has' if number == 1 else 'have'} {counted(number, 'more folder')}"
    also = also if number else ""
    first_option = (
        "; or read all of them as one set, with the first folders below --data_path "
        f"{shlex.quote(full_path(tree, base))} as classes, by --class_folder first"
    )
    return InputError(
        f"{first} has {names}{also}, which are named like splits, not classes: give the folders of "
        f"one set, such as {_command(first, splits.names)}{first_option if offer_first else ''}"
    )


class NamedClasses(NamedTuple):
    """The class of each folder of images."""

    names: dict[str, str]
    note: str | None = None
    ambiguity: str | None = None


def name_classes(folders: Sequence[str], class_folder: ClassFolder) -> NamedClasses:
    """Name the class of each folder that holds images.

    Folders that contain all others are left out first.

    Args:
        folders: paths below the folder of all images, "" for itself, which is in no class.
        class_folder: the first folder of a path, or the last; "auto" takes the last, but the one
            above where all are named alike (`dog/images`, `cat/images`).
    """
    parts = {folder: folder.split("/") if folder else [] for folder in folders}
    if len(parts) > 1:
        levels = enumerate(zip(*parts.values(), strict=False))
        num_common = next((n for n, names in levels if len(set(names)) > 1), None)
        num_common = min(map(len, parts.values())) if num_common is None else num_common
        parts = {folder: path[num_common:] for folder, path in parts.items()}
    first, last = ({f: p[i] if p else "" for f, p in parts.items()} for i in (0, -1))
    if class_folder != "auto":
        return NamedClasses(first if class_folder == "first" else last)
    note = None
    while len(parts) > 1 and all(len(path) > 1 for path in parts.values()):
        ends = {path[-1] for path in parts.values()}
        if len(ends) > 1:
            break
        note = f"the class of an image is the folder above {ends.pop()}/"
        parts = {folder: path[:-1] for folder, path in parts.items()}
    names = {folder: path[-1] if path else "" for folder, path in parts.items()}
    kinds = {tuple(w for w in words_of(n) if not w.isdigit()) for n in set(names.values())}
    if len(set(names.values())) > 1 and len(kinds) == 1 and IMAGE_WORDS & set(*kinds):
        listed = first_few(sorted_naturally(set(names.values())))
        return NamedClasses(
            names,
            ambiguity=f"{listed} are named like parts of one set, not like classes: sort the "
            "images into one folder per class, or confirm these with --class_folder last",
        )
    if first == names:
        return NamedClasses(names, note)
    options = " or ".join(
        f"--class_folder {option} for {counted(len(set(chosen.values())), 'class', 'classes')} "
        f"({first_few(sorted_naturally(set(chosen.values())))})"
        for option, chosen in (("last", last), ("first", first))
    )
    above = {"/".join(path[:n]) for path in parts.values() for n in range(1, len(path))}
    holds_both = next((f for f, path in parts.items() if "/".join(path) in above), None)
    if holds_both is not None:
        return NamedClasses(
            names,
            ambiguity=f"the folder {holds_both} holds images beside folders with images, so their "
            f"classes are not clear: choose {options}",
        )
    counts = Counter(names.values())
    name, count = counts.most_common(1)[0]
    if count > 1:
        return NamedClasses(
            names,
            ambiguity=f"{count} folders are named {name}, in different folders, so it is not clear "
            f"which of them are classes: choose {options}",
        )
    note = f"class folders are in other folders: the last folder of a path is the class; {options}"
    return NamedClasses(names, note)
