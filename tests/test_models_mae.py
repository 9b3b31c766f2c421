"""The MAE baseline."""

import pytest
import torch

from models_mae import build_mae
from util.masking import count_tokens, random_split
from util.settings.model import ModelSize

SMALL = ModelSize(4, 16, 3, 2, img_size=(8, 20))
L = 10


def small_mae(**options):
    model = build_mae(SMALL, decoder_embed_dim=8, decoder_depth=2, decoder_num_heads=2, **options)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.double()


def inputs():
    images = torch.randn(3, 3, 8, 20, dtype=torch.float64)
    return images, random_split(torch.rand(3, L), count_tokens(L, 0.7, None))


def in_image_order(decoder, latent, split):
    """MAE's decoder as published: mask tokens everywhere, the visible ones put in their places."""
    x = decoder.embed(decoder.context_norm(latent))
    tokens = decoder.mask_token.repeat(x.shape[0], L, 1)
    for b, ids in enumerate(split.visible):
        tokens[b, ids] = x[b, 1:]
    x = torch.cat((x[:, :1], tokens), dim=1) + decoder.pos_embed
    for block in decoder.blocks:
        x = block(x)
    pred = decoder.pred(decoder.norm(x))[:, 1:]
    return pred.take_along_dim(split.predicted.unsqueeze(-1), dim=1)


def test_prediction_equals_the_full_sequence_in_image_order():
    model = small_mae()
    images, split = inputs()
    latent = model.encoder(images, split)[-1]
    expected = in_image_order(model.decoder, latent, split)
    torch.testing.assert_close(model.predict(images, split), expected)


def test_only_the_last_feature_map_is_read():
    model = small_mae()
    images, split = inputs()
    feature_maps = model.encoder(images, split)
    expected = model.decoder(feature_maps, split)
    only_last = [torch.full_like(x, torch.nan) for x in feature_maps[:-1]] + feature_maps[-1:]
    assert torch.equal(model.decoder(only_last, split), expected)


@pytest.mark.parametrize("feature_maps", ["all", [0, 2, 3]])
def test_inter_block_attention_is_one_mix_for_the_whole_decoder(feature_maps):
    model = small_mae(feature_maps=feature_maps)
    images, split = inputs()
    iba = model.decoder.inter_block_attention
    assert iba.weight.shape == (1, len(iba.map_ids))

    maps = model.encoder(images, split)
    mix = sum(iba.weight[0, j] * maps[i] for j, i in enumerate(iba.map_ids))
    expected = in_image_order(model.decoder, mix, split)
    torch.testing.assert_close(model.predict(images, split), expected)


def test_inter_block_attention_adds_nothing_but_its_weights():
    plain, mixed = small_mae().state_dict(), small_mae(feature_maps="all").state_dict()
    assert mixed.keys() - plain.keys() == {"decoder.inter_block_attention.weight"}
    assert not plain.keys() - mixed.keys()


@pytest.mark.parametrize("choice", [[4], [0, 0], [], "first"])
def test_bad_choices_of_feature_maps_are_refused(choice):
    with pytest.raises(ValueError, match="feature maps must be"):
        build_mae(SMALL, feature_maps=choice)
