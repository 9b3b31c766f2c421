"""Fixed 2-D sine-cosine position tables (Sec. 3.1, as in MAE)."""

import math

import numpy as np
import torch
from torch import Tensor

MAX_NUMBERS = 2**27  # of a table: ViT-H on images of 4,096 x 4,096 px stays below


def sincos_positions(dim: int, positions: np.ndarray) -> np.ndarray:
    """Sines, then cosines, of positions at geometrically falling frequencies; (N,) -> (N, dim).

    All in float32: of the ways to compute it, this one comes closest to the released tables.
    """
    frequencies = 1 / 10_000 ** (np.arange(dim // 2, dtype=np.float32) / np.float32(dim / 2))
    angles = np.outer(positions.astype(np.float32), frequencies)  # (N, dim/2)
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=1)


def sincos_table(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """The table that encoder and decoder add to their tokens.

    The first half of a row encodes the column, the second half the row, as in MAE's tables.

    Args:
        dim: width, divisible by 4.
        grid_size: patches (down, across).

    Returns:
        float32 (1, 1+L, dim), zeros for the class token first, then patches in row-major order.

    Raises:
        ValueError: dim is not divisible by 4, or the table is absurdly large.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, not {dim}")
    if math.prod(grid_size) * dim > MAX_NUMBERS:
        raise ValueError(
            f"{grid_size[0]} x {grid_size[1]} patches in a width of {dim} need a table of more "
            f"than {MAX_NUMBERS} numbers: make the images or the width smaller"
        )
    rows, columns = (ids.ravel() for ids in np.indices(grid_size))
    halves = [sincos_positions(dim // 2, positions) for positions in (columns, rows)]
    table = torch.from_numpy(np.concatenate(halves, axis=1))  # (L, dim)
    return torch.cat((table.new_zeros(1, dim), table)).unsqueeze(0)
