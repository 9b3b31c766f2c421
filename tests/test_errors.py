"""Names with control characters, in the log and in the sentence with which a program ends."""

import logging
import os
import re
import sys
import unicodedata

import pytest

from tests.helpers.files import write_images
from tests.helpers.models import use_nano_models
from tests.helpers.runs import TINY, logging_restored, refusal, run
from util.errors import InputError, escaped
from util.runs.run import log_lines, start_logging

NASTY = "a\nb\x1b[31m.png"
SHOWN = r"a\nb\x1b[31m.png"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\n\tb", r"a\r\n\tb"),
        ("\x00\x07\x1b[2J\x7f", r"\x00\x07\x1b[2J\x7f"),
        ("\x85\x9b31m", r"\x85\x9b31m"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        (os.fsdecode(b"\xff.png"), r"\udcff.png"),
        ("C:\\new ödnis 猫 👩\u200d🔬 'x'", "C:\\new ödnis 猫 👩\u200d🔬 'x'"),
    ],
)
def test_only_what_cannot_be_printed_is_escaped(text, expected):
    assert escaped(text) == expected


def test_every_control_character_is_escaped_and_every_text_can_be_written():
    text = escaped("".join(map(chr, range(sys.maxunicode + 1))))
    assert len(text.splitlines()) == 1
    assert {"Cc", "Cs", "Zl", "Zp"}.isdisjoint(map(unicodedata.category, text))
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert directions.isdisjoint(map(unicodedata.bidirectional, text))
    text.encode()


def logged(capsys, write):
    """The lines of a log, without the time."""
    with logging_restored():
        start_logging()
        write(logging.getLogger("test"))
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert re.match(r"\d\d:\d\d:\d\d ", lines[0])
    return [lines[0][9:], *lines[1:]]


def test_a_message_is_one_line_of_the_log(capsys):
    assert logged(capsys, lambda log: log.warning("read %s", NASTY)) == [f"read {SHOWN}"]


def test_a_traceback_keeps_its_lines_in_the_log(capsys):
    def write(log):
        try:
            int("x")
        except ValueError:
            log.exception("while reading %s", NASTY)

    lines = logged(capsys, write)
    assert lines[0] == f"while reading {SHOWN}"
    assert lines[1].startswith("Traceback")
    assert lines[-1].startswith("ValueError: ")


def test_a_table_is_logged_line_by_line(capsys):
    first, second = logged(capsys, lambda _: log_lines("class\ncat"))
    assert first == "class"
    assert second.endswith(" cat")


def test_a_program_ends_with_one_line_whatever_the_name(capsys):
    def main(_):
        raise InputError(f"cannot read {NASTY}")

    assert refusal(capsys, main=main) == f"cannot read {SHOWN}"


def test_a_broken_image_with_such_a_name_is_one_line_of_log_and_error(
    tmp_path, capsys, monkeypatch
):
    use_nano_models(monkeypatch)
    folder = write_images(tmp_path / "images", 40)
    (folder / NASTY).write_bytes(b"no image")
    argv = [*TINY, "--data_path", folder, "--val_fraction", 0, "--output_dir"]
    run(*argv, tmp_path / "run", "--max_broken", 0.5, "--epochs", 1)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    (line,) = [line for line in out.splitlines() if "Broken image" in line]
    assert f"{SHOWN} (" in line
    assert refusal(capsys, *argv, tmp_path / "refused", "--max_broken", 0).endswith(
        f"{SHOWN} (not an image, but text)"
    )
