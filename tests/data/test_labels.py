"""Labels as numbers, digits and words."""

import numpy as np
import pytest

from util.data.labels import index_of, read_labels

NAN = float("nan")


@pytest.mark.parametrize(
    "label", [7, 7.0, "7", "7.0", " 7\n", b"7", b"7.", np.int64(7), np.float32(7), "007"]
)
def test_whole_numbers_are_indices_however_they_are_written(label):
    assert index_of(label) == 7
    assert type(index_of(label)) is int


@pytest.mark.parametrize(
    "label", [None, -1, -2, "-1", 0.5, "0.5", NAN, float("inf"), "", "cat", "7th", "1e3", [7], {}]
)
def test_nothing_else_is_an_index(label):
    assert index_of(label) is None


def test_large_indices_are_exact():
    assert index_of(str(2**60 + 1)) == 2**60 + 1


def test_no_and_yes_are_indices():
    assert read_labels([True, False]).indices == [1, 0]


@pytest.mark.parametrize("values", [[2, 0, 2], [2.0, 0.0, 2.0], ["2", "0", "2.0\n"]])
def test_indices_have_no_names(values):
    assert read_labels(values) == ([2, 0, 2], None, None)


def test_words_are_classes_in_natural_order():
    found = read_labels(["dog 10", "cat", "dog 9\n", "cat"])
    assert found == ([2, 0, 1, 0], ("cat", "dog 9", "dog 10"), None)


def test_some_numbers_among_words_are_words():
    assert read_labels(["1", "b"]).classes == ("1", "b")


@pytest.mark.parametrize("missing", [None, -1, -1.0, "-1", "", " ", NAN])
def test_missing_labels_are_counted(missing):
    found = read_labels([0, missing, missing] if missing != "" else ["0", "", ""])
    assert found.fault == "2 of 3 are missing (empty, -1 or null)"
    assert found.indices == []


def test_one_missing_label_is_enough():
    assert read_labels(["cat", None, "dog"]).fault == "1 of 3 is missing (empty, -1 or null)"


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0, 0.5, 1.5, 0.5], "0.5, 1.5 cannot"),
        (["0.5", "0.25", "1e-3", "-2", "4"], "0.5, 0.25, 1e-3, ... cannot"),
        ([0, -2], "-2 cannot"),
    ],
)
def test_other_numbers_are_no_labels_and_shown(values, shown):
    found = read_labels(values)
    assert found.fault.startswith(shown)
    assert found.classes is None
