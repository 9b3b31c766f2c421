"""The log of a run is also a file."""

import fcntl
import logging
import re
import warnings
from pathlib import Path

import pytest

from tests.helpers.runs import TINY, logging_restored, refusal, run
from util.errors import RunError
from util.runs.log_file import LOG_FILE, LogFile, open_log_file
from util.runs.run import run_main, start_logging

_logger = logging.getLogger(__name__)


def without_time(text):
    return [re.sub(r"^[\d-]* ?\d\d:\d\d:\d\d ", "", line) for line in text.splitlines()]


def options(images, folder, epochs):
    return ["--data_path", images, *TINY, "--epochs", epochs, "--output_dir", folder]


def test_the_file_has_all_of_the_screen_over_several_starts(images, nano, tmp_path, capsys):
    for epochs in (1, 2):
        run(*options(images, tmp_path, epochs))
    printed = without_time(capsys.readouterr().out)
    assert len(printed) > 10
    assert without_time((tmp_path / LOG_FILE).read_text()) == printed


def test_a_refused_run_writes_nothing_into_the_folder(images, nano, tmp_path, capsys, monkeypatch):
    def locked(*_):
        raise BlockingIOError

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", locked)
        assert "another run" in refusal(capsys, *options(images, tmp_path, 1))
    assert not (tmp_path / LOG_FILE).exists()
    run(*options(images, tmp_path, 1))
    before = (tmp_path / LOG_FILE).read_text()
    other = [*options(images, tmp_path, 1), "--mask_ratio", 0.5]
    assert "was trained with other settings" in refusal(capsys, *other)
    assert (tmp_path / LOG_FILE).read_text() == before


def lines_after(tmp_path, main):
    """Lines of the log of a program that opens a log file first, without their time."""

    def open_then_run():
        start_logging()
        _logger.info("early")
        open_log_file(tmp_path)
        main()

    with logging_restored(), pytest.raises((SystemExit, ZeroDivisionError)):
        run_main(open_then_run)
    return without_time((tmp_path / LOG_FILE).read_text())


def fail(error):
    raise error


def test_the_last_line_says_why_the_run_ended(tmp_path, capsys):
    lines = lines_after(tmp_path, lambda: fail(RunError("the loss is not finite")))
    assert lines == ["early", capsys.readouterr().err.strip()]
    assert lines[-1].endswith("error: the loss is not finite")


def test_the_traceback_of_a_bug_is_in_the_file(tmp_path):
    lines = lines_after(tmp_path, lambda: 1 / 0)
    assert "Traceback (most recent call last):" in lines
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_warnings_of_libraries_are_in_the_file_and_keep_their_lines(tmp_path):
    def warn():
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(False)
            logging.captureWarnings(True)
            warnings.warn("first\nsecond \x1b", stacklevel=2)

    lines = lines_after(tmp_path, warn)
    assert lines[1].endswith("UserWarning: first")
    assert lines[2] == "second \\x1b"


def test_lines_that_a_full_disk_refused_are_written_later(tmp_path):
    handler = LogFile()
    handler.path = Path("/dev/full")
    handler.handle(logging.makeLogRecord({"msg": "one"}))
    handler.path = tmp_path / "missing" / "log.txt"
    handler.handle(logging.makeLogRecord({"msg": "two"}))
    handler.path = tmp_path / "log.txt"
    handler.handle(logging.makeLogRecord({"msg": "three"}))
    handler.handle(logging.makeLogRecord({"msg": "four"}))
    assert without_time(handler.path.read_text()) == ["one", "two", "three", "four"]
