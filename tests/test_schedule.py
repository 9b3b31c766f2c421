"""The learning rate."""

import math

import pytest

from util.schedule import cosine_lr, scaled_lr

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
