"""Sampler that chooses which images each process reads in each step of an epoch."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from util.seeding import generator_for


def evenly_spaced(number: int, limit: int | None) -> list[int]:
    """Return at most `limit` evenly spaced positions among this many; all of them without one."""
    count = number if limit is None else min(limit, number)
    return [i * number // count for i in range(count)]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler of one rank: every item is one micro-batch, a list of (epoch, image index).

    The order of an epoch is a function of (seed, epoch). Each step takes the next R images: an
    effective batch, or the rest in the last step. Rank r takes every `world_size`-th of them from
    the r-th on, in micro-batches of at most `batch_size`, equally many on every rank. So the images
    of a step do not depend on how they are split over processes and micro-batches, and every image
    is read once per epoch.

    One exception: every rank has to take part in every micro-step, so a rank without an image for
    its last micro-batch repeats one of the step's images as a stand-in. The caller gives it weight
    zero.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        accum_iter: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        if min(num_samples, batch_size, accum_iter, world_size) < 1:
            raise ValueError("num_samples, batch_size, accum_iter and world_size must be positive")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie between 0 and {world_size - 1}, not {rank}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.effective_batch_size = batch_size * accum_iter * world_size
        self.steps_per_epoch = math.ceil(num_samples / self.effective_batch_size)
        self.epoch = 0
        self.first_step = 0

    def images_in_step(self, step: int) -> int:
        """Return R, the number of images of all ranks in this step of an epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is outside the epoch's {self.steps_per_epoch} steps")
        return min(self.effective_batch_size, self.num_samples - step * self.effective_batch_size)

    def micro_batches_in_step(self, step: int) -> int:
        """Return the number of micro-batches per rank in this step of an epoch."""
        return math.ceil(self.images_in_step(step) / (self.world_size * self.batch_size))

    def set_position(self, epoch: int, step: int) -> None:
        """Start the next iteration at this step of this epoch."""
        if not 0 <= step <= self.steps_per_epoch:
            raise ValueError(f"step {step} is outside the epoch's {self.steps_per_epoch} steps")
        self.epoch = epoch
        self.first_step = step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the micro-batches from the position to the end of its epoch."""
        generator = generator_for("order", self.seed, self.epoch)
        order = torch.randperm(self.num_samples, generator=generator)
        epoch = self.epoch
        for step in range(self.first_step, self.steps_per_epoch):
            start = step * self.effective_batch_size
            images = order[start : start + self.effective_batch_size].tolist()
            own = images[self.rank :: self.world_size] or [images[self.rank % len(images)]]
            size = self.batch_size
            batches = [own[first : first + size] for first in range(0, len(own), size)]
            if len(batches) < self.micro_batches_in_step(step):  # one fewer, with one image fewer
                last = batches.pop()
                batches += [last[:-1] or last, last[-1:]]
            for batch in batches:
                yield [(epoch, index) for index in batch]

    def __len__(self) -> int:
        """Return the number of micro-batches left on this rank."""
        steps = range(self.first_step, self.steps_per_epoch)
        return sum(self.micro_batches_in_step(step) for step in steps)


class IterationSampler(StepSampler):
    """StepSampler for runs whose length is a number of steps, all of them full.

    The images are an endless sequence of passes, each in a new order, cut into steps; an epoch is
    `steps_per_epoch` of those, whatever the number of images. The order of a pass is a function of
    (seed, pass), and items have the pass in the place of the epoch.
    """

    def __init__(self, num_samples: int, *, steps_per_epoch: int, **options: int) -> None:
        super().__init__(num_samples, **options)
        self.steps_per_epoch = steps_per_epoch

    def images_in_step(self, step: int) -> int:
        """Return R, the number of images of all ranks in every step."""
        if not 0 <= step < self.steps_per_epoch:
            raise ValueError(f"step {step} is outside the epoch's {self.steps_per_epoch} steps")
        return self.effective_batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yield the micro-batches from the position to the end of its epoch."""
        first = (self.epoch * self.steps_per_epoch + self.first_step) * self.effective_batch_size
        steps = range(self.first_step, self.steps_per_epoch)
        images = self.images_from(first)
        for _ in steps:
            own = list(itertools.islice(images, self.effective_batch_size))[
                self.rank :: self.world_size
            ]
            for start in range(0, len(own), self.batch_size):
                yield own[start : start + self.batch_size]

    def images_from(self, position: int) -> Iterator[tuple[int, int]]:
        """Yield (pass, image index) from a position of the endless sequence on."""
        number, skipped = divmod(position, self.num_samples)
        while True:
            generator = generator_for("order", self.seed, number)
            order = torch.randperm(self.num_samples, generator=generator).tolist()
            yield from ((number, index) for index in order[skipped:])
            number, skipped = number + 1, 0
