"""The loop over steps, with a model of one weight per pixel; see also the engines' tests."""

import pytest
import torch

from tests.helpers.training import CPU, PreparedLoader, Recorder, make_state
from util.data.batch import Batch
from util.optim import build_adamw, build_ema
from util.runs import training
from util.runs.training import training_steps

NUM_PIXELS, NUM_CLASSES = 12, 3


def make_model():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(NUM_PIXELS, NUM_CLASSES))


def sgd_state(model):
    """State with SGD without momentum, so that a step shows its gradient."""
    return make_state(model, optimizer=torch.optim.SGD(model.parameters(), lr=0))


def make_loader(*steps):
    """Loader of random images in micro-batches of these sizes, step by step."""
    return PreparedLoader(
        [
            [Batch(torch.randn(n, 3, 2, 2), torch.arange(n) % NUM_CLASSES, []) for n in sizes]
            for sizes in steps
        ]
    )


def errors_of(model, batch):
    """Each image's loss."""
    return torch.nn.functional.cross_entropy(model(batch.images), batch.labels, reduction="none")


def train(model, loader, state, *, seen=None, lr=0.1, **options):
    """Train one epoch; `seen` collects the position of each micro-batch."""
    seen, recorder = [] if seen is None else seen, Recorder()
    usual = {"log_every": 100, "run_log": recorder, "checkpoints": recorder, "device": CPU}
    for step in training_steps(model, loader, state, lr_at=lambda _: lr, **usual | options):
        for batch, rows in step.micro_batches():
            seen.append((step.number, step.num_images, len(batch.images), rows))
            step.backward(errors_of(model, batch).mean())
    return state.end_epoch()


def test_a_micro_batch_knows_its_position_in_the_step():
    model, seen = make_model(), []
    state = sgd_state(model)
    state.progress.step, state.progress.epoch = 20, 2
    train(model, make_loader((4, 4), (2, 1)), state, seen=seen)
    # Step in the run, images in the step and the micro-batch, slice of the process's images.
    first, second = [(20, 8, 4, slice(0, 4)), (20, 8, 4, slice(4, 8))]
    assert seen == [first, second, (21, 3, 2, slice(0, 2)), (21, 3, 1, slice(2, 3))]


@pytest.mark.parametrize("sizes", [(5,), (4, 1), (1, 2, 2)])
def test_every_image_of_a_step_has_the_same_weight(sizes):
    model = make_model()
    loader = make_loader(sizes)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    errors = torch.cat([errors_of(model, batch) for batch in loader.prepared[0]])
    gradients = torch.autograd.grad(errors.mean(), list(model.parameters()))
    stats = train(model, loader, sgd_state(model))
    assert stats["loss"] == pytest.approx(errors.mean().item(), rel=1e-6)
    for parameter, weight, gradient in zip(model.parameters(), before, gradients, strict=True):
        torch.testing.assert_close(parameter.detach(), weight - 0.1 * gradient)


def test_padding_of_a_process_without_images_has_zero_weight(monkeypatch):
    model, loader = make_model(), make_loader((1,))
    before = model[1].weight.detach().clone()
    for rank, weighs in ((1, False), (0, True)):  # two processes with one image
        monkeypatch.setattr(training, "rank", lambda rank=rank: rank)
        train(model, loader, sgd_state(model))
        assert torch.equal(model[1].weight, before) != weighs


def test_padding_has_zero_weight_for_any_number_of_crops(monkeypatch):
    model, loader = make_model(), make_loader((4,))
    loader.num_crops = 4  # of one image, on the first of two processes
    before = model[1].weight.detach().clone()
    for rank, weighs in ((1, False), (0, True)):
        monkeypatch.setattr(training, "rank", lambda rank=rank: rank)
        train(model, loader, sgd_state(model))
        assert torch.equal(model[1].weight, before) != weighs


def test_log_points_are_the_same_steps_of_every_epoch():
    model, recorder = make_model(), Recorder()
    state = sgd_state(model)
    for _ in range(2):
        loader = make_loader(*[(2,)] * 5)
        train(model, loader, state, log_every=3, run_log=recorder, checkpoints=recorder)
    assert [step for step, *_ in recorder.steps] == [3, 5, 8, 10]


def test_the_moving_average_equals_its_formula():
    model = make_model()
    state = make_state(model, optimizer=build_adamw(model, weight_decay=0.0, betas=(0.9, 0.95)))
    state.ema = build_ema(model, decay=0.25, num_steps=1)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    loader = make_loader(*[(3, 2)] * 5)
    for number, step in enumerate(loader.prepared):
        train(model, PreparedLoader([step]), state)
        decay = min(0.25, number / (number + 9))  # 0 after the first step, which forgets the start
        for name, weight in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * weight
        torch.testing.assert_close(state.ema.module.state_dict(), expected)
    assert not torch.allclose(expected["1.weight"], model[1].weight)


def test_labels_are_not_read():
    model, loader = make_model(), make_loader((4,))
    loader.prepared[0][0].labels[2] = -100  # cross-entropy ignores it
    train(model, loader, sgd_state(model))


@pytest.mark.parametrize(
    ("seconds", "log_every", "checks"),
    [
        (60.0, 1000, range(1, 12)),  # after every step
        (2.0, 1000, [1, 3, 5, 7, 9, 11]),
        (0.001, 1000, [1, 21, 41]),  # steps may become slower
        (2.0, 3, [1, 3, 5, 6, 8, 9]),  # log points ask, too
    ],
)
def test_several_processes_ask_each_other_every_few_seconds(
    monkeypatch, seconds, log_every, checks
):
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(training, "world_size", lambda: 2)
    asked, step = [], 0

    def gather(values):
        asked.append(step)
        return [*values, (step == checks[-1], 1e-9)]  # the other's clock does not count

    monkeypatch.setattr(training, "all_gather_objects", gather)
    stops = training.StopChecks()
    for step in range(1, checks[-1] + 1):  # as `gather` reads it
        clock[0] += seconds
        is_log_point = step % log_every == 0
        assert stops.requested(is_log_point=is_log_point) == (step == checks[-1])
    assert asked == list(checks)
