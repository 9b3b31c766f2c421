import pytest

from tests.helpers.models import NANO, NANO_DECODER, crossmae_nano, mae_nano
from tests.helpers.operations import counted
from util.flops import (
    crossmae_decoder_flops,
    encoder_flops,
    mae_decoder_flops,
    product,
)
from util.masking import count_tokens

BASE = {"encoder_dim": 768, "dim": 512, "patch_dim": 768}
PATCH_DIM = NANO.patch_size**2 * 3
WIDTHS = {"encoder_dim": NANO.embed_dim, "patch_dim": PATCH_DIM}
WIDTHS["dim"] = NANO_DECODER["decoder_embed_dim"]


def encoder_by_formula(counts):
    return encoder_flops(counts.visible, dim=NANO.embed_dim, depth=NANO.depth, patch_dim=PATCH_DIM)


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {"maps": 3}),
        ({"decoder_depth": 1}, {"maps": 3}),
        ({"decoder_depth": 5, "feature_maps": [0, 2]}, {"maps": 2}),
        ({"feature_maps": "last"}, {"maps": 0}),
        ({"decoder_self_attention": True}, {"maps": 3, "self_attends": True}),
        ({"iba_projection": True}, {"maps": 3, "projection": True}),
        ({"iba_softmax": True}, {"maps": 3}),
        ({"decoder_embed_dim": 64}, {"maps": 3, "dim": 64}),
    ],
)
@pytest.mark.parametrize(
    ("img_size", "mask_ratio", "pred_ratio"),
    [(16, 0.75, 0.25), (16, 0.75, 0.75), (24, 0.5, 0.15), ((8, 32), 0.75, 0.5)],
)
def test_crossmae_is_what_pytorch_counts(options, formula, img_size, mask_ratio, pred_ratio):
    model = crossmae_nano(img_size=img_size, **options)
    counts = count_tokens(model.encoder.num_patches, mask_ratio, pred_ratio)
    depth = options.get("decoder_depth", 2)
    decoder = crossmae_decoder_flops(
        counts.visible, counts.predicted, depth=depth, **{**WIDTHS, **formula}
    )
    total, parts = counted(model, counts)
    assert parts == (encoder_by_formula(counts), decoder)
    assert total == parts.total


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {}),
        ({"decoder_depth": 4}, {}),
        ({"feature_maps": "all"}, {"maps": 3}),
        ({"feature_maps": "all", "iba_projection": True}, {"maps": 3, "projection": True}),
    ],
)
@pytest.mark.parametrize(("img_size", "mask_ratio"), [(16, 0.75), (24, 0.6), ((8, 32), 0.9)])
def test_mae_is_what_pytorch_counts(options, formula, img_size, mask_ratio):
    model = mae_nano(img_size=img_size, **options)
    counts = count_tokens(model.encoder.num_patches, mask_ratio, None)
    depth = options.get("decoder_depth", 2)
    decoder = mae_decoder_flops(counts.visible, counts.predicted, depth=depth, **WIDTHS, **formula)
    total, parts = counted(model, counts)
    assert parts == (encoder_by_formula(counts), decoder)
    assert total == parts.total


@pytest.mark.parametrize("build", [crossmae_nano, mae_nano])
def test_training_takes_three_forward_passes_less_the_gradient_of_the_images(build):
    model = build()
    counts = count_tokens(model.encoder.num_patches, 0.75, None)
    _, parts = counted(model, counts)
    total, _ = counted(model, counts, backward=True)
    saved = product(counts.visible, PATCH_DIM, NANO.embed_dim)
    assert total == parts.training - saved
    assert saved < 0.1 * total


def base_decoders(pred_ratio, predicted=None):
    """ViT-B at 224 px: MAE's decoder of 8 blocks, and CrossMAE's of 12."""
    counts = count_tokens(196, 0.75, pred_ratio)
    mae = mae_decoder_flops(counts.visible, counts.masked, depth=8, **BASE)
    crossmae = crossmae_decoder_flops(
        counts.visible, predicted or counts.predicted, depth=12, maps=13, **BASE
    )
    return mae, crossmae


def test_the_decoder_of_mae_takes_2_6_times_that_of_crossmae_25():
    mae, crossmae = base_decoders(0.25)
    assert mae / crossmae == pytest.approx(2.588, abs=5e-4)
    # MAE's own code maps all tokens to pixels, visible ones and the class token too.
    dropped = product(1 + 49, 512, 768)
    assert (mae + dropped) / crossmae == pytest.approx(2.597, abs=5e-4)
    # Without Eq. 1's mix, as 12 x 13 x 50 x 768.
    mix = product(12, 13, 50 * 768)
    assert mae / (crossmae - mix) == pytest.approx(2.595, abs=5e-4)


def test_up_to_3_7_times_lower_is_the_prediction_ratio_of_15_percent():
    """App. C; the released code rounds .15 x 196 up to 30 patches."""
    mae, crossmae = base_decoders(0.15, predicted=30)
    assert (mae + product(1 + 49, 512, 768)) / crossmae == pytest.approx(3.70, abs=5e-3)
