"""What every test starts from: one thread and the same random state, whatever ran before it."""

import os

# Tests compare bits, which holds on a CPU. Name a GPU in this variable to run them on it.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
