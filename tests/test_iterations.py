"""Runs whose length is a number of steps: their settings and learning rate (Table 17)."""

import itertools

import pytest

from util.errors import InputError
from util.schedule import cosine_lr, linear_lr, lr_schedule, step_lr
from util.settings.optim import IterationSettings

WARMUP_ITERS = 1500  # MAE's for segmentation
RUN = {"lr": 1e-4, "min_lr": 0.0, "warmup_steps": WARMUP_ITERS, "total_steps": 160_000}


def poly_lr(step, *, lr, min_lr, warmup_steps, total_steps, power=1.0):
    """mmsegmentation's polynomial decay, which starts at the end of the warm-up."""
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return (lr - min_lr) * (1 - progress) ** power + min_lr


# Linear learning rate


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0),
        (750, 5e-5),
        (1500, 1e-4),  # the peak
        (1500 + 158_500 // 2, 5e-5),
        (160_000, 0),
        (160_001, 0),
    ],
)
def test_rate_at_chosen_steps(step, lr):
    assert linear_lr(step, **RUN) == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize("min_lr", [0.0, 1e-6])
@pytest.mark.parametrize("warmup_steps", [0, 7])
def test_after_the_warm_up_the_rate_is_a_polynomial_of_power_1(min_lr, warmup_steps):
    run = {"lr": 3e-4, "min_lr": min_lr, "warmup_steps": warmup_steps, "total_steps": 50}
    for step in range(warmup_steps, 51):
        assert linear_lr(step, **run) == pytest.approx(poly_lr(step, **run), rel=1e-9, abs=1e-15)


def test_the_warm_up_is_that_of_the_cosine():
    run = {"lr": 3e-4, "min_lr": 1e-6, "warmup_steps": 20, "total_steps": 50}
    rates = [linear_lr(step, **run) for step in range(20)]
    assert rates == [cosine_lr(step, **run) for step in range(20)]
    assert rates[0] == 0
    steps = [b - a for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([3e-4 / 20] * 19)


def test_the_rate_peaks_once_and_never_jumps():
    run = {"lr": 1.0, "min_lr": 0.25, "warmup_steps": 5, "total_steps": 20}
    rates = [linear_lr(step, **run) for step in range(21)]
    assert max(rates) == rates[5] == 1.0
    assert rates[:6] == sorted(rates[:6])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == 0.25
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) <= 0.2 + 1e-12


def test_a_run_without_decay_stays_at_its_peak():
    assert linear_lr(10, lr=1.0, min_lr=0.1, warmup_steps=10, total_steps=10) == 1.0


@pytest.mark.parametrize(("eval_every", "warmup_iters"), [(16_000, 1500), (100, 7), (160_000, 0)])
def test_settings_in_epochs_give_the_rate_in_steps(eval_every, warmup_iters):
    settings = IterationSettings(
        16, 160_000, 1e-4, eval_every=eval_every, warmup_iters=warmup_iters
    )
    optim = settings.optim()
    schedule = lr_schedule(
        lr=optim.lr,
        min_lr=optim.min_lr,
        warmup_epochs=optim.warmup_epochs,
        epochs=optim.epochs,
        steps_per_epoch=settings.steps_per_epoch,
        curve=linear_lr,
    )
    for step in (0, 1, 6, 7, 750, 1499, 1500, 1501, 80_000, 159_999, 160_000):
        assert schedule(step) == linear_lr(step, **RUN | {"warmup_steps": warmup_iters})


# Settings


@pytest.mark.parametrize(
    ("max_iters", "steps_per_epoch", "warmup_iters"),
    [
        (160_000, 16_000, WARMUP_ITERS),  # Table 17
        (15_000, 1500, 1500),
        (1000, 100, 100),  # a tenth
        (15, 15, 1),
        (9, 9, 0),
        (1, 1, 0),
    ],
)
def test_evaluations_and_warm_up_follow_the_length_of_the_run(
    max_iters, steps_per_epoch, warmup_iters
):
    settings = IterationSettings(16, max_iters, 1e-4)
    assert settings.steps_per_epoch == steps_per_epoch
    optim = settings.optim(warmup_iters=WARMUP_ITERS)
    assert optim.epochs * steps_per_epoch == max_iters
    assert optim.warmup_epochs * steps_per_epoch == pytest.approx(warmup_iters)


def test_other_settings_are_kept():
    values = {"batch_size": 4, "lr": 2e-4, "effective_batch_size": 32, "min_lr": 1e-6}
    values |= {"weight_decay": 0.05, "clip_grad": 1.0}
    optim = IterationSettings(max_iters=100, eval_every=20, **values).optim()
    assert {name: getattr(optim, name) for name in values} == values
    assert (optim.epochs, optim.accum_iter, optim.blr) == (5, 1, None)


@pytest.mark.parametrize("eval_every", [3, 7, 101, 200])
def test_evaluations_that_do_not_divide_the_run_are_refused(eval_every):
    with pytest.raises(
        InputError, match=f"the run's 100 steps are not a multiple of --eval_every {eval_every}: "
    ):
        IterationSettings(16, 100, 1e-4, eval_every=eval_every)


@pytest.mark.parametrize("warmup_iters", [100, 101, 5000])
def test_a_warm_up_as_long_as_the_run_is_refused_in_steps(warmup_iters):
    with pytest.raises(
        InputError, match=f"{warmup_iters} must be below the run's 100 steps: "
    ) as caught:
        IterationSettings(16, 100, 1e-4, eval_every=10, warmup_iters=warmup_iters)
    assert "epochs" not in str(caught.value)


def test_a_warm_up_that_is_given_replaces_the_default():
    settings = IterationSettings(16, 100, 1e-4, warmup_iters=99)
    assert settings.optim(warmup_iters=WARMUP_ITERS).warmup_epochs == 9.9
    assert IterationSettings(16, 100, 1e-4).optim().warmup_epochs == 0


def test_accumulation_and_effective_batch_size_exclude_each_other():
    with pytest.raises(InputError, match="give only one of them"):
        IterationSettings(16, 100, 1e-4, accum_iter=2, effective_batch_size=64)


# Lengths in passes over the images


@pytest.mark.parametrize(
    ("options", "max_iters", "steps_per_epoch"),
    [
        ({}, 100 * 1849, 1849),  # ViTDet's 100 epochs of COCO: 118,287 images in batches of 64
        ({"epochs": 3}, 3 * 1849, 1849),
        ({"epochs": 10, "eval_every": 18_490}, 18_490, 18_490),
        ({"eval_every": 1000}, 184_900, None),  # does not divide the run
        ({"max_iters": 500}, 500, 50),
        ({"max_iters": 500, "eval_every": 250}, 500, 250),
    ],
)
def test_without_a_number_of_steps_the_run_is_whole_passes(options, max_iters, steps_per_epoch):
    settings = IterationSettings(**{"batch_size": 64, "max_iters": None, "lr": 1e-4, **options})
    if steps_per_epoch is None:
        with pytest.raises(
            InputError, match="184900 steps are not a multiple of --eval_every 1000"
        ):
            settings.with_passes(100, 118_287, 64)
        return
    found = settings.with_passes(100, 118_287, 64)
    assert (found.max_iters, found.steps_per_epoch) == (max_iters, steps_per_epoch)
    assert found.optim().epochs * steps_per_epoch == max_iters
    assert found.epochs is None


def test_a_length_given_twice_is_refused():
    with pytest.raises(InputError, match="--max_iters and --epochs both set the length"):
        IterationSettings(16, 100, 1e-4, epochs=2)


# Learning rate in steps


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0),
        (125, 5e-5),
        (250, 1e-4),
        (163_888, 1e-4),
        (163_889, 1e-5),
        (177_545, 1e-5),
        (177_546, 1e-6),
        (184_375, 1e-6),
    ],
)
def test_the_rate_falls_twice_where_vitdets_does(step, lr):
    run = {"lr": 1e-4, "min_lr": 0.0, "warmup_steps": 250, "total_steps": 184_375}
    assert step_lr(step, **run) == pytest.approx(lr, rel=1e-9)


def test_the_rate_in_steps_stays_above_its_floor():
    run = {"lr": 1.0, "min_lr": 0.05, "warmup_steps": 10, "total_steps": 270}
    rates = [step_lr(step, **run) for step in range(271)]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert set(rates[10:]) == {1.0, 0.1, 0.05}
    assert rates[:10] == [cosine_lr(step, **run) for step in range(10)]
