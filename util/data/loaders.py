"""Loaders of the micro-batches of every step."""

import itertools
import logging
import math
from collections.abc import Collection, Iterator
from functools import cached_property, partial

import torch
from torch.utils.data import DataLoader, Dataset

from util.compute import distributed
from util.compute.batch_size import BatchPlan
from util.compute.shared_memory import check_shared_memory
from util.compute.signals import blocked_signals, ignore_signals
from util.compute.watchdog import activity
from util.compute.worker_deaths import note_workers
from util.data.batch import Batch, collate
from util.data.images import IndexedImages
from util.data.sampler import IterationSampler, StepSampler, evenly_spaced
from util.data.streams import StreamedImages
from util.data.transforms import CenterCrop, RandomCrops
from util.errors import InputError, RunError, counted
from util.progress import with_progress
from util.seeding import generator_for
from util.settings.data import DataSettings

MAX_VALUE_BYTES = 4  # of a pixel, in floating point

logger = logging.getLogger(__name__)


class Batches(DataLoader):
    """DataLoader of batches that raises the errors its workers return as values."""

    def __init__(self, dataset: Dataset, **options: object) -> None:
        # By default it would draw from PyTorch's global generator.
        options = {"generator": torch.Generator(), **options}
        options["collate_fn"] = getattr(dataset, "collate", collate)
        super().__init__(dataset, worker_init_fn=ignore_signals, **options)

    def __iter__(self) -> Iterator[Batch]:
        with blocked_signals():
            batches = super().__iter__()
        note_workers()
        while True:
            with activity("waiting for images"):
                batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, InputError | RunError):
                # A copy: the original and this frame would keep each other and the workers alive.
                raise type(batch)(*batch.args)
            yield batch


def image_bytes(dataset: Dataset) -> int:
    """Bytes of an image's crops in a batch; 0 if they are not known before."""
    transform = getattr(dataset, "transform", None)
    if not isinstance(transform, RandomCrops | CenterCrop):
        return 0  # timm's, and those of detection and segmentation
    if getattr(transform, "decode", "cpu") != "cpu":
        return 0  # JPEG files
    value_bytes = 1 if transform.pixels.is_rgb8 else MAX_VALUE_BYTES
    values = transform.pixels.num_channels * math.prod(transform.size)
    return values * value_bytes * transform.num_crops


class StepLoader:
    """Loads the micro-batches of each step from an indexed source; resumes at any step.

    Args:
        sampler: chooses the images of this rank's micro-batches.
        workers: `num_workers` and `pin_memory` of the DataLoader.

    Attributes:
        num_crops: K, crops per image, adjacent in one micro-batch. The sampler counts images;
            this loader counts every crop as an image.
    """

    resumes_mid_epoch = True

    def __init__(
        self, dataset: IndexedImages | StreamedImages, sampler: StepSampler, **workers: int
    ) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.workers = workers
        self.steps_per_epoch = sampler.steps_per_epoch
        self.num_crops = dataset.num_crops
        self.effective_batch_size = sampler.effective_batch_size * self.num_crops
        check_shared_memory(
            sampler.batch_size * image_bytes(dataset),
            num_workers=workers["num_workers"],
            num_batches=self.steps_per_epoch,
        )

    @cached_property
    def batches(self) -> Batches:
        """Batches from the sampler's position on; the workers are kept for the next epoch."""
        persistent = self.workers["num_workers"] > 0
        return Batches(
            self.dataset, batch_sampler=self.sampler, persistent_workers=persistent, **self.workers
        )

    def batches_from(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Return this rank's micro-batches from this step to the end of the epoch."""
        self.sampler.set_position(epoch, first_step)
        return iter(self.batches)

    def images_in_step(self, step: int) -> int:
        """Return the number of images of all ranks in this step of an epoch; fewer in the last."""
        return self.sampler.images_in_step(step) * self.num_crops

    def steps(self, epoch: int, first_step: int = 0) -> Iterator[list[Batch]]:
        """Return this rank's micro-batches, step by step, from `first_step` to the epoch's end."""
        batches = self.batches_from(epoch, first_step)
        return (
            list(itertools.islice(batches, self.sampler.micro_batches_in_step(step)))
            for step in range(first_step, self.steps_per_epoch)
        )

    def keys_in_step(self, epoch: int, step: int) -> list[list[tuple[int, int]]]:
        """Return what this rank's micro-batches of a step are read by; none in a stream."""
        self.sampler.set_position(epoch, step)
        return list(itertools.islice(self.sampler, self.sampler.micro_batches_in_step(step)))

    def read(self, keys: list[list[tuple[int, int]]]) -> list[Batch]:
        """Read micro-batches in this process, apart from the steps of an epoch."""
        return list(Batches(self.dataset, batch_sampler=keys))

    def name(self, key: tuple[int, int]) -> str:
        """Return the name of the file that is read by a key."""
        return self.dataset.name_at(key)


class StreamStepLoader(StepLoader):
    """Loads the micro-batches of each step from a stream; resumes only at the start of an epoch.

    Its sampler only counts, because a stream has its own order.
    """

    resumes_mid_epoch = False

    def batches_from(self, epoch: int, first_step: int) -> Iterator[Batch]:
        """Return an endless iterator of this rank's micro-batches, starting with the epoch's.

        Raises:
            ValueError: first_step is not 0.
        """
        if first_step != 0:
            raise ValueError(f"a stream cannot start an epoch at step {first_step}, only at 0")
        rank, world_size = self.sampler.rank, self.sampler.world_size
        self.dataset.set_position(epoch, rank, world_size, self.workers["num_workers"])
        # New workers for every epoch: in old ones, timm's readers would carry over random state.
        options = {"generator": generator_for("workers", self.sampler.seed, epoch, rank)}
        options["batch_size"] = self.sampler.batch_size
        return iter(Batches(self.dataset, **options, **self.workers))

    def keys_in_step(self, epoch: int, step: int) -> list[list[tuple[int, int]]]:
        """Return nothing: a stream cannot be read at a place."""
        return []


def build_train_loader(
    dataset: IndexedImages | StreamedImages,
    *,
    batch_size: int,
    accum_iter: int,
    rank: int,
    world_size: int,
    seed: int,
    num_workers: int,
    pin_memory: bool,
) -> StepLoader | StreamStepLoader:
    """Build the loader of one rank; `batch_size` is the number of crops in its micro-batches.

    Raises:
        InputError: a stream is too short for one step, or an image's crops would be separated.
    """
    num_crops = dataset.num_crops
    if batch_size % num_crops:
        raise InputError(
            f"--batch_size {batch_size} must be a multiple of --repeated_aug {num_crops}, "
            "because an image's crops stay together"
        )
    batch_size //= num_crops  # from here on, in images
    steps = {"batch_size": batch_size, "accum_iter": accum_iter, "seed": seed}
    make_sampler = partial(StepSampler, rank=rank, world_size=world_size, **steps)
    workers = {"num_workers": num_workers, "pin_memory": pin_memory}
    if isinstance(dataset, IndexedImages):
        return StepLoader(dataset, make_sampler(len(dataset)), **workers)

    effective_batch_size = batch_size * accum_iter * world_size
    left_out = dataset.num_samples % effective_batch_size
    if dataset.num_samples == left_out:
        raise InputError(
            f"{dataset.name} has {counted(left_out, 'image')}, fewer than the "
            f"{effective_batch_size} of a step: lower --batch_size or --accum_iter"
        )
    logger.info(
        "%s is a stream: a run resumes at the start of an epoch, and each epoch drops what does "
        "not fill a step (%d of %d images)",
        *(dataset.name, left_out, dataset.num_samples),
    )
    return StreamStepLoader(dataset, make_sampler(dataset.num_samples - left_out), **workers)


def build_iteration_loader(
    dataset: Dataset,
    batches: BatchPlan,
    *,
    steps_per_epoch: int,
    seed: int,
    num_workers: int,
    device: torch.device,
) -> StepLoader:
    """Build this process's loader of full steps, see IterationSampler."""
    sampler = IterationSampler(
        len(dataset),
        steps_per_epoch=steps_per_epoch,
        batch_size=batches.batch_size,
        accum_iter=batches.accum_iter,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=seed,
    )
    pin_memory = device.type == "cuda"
    return StepLoader(dataset, sampler, num_workers=num_workers, pin_memory=pin_memory)


def build_eval_loader(
    dataset: IndexedImages,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    rank: int | None = None,
    world_size: int | None = None,
    limit: int | None = None,
) -> Batches:
    """Build a loader of every image once, unpadded: rank r reads images r, r + world_size, ...

    Args:
        batch_size: per process.
        rank, world_size: None for those of this process.
        limit: read at most this many images, evenly spaced.
    """
    rank = distributed.rank() if rank is None else rank
    world_size = distributed.world_size() if world_size is None else world_size
    keys = [(0, index) for index in evenly_spaced(len(dataset), limit)[rank::world_size]]
    batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
    check_shared_memory(
        min(batch_size, len(keys)) * image_bytes(dataset),
        num_workers=num_workers,
        num_batches=len(batches),
    )
    return Batches(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )


def show_progress(loader: Collection[Batch], what: str) -> Iterator[Batch]:
    """Yield all batches of a loader; the main process shows the progress if that takes long.

    Args:
        what: names the task.
    """
    shown = distributed.is_main_process()
    return with_progress(loader, what, len(loader), unit="batches", shown=shown)


def build_loaders(
    train_set: IndexedImages | StreamedImages,
    val_set: IndexedImages | None,
    data: DataSettings,
    batches: BatchPlan,
    *,
    seed: int,
    device: torch.device,
) -> tuple[StepLoader | StreamStepLoader, Batches | None]:
    """Build this process's loaders of training and validation images."""
    loader = build_train_loader(
        train_set,
        batch_size=batches.batch_size,
        accum_iter=batches.accum_iter,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        seed=seed,
        num_workers=data.num_workers,
        pin_memory=device.type == "cuda",
    )
    if val_set is None:
        return loader, None
    sizes = {"batch_size": batches.batch_size, "num_workers": data.num_workers}
    return loader, build_eval_loader(val_set, **sizes, device=device)
