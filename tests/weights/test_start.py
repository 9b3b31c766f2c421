"""Weights that pre-training starts from: what of a file is loaded, adapted, new or refused."""

import logging
from functools import partial

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import nn

from models import start_from
from models_vit import build_vit
from tests.helpers.models import AUTOENCODERS, NANO, crossmae_nano, mae_nano, use_nano_models
from tests.helpers.weights import (
    finetuned,
    hf_nano,
    images,
    pretrained,
    randomized,
    released,
    stored,
    timm_nano,
    vit_nano,
)
from util.errors import InputError
from util.masking import Masking, count_tokens
from util.patches import patchify
from util.weights.channels import adapt_embedding, adapt_prediction
from util.weights.encoder import load_encoder, read_encoder, save_encoder
from util.weights.files import WeightsNotFoundError

NAMES = {"crossmae": "crossmae_vit_tiny_patch4", "mae": "mae_vit_tiny_patch4"}
COLORS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}  # those of `pretrained`
DECODER = {"decoder_depth": 2, "decoder_num_heads": 2}


@pytest.fixture(autouse=True)
def _nano(monkeypatch, caplog):
    use_nano_models(monkeypatch)
    caplog.set_level(logging.INFO)


def start(model, path, **colors):
    name = "mae" if hasattr(model.decoder, "embed") else "crossmae"
    return start_from(model, NAMES[name], path, **(COLORS | colors))


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def changed(module, before):
    """Names of the weights that differ from before."""
    return {n for n, t in module.state_dict().items() if not torch.equal(t, before[n])}


def copied(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


# The layers that depend on the number of channels


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 12])
def test_the_embedding_of_rgb_is_adapted_as_in_timm(channels):
    weight = torch.randn(8, 3, 4, 4)
    expected = adapt_input_conv(channels, weight.clone())
    torch.testing.assert_close(adapt_embedding(weight, channels), expected)


@pytest.mark.parametrize(("before", "channels"), [(1, 1), (1, 4), (3, 1), (3, 6), (5, 1), (2, 4)])
def test_equal_channels_are_embedded_as_before(before, channels):
    weight = torch.randn(8, before, 4, 4)
    gray = torch.randn(2, 1, 8, 8)
    expected, found = (
        nn.functional.conv2d(gray.expand(-1, w.shape[1], -1, -1), w, stride=4)
        for w in (weight, adapt_embedding(weight, channels))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("before", "channels"), [(3, 1), (3, 3), (3, 5), (1, 3), (5, 3), (4, 8)])
def test_predicted_channels_are_repeated_in_turn_and_averaged_for_one(before, channels):
    pictures = torch.randn(2, before, 8, 8)
    adapted = adapt_prediction(patchify(pictures, 4).flatten(0, 1).T, before, channels)
    sources = [channel % before for channel in range(channels)]
    expected = pictures.mean(dim=1, keepdim=True) if channels == 1 else pictures[:, sources]
    torch.testing.assert_close(adapted, patchify(expected, 4).flatten(0, 1).T)


@pytest.mark.parametrize("channels", [1, 6])
def test_a_classifier_takes_an_encoder_of_other_channels_and_says_so(tmp_path, caplog, channels):
    before = randomized(crossmae_nano())
    path = stored(tmp_path / "w.pth", pretrained(before, **DECODER))
    model = build_vit(NANO, pool="avg", num_classes=2, in_chans=channels)
    load_encoder(model, read_encoder(path), head=False)
    assert f"patch embedding adapted from 3 channels to {channels}" in caplog.messages
    gray = torch.randn(1, 1, 16, 16)
    expected = before.encoder.tokens(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(model.tokens(gray.expand(-1, channels, -1, -1)), expected)


def test_a_head_is_not_loaded_for_other_channels(tmp_path):
    path = stored(tmp_path / "w.pth", finetuned(vit_nano(num_classes=3, pool="avg")))
    model = build_vit(NANO, pool="avg", num_classes=3, in_chans=5)
    with pytest.raises(InputError, match="has 3 channels, but the model has 5"):
        load_encoder(model, read_encoder(path), head=True)


# Encoder and decoder


@pytest.mark.parametrize(
    "kind", ["crossmae", "last", "softmax", "self_attention", "mae", "mae_mix"]
)
def test_a_model_of_the_same_settings_starts_with_all_weights(tmp_path, caplog, kind):
    build = AUTOENCODERS[kind]
    options = build.keywords.copy()
    before = randomized(build())
    path = stored(tmp_path / "w.pth", pretrained(before, **options))
    model = build()
    start(model, path)
    assert same_weights(model, before)
    assert "random weights" not in caplog.text


@pytest.mark.parametrize("build", [crossmae_nano, mae_nano])
def test_released_weights_are_loaded_with_their_decoder(tmp_path, build):
    before = randomized(build())
    path = stored(tmp_path / "w.pth", released(before))
    model = build()
    start(model, path)
    assert same_weights(model, before)


def test_the_hash_is_of_the_weights_decoder_included(tmp_path):
    before = randomized(crossmae_nano())
    own = stored(tmp_path / "own.pth", pretrained(before, **DECODER))
    theirs = stored(tmp_path / "theirs.pth", released(before))
    with torch.no_grad():
        before.decoder.pred.bias[0] += 1
    other = stored(tmp_path / "other.pth", pretrained(before, **DECODER))
    hashes = [start(crossmae_nano(), path) for path in (own, theirs, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_no_random_number_is_drawn(tmp_path):
    path = stored(tmp_path / "w.pth", pretrained(crossmae_nano(), **DECODER))
    model = crossmae_nano()
    state = torch.get_rng_state()
    start(model, path)
    assert torch.equal(torch.get_rng_state(), state)


def encoder_files(folder):
    """Files of a ViT without a decoder, and their encoders."""
    folder.mkdir(exist_ok=True)
    timm = timm_nano(num_classes=0)
    hugging_face = hf_nano("ViTModel")
    hugging_face.save_pretrained(folder / "hf")
    classifier = vit_nano(num_classes=3)
    own = stored(folder / "own.pth", pretrained(randomized(mae_nano()), **DECODER))
    save_encoder(read_encoder(own), folder / "encoder.safetensors")
    return {
        "timm": stored(folder / "timm.pth", timm.state_dict()),
        "hugging face": folder / "hf",
        "fine-tuned": stored(folder / "finetuned.pth", finetuned(classifier)),
        "encoder-only": folder / "encoder.safetensors",
    }


@pytest.mark.parametrize("kind", ["timm", "hugging face", "fine-tuned", "encoder-only"])
def test_of_a_file_without_a_decoder_the_encoder_is_loaded_and_the_decoder_stays(
    tmp_path, caplog, kind
):
    path = encoder_files(tmp_path / "files")[kind]
    model = crossmae_nano()
    decoder = copied(model.decoder)
    start(model, path)
    expected = read_encoder(path).encoder
    state = model.encoder.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert changed(model.decoder, decoder) == set()
    assert "the decoder starts from random weights" in caplog.text


def test_the_final_norm_of_an_encoder_becomes_that_of_mae(tmp_path):
    path = stored(tmp_path / "w.pth", timm_nano(num_classes=0).state_dict())
    model = mae_nano()
    decoder = copied(model.decoder)
    start(model, path)
    assert changed(model.decoder, decoder) == {"context_norm.weight", "context_norm.bias"}
    assert torch.equal(model.decoder.context_norm.weight, torch.load(path)["norm.weight"])
    mixing = AUTOENCODERS["mae_mix"]()
    decoder = copied(mixing.decoder)
    start(mixing, path)
    assert changed(mixing.decoder, decoder) == set()


def test_in_mae_a_timm_encoder_gives_timms_features(tmp_path):
    theirs = timm_nano(num_classes=0)
    model = mae_nano().eval()
    start(model, stored(tmp_path / "w.pth", theirs.state_dict()))
    pictures = images()
    with torch.no_grad():
        found = model.decoder.context_norm(model.encoder(pictures)[-1])
        torch.testing.assert_close(found, theirs.forward_features(pictures))


OTHER_DECODERS = {
    "depth": (crossmae_nano, {"decoder_depth": 1}, "is loaded with --decoder_depth 1"),
    "width": (
        crossmae_nano,
        {"decoder_embed_dim": 64},
        "is loaded with --decoder_embed_dim 64",
    ),
    "heads": (crossmae_nano, {"decoder_num_heads": 4}, "is loaded with --decoder_num_heads 4"),
    "maps": (
        crossmae_nano,
        {"feature_maps": [0, 2], "iba_softmax": True},
        "is loaded with --feature_maps 0,2 --iba_softmax",
    ),
    "no maps": (crossmae_nano, {"feature_maps": "last"}, "is loaded with --feature_maps last"),
    "method": (mae_nano, {}, "is loaded with --model mae_vit_tiny_patch4"),
}


@pytest.mark.parametrize("other", OTHER_DECODERS)
def test_another_decoder_is_left_out_with_the_flags_that_load_it(tmp_path, caplog, other):
    build, options, way = OTHER_DECODERS[other]
    before = randomized(build(**options))
    path = stored(tmp_path / "w.pth", pretrained(before, **DECODER | options))
    model = crossmae_nano()
    decoder = copied(model.decoder)
    start(model, path)
    assert same_weights(model.encoder, before.encoder)
    assert changed(model.decoder, decoder) == set()
    (warning,) = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
    assert warning.endswith(way)


def test_a_setting_that_the_file_lacks_is_to_be_left_out(tmp_path, caplog):
    path = stored(tmp_path / "w.pth", pretrained(crossmae_nano(), **DECODER))
    start(crossmae_nano(iba_softmax=True, decoder_self_attention=True), path)
    assert "is loaded without --decoder_self_attention --iba_softmax" in caplog.text


def test_a_layer_that_predicts_other_values_stays_new(tmp_path, caplog):
    before = randomized(crossmae_nano())
    model = crossmae_nano(norm_pix_loss=False)
    decoder = copied(model.decoder)
    start(model, stored(tmp_path / "w.pth", pretrained(before, **DECODER)))
    assert {"pred.weight", "pred.bias"}.isdisjoint(changed(model.decoder, decoder))
    assert torch.equal(model.decoder.mask_token, before.decoder.mask_token)
    assert "predicts normalized pixels" in caplog.text


# Another form of the images


@pytest.mark.parametrize("img_size", [(32, 32), (8, 24)])
def test_positions_of_encoder_and_decoder_are_resampled_together(tmp_path, caplog, img_size):
    before = randomized(mae_nano())
    model = mae_nano(img_size=img_size)
    start(model, stored(tmp_path / "w.pth", pretrained(before, **DECODER)))
    grid = [side // 4 for side in img_size]
    resample = partial(resample_abs_pos_embed, new_size=grid, old_size=[4, 4], antialias=False)
    for ours, theirs in ((model.encoder, before.encoder), (model.decoder, before.decoder)):
        assert torch.equal(ours.pos_embed, resample(theirs.pos_embed))
    assert f"resampled from 4 x 4 patches to {grid[0]} x {grid[1]}" in caplog.text
    assert {n for n, t in model.state_dict().items() if not torch.equal(t, before.state_dict()[n])
            } == {"encoder.pos_embed", "decoder.pos_embed"}  # fmt: skip


def test_positions_that_are_not_square_are_resampled_back(tmp_path):
    wide = randomized(crossmae_nano(img_size=(8, 32)))
    path = stored(tmp_path / "w.pth", pretrained(wide, **DECODER))
    same = crossmae_nano(img_size=(8, 32))
    start(same, path)
    assert same_weights(same, wide)
    square = crossmae_nano()
    start(square, path)
    assert square.encoder.pos_embed.shape == square.decoder.pos_embed.shape == (1, 17, 32)


def test_gray_images_are_predicted_as_gray_after_six_channels_from_rgb(tmp_path, caplog):
    before = randomized(crossmae_nano())
    path = stored(tmp_path / "w.pth", pretrained(before, **DECODER))
    model = crossmae_nano(in_chans=6).eval()
    start(model, path)
    split = Masking((4, 4), count_tokens(16, 0.75, None), "random", seed=0).full_split(
        torch.rand(2, 16)
    )
    gray = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        expected = before.predict(gray.expand(-1, 3, -1, -1), split).unflatten(2, (16, 3))
        found = model.predict(gray.expand(-1, 6, -1, -1), split).unflatten(2, (16, 6))
    torch.testing.assert_close(found, expected.repeat(1, 1, 1, 2))
    assert "patch embedding adapted from 3 channels to 6" in caplog.messages
    assert "prediction layer adapted from 3 channels to 6" in caplog.messages


def test_another_mean_and_std_are_named(tmp_path, caplog):
    path = stored(tmp_path / "w.pth", pretrained(crossmae_nano(), **DECODER))
    start(crossmae_nano(), path)
    assert "was trained with" not in caplog.text
    start(crossmae_nano(), path, std=[1.0, 1.0, 1.0])
    assert f"{path} was trained with --std 0.4 0.5 0.6, unlike this run" in caplog.messages


# What is refused


def test_an_encoder_of_another_size_is_refused_with_the_model_to_use(tmp_path):
    sizes = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, "img_size": 32}
    path = stored(tmp_path / "w.pth", timm_nano(**sizes).state_dict())
    with pytest.raises(
        InputError, match=r"holds a vit_tiny_patch16.* --model mae_vit_tiny_patch16"
    ):
        start(mae_nano(), path)


def test_an_encoder_of_no_known_size_is_refused(tmp_path):
    path = stored(tmp_path / "w.pth", timm_nano(depth=3).state_dict())
    with pytest.raises(InputError, match=r"cannot be loaded: a ViT of depth 3 .* known sizes"):
        start(mae_nano(), path)


def test_a_decoder_that_is_not_finite_is_refused_and_nothing_is_loaded(tmp_path):
    before = randomized(crossmae_nano())
    before.decoder.norm.bias.data[0] = torch.nan
    model = crossmae_nano()
    state = copied(model)
    with pytest.raises(InputError, match=r"decoder\.norm\.bias that are not finite"):
        start(model, stored(tmp_path / "w.pth", pretrained(before, **DECODER)))
    assert changed(model, state) == set()


def test_a_checkpoint_that_is_not_what_it_claims_is_refused(tmp_path):
    path = stored(tmp_path / "w.pth", pretrained(crossmae_nano(), decoder_depth=1))
    with pytest.raises(InputError, match="its weights are not"):
        start(crossmae_nano(), path)


def test_a_released_decoder_that_cannot_be_read_is_left_out_with_the_reason(tmp_path, caplog):
    content = released(randomized(mae_nano()))
    content["model"]["decoder_extra.weight"] = torch.ones(1)
    start(mae_nano(), stored(tmp_path / "w.pth", content))
    assert "random weights" in caplog.text
    assert "decoder_extra.weight" in caplog.text


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(WeightsNotFoundError, match="nowhere"):
        start(crossmae_nano(), tmp_path / "nowhere.pth")
