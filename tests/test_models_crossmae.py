"""CrossMAE, and what holds for every masked autoencoder."""

import shutil
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from timm.models.vision_transformer import VisionTransformer

import models
from models_crossmae import (
    CrossAttention,
    InterBlockAttention,
    ViTEncoder,
    build_autoencoder,
    build_crossmae,
    inter_block_attention,
)
from models_mae import build_mae
from tests.helpers.versions import aot_eager
from util.compute.recompute import set_memory
from util.errors import InputError
from util.masking import TokenSplit, count_tokens, is_masked, random_split
from util.patches import gather_patches
from util.settings.model import ModelSize

SMALL = ModelSize(4, 16, 3, 2, img_size=16)
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2}
L = 16  # patches of an image of this size

CROSSMAE = {
    "all maps": partial(build_crossmae, SMALL, **DECODER),
    "last map": partial(build_crossmae, SMALL, **DECODER, feature_maps="last"),
    "chosen maps": partial(build_crossmae, SMALL, **DECODER, feature_maps=[0, 2, 3]),
    "xavier": partial(build_crossmae, SMALL, **DECODER, iba_init="xavier"),
    "softmax": partial(build_crossmae, SMALL, **DECODER, iba_softmax=True),
    "projection": partial(build_crossmae, SMALL, **DECODER, iba_projection=True),
}
MODELS = CROSSMAE | {
    "self-attention": partial(build_crossmae, SMALL, **DECODER, decoder_self_attention=True),
    "MAE": partial(build_mae, SMALL, **DECODER),
    "MAE, all maps": partial(build_mae, SMALL, **DECODER, feature_maps="all"),
}
every_crossmae = pytest.mark.parametrize("build", CROSSMAE.values(), ids=CROSSMAE)
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def away_from_start(model):
    """Move every weight, so that no norm is an identity and no bias is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def draw(batch=3, num_patches=L, mask_ratio=0.75, pred_ratio=None):
    return random_split(
        torch.rand(batch, num_patches), count_tokens(num_patches, mask_ratio, pred_ratio)
    )


def pixels(batch=3, dtype=torch.float64):
    return torch.randn(batch, 3, 16, 16, dtype=dtype)


def masked_pixels(split):
    """Bool (B, 1, H, W), True where a pixel is masked."""
    grid = is_masked(split, L).view(-1, 1, 4, 4)
    return grid.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def meta(build, **options):
    with torch.device("meta"):
        model = build(**options)
    return model.to("meta")  # the position tables too


# Decoding


def decode_all_and_some(model):
    images, split = pixels(), draw()
    chosen = torch.rand(split.predicted.shape).argsort(dim=1)[:, :5]  # another order, fewer
    some = TokenSplit(split.visible, split.predicted.take_along_dim(chosen, dim=1))
    expected = model.predict(images, split).take_along_dim(chosen.unsqueeze(-1), dim=1)
    return expected, model.predict(images, some)


@every_crossmae
def test_decoding_a_subset_in_any_order_equals_decoding_all(build):
    expected, got = decode_all_and_some(away_from_start(build()).double())
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["self-attention", "MAE", "MAE, all maps"])
def test_self_attention_makes_predictions_depend_on_each_other(name):
    expected, got = decode_all_and_some(away_from_start(MODELS[name]()).double())
    assert (got - expected).abs().max() > 1e-3


@every_crossmae
def test_order_of_the_visible_patches_does_not_matter(build):
    model, images, split = away_from_start(build()).double(), pixels(), draw()
    other = TokenSplit(split.visible.flip(1), split.predicted)
    torch.testing.assert_close(model.predict(images, other), model.predict(images, split))


@pytest.mark.parametrize("name", ["all maps", "self-attention"])
def test_prediction_equals_the_decoder_written_out(name):
    model, images, split = away_from_start(MODELS[name]()).double(), pixels(), draw()
    decoder = model.decoder
    contexts = decoder.inter_block_attention(model.encoder(images, split))
    for b, ids in enumerate(split.predicted):
        x = decoder.mask_token + decoder.pos_embed[:, 1 + ids]
        for block, mix, norm in zip(decoder.blocks, contexts, decoder.context_norms, strict=True):
            if name == "self-attention":  # Fig. 6
                x = x + block.self_attn(block.norm0(x))
            x = x + block.cross_attn(block.norm1(x), norm(mix[b : b + 1]))
            x = x + block.mlp(block.norm2(x))
        expected = decoder.pred(decoder.norm(x))[0]
        torch.testing.assert_close(model.predict(images, split)[b], expected)


def test_cross_attention_equals_pytorchs():
    ours = away_from_start(CrossAttention(8, context_dim=12, num_heads=2)).double()
    theirs = nn.MultiheadAttention(8, 2, kdim=12, vdim=12, batch_first=True).double()
    key, value = ours.kv.weight.chunk(2)
    key_bias, value_bias = ours.kv.bias.chunk(2)
    theirs.load_state_dict(
        {
            "q_proj_weight": ours.q.weight,
            "k_proj_weight": key,
            "v_proj_weight": value,
            "in_proj_bias": torch.cat((ours.q.bias, key_bias, value_bias)),
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    context = torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x, context), theirs(x, context, context)[0])


class MeanDecoder(nn.Module):
    """All that a decoder has to be."""

    def __init__(self, encoder, *, embed_dim, depth, num_heads):
        super().__init__()
        self.pred = nn.Linear(encoder.embed_dim, 4 * 4 * 3)

    def forward(self, feature_maps, split):
        x = self.pred(feature_maps[-1].mean(dim=1, keepdim=True))
        return x.expand(-1, split.predicted.shape[1], -1)


def test_a_decoder_needs_a_forward_pass_and_nothing_else(monkeypatch):
    build = partial(build_autoencoder, SMALL, MeanDecoder, decoder_depth=1)
    monkeypatch.setitem(models.MODELS, "mean_vit_small", build)
    model = models.build_model("mean_vit_small", {})
    set_memory(model.blocks, model.mixer, "low")
    model(pixels(dtype=torch.float32), draw()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# The encoder


@every_model
def test_masked_pixels_are_never_seen(build):
    model, images, split = build().double(), pixels(), draw()
    blinded = images.masked_fill(masked_pixels(split), torch.nan)
    seen, unseen = model.encoder(images, split), model.encoder(blinded, split)
    assert all(torch.equal(a, b) for a, b in zip(seen, unseen, strict=True))
    assert torch.equal(model.predict(images, split), model.predict(blinded, split))


def test_masked_pixels_get_no_gradient_from_the_encoder():
    encoder, split = CROSSMAE["all maps"]().encoder.double(), draw()
    images = pixels().requires_grad_()
    torch.stack(encoder(images, split)).square().sum().backward()
    hidden = masked_pixels(split).expand_as(images)
    assert not images.grad[hidden].any()
    assert images.grad[~hidden].all()


def test_every_feature_map_equals_timms_with_the_same_weights():
    encoder = ViTEncoder(
        img_size=(8, 20), patch_size=4, in_chans=2, embed_dim=24, depth=3, num_heads=3
    )
    encoder = away_from_start(encoder).double()
    oracle = VisionTransformer(
        img_size=(8, 20),
        patch_size=4,
        in_chans=2,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=0,
        global_pool="",
        final_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).double()
    oracle.load_state_dict(encoder.state_dict(), strict=True)
    expected = []
    oracle.blocks[0].register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0]))
    for block in oracle.blocks:
        block.register_forward_hook(lambda *call: expected.append(call[-1]))

    images = torch.randn(2, 2, 8, 20, dtype=torch.float64)
    last = oracle.forward_features(images)

    feature_maps = encoder(images)
    assert len(feature_maps) == 1 + 3
    torch.testing.assert_close(feature_maps, expected)
    torch.testing.assert_close(feature_maps[-1], last)


def test_visible_tokens_enter_as_they_would_without_a_split():
    encoder = away_from_start(CROSSMAE["all maps"]().encoder).double()
    images, split = pixels(), draw()
    everything, visible = encoder(images)[0], encoder(images, split)[0]
    expected = everything[:, 1:].take_along_dim(split.visible.unsqueeze(-1), dim=1)
    torch.testing.assert_close(visible[:, 1:], expected)
    cls_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(3, -1, -1)
    assert torch.equal(visible[:, :1], cls_token)


def test_a_split_that_shows_everything_only_permutes_the_tokens():
    encoder = away_from_start(CROSSMAE["all maps"]().encoder).double()
    images, order = pixels(), torch.rand(3, L).argsort(dim=1)
    split = TokenSplit(visible=order, predicted=order[:, :0])
    for everything, permuted in zip(encoder(images), encoder(images, split), strict=True):
        expected = everything[:, 1:].take_along_dim(order.unsqueeze(-1), dim=1)
        torch.testing.assert_close(permuted[:, :1], everything[:, :1])
        torch.testing.assert_close(permuted[:, 1:], expected)


@pytest.mark.parametrize("size", [(32, 32), (8, 32), (12, 16)])
def test_images_of_another_size_are_refused(size):
    # With a grid of another shape, the patch indices would mean other places than the positions.
    encoder = CROSSMAE["all maps"]().encoder
    for split in (None, draw()):
        with pytest.raises((InputError, ValueError)):
            encoder(torch.randn(3, 3, *size), split)


def test_patches_must_divide_the_image():
    with pytest.raises(ValueError, match="16 does not divide 224 x 230 px"):
        build_crossmae(ModelSize(16, 16, 1, 2), img_size=(224, 230))


# Inter-block attention


class PaperInterBlockAttention(nn.Module):
    """The pseudo-code of App. A.3."""

    def __init__(self, num_feat_maps, decoder_depth):
        super().__init__()
        self.linear = nn.Linear(num_feat_maps, decoder_depth, bias=False)

    def forward(self, feature_maps):
        return self.linear(torch.stack(feature_maps, dim=-1))


@pytest.mark.parametrize("map_ids", [(0, 1, 2, 3, 4), (4,), (3, 0, 2)])
def test_inter_block_attention_equals_the_papers(map_ids):
    feature_maps = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(5)]
    ours = InterBlockAttention(map_ids, num_mixes=3, dim=6).double()
    paper = PaperInterBlockAttention(len(map_ids), 3).double()
    paper.linear.weight.data = ours.weight.data

    mixes = ours(feature_maps)

    pseudo_code = paper([feature_maps[i] for i in map_ids])
    assert mixes.shape == (3, 2, 5, 6)
    for k, mix in enumerate(mixes):
        eq_1 = sum(ours.weight[k, j] * feature_maps[i] for j, i in enumerate(map_ids))
        torch.testing.assert_close(mix, eq_1)
        torch.testing.assert_close(mix, pseudo_code[..., k])


def test_each_decoder_block_reads_its_own_normalized_mix():
    model = away_from_start(CROSSMAE["all maps"]()).double()
    feature_maps = model.encoder(pixels(), draw())
    decoder, read = model.decoder, []
    for block in decoder.blocks:
        block.cross_attn.register_forward_pre_hook(lambda _, inputs: read.append(inputs[1]))
    decoder(feature_maps, draw())
    for k, (context, norm) in enumerate(zip(read, decoder.context_norms, strict=True)):
        weights = decoder.inter_block_attention.weight[k]
        mix = sum(w * x for w, x in zip(weights, feature_maps, strict=True))
        torch.testing.assert_close(context, norm(mix))


def test_without_inter_block_attention_each_block_reads_the_last_map_by_one_norm():
    model = away_from_start(CROSSMAE["last map"]()).double()
    feature_maps = model.encoder(pixels(), draw())
    decoder, read = model.decoder, []
    for block in decoder.blocks:
        block.cross_attn.register_forward_pre_hook(lambda _, inputs: read.append(inputs[1]))
    decoder(feature_maps, draw())
    expected = decoder.context_norm(feature_maps[-1])
    assert len(read) == 2
    assert all(torch.equal(context, expected) for context in read)


def test_normal_start_has_variance_one_over_the_number_of_maps():
    weight = InterBlockAttention(range(25), num_mixes=4000, dim=8).weight
    assert abs(weight.mean().item()) < 0.003
    assert weight.std().item() == pytest.approx(1 / 5, rel=0.02)
    assert (weight.abs() < 1 / 5).double().mean().item() == pytest.approx(0.683, abs=0.01)


def test_xavier_start_is_uniform_within_its_bound():
    weight = InterBlockAttention(range(25), num_mixes=4000, dim=8, init="xavier").weight
    bound = (6 / (25 + 4000)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@pytest.mark.parametrize(
    ("init", "std"), [("normal", 4**-0.5), ("xavier", (6 / (4 + 12)) ** 0.5 / 3**0.5)]
)
def test_no_sweep_overwrites_the_mixes_of_a_built_model(init, std):
    weights = []
    for seed in range(30):
        torch.manual_seed(seed)
        model = build_crossmae(SMALL, **{**DECODER, "decoder_depth": 12}, iba_init=init)
        weights.append(model.decoder.inter_block_attention.weight.detach())
    assert torch.stack(weights).std().item() == pytest.approx(std, rel=0.06)


def test_softmax_makes_each_mix_a_mean():
    iba = InterBlockAttention(range(3), num_mixes=4, dim=6, softmax=True).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(iba([x, x, x]), x.expand(4, -1, -1, -1))
    mixes = iba([x - 1, x, x + 1])
    assert ((x - 1 < mixes) & (mixes < x + 1)).all()


def test_projection_comes_before_the_mix_and_is_each_maps_own():
    feature_maps = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(4)]
    iba = InterBlockAttention([3, 1], num_mixes=2, dim=6, projection=True)
    iba = away_from_start(iba).double()
    projected = [iba.projections[0](feature_maps[3]), iba.projections[1](feature_maps[1])]
    expected = torch.stack([w[0] * projected[0] + w[1] * projected[1] for w in iba.weight])
    torch.testing.assert_close(iba(feature_maps), expected)


def four_maps():
    """An encoder whose input and three blocks make four feature maps."""
    return ViTEncoder(img_size=8, patch_size=4, in_chans=3, embed_dim=8, depth=3, num_heads=2)


def test_choice_of_feature_maps():
    encoder = four_maps()
    assert inter_block_attention(encoder, 2, feature_maps="last") is None
    assert inter_block_attention(encoder, 2, feature_maps="all").map_ids == (0, 1, 2, 3)
    assert inter_block_attention(encoder, 2, feature_maps=[3, 0]).map_ids == (3, 0)


@pytest.mark.parametrize("choice", [[0, 4], [-1], [1, 1], [], "", "alll", [0.5], ["0"]])
def test_bad_choices_of_feature_maps_are_refused(choice):
    with pytest.raises(ValueError, match="feature maps must be"):
        inter_block_attention(four_maps(), 2, feature_maps=choice)


def test_unknown_start_of_inter_block_attention_is_refused():
    with pytest.raises(ValueError, match="normal"):
        build_crossmae(SMALL, iba_init="kaiming")


# Initialization


INIT_SIZE = ModelSize(4, 64, 2, 2, img_size=16)


@pytest.mark.parametrize(
    "build",
    [
        partial(build_crossmae, INIT_SIZE, iba_projection=True, decoder_self_attention=True),
        partial(build_mae, INIT_SIZE),
    ],
    ids=["CrossMAE", "MAE"],
)
def test_every_layer_starts_as_in_mae(build):
    model = build(decoder_embed_dim=32, decoder_depth=2)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.97 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.06), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
            assert module.eps == 1e-6, name
        elif isinstance(module, nn.Conv2d):
            bound = (6 / (4 * 4 * 3 + 64)) ** 0.5
            assert 0.97 * bound < module.weight.abs().max() <= bound, name


def test_tokens_start_with_a_deviation_of_0_02():
    tokens = {"encoder.cls_token": [], "decoder.mask_token": []}
    for build in (build_crossmae, build_mae):
        for seed in range(20):
            torch.manual_seed(seed)
            model = build(INIT_SIZE, decoder_depth=1)
            for name, values in tokens.items():
                values.append(model.get_parameter(name).flatten())
    for values in tokens.values():
        assert torch.cat(values).std().item() == pytest.approx(0.02, rel=0.1)


# Sizes


def num_values(tensors):
    return sum(tensor.numel() for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_parameters"),
    [
        ("crossmae_vit_small_patch16", 347, 32_186_396),
        ("crossmae_vit_base_patch16", 347, 127_286_428),
    ],
)
def test_sizes_of_the_released_checkpoints(name, num_tensors, num_parameters):
    state = meta(models.MODELS[name]).state_dict()
    assert len(state) == num_tensors
    assert num_values(state.values()) == num_parameters


def test_vit_g_has_the_1011_million_parameters_of_its_paper():
    state = meta(models.MODELS["crossmae_vit_giant_patch14"]).encoder.state_dict()
    assert num_values(state.values()) == 1_011_199_616


def test_mae_has_as_many_tensors_as_the_released_one():
    assert len(meta(models.MODELS["mae_vit_base_patch16"]).state_dict()) == 254


@pytest.mark.parametrize(
    ("name", "timm_name", "options"),
    [
        ("vit_tiny_patch4", "vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}),
        ("vit_tiny_patch16", "vit_tiny_patch16_224", {}),
        ("vit_small_patch16", "vit_small_patch16_224", {}),
        ("vit_base_patch16", "vit_base_patch16_224", {}),
        ("vit_large_patch16", "vit_large_patch16_224", {}),
        ("vit_huge_patch14", "vit_huge_patch14_224", {}),
        ("vit_giant_patch14", "vit_giant_patch14_224", {}),
    ],
)
@pytest.mark.parametrize("method", ["crossmae", "mae"])
def test_encoders_have_the_shapes_of_timms(method, name, timm_name, options):
    with torch.device("meta"):
        vit = timm.create_model(timm_name, num_classes=0, final_norm=False, **options)
    encoder = meta(models.MODELS[f"{method}_{name}"]).encoder
    ours = {key: value.shape for key, value in encoder.state_dict().items()}
    theirs = {key: value.shape for key, value in vit.state_dict().items()}
    assert ours == theirs
    heads = {block.attn.num_heads for block in encoder.blocks}
    assert heads == {vit.blocks[0].attn.num_heads}


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_factories_give_a_loss(name):
    model = meta(models.MODELS[name])
    num_patches = model.encoder.num_patches
    split = draw(2, num_patches, pred_ratio=0.75)
    images = torch.empty(2, 3, *model.encoder.img_size, device="meta")
    loss = model(images, TokenSplit(*(ids.to("meta") for ids in split)))
    assert loss.shape == ()
    assert all(
        block.mlp.fc1.in_features == model.decoder.pos_embed.shape[-1]
        for block in model.decoder.blocks
    )


def test_there_are_sixteen_factories():
    assert len(models.MODELS) == 16


@every_model
@pytest.mark.parametrize(("img_size", "in_chans"), [((8, 20), 1), ((24, 4), 4), (8, 13)])
def test_any_number_of_channels_and_any_shape(build, img_size, in_chans):
    model = build(img_size=img_size, in_chans=in_chans)
    split = draw(2, model.encoder.num_patches, mask_ratio=0.5, pred_ratio=0.5)
    images = torch.randn(2, in_chans, *model.encoder.img_size)
    assert model.predict(images, split).shape == (*split.predicted.shape, 4 * 4 * in_chans)
    assert model(images, split).isfinite()


# Training


@every_model
def test_every_parameter_gets_a_gradient_but_the_position_tables(build):
    model = build()
    model(pixels(dtype=torch.float32), draw()).backward()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pos_embed", "decoder.pos_embed"}
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.any(), name
            assert parameter.grad.isfinite().all(), name
            # DDP copies a gradient of another layout into its bucket, and warns.
            assert parameter.grad.stride() == parameter.stride(), name


@every_model
def test_an_optimizer_step_leaves_the_position_tables(build):
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(pixels(dtype=torch.float32), draw()).backward()
    optimizer.step()
    unchanged = {name for name, value in model.state_dict().items() if value.equal(before[name])}
    assert unchanged == {"encoder.pos_embed", "decoder.pos_embed"}


@every_model
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_equals_one_written_out(build, norm_pix_loss):
    model = away_from_start(build(norm_pix_loss=norm_pix_loss)).double()
    images, split = pixels(), draw(pred_ratio=0.25)
    pred = model.predict(images, split)
    errors = []
    for b, ids in enumerate(split.predicted.tolist()):
        for n, i in enumerate(ids):
            row, column = i // 4 * 4, i % 4 * 4
            patch = images[b, :, row : row + 4, column : column + 4]
            target = patch.permute(1, 2, 0).flatten()
            if norm_pix_loss:
                variance = (target - target.mean()).square().sum() / (target.numel() - 1)
                target = (target - target.mean()) / (variance + 1e-6) ** 0.5
            errors.append((pred[b, n] - target).square())
    torch.testing.assert_close(model(images, split), torch.stack(errors).mean())


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_perfect_prediction_gives_the_pixels_back(norm_pix_loss, dtype):
    model, split = CROSSMAE["all maps"](norm_pix_loss=norm_pix_loss), draw()
    images = pixels(dtype=dtype)
    got = model.pixels(model.target(images, split), images, split)
    original = gather_patches(images, split.predicted, 4).to(got.dtype)
    torch.testing.assert_close(got, original, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "loss_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_loss_is_at_least_float32(dtype, loss_dtype):
    model, split = CROSSMAE["all maps"]().to(dtype), draw()
    images = pixels(dtype=dtype)
    assert model(images, split).dtype == loss_dtype
    # Rounded images, but moments that are not.
    exact = model.target(images.to(loss_dtype), split)
    assert torch.equal(model.target(images, split), exact)


@every_model
def test_autocast_keeps_the_loss_and_the_gradients_in_float32(build):
    model, images, split = build(), pixels(dtype=torch.float32), draw()
    expected = model(images, split)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, split)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.grad.dtype for p in trained} == {torch.float32}


@every_model
def test_model_draws_nothing_at_random(build):
    model, images, split = build().train(), pixels(dtype=torch.float32), draw()
    state = torch.get_rng_state()
    first = model(images, split)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(images, split), first)


def loss_and_gradients(function, model, images, split):
    model.zero_grad()
    loss = function(images, split)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def check_compiled(model, backend, tolerance):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    images = pixels(dtype=torch.float32)
    for stance in ("default", "fail_on_recompile"):  # another split is no new program
        split = draw(pred_ratio=0.25)
        expected = loss_and_gradients(model, model, images, split)
        with torch.compiler.set_stance(stance):
            got = loss_and_gradients(compiled, model, images, split)
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@aot_eager
@every_model
def test_model_compiles_to_one_graph(build):
    check_compiled(build(), "aot_eager", tolerance=1e-5)  # other kernels than in eager mode


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_loss_and_gradients():
    check_compiled(CROSSMAE["all maps"](), "inductor", tolerance=1e-5)
