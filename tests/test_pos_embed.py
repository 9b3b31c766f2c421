"""The position tables."""

import math

import pytest
import torch

from util.pos_embed import sincos_table


@pytest.mark.parametrize("grid_size", [(14, 14), (2, 5), (3, 1)])
def test_table_equals_the_formula(grid_size):
    dim, (down, across) = 16, grid_size
    frequencies = [10_000 ** (-k / (dim / 4)) for k in range(dim // 4)]
    rows = [[0.0] * dim]  # the class token
    for row in range(down):
        for column in range(across):
            rows.append(  # noqa: PERF401
                [
                    wave(x * f)
                    for x in (column, row)
                    for wave in (math.sin, math.cos)
                    for f in frequencies
                ]
            )
    table = sincos_table(dim, grid_size)
    assert table.shape == (1, 1 + down * across, dim)
    assert table.dtype == torch.float32
    expected = torch.tensor([rows], dtype=torch.float64)
    torch.testing.assert_close(table.double(), expected, atol=1e-5, rtol=0)


def test_swapping_rows_and_columns_swaps_the_halves():
    wide, tall = sincos_table(8, (2, 5))[0, 1:], sincos_table(8, (5, 2))[0, 1:]
    transposed = tall.view(5, 2, 8).transpose(0, 1).reshape(10, 8)
    assert torch.equal(wide, transposed.roll(4, dims=1))


@pytest.mark.parametrize(("dim", "grid_size"), [(192, (14, 14)), (512, (28, 28)), (1280, (16, 16))])
def test_every_position_has_its_own_row(dim, grid_size):
    rows = sincos_table(dim, grid_size)[0]
    distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf)
    assert distances.min() > 0.5


@pytest.mark.parametrize("dim", [1, 6, 18])
def test_width_must_be_divisible_by_four(dim):
    with pytest.raises(ValueError, match=f"divisible by 4, not {dim}"):
        sincos_table(dim, (2, 2))
