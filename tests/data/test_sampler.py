import random

import pytest
import torch

from util.data.sampler import StepSampler

SPLITS = [(1, 1, 1), (4, 1, 1), (4, 2, 1), (2, 1, 3), (3, 2, 2), (5, 3, 4), (1, 1, 8)]
SIZES = [1, 7, 24, 25, 61]


def samplers(num_samples, batch_size, accum_iter, world_size, seed=3):
    return [
        StepSampler(
            num_samples,
            batch_size=batch_size,
            accum_iter=accum_iter,
            rank=rank,
            world_size=world_size,
            seed=seed,
        )
        for rank in range(world_size)
    ]


def steps_of(sampler, epoch=0, first_step=0):
    """Return the micro-batches of each step, as many as the sampler says there are."""
    sampler.set_position(epoch, first_step)
    batches = iter(sampler)
    steps = [
        [next(batches) for _ in range(sampler.micro_batches_in_step(step))]
        for step in range(first_step, sampler.steps_per_epoch)
    ]
    assert next(batches, None) is None
    return steps


def images_of(step):
    return [index for batch in step for _, index in batch]


@pytest.mark.parametrize("num_samples", SIZES)
@pytest.mark.parametrize(("batch_size", "accum_iter", "world_size"), SPLITS)
def test_each_image_is_read_once_whatever_the_split(
    num_samples, batch_size, accum_iter, world_size
):
    ranks = samplers(num_samples, batch_size, accum_iter, world_size)
    effective_batch_size = batch_size * accum_iter * world_size
    one_process = samplers(num_samples, effective_batch_size, 1, 1)[0]
    split_steps = [steps_of(rank, epoch=2) for rank in ranks]
    whole_steps = steps_of(one_process, epoch=2)
    assert len(whole_steps) == ranks[0].steps_per_epoch == -(-num_samples // effective_batch_size)

    seen = []
    for step, whole in enumerate(whole_steps):
        num_images = ranks[0].images_in_step(step)
        batches = [split_steps[rank][step] for rank in range(world_size)]
        assert all(0 < len(batch) <= batch_size for rank in batches for batch in rank)
        counts = {len(rank) for rank in batches}
        assert len(counts) == 1 and counts.pop() <= accum_iter  # all take part in micro-steps
        real = []
        for rank in range(world_size):
            images = images_of(batches[rank])
            count = len(range(rank, num_images, world_size))
            real += images[:count]
            stand_ins = images[count:]
            assert len(stand_ins) <= 1 and set(stand_ins) <= set(images_of(whole))
            assert not stand_ins or len(batches[rank][-1]) == 1
        assert len(real) == num_images
        assert set(real) == set(images_of(whole))
        seen += real
    assert sorted(seen) == list(range(num_samples))


def test_ranks_are_interleaved_and_keep_the_order():
    chunk = images_of(steps_of(samplers(12, 12, 1, 1)[0])[0])
    ranks = samplers(12, 2, 2, 3)
    assert [images_of(steps_of(rank)[0]) for rank in ranks] == [chunk[r::3] for r in range(3)]


@pytest.mark.parametrize(("batch_size", "accum_iter", "world_size"), SPLITS)
def test_a_restart_gives_the_remaining_batches(batch_size, accum_iter, world_size):
    for rank in samplers(25, batch_size, accum_iter, world_size):
        full = steps_of(rank, epoch=1)
        for first_step in range(rank.steps_per_epoch + 1):
            assert steps_of(rank, 1, first_step) == full[first_step:]


def test_len_counts_the_micro_batches_left():
    for rank in samplers(61, 3, 2, 4):
        for step in range(rank.steps_per_epoch + 1):
            rank.set_position(0, step)
            assert len(rank) == len(list(rank))


def test_images_in_step_add_up_to_the_dataset():
    sampler = samplers(61, 3, 2, 4)[1]
    counts = [sampler.images_in_step(step) for step in range(sampler.steps_per_epoch)]
    assert counts == [24, 24, 13]


def test_epochs_and_seeds_differ_and_repeat():
    sampler, other = samplers(50, 50, 1, 1, seed=0)[0], samplers(50, 50, 1, 1, seed=1)[0]
    first, second = images_of(steps_of(sampler, 0)[0]), images_of(steps_of(sampler, 1)[0])
    assert first != second
    assert images_of(steps_of(other, 0)[0]) != first
    assert images_of(steps_of(sampler, 0)[0]) == first
    assert first != sorted(first)


def test_every_item_names_its_epoch():
    assert {
        epoch for step in steps_of(samplers(7, 2, 1, 1)[0], 5) for b in step for epoch, _ in b
    } == {5}


def test_the_order_neither_uses_nor_changes_global_random_state():
    sampler = samplers(50, 5, 1, 1)[0]
    order = steps_of(sampler)
    torch.manual_seed(99)
    random.seed(99)
    state = torch.get_rng_state()
    assert steps_of(sampler) == order
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_samples": 0},
        {"batch_size": 0},
        {"accum_iter": 0},
        {"world_size": 0},
        {"rank": 2},
        {"rank": -1},
    ],
)
def test_impossible_splits_are_refused(wrong):
    right = {"batch_size": 1, "accum_iter": 1, "rank": 0, "world_size": 2, "seed": 0}
    options = {"num_samples": 5, **right, **wrong}
    with pytest.raises(ValueError, match=r"positive|rank"):
        StepSampler(options.pop("num_samples"), **options)


def test_positions_outside_the_epoch_are_refused():
    sampler = samplers(10, 5, 1, 1)[0]
    for step in (-1, 3):
        with pytest.raises(ValueError, match="epoch's 2"):
            sampler.set_position(0, step)
    for step in (-1, 2):
        with pytest.raises(ValueError, match="epoch's 2"):
            sampler.images_in_step(step)
