"""Evaluation and figures of validation images, with models that take milliseconds."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from tests.helpers.files import write_images
from tests.helpers.models import crossmae_nano, mae_nano
from tests.helpers.training import (
    CPU,
    IMG_SIZE,
    MASKING,
    MEAN,
    NUM_PATCHES,
    STD,
    make_loader,
    make_state,
    train,
)
from util.compute.precision import Precision
from util.data.datasets import build_dataset
from util.data.loaders import build_eval_loader
from util.data.transforms import eval_transform
from util.eval import figures, monitor
from util.eval.figures import draw_reconstructions
from util.eval.monitor import evaluate, is_picture_due, val_split
from util.eval.reconstructions import blind_prediction
from util.patches import patchify, unpatchify


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 41 images."""
    return write_images(tmp_path_factory.mktemp("images"), 41)


def make_eval_loader(images, batch_size=8, rank=0, world_size=1):
    transform = eval_transform(IMG_SIZE, MEAN, STD)
    dataset = build_dataset("folder", images, split="train", transform=transform, seed=0)
    share = {"rank": rank, "world_size": world_size, "num_workers": 0, "device": CPU}
    return build_eval_loader(dataset, batch_size=batch_size, **share)


def measure(model, loader, seed=0, amp="fp32"):
    return evaluate(
        model,
        loader,
        masking=replace(MASKING[0.25], seed=seed),
        mean=MEAN,
        std=STD,
        precision=Precision(amp, CPU),
    )


def restored(images):
    """Convert pixels back to [0, 1]."""
    return images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


@pytest.mark.parametrize("build", [crossmae_nano, mae_nano])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_evaluation_equals_the_formulas_written_out(images, build, norm_pix_loss):
    model = build(norm_pix_loss=norm_pix_loss)
    all_images = torch.cat([batch.to(CPU)[0] for batch in make_eval_loader(images)])
    losses, psnrs, blind_losses, blind_psnrs = [], [], [], []
    for index, image in enumerate(all_images.unsqueeze(1)):
        split = val_split(MASKING[0.25], [index], CPU)
        ids = split.predicted[0]
        pred = model.predict(image, split)[0].detach()  # (P, p*p*C)
        patches = patchify(image, 4)[0, ids]
        target = patches
        if norm_pix_loss:
            mean = patches.mean(dim=1, keepdim=True)
            deviation = (patches.var(dim=1, keepdim=True) + 1e-6) ** 0.5
            target = (patches - mean) / deviation
        losses.append(((pred - target) ** 2).mean())
        visible = patchify(image, 4)[0, split.visible[0]].view(-1, 3)
        blind = torch.zeros_like(pred) if norm_pix_loss else visible.mean(dim=0).repeat(16)
        blind_losses.append(((blind - target) ** 2).mean())

        # Put the predictions into the image, and compare masked pixels.
        for values, found in ((pred, psnrs), (blind, blind_psnrs)):
            canvas = patchify(image, 4)[0]
            canvas[ids] = values * deviation + mean if norm_pix_loss else values
            canvas = canvas.view(4, 4, 4, 4, 3).permute(4, 0, 2, 1, 3).reshape(3, 16, 16)
            difference = restored(canvas).clamp(0, 1) - restored(image[0])
            error = (difference**2).sum() / (len(ids) * 4 * 4 * 3)
            found.append(10 * math.log10(1 / error))
    assert measure(model, make_eval_loader(images)) == {
        "val_loss": pytest.approx(sum(losses).item() / 41, rel=1e-4),
        "val_psnr": pytest.approx(sum(psnrs) / 41, rel=1e-4),
        "blind_loss": pytest.approx(sum(blind_losses).item() / 41, rel=1e-4),
        "blind_psnr": pytest.approx(sum(blind_psnrs) / 41, rel=1e-4),
        "val_images": 41,
    }


def test_batch_size_changes_nothing_and_the_seed_does(images):
    model = crossmae_nano()
    expected = measure(model, make_eval_loader(images, batch_size=8))
    for batch_size in (1, 5, 64):
        got = measure(model, make_eval_loader(images, batch_size=batch_size))
        assert got == pytest.approx(expected, rel=1e-5)
    assert measure(model, make_eval_loader(images))["val_loss"] == expected["val_loss"]
    other = measure(model, make_eval_loader(images), seed=1)
    assert other["val_loss"] != pytest.approx(expected["val_loss"], rel=1e-4)


@pytest.mark.parametrize("world_size", [2, 3, 64])
def test_processes_count_each_image_once(images, monkeypatch, world_size):
    model = crossmae_nano()
    expected = measure(model, make_eval_loader(images))
    sums = []

    def keep(values):
        sums.append(values)
        return torch.ones(1, 5)

    monkeypatch.setattr(monitor, "world_size", lambda: world_size)
    monkeypatch.setattr(monitor, "all_gather", keep)
    for rank in range(world_size):
        monkeypatch.setattr(monitor, "rank", lambda rank=rank: rank)
        measure(model, make_eval_loader(images, 8, rank, world_size))
    *totals, num_images = torch.stack(sums).sum(dim=0).tolist()
    assert num_images == 41
    means = [expected[name] for name in ("val_loss", "val_psnr", "blind_loss", "blind_psnr")]
    assert [total / 41 for total in totals] == pytest.approx(means, rel=1e-5)


def test_a_perfect_prediction_has_zero_loss_and_the_highest_psnr(images):
    model = crossmae_nano()
    model.predict = model.target
    stats = measure(model, make_eval_loader(images))
    assert stats["val_loss"] == 0
    assert stats["val_psnr"] == pytest.approx(100)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_only_a_trained_model_is_better_than_a_prediction_that_knows_nothing(images, norm_pix_loss):
    model, loader = crossmae_nano(norm_pix_loss=norm_pix_loss), make_loader(images)
    state, val_loader = make_state(model), make_eval_loader(images)
    untrained = measure(model, val_loader)
    assert untrained["val_loss"] > 0.95 * untrained["blind_loss"]
    assert untrained["val_psnr"] < untrained["blind_psnr"] + 0.2
    for _ in range(5):
        train(model, loader, state, gamma=None, lr=3e-3)
    trained = measure(model, val_loader)
    for name in ("blind_loss", "blind_psnr", "val_images"):
        assert trained[name] == untrained[name]
    assert trained["val_loss"] < 0.85 * trained["blind_loss"]
    assert trained["val_psnr"] > trained["blind_psnr"] + 0.5


def test_a_blind_prediction_sees_no_masked_pixel(images):
    model = crossmae_nano(norm_pix_loss=False)
    batch, _ = next(iter(make_eval_loader(images, batch_size=3))).to(CPU)
    split = val_split(MASKING[0.25], range(3), CPU)
    patches = patchify(batch, 4)
    other = patches.clone()
    for i, ids in enumerate(split.predicted):
        other[i, ids] = -5.0
    expected = blind_prediction(model, batch, split)
    assert torch.equal(blind_prediction(model, unpatchify(other, 4, (4, 4)), split), expected)


def test_evaluation_leaves_the_model_and_the_random_state_as_they_were(images):
    model = crossmae_nano()
    weights, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    measure(model, make_eval_loader(images), amp="bf16")
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


# Figures


@pytest.mark.parametrize("build", [crossmae_nano, mae_nano])
def test_figures_decode_every_masked_patch(images, build, monkeypatch):
    model = build()
    if build is crossmae_nano:
        train(model, make_loader(images), make_state(model), gamma=0.25)
    batch, _ = next(iter(make_eval_loader(images, batch_size=3))).to(CPU)
    split = val_split(MASKING[0.25], range(3), CPU)
    seen = []
    panels = figures.reconstruction_panels

    def keep(*inputs):
        seen.extend(panels(*inputs))
        return seen

    monkeypatch.setattr(figures, "reconstruction_panels", keep)
    precision = Precision("fp32", CPU)
    colors = {"mean": MEAN, "std": STD}
    figure = draw_reconstructions(model, batch, split, **colors, precision=precision, name="")
    assert figure.dtype == "uint8"
    assert figure.ndim == 3
    original, masked, reconstruction, whole = (patchify(panel, 4) for panel in seen)
    torch.testing.assert_close(seen[0], restored(batch))
    for i in range(3):
        visible, hidden = split.visible[i], split.predicted[i]
        assert len(visible) + len(hidden) == NUM_PATCHES
        assert (masked[i, hidden] == 0.5).all()
        assert torch.equal(whole[i, visible], original[i, visible])
        assert torch.equal(whole[i, hidden], reconstruction[i, hidden])
        assert (reconstruction[i, hidden] != 0.5).float().mean() > 0.9
    pred = model.pixels(model.predict(batch, split), batch, split).detach()
    pred = pred.view(3, -1, 16, 3) * torch.tensor(STD) + torch.tensor(MEAN)
    for i in range(3):
        torch.testing.assert_close(
            reconstruction[i, split.predicted[i]], pred[i].clamp(0, 1).flatten(1)
        )


def due_epochs(every, last):
    return [epoch for epoch in range(last + 1) if is_picture_due(epoch, every)]


def test_pictures_are_drawn_often_at_first_and_then_rarely():
    assert due_epochs(None, 800) == [0, 1, 2, 5, 10, 20, 50, 100, 200, 500]
    assert is_picture_due(1000, None) and not is_picture_due(1001, None)


def test_pictures_are_drawn_every_so_many_epochs_if_asked():
    assert due_epochs(3, 10) == [0, 3, 6, 9]
    assert due_epochs(1, 3) == [0, 1, 2, 3]
