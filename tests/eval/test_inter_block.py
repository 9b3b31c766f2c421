"""What inter-block attention reads: trends over the decoder, and sizes of feature maps."""

from functools import partial
from itertools import permutations

import pytest
import torch
from scipy.stats import spearmanr

from models_crossmae import InterBlockAttention
from tests.helpers.models import crossmae_nano, mae_nano
from tests.helpers.training import MASKING
from util.eval import inter_block
from util.eval.inter_block import (
    centers,
    depth_trend,
    map_sizes,
    mixing_weights,
    scaled_rows,
    shares,
)


def make_mixer(weights, map_ids=None, **options):
    mixer = InterBlockAttention(map_ids or range(weights.shape[1]), len(weights), dim=4, **options)
    mixer.weight.data = weights.clone()
    return mixer


def trend_of(weights, seed=0, sizes=None, **options):
    mixer = make_mixer(weights, **options)
    return trend_of_mixer(mixer, seed, sizes)


def trend_of_mixer(mixer, seed=0, sizes=None):
    weights = mixing_weights(mixer)
    return depth_trend(weights if sizes is None else weights * sizes, mixer.map_ids, seed=seed)


def band(num_mixes, num_maps):
    """Weights whose row i is a bump of random signs at map i, on top of a little of all."""
    distance = torch.arange(num_mixes)[:, None] - torch.arange(num_maps)
    signs = torch.randint(2, distance.shape) * 2 - 1
    return (torch.exp(-(distance**2) / 2) + 1e-3) * signs


@pytest.fixture
def few_orders(monkeypatch):
    monkeypatch.setattr(inter_block, "NUM_ORDERS", 200)


@pytest.mark.usefixtures("few_orders")
@pytest.mark.parametrize("options", [{}, {"softmax": True}, {"init": "xavier"}])
@pytest.mark.parametrize("sizes", [None, 10 ** torch.linspace(0, 1, 13)])
def test_random_starts_have_no_trend(options, sizes):
    mixers = [InterBlockAttention(range(13), 12, dim=4, **options) for _ in range(200)]
    trends = [trend_of_mixer(mixer, seed, sizes) for seed, mixer in enumerate(mixers)]
    p_values = torch.tensor([trend.p_value for trend in trends])
    assert abs(sum(trend.rho for trend in trends) / 200) < 0.1
    for level, most in ((0.05, 0.12), (0.25, 0.37), (0.5, 0.63)):
        assert 2 * level - most < (p_values < level).float().mean() < most


def test_late_blocks_that_read_early_maps_have_the_lowest_trend():
    falling, rising = trend_of(band(12, 12).flip(0)), trend_of(band(12, 12))
    assert falling.rho == pytest.approx(-1)
    assert falling.p_value <= 3 / (1 + inter_block.NUM_ORDERS)
    assert rising.rho == pytest.approx(1)
    assert rising.p_value > 0.999


@pytest.mark.usefixtures("few_orders")
def test_rho_is_spearmans_and_zero_without_an_order():
    for number in range(20):
        weights = torch.randn(12, 13)
        if number % 2:
            weights[3] = weights[7] = weights[1]  # ties
        expected = spearmanr(range(1, 13), centers(weights, range(13))).statistic
        assert trend_of(weights).rho == pytest.approx(expected, abs=1e-12)
    assert trend_of(torch.randn(13).expand(12, -1)).rho == 0


def test_p_values_are_those_of_all_orders():
    # Rows of a random start are exchangeable, so every order of the centers is equally likely.
    weights, order = torch.randn(5, 13), range(5)
    trend = trend_of(weights)
    rhos = [spearmanr(order, permuted).statistic for permuted in permutations(order)]
    expected = sum(rho <= trend.rho + 1e-9 for rho in rhos) / len(rhos)
    assert trend.p_value == pytest.approx(expected, abs=0.02)


def test_a_trend_depends_on_shares_only():
    weights = torch.randn(12, 13)
    scales = torch.rand(12, 1) * 10 + 0.1
    signs = torch.randint(2, weights.shape) * 2 - 1
    assert trend_of(weights * scales * signs) == trend_of(weights)
    assert trend_of(weights, seed=1).rho == trend_of(weights).rho
    assert trend_of(weights, sizes=3 * torch.ones(13)) == trend_of(weights)


@pytest.mark.parametrize("softmax", [False, True])
def test_sizes_multiply_the_weights_as_they_are_applied(softmax):
    weights, sizes = torch.randn(12, 13), torch.rand(13) * 5
    applied = weights.softmax(dim=1) if softmax else weights
    got = trend_of(weights, sizes=sizes, softmax=softmax)
    assert got.rho == trend_of(applied * sizes).rho


def test_a_map_of_size_zero_is_as_if_it_were_not_there():
    weights, sizes = torch.randn(12, 13), torch.ones(13)
    sizes[:6] = 0
    expected = trend_of(weights[:, 6:], map_ids=range(6, 13))
    assert trend_of(weights, sizes=sizes).rho == expected.rho


def test_shares_and_scaled_rows():
    weights = torch.randn(12, 13)
    torch.testing.assert_close(shares(weights).sum(dim=1), torch.ones(12))
    assert torch.equal(shares(-weights), shares(weights))
    scaled = scaled_rows(weights)
    assert (scaled.abs().amax(dim=1) == 1).all()
    assert torch.equal(scaled.sign(), weights.sign())
    torch.testing.assert_close(shares(scaled), shares(weights))


def test_a_softmax_is_applied_to_weights():
    raw = torch.randn(12, 13)
    weights = mixing_weights(make_mixer(raw, softmax=True))
    torch.testing.assert_close(weights, raw.exp() / raw.exp().sum(dim=1, keepdim=True))
    assert torch.equal(mixing_weights(make_mixer(raw)), raw)
    # A large negative weight is read most without a softmax, and least with it.
    raw = -8 * torch.eye(12, 13)
    assert trend_of(raw).rho == pytest.approx(1)
    assert trend_of(raw, softmax=True).rho == pytest.approx(-1)


def test_centers_are_on_the_axis_of_encoder_blocks():
    weights = torch.tensor([[1.0, 0.0], [0.0, -2.0], [3.0, -1.0]])
    assert centers(weights, (0, 4)).tolist() == [0, 4, 1]
    # Listed from deep to shallow, the same maps have the opposite trend.
    assert trend_of(band(6, 6), map_ids=[0, 2, 4, 6, 8, 10]).rho == pytest.approx(1)
    assert trend_of(band(6, 6), map_ids=[10, 8, 6, 4, 2, 0]).rho == pytest.approx(-1)


@pytest.mark.parametrize("shape", [(1, 13), (12, 1), (1, 1)])
def test_a_single_mix_or_map_has_no_trend(shape):
    assert trend_of(torch.randn(shape)) is None
    assert trend_of_mixer(mae_nano(feature_maps="all").mixer) is None


MIXING = {
    "all": crossmae_nano,
    "some": partial(crossmae_nano, feature_maps=[0, 2]),
    "reversed": partial(crossmae_nano, feature_maps=[2, 0]),
    "projections": partial(crossmae_nano, feature_maps=[2, 1], iba_projection=True),
    "mae": partial(mae_nano, feature_maps="all"),
}


@pytest.mark.parametrize("name", MIXING)
def test_sizes_are_those_of_the_maps_that_are_mixed(name):
    model = MIXING[name]().double()
    # Scales of their own, so that a mean of the batches' sizes would be wrong.
    batches = [
        (scale * torch.randn(n, 3, 16, 16).double(), MASKING[None].full_split(torch.rand(n, 16)))
        for n, scale in ((5, 1), (1, 9), (3, 0.1))
    ]
    sizes = map_sizes(model, batches)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    encoded = [torch.cat(maps) for maps in zip(*(model.encoder(*b) for b in batches), strict=True)]
    maps = [encoded[i] for i in model.mixer.map_ids]
    if name == "projections":
        maps = [p(x) for p, x in zip(model.mixer.projections, maps, strict=True)]
    expected = torch.stack([x.square().mean().sqrt() for x in maps]).float()
    torch.testing.assert_close(sizes, expected)
    assert len(set(sizes.tolist())) == len(sizes)


def test_sizes_leave_no_hook_when_a_model_fails():
    model, split = crossmae_nano(), MASKING[None].full_split(torch.rand(1, 16))
    with pytest.raises(ValueError, match="encoder takes images"):
        map_sizes(model, [(torch.randn(1, 3, 8, 8), split)])
    assert not model.mixer._forward_pre_hooks
