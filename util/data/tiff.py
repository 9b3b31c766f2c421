"""The directories of a TIFF file, one per page, read without its pixels."""

import io
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

MAX_PAGES = 1000  # more are not counted
MAX_ENTRIES = 4096  # of a directory; more mean that it is damaged
MAX_VALUES = 2**16  # read of an entry

NEW_SUBFILE_TYPE, SUBFILE_TYPE = 254, 255
BITS, COMPRESSION, PHOTOMETRIC = 258, 259, 262
STRIP_OFFSETS, CHANNELS, STRIP_SIZES = 273, 277, 279
TILE_OFFSETS, TILE_SIZES, SAMPLE_FORMAT, XMP = 324, 325, 339, 700
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1  # of PHOTOMETRIC
REDUCED, MASK, OLD_REDUCED = 1, 4, 2  # bits of NEW_SUBFILE_TYPE, and a value of SUBFILE_TYPE

ORDERS = {b"II": "little", b"MM": "big"}
SIZES = {1: 1, 3: 2, 4: 4, 13: 4, 16: 8}  # in bytes, of TIFF's types of integers


class Entry(NamedTuple):
    """A tag and its values."""

    position: int
    """Of the entry in the file."""
    raw: bytes
    """The whole entry as it is stored."""
    kind: int
    count: int
    value: bytes
    """The values if they fit, else their position."""


class Page(NamedTuple):
    """One directory of a TIFF."""

    file: BinaryIO
    order: Literal["little", "big"]
    position: int
    count_size: int
    """Of the number of entries, in bytes."""
    entries: dict[int, Entry]
    next: bytes
    """Position of the next directory, as it is stored after the entries."""

    def values(self, tag: int, limit: int = MAX_VALUES) -> tuple[int, ...]:
        """Return the first integers of a tag, none if it is absent."""
        entry = self.entries.get(tag)
        if entry is None or entry.kind not in SIZES:
            return ()
        size = SIZES[entry.kind]
        length = size * min(entry.count, limit)
        data = entry.value
        if size * entry.count > len(data):
            data = _read_at(self.file, int.from_bytes(data, self.order), length)
        return tuple(
            int.from_bytes(data[start : start + size], self.order)
            for start in range(0, min(length, len(data)), size)
        )

    def value(self, tag: int, default: int) -> int:
        """Return the first integer of a tag."""
        return next(iter(self.values(tag, limit=1)), default)

    @property
    def is_full(self) -> bool:
        """Whether this is neither a smaller version of another page nor its mask."""
        kind, old_kind = self.value(NEW_SUBFILE_TYPE, 0), self.value(SUBFILE_TYPE, 0)
        return not kind & (REDUCED | MASK) and old_kind != OLD_REDUCED


def pages(file: BinaryIO) -> Iterator[Page]:
    """Yield the pages of a TIFF up to the first damaged one; none of any other file."""
    file.seek(0)
    header = file.read(4)
    order = ORDERS.get(header[:2])
    version = int.from_bytes(header[2:], order) if order else 0
    if version not in (42, 43):
        return
    count_size, length_size, next_size = (2, 4, 4) if version == 42 else (8, 8, 8)
    entry_size = 4 + length_size + next_size
    next_position, seen = _read_at(file, 4 if version == 42 else 8, next_size), set()
    while len(next_position) == next_size and len(seen) < MAX_PAGES:
        position = int.from_bytes(next_position, order)
        if position == 0 or position in seen:
            return
        seen.add(position)
        count = int.from_bytes(_read_at(file, position, count_size), order)
        table_size = count * entry_size
        if not 0 < count <= MAX_ENTRIES:
            return
        table = _read_at(file, position + count_size, table_size + next_size)
        if len(table) < table_size:
            return
        entries = {}
        for start in range(0, table_size, entry_size):
            raw = table[start : start + entry_size]
            tag, kind = (int.from_bytes(raw[at : at + 2], order) for at in (0, 2))
            length = int.from_bytes(raw[4 : 4 + length_size], order)
            at = position + count_size + start
            entries[tag] = Entry(at, raw, kind, length, raw[4 + length_size :])
        next_position = table[table_size:]
        yield Page(file, order, position, count_size, entries, next_position)


def are_complete(found: Sequence[Page]) -> bool:
    """Whether the last page of those that `pages` found is the last one of the file.

    It may not be if there are `MAX_PAGES`.
    """
    return len(found) == MAX_PAGES or not any(found[-1].next)


def _read_at(file: BinaryIO, position: int, size: int) -> bytes:
    """Read up to this many bytes, none from behind the end of the file."""
    if position >= file.seek(0, io.SEEK_END):  # `seek` itself fails from some position on
        return b""
    file.seek(position)
    return file.read(size)


def first_page(data: bytes) -> Page | None:
    """Return the page that is read, the first full one; None if there is no page."""
    found = list(pages(io.BytesIO(data)))
    return next((page for page in found if page.is_full), found[0] if found else None)


def first_full_index(file: BinaryIO) -> int:
    """Return the index of the page that is read, the first full one, or 0."""
    return next((index for index, page in enumerate(pages(file)) if page.is_full), 0)


def num_pages(file: str | Path | BinaryIO) -> int:
    """Count the full pages of a TIFF by its directories alone, up to `MAX_PAGES`.

    Smaller versions and masks do not count. Any other file, and one that is broken or missing,
    has 1 page. An open file keeps its position.
    """
    try:
        if isinstance(file, str | Path):
            with Path(file).open("rb") as opened:
                return num_pages(opened)
        position = file.tell()
        count = sum(page.is_full for page in pages(file))
        file.seek(position)
    except Exception:  # missing or closed files, and members of archives, raise anything
        return 1
    return max(count, 1)


def keep_tags(data: bytes, kept: Collection[int]) -> bytes:
    """Remove all other tags from the pages of a TIFF; nothing else moves."""
    result = bytearray(data)
    for page in pages(io.BytesIO(data)):
        entries = [entry.raw for tag, entry in page.entries.items() if tag in kept]
        count = len(entries).to_bytes(page.count_size, page.order)
        table = b"".join((count, *entries, page.next))
        result[page.position : page.position + len(table)] = table
    return bytes(result)


def with_black_as_zero(data: bytes) -> bytes | None:
    """Relabel a gray TIFF whose 0 is white, which inverts it; None for any other file."""
    page = first_page(data)
    if page is None or page.value(PHOTOMETRIC, BLACK_IS_ZERO) != WHITE_IS_ZERO:
        return None
    entry = page.entries[PHOTOMETRIC]
    size = SIZES[entry.kind]
    start = entry.position + len(entry.raw) - len(entry.value)
    return data[:start] + BLACK_IS_ZERO.to_bytes(size, page.order) + data[start + size :]
