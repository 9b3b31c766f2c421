"""Marks for what some PyTorch releases do differently."""

import pytest
import torch


def _strides_of_gathered(device):
    """Strides of rows gathered out of a transposed tensor."""
    ids = torch.zeros(2, dtype=torch.int64, device=device)
    return torch.empty(2, 3, 4, device=device).mT[ids].stride()


def _draws_of_bernoulli():
    generator = torch.Generator().manual_seed(0)
    return torch.empty(8).bernoulli_(0.5, generator=generator).tolist()


# Inductor lays tensors out itself and is right in 2.6 too.
aot_eager = pytest.mark.skipif(
    _strides_of_gathered("meta") != _strides_of_gathered("cpu"),
    reason="aot_eager takes gathered patches for contiguous before PyTorch 2.7",
)
same_bernoulli = pytest.mark.skipif(
    _draws_of_bernoulli() != [0, 0, 1, 0, 0, 0, 1, 1],
    reason="drop path draws other numbers than PyTorch 2.11, which wrote the file",
)
