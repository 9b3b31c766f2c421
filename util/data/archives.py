"""Images in .tar archives, read directly from their place in the file."""

import io
import logging
import posixpath
import tarfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from util.data.folders import Listing, is_hidden, joined
from util.data.labels import read_labels
from util.data.layout import ImageList, ListedImages
from util.errors import counted, first_few

LABELS = ".cls"
CUT_OFF = "the archive ends inside the image"
MAX_PADDING = 2**20  # bytes of zeros at an archive's end
LARGE = 2**24  # bytes of an image, from which it may be read in parts

logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """A file in an archive."""

    offset: int
    """Of its first byte in the archive's file."""
    size: int
    sparse: tarfile.TarInfo | None = None
    """Of a file that is stored without its zeros, which only tarfile can read."""


class PartOfFile(io.RawIOBase):
    """The bytes of a member of an archive, read from the archive's file, which is closed with it.

    Raises:
        OSError: the archive ends before.
    """

    def __init__(self, file: BinaryIO, member: Member) -> None:
        self._file, self._start, self._size = file, member.offset, member.size
        self._position = 0
        if file.seek(0, io.SEEK_END) < member.offset + member.size:
            raise OSError(CUT_OFF)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position, which is returned."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Read into a buffer up to the end of the member, and return the number of bytes."""
        self._file.seek(self._start + self._position)
        size = min(len(buffer), max(self._size - self._position, 0))
        number = self._file.readinto(memoryview(buffer)[:size])
        self._position += number
        return number

    def close(self) -> None:
        """Close the archive's file, too."""
        self._file.close()
        super().close()


class TarTree:
    """The folders in a .tar archive, and in archives within it.

    Args:
        arrays: whether arrays of NumPy are images.

    Attributes:
        members: by path.
        dangling: links whose target is not in the archive.

    Raises:
        tarfile.ReadError: this is not a .tar archive.
    """

    def __init__(self, root: str, *, arrays: bool = False) -> None:
        self.root = root
        self._arrays = arrays
        self.members: dict[str, Member] = {}
        self.dangling: list[str] = []
        self._links: dict[str, str] = {}
        with tarfile.open(root, "r:") as tar:
            self._add(tar, folder="", start=0)
        for path, target in self._links.items():
            self._follow(path, target)
        self._listings = {"": Listing()}
        for path in self.members:
            self._list(path)

    def listing(self, path: str) -> Listing:
        """List a folder of the archive."""
        return self._listings[path]

    def _add(self, tar: tarfile.TarFile, *, folder: str, start: int) -> None:
        """Add the members of an archive that starts at byte `start` of the file."""
        what = f"{self.root}/{folder}.tar" if folder else self.root
        try:
            for info in tar:
                self._add_member(tar, info, folder=folder, start=start)
        except (tarfile.TarError, EOFError) as error:
            logger.warning("%s is damaged or cut off, the rest is not read: %s", what, error)
            return
        tar.fileobj.seek(tar.offset)
        rest = tar.fileobj.read(MAX_PADDING)
        if not rest:
            logger.warning("%s does not end like a tar archive: it may be cut off", what)
        elif any(rest):
            logger.warning(
                "%s has data after its end, which is not read: it may be damaged, or several "
                "archives in one file",
                what,
            )

    def _add_member(
        self, tar: tarfile.TarFile, info: tarfile.TarInfo, *, folder: str, start: int
    ) -> None:
        path = _path_of(folder, info.name)
        if info.issym():
            self._links[path] = _path_of(posixpath.dirname(path), info.linkname)
        elif info.islnk():
            self._links[path] = _path_of(folder, info.linkname)
        elif info.isfile():
            self._links.pop(path, None)  # of two members of the same name, the later one counts
            name = posixpath.basename(path)
            if name.lower().endswith(".tar") and not (info.issparse() or is_hidden(name)):
                with suppress(tarfile.ReadError):
                    inner = tarfile.open(fileobj=tar.extractfile(info), mode="r:")  # noqa: SIM115
                    # Its name, without the suffix, becomes that of a folder.
                    self._add(inner, folder=path[:-4], start=start + info.offset_data)
                    return
            sparse = info if info.issparse() else None
            self.members[path] = Member(start + info.offset_data, info.size, sparse)

    def _follow(self, path: str, target: str) -> None:
        """Give a link the member that it leads to, directly or through other links."""
        seen = {path}
        while target in self._links and target not in seen:
            seen.add(target)
            target = self._links[target]
        if target in self.members:
            self.members[path] = self.members[target]
        else:
            self.dangling.append(path)

    def _list(self, path: str) -> None:
        *folders, name = path.split("/")
        above = ""
        for folder in folders:
            listing = self._listings[above]
            if is_hidden(folder):
                if folder not in listing.hidden:
                    listing.hidden.append(folder)
                return
            above = joined(above, folder)
            if above not in self._listings:
                self._listings[above] = Listing()
                listing.folders.append(folder)
        if is_hidden(name):
            self._listings[above].hidden.append(name)
        else:
            self._listings[above].add_file(name, arrays=self._arrays)


def _path_of(folder: str, name: str) -> str:
    return posixpath.normpath(posixpath.join(folder, name.lstrip("/")))


def _leave_out_further_images(images: ImageList, below: str, keys: Collection[str]) -> None:
    """Leave out the masks and the like in samples of a webdataset: `1.seg.png` beside `1.jpg`.

    Args:
        below: the folder of all images.
        keys: paths of label files, without suffix.
    """
    stems = [posixpath.splitext(path)[0] for path in images.paths]
    samples = {stem for stem in stems if _path_of(below, stem) in keys}

    def is_further(stem: str) -> bool:
        folder, name = posixpath.split(stem)
        parts = name.split(".")
        shorter = (joined(folder, ".".join(parts[:n])) for n in range(1, len(parts)))
        return stem not in samples and any(key in samples for key in shorter)

    kept = [index for index, stem in enumerate(stems) if not is_further(stem)]
    number = len(stems) - len(kept)
    if number:
        images.notes.append(
            f"{counted(number, 'image is', 'images are')} not read, because another one has the "
            "name of the label file"
        )
        images.paths = [images.paths[index] for index in kept]
        images.labels = [images.labels[index] for index in kept]


class TarImages(ListedImages):
    """Images of a .tar archive, read directly from their place in the file.

    timm's reader either opens the archive again for every image, or keeps it open, so that forked
    processes share a file position.

    Args:
        images: those of `tree`. If each has a .cls file of the same name, as in a webdataset, that
            is its label.

    Attributes:
        classes: names in the order of labels; None if labels are indices from .cls files.
        has_label_files: whether labels are from .cls files.
        has_word_labels: whether the names of classes are from these files.
    """

    def __init__(self, tree: TarTree, images: ImageList) -> None:
        self.root = tree.root
        if tree.dangling:
            links = counted(len(tree.dangling), "link leads", "links lead")
            images.notes.append(
                f"{links} to no file in the archive: {first_few(sorted(tree.dangling))}"
            )
        below = posixpath.relpath(images.root, tree.root)
        label_files = {
            path[: -len(LABELS)]: member
            for path, member in tree.members.items()
            if path.lower().endswith(LABELS)
        }
        if label_files:
            _leave_out_further_images(images, below, label_files)
        paths = [_path_of(below, path) for path in images.paths]
        self.members = [tree.members[path] for path in paths]
        super().__init__(images)
        self.has_label_files = self.has_word_labels = False
        if label_files:
            self._take_labels([label_files.get(posixpath.splitext(path)[0]) for path in paths])

    def _take_labels(self, files: Sequence[Member | None]) -> None:
        """Take the labels of files beside the images, if each image has one."""
        missing = [path for path, file in zip(self.listed.paths, files, strict=True) if not file]
        if missing:
            if self.unlabeled:
                self.unlabeled = (
                    f"images in {self.root} have no {LABELS} file ({first_few(missing)}): write "
                    "the class of each image into one"
                )
            return
        found = read_labels([data.decode(errors="replace") for data in self._read_all(files)])
        self.labels, self.classes = found.indices or self.labels, found.classes
        self.has_label_files, self.has_word_labels = True, found.classes is not None
        self.unlabeled = found.fault and (
            f"of the labels in the {LABELS} files of {self.root}, {found.fault}: write the class, "
            "as a name or as an index from 0, into each"
        )
        self.listed.others.pop(LABELS)

    def _read_all(self, members: Iterable[Member]) -> Iterator[bytes]:
        with Path(self.root).open("rb") as file:
            for member in members:
                file.seek(0)
                if member.sparse is None:
                    file.seek(member.offset)
                    data = file.read(member.size)
                else:
                    data = tarfile.open(fileobj=file).extractfile(member.sparse).read()  # noqa: SIM115
                if len(data) < member.size:
                    raise OSError(CUT_OFF)
                yield data

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        member, label = self.members[index], self.labels[index]
        if member.size > LARGE and member.sparse is None:
            return io.BufferedReader(PartOfFile(Path(self.root).open("rb"), member)), label
        (data,) = self._read_all([member])
        return io.BytesIO(data), label
