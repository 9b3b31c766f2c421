"""Derived random state."""

import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from util.seeding import fold_seed, generator_for, seed_everything, seeded


@pytest.mark.parametrize(
    ("parts", "seed"),
    [
        (("augment", 0, 0, 0), 4134712310741574025),
        (("step", 0, 100, 3), 1926141015753964224),
        (("sampler", 42), 3682464162580047366),
    ],
)
def test_seeds_never_change(parts, seed):
    # Another value here makes no old run repeat: it belongs under "Numerics" in the change log.
    assert fold_seed(*parts) == seed


def test_every_place_and_use_has_its_own_seed():
    places = [
        (use, seed, epoch, index)
        for use in ("augment", "step")
        for seed in (0, 1, -1)
        for epoch in range(20)
        for index in range(100)
    ]
    # Places that would be equal if the parts were only joined.
    places += [("a", 1, 23), ("a", 12, 3), ("a", 123), ("a1", 23), ("a", "1", 23), ("a",), ()]
    seeds = {fold_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seed_does_not_depend_on_the_kind_of_integer():
    # An index out of an array must not draw other numbers than the same index out of a range.
    assert fold_seed("augment", np.int64(3)) == fold_seed("augment", 3)


def test_generators_repeat_at_a_place_and_differ_between_places():
    def draw(*parts):
        return torch.rand(4, generator=generator_for(*parts))

    state = torch.get_rng_state()
    assert torch.equal(draw("step", 0, 7), draw("step", 0, 7))
    assert not torch.equal(draw("step", 0, 7), draw("step", 0, 8))
    assert not torch.equal(draw("step", 0, 7), draw("mask", 0, 7))
    assert torch.equal(torch.get_rng_state(), state)


def draw_globally():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002


def seed_globally():
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)


def test_seeded_decides_every_global_generator():
    with seeded("augment", 1):
        first = draw_globally()
    draw_globally()
    with seeded("augment", 1):
        again = draw_globally()
    with seeded("augment", 2):
        other = draw_globally()
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_seeded_puts_the_global_state_back(fails):
    seed_globally()
    expected = draw_globally()

    seed_globally()
    with suppress(KeyError), seeded("augment", 1):
        draw_globally()
        if fails:
            raise KeyError
    assert draw_globally() == expected


def test_seeded_nests():
    with seeded("outer"):
        expected = [draw_globally(), draw_globally()]
    with seeded("outer"):
        got = [draw_globally()]
        with seeded("inner"):
            draw_globally()
        got.append(draw_globally())
    assert got == expected


def draw_at(*parts):
    seed_everything(*parts)
    return draw_globally()


def test_seeding_everything_decides_every_global_generator():
    first = draw_at("train", 0, 7, 1)
    draw_globally()
    assert draw_at("train", 0, 7, 1) == first
    # Another seed, step, process or use.
    for place in (("train", 1, 7, 1), ("train", 0, 8, 1), ("train", 0, 7, 0), ("a", 0, 7, 1)):
        assert all(a != b for a, b in zip(draw_at(*place), first, strict=True)), place
