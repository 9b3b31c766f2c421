"""Lock that lets only one run at a time write to a folder."""

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
from util.errors import InputError

LOCK_NAME = "lock"
ATTEMPTS = 10

_logger = logging.getLogger(__name__)


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
        self.made: list[Path] = []
        for _ in range(ATTEMPTS):
            self.file = self._locked()
            if self._is_in_place():
                break
            self.file.close()  # the previous owner removed it between opening and locking
        else:
            raise InputError(f"cannot lock {self.path}: choose another --output_dir")
        owner = {"process": os.getpid(), "host": socket.gethostname()}
        owner["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.truncate(0)
        with suppress(OSError):  # it only serves the error message of other runs
            self.file.write(json.dumps(owner).encode())

    def _locked(self) -> BinaryIO:
        folder = self.path.parent
        try:
            self.made += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise InputError(
                f"cannot write {self.path} ({error}): choose another --output_dir"
            ) from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = _owner(file)
            file.close()
            raise InputError(
                f"another run, {owner}, is writing to {folder}: wait until it ends, stop it, or "
                "choose another --output_dir"
            ) from error
        except OSError as error:  # some network file systems do not support locks
            _logger.warning("cannot lock %s (%s): start only one run in it", folder, error)
        return file

    def _is_in_place(self) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        return False

    def release(self) -> None:
        """Release the lock, and remove the folders that it created if they are empty."""
        if self.file.closed:
            return
        with suppress(OSError):  # must not hide the error that ended the run
            self.path.unlink(missing_ok=True)
        self.file.close()
        with suppress(OSError):  # not empty
            for path in self.made:
                path.rmdir()


def _owner(file: BinaryIO) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
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
