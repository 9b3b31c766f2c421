"""Random state derived from the position in the run, such as epoch and image index.

No draw depends on earlier draws, so that neither the number of workers or processes nor a restart
changes a run.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def fold_seed(*parts: int | str) -> int:
    """Hash a position in the run to a seed, e.g. `fold_seed("augment", seed, epoch, index)`.

    The first part names the use, so that two uses at the same position draw different numbers.

    Returns:
        An integer in [0, 2**63), the same on every machine and Python version.
    """
    plain = tuple(part if isinstance(part, str) else int(part) for part in parts)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """New generator, seeded by `fold_seed`."""
    return torch.Generator(device=device).manual_seed(fold_seed(*parts))


def seed_everything(*parts: int | str) -> None:
    """Seed the global generators of torch (every device), numpy and random by `fold_seed`.

    For parts of a training step that accept no generator: drop path, mixup.
    """
    seed = fold_seed(*parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed the global generators of torch (CPU), numpy and random, and restore them afterward.

    For library code that accepts no generator, such as image augmentations.
    """
    seed = fold_seed(*parts)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
