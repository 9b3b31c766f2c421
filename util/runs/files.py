"""Files that a run writes in its folder: never through a link, and never into a pipe.

Whatever else has the name of one of these files is not the run's: what a link points to could be
anyone's file, and a pipe would let the run wait for a reader.
"""

import errno
import json
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, BinaryIO

TIME_FORMAT = "%Y%m%d-%H%M%S"
IN_THE_WAY = {
    stat.S_IFLNK: "a link is in the way",
    stat.S_IFDIR: "a folder is in the way",
    stat.S_IFIFO: "a pipe is in the way",
}


def open_own(path: Path, mode: str, **options: object) -> IO:
    """Open a regular file as `open` does; to read it, a link may lead there.

    Raises:
        OSError: it cannot be opened, or something that is no regular file has its name.
    """
    return open(path, mode, opener=_open_regular, **options)


def _open_regular(path: str, flags: int) -> int:
    writes = flags & (os.O_WRONLY | os.O_RDWR) != 0
    with suppress(FileNotFoundError):
        _check_regular(Path(path).stat(follow_symlinks=not writes), path)
    # The same for what takes its place now: a pipe would wait for its other end.
    flags |= os.O_NONBLOCK | (os.O_NOFOLLOW if writes else 0)
    return os.open(path, flags, 0o666)


def _check_regular(found: os.stat_result, path: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = IN_THE_WAY.get(stat.S_IFMT(found.st_mode), "something else is in the way")
        raise FileExistsError(errno.EEXIST, what, path)


def replace_file(path: Path, write: Callable[[BinaryIO], None], *, durable: bool = False) -> None:
    """Write a file so that at any moment `path` is either the old file or the complete new one.

    Args:
        durable: survives a crash of the machine from then on.

    Raises:
        OSError: the write failed; `path` is unchanged. So it is after any error of `write`.
    """
    temporary = path.with_name(path.name + ".tmp")
    if os.path.lexists(temporary):
        temporary.unlink()  # of a killed run; of a link or pipe, only its name
    with temporary.open("xb") as file:  # "x" follows no link that somebody makes now
        try:
            write(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    if durable:  # the rename, too, once the folder is synced
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: dict, *, keep_earlier: bool = True) -> None:
    """Write a JSON file; an earlier one is renamed to include its time, or replaced.

    Raises:
        OSError: the write failed; the earlier file is kept, perhaps under its new name.
    """
    text = (json.dumps(content, indent=2) + "\n").encode()

    def write(file: BinaryIO) -> None:
        file.write(text)
        file.flush()  # so that it fails before the earlier file is renamed
        if keep_earlier:
            set_aside(path)

    replace_file(path, write)


def set_aside(path: Path) -> Path | None:
    """Rename a file that exists to include its time; return the new path."""
    if not os.path.lexists(path):
        return None
    when = time.strftime(TIME_FORMAT, time.localtime(path.lstat().st_mtime))
    earlier, number = path.with_name(f"{path.stem}-{when}{path.suffix}"), 1
    while os.path.lexists(earlier):  # several may be of the same second
        number += 1
        earlier = path.with_name(f"{path.stem}-{when}-{number}{path.suffix}")
    return path.rename(earlier)
