"""A single warning if threads on a CPU wait for each other because of other programs."""

import logging

import pytest
import torch

from tests.helpers.files import write_images
from tests.helpers.models import use_nano_models
from tests.helpers.processes import ROOT
from tests.helpers.runs import TINY, run
from util.compute import contention
from util.compute.contention import ContentionWatch, contention_watch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    contention_watch.cache_clear()
    yield
    contention_watch.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """Return a function that advances wall time and CPU time by given seconds."""
    now = {"monotonic": 0.0, "thread_time": 0.0}
    for name in now:
        monkeypatch.setattr(contention.time, name, lambda name=name: now[name])

    def passes(seconds, cpu_seconds):
        now["monotonic"] += seconds
        now["thread_time"] += cpu_seconds

    return passes


def warnings_of(caplog, watch, clock, steps):
    """Warnings logged over steps, each (wall seconds, CPU seconds)."""
    with caplog.at_level(logging.WARNING):
        for seconds, cpu_seconds in steps:
            clock(50, 0)  # waits between steps do not count
            watch.start_step()
            clock(seconds, cpu_seconds)
            watch.end_step()
    return [record.getMessage() for record in caplog.records]


def test_steps_that_take_far_longer_than_they_compute_are_reported_once(caplog, clock):
    (message,) = warnings_of(caplog, ContentionWatch(CPU), clock, [(4, 1.6)] * 20)
    assert "2.5 times as long" in message and "the 2 threads" in message
    assert "Try OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE" in message
    assert (ROOT / "docs" / "faq.md").exists()


@pytest.mark.parametrize("step", [(4, 4), (4, 3)])
def test_steps_of_an_undisturbed_machine_do_not_warn(step, caplog, clock):
    assert warnings_of(caplog, ContentionWatch(CPU), clock, [step] * 20) == []


@pytest.mark.parametrize("steps", [[(9, 1)], [(60, 1)] + [(4, 4)] * 20])
def test_a_single_slow_moment_does_not_warn(steps, caplog, clock):
    assert warnings_of(caplog, ContentionWatch(CPU), clock, steps) == []


@pytest.mark.parametrize("case", ["one thread", "asleep", "gpu", "processes"])
def test_nothing_is_reported_where_nothing_can_be_done(case, caplog, clock, monkeypatch):
    if case == "one thread":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    if case == "asleep":
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    if case == "processes":
        monkeypatch.setattr(contention, "world_size", lambda: 2)
    watch = ContentionWatch(torch.device("cuda") if case == "gpu" else CPU)
    assert warnings_of(caplog, watch, clock, [(4, 1)] * 20) == []


def test_a_run_is_watched_over_its_epochs(tmp_path, monkeypatch, capsys):
    use_nano_models(monkeypatch)
    monkeypatch.setattr(contention, "SECONDS", 0.0)
    monkeypatch.setattr(contention, "TOO_SLOW", 0.0)  # every step counts as slow
    images = write_images(tmp_path / "images", 16)
    run("--data_path", images, *TINY, "--device", "cpu", "--output_dir", tmp_path / "run")
    assert capsys.readouterr().out.count("times as long as the CPU time they use") == 1
