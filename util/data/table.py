"""Tables of images and their labels, in CSV, TSV or JSON lines: the paths of files, a row each.

    path,label[,split[,group]]

Columns may have other names, see COLUMNS. Images of a group, such as a patient, are all in the same
split.
"""

import csv
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from sys import intern
from typing import BinaryIO, NamedTuple

from torch.utils.data import Dataset

from util.data.folders import Role, is_image, sorted_naturally, split_of
from util.data.held_out import HoldOut
from util.data.labels import (
    MISSING,
    LabelSets,
    has_several,
    index_of,
    is_number,
    number_of,
    read_label_sets,
    read_labels,
    split_labels,
)
from util.data.sampler import evenly_spaced
from util.errors import InputError, as_input_error, counted, first_few
from util.json_text import parse_json
from util.normalization import RGB8, PixelFormat
from util.settings.evaluation import TaskName

JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (".csv", ".tsv", ".txt", *JSON_LINES)
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
# Names of each column, in lower case without spaces and marks. Those of an earlier group go first.
COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "path": (
        ("path",),
        ("file", "filename", "filepath", "image", "imageid", "imagename", "imagepath", "imagefile"),
        ("imageindex", "id", "name"),
    ),
    "label": (
        ("label",),
        ("labels", "class", "classes", "classname", "target", "category", "predictionstring"),
        ("findinglabels",),
    ),
    "split": (("split",), ("set", "subset", "partition")),
    "group": (
        ("group",),
        ("groupid", "patient", "patientid", "subject", "subjectid", "case", "caseid"),
    ),
}
BOXES = "predictionstring"  # a class and a box, again and again, as in ImageNet's lists
MAX_LOOKED_FOR = 1000  # files


class Row(NamedTuple):
    """An image of a table."""

    line: int
    path: str
    """As written."""
    label: object
    role: Role | None
    group: str | None


class Table(NamedTuple):
    """The rows of a table."""

    path: Path
    columns: dict[str, str]
    """Names in the file, by COLUMNS."""
    header: list[str]
    """Names of all columns."""
    rows: list[Row]


def read_table(path: Path) -> Table:
    """Read a table, and check it row by row.

    Raises:
        InputError: it is not a table, lacks a column, or a row cannot be read.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} is not a table: give a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise InputError(f"{path} does not exist: correct the path of the table")
    with as_input_error(f"{path} is not UTF-8: save it in that encoding", UnicodeDecodeError):
        if path.suffix.lower() in JSON_LINES:
            header = list(dict.fromkeys(name for _, values in _json_lines(path) for name in values))
            entries = _json_lines(path)
        else:
            lines = _csv_lines(path)
            _, header = next(lines, (0, []))
            if not header:
                raise InputError(f"{path} is empty: list images in it, below the names of columns")
            entries = ((line, dict(zip(header, cells, strict=True))) for line, cells in lines)
        columns = find_columns(header, path)
        has_boxes = _plain(columns.get("label", "")) == BOXES
        rows = [_row_of(values, line, columns, path, has_boxes) for line, values in entries]
    if not rows:
        raise InputError(f"{path} has no rows: list the images in it")
    return Table(path, columns, header, rows)


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line that is not empty, the header first."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        first = file.readline()
        if first.startswith("sep="):  # Excel's line before the header
            delimiter = first[4:5]
        else:
            file.seek(0)
            delimiter = "\t" if path.suffix.lower() == ".tsv" else max(DELIMITERS, key=first.count)
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        with as_input_error(lambda error: _fault_of(error, path, reader.line_num), csv.Error):
            for cells in filter(None, reader):
                header = header or [name.strip() for name in cells]
                if len(cells) != len(header):
                    raise InputError(
                        f"line {reader.line_num} of {path} does not have "
                        f"{counted(len(header), 'column')} as the first line has "
                        f"({', '.join(header)}): correct it, and put text that holds a "
                        f"{DELIMITERS.get(delimiter, delimiter)} in quotes"
                    )
                yield reader.line_num, cells


def _fault_of(error: Exception, path: Path, line: int) -> str:
    if "unexpected end" in str(error):
        return f"{path} ends within quotes that are never closed: close them"
    return f"line {line} of {path} cannot be read ({error}): correct it"


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yield the number and the object of each line that is not empty."""
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            with as_input_error(f"line {line} of {path} is not JSON"):
                values = parse_json(text)
            if not isinstance(values, dict):
                raise InputError(f'line {line} of {path} is not an object such as {{"path": ...}}')
            yield line, values


def find_columns(header: Sequence[str], path: Path) -> dict[str, str]:
    """Find the columns of a table by their names.

    Raises:
        InputError: there is no column of paths, or a column may be either of two.
    """
    found = {}
    for role, names in COLUMNS.items():
        fitting = ([own for own in header if _plain(own) in group] for group in names)
        first = next(filter(None, fitting), [])
        if len(first) > 1:
            raise InputError(
                f"{path} has {len(first)} columns that may be the {role} ({', '.join(first)}): "
                f"rename the one to read to '{role}'"
            )
        if first:
            found[role] = first[0]
    if "path" not in found:
        raise InputError(
            f"{path} has no column of paths, only {', '.join(header)}: name the columns in its "
            "first line, and that of the image files 'path'"
        )
    return found


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _row_of(
    values: Mapping[str, object],
    line: int,
    columns: Mapping[str, str],
    path: Path,
    has_boxes: bool,
) -> Row:
    def text_of(role: str) -> str | None:
        if role not in columns:
            return None
        value = values.get(columns[role])
        text = str(value).strip() if isinstance(value, str | int) else ""
        if not text:
            advice = "" if role == "path" else ", or rename the column if it is another"
            raise InputError(f"line {line} of {path} has no {columns[role]}: fill it in{advice}")
        return intern(text)

    name, split, group = (text_of(role) for role in ("path", "split", "group"))
    label = values.get(columns["label"]) if "label" in columns else None
    items = label if isinstance(label, list) else [label]
    if not all(item is None or isinstance(item, str | int | float) for item in items):
        raise InputError(f"line {line} of {path} has a label that is neither text nor a number")
    if isinstance(label, str):
        label = label.strip()
        label = intern(label.partition(" ")[0] if has_boxes else label)
    meaning = split_of(split) if split else None
    if split and (meaning is None or meaning[1]):
        raise InputError(
            f"line {line} of {path} has the {columns['split']} '{split}': write train, val or test"
        )
    return Row(line, name, label, meaning and meaning[0], group)


@dataclass(frozen=True)
class TableSource:
    """A table, and how to read it."""

    path: Path
    folder: Path | None
    """Of the images; None for that of the table."""
    flag: str
    """That names the folder."""
    splits: tuple[Role, ...] = ("train", "validation")
    """Which are read, if there is a column of splits."""
    hold_out: HoldOut | None = None
    """How many groups, or images without groups, are held out for validation."""
    alone: bool = False
    """Whether all rows are validation images, unless there is a column of splits."""

    @cached_property
    def table(self) -> Table:
        """The table, read once."""
        return read_table(self.path)

    def open(
        self,
        split: Role,
        *,
        task: TaskName = "classification",
        classes: Sequence[str] | None = None,
        pixels: PixelFormat = RGB8,
    ) -> "TableImages | None":
        """Open the images of a split.

        Args:
            classes: of the training images, whose labels these have; None to find them.
            pixels: how images are read; arrays of NumPy are not images of 8-bit RGB.

        Returns:
            None if there are no validation images.

        Raises:
            InputError: the rows, or their labels, cannot be read; the message says which.
        """
        parts = self._parts()
        split = next(iter(parts)) if self.alone and len(parts) == 1 else split
        splits = (split,) if self.alone else self.splits
        rows = parts.get(split)
        if rows is None and split == "validation" and not self.alone:
            return None
        if rows is None:
            counts = " and ".join(f"{role} ({len(own)})" for role, own in parts.items())
            raise InputError(
                f"{self.path} has no rows of the split {split}, only of {counts}: correct the "
                "splits, or give the other images too, such as by --val_csv"
            )
        # Classes are those of all rows that the run reads, those of `rows` come first.
        further = [row for role in splits if role != split for row in parts.get(role, [])]
        # Alone, numbers are the outputs of a head.
        number_classes = not self.alone or task == "multilabel"
        rows_to_learn = [*rows, *further]
        found = learn(self.table, rows_to_learn, task, classes, number_classes=number_classes)
        if found.unlabeled and task != "classification":
            raise InputError(found.unlabeled)
        images = TableImages(self, rows, found, task, arrays=not pixels.is_rgb8)
        images.num_held_out = sum(self._held_out) if self._holds_out else 0
        left = {role: len(own) for role, own in parts.items() if role not in splits}
        if left and (split == "train" or self.alone):
            counts = (f"{counted(number, 'row')} of {role}" for role, number in left.items())
            images.notes.insert(0, f"not read: {', '.join(counts)}")
        if task == "classification" and found.numbered and 0 not in images.labels:
            images.notes.append("no image has the label 0: are the classes counted from 1?")
        if self._holds_out and split == "train":
            images.notes.append(self._describe_held_out())
        return images

    @property
    def _holds_out(self) -> bool:
        """Whether images are to be held out; by default not where there are splits."""
        if self.hold_out is None:
            return False
        return self.hold_out.fraction is not None or "split" not in self.table.columns

    @cached_property
    def _held_out(self) -> list[bool]:
        """Which rows are held out.

        Raises:
            InputError: --val_fraction cannot be applied.
        """
        table = self.table
        if "split" in table.columns:
            raise InputError(
                f"{self.path} has splits in the column '{table.columns['split']}': leave out "
                "--val_fraction"
            )
        names = [row.group or row.path for row in table.rows]
        chosen = self.hold_out.choose(names)
        word = "group" if "group" in table.columns else "image"
        self.hold_out.check(chosen, counted(len(set(names)), word), self.path)
        return chosen

    def _parts(self) -> dict[Role, list[Row]]:
        """Sort the rows into splits.

        Raises:
            InputError: --val_fraction cannot be applied.
        """
        rows = self.table.rows
        if self._holds_out:
            roles = ["validation" if is_held_out else "train" for is_held_out in self._held_out]
        elif "split" in self.table.columns:
            roles = [row.role for row in rows]
        else:
            return {"validation" if self.alone else "train": rows}
        parts: dict[Role, list[Row]] = {}
        for role, row in zip(roles, rows, strict=True):
            parts.setdefault(role, []).append(row)
        return parts

    def _describe_held_out(self) -> str:
        groups = ""
        if "group" in self.table.columns:
            pairs = zip(self.table.rows, self._held_out, strict=True)
            own = {row.group for row, is_held_out in pairs if is_held_out}
            number = len({row.group for row in self.table.rows})
            groups = f"{len(own)} of {counted(number, 'group')}"
        return self.hold_out.describe(sum(self._held_out), groups)


class Learned(NamedTuple):
    """What there is to learn of a table's rows."""

    labels: list[int] | list[list[int]] | list[float] | None
    classes: tuple[str, ...] | None = None
    unlabeled: str | None = None
    """Why there are no labels."""
    has_words: bool = False
    """Whether the names of classes are in the table."""

    @property
    def numbered(self) -> bool:
        """Whether labels are indices that name their classes."""
        return self.classes is not None and not self.has_words


def learn(
    table: Table,
    rows: Sequence[Row],
    task: TaskName,
    classes: Sequence[str] | None = None,
    *,
    number_classes: bool = True,
) -> Learned:
    """Read the labels of rows.

    Args:
        classes: of the training images, whose labels these have; None to find them.
        number_classes: whether indices become the names of classes that have no others.

    Raises:
        InputError: a label of a regression is not a number.
    """
    column = table.columns.get("label")
    if column is None:
        names = ", ".join(table.header)
        fault = f"{table.path} has no column of labels, only {names}: name it 'label'"
        return Learned(None, unlabeled=fault)
    if task == "regression":
        return Learned([_number_of(row, table) for row in rows])
    items = [split_labels(row.label) if task == "multilabel" else [row.label] for row in rows]
    found = _read([row.label for row in rows], task)
    has_words = found.classes is not None
    if classes is not None and not found.fault:
        found = _in_classes(items, found, tuple(classes), task)
    if number_classes and found.classes is None and not found.fault:
        found = _with_numbers_as_names(found)
    if found.fault:
        return Learned(None, unlabeled=f"in the column '{column}' of {table.path}, {found.fault}")
    labels = found.indices if task == "multilabel" else [own[0] for own in found.indices]
    return Learned(labels, found.classes, has_words=has_words)


def _number_of(row: Row, table: Table) -> float:
    number = number_of(row.label)
    if number is None:
        raise InputError(
            f"line {row.line} of {table.path} has the {table.columns['label']} {row.label!r}, but "
            "--task regression learns finite numbers: correct it, or leave the row out"
        )
    return number


def _read(values: Sequence[object], task: TaskName) -> LabelSets:
    """Read the classes of images; a fault ends with what to do."""
    if task == "multilabel":
        found = read_label_sets(values)
        advice = "give each image its classes, separated by |"
        return found._replace(fault=found.fault and f"{found.fault}: {advice}")
    several = dict.fromkeys(str(value) for value in values if has_several(value))
    if several:
        fault = f"some images have several ({first_few(several)})"
        return LabelSets(
            [], fault=f"{fault}: learn them with --task multilabel of main_finetune.py"
        )
    found = read_labels(values)
    advice = "give each image one class"
    if any(is_number(v) and index_of(v) is None and v not in MISSING for v in values):
        advice += ", or learn numbers with --task regression of main_finetune.py"
    fault = found.fault and f"{found.fault}: {advice}"
    return LabelSets([[label] for label in found.indices], found.classes, fault)


def _in_classes(
    items: Sequence[Sequence[object]],
    found: LabelSets,
    classes: tuple[str, ...],
    task: TaskName,
) -> LabelSets:
    """Return the labels as indices into other classes, found by name.

    Numbers that are no names stay what they are, indices.

    Args:
        items: the labels of each image, as they are in the table.
    """
    index_in = {name: index for index, name in enumerate(classes)}
    words = [[str(item) for item in own] for own in items]
    new = {word for own in words for word in own if word not in index_in}
    if not new:
        return LabelSets([sorted({index_in[word] for word in own}) for own in words], classes)
    if found.classes is None:
        are_numbered = classes == tuple(map(str, range(len(classes))))
        if are_numbered and _highest(found) < len(classes):
            return found._replace(classes=classes)
        if not are_numbered and task == "classification":
            return found
    fault = (
        f"{counted(len(new), 'class is', 'classes are')} not among those of the training images "
        f"({first_few(sorted_naturally(new))}): correct these labels, or leave their rows out"
    )
    return LabelSets([], fault=fault)


def _highest(found: LabelSets) -> int:
    return max(itertools.chain.from_iterable(found.indices))


def _with_numbers_as_names(found: LabelSets) -> LabelSets:
    """Name classes by their indices, unless these are too few to be indices."""
    highest, number = _highest(found), len(set(itertools.chain.from_iterable(found.indices)))
    if 2 * number < highest + 1:
        fault = f"the labels are {counted(number, 'number')} up to {highest}, which are no indices"
        return LabelSets([], fault=f"{fault}: count the classes from 0, or name them by words")
    return found._replace(classes=tuple(map(str, range(highest + 1))))


class TableImages(Dataset):
    """Images of the rows of a table.

    Args:
        rows: of the images.
        found: the labels of these rows, and perhaps of further ones.

    Attributes:
        paths: of the files.
        labels: indices of classes, lists of them, or numbers, by `task`; None if there are none.
        classes: names in the order of labels; None if labels are indices without names or numbers.
        unlabeled: why there are no labels, or None.
        has_word_labels: whether the names of classes are in the table.
        groups: of the images; None if the table has none.
        notes: sentences for the log.
        num_held_out: images of the table that are held out for validation.

    Raises:
        InputError: no file exists, or an image has different labels.
    """

    def __init__(
        self,
        source: TableSource,
        rows: Sequence[Row],
        found: Learned,
        task: TaskName,
        *,
        arrays: bool,
    ) -> None:
        folder = source.path.parent if source.folder is None else source.folder
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: give that of the images by {source.flag}")
        self.place = str(source.path)
        self.task = task
        self.names = [row.path for row in rows]
        self.paths = find_files(folder, self.names, arrays=arrays)
        self.labels = None if found.labels is None else found.labels[: len(rows)]
        self.classes, self.unlabeled = found.classes, found.unlabeled
        self.has_word_labels = found.has_words
        self.groups = None if rows[0].group is None else [row.group for row in rows]
        self.notes: list[str] = []
        self.num_held_out = 0
        self._check_repeated(rows)
        self._look_for_files(source.flag)
        if task == "regression":
            mean = sum(self.labels) / len(self.labels)
            ends = f"from {min(self.labels):g} to {max(self.labels):g}"
            self.notes.append(f"labels {ends}, {mean:g} on average")

    def _check_repeated(self, rows: Sequence[Row]) -> None:
        """Note files that are listed twice, and refuse those with two labels."""
        first: dict[str, Row] = {}
        for path, row in zip(self.paths, rows, strict=True):
            known = first.setdefault(path, row)
            if known.label != row.label:
                raise InputError(
                    f"{self.place} lists {row.path} twice with different labels: {known.label!r} "
                    f"in line {known.line} and {row.label!r} in line {row.line}; leave one of them"
                )
        if number := len(rows) - len(first):
            self.notes.append(f"{counted(number, 'row repeats', 'rows repeat')} an image")

    def _look_for_files(self, flag: str) -> None:
        looked_for = [self.paths[index] for index in evenly_spaced(len(self), MAX_LOOKED_FOR)]
        missing = [path for path in looked_for if not os.path.exists(path)]  # noqa: PTH110
        if len(missing) == len(looked_for):
            raise InputError(
                f"the images of {self.place} are not there, such as {missing[0]}: give the folder "
                f"that their paths start from by {flag}"
            )
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            self.notes.append(
                f"{len(missing)} of {counted(len(looked_for), 'file')} looked for {verb} missing, "
                f"such as {missing[0]}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def filename(self, index: int, *, absolute: bool = False) -> str:
        """Return the path of an image, or what the table says."""
        return self.paths[index] if absolute else self.names[index]

    def __getitem__(self, index: int) -> tuple[BinaryIO, int | list[int] | float | None]:
        label = None if self.labels is None else self.labels[index]
        return Path(self.paths[index]).open("rb"), label


def find_files(folder: Path, names: Sequence[str], *, arrays: bool) -> list[str]:
    """Return the paths of files; a name without an image's suffix stands for the one that has it.

    Args:
        arrays: whether arrays of NumPy are images.

    Raises:
        InputError: there are two such files.
    """
    listings: dict[str, dict[str, list[str]]] = {}

    def path_of(name: str) -> str:
        path = os.path.normpath(os.path.join(folder, name))  # noqa: PTH118, pathlib is slow
        if "\\" in path and not os.path.exists(path):  # noqa: PTH110, as Windows writes it
            path = path.replace("\\", "/")
        if is_image(name, arrays=arrays):
            return path
        parent, stem = os.path.split(path)
        if parent not in listings:
            listings[parent] = _images_by_stem(Path(parent), arrays=arrays)
        found = listings[parent].get(stem, [])
        if len(found) > 1:
            raise InputError(
                f"{path} may be {' or '.join(sorted(found))}: write the suffix in the table"
            )
        return f"{parent}/{found[0]}" if found else path

    return [path_of(name) for name in names]


def _images_by_stem(folder: Path, *, arrays: bool) -> dict[str, list[str]]:
    found = defaultdict(list)
    with suppress(OSError):  # missing files are found later
        for name in os.listdir(folder):  # noqa: PTH208
            if is_image(name, arrays=arrays):
                found[os.path.splitext(name)[0]].append(name)  # noqa: PTH122
    return found


def check_apart(train: TableImages, val: TableImages) -> None:
    """Refuse images or groups that are in the training and the validation images.

    Raises:
        InputError: with the first of them.
    """
    for what, own, others in (
        ("image", train.paths, val.paths),
        ("group", train.groups or (), val.groups or ()),
    ):
        shared = set(own).intersection(others)
        if shared:
            first = next(name for name in others if name in shared)
            raise InputError(
                f"the {what} {first} is in both the training images of {train.place} and the "
                f"validation images of {val.place}: move it to one of them "
                f"({counted(len(shared), what)} in both)"
            )
