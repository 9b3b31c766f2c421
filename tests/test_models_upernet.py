"""The segmentation models equal transformers' UperNet and timm's BEiT, and load as saved."""

from functools import partial

import pytest
import timm.layers
import timm.models.beit as timm_beit
import torch
import torch.nn.functional as F
import transformers

from models import build_segmenter, load_segmenter
from models_upernet import (
    POOL_SCALES,
    BiasedAttention,
    LinearHead,
    Neck,
    SegmentationViT,
    UperNet,
    default_out_indices,
)
from models_vit import SelfAttention, ViT
from tests.helpers.weights import finetuned, randomized, stored, vit_nano
from util.errors import InputError
from util.kernels import scaled_dot_product_attention
from util.optim import build_layer_decay_adamw
from util.pos_embed import sincos_table
from util.settings import model as model_settings
from util.settings.model import HeadSettings, ModelSize

CLASSES = 5
DEPTH = 4
SIZE = ModelSize(4, 32, DEPTH, 2, img_size=16)
upernet = partial(UperNet, 32, CLASSES, head_dim=16, dropout=0.1)
both_heads = pytest.mark.parametrize("head", ["linear", "upernet"])


def segmenter(*, head="linear", **options):
    if head == "upernet":
        options = {"head_dim": 16, "out_indices": [0, 1, 2, 3], **options}
    options = {**SIZE._asdict(), "num_classes": CLASSES, "head": head, **options}
    return SegmentationViT(**options)


def random_model(**options):
    """A model in which no table or statistic is at its start."""
    model = randomized(segmenter(**options))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            randomize_statistics(module)
    return model


def randomize_statistics(norm):
    norm.running_mean.normal_(std=0.2)
    norm.running_var.uniform_(0.5, 2)


def four_maps(batch_size=3, height=4, width=6):
    return list(torch.randn(4, batch_size, 32, height, width))


# Heads


@pytest.mark.parametrize("in_training", [False, True])
def test_heads_equal_those_of_transformers(in_training):
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[32] * 4, depths=[1] * 4, out_features=[f"stage{i}" for i in range(1, 5)]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        num_labels=CLASSES,
        hidden_size=16,
        pool_scales=list(POOL_SCALES),
        auxiliary_in_channels=32,
    )
    theirs = transformers.UperNetForSemanticSegmentation(config)
    ours = upernet(dropout=0.0)
    for head in (theirs.decode_head, theirs.auxiliary_head):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        for module in head.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                randomize_statistics(module)
    for name in ("decode_head", "auxiliary_head"):
        state = getattr(theirs, name).state_dict()
        # Ours have dropout before the classifier.
        renamed = {n.replace("classifier.", "classifier.1."): t for n, t in state.items()}
        getattr(ours, name).load_state_dict(renamed, strict=True)
    ours.train(in_training)
    theirs.train(in_training)

    maps = four_maps()
    pyramid = ours.neck(maps)
    expected = [theirs.decode_head(pyramid), theirs.auxiliary_head(pyramid)]
    got = ours(maps)
    assert len(got) == 1 + in_training
    torch.testing.assert_close(got, expected[: len(got)])
    torch.testing.assert_close(ours.auxiliary_head(pyramid), expected[1])


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 1), (1, 7)])
def test_the_neck_gives_maps_of_four_sizes(height, width):
    pyramid = Neck(32)(four_maps(2, height, width))
    assert [tuple(level.shape) for level in pyramid] == [
        (2, 32, 4 * height, 4 * width),
        (2, 32, 2 * height, 2 * width),
        (2, 32, height, width),
        (2, 32, -(-height // 2), -(-width // 2)),
    ]


def test_the_neck_keeps_the_third_map_and_pools_the_last():
    maps = four_maps()
    pyramid = Neck(32)(maps)
    assert torch.equal(pyramid[2], maps[2])
    assert torch.equal(pyramid[3], F.max_pool2d(maps[3], 2))


def test_a_map_reaches_the_logits_at_its_own_place_only():
    neck, maps = Neck(32).eval(), four_maps()
    changed = [maps[0].clone(), *maps[1:]]
    changed[0][:, :, 1, 2] += 1
    difference = (neck(changed)[0] - neck(maps)[0]).abs().sum((0, 1)) > 0
    assert difference[4:8, 8:12].any()
    difference[4:8, 8:12] = False
    assert not difference.any()


def test_the_linear_head_is_a_linear_layer_on_normalized_tokens():
    head, maps = LinearHead(32, CLASSES), four_maps()
    tokens = maps[-1].permute(0, 2, 3, 1)
    normalized = (tokens - tokens.mean((0, 1, 2))) / (
        tokens.var((0, 1, 2), correction=0) + 1e-5
    ) ** 0.5
    expected = normalized @ head.classifier.weight.flatten(1).T + head.classifier.bias
    (logits,) = head(maps)
    torch.testing.assert_close(logits.permute(0, 2, 3, 1), expected)


@both_heads
def test_logits_start_small(head):
    model = segmenter(head=head).train()
    for logits in model(torch.randn(4, 3, 16, 16)):
        assert 0 < logits.std() < 0.5
    for module in model.head.modules():
        if isinstance(module, torch.nn.Conv2d) and module.out_channels == CLASSES:
            assert not module.bias.any()
            assert module.weight.std().item() == pytest.approx(0.01, rel=0.2)


def test_dropout_leaves_out_whole_channels_before_both_classifiers():
    head = upernet(dropout=0.5).train()
    inputs = []
    for part in (head.decode_head, head.auxiliary_head):
        part.classifier[1].register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    head(four_maps(8))
    for x in inputs:
        dropped = (x == 0).all(dim=(2, 3))
        assert 0.2 < dropped.float().mean() < 0.8
    assert len(inputs) == 2


# The model


@both_heads
@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_only_training_gives_auxiliary_logits(head, rel_pos_bias):
    model, images = segmenter(head=head, rel_pos_bias=rel_pos_bias), torch.randn(2, 3, 16, 16)
    side = 4 if head == "linear" else 16
    (logits,) = model.eval()(images)
    assert logits.shape == (2, CLASSES, side, side)
    shapes = [tuple(x.shape) for x in model.train()(images)]
    auxiliary = [(2, CLASSES, 4, 4)] if head == "upernet" else []
    assert shapes == [(2, CLASSES, side, side), *auxiliary]


@both_heads
@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_every_parameter_is_trained(head, rel_pos_bias):
    model = segmenter(head=head, rel_pos_bias=rel_pos_bias).train()
    maps = model(torch.randn(4, 3, 16, 16))
    sum(
        F.cross_entropy(logits, logits[:, 0].round().long() % CLASSES) for logits in maps
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_maps_are_the_outputs_of_blocks_without_the_class_token(rel_pos_bias):
    model = random_model(img_size=(16, 24), head="upernet", rel_pos_bias=rel_pos_bias)
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    images = torch.randn(2, 3, 16, 24)
    maps = model.feature_maps(images)
    assert len(maps) == len(outputs) == DEPTH
    for found, tokens in zip(maps, outputs, strict=True):
        assert torch.equal(found, tokens[:, 1:].mT.reshape(2, 32, 4, 6))


def test_the_encoder_is_the_vits():
    model, encoder = random_model(), ViT(**SIZE._asdict())
    missing, unexpected = encoder.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("head.") for name in unexpected)
    images = torch.randn(2, 3, 16, 16)
    (found,) = model.feature_maps(images)
    torch.testing.assert_close(found.flatten(2).mT, encoder.encode(images)[:, 1:])


def test_a_pretrained_encoder_is_all_but_head_and_tables():
    state = ViT(**SIZE._asdict()).state_dict()
    model = segmenter(head="upernet", rel_pos_bias=True)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(n.startswith("head.") or n.endswith("bias_table") for n in missing)


def test_chosen_blocks_are_read():
    options = {"depth": 6, "head": "upernet"}
    model = random_model(**options, out_indices=[0, 2, 3, 5])
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: outputs.append(output))
    maps = model.feature_maps(torch.randn(1, 3, 16, 16))
    expected = [outputs[i][:, 1:].mT.unflatten(2, (4, 4)) for i in (0, 2, 3, 5)]
    assert all(map(torch.equal, maps, expected))
    assert len(maps) == 4


@pytest.mark.parametrize(
    ("depth", "indices"),
    [
        (4, (0, 1, 1, 3)),  # too few blocks
        (12, (3, 5, 7, 11)),
        (24, (7, 11, 15, 23)),
        (32, (9, 15, 20, 31)),
        (40, (12, 19, 25, 39)),
    ],
)
def test_default_blocks(depth, indices):
    assert default_out_indices(depth) == indices


@pytest.mark.parametrize(
    "out_indices",
    [
        [0, 1, 2],  # three
        [0, 1, 2, 3, 3],
        [0, 1, 3, 2],  # not in order
        [0, 0, 2, 3],
        [-1, 1, 2, 3],
        [0, 1, 2, 4],  # no such block
        [0, 1, 2, -1],
        [3],
    ],
)
def test_blocks_that_upernet_cannot_read_are_refused(out_indices):
    with pytest.raises(ValueError, match="UperNet reads four blocks in order"):
        segmenter(head="upernet", out_indices=out_indices)


def test_blocks_that_leave_the_last_ones_untrained_are_refused():
    with pytest.raises(ValueError, match="with the last, 5"):
        segmenter(depth=6, head="upernet", out_indices=[0, 1, 2, 3])


def test_unknown_heads_are_refused():
    with pytest.raises(ValueError, match="'mask2former'"):
        segmenter(head="mask2former")


@pytest.mark.parametrize("side", [15, 18])
def test_sides_that_patches_do_not_divide_are_refused(side):
    with pytest.raises(ValueError, match=f"4 does not divide 16x{side}"):
        segmenter()(torch.randn(1, 3, 16, side))


@both_heads
@pytest.mark.parametrize("rel_pos_bias", [False, True])
@pytest.mark.parametrize(("height", "width"), [(24, 16), (8, 20), (4, 4)])
def test_other_image_sizes(head, rel_pos_bias, height, width):
    model = random_model(head=head, rel_pos_bias=rel_pos_bias)
    (logits,) = model(torch.randn(2, 3, height, width))
    factor = 1 if head == "linear" else 4
    assert logits.shape == (2, CLASSES, factor * height // 4, factor * width // 4)
    assert logits.isfinite().all()


@pytest.mark.parametrize("grid_size", [(4, 6), (3, 2)])
def test_positions_at_other_sizes_are_resampled_as_in_mae(grid_size):
    height, width = (4 * side for side in grid_size)
    model, images = random_model(), torch.randn(2, 3, height, width)
    other = random_model(img_size=(height, width))
    state = model.state_dict()
    maps = state["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)  # (1, D, 4, 4)
    maps = F.interpolate(maps, grid_size, mode="bicubic", align_corners=False, antialias=False)
    positions = torch.cat([state["pos_embed"][:, :1], maps.flatten(2).mT], dim=1)
    other.load_state_dict({**state, "pos_embed": positions})
    torch.testing.assert_close(model(images), other(images))


def test_positions_start_from_the_table_and_are_trained():
    model = segmenter(img_size=(16, 24))
    assert torch.equal(model.pos_embed, sincos_table(32, (4, 6)))
    assert model.pos_embed.requires_grad


def test_layer_decay_ends_at_the_head():
    model = segmenter(head="upernet", rel_pos_bias=True)
    optimizer = build_layer_decay_adamw(
        model, weight_decay=0.05, layer_decay=0.65, betas=(0.9, 0.999)
    )
    scales, decays = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scales[parameter] = group["lr_scale"]
            decays[parameter] = group["weight_decay"]
    assert len(scales) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        first, *others = name.split(".")
        distance = DEPTH + 1  # from the head, of class token, positions and patch embedding
        if first in ("blocks", "head"):
            distance = DEPTH - int(others[0]) if first == "blocks" else 0
        assert scales[parameter] == pytest.approx(0.65**distance), name
        if parameter.ndim == 1 or name in ("cls_token", "pos_embed"):
            assert decays[parameter] == 0, name
    assert min(scales.values()) == scales[model.cls_token] == scales[model.pos_embed]


@pytest.mark.parametrize("rel_pos_bias", [False, True])
def test_drop_path_rises_with_depth(rel_pos_bias):
    model = segmenter(drop_path=0.3, rel_pos_bias=rel_pos_bias)
    rates = [block.drop_path.drop_prob for block in model.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


# Relative positions


def with_tables(model, biased):
    """Copy a model's weights into one that has tables besides."""
    missing, unexpected = biased.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert [n.rsplit(".", 1)[1] for n in missing] == ["relative_position_bias_table"] * DEPTH


@both_heads
@pytest.mark.parametrize("side", [16, 24])
def test_tables_of_zeros_change_nothing(head, side):
    plain, biased = random_model(head=head), segmenter(head=head, rel_pos_bias=True).eval()
    with_tables(plain, biased)
    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    torch.testing.assert_close(biased.double()(images), plain.double()(images))


def beit_with(weights, img_size):
    """timm's BEiT with these weights of ours."""
    sizes = {n: v for n, v in SIZE._asdict().items() if n != "mlp_dim"}
    beit = timm_beit.Beit(
        **{**sizes, "img_size": img_size},
        use_abs_pos_emb=True,
        use_rel_pos_bias=True,
        num_classes=0,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )
    state = {}
    for name, tensor in weights.items():
        if name.endswith("attn.qkv.bias"):
            q, _, v = tensor.chunk(3)
            state |= {name.replace("qkv.bias", f"{n}_bias"): t for n, t in (("q", q), ("v", v))}
        elif not name.startswith("head."):
            state[name.replace("rel_pos.", "")] = tensor
    missing, unexpected = beit.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) == {"fc_norm.weight", "fc_norm.bias"}  # for pooling
    return beit.eval()


@pytest.mark.parametrize("tables", ["zero", "random"])
@pytest.mark.parametrize("img_size", [(16, 16), (16, 24)])
def test_the_encoder_equals_timms_beit(tables, img_size):
    model = random_model(img_size=img_size, rel_pos_bias=True)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.bias[32:64] = 0  # BEiT's keys have none
            table = block.attn.rel_pos.relative_position_bias_table
            table.zero_() if tables == "zero" else table.normal_()
    beit = beit_with(model.state_dict(), img_size).double()
    images = torch.randn(2, 3, *img_size, dtype=torch.float64)
    (found,) = model.double().feature_maps(images)
    theirs = beit.forward_features(images)[:, 1:]
    torch.testing.assert_close(found.flatten(2).mT, theirs, rtol=1e-9, atol=1e-9)


def random_attention(grid_size=(4, 6)):
    attention = BiasedAttention(32, 2, grid_size)
    torch.nn.init.normal_(attention.rel_pos.relative_position_bias_table)
    return attention


def test_a_bias_depends_on_the_distance_only():
    bias = random_attention().bias((4, 6))[0, :, 1:, 1:].unflatten(1, (4, 6)).unflatten(3, (4, 6))
    found = {}
    for top in range(4):
        for left in range(6):
            for row in range(4):
                for column in range(6):
                    distance = (top - row, left - column)
                    value = bias[:, top, left, row, column]
                    assert torch.equal(found.setdefault(distance, value), value)
    assert len({tuple(v.tolist()) for v in found.values()}) == 7 * 11


@pytest.mark.parametrize("grid_size", [(4, 6), (6, 4), (2, 3), (9, 9), (1, 1)])
def test_the_class_token_has_three_biases_of_its_own_at_every_size(grid_size):
    attention = random_attention()
    to_patch, from_patch, own = attention.rel_pos.relative_position_bias_table[-3:]
    bias = attention.bias(grid_size)
    num_patches = grid_size[0] * grid_size[1]
    assert bias.shape == (1, 2, 1 + num_patches, 1 + num_patches)
    bias = bias[0]
    assert torch.equal(bias[:, 0, 0], own)
    assert torch.equal(bias[:, 0, 1:], to_patch[:, None].expand(2, num_patches))
    assert torch.equal(bias[:, 1:, 0], from_patch[:, None].expand(2, num_patches))


class Unequal(int):
    """A number that equals no other, so that a table is resampled to the size that it has."""

    __hash__ = int.__hash__

    def __eq__(self, _):
        return False


def test_a_table_resampled_to_its_own_size_stays():
    attention = random_attention()
    expected = attention.bias((4, 6))
    assert torch.equal(expected, attention.rel_pos.get_bias())
    attention.rel_pos.window_size = (Unequal(4), Unequal(6))
    torch.testing.assert_close(attention.bias((4, 6)), expected)


@pytest.mark.parametrize("grid_size", [(5, 5), (3, 3), (8, 8), (6, 9)])
def test_tables_are_resampled_as_in_timm(grid_size):
    attention = random_attention((4, 4))
    table = attention.rel_pos.relative_position_bias_table.detach()
    shape = ((2 * grid_size[0] - 1) * (2 * grid_size[1] - 1) + 3, 2)
    resampled = timm.layers.pos_embed_rel.resize_rel_pos_bias_table_simple(table, grid_size, shape)
    other = BiasedAttention(32, 2, grid_size)
    other.rel_pos.relative_position_bias_table.data = resampled
    torch.testing.assert_close(attention.bias(grid_size), other.bias(grid_size))


@pytest.mark.parametrize("grid_size", [(8, 12), (2, 3), (4, 6)])
def test_symmetric_tables_stay_symmetric(grid_size):
    attention = random_attention()
    table = attention.rel_pos.relative_position_bias_table
    with torch.no_grad():
        table[:-3] += table[:-3].flip(0)  # as far to one side as to the other
    bias = attention.bias(grid_size)[:, :, 1:, 1:]
    torch.testing.assert_close(bias, bias.mT)


def test_attention_adds_the_bias_to_the_scores():
    attention = random_attention((2, 3))
    x = torch.randn(2, 7, 32)
    q, k, v = attention.qkv(x).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / 4 + attention.rel_pos.get_bias()
    expected = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, (2, 3)), expected)


def test_biased_attention_starts_as_self_attention():
    torch.manual_seed(0)
    plain = SelfAttention(32, 2)
    torch.manual_seed(0)
    biased = BiasedAttention(32, 2, (2, 3))
    assert not biased.rel_pos.relative_position_bias_table.any()
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(biased(x, (2, 3)), plain(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_attention_kernels_add_a_bias(dtype):
    q, k, v = torch.randn(3, 2, 4, 9, 16).to(dtype).requires_grad_().unbind()
    bias = torch.randn(1, 4, 9, 9).to(dtype).requires_grad_()
    exact = (q.double() @ k.double().mT / 4 + bias.double()).softmax(-1) @ v.double()
    got = scaled_dot_product_attention(q, k, v, bias)
    assert got.dtype is dtype
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}.get(dtype, 0.05)
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(exact)
    expected = torch.autograd.grad(exact, bias, grad)[0]
    (found,) = torch.autograd.grad(got, bias, grad.to(dtype))
    torch.testing.assert_close(found, expected, rtol=4 * tolerance, atol=4 * tolerance)


def test_mixed_precision_takes_biases():
    model = random_model(rel_pos_bias=True)
    images = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        (reduced,) = model.feature_maps(images)
    (full,) = model.feature_maps(images)
    assert (reduced.float() - full).norm() < 0.05 * full.norm()


# Settings and files


def test_settings_are_table_17s():
    options = HeadSettings("upernet", (512, 768)).options(num_classes=150)
    assert options == {
        "img_size": [512, 768],
        "head": "upernet",
        "rel_pos_bias": True,
        "num_classes": 150,
        "out_indices": None,
        "head_dim": 768,
        "dropout": 0.1,
    }
    assert HeadSettings("upernet").auxiliary == 0.4
    linear = HeadSettings(crop_size=(512,)).options()
    assert linear == {"img_size": [512, 512], "head": "linear", "rel_pos_bias": False}


def test_given_zeros_are_kept():
    settings = HeadSettings("upernet", aux_weight=0.0, dropout=0.0, rel_pos_bias=False)
    assert settings.auxiliary == 0
    assert settings.options()["dropout"] == 0
    assert settings.options()["rel_pos_bias"] is False


@pytest.mark.parametrize(
    "given", [{"out_indices": [0, 1, 2, 3]}, {"head_dim": 8}, {"aux_weight": 0.0}, {"dropout": 0.0}]
)
def test_settings_of_the_other_head_are_refused(given):
    (name,) = given
    with pytest.raises(InputError, match=f"--{name} is for --head upernet"):
        HeadSettings(**given)


def test_three_sides_of_a_crop_are_refused():
    with pytest.raises(InputError, match="--crop_size takes one side"):
        HeadSettings(crop_size=(512, 512, 512))


def test_upernet_refuses_a_batch_of_one():
    HeadSettings("linear").check_batch_size(1)
    HeadSettings("upernet").check_batch_size(2)
    with pytest.raises(InputError, match="--batch_size 2"):
        HeadSettings("upernet").check_batch_size(1)
    segmenter(head="linear").train()(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="more than 1 value"):
        segmenter(head="upernet").train()(torch.randn(1, 3, 16, 16))


@pytest.fixture
def tiny(monkeypatch):
    """A tiny model under the name of a real one."""
    monkeypatch.setitem(model_settings.SIZES, "tiny_patch4", SIZE)


def checkpoint(model, options, **others):
    return {
        "format": "crossmae-segmentation",
        "version": 1,
        "model_name": "vit_tiny_patch4",
        "model_options": options,
        "model": model.state_dict(),
        "ema": None,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "classes": ["a", "b", "c", "d", "e"],
        **others,
    }


UPERNET = {"img_size": [16, 24], "head": "upernet", "rel_pos_bias": True, "num_classes": CLASSES}
UPERNET |= {"out_indices": [0, 1, 2, 3], "head_dim": 16, "dropout": 0.1}
LINEAR = {"img_size": [16, 24], "head": "linear", "rel_pos_bias": False, "num_classes": CLASSES}


@pytest.mark.parametrize("options", [LINEAR, UPERNET], ids=["linear", "upernet"])
@pytest.mark.parametrize("averaged", [False, True])
def test_models_load_as_saved(tiny, tmp_path, options, averaged):
    model, other = (random_model(**options) for _ in range(2))
    ema = model.state_dict() if averaged else None
    content = checkpoint(other if averaged else model, options, ema=ema)
    loaded, found = load_segmenter(stored(tmp_path / "model.pth", content))
    assert not loaded.training
    assert found["classes"] == content["classes"] and found["mean"] == content["mean"]
    images = torch.randn(1, 3, 16, 24)
    assert all(map(torch.equal, loaded(images), model(images)))


def refused(path):
    with pytest.raises(InputError) as caught:
        load_segmenter(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_missing_and_truncated_files_are_refused(tiny, tmp_path):
    assert "not found" in refused(tmp_path / "missing.pth")
    path = stored(tmp_path / "model.pth", checkpoint(segmenter(**LINEAR), LINEAR))
    data = path.read_bytes()
    for length in (0, 10, len(data) // 2, len(data) - 10):
        path.write_bytes(data[:length])
        assert "truncated, damaged" in refused(path) or "not a weights file" in refused(path)


def test_other_checkpoints_are_refused(tiny, tmp_path):
    model = vit_nano(pool="avg", num_classes=3)
    for number, content in enumerate((finetuned(model), model.state_dict(), {})):
        path = stored(tmp_path / f"{number}.pth", content)
        assert "is not a segmentation checkpoint of this project" in refused(path)
    newer = checkpoint(segmenter(**LINEAR), LINEAR, version=2)
    assert "update the code" in refused(stored(tmp_path / "newer.pth", newer))


@pytest.mark.parametrize(
    "change",
    [
        {"model_options": {**LINEAR, "num_classes": 6}},
        {"model_options": {**LINEAR, "img_size": [16, 16]}},
        {"model_options": {**LINEAR, "rel_pos_bias": True}},
        {"model_options": UPERNET},
        {"model_options": {**LINEAR, "img_size": [15, 16]}},
        {"model_options": {**LINEAR, "head": "other"}},
        {"model_options": {**LINEAR, "other": 1}},
        {"model_options": None},
        {"model_name": "vit_other"},
        {"model_name": None},
        {"model": {}},
        {"model": {"head.weight": 1}},
        {"model": None},
        {"mean": [0.1]},
        {"std": [0.4, 0.5, 0.0]},
    ],
    ids=str,
)
def test_files_with_contradictions_are_refused(tiny, tmp_path, change):
    content = checkpoint(segmenter(**LINEAR), LINEAR) | change
    path = stored(tmp_path / "model.pth", content)
    with pytest.raises(InputError) as caught:
        load_segmenter(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_files_without_colors_are_refused(tiny, tmp_path, name):
    content = checkpoint(segmenter(**LINEAR), LINEAR) | {name: None}
    assert "use another file" in refused(stored(tmp_path / "model.pth", content))


@pytest.mark.parametrize("missing", ["model_options", "model_name", "mean", "model"])
def test_files_that_lack_something_are_refused(tiny, tmp_path, missing):
    content = checkpoint(segmenter(**LINEAR), LINEAR)
    del content[missing]
    assert "use another file" in refused(stored(tmp_path / "model.pth", content))


def test_incompatible_sizes_are_refused_in_one_sentence(tiny):
    with pytest.raises(InputError, match="vit_tiny_patch4 cannot be built: a patch size of 4"):
        build_segmenter("tiny_patch4", num_classes=2, img_size=[18, 16])
    with pytest.raises(InputError, match="UperNet reads four blocks"):
        build_segmenter("tiny_patch4", num_classes=2, head="upernet", out_indices=[0, 1, 2])
