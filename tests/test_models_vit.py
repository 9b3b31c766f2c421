"""The transformer parts equal timm's and PyTorch's."""

from functools import partial

import pytest
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F

from models_vit import Block, PatchEmbed, attend, layer_norm, split_heads, xavier_linear
from util.patches import patchify


def test_block_equals_timms():
    ours = Block(24, num_heads=3).double()
    norm_layer = partial(torch.nn.LayerNorm, eps=1e-6)
    theirs = timm_vit.Block(24, num_heads=3, qkv_bias=True, norm_layer=norm_layer).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict(), strict=True)

    x = torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(("patch_size", "in_chans"), [(4, 3), (2, 1), (3, 5)])
def test_patch_embedding_equals_its_convolution(patch_size, in_chans):
    embed = PatchEmbed(patch_size, in_chans, embed_dim=8).double()
    images = torch.randn(2, in_chans, 2 * patch_size, 3 * patch_size, dtype=torch.float64)
    convolved = embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(patchify(images, patch_size)), convolved)


def test_patch_embedding_starts_as_in_mae():
    embed = PatchEmbed(4, in_chans=3, embed_dim=96)
    weight, bias = embed.proj.weight, embed.proj.bias
    bound = (6 / (4 * 4 * 3 + 96)) ** 0.5  # of the linear map, not of the convolution
    assert 0.98 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    # MAE leaves the convolution's bias at PyTorch's default.
    assert 0 < bias.abs().max() <= (4 * 4 * 3) ** -0.5


def test_attention_is_a_softmax_over_the_context():
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 7, 7))
    weights = F.softmax(q @ k.transpose(2, 3) / 4**0.5, dim=-1)
    expected = (weights @ v).transpose(1, 2).reshape(2, 5, 12)
    torch.testing.assert_close(attend(q, k, v), expected)


def test_heads_take_neighbouring_channels():
    x = torch.arange(12.0).view(1, 2, 6)
    heads = split_heads(x, 3)
    assert heads.shape == (1, 3, 2, 2)
    torch.testing.assert_close(heads[0, 1], x[0, :, 2:4])


def test_linear_layers_and_norms_start_as_in_mae():
    linear = xavier_linear(64, 192)
    bound = (6 / (64 + 192)) ** 0.5
    assert 0.98 * bound < linear.weight.abs().max() <= bound
    assert not linear.bias.any()
    norm = layer_norm(8)
    assert norm.eps == 1e-6
    assert (norm.weight == 1).all()
    assert not norm.bias.any()
