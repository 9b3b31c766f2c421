"""Logs of a run: log.jsonl, TensorBoard, progress."""

import logging
import sys
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from util.runs import run_log
from util.runs.checkpoint import Progress
from util.runs.epoch_log import read_log
from util.runs.run_log import RunLog, TimedIterator

CPU = torch.device("cpu")


# The log


def open_log(folder, epoch=0, step=0, num_epochs=4, **options):
    return RunLog(
        folder,
        folder,
        num_epochs=num_epochs,
        steps_per_epoch=10,
        epoch=epoch,
        step=step,
        device=CPU,
        unwritten=[],
        **options,
    )


def log_epochs(folder, first, last):
    """Log epochs of ten steps like a run that starts with epoch `first`, counted from 1."""
    log = open_log(folder, epoch=first - 1, step=10 * (first - 1))
    for epoch in range(first, last + 1):
        log.start_epoch(epoch - 1, 0)
        for step in (10 * epoch - 5, 10 * epoch):
            stats = {"loss": float(100 * first + epoch), "grad_norm": 1.0}
            log.end_step(step, epoch=epoch - 1, is_log_point=True)
            log.log_step(
                step, epoch=epoch - 1, lr=0.1, num_images=40, data_seconds=0.1, stats=stats
            )
        log.log_image("picture", np.full((4, 4, 3), epoch, np.uint8), epoch)
        values = {"loss": float(100 * first + epoch), "broken_images": 0}
        log.end_epoch(values, epoch=epoch, step=10 * epoch)
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
    events = EventAccumulator(str(folder)).Reload()
    return {point.step: point.value for point in events.Scalars(tag)}


def test_tensorboard_sorts_by_use_and_counts_epochs_where_they_are_meant(tmp_path):
    log_epochs(tmp_path, 1, 2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "1_learning/loss",
        "1_learning/loss_by_step",
        "1_learning/lr_by_step",
        "2_speed/data_wait_by_step",
        "2_speed/images_per_s_by_step",
        "2_speed/memory_gib_by_step",
        "3_health/broken_images",
        "3_health/grad_norm_by_step",
    }
    assert [picture.step for picture in events.Images("picture")] == [1, 2]
    assert points(tmp_path, "1_learning/loss") == {1: 101, 2: 102}
    assert points(tmp_path, "1_learning/loss_by_step") == {5: 101, 10: 101, 15: 102, 20: 102}


def test_tensorboard_counts_steps_where_the_run_does(tmp_path):
    log = open_log(tmp_path, in_steps=True)
    log.end_epoch({"val_miou": 50.0}, epoch=1, step=10)
    log.close()
    assert points(tmp_path, "1_learning/val_miou") == {10: 50}


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path):
    log_epochs(tmp_path, 1, 3)
    time.sleep(1)  # TensorBoard orders its files by seconds
    log_epochs(tmp_path, 2, 4)
    resumed = {15: 202, 20: 202, 25: 203, 30: 203, 35: 204, 40: 204}
    assert points(tmp_path, "1_learning/loss_by_step") == {5: 101, 10: 101} | resumed
    assert points(tmp_path, "1_learning/loss") == {1: 101, 2: 202, 3: 203, 4: 204}


def test_what_was_measured_before_training_survives_a_restart(tmp_path, caplog):
    for _ in range(2):  # the first start is killed before its first checkpoint
        log = open_log(tmp_path)
        log.start({"knn20": 12.5})
    log.end_epoch({"loss": 0.5}, epoch=1, step=10)
    log.close()
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path, epoch=1, step=10)
    log.end_epoch({"loss": 0.25, "knn20": 50.0}, epoch=2, step=20)
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1, 2]
    assert caplog.messages == ["epoch 2/4  loss 0.2500  k-NN  50.0% (untrained 12.5)  0:00"]


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


@pytest.fixture
def now(monkeypatch):
    """A clock that a test sets."""
    seconds = [100.0]
    monkeypatch.setattr(run_log.time, "monotonic", lambda: seconds[0])
    return seconds


STATS = {"loss": 0.5, "grad_norm": 1.0}
POINT = {"lr": 1e-4, "num_images": 640, "data_seconds": 5.0, "stats": STATS}


def test_an_epoch_is_a_row_of_what_was_measured(tmp_path, caplog, now):
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path, num_epochs=24, notes={"val_psnr": "true moments"})
    log.start({"knn20": 65.6})
    now[0] += 140
    log.end_epoch({"loss": 0.414, "lr": 0.1, "val_top5": 9.0}, epoch=9, step=90)
    measured = {"val_loss": 0.481, "blind_loss": 0.932, "val_psnr": 16.42, "blind_psnr": 9.07}
    now[0] += 3600
    log.end_epoch({"loss": 0.4, **measured, "knn20": 93.3}, epoch=10, step=100)
    assert caplog.messages == [
        "epoch  0/24  untrained  k-NN  65.6%  0:00",
        "epoch  9/24  loss 0.4140  2:20",
        "epoch 10/24  loss 0.4000  val 0.4810 (blind 0.9320)  "
        "PSNR 16.4 dB (true moments; blind 9.1)  k-NN  93.3% (untrained 65.6)  1:02:20",
    ]


def test_a_run_that_counts_steps_has_rows_of_steps(tmp_path, caplog, now):
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path, num_epochs=400, in_steps=True)
    log.end_epoch({"loss": 0.5, "val_miou": 41.25}, epoch=100, step=1000)
    assert caplog.messages == ["step 1,000/4,000  loss 0.5000  mIoU  41.2%  0:00"]


def test_off_a_terminal_a_long_epoch_has_a_line_after_ten_seconds(tmp_path, caplog, capsys, now):
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path, epoch=1, step=12, num_epochs=3)
    log.start_epoch(1, 2)
    for step, seconds in ((14, 5), (16, 15), (18, 5), (20, 15)):
        now[0] += seconds
        log.end_step(step, epoch=1, is_log_point=True)
        log.log_step(step, epoch=1, **POINT)
    (line,) = caplog.messages  # another at the end of the epoch would be its row
    assert line.startswith("epoch 2/3, step 6/10: loss 0.5000, lr 1.00e-04, images/s 43, ")
    assert "waiting for data 33%" in line
    assert "GiB" in line
    assert capsys.readouterr().err == ""


def test_slow_steps_are_shown_before_the_first_log_point(tmp_path, caplog, now):
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path, num_epochs=1)
    log.start_epoch(0, 0)
    for step in range(1, 5):
        now[0] += 15
        log.end_step(step, epoch=0, is_log_point=False)
    assert caplog.messages == [
        "epoch 1/1, step 2/10: 15 s a step, ETA 2:00",
        "epoch 1/1, step 4/10: 15 s a step, ETA 1:30",
    ]


def test_a_step_of_many_micro_steps_is_shown_while_it_lasts(tmp_path, caplog, now):
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path, num_epochs=1)
    log.start_epoch(0, 0)
    for done in range(1, 4):
        now[0] += 15
        log.end_micro_step(Progress(), done, 4)
    now[0] += 15
    log.end_step(1, epoch=0, is_log_point=False)
    log.end_micro_step(Progress(step_in_epoch=1, step=1), 1, 4)
    assert caplog.messages == [
        "epoch 1/1, step 1/10: 2 of 4 micro-steps",
        "epoch 1/1, step 1/10: 60 s a step, ETA 9:00",
    ]


def test_the_warm_up_is_said_to_start_where_the_first_rate_is_zero(tmp_path, caplog, now):
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path)
    log.start_epoch(0, 0)
    now[0] += 10
    log.log_step(1, epoch=0, **{**POINT, "lr": 0.0})
    assert "lr 0, where the warm-up starts, " in caplog.text


def test_the_time_left_follows_the_steps_and_says_what_evaluation_adds(now):
    clock = run_log.StepClock(num_epochs=4, steps_per_epoch=10, evaluated_every=1)

    def epoch(number, seconds):
        clock.start_epoch(number)
        for _ in range(10):
            now[0] += seconds
            clock.end_step()

    clock.start_epoch(0)
    now[0] += 60.0  # the first step compiles
    clock.end_step()
    for _ in range(9):
        now[0] += 2.0
        clock.end_step()
    assert clock.left(10, 0) == "1:00 and evaluation"  # 30 steps
    now[0] += 30.0
    epoch(1, 2.0)
    assert clock.left(20, 1) == "2:10, 1:30 of it evaluation"
    now[0] += 30.0
    epoch(2, 2.0)
    now[0] += 30.0
    epoch(3, 2.0)
    assert clock.left(40, 4) == "0:00"


def test_the_time_left_counts_only_the_evaluations_that_are_due(now):
    clock = run_log.StepClock(num_epochs=10, steps_per_epoch=1, evaluated_every=4)
    for number in range(5):
        clock.start_epoch(number)
        now[0] += 1.0
        clock.end_step()
        now[0] += 20.0 * (number == 3)
    assert clock.left(5, 5) == "0:45, 0:40 of it evaluation"  # after epochs 8 and 10
    never = run_log.StepClock(num_epochs=10, steps_per_epoch=1, evaluated_every=0)
    never.start_epoch(0)
    now[0] += 1.0
    never.end_step()
    assert never.left(1, 1) == "0:09"


def test_on_a_terminal_progress_is_a_bar(tmp_path, caplog, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    caplog.set_level(logging.INFO)
    log = open_log(tmp_path, step=2)
    log.start_epoch(0, 2)
    for step in range(3, 7):
        log.end_step(step, epoch=0, is_log_point=False)
    log.log_step(6, epoch=0, **POINT)
    assert log.bar.n == 6
    log.bar.refresh()
    bar = capsys.readouterr().err
    for step in range(7, 11):
        log.end_step(step, epoch=0, is_log_point=False)
    assert log.bar is None
    log.end_epoch({"loss": 0.5}, epoch=1, step=10)
    assert "epoch 1/4" in bar
    assert "6/10" in bar
    assert "loss=0.5000" in bar
    assert caplog.messages == ["epoch 1/4  loss 0.5000  0:00"]


def test_other_processes_show_and_write_nothing(tmp_path, caplog, capsys, monkeypatch):
    monkeypatch.setattr(run_log, "is_main_process", lambda: False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with caplog.at_level(logging.INFO):
        log_epochs(tmp_path, 1, 1)
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == []
    assert capsys.readouterr() == ("", "")
