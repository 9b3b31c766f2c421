"""Means over an epoch weight every image equally and detect a loss that is not finite."""

import copy
import json
import math
from contextlib import suppress

import pytest
import torch

from util.errors import NonFiniteLossError
from util.runs.meters import EpochMeters

CPU = torch.device("cpu")


def update(meters, loss, num_images, step=0, grad_norm=1.0):
    meters.update(
        loss=torch.tensor(float(loss)),
        grad_norm=torch.tensor(float(grad_norm)),
        num_images=num_images,
        step=step,
    )


def test_means_weight_every_image_equally():
    meters = EpochMeters(CPU)
    update(meters, loss=2, grad_norm=4, num_images=30)
    update(meters, loss=6, grad_norm=8, num_images=10)
    assert meters.read() == {"loss": 3.0, "grad_norm": 5.0}
    update(meters, loss=1, grad_norm=1, num_images=40)
    assert meters.read() == {"loss": 1.0, "grad_norm": 1.0}  # since the last read
    assert meters.means() == {"loss": 2.0, "grad_norm": 3.0}  # of the epoch
    meters.reset()
    update(meters, loss=7, num_images=5)
    assert meters.read()["loss"] == meters.means()["loss"] == 7.0


def let_processes_meet(monkeypatch, *processes):
    """Give every process's meters the sums of all processes."""
    rows = []

    def keep(row):
        rows.append(row)
        return row.unsqueeze(0)

    monkeypatch.setattr("util.runs.meters.all_gather", keep)
    for meters in processes:
        with suppress(NonFiniteLossError):
            copy.deepcopy(meters).read()
    monkeypatch.setattr("util.runs.meters.all_gather", lambda row: torch.stack(rows))


def test_the_loss_is_the_mean_of_the_processes(monkeypatch):
    mine, other = EpochMeters(CPU), EpochMeters(CPU)
    update(mine, loss=1, grad_norm=4, num_images=8)
    update(other, loss=3, grad_norm=4, num_images=8)
    let_processes_meet(monkeypatch, mine, other)
    assert mine.read() == other.read() == {"loss": 2.0, "grad_norm": 4.0}


@pytest.mark.parametrize("num_before", [0, 1, 3, 5])
def test_means_continue_from_a_saved_state_bit_for_bit(num_before):
    steps = [(torch.rand(()).item() / 3, n) for n in (8, 8, 8, 8, 8, 3)]

    def go_on(meters, steps):
        for loss, num_images in steps:
            update(meters, loss, num_images, grad_norm=loss**2)
        return meters.read(), meters.means()

    whole = EpochMeters(CPU)
    go_on(whole, steps[:num_before])
    resumed = EpochMeters(CPU)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert go_on(resumed, steps[num_before:]) == go_on(whole, steps[num_before:])


def test_a_saved_state_is_that_of_the_last_read():
    meters = EpochMeters(CPU)
    update(meters, loss=1, num_images=8)
    meters.read()
    state = meters.state_dict()
    update(meters, loss=9, num_images=8)
    assert meters.state_dict() == state


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_step_whose_loss_is_not_finite_is_named(bad):
    meters = EpochMeters(CPU)
    for step, loss in enumerate([1.0, 1.0, bad, 1.0, math.nan], start=40):
        update(meters, loss, num_images=8, step=step)
    with pytest.raises(NonFiniteLossError, match="step 43 of the run is not finite"):
        meters.read()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_ends_the_run_where_nothing_skips_the_step(bad):
    meters = EpochMeters(CPU)
    update(meters, loss=1, num_images=8, step=40, grad_norm=bad)
    update(meters, loss=math.nan, num_images=8, step=41, grad_norm=math.nan)
    with pytest.raises(NonFiniteLossError, match="the gradient of step 41 of the run") as caught:
        meters.read()
    assert (caught.value.step, caught.value.in_gradient) == (40, True)


def test_a_bad_loss_on_one_process_ends_all(monkeypatch):
    mine, other = EpochMeters(CPU), EpochMeters(CPU)
    for step in range(20):
        bad = math.nan if step == 17 else 1  # the gradient is that of all processes
        update(mine, loss=1, num_images=8, step=step, grad_norm=bad)
        update(other, loss=bad, num_images=8, step=step, grad_norm=bad)
    let_processes_meet(monkeypatch, mine, other)
    for meters in (mine, other):
        with pytest.raises(NonFiniteLossError, match=r"loss of step 18 .* on process 1") as caught:
            meters.read()
        assert caught.value.process == 1


def test_a_step_that_fp16_skips_does_not_spoil_the_gradient_norm_of_the_others():
    meters = EpochMeters(CPU, skips_steps=True)
    update(meters, loss=1, grad_norm=math.inf, num_images=8)
    meters.read()
    update(meters, loss=1, grad_norm=2, num_images=8)
    assert meters.read() == {"loss": 1.0, "grad_norm": 2.0}
    assert math.isfinite(meters.means()["grad_norm"])
