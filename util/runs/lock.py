"""Lock that lets only one run at a time write to a folder."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from util.compute.distributed import broadcast_object, is_main_process
from util.errors import InputError, RunError
from util.json_text import parse_json
from util.runs.files import open_own

LOCK_NAME = "lock"
ATTEMPTS = 10

_logger = logging.getLogger(__name__)


class TakenError(Exception):
    """Another process, which the message names, has the lock."""


class FolderLock:
    """Lock on a folder that this process holds until `release` or until it ends in any way.

    The system frees the lock of a dead process, so locks never become stale. It is a POSIX lock,
    which loader processes do not inherit: they may outlive a killed run by some seconds.

    Args:
        folder: created if missing, and removed again if it stays empty.

    Raises:
        InputError: another process holds the lock, or the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self.was_in_place = True  # when it was released
        self.made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise InputError(
                f"cannot write {self.path} ({error}): choose another --output_dir"
            ) from error
        except TakenError as taken:
            raise InputError(
                f"another run, {taken}, is writing to {folder}: wait until it ends, stop it, or "
                "choose another --output_dir"
            ) from taken

    def _lock(self) -> None:
        """Open and lock the file, and write into it who has it.

        Raises:
            OSError: it cannot be opened.
            TakenError: another process has it.
        """
        for _ in range(ATTEMPTS):
            self.file = open_own(self.path, "a+b", buffering=0)
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                owner = _owner(self.file)
                self.file.close()
                raise TakenError(owner) from error
            except OSError as error:  # some network file systems do not support locks
                folder = self.path.parent
                _logger.warning("cannot lock %s (%s): start only one run in it", folder, error)
            if self.is_in_place():
                break
            self.file.close()  # the previous owner removed it between opening and locking
        else:
            raise FileNotFoundError(errno.ENOENT, "it vanishes again and again", str(self.path))
        owner = {"process": os.getpid(), "host": socket.gethostname()}
        owner["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.truncate(0)
        with suppress(OSError):  # it only serves the error message of other runs
            self.file.write(json.dumps(owner).encode())

    def is_in_place(self) -> bool:
        """Whether the folder is still this run's; once released, whether it was until then."""
        if self.file.closed:  # or given up
            return self.was_in_place
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.lstat())
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:  # of a disk that has failed, as the write itself will say
            return True

    def keep(self) -> None:
        """Check before a write that the folder is still this run's, even if its lock was deleted.

        If nobody has taken the folder meanwhile, it is locked again.

        Raises:
            RunError: the folder is gone, or another run's.
        """
        if self.is_in_place():
            return
        folder = self.path.parent
        if not folder.is_dir():
            raise RunError(
                f"{folder} has been deleted or moved while this run was writing to it, so nothing "
                "more can be saved: move it back and start the same command again, or start anew"
            )
        self.was_in_place = False
        self.file.close()
        try:
            self._lock()
        except TakenError as taken:
            raise RunError(
                f"{self.path} has been deleted, and another run, {taken}, is writing to {folder} "
                "now: this run ends, since the two would overwrite each other's files"
            ) from taken
        except OSError as error:
            self.was_in_place = True  # nobody else can have it
            _logger.warning("cannot lock %s again (%s): start no other run in it", folder, error)
        else:
            _logger.warning("%s was deleted while this run had it: it is locked again", self.path)

    def release(self) -> None:
        """Release the lock, and remove the folders that it created if they are empty."""
        if self.file.closed:
            return
        self.was_in_place = self.is_in_place()
        if self.was_in_place:  # otherwise it is another run's now
            with suppress(OSError):  # must not hide the error that ended the run
                self.path.unlink(missing_ok=True)
        self.file.close()
        with suppress(OSError):  # not empty
            for path in self.made:
                path.rmdir()


def _owner(file: BinaryIO) -> str:
    file.seek(0)
    try:
        owner = parse_json(file.read())
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "whose lock file does not identify it"


def lock_folder(folder: Path) -> FolderLock | None:
    """Lock a folder from the main process on behalf of all; None on the others.

    Raises:
        InputError: on all processes, see FolderLock.
    """
    lock = error = None
    if is_main_process():
        try:
            lock = FolderLock(folder)
        except InputError as refusal:
            error = refusal
    error = broadcast_object(error)
    if error is not None:
        raise error
    return lock
