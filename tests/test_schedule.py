"""The learning rate."""

import math
import re
from types import SimpleNamespace

import pytest

from util.schedule import cosine_lr, odd_settings, plan_learning_rate, scaled_lr, step_lr
from util.settings.optim import IterationSettings, OptimSettings

# Table 10: base rate 1.5e-4, batch 4096, 800 epochs of which 40 warm up; ImageNet has 312 batches.
STEPS_PER_EPOCH = 312
RUN = {
    "lr": 1.5e-4 * 4096 / 256,
    "min_lr": 0.0,
    "warmup_steps": 40 * STEPS_PER_EPOCH,
    "total_steps": 800 * STEPS_PER_EPOCH,
}


def mae_lr(epoch, *, lr, min_lr, warmup_epochs, epochs):
    """MAE's rule, in which `epoch` has a fraction: how far the epoch has come."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [
        (0, 0),
        (20, 1.2e-3),
        (40, 2.4e-3),  # the peak
        (230, 2.4e-3 * (0.5 + 0.125**0.5)),  # a quarter of the cosine
        (420, 1.2e-3),
        (800, 0),
    ],
)
def test_rate_at_chosen_epochs_of_the_paper(epoch, lr):
    assert cosine_lr(epoch * STEPS_PER_EPOCH, **RUN) == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize("min_lr", [0.0, 1e-6])
def test_every_step_equals_maes_rule(min_lr):
    steps_per_epoch, warmup_epochs, epochs = 7, 5, 30
    for step in range(epochs * steps_per_epoch + 1):
        ours = cosine_lr(
            step,
            lr=1e-3,
            min_lr=min_lr,
            warmup_steps=warmup_epochs * steps_per_epoch,
            total_steps=epochs * steps_per_epoch,
        )
        theirs = mae_lr(step / steps_per_epoch, lr=1e-3, min_lr=min_lr, warmup_epochs=5, epochs=30)
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)


def test_edges_of_a_run():
    shape = {"lr": 1.0, "min_lr": 0.1}
    assert cosine_lr(0, warmup_steps=0, total_steps=10, **shape) == 1.0
    assert cosine_lr(10, warmup_steps=0, total_steps=10, **shape) == pytest.approx(0.1)
    assert cosine_lr(11, warmup_steps=0, total_steps=10, **shape) == pytest.approx(0.1)
    assert cosine_lr(10, warmup_steps=10, total_steps=10, **shape) == 1.0


@pytest.mark.parametrize(
    ("batch", "mask_ratio", "pred_ratio", "scale"),
    [
        (4096, 0.75, 0.75, 16),  # MAE's own
        (4096, 0.75, 0.25, 16 / 3),
        (1024, 0.75, 0.15, 4 / 5),
        (256, 0.85, 0.85, 1),
    ],
)
def test_rate_scales_with_batch_and_prediction_ratio(batch, mask_ratio, pred_ratio, scale):
    lr = scaled_lr(1.5e-4, batch, mask_ratio=mask_ratio, pred_ratio=pred_ratio)
    assert lr == pytest.approx(1.5e-4 * scale)


def test_a_quarter_predicted_peaks_at_a_third():
    peak = scaled_lr(1.5e-4, 4096, mask_ratio=0.75, pred_ratio=0.25)
    assert cosine_lr(RUN["warmup_steps"], **RUN | {"lr": peak}) == pytest.approx(8e-4)


# Warnings


def warnings_of(num_images, batch_size, *, lr=None, blr=5e-4, epochs=100, warmup=5.0, each=None):
    """Warnings for `batch_size` images a step; `each` of them if the others are accumulated."""
    images = {"batch_size": batch_size}
    if each is not None:
        images = {"batch_size": each, "effective_batch_size": batch_size}
    optim = OptimSettings(**images, epochs=epochs, warmup_epochs=warmup, lr=lr, blr=blr)
    per_epoch = math.ceil(num_images / batch_size)
    steps = SimpleNamespace(effective_batch_size=batch_size, steps_per_epoch=per_epoch)
    return odd_settings(optim, steps, plan_learning_rate(optim, steps), num_images)


IMAGENET = 1_281_167
FITTING = {
    "Table 10": (IMAGENET, 4096, {"blr": 1.5e-4, "epochs": 800, "warmup": 40}),
    "Table 11": (IMAGENET, 1024, {"each": 128}),
    "Table 12": (IMAGENET, 16384, {"blr": 0.1, "epochs": 90, "warmup": 10}),
    "the quickstart": (1437, 32, {"lr": 1e-3, "epochs": 14, "warmup": 0.7}),
    "the README's laptop": (6300, 32, {"lr": 1e-3, "epochs": 21, "warmup": 1.05}),
    "fine-tuning 6,300 photographs": (6300, 32, {"lr": 1e-3, "epochs": 5, "warmup": 0.5}),
}


@pytest.mark.parametrize(("num_images", "batch", "options"), FITTING.values(), ids=FITTING)
def test_the_papers_and_our_commands_get_no_warning(num_images, batch, options):
    assert warnings_of(num_images, batch, **options) == []


def test_a_floor_that_is_not_below_the_peak_is_warned_of():
    optim = OptimSettings(batch_size=256, epochs=10, warmup_epochs=1, blr=1e-4, min_lr=1e-3)
    steps = SimpleNamespace(effective_batch_size=256, steps_per_epoch=100)
    assert odd_settings(optim, steps, plan_learning_rate(optim, steps), 25_600) == [
        "the learning rate never falls: its peak is 0.0001, and --min_lr 0.001 is not below it"
    ]


def test_a_batch_larger_than_the_data_is_warned_of():
    assert warnings_of(200, 512) == [
        "a step of 512 images is more than the 200 training images, and the learning rate is "
        "scaled for 512: lower --batch_size, so that a step has about 8 images, and give --lr, "
        "such as 0.001"
    ]
    (text,) = warnings_of(200, 4096, each=64, lr=1e-3)
    assert text.endswith(
        "200 training images: lower --effective_batch_size, so that a step has about 8 images"
    )


@pytest.mark.parametrize("num_images", [1, 5, 12, 50])
def test_advice_about_the_batch_can_be_followed(num_images):
    (text,) = warnings_of(num_images, 64)
    advised = int(re.search(r"has about (\d+) image", text)[1])
    assert advised <= num_images
    assert not any("lower" in text for text in warnings_of(num_images, advised, lr=1e-3))


def test_the_rate_is_named_once():
    assert len(warnings_of(12, 32)) == 1


def test_epochs_of_few_steps_are_warned_of():
    (text,) = warnings_of(512, 512, epochs=800)
    assert text.startswith("an epoch of 512 images has only 1 step: lower --batch_size")
    assert warnings_of(5 * 512, 512) == []


def test_a_rate_scaled_down_for_a_tiny_batch_is_warned_of():
    (text,) = warnings_of(200, 20)
    assert text.startswith("lr 3.9e-05 is scaled down for 20 images a step")
    assert text.endswith("--lr 0.001")
    assert warnings_of(200, 20, lr=1e-3) == []


def test_a_warm_up_that_takes_most_of_a_run_is_warned_of():
    assert warnings_of(6300, 64, epochs=20, warmup=15) == [
        "1485 of 1980 steps are warm-up of the learning rate: lower --warmup_epochs"
    ]
    assert "every step is warm-up of the learning rate: lower --warmup_epochs" in warnings_of(
        64, 64, epochs=1, warmup=0.9
    )
    assert warnings_of(6300, 64, epochs=20, warmup=10) == []


def test_runs_that_count_steps_are_warned_of_their_own_flags():
    optim = IterationSettings(batch_size=16, max_iters=100, lr=1e-4, warmup_iters=80).optim()
    steps = SimpleNamespace(effective_batch_size=16, steps_per_epoch=10)
    lr = plan_learning_rate(optim, steps, curve=step_lr)
    assert odd_settings(optim, steps, lr, 10, in_steps=True) == [
        "a step of 16 images is more than the 10 training images: lower --batch_size, so that a "
        "step has about 8 images",
        "80 of 100 steps are warm-up of the learning rate: lower --warmup_iters",
    ]
