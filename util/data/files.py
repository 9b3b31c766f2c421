"""Opens folders and .tar archives of images."""

import shlex
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from util.data.archives import TarImages, TarTree
from util.data.folders import DiskTree, Role, Tree, joined
from util.data.layout import Layout, ListedImages, find_images, find_layout, walk
from util.data.other_files import how_to_read_file, how_to_read_folder
from util.errors import InputError
from util.normalization import RGB8, PixelFormat
from util.settings.data import ClassFolder


class FolderImages(ListedImages):
    """Images of a folder."""

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return Path(self.filename(index, absolute=True)).open("rb"), self.labels[index]


def open_files(
    path: str,
    split: Literal["train", "validation"],
    *,
    search_split: bool = True,
    class_folder: ClassFolder = "auto",
    order: Literal["natural", "torchvision"] = "natural",
    pixels: PixelFormat = RGB8,
) -> FolderImages | TarImages | None:
    """Open the images of a split in a folder or a .tar file.

    Args:
        search_split: False if the path is that of the split, and has no others.
        class_folder, order: see `find_images`.
        pixels: how images are read; arrays of NumPy are not images of 8-bit RGB.

    Returns:
        None if there are no validation images among other splits.

    Raises:
        InputError: there are no images, or it is not clear which of them are meant.
    """
    path = path.rstrip("/") or "/"
    arrays = not pixels.is_rgb8
    tree = _open_tree(path, arrays=arrays)
    options = {"class_folder": class_folder, "order": order, "pixels": pixels}
    with _no_paths_within(tree):
        above = find_layout(tree, class_folder, tars=True)
        chosen = _choose(tree, above, split, search=search_split)
        if chosen is None:
            return None
        base, left = chosen
        if not base.lower().endswith(".tar"):
            return _open_images(tree, base, split, above.tables, left, **options)
    tree = _open_tree(f"{path}/{base}", arrays=arrays)
    with _no_paths_within(tree):
        return _open_images(tree, "", split, above.tables, left, **options)


@contextmanager
def _no_paths_within(tree: Tree) -> Iterator[None]:
    """Context in which an error that advises paths within an archive says to unpack it."""
    try:
        yield
    except InputError as error:
        if isinstance(tree, DiskTree) or f"{tree.root}/" not in str(error):
            raise
        text = f"{error} (these are paths within the archive: unpack it for that)"
        raise InputError(text) from error


def _open_images(
    tree: Tree,
    base: str,
    split: Literal["train", "validation"],
    tables: Sequence[str],
    left: Sequence[str],
    *,
    class_folder: ClassFolder,
    order: Literal["natural", "torchvision"],
    pixels: PixelFormat,
) -> FolderImages | TarImages:
    """Open the images of one split.

    Args:
        base: its path below the tree's root.
        tables, left: what was found beside it, see `ImageList`.
    """
    layout = find_layout(tree, class_folder, start=base)
    base, left_within = _choose(tree, layout, split, search=False)
    images = find_images(tree, base, class_folder, order=order)
    images.pixels = pixels
    images.left = list(dict.fromkeys([*left, *left_within, *images.left]))
    images.tables = list(dict.fromkeys([*tables, *layout.tables]))
    images.notes += [layout.note] if layout.note else []
    if not images.paths:
        advice = how_to_read_folder(tree.root, _others(tree, base))
        raise InputError(f"no images found in {images.root}: {advice}")
    return TarImages(tree, images) if isinstance(tree, TarTree) else FolderImages(images)


def _others(tree: Tree, base: str) -> list[str]:
    """Return the paths of files that are not images."""
    return [joined(path, name) for path, listing, _ in walk(tree, base) for name in listing.others]


def split_folder(path: str, split: Literal["train", "validation"]) -> str | None:
    """Return the folder of a split of prepared images: `path` itself if it has no splits.

    Raises:
        InputError: see `open_files`.
    """
    tree = DiskTree(path)
    chosen = _choose(tree, find_layout(tree), split, search=True)
    return chosen and f"{path}/{chosen[0]}".rstrip("/")


def _open_tree(path: str, *, arrays: bool) -> Tree:
    file = Path(path)
    if not file.is_file():
        return DiskTree(path, arrays=arrays)
    if file.suffix.lower() != ".tar":
        raise InputError(f"{path} is not a folder or .tar file: {how_to_read_file(file)}")
    try:
        return TarTree(path, arrays=arrays)
    except tarfile.ReadError as error:
        raise InputError(
            f"{path} is not a .tar archive: copy or pack it again, or give its folder ({error})"
        ) from error


def _choose(
    tree: Tree, layout: Layout, split: Role, *, search: bool
) -> tuple[str, list[str]] | None:
    """Return the path of a split, and what is not read beside it.

    Args:
        search: whether splits are expected; otherwise only a single one is taken.

    Raises:
        InputError: the split is missing, or there are several.
    """
    splits, root = layout.splits, tree.root
    if not splits:
        return None if search and split == "validation" else (layout.base, layout.left)
    flag = "--data_path" if split == "train" else "--val_path"
    if not search and len(splits) == 1:
        split = next(iter(splits))
    elif not search:
        example = splits.get(split, next(iter(splits.values())))[0]
        names = " and ".join(name for names in splits.values() for name in names)
        raise InputError(
            f"{root} has {names}, but one set of images is needed: give its path, such as "
            f"{flag} {shlex.quote(f'{root}/{example}')}"
        )
    paths = splits.get(split)
    if paths is None and split == "validation":
        return None
    if paths is None:
        others = [name for names in splits.values() for name in names]
        raise InputError(
            f"{root} has {' and '.join(others)} but no train folder: move the training images into "
            f"{shlex.quote(f'{root}/train')}, or give their folder by --data_path, and "
            f"{shlex.quote(f'{root}/{others[0]}')} by --val_path"
        )
    if len(paths) > 1:
        raise InputError(
            f"{root} has {' and '.join(paths)}, which may all hold the "
            f"{'training' if split == 'train' else 'validation'} images: give the path of one, "
            f"such as {flag} {shlex.quote(f'{root}/{paths[0]}')}, or that of a folder with links "
            "to the class folders of all"
        )
    others = [name for role, names in splits.items() for name in names if role == "test"]
    return paths[0], [*others, *layout.left] if split == "train" else []
