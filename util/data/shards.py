"""Samples of webdatasets: .tar files in which files of the same name belong together."""

import itertools
import posixpath
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import NamedTuple

from util.data.folders import ARRAY_SUFFIXES, IMAGE_SUFFIXES, is_hidden
from util.data.labels import index_of, read_labels
from util.errors import first_few

LABEL = "cls"
MAX_BEFORE_PLAIN = 16  # files of a sample, before one with nothing but the sample's key
PEEKED = 16  # samples
FORMATS = (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES)
ADVICE = f"write the index of each image's class, from 0, into KEY.{LABEL}"


class ShardSample(NamedTuple):
    """Files of a shard that belong together."""

    key: str
    """What their names have in common."""
    files: dict[str, bytes]
    """By the rest of their names, in lower case."""

    @property
    def image(self) -> bytes | None:
        """The encoded image: `KEY.jpg` before `KEY.seg.png` and `KEY.npy`; None without one."""
        images = [suffix for suffix in self.files if _format_of(suffix) in FORMATS]
        order = {suffix: FORMATS.index(_format_of(suffix)) for suffix in images}
        first = min(images, key=lambda s: (s.count("."), order[s]), default=None)
        return None if first is None else self.files[first]

    @property
    def label(self) -> int | None:
        """The index of its class, if it has one."""
        return index_of(self.files.get(LABEL))


def _format_of(suffix: str) -> str:
    return "." + suffix.rpartition(".")[2]


def read_shard(url: str, on_error: Callable[[Exception], bool]) -> Iterator[ShardSample]:
    """Yield the samples of a shard in its order.

    Args:
        on_error: called with an error of the archive, which ends the shard if it returns True.
    """
    from webdataset import tariterators

    stream = tariterators.url_opener([{"url": url}], handler=on_error)
    files = tariterators.tar_file_expander(stream, handler=on_error, eof_value=None)
    return group_files((file["fname"], file["data"]) for file in files)


def group_files(files: Iterable[tuple[str, bytes]]) -> Iterator[ShardSample]:
    """Group neighboring files into samples.

    The key is the name before the first dot if a file has only one: `1.jpg`, `1.seg.png`, `1.cls`.
    Otherwise it extends to the next dot, and so on: `cat.0.jpg`, `cat.0.cls`, then `cat.1.jpg`.
    """
    from webdataset.tariterators import base_plus_ext

    visible = ((name, data) for name, data in files if not _is_within_hidden(name))
    split = ((*base_plus_ext(name), data) for name, data in visible)
    named = (entry for entry in split if entry[0] is not None)
    for key, entries in itertools.groupby(named, key=lambda entry: entry[0]):
        yield from _group_suffixes(key, ((suffix, data) for _, suffix, data in entries))


def _is_within_hidden(name: str) -> bool:
    return any(is_hidden(part) for part in posixpath.normpath(name).split("/"))


def _group_suffixes(key: str, files: Iterable[tuple[str, bytes]]) -> Iterator[ShardSample]:
    """Yield the samples of files whose names begin with a key, given the rests of these names."""
    # These may be a whole shard, so not all of them are read before the first sample.
    files = iter(files)
    first = list(itertools.islice(files, MAX_BEFORE_PLAIN))
    files = itertools.chain(first, files)
    if any("." not in suffix for suffix, _ in first):
        yield from _samples(key, files)
        return
    for longer_key, entries in itertools.groupby(
        ((*_lengthened(key, suffix), data) for suffix, data in files), key=lambda entry: entry[0]
    ):
        yield from _group_suffixes(longer_key, ((suffix, data) for _, suffix, data in entries))


def _lengthened(key: str, suffix: str) -> tuple[str, str]:
    """Move what is before a suffix's first dot, if it has one, to the key."""
    part, dot, rest = suffix.partition(".")
    return (f"{key}.{part}", rest) if dot else (key, suffix)


def _samples(key: str, files: Iterable[tuple[str, bytes]]) -> Iterator[ShardSample]:
    """Yield the sample of these files; a name that comes again begins another sample."""
    found: dict[str, bytes] = {}
    for suffix, data in files:
        if suffix.lower() in found:
            yield ShardSample(key, found)
            found = {}
        found[suffix.lower()] = data
    yield ShardSample(key, found)


def why_unlabeled(url: str) -> str | None:
    """Return why a shard has no labels to learn, as far as its first samples show; else None."""

    def ignore(error: Exception) -> bool:  # it is reported when the shard is read
        return True

    with closing(read_shard(url, ignore)) as samples:
        first = [sample for sample in itertools.islice(samples, PEEKED) if sample.image]
    without = next((sample for sample in first if LABEL not in sample.files), None)
    if without is not None:
        keys = first_few(list(without.files), limit=5)
        return f"{without.key} in {url} has {keys} but no {LABEL}: {ADVICE}"
    found = read_labels([sample.files[LABEL].decode(errors="replace") for sample in first])
    if found.classes is not None:
        return f"in {url}, labels are words ({first_few(found.classes)}): {ADVICE}"
    return found.fault and f"in {url}, {found.fault}: {ADVICE}"
