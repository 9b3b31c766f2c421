"""Command-line parser, argument types, and the conversion of arguments into settings.

A group of settings is a frozen dataclass, defined with its flags next to the code that reads it.
"""

import argparse
import difflib
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import NoReturn, TypeVar

from util.errors import InputError, escaped
from util.terminal import keep_streams, say_at_once

MAX_COUNT = 10**9  # the product of two larger counts would overflow
MAX_WORKERS = 1000  # processes, or threads of one

Settings = TypeVar("Settings")


class Group:
    """Group of flags in the help; those that a parser lists first go to its first group."""

    def __init__(self, parser: "Parser", group: argparse._ArgumentGroup) -> None:
        self.parser, self.group = parser, group

    def add_argument(self, *names: str, **options: object) -> argparse.Action:
        """Add a flag, as argparse does."""
        comes_first = self.parser.first.intersection(names)
        group = self.parser.first_group if comes_first else self.group
        action = group.add_argument(*names, **options)
        self.parser.flags += action.option_strings
        return action


class Parser(argparse.ArgumentParser):
    """Parser that refuses abbreviations and empty values, and reports errors in one line.

    It expands "~" at the beginning of paths, which a shell does not do in --flag=~/path.

    Args:
        first: flags that a newcomer needs, which the help shows before all others.
    """

    def __init__(self, *, first: Collection[str] = (), **options: object) -> None:
        self.first, self.flags = set(first), []
        super().__init__(allow_abbrev=False, **options)
        self.first_group = super().add_argument_group("flags to begin with")

    def add_argument(self, *names: str, **options: object) -> argparse.Action:
        """Add a flag without a group, as argparse does."""
        action = super().add_argument(*names, **options)
        self.flags += action.option_strings
        return action

    def add_argument_group(
        self, *args: object, **options: object
    ) -> argparse._ArgumentGroup | Group:
        """Add a group; its flags that come first are listed elsewhere."""
        group = super().add_argument_group(*args, **options)
        # argparse itself adds groups before there is a first one.
        return Group(self, group) if hasattr(self, "first_group") else group

    def parse_args(self, *args: Sequence[str] | None) -> argparse.Namespace:
        """Parse as argparse does, but refuse empty values, such as an unset shell variable's."""
        words = args[0] if args and args[0] is not None else sys.argv[1:]
        self.check_flags(map(str, words))
        parsed = super().parse_args(*args)
        for name, value in vars(parsed).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"--{name} is empty: give it a value or leave it out")
            expanded = map(at_home, value) if isinstance(value, list) else at_home(value)
            setattr(parsed, name, list(expanded) if isinstance(value, list) else expanded)
        return parsed

    def check_flags(
        self,
        words: Iterable[str],
        otherwise: str = "--help lists all flags",
        likeness: float = 0.6,
    ) -> None:
        """Exit if a flag is unknown, with the known one that is most like it.

        Args:
            otherwise: what to do if none is like it.
            likeness: 0 to 1, from which on a flag is taken for the one that was meant.
        """
        for word in words:
            if word == "--":
                return
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self.flags:
                similar = difflib.get_close_matches(flag, self.flags, n=1, cutoff=likeness)
                advice = f"did you mean {similar[0]}?" if similar else otherwise
                self.error(f"unknown flag {flag}: {advice}")

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {escaped(message)}\n")


def check_arguments(parse_args: Callable[[], object]) -> None:
    """Parse the command line once early, so that --help and mistakes need no long imports.

    Exits with code 0 after --help and 2 after a mistake. Of several processes that a launcher
    started, only the first prints. From here on, Ctrl-C and closed streams do no harm.
    """
    keep_streams()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # in the foreground
        signal.signal(signal.SIGINT, _end_at_once)
    is_first = os.environ.get("RANK", "0") == "0"
    output, errors = (sys.stdout, sys.stderr) if is_first else (StringIO(), StringIO())
    with redirect_stdout(output), redirect_stderr(errors):
        try:
            parse_args()
        except InputError as error:
            sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {escaped(str(error))}\n")
            sys.exit(2)


def _end_at_once(number: int, _: object) -> NoReturn:
    """End the program on Ctrl-C while it imports, which leaves nothing behind."""
    say_at_once("stopped by Ctrl-C")
    os._exit(128 + number)


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


def thread_count(text: str) -> int:
    """A number of threads, from 1 on, limited as that of processes is."""
    if integer(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
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


def check_new(path: Path, *, flag: str) -> None:
    """Raise InputError if something exists at a path that the user gave as `flag`, or cannot."""
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} already exists: delete it first, or choose another {flag}")
    if not path.parent.is_dir():
        raise InputError(
            f"cannot write {flag} {path}: {path.parent} is not a folder, so create it, or choose "
            f"another {flag}"
        )
