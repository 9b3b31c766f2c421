"""Progress of what takes long: a bar on a terminal, lines elsewhere, nothing of what is quick."""

import logging
import sys
import threading
from types import SimpleNamespace

import pytest

from util import progress
from util.progress import Progress, clock, waiting, with_progress


@pytest.fixture
def now(monkeypatch):
    """A clock that a test sets."""
    time = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_a_duration_has_hours_only_above_an_hour():
    assert [clock(s) for s in (0, 59.6, 3599, 3600, 90061)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]


def test_off_a_terminal_there_is_a_line_every_ten_seconds_with_what_is_left(now, caplog):
    caplog.set_level(logging.INFO)
    task = Progress("features", 4000)
    for seconds in (4, 9, 10, 15, 21, 40):
        now[0] = seconds
        task.add(500)
    assert caplog.messages == [
        "features: 1,500 of 4,000 images, 0:17 left",  # 1,500 took 10 seconds
        "features: 2,500 of 4,000 images, 0:13 left",
        "features: 3,000 of 4,000 images, 0:13 left",
    ]


def test_what_is_quick_and_what_is_done_is_not_shown(now, caplog, capsys):
    caplog.set_level(logging.INFO)
    for number in with_progress(range(3), "table", 3, unit="rows"):
        now[0] = 5.0 * number
    assert caplog.messages == []
    assert capsys.readouterr() == ("", "")


def test_other_processes_show_nothing(now, caplog):
    caplog.set_level(logging.INFO)
    task = Progress("features", 10, shown=False)
    now[0] = 100.0
    task.add()
    assert caplog.messages == []


def test_on_a_terminal_it_is_a_bar_that_goes_when_the_task_is_done(monkeypatch, caplog, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "QUIET", 0.0)
    task = Progress("features", 10)
    task.add(4)
    task.bar.refresh()
    shown = capsys.readouterr().err
    assert "features" in shown and "4/10" in shown
    task.close()
    assert capsys.readouterr().err.endswith("\r")
    assert caplog.messages == []


class Waits(threading.Event):
    """Stand-in for an event: some waits run out, as if time had passed."""

    def __init__(self, runs_out):
        super().__init__()
        self.told, self.left = threading.Event(), runs_out

    def wait(self, timeout=None):
        if self.left:
            self.left -= 1
            return False
        self.told.set()
        return super().wait()


@pytest.mark.parametrize("lines", [0, 1, 3])
def test_a_call_of_unknown_length_says_that_it_goes_on(monkeypatch, caplog, lines):
    caplog.set_level(logging.INFO)
    event = Waits(lines)
    stand_in = SimpleNamespace(Event=lambda: event, Thread=threading.Thread)
    monkeypatch.setattr(progress, "threading", stand_in)
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)

    @waiting("listing images")
    def call():
        event.told.wait()
        return 3

    assert call() == 3
    expected = ["listing images"] + ["listing images: 0:00 so far"] * (lines - 1)
    assert caplog.messages == expected[:lines]


def test_an_error_in_a_call_that_is_waited_for_ends_the_lines(caplog):
    before = threading.active_count()
    with pytest.raises(OSError, match="gone"), waiting("listing images"):
        raise OSError("gone")
    assert threading.active_count() == before
    assert caplog.messages == []
