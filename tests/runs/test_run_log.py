"""Logs of a run: log.jsonl, TensorBoard, progress."""

import logging
import sys
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.runs import run_log
from util.runs.run_log import RunLog, TimedIterator, read_log

CPU = torch.device("cpu")


# The log


def open_log(folder, epoch=0, step=0, num_epochs=4):
    return RunLog(
        folder,
        folder / "tensorboard",
        num_epochs=num_epochs,
        steps_per_epoch=10,
        epoch=epoch,
        step=step,
        device=CPU,
        unwritten=[],
    )


def log_epochs(folder, first, last):
    """Log epochs of ten steps like a run that starts with epoch `first`, counted from 1."""
    log = open_log(folder, epoch=first - 1, step=10 * (first - 1))
    for epoch in range(first, last + 1):
        log.start_epoch(epoch - 1, 0)
        for step in (10 * epoch - 5, 10 * epoch):
            stats = {"loss": float(100 * first + epoch), "grad_norm": 1.0}
            log.log_step(
                step, epoch=epoch - 1, lr=0.1, num_images=40, data_seconds=0.1, stats=stats
            )
        log.log_image("picture", np.full((4, 4, 3), epoch, np.uint8), 10 * epoch)
        log.end_epoch({"loss": float(100 * first + epoch)}, epoch=epoch, step=10 * epoch)
    log.close()


def test_there_is_one_line_per_epoch(tmp_path):
    log_epochs(tmp_path, 1, 3)
    lines = read_log(tmp_path)
    assert [(line["epoch"], line["step"], line["loss"]) for line in lines] == [
        (1, 10, 101.0),
        (2, 20, 102.0),
        (3, 30, 103.0),
    ]
    assert all(line["seconds"] >= 0 for line in lines)
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 3


def test_a_resumed_run_replaces_the_lines_after_its_checkpoint(tmp_path):
    log_epochs(tmp_path, 1, 3)
    log_epochs(tmp_path, 2, 4)  # from a checkpoint after epoch 1
    assert [line["loss"] for line in read_log(tmp_path)] == [101.0, 202.0, 203.0, 204.0]


@pytest.mark.faults
def test_a_truncated_line_does_not_stop_the_next_start(tmp_path):
    log_epochs(tmp_path, 1, 2)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 3, "lo')
    log_epochs(tmp_path, 3, 3)
    assert [line["epoch"] for line in read_log(tmp_path)] == [1, 2, 3]


def points(folder, tag):
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {point.step: point.value for point in events.Scalars(tag)}


def test_tensorboard_has_scalars_and_images(tmp_path):
    log_epochs(tmp_path, 1, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {"train/loss", "train/grad_norm", "train/lr", "epoch/loss"}
    expected |= {"train/images_per_s", "train/data_wait"}
    assert set(events.Tags()["scalars"]) == expected
    assert [picture.step for picture in events.Images("picture")] == [10, 20]
    assert points(tmp_path, "train/loss") == {5: 101, 10: 101, 15: 102, 20: 102}


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path):
    log_epochs(tmp_path, 1, 3)
    time.sleep(1)  # TensorBoard orders its files by seconds
    log_epochs(tmp_path, 2, 4)
    resumed = {15: 202, 20: 202, 25: 203, 30: 203, 35: 204, 40: 204}
    assert points(tmp_path, "train/loss") == {5: 101, 10: 101} | resumed
    assert points(tmp_path, "epoch/loss") == {10: 101, 20: 202, 30: 203, 40: 204}


# Terminal


def test_waiting_is_measured_and_computing_is_not(monkeypatch):
    now = 0.0
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now)

    def items():
        nonlocal now
        for item in range(3):
            now += 2.0
            yield item

    timed, seen = TimedIterator(items()), []
    for item in timed:
        now += 10.0
        seen.append((item, timed.seconds))
        timed.seconds = 0.0
    assert seen == [(0, 2.0), (1, 2.0), (2, 2.0)]


def test_off_a_terminal_progress_is_a_line_at_a_log_point(tmp_path, caplog, capsys, monkeypatch):
    clock = iter(
        [100.0, 100.0, 120.0, 130.0]
    )  # creation, start of the epoch, first and second log point
    monkeypatch.setattr(run_log.time, "monotonic", lambda: next(clock))
    stats = {"loss": 0.5, "grad_norm": 1.0}
    with caplog.at_level(logging.INFO):
        log = open_log(tmp_path, epoch=1, step=12, num_epochs=3)
        log.start_epoch(1, 2)
        log.log_step(16, epoch=1, lr=1e-4, num_images=640, data_seconds=5.0, stats=stats)
        log.log_step(20, epoch=1, lr=1e-4, num_images=640, data_seconds=5.0, stats=stats)
    first, second = caplog.messages
    assert first.startswith("epoch 2/3 step 6/10: loss 0.5000, lr 1.00e-04, images/s 32, ")
    assert "ETA 0:01:10" in first  # 14 steps left, 4 took 20 seconds
    assert "waiting for data 25%" in first
    assert "GiB" in first
    assert "step 10/10" in second
    assert "images/s 64" in second
    assert "waiting for data 50%" in second
    assert "ETA 0:00:38" in second  # 10 steps left, 8 took 30 seconds
    assert capsys.readouterr().err == ""


def test_on_a_terminal_progress_is_a_bar(tmp_path, caplog, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    stats = {"loss": 0.5, "grad_norm": 1.0}
    with caplog.at_level(logging.INFO):
        log = open_log(tmp_path, step=2)
        log.start_epoch(0, 2)
        log.log_step(6, epoch=0, lr=1e-4, num_images=640, data_seconds=5.0, stats=stats)
        assert log.bar.n == 6
        log.bar.refresh()
        bar = capsys.readouterr().err
        log.end_epoch({"loss": 0.5}, epoch=1, step=10)
    assert "epoch 1/4" in bar
    assert "6/10" in bar
    assert "loss=0.5000" in bar
    assert log.bar is None
    assert caplog.messages == ["epoch 1/4 done: loss 0.5"]


def test_other_processes_show_and_write_nothing(tmp_path, caplog, capsys, monkeypatch):
    monkeypatch.setattr(run_log, "is_main_process", lambda: False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO):
        log_epochs(tmp_path, 1, 1)
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == []
    assert capsys.readouterr() == ("", "")
