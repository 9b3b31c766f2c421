"""Features of encoder blocks: those of the model, their colors, and where the class token looks."""

from functools import partial

import pytest
import torch

from models_crossmae import ViTEncoder
from models_vit import ViT, build_vit
from tests.helpers.models import NANO
from util.eval.block_features import (
    block_features,
    class_attention,
    feature_maps,
    principal_colors,
)

DEEPER = NANO._replace(depth=3)
MODELS = {
    "encoder": lambda: ViTEncoder(**DEEPER._asdict()),
    "average": partial(build_vit, DEEPER, num_classes=0, pool="avg"),
    "class": partial(build_vit, DEEPER, num_classes=5, pool="cls"),
}
every_model = pytest.mark.parametrize("name", MODELS)
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def build(name):
    """A model of MODELS in float64, with noise on every norm, bias and weight."""
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    return model


def draw():
    return torch.randn(4, 3, 16, 16, dtype=torch.float64)


def has_hooks(model):
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every_model
def test_the_last_features_are_the_models_own(name):
    model, images = build(name), draw()
    features = block_features(model, images)
    assert features.shape == (4, 4 * 32)
    close(features[:, -32:], ViT.features(model, images).detach())


def test_every_block_has_the_features_of_a_model_that_ends_there():
    model, images = build("encoder"), draw()
    features, blocks = block_features(model, images).split(32, dim=1), model.blocks
    for depth in range(4):
        model.blocks = blocks[:depth]
        close(features[depth], model.features(images).detach())


def test_maps_are_those_of_the_encoder():
    model, images = build("encoder"), draw()
    maps, expected = feature_maps(model, images), model(images)
    assert len(maps) == 4
    assert all(torch.equal(own, other) for own, other in zip(maps, expected, strict=True))


@every_model
@pytest.mark.parametrize("use", [feature_maps, block_features, class_attention])
def test_no_hook_is_left(name, use):
    model, images = build(name), draw()
    before = model.encode(images)
    use(model, images)
    assert not has_hooks(model)
    assert torch.equal(model.encode(images), before)
    with pytest.raises(ValueError, match="encoder takes images"):
        use(model, images[:, :, :8])
    assert not has_hooks(model)


# Colors


def skewed(num_features=8):
    """Features (3, 16, D), each with a spread and a skew of its own."""
    features = torch.rand(3, 16, num_features, dtype=torch.float64) ** 4
    return features * 2.0 ** -torch.arange(num_features)


def test_colors_fill_the_range_and_keep_the_order_of_the_components():
    colors = principal_colors(skewed())
    assert colors.shape == (3, 16, 3)
    flat = colors.flatten(0, 1)
    assert flat.amin(dim=0).tolist() == [0, 0, 0]
    assert flat.amax(dim=0).tolist() == [1, 1, 1]
    # A single feature is its own component, but for outliers.
    feature = torch.linspace(0, 1, 48, dtype=torch.float64) ** 2
    color = principal_colors(feature.view(3, 16, 1)).flatten(0, 1)[:, 0]
    assert (color.diff() >= 0).all()
    assert len(set(color.tolist())) >= 0.9 * 48


def test_shifts_and_rotations_of_features_change_no_color():
    features = skewed()
    expected = principal_colors(features)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    shifted = features + 5 * torch.randn(8, dtype=torch.float64)
    for same in (shifted, features @ rotation, features @ -rotation, 7 * features):
        torch.testing.assert_close(principal_colors(same), expected, rtol=0, atol=1e-5)


def test_patches_have_colors_of_their_own_in_every_order():
    features, order = skewed(), torch.randperm(48)
    colors = principal_colors(features).flatten(0, 1)
    shuffled = principal_colors(features.flatten(0, 1)[order].view(3, 16, 8)).flatten(0, 1)
    torch.testing.assert_close(shuffled, colors[order], rtol=0, atol=1e-5)


def test_groups_of_patches_have_different_colors():
    group = torch.arange(48).view(3, 16) % 3 == 0
    features = 0.1 * torch.randn(3, 16, 8) + 5 * torch.randn(8) * group[..., None]
    first = principal_colors(features)[..., 0]
    assert first[group].amin() - first[~group].amax() > 0.5


@pytest.mark.parametrize("num_features", [1, 2, 3])
def test_few_features_leave_the_other_colors_gray(num_features):
    colors = principal_colors(skewed(num_features))
    assert (colors[..., num_features:] == 0.5).all()
    assert (colors[..., :num_features].flatten(0, 1).std(dim=0) > 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_features_are_gray(dtype):
    for num_patches in range(1, 20):
        features = torch.rand(num_patches % 8 + 1, dtype=dtype).expand(3, num_patches, -1)
        assert (principal_colors(features) == 0.5).all()


# Attention of the class token


@every_model
def test_attention_is_the_softmax_of_the_class_tokens_query(name):
    model, images = build(name), draw()
    maps, tokens = class_attention(model, images), feature_maps(model, images)
    assert maps.shape == (3, 4, 16)
    for own, block, x in zip(maps, model.blocks, tokens[:-1], strict=True):
        q, k, _ = block.attn.qkv(block.norm1(x)).view(4, 17, 3, 2, 16).unbind(2)
        weights = torch.einsum("bhd,bmhd->bhm", q[:, 0] / 4, k).exp()
        weights = weights / weights.sum(dim=-1, keepdim=True)
        close(own, weights.mean(dim=1)[:, 1:].detach())
    assert (maps >= 0).all()
    assert (maps.sum(dim=-1) < 1).all()


def test_without_queries_attention_is_uniform():
    model = build("encoder")
    for block in model.blocks:
        block.attn.qkv.weight.data[:32] = 0
        block.attn.qkv.bias.data[:32] = 0
    close(class_attention(model, draw()), torch.full((3, 4, 16), 1 / 17, dtype=torch.float64))
