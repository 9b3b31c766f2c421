"""The ViT and its parts equal timm's and PyTorch's, and start as in MAE."""

from functools import partial

import pytest
import timm.models.vision_transformer as timm_vit
import torch
import torch.nn.functional as F

from models import choose_size, find_size
from models_vit import (
    AttentionPool,
    Block,
    FeatureNorm,
    PatchEmbed,
    VisionTransformer,
    attend,
    build_vit,
    layer_norm,
    make_probe,
    split_heads,
    xavier_linear,
)
from tests.helpers.models import NANO, crossmae_nano, mae_nano
from util.patches import patchify
from util.pos_embed import sincos_table
from util.settings.model import POOLS, SIZES

vit_nano = partial(build_vit, NANO, num_classes=5)


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
    weight, bias = embed.proj.weight, embed.proj.bias
    convolved = F.conv2d(images, weight, bias, stride=patch_size).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(patchify(images, patch_size)), convolved)


def test_patch_embedding_starts_as_in_mae():
    embed = PatchEmbed(4, in_chans=3, embed_dim=96)
    weight, bias = embed.proj.weight, embed.proj.bias
    bound = (6 / (4 * 4 * 3 + 96)) ** 0.5  # of the linear map, not of the convolution
    assert 0.98 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    # MAE leaves the convolution's bias at PyTorch's default.
    assert 0 < bias.abs().max() <= (4 * 4 * 3) ** -0.5


def called(model, images):
    """Names of the modules that a forward hook sees."""
    found = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: found.add(name))
    model(images)
    return found


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_hooks_see_every_module_that_computes(pool):
    model = vit_nano(pool=pool)
    lists = {"blocks"}  # are never called
    assert called(model, torch.randn(2, 3, 16, 16)) == {n for n, _ in model.named_modules()} - lists


def test_parts_of_a_block_can_be_replaced():
    block, x = Block(8, num_heads=2), torch.randn(2, 3, 8)
    block.mlp = torch.nn.Identity()
    y = x + block.attn(block.norm1(x))
    assert torch.equal(block(x), y + block.norm2(y))
    block.attn = torch.nn.Linear(8, 8)
    y = x + block.attn(block.norm1(x))
    assert torch.equal(block(x), y + block.norm2(y))


def test_the_patch_projection_can_be_replaced():
    model, images = vit_nano(pool="avg"), torch.randn(2, 3, 16, 16)
    expected, proj = model(images), model.patch_embed.proj
    linear = torch.nn.Linear(4 * 4 * 3, 32)
    linear.weight.data = proj.weight.data.permute(0, 2, 3, 1).flatten(1)
    linear.bias.data = proj.bias.data
    model.patch_embed.proj = torch.nn.Sequential(linear, torch.nn.Identity())
    assert torch.equal(model(images), expected)


def test_attention_is_a_softmax_over_the_context():
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 7, 7))
    weights = F.softmax(q @ k.transpose(2, 3) / 4**0.5, dim=-1)
    expected = (weights @ v).transpose(1, 2).reshape(2, 5, 12)
    torch.testing.assert_close(attend(q, k, v), expected)


def test_heads_take_neighboring_channels():
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


# The classifier

pools = pytest.mark.parametrize("pool", POOLS)


def both_vits(img_size, patch_size, pool, **options):
    """Ours and timm's, both in float64 and with timm's weights."""
    shape = {"patch_size": patch_size, "embed_dim": 24, "depth": 3, "num_heads": 3}
    shape |= {"img_size": img_size, "num_classes": 5}
    ours = VisionTransformer(**shape, in_chans=3, pool=pool, **options).double()
    timms_pool = {"global_pool": "token" if pool == "cls" else "avg", "fc_norm": pool == "avg"}
    theirs = timm_vit.VisionTransformer(**shape, **timms_pool, **options).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pools
@pytest.mark.parametrize(("img_size", "patch_size"), [((12, 20), 4), ((224, 224), 16)])
def test_classifier_equals_timms(img_size, patch_size, pool):
    ours, theirs = both_vits(img_size, patch_size, pool)
    images = torch.randn(2, 3, *img_size, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images))
    torch.testing.assert_close(
        ours.features(images), theirs.forward_head(theirs.forward_features(images), pre_logits=True)
    )


@pools
def test_timms_classifier_takes_our_weights(pool):
    ours, theirs = both_vits((8, 8), 4, pool)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images))


def test_without_classes_the_output_is_the_features():
    model = vit_nano(num_classes=0, pool="cls")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), model.features(images))
    assert not any(name.startswith("head") for name in model.state_dict())


def test_a_pool_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="'max'"):
        vit_nano(pool="max")


@pools
def test_classifier_starts_as_in_mae(pool):
    model = vit_nano(num_classes=1000, pool=pool)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    assert not model.head.bias.any()
    assert torch.equal(model.pos_embed, sincos_table(32, (4, 4)))
    norm = model.fc_norm if pool == "avg" else model.norm
    assert norm.eps == 1e-6


@pools
def test_every_parameter_of_the_classifier_is_trained(pool):
    model = vit_nano(pool=pool)
    F.cross_entropy(model(torch.randn(2, 3, 16, 16)), torch.tensor([0, 3])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad.abs().max() > 0, name


@pools
@pytest.mark.parametrize("build", [crossmae_nano, mae_nano])
def test_a_pretrained_encoder_is_all_but_norm_and_head(build, pool):
    encoder, model = build().encoder, vit_nano(pool=pool)
    missing, unexpected = model.load_state_dict(encoder.state_dict(), strict=False)
    norm = "fc_norm" if pool == "avg" else "norm"
    assert set(missing) == {
        f"{layer}.{part}" for layer in (norm, "head") for part in ("weight", "bias")
    }
    assert unexpected == []
    images = torch.randn(2, 3, 16, 16)
    last = encoder(images)[-1]  # (B, 1+L, D)
    normalize = partial(F.layer_norm, normalized_shape=(32,), eps=1e-6)
    expected = {
        "avg": normalize(last[:, 1:].mean(dim=1)),
        "cls": normalize(last[:, 0]),
        "norm_avg": normalize(last[:, 1:]).mean(dim=1),
    }
    torch.testing.assert_close(model.features(images), expected[pool])


# Drop path


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_drop_path_rises_linearly_as_timms(depth):
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": depth, "num_heads": 2}
    ours = VisionTransformer(**shape, in_chans=3, num_classes=2, pool="avg", drop_path=0.3)
    theirs = timm_vit.VisionTransformer(**shape, num_classes=2, drop_path_rate=0.3)
    for block, timms in zip(ours.blocks, theirs.blocks, strict=True):
        rates = [getattr(path, "drop_prob", 0.0) for path in (timms.drop_path1, timms.drop_path2)]
        assert [block.drop_path.drop_prob] * 2 == pytest.approx(rates, abs=1e-7)
    if depth > 1:
        assert ours.blocks[0].drop_path.drop_prob == 0
        assert ours.blocks[-1].drop_path.drop_prob == 0.3


@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_a_branch_is_left_out_or_scaled_for_each_image(branch):
    block = Block(8, num_heads=2, drop_path=0.25)
    silent = block.mlp.fc2 if branch == "attn" else block.attn.proj
    torch.nn.init.zeros_(silent.weight)  # the other branch adds nothing
    x = torch.randn(2000, 3, 8)
    full = block.eval()(x) - x
    got = block.train()(x) - x
    left_out = got.flatten(1).eq(0).all(dim=1)
    torch.testing.assert_close(got[~left_out], full[~left_out] / 0.75, rtol=1e-4, atol=1e-5)
    assert left_out.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_the_branches_of_a_block_are_left_out_independently():
    block = Block(8, num_heads=2, drop_path=0.5)
    x = torch.randn(2000, 3, 8)
    unchanged = (block(x) == x).flatten(1).all(dim=1)  # both are left out
    assert unchanged.float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_evaluation_drops_nothing():
    model, images = vit_nano(pool="avg", drop_path=0.9), torch.randn(8, 3, 16, 16)
    expected = vit_nano(pool="avg")
    expected.load_state_dict(model.state_dict(), strict=True)
    assert not torch.equal(model.features(images), model.features(images))
    assert torch.equal(model.eval().features(images), expected.features(images))


# Sizes


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_found_by_name_and_by_shape(name):
    size = SIZES[name]
    shape = (size.patch_size, size.embed_dim, size.depth)
    assert find_size(*shape) == name
    assert choose_size(None, shape) == name
    assert choose_size(f"vit_{name}", None) == name
    assert choose_size(f"vit_{name}", (1, 2, 3)) == name  # a name counts more


def test_without_a_name_and_weights_the_size_is_vit_b():
    assert SIZES[choose_size(None, None)][:4] == (16, 768, 12, 12)


def test_a_shape_that_no_size_has_is_refused():
    for find in (lambda: find_size(16, 768, 11), lambda: choose_size(None, (16, 768, 11))):
        with pytest.raises(
            ValueError, match=r"depth 11 and width 768 with patches of 16 px is not one .*base"
        ):
            find()


# The linear probe


def test_feature_norm_equals_batch_norm():
    ours = FeatureNorm(6).double()
    theirs = torch.nn.BatchNorm1d(6, affine=False, eps=1e-6).double()
    assert not list(ours.parameters())
    for num_images in (8, 2, 5):
        x = 3 * torch.randn(num_images, 6, dtype=torch.float64) + 1
        torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    x = torch.randn(1, 6, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_single_image_is_normalized_by_the_running_statistics_and_leaves_them():
    norm = FeatureNorm(6)
    norm(3 * torch.randn(8, 6) + 1)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(1, 6)
    got = norm(x)
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(got, norm.eval()(x))


@pools
def test_a_linear_probe_trains_its_head_alone(pool):
    model, images = vit_nano(pool=pool), torch.randn(4, 3, 16, 16)
    features = model.features(images).detach()
    make_probe(model, num_classes=2000)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"head.1.weight", "head.1.bias"}
    assert model.head[1].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not model.head[1].bias.any()
    assert torch.equal(model.features(images), features)
    normalized = F.batch_norm(features, None, None, training=True, eps=1e-6)
    torch.testing.assert_close(model(images), F.linear(normalized, model.head[1].weight))


def test_attention_pooling_equals_a_plain_einsum():
    pool, x = AttentionPool(12, num_queries=3).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    torch.nn.init.normal_(pool.queries)
    weights = torch.einsum("bnd,md->bmn", x, pool.queries).div(12**0.5).softmax(dim=-1)
    slices = pool.value.weight.view(3, 4, 12)  # of the values, one for each query
    expected = torch.einsum("bmn,bnd,mcd->bmc", weights, x, slices).flatten(1) + pool.value.bias
    torch.testing.assert_close(pool(x), expected)


@pytest.mark.parametrize("num_queries", [1, 4])
def test_queries_of_zero_pool_the_mean(num_queries):
    pool, x = AttentionPool(12, num_queries).double(), torch.randn(2, 7, 12, dtype=torch.float64)
    torch.nn.init.zeros_(pool.queries)
    torch.testing.assert_close(pool(x), pool.value(x.mean(dim=1)))


def test_a_number_of_queries_that_does_not_divide_the_width_is_refused():
    with pytest.raises(ValueError, match="a width of 12 is not divisible by 5 queries"):
        AttentionPool(12, 5)


def test_pooling_by_attention_needs_queries():
    with pytest.raises(ValueError, match="pooling by attention needs queries"):
        vit_nano(pool="attention")


def test_an_attentive_probe_trains_its_queries_values_and_head():
    model, images = vit_nano(pool="attention", num_queries=4), torch.randn(4, 3, 16, 16)
    make_probe(model, num_classes=3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    pooling = {"attn_pool.queries", "attn_pool.value.weight", "attn_pool.value.bias"}
    assert trained == {*pooling, "head.1.weight", "head.1.bias"}
    tokens = model.norm(model.encode(images)[:, 1:])
    assert torch.equal(model.features(images), model.attn_pool(tokens))


@pytest.mark.parametrize("pool", ["avg", "cls", "norm_avg", "attention"])
def test_features_of_a_block_are_those_of_a_model_that_ends_there(pool):
    options = {"pool": pool, "num_queries": 4, "num_classes": 0}
    images = torch.randn(2, 3, 16, 16)
    deep = build_vit(NANO, layers=[1], **options)
    short = build_vit(NANO._replace(depth=1), **options)
    short.load_state_dict(deep.state_dict(), strict=False)
    assert torch.equal(deep.features(images), short.features(images))


def test_features_of_several_blocks_are_the_mean_of_those_of_each():
    images, state = torch.randn(2, 3, 16, 16), vit_nano(pool="avg").state_dict()

    def features(*layers):
        model = vit_nano(pool="avg", layers=layers)
        model.load_state_dict(state)
        return model.features(images)

    expected = (features(0) + features(2)) / 2
    torch.testing.assert_close(features(2, 0, 2), expected)
    assert torch.equal(features(2), features())


@pytest.mark.parametrize("layers", [[3], [0, 5]])
def test_layers_that_the_encoder_lacks_are_refused(layers):
    with pytest.raises(ValueError, match="layers are numbered from 0, the input, to 2, not"):
        vit_nano(pool="avg", layers=layers)


def test_parameters_of_a_block_have_timms_order():
    # Saved optimizers know parameters by their place alone.
    theirs = timm_vit.Block(32, 2, qkv_bias=True)
    assert [n for n, _ in Block(32, 2).named_parameters()] == [
        n for n, _ in theirs.named_parameters()
    ]
