"""Where masked tokens attend: masses, maps and readings, and hooks that change nothing."""

from functools import partial

import pytest
import torch

from models_mae import build_mae
from tests.helpers.models import AUTOENCODERS, noisy
from tests.helpers.training import MASKING
from util.eval import attention
from util.eval.attention import LayerAttention, compare_keys, measure_attention
from util.masking import TokenCounts, random_split
from util.settings.model import ModelSize

every_model = pytest.mark.parametrize("name", AUTOENCODERS)
every_mae = pytest.mark.parametrize("name", ["mae", "mae_mix"])
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


def draw(num_images=7):
    """Images and a split of 4 visible and 12 masked patches."""
    images = torch.randn(num_images, 3, 16, 16, dtype=torch.float64)
    return images, MASKING[None].full_split(torch.rand(num_images, 16))


def watch(model, use, batch):
    arguments = batch if use == "attention_maps" else [[batch]]
    getattr(attention, use)(model, *arguments)


def has_hooks(model):
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def scores_in_image_order(model, images, split):
    """Decode as MAE's paper does, each token in its place -> scores (B, h, 1+L, 1+L) by block."""
    decoder, (maps, batch) = model.decoder, (model.encoder(images, split), len(images))
    context = maps[-1] if model.mixer is None else sum(map(torch.mul, model.mixer.weight[0], maps))
    tokens = decoder.embed(decoder.context_norm(context))
    x = decoder.mask_token.repeat(batch, 17, 1)
    x[:, 0] = tokens[:, 0]
    x[torch.arange(batch)[:, None], 1 + split.visible] = tokens[:, 1:]
    x = x + decoder.pos_embed
    for block in decoder.blocks:
        q, k, _ = block.attn.qkv(block.norm1(x)).view(batch, 17, 3, 2, 16).unbind(2)
        yield torch.einsum("bnhd,bmhd->bhnm", q, k) / 16**0.5
        x = block(x)


@every_mae
def test_masses_are_those_of_outer_products_of_the_mask(name):
    model, (images, split) = noisy(name), draw()
    m = torch.ones(7, 17, dtype=torch.float64)  # 1 where masked (App. A.1)
    m[:, 0] = 0
    m.scatter_(1, 1 + split.visible, 0)
    first = torch.zeros_like(m)
    first[:, 0] = 1
    keys = torch.stack((first, 1 - m - first, m))  # (3, B, N)
    pairs = [*torch.einsum("bn,kbm->kbnm", m, keys), torch.diag_embed(m)]
    pairs = torch.stack(pairs)  # (4, B, N, N)
    layers = measure_attention(model, [(images, split)])
    assert [(layer.block, layer.kind) for layer in layers] == [(1, "self"), (2, "self")]
    for layer, scores in zip(layers, scores_in_image_order(model, images, split), strict=True):
        maps = scores.softmax(dim=-1)
        sums = torch.einsum("kbnm,bhnm->hk", pairs, maps)
        close(layer.mass, sums / (7 * 12))
        close(layer.per_key, sums / pairs.sum(dim=(1, 2, 3)) * 17)
        close(layer.logits, torch.einsum("kbnm,bhnm->hk", pairs, scores) / pairs.sum(dim=(1, 2, 3)))
        by_key = torch.einsum("bn,bhnm->bhm", m, maps)  # from all masked tokens together
        received = torch.einsum("kbm,bhm->hk", keys, by_key) / keys.sum(dim=(1, 2))
        close(layer.received[:, :3], received)
        close(layer.received[:, 2], layer.mass[:, 2])  # as many masked keys as queries


@every_model
def test_masses_sum_to_one_and_a_token_is_one_of_the_masked(name):
    model = noisy(name)
    for layer in measure_attention(model, [draw()]):
        close(layer.mass[:, :3].sum(dim=1), torch.ones(2, dtype=torch.float64))
        assert (layer.mass >= 0).all()
        assert (layer.mass[:, 3] <= layer.mass[:, 2]).all()


@pytest.mark.parametrize("name", [n for n in AUTOENCODERS if not n.startswith("mae")])
def test_cross_attention_sees_no_masked_token_and_self_attention_only_those(name):
    layers = measure_attention(noisy(name), [draw()])
    kinds = ["self", "cross"] * 2 if name == "self_attention" else ["cross"] * 2
    assert [layer.kind for layer in layers] == kinds
    assert [layer.block for layer in layers] == sorted([1, 2] * (len(kinds) // 2))
    for layer in layers:
        unseen = [2, 3] if layer.kind == "cross" else [0, 1]
        assert layer.num_keys == ((1, 4, 0, 0) if layer.kind == "cross" else (0, 0, 12, 1))
        assert (layer.mass[:, unseen] == 0).all()
        assert layer.per_key.isnan().any(dim=0).nonzero().flatten().tolist() == unseen


@pytest.mark.parametrize(("side", "visible", "masked"), [(4, 4, 12), (14, 49, 147)])
def test_without_queries_attention_is_uniform(side, visible, masked):
    size, decoder = ModelSize(1, 8, 1, 2, side), {"decoder_embed_dim": 8, "decoder_num_heads": 2}
    model = build_mae(size, decoder_depth=2, **decoder).double()
    for block in model.decoder.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight.data[:8])
        torch.nn.init.normal_(block.attn.qkv.bias.data[8:])
    counts = TokenCounts(side**2, visible, masked)
    split = random_split(torch.rand(3, side**2), counts)
    images = torch.randn(3, 3, side, side, dtype=torch.float64)
    layers, number = measure_attention(model, [(images, split)]), 1 + side**2
    for layer in layers:
        expected = torch.tensor([1, visible, masked, 1], dtype=torch.float64) / number
        close(layer.mass, expected.expand(2, -1))
        close(layer.per_key, torch.ones(2, 4, dtype=torch.float64))
    by_reading = [comparison.ratio for comparison in compare_keys(layers).values()]
    assert by_reading[:2] == pytest.approx([1, 1], rel=1e-12)
    assert by_reading[2] is None  # scores of 0


def test_readings_of_known_masses():
    values = [[0.1, 0.6, 0.3, 0.2], [0.3, 0.2, 0.5, 0.1]]
    mass, logits = torch.tensor(values), torch.tensor([[0.0, 1.0, 2.0, 9.0], [0.0, 2.0, 4.0, 9.0]])
    layer = LayerAttention(1, "self", mass, logits, (1, 4, 15, 1), 15)
    other = LayerAttention(2, "self", mass.flip(0), -3 * logits, (1, 4, 15, 1), 15)
    readings = list(compare_keys([layer, other]).values())
    # Means of 0.6 and 0.2, and of 0.3 and 0.5: 15 queries and 4 or 15 keys, 20 keys in all.
    assert readings[0] == pytest.approx((0.4 / 4 * 15, 0.4))
    assert readings[1] == pytest.approx((0.4 / 4 * 20, 0.4 / 15 * 20))
    assert readings[2] == pytest.approx((-1.5, -3))
    ratios = [comparison.ratio for comparison in readings]
    assert ratios == [pytest.approx(15 / 4), pytest.approx(15 / 4), None]


@every_model
def test_scores_give_the_output_of_their_layer(name):
    model, batch = noisy(name), draw()
    for layer in attention.attention_layers(model.decoder):
        calls, scores = [], []
        handle = layer.module.register_forward_hook(lambda *call, calls=calls: calls.append(call))
        with attention.watch_scores(layer.module, scores.append):
            model.predict(*batch)
        handle.remove()
        (((_, inputs, output),), (score,)) = calls, scores
        values = getattr(layer.module, "qkv", None) or layer.module.kv
        v = values(inputs[-1])[..., -32:].unflatten(-1, (2, 16))  # (B, M, h, d)
        joined = torch.einsum("bhnm,bmhd->bnhd", score.softmax(dim=-1), v).flatten(2)
        close(layer.module.proj(joined), output)


@every_model
def test_results_are_means_over_images_whatever_the_batch_size(name):
    model, (images, split) = noisy(name), draw()

    def batches(size):
        parts = (images.split(size), *(ids.split(size) for ids in split))
        return [(x, type(split)(*ids)) for x, *ids in zip(*parts, strict=True)]

    whole = measure_attention(model, batches(7))
    singles = [measure_attention(model, [batch]) for batch in batches(1)]
    for kind in ("mass", "logits"):
        expected = [getattr(layer, kind) for layer in whole]
        for size in (1, 3):
            got = [getattr(layer, kind) for layer in measure_attention(model, batches(size))]
            close(got, expected, equal_nan=True)
        means = [sum(getattr(x, kind) for x in own) / 7 for own in zip(*singles, strict=True)]
        close(means, expected, equal_nan=True)


@every_mae
def test_maps_are_the_rows_of_masked_tokens_in_image_order(name):
    model, (images, split) = noisy(name), draw()
    maps = attention.attention_maps(model, images, split)
    by_block = [s.softmax(dim=-1).mean(dim=1) for s in scores_in_image_order(model, images, split)]
    rows = (sum(by_block) / 2)[torch.arange(7)[:, None], 1 + split.predicted]  # (B, P, 1+L)
    close(maps, rows.float(), rtol=1e-5, atol=1e-6)


@every_model
def test_maps_sum_to_one_and_have_only_places_that_are_seen(name):
    model, (images, split) = noisy(name), draw()
    maps = attention.attention_maps(model, images, split)
    close(maps.sum(dim=-1), torch.ones(7, 12), rtol=1e-5, atol=0)
    hidden = (1 + split.predicted).unsqueeze(1).expand(-1, 12, -1)
    to_masked = maps.gather(2, hidden).sum(dim=-1)
    assert ((to_masked > 0) == (name in ("self_attention", "mae", "mae_mix"))).all()
    reordered = split._replace(visible=split.visible.flip(1), predicted=split.predicted.flip(1))
    close(attention.attention_maps(model, images, reordered), maps.flip(1), rtol=1e-5, atol=1e-6)


@every_model
@pytest.mark.parametrize("use", ["measure_attention", "attention_maps"])
def test_watching_changes_no_prediction_and_leaves_no_hook(name, use, monkeypatch):
    model, batch = noisy(name), draw()
    before, during, predict = model.predict(*batch), [], model.predict
    monkeypatch.setattr(model, "predict", lambda *inputs: during.append(predict(*inputs)))
    watch(model, use, batch)
    assert not has_hooks(model)
    assert torch.equal(during[0], before)
    assert torch.equal(predict(*batch), before)


@every_model
@pytest.mark.parametrize("use", ["measure_attention", "attention_maps"])
def test_an_error_leaves_no_hook(name, use, monkeypatch):
    model, batch = noisy(name), draw()
    monkeypatch.setattr(model.decoder, "pred", torch.nn.Linear(1, 1))  # of the wrong width
    with pytest.raises(RuntimeError):
        watch(model, use, batch)
    assert not has_hooks(model)
