"""Token counts and splits."""

import math

import pytest
import torch

from util.errors import InputError
from util.masking import (
    MASK_SAMPLINGS,
    TokenCounts,
    check_grid,
    count_tokens,
    grid_split,
    is_masked,
    random_split,
    split_tokens,
)


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "pred_ratio", "num_visible", "num_predicted"),
    [
        # 224 px, patches of 16: Tables 1, 3b and 3c.
        (196, 0.75, 0.75, 49, 147),
        (196, 0.75, 0.25, 49, 49),
        (196, 0.75, 0.15, 49, 29),
        (196, 0.65, None, 68, 128),
        (196, 0.75, None, 49, 147),
        (196, 0.85, None, 29, 167),
        (196, 0.65, 0.25, 68, 49),
        (196, 0.85, 0.25, 29, 49),
        # 448 px: Table 3f.
        (784, 0.75, 0.75, 196, 588),
        (784, 0.75, 0.25, 196, 196),
        (784, 0.75, 0.15, 196, 118),
        (784, 0.65, None, 274, 510),
        (784, 0.85, None, 117, 667),
        # 224 px, patches of 14: ViT-H.
        (256, 0.75, 0.75, 64, 192),
        (256, 0.75, 0.25, 64, 64),
        (256, 0.75, 0.15, 64, 38),
        (256, 0.65, None, 89, 167),
        (256, 0.85, None, 38, 218),
        # Small images.
        (4, 0.75, 0.25, 1, 1),
        (16, 0.75, 0.75, 4, 12),
        (64, 0.75, 0.25, 16, 16),
    ],
)
def test_counts_of_the_paper(num_patches, mask_ratio, pred_ratio, num_visible, num_predicted):
    counts = count_tokens(num_patches, mask_ratio, pred_ratio)
    assert counts == (num_patches, num_visible, num_predicted)
    assert counts.masked == num_patches - num_visible


@pytest.mark.parametrize(
    ("num_patches", "mask_ratio", "num_visible"), [(100, 0.9, 10), (10, 0.9, 1)]
)
def test_counts_are_free_of_floating_point_error(num_patches, mask_ratio, num_visible):
    assert math.floor(num_patches * (1 - mask_ratio)) == num_visible - 1  # the trap
    assert count_tokens(num_patches, mask_ratio, None).visible == num_visible


@pytest.mark.parametrize("num_patches", [100, 196, 256, 784])
def test_counts_are_exact_at_every_whole_percentage(num_patches):
    for masked in range(1, 100):
        every = count_tokens(num_patches, masked / 100, None)
        assert every.visible == num_patches * (100 - masked) // 100
        assert every.predicted == every.masked
        for predicted in range(1, masked + 1):
            counts = count_tokens(num_patches, masked / 100, predicted / 100)
            assert abs(100 * counts.predicted - num_patches * predicted) <= 50  # the nearest
            assert counts.predicted <= counts.masked
        assert counts.masked - counts.predicted <= 1  # γ = p


@pytest.mark.parametrize("mask_ratio", [0, 1, -0.1, 1.5, math.nan])
def test_mask_ratio_out_of_range_is_refused(mask_ratio):
    with pytest.raises(InputError, match="mask ratio must be strictly between 0 and 1"):
        count_tokens(196, mask_ratio, None)


@pytest.mark.parametrize("pred_ratio", [0, -0.25, 0.76, 1, math.nan])
def test_prediction_ratio_out_of_range_is_refused(pred_ratio):
    with pytest.raises(InputError, match="only masked patches can be predicted"):
        count_tokens(196, 0.75, pred_ratio)


def test_nothing_to_see_or_to_predict_is_refused():
    with pytest.raises(InputError, match="none of 3 patches visible"):
        count_tokens(3, 0.75, 0.5)
    with pytest.raises(InputError, match="predicts none of 16 patches"):
        count_tokens(16, 0.75, 0.01)


def test_lowest_noise_is_seen_and_the_next_predicted():
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.4, 0.0, 0.6]])
    split = random_split(noise, TokenCounts(4, visible=2, predicted=1))
    assert split.visible.tolist() == [[1, 3], [2, 0]]
    assert split.predicted.tolist() == [[0], [1]]


def both_splits(noise, counts):
    return {
        "random": random_split(noise, counts),
        "grid": grid_split(noise, counts, grid_size=(4, 6)),
    }


@pytest.mark.parametrize("sampling", MASK_SAMPLINGS)
@pytest.mark.parametrize("num_predicted", [1, 6, 18])
def test_visible_and_predicted_are_different_patches(sampling, num_predicted):
    split = both_splits(torch.rand(50, 24), TokenCounts(24, 6, num_predicted))[sampling]
    assert split.visible.dtype == split.predicted.dtype == torch.int64
    assert split.visible.shape == (50, 6)
    assert split.predicted.shape == (50, num_predicted)
    for ids in torch.cat(split, dim=1).tolist():
        assert len(set(ids)) == 6 + num_predicted
        assert set(ids) <= set(range(24))  # all of them when every masked patch is predicted


def frequencies(ids, num_patches):
    return torch.bincount(ids.flatten(), minlength=num_patches) / ids.shape[0]


def test_every_patch_is_as_likely():
    split = random_split(torch.rand(4000, 16), TokenCounts(16, visible=4, predicted=2))
    five_sigma = 5 * (0.25 * 0.75 / 4000) ** 0.5
    torch.testing.assert_close(
        frequencies(split.visible, 16), torch.full((16,), 4 / 16), atol=five_sigma, rtol=0
    )
    torch.testing.assert_close(
        frequencies(split.predicted, 16), torch.full((16,), 2 / 16), atol=five_sigma, rtol=0
    )


@pytest.mark.parametrize("sampling", MASK_SAMPLINGS)
def test_split_is_a_function_of_the_noise_of_its_image(sampling):
    noise, counts = torch.rand(8, 24), TokenCounts(24, 6, 6)
    state = torch.get_rng_state()
    split = both_splits(noise, counts)[sampling]
    one = both_splits(noise[3:4], counts)[sampling]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.visible[0], split.visible[3])
    assert torch.equal(one.predicted[0], split.predicted[3])
    assert not torch.equal(split.predicted[0], split.predicted[1])


def test_grid_keeps_the_top_left_of_every_four():
    visible = grid_split(torch.rand(2, 24), TokenCounts(24, 6, 6), grid_size=(4, 6)).visible
    assert visible.tolist() == [[0, 2, 4, 12, 14, 16]] * 2


def test_grid_predicts_masked_patches_at_random():
    counts = TokenCounts(16, visible=4, predicted=3)
    predicted = grid_split(torch.rand(4000, 16), counts, grid_size=(4, 4)).predicted
    got = frequencies(predicted, 16)
    visible = torch.tensor([0, 2, 8, 10])
    assert not got[visible].any()
    masked = torch.ones(16, dtype=torch.bool).scatter(0, visible, False)
    five_sigma = 5 * (0.25 * 0.75 / 4000) ** 0.5
    torch.testing.assert_close(got[masked], torch.full((12,), 3 / 12), atol=five_sigma, rtol=0)


def test_grid_never_predicts_a_visible_patch_however_high_the_noise():
    noise = torch.full((3, 16), 1 - 2**-24)  # the highest float32 below one
    split = grid_split(noise, TokenCounts(16, 4, 12), grid_size=(4, 4))
    assert sorted(split.predicted[2].tolist()) == [i for i in range(16) if i not in (0, 2, 8, 10)]


@pytest.mark.parametrize(
    ("grid_size", "mask_ratio", "message"),
    [
        ((14, 14), 0.65, "--mask_ratio 0.75"),
        ((7, 14), 0.75, "7 x 14"),
        ((14, 7), 0.75, "14 x 7"),
    ],
)
def test_grids_that_cannot_work_are_refused(grid_size, mask_ratio, message):
    check_grid((14, 14), 0.75)
    with pytest.raises(InputError, match=message):
        check_grid(grid_size, mask_ratio)


def test_sampling_is_chosen_by_name():
    noise, counts = torch.rand(2, 24), TokenCounts(24, 6, 6)
    for sampling, expected in both_splits(noise, counts).items():
        got = split_tokens(noise, counts, (4, 6), sampling)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_unknown_sampling_is_refused():
    with pytest.raises((InputError, ValueError)):
        split_tokens(torch.rand(2, 24), TokenCounts(24, 6, 6), (4, 6), "gird")


def test_is_masked_is_true_where_the_encoder_does_not_see():
    split = random_split(torch.rand(5, 24), TokenCounts(24, 6, 4))
    mask = is_masked(split, 24)
    assert mask.dtype == torch.bool
    for row, ids in zip(mask.tolist(), split.visible.tolist(), strict=True):
        assert row == [i not in ids for i in range(24)]
