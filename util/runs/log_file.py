"""The log of a run as a file, `log.txt`."""

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from util.errors import escaped
from util.runs.files import open_own

LOG_FILE = "log.txt"
MAX_LINES = 10_000  # that wait for a file, or for space on its disk


class LineFormatter(logging.Formatter):
    """Log formatter of one line a message; tracebacks and Python's warnings keep their lines.

    Args:
        time_format: of `time.strftime`.
    """

    def __init__(self, time_format: str) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt=time_format)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Return the line of a record, with unprintable characters escaped."""
        lines = super().formatMessage(record)
        if record.name != "py.warnings":
            return escaped(lines)
        return "\n".join(escaped(line) for line in lines.splitlines())


class LogFile(logging.Handler):
    """Log handler that appends to a file, and keeps the lines until it is known which.

    It never raises an error: lines that do not fit on a full disk are written later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self.is_ours: Callable[[], bool] = lambda: True
        self.lines: deque[str] = deque(maxlen=MAX_LINES)
        self.setFormatter(LineFormatter("%Y-%m-%d %H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, and those before it that have not been written."""
        self.lines.append(self.format(record) + "\n")
        if self.path is not None and self.is_ours():
            content = "".join(self.lines).encode(errors="backslashreplace")
            with suppress(OSError), open_own(self.path, "ab", buffering=0) as file:
                end = file.tell()
                if file.write(content) == len(content):
                    self.lines.clear()
                else:
                    file.truncate(end)


def open_log_file(folder: Path, is_ours: Callable[[], bool] = lambda: True) -> None:
    """Write the log, what was logged before included, to `log.txt` in a run's folder.

    Args:
        is_ours: whether the folder is still this run's, and not another one's.

    Raises:
        OSError: it cannot be opened.
    """
    for handler in _log_files():
        open_own(folder / LOG_FILE, "ab").close()
        handler.path, handler.is_ours = folder / LOG_FILE, is_ours


def write_to_log_file(text: str, *, error: BaseException | None = None) -> None:
    """Write a line, and an error's traceback, that the screen shows otherwise."""
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    for handler in _log_files():
        handler.handle(logging.makeLogRecord({"msg": text, "exc_info": exc_info}))


def _log_files() -> list[LogFile]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, LogFile)]
