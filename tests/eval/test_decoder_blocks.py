"""Levels of a decoder: they sum to its prediction, and their spectra to its energy."""

from functools import partial

import numpy as np
import pytest
import scipy.fft
import torch

from tests.helpers.files import write_images
from tests.helpers.models import AUTOENCODERS, noisy
from tests.helpers.training import CPU, IMG_SIZE, MASKING, MEAN, STD
from util.compute.precision import Precision
from util.data.broken_images import BrokenImages
from util.data.datasets import build_dataset
from util.data.loaders import build_eval_loader
from util.data.transforms import eval_transform
from util.eval.decoder_blocks import (
    block_levels,
    cosine_transform,
    frequency_bands,
    level_pixels,
    measure_blocks,
)
from util.eval.monitor import evaluate, masked_batches
from util.eval.reconstructions import predicted_pixels
from util.masking import TokenSplit

COLORS = MEAN, STD
every_model = pytest.mark.parametrize("name", AUTOENCODERS)
normalized_or_not = pytest.mark.parametrize("norm_pix_loss", [True, False])
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def draw(num_images=5, dtype=torch.float64):
    images = torch.randn(num_images, 3, 16, 16, dtype=dtype)
    return images, MASKING[None].full_split(torch.rand(num_images, 16))


def silence(block):
    """Make a decoder block add nothing."""
    layers = ("attn", "self_attn", "cross_attn")
    own = [layer for n in layers if (layer := getattr(block, n, None)) is not None]
    for linear in (*[layer.proj for layer in own], block.mlp.fc2):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)


@every_model
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_levels_sum_to_the_prediction(name, dtype, error):
    model, batch = noisy(name, dtype, decoder_depth=3), draw(dtype=dtype)
    levels, pred = block_levels(model, *batch), model.predict(*batch).detach()
    assert levels.shape == (4, *pred.shape)
    difference = (levels.sum(dim=0) - pred).abs().amax()
    assert difference < error * pred.abs().amax()


@every_model
def test_a_block_that_adds_nothing_has_an_empty_level(name):
    model, batch = noisy(name, decoder_depth=3), draw()
    assert all(level.abs().amax() > 0.01 for level in block_levels(model, *batch))
    for block, others in ((1, [0, 1, 3]), (0, [0, 3]), (2, [0])):
        silence(model.decoder.blocks[block])
        levels = block_levels(model, *batch)
        assert (levels[1 + block] == 0).all()
        close(levels[others].sum(dim=0), model.predict(*batch).detach())


@every_model
@normalized_or_not
def test_pixels_of_levels_sum_to_predicted_pixels(name, norm_pix_loss):
    model, batch = noisy(name, decoder_depth=3, norm_pix_loss=norm_pix_loss), draw()
    pixels, offset = level_pixels(model, block_levels(model, *batch), *batch, COLORS)
    pred = model.predict(*batch).detach()
    close(offset + pixels.sum(dim=0), predicted_pixels(model, pred, *batch, COLORS))


@pytest.mark.parametrize("size", [2, 4, 16])
def test_the_transform_is_the_orthonormal_one_of_scipy(size):
    patches = torch.randn(3, 5, size * size * 3, dtype=torch.float64)
    spectrum = cosine_transform(patches, size)
    grid = patches.view(3, 5, size, size, 3).numpy()
    expected = scipy.fft.dctn(grid, type=2, norm="ortho", axes=(2, 3))
    close(spectrum, torch.from_numpy(expected))
    close(spectrum.square().sum(dim=(2, 3, 4)), patches.square().sum(dim=2))


def by_band(patch, size):
    energy = cosine_transform(patch.double().flatten(), size).square().sum(dim=2).flatten()
    return torch.zeros(size).double().index_add(0, frequency_bands(size).flatten(), energy)


@pytest.mark.parametrize("size", [4, 14, 16])
def test_flat_patches_are_band_zero_and_checkerboards_details(size):
    flat = by_band(torch.tensor([0.2, 0.5, 0.9]).expand(size, size, 3), size)
    close(flat[1:] / flat[0], torch.zeros(size - 1).double())
    places = torch.arange(size)
    signs = (-1.0) ** (places[:, None] + places)
    checkered = by_band(signs[..., None].expand(-1, -1, 3), size)
    assert checkered[size // 2 :].sum() > 0.9 * checkered.sum()


@pytest.mark.parametrize("cycles", [0.5, 1, 3, 7.5])
def test_waves_are_in_the_band_of_their_cycles(cycles):
    wave = torch.cos(2 * np.pi * cycles * (torch.arange(16).double() + 0.5) / 16)
    for axis in (0, 1):
        grid = wave.view(-1, *[1] * (2 - axis)).expand(16, 16, 3)
        energy = by_band(grid, 16)
        close(energy[int(2 * cycles)], energy.sum())


def spectra_of(pixels):
    """Spectrum of every patch (..., 48), by scipy."""
    grid = pixels.unflatten(-1, (4, 4, 3)).numpy()
    return scipy.fft.dctn(grid, type=2, norm="ortho", axes=(-3, -2))


@every_model
@normalized_or_not
def test_energies_and_shares_are_those_of_the_pixels(name, norm_pix_loss):
    model, batch = noisy(name, decoder_depth=3, norm_pix_loss=norm_pix_loss), draw()
    blocks = measure_blocks(model, [batch], COLORS)
    pixels, offset = level_pixels(model, block_levels(model, *batch), *batch, COLORS)
    close(blocks.energy.sum(dim=1), pixels.square().mean(dim=(1, 2, 3)))  # Parseval

    # The whole, from the prediction and not from the levels.
    whole = predicted_pixels(model, model.predict(*batch).detach(), *batch, COLORS) - offset
    close(blocks.projection.sum(), whole.square().mean())
    spectrum = spectra_of(whole)
    for band, energy in enumerate(blocks.projection.sum(dim=0)):
        places = [(u, v) for u in range(4) for v in range(4) if max(u, v) == band]
        expected = sum((spectrum[:, :, u, v] ** 2).sum() for u, v in places) / whole.numel()
        assert energy.item() == pytest.approx(expected, rel=1e-10)
    close(blocks.projection.sum(dim=1), (pixels * whole).mean(dim=(1, 2, 3)))
    for shares in (blocks.share, blocks.low_share, blocks.high_share):
        assert shares.sum().item() == pytest.approx(1, rel=1e-12)
    low = (spectrum[:, :, :2, :2] ** 2).sum() / (spectrum**2).sum()
    close(low * blocks.low_share + (1 - low) * blocks.high_share, blocks.share)
    close(blocks.detail, blocks.energy[:, 2:].sum(dim=1) / blocks.energy.sum(dim=1))


@pytest.mark.parametrize("name", ["crossmae", "self_attention", "mae"])
def test_batch_size_changes_nothing(name):
    model, (images, split) = noisy(name, decoder_depth=3), draw(7)
    whole = measure_blocks(model, [(images, split)], COLORS)
    for size in (1, 3):
        parts = zip(images.split(size), *(ids.split(size) for ids in split), strict=True)
        batches = [(x, TokenSplit(*ids)) for x, *ids in parts]
        close(tuple(measure_blocks(model, batches, COLORS)), tuple(whole))


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """Batches of 4, 4 and 3 images."""
    folder = write_images(tmp_path_factory.mktemp("images"), 11)
    transform = eval_transform(IMG_SIZE, MEAN, STD)
    dataset = build_dataset("folder", folder, split="train", transform=transform, seed=0)
    share = {"rank": 0, "world_size": 1, "num_workers": 0, "device": CPU}
    return build_eval_loader(dataset, batch_size=4, **share)


@every_model
@normalized_or_not
def test_the_last_psnr_is_that_of_evaluation(name, norm_pix_loss, loader):
    model = noisy(name, torch.float32, decoder_depth=3, norm_pix_loss=norm_pix_loss)
    batches = masked_batches(loader, MASKING[0.25], CPU, BrokenImages(0, 1.0))
    quality = measure_blocks(model, batches, COLORS).psnr
    options = {"masking": MASKING[0.25], "mean": MEAN, "std": STD}
    stats = evaluate(model, loader, **options, precision=Precision("fp32", CPU))
    assert quality.shape == (4,)
    assert quality[-1].item() == pytest.approx(stats["val_psnr"], rel=1e-6)


def test_psnr_of_blocks_that_add_nothing_is_that_of_the_input(loader):
    model = noisy("crossmae", torch.float32, decoder_depth=3)
    for block in model.decoder.blocks[1:]:
        silence(block)
    batches = masked_batches(loader, MASKING[0.25], CPU, BrokenImages(0, 1.0))
    quality = measure_blocks(model, batches, COLORS).psnr
    assert quality[0] != quality[1]
    assert (quality[1:] == quality[1]).all()
