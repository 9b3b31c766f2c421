"""Fixed 2-D sine-cosine position embeddings (Sec. 3.1, as in MAE)."""

import math

import numpy as np
import torch
from torch import Tensor

MAX_NUMBERS = 2**27  # in a table: enough for ViT-H on images of 4,096 x 4,096 px


def sincos_positions(dim: int, positions: np.ndarray) -> np.ndarray:
    """Sines, then cosines, of positions at geometrically falling frequencies; (N,) -> (N, dim).

    Computed in float32, which comes closest to the released tables.
    """
    frequencies = 1 / 10_000 ** (np.arange(dim // 2, dtype=np.float32) / np.float32(dim / 2))
    angles = np.outer(positions.astype(np.float32), frequencies)  # (N, dim/2)
    return np.concatenate((np.sin(angles), np.cos(angles)), axis=1)


def sincos_table(dim: int, grid_size: tuple[int, int]) -> Tensor:
    """Position embedding of the encoder and the decoder.

    The first half of a row encodes the column, the second half the row, as in MAE's tables.

    Args:
        dim: width, divisible by 4.
        grid_size: patches (down, across).

    Returns:
        float32 (1, 1+L, dim): zeros for the class token, then the patches in row-major order.

    Raises:
        ValueError: dim is not divisible by 4, or the table has more than MAX_NUMBERS numbers.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine position embeddings need a width divisible by 4, not {dim}")
    if math.prod(grid_size) * dim > MAX_NUMBERS:
        raise ValueError(
            f"{grid_size[0]} x {grid_size[1]} patches at width {dim} need a position embedding of "
            f"more than {MAX_NUMBERS} numbers: make the images or the width smaller"
        )
    rows, columns = (ids.ravel() for ids in np.indices(grid_size))
    halves = [sincos_positions(dim // 2, positions) for positions in (columns, rows)]
    table = torch.from_numpy(np.concatenate(halves, axis=1))  # (L, dim)
    return torch.cat((table.new_zeros(1, dim), table)).unsqueeze(0)
