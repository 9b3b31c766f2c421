"""The training loop and what it measures, on models that take milliseconds a step."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits

import engine_pretrain
from engine_pretrain import step_noise
from tests.helpers.files import write_images
from tests.helpers.models import crossmae_nano, mae_nano
from tests.helpers.training import (
    CPU,
    IMG_SIZE,
    MASKING,
    NUM_PATCHES,
    HostReads,
    Recorder,
    make_loader,
    make_state,
    prepared,
    train,
)
from util.compute.distributed import data_parallel, stop_processes
from util.data.batch import Batch, Normalization
from util.errors import InputError, NonFiniteLossError
from util.masking import count_tokens, random_split
from util.runs.checkpoint import Progress
from util.runs.meters import EpochMeters


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 41 images."""
    return write_images(tmp_path_factory.mktemp("images"), 41)


VARIANTS = {
    "crossmae, a third predicted": (crossmae_nano, 0.25),
    "crossmae, all predicted": (crossmae_nano, None),
    "crossmae without inter-block attention": (partial(crossmae_nano, feature_maps="last"), 0.25),
    "crossmae with self-attention": (partial(crossmae_nano, decoder_self_attention=True), 0.25),
    "mae": (mae_nano, None),
    "mae with inter-block attention": (partial(mae_nano, feature_maps="all"), None),
}
variants = pytest.mark.parametrize(("build", "gamma"), VARIANTS.values(), ids=VARIANTS.keys())


# Training


@variants
def test_an_epoch_changes_every_trained_weight_and_no_other(images, build, gamma):
    model = build()
    before = copy.deepcopy(model.state_dict())
    state = make_state(model)
    stats = train(model, make_loader(images), state, gamma=gamma)
    assert 0 < stats["loss"] < 10
    assert state.progress == Progress(epoch=1, step_in_epoch=0, step=6)
    changed = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("build", "gamma"), [(crossmae_nano, 0.25), (mae_nano, None)])
def test_a_handful_of_digits_can_be_learned_by_heart(build, gamma):
    digits = torch.from_numpy(load_digits().images[:4]).float() / 8 - 1
    digits = torch.nn.functional.interpolate(digits.unsqueeze(1), IMG_SIZE).expand(-1, 3, -1, -1)
    without_looking = (digits - digits.mean(dim=0)).square().mean()  # loss of their mean
    model = build(norm_pix_loss=False)
    loader, recorder = prepared(600, batch_size=16, pixels=digits.repeat(4, 1, 1, 1)), Recorder()
    train(model, loader, make_state(model), gamma=gamma, lr=3e-3, log_every=50, recorder=recorder)
    first, *_, last = [stats["loss"] for stats in recorder.stats]
    assert last < first / 3
    assert last < 0.6 * without_looking


def test_log_points_have_the_rate_and_the_images_since_the_last(images):
    recorder = Recorder()
    model = crossmae_nano()
    stats = train(
        model,
        make_loader(images),
        make_state(model),
        log_every=4,
        lr=lambda step: step / 100,
        recorder=recorder,
    )
    assert recorder.started == (0, 0)
    assert recorder.steps == [(4, 0, 0.03, 32), (6, 0, 0.05, 9)]  # steps, epoch, rate, images
    assert stats["lr"] == 0.05
    mean = (32 * recorder.stats[0]["loss"] + 9 * recorder.stats[1]["loss"]) / 41
    assert stats["loss"] == pytest.approx(mean)
    assert stats["broken_images"] == 0


# The large batch in parts


def epoch_with_sgd(images, build, gamma, **options):
    """Weights and metrics after an epoch; without Adam's division rounding stays rounding."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0)
    state = make_state(model, optimizer=optimizer)
    stats = train(model, make_loader(images, **options), state, gamma=gamma, lr=0.1)
    return model.state_dict(), stats


@variants
@pytest.mark.parametrize("parts", [(8, 2), (5, 3), (1, 16)])
def test_accumulation_equals_the_large_batch(images, build, gamma, parts):
    # 41 images: a last step of 9 after two of 16, of 11 after two of 15.
    batch_size, accum_iter = parts
    weights, stats = epoch_with_sgd(
        images, build, gamma, batch_size=batch_size, accum_iter=accum_iter
    )
    expected, expected_stats = epoch_with_sgd(
        images, build, gamma, batch_size=batch_size * accum_iter
    )
    assert stats == pytest.approx(expected_stats, rel=1e-5)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=2e-6)


def noise_of(num_images, num_crops=1, *, step=7, seed=3):
    masking = replace(MASKING[None], seed=seed)
    return step_noise(masking, step, num_images, num_crops, CPU)


def test_every_process_draws_its_rows_of_the_same_noise(monkeypatch):
    whole = noise_of(7)
    assert whole.shape == (7, NUM_PATCHES)
    monkeypatch.setattr(engine_pretrain, "world_size", lambda: 3)
    for rank, rows in enumerate(([0, 3, 6], [1, 4], [2, 5])):
        monkeypatch.setattr(engine_pretrain, "rank", lambda rank=rank: rank)
        assert torch.equal(noise_of(7), whole[rows])
    # With two images, the third process has noise for its stand-in.
    assert noise_of(2).shape == (1, NUM_PATCHES)


def test_an_images_crops_have_their_masks_on_the_process_that_reads_it(monkeypatch):
    whole = noise_of(14, 2)  # of seven images
    assert torch.equal(whole, noise_of(14))
    monkeypatch.setattr(engine_pretrain, "world_size", lambda: 3)
    for rank, images in enumerate(([0, 3, 6], [1, 4], [2, 5])):
        monkeypatch.setattr(engine_pretrain, "rank", lambda rank=rank: rank)
        rows = [2 * image + crop for image in images for crop in range(2)]
        assert torch.equal(noise_of(14, 2), whole[rows])
    assert noise_of(4, 2).shape == (2, NUM_PATCHES)  # a stand-in's


def test_masks_differ_between_images_steps_and_seeds():
    rows = [row for seed in (0, 1) for step in (0, 1) for row in noise_of(2, step=step, seed=seed)]
    splits = [MASKING[None].split(row.unsqueeze(0)) for row in rows]
    assert len({tuple(split.visible[0].tolist()) for split in splits}) == 8


@pytest.fixture
def process_group():
    """A group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    stop_processes()


@pytest.mark.parametrize("accum_iter", [1, 3])
def test_gradients_are_reduced_once_a_step(process_group, images, accum_iter):
    reduced = []

    def hook(_, bucket):
        reduced.append(bucket.is_last())
        return (
            dist.all_reduce(bucket.buffer(), async_op=True)
            .get_future()
            .then(lambda f: f.value()[0])
        )

    model = crossmae_nano()  # small enough for one bucket of gradients
    parallel_model = data_parallel(model, CPU)
    parallel_model.register_comm_hook(None, hook)
    loader = make_loader(images, batch_size=4, accum_iter=accum_iter)
    train(parallel_model, loader, make_state(model))
    assert reduced == [True] * loader.steps_per_epoch


# Waiting for the device


def host_reads(monkeypatch, build=crossmae_nano, lr=1e-3, log_every=3, **options):
    """What the host reads from the device in seven steps of which two are log points."""
    model = build()
    state, loader = make_state(model, **options), prepared(7, num_micro_batches=2)
    with monkeypatch.context() as patch, HostReads(patch) as reads:
        read = EpochMeters.read

        def read_uncounted(meters):
            num_found = len(reads.found)
            stats = read(meters)
            assert len(reads.found) > num_found
            del reads.found[num_found:]
            return stats

        patch.setattr(EpochMeters, "read", read_uncounted)
        train(model, loader, state, lr=lr, log_every=log_every)
    return reads.found


@pytest.mark.parametrize("build", [crossmae_nano, mae_nano])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("amp", ["fp32", "bf16", "fp16"])
def test_the_host_waits_for_the_device_at_log_points_only(monkeypatch, build, amp, clip_grad):
    assert host_reads(monkeypatch, build, amp=amp, clip_grad=clip_grad) == []


@pytest.mark.parametrize(
    "wait", [lambda x: x.item(), float, bool, lambda x: x.tolist(), lambda x: x[x > 0]]
)
def test_a_planted_wait_is_found(monkeypatch, wait):
    def rate(step):
        wait(torch.ones(2).sum())
        return 1e-3

    assert len(host_reads(monkeypatch, lr=rate)) >= 7


# What goes wrong


def nan_after(num_calls, model):
    """Let the model's loss be NaN once it was called so often."""
    calls = iter(range(10**6))
    forward = model.forward
    model.forward = lambda *x: forward(*x) * (1.0 if next(calls) < num_calls else math.nan)
    return model


@pytest.mark.parametrize(("num_good", "log_every"), [(0, 1), (2, 4), (5, 4), (6, 100)])
def test_a_loss_that_is_not_finite_ends_the_epoch_before_anything_is_saved(num_good, log_every):
    saved_after = []
    model = nan_after(num_good, crossmae_nano())
    state = make_state(model)
    recorder = Recorder(lambda: saved_after.append(state.progress.step))
    with pytest.raises(NonFiniteLossError, match=rf"step {num_good + 1} of"):
        train(model, prepared(7), state, log_every=log_every, recorder=recorder)
    assert all(step <= num_good for step in saved_after)
    assert len(recorder.steps) == num_good // log_every  # nor is anything logged


def test_fp16_goes_on_after_a_skipped_step_and_its_epoch_has_a_gradient_norm():
    model = crossmae_nano()
    state = make_state(model, amp="fp16")
    state.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    recorder = Recorder()
    stats = train(model, prepared(60), state, log_every=10, recorder=recorder)
    assert 1 < state.precision.scaler.get_scale() < 2.0**40
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert 0 < recorder.stats[-1]["grad_norm"] < 100
    assert 0 < stats["grad_norm"] < 100


def test_broken_images_are_counted_and_end_the_run_above_the_limit():
    broken = [("a.png", "empty")]
    model = crossmae_nano()
    stats = train(model, prepared(7, broken=broken), make_state(model, max_broken=0.01))
    assert stats["broken_images"] == 7
    with pytest.raises(InputError, match=r"a\.png"):
        train(model, prepared(7, broken=broken), make_state(model))


def test_raw_images_train_as_normalized_ones_to_the_bit():
    pixels = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    flips = torch.tensor([True, False, False, True])
    normalization = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    batch = Batch(pixels, torch.zeros(4), [], flips, normalization)
    split = random_split(torch.rand(4, 16), count_tokens(16, 0.75, 0.5))
    model, results = crossmae_nano(), []
    for images in (batch.to(CPU)[0], batch.raw(CPU)):
        model.zero_grad()
        loss = model(images, split)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(map(torch.equal, *results))
