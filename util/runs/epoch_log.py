"""`log.jsonl`, the file of a run with one line of metrics per epoch."""

import codecs
import json
import logging
from pathlib import Path
from typing import BinaryIO

from util.errors import counted
from util.json_text import parse_json
from util.runs.files import open_own, replace_file, set_aside

LOG_NAME = "log.jsonl"
MAX_COUNT = 2**53  # of epochs and steps; anything above is damage
MAX_NUMBER = 2**1023  # floating point ends there
HALF = "was not written to its end"

_logger = logging.getLogger(__name__)


def read_log(folder: Path) -> list[dict]:
    """Read a run's lines; those that are damaged are left out, with a warning.

    Raises:
        OSError: the file cannot be read.
    """
    path = folder / LOG_NAME
    lines, damage = _read(path)
    if damage:
        _logger.warning("%s: %s", path, _describe(damage))
    return lines


def _read(path: Path) -> tuple[list[dict], dict[int, str]]:
    """Return the lines of a file, and what is wrong with the others by their numbers."""
    if not path.exists():
        return [], {}
    with open_own(path, "rb") as file:
        content = file.read()
    lines, damage = [], {}
    texts = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            lines.append(_parse(text))
        except ValueError as error:
            damage[number] = HALF if number == len(texts) else str(error)
    return lines, damage


def _parse(line: bytes) -> dict:
    """Parse a line.

    Raises:
        ValueError: no run has written it.
    """
    try:
        values = parse_json(line)
    except ValueError as error:
        raise ValueError("is not JSON") from error
    if not isinstance(values, dict):
        raise ValueError("has no names of metrics")  # noqa: TRY004 - the type is the file's fault
    if not is_count(values.get("epoch")) or not is_count(values.get("step")):
        raise ValueError("has no whole epoch and step")
    for name, value in values.items():
        if not is_number(value):
            raise ValueError(f"has a value of {name} that is not a number")
    return values


def is_count(value: object) -> bool:
    """Whether a value can be a number of epochs or steps."""
    return type(value) is int and 0 <= value < MAX_COUNT


def is_number(value: object) -> bool:
    """Whether a value can be that of a metric, which may be NaN."""
    return type(value) is float or (type(value) is int and abs(value) < MAX_NUMBER)


def _describe(damage: dict[int, str]) -> str:
    first = min(damage)
    return f"left out {counted(len(damage), 'damaged line')} (line {first} {damage[first]})"


class EpochLog:
    """Writer of a run's lines; those that a full disk refuses are written once there is space.

    Args:
        epoch: complete epochs; later lines of an interrupted run are dropped.
        unwritten: lines that could not be written yet; checkpoints contain this list.

    Attributes:
        untrained: the line of epoch 0, before the first step; {} if there is none.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, *, epoch: int, step: int, unwritten: list[dict]) -> None:
        self.path, self.unwritten = folder / LOG_NAME, unwritten
        found, damage = _read(self.path)
        if list(damage.values()) == [HALF]:  # the run was killed: its epoch is computed again
            _logger.info("%s: %s", self.path, _describe(damage))
        elif damage:
            text, earlier = _describe(damage), set_aside(self.path)
            _logger.warning("%s: %s; the file with them is now %s", self.path, text, earlier)
        # Lines unwritten at the time of the checkpoint may have been written since.
        lines = {line["epoch"]: line for line in [*unwritten, *found]} if step else {}
        kept = [line for number, line in sorted(lines.items()) if number <= epoch]
        replace_file(self.path, lambda file: self._write_to(file, kept))
        unwritten.clear()
        self.untrained = lines.get(0, {})
        self.size = self.path.stat().st_size

    def add(self, line: dict) -> None:
        """Add a line, and write it if that is possible."""
        self.unwritten.append(line)
        self.write()

    def write(self) -> None:
        """Write what has not been written; a failure is logged."""
        if not self.unwritten:
            return
        try:
            with open_own(self.path, "ab") as file:
                # Removes a line that an earlier attempt left half-written.
                file.truncate(min(file.tell(), self.size))
                self._write_to(file, self.unwritten)
        except OSError as error:
            _logger.warning(
                "could not write %s: %s. %s will be written once there is space",
                *(self.path, error, counted(len(self.unwritten), "line")),
            )
        else:
            self.size = self.path.stat().st_size
            self.unwritten.clear()

    @staticmethod
    def _write_to(file: BinaryIO, lines: list[dict]) -> None:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)
