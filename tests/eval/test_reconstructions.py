"""Quality of reconstructions against the formulas, and against torchmetrics image by image."""

import math
from functools import partial

import pytest
import torch

from tests.helpers.models import crossmae_nano, mae_nano
from tests.helpers.training import MASKING, MEAN, STD
from util.eval.reconstructions import psnr, reconstruction_scores
from util.patches import patchify

COLORS = MEAN, STD
MODELS = {
    "crossmae": crossmae_nano,
    "self_attention": partial(crossmae_nano, decoder_self_attention=True),
    "mae": mae_nano,
}
every_model = pytest.mark.parametrize("name", MODELS)
normalized_or_not = pytest.mark.parametrize("norm_pix_loss", [True, False])


def draw(num_images=5):
    """Images with pixels from 0 to 1 before their normalization, and a split."""
    whole = torch.rand(num_images, 3, 16, 16)
    images = (whole - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return whole, images, MASKING[None].full_split(torch.rand(num_images, 16))


def test_psnr_of_known_differences():
    originals = 0.2 + 0.6 * torch.rand(4, 12, 48)
    differences = torch.tensor([0, 0.1, -0.1, 0.01]).view(4, 1, 1)
    torch.testing.assert_close(
        psnr(originals + differences, originals), torch.tensor([100.0, 20, 20, 40])
    )


def test_psnr_is_that_of_clipped_pixels_and_at_most_100():
    originals = (torch.rand(3, 12, 48) > 0.5).float()
    assert psnr(5 * originals - 2, originals).tolist() == pytest.approx([100] * 3)
    assert psnr(originals + 1e-9, originals).tolist() == pytest.approx([100] * 3)
    assert psnr(2 - 5 * originals, originals).tolist() == pytest.approx([0] * 3, abs=1e-6)


@every_model
@normalized_or_not
@torch.no_grad()
def test_scores_are_those_of_the_drawn_images(name, norm_pix_loss):
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim_of

    model = MODELS[name](norm_pix_loss=norm_pix_loss).eval()
    whole, images, split = draw()
    quality, similarity = reconstruction_scores(model, images, split, COLORS)
    preds = model.predict(images, split)
    for i, ids in enumerate(split.predicted):
        patches, pixels = patchify(images[i : i + 1], 4)[0], preds[i]
        if norm_pix_loss:
            mean, variance = patches[ids].mean(1, keepdim=True), patches[ids].var(1, keepdim=True)
            pixels = pixels * (variance + 1e-6) ** 0.5 + mean
        pixels = pixels.view(-1, 4, 4, 3) * torch.tensor(STD) + torch.tensor(MEAN)
        drawn = whole[i].clone()
        for patch, place in zip(pixels.clamp(0, 1), ids.tolist(), strict=True):
            row, column = 4 * (place // 4), 4 * (place % 4)
            drawn[:, row : row + 4, column : column + 4] = patch.permute(2, 0, 1)
        error = ((drawn - whole[i]) ** 2).sum() / (12 * 4 * 4 * 3)  # visible pixels add nothing
        assert quality[i].item() == pytest.approx(10 * math.log10(1 / error), rel=1e-4)
        expected = ssim_of(drawn[None], whole[i : i + 1], data_range=1.0)
        assert similarity[i].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)


@every_model
@normalized_or_not
def test_a_perfect_prediction_has_the_highest_scores(name, norm_pix_loss):
    model = MODELS[name](norm_pix_loss=norm_pix_loss)
    model.predict = model.target
    quality, similarity = reconstruction_scores(model, *draw()[1:], COLORS)
    assert quality.tolist() == pytest.approx([100] * 5)
    assert similarity.tolist() == pytest.approx([1] * 5, abs=1e-5)


@every_model
def test_an_image_has_the_same_scores_alone(name):
    model, (_, images, split) = MODELS[name]().eval(), draw()
    scores = reconstruction_scores(model, images, split, COLORS)
    assert [score.shape for score in scores] == [(5,), (5,)]
    for i in range(5):
        own = type(split)(*(ids[i : i + 1] for ids in split))
        alone = reconstruction_scores(model, images[i : i + 1], own, COLORS)
        for one, many in zip(alone, scores, strict=True):
            torch.testing.assert_close(one, many[i : i + 1], rtol=1e-5, atol=1e-6)
