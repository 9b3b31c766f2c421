"""The command line: its parser, the kinds of values, and the way from it into settings.

A group of settings is a frozen dataclass, which stands with its flags beside what reads it.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn, TypeVar

from util.errors import InputError, one_line

MAX_COUNT = 10**9  # above it, the products of two no longer fit what they are computed in
MAX_WORKERS = 1000  # processes

Settings = TypeVar("Settings")


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations and no empty words, and answers mistakes in one line."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, *args: Sequence[str] | None) -> argparse.Namespace:
        """As in argparse, but an empty word, as an unset shell variable leaves it, is refused."""
        parsed = super().parse_args(*args)
        for name, value in vars(parsed).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"--{name} is empty: give it a value, or leave it out")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def ratio(text: str) -> float:
    """A number strictly between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in 0 to 1")
    return value


def whole_number(text: str, limit: int) -> int:
    """A whole number from 0 to a limit."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    if value > limit:
        raise argparse.ArgumentTypeError(f"{text} is above {limit}")
    return value


def positive_int(text: str) -> int:
    """A whole number from 1 to MAX_COUNT."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return whole_number(text, MAX_COUNT)


def natural_int(text: str) -> int:
    """A whole number from 0 to MAX_COUNT."""
    return whole_number(text, MAX_COUNT)


def process_count(text: str) -> int:
    """A number of processes; a mistyped one would start them until the machine stands still."""
    return whole_number(text, MAX_WORKERS)


def seed_number(text: str) -> int:
    """A whole number that PyTorch takes as a seed."""
    return whole_number(text, 2**63 - 1)


def finite_float(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def natural_float(text: str) -> float:
    """A finite number from 0."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = natural_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not above 0")
    return value


def take(settings: type[Settings], args: argparse.Namespace) -> Settings:
    """The settings of one group, a dataclass, out of all arguments.

    Raises:
        InputError: they do not go together.
    """
    given = vars(args)
    return settings(**{f.name: given[f.name] for f in fields(settings) if f.name in given})


def given_options(args: argparse.Namespace, defaults: argparse.Namespace) -> set[str]:
    """The options that are not at their defaults, as the command line calls them: "--epochs"."""
    return {f"--{name}" for name, value in vars(args).items() if value != getattr(defaults, name)}


def check_output_folders(*paths: Path | None) -> None:
    """Refuse files that could not be written, before hours of measuring; None is no file."""
    for path in filter(None, paths):
        if not path.parent.is_dir():
            raise InputError(f"the folder of {path} does not exist: make it first")
