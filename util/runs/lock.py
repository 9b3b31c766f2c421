"""One run at a time writes into a folder."""

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
    """A folder taken by this process, until `release` or its end, however it ends.

    The system frees the lock of a process that has died, so none is ever stale. It is a POSIX lock,
    which loader processes do not inherit: they may outlive a killed run by some seconds.

    Args:
        folder: to take; made if it is not there, and removed again if it stays empty.

    Raises:
        InputError: another process has it, which the message names, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self.made: list[Path] = []
        for _ in range(ATTEMPTS):
            self.file = self._locked()
            if self._is_in_place():
                break
            self.file.close()  # the owner before removed it between opening and locking
        else:
            raise InputError(f"cannot lock {self.path}: choose another --output_dir")
        owner = {"process": os.getpid(), "host": socket.gethostname()}
        owner["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        self.file.truncate(0)
        with suppress(OSError):  # only for the message to others
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
                f"another run, {owner}, is writing to {folder}: wait for its end or stop it, or "
                "choose another --output_dir"
            ) from error
        except OSError as error:  # some network file systems have no locks
            _logger.warning("%s cannot be locked (%s): start only one run in it", folder, error)
        return file

    def _is_in_place(self) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        return False

    def release(self) -> None:
        """Leave the folder to others, and no folder where none was and nothing was written."""
        if self.file.closed:
            return
        with suppress(OSError):  # which must not stand in for what ended the run
            self.path.unlink(missing_ok=True)
        self.file.close()
        with suppress(OSError):  # of a folder that is not empty
            for path in self.made:
                path.rmdir()


def _owner(file: BinaryIO) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "which has not said who it is"


def lock_folder(folder: Path) -> FolderLock | None:
    """Take a folder by the main process, for all of them; None on the others.

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
