"""Command-line parser, argument types, and the conversion of arguments into settings.

A group of settings is a frozen dataclass, defined with its flags next to the code that reads it.
"""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn, TypeVar

from util.errors import InputError, escaped

MAX_COUNT = 10**9  # the product of two larger counts would overflow
MAX_WORKERS = 1000  # processes

Settings = TypeVar("Settings")


class Parser(argparse.ArgumentParser):
    """Parser that refuses abbreviations and empty values, and reports errors in one line.

    It expands "~" at the beginning of paths, which a shell does not do in --flag=~/path.
    """

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, *args: Sequence[str] | None) -> argparse.Namespace:
        """Parse as argparse does, but refuse empty values, such as an unset shell variable's."""
        parsed = super().parse_args(*args)
        for name, value in vars(parsed).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"--{name} is empty: give it a value or leave it out")
            expanded = map(at_home, value) if isinstance(value, list) else at_home(value)
            setattr(parsed, name, list(expanded) if isinstance(value, list) else expanded)
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {escaped(message)}\n")


def at_home(value: object) -> object:
    """Expand a path below the user's home folder, "~" or "~/..."; other values stay as they are."""
    if isinstance(value, Path | str) and re.match("~(?:/|$)", str(value)):
        return type(value)(Path(value).expanduser())
    return value


def number(text: str) -> float:
    """A number, which may be infinite or NaN."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a number, not {text}") from error


def integer(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text}") from error


def ratio(text: str) -> float:
    """A number strictly between 0 and 1."""
    value = number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be strictly between 0 and 1, not {text}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


def whole_number(text: str, limit: int) -> int:
    """An integer from 0 to a limit."""
    value = integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    if value > limit:
        raise argparse.ArgumentTypeError(f"must be at most {limit}, not {text}")
    return value


def positive_int(text: str) -> int:
    """An integer from 1 to MAX_COUNT."""
    if integer(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return whole_number(text, MAX_COUNT)


def natural_int(text: str) -> int:
    """An integer from 0 to MAX_COUNT."""
    return whole_number(text, MAX_COUNT)


def process_count(text: str) -> int:
    """A number of processes, limited because a typo could otherwise freeze the machine."""
    return whole_number(text, MAX_WORKERS)


def seed_number(text: str) -> int:
    """An integer that PyTorch accepts as a seed."""
    return whole_number(text, 2**63 - 1)


def finite_float(text: str) -> float:
    """A finite number."""
    value = number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, not {text}")
    return value


def natural_float(text: str) -> float:
    """A finite number of at least 0."""
    value = finite_float(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = finite_float(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
    return value


def take(settings: type[Settings], args: argparse.Namespace) -> Settings:
    """Build one group of settings from the parsed arguments.

    Raises:
        InputError: the values contradict each other.
    """
    given = vars(args)
    return settings(**{f.name: given[f.name] for f in fields(settings) if f.name in given})


def given_options(args: argparse.Namespace, defaults: argparse.Namespace) -> set[str]:
    """Names of the options that differ from their defaults, as on the command line ("--epochs")."""
    return {f"--{name}" for name, value in vars(args).items() if value != getattr(defaults, name)}


def check_output_folders(*paths: Path | None) -> None:
    """Check that output files can be written, before hours of measuring; None is skipped."""
    for path in filter(None, paths):
        if path.is_dir():
            raise InputError(f"{path} is a folder: give the path of a file")
        if not path.parent.is_dir():
            raise InputError(
                f"{path.parent} does not exist: create it, or choose another path for {path.name}"
            )
