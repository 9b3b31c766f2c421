"""Split of a step's images into micro-batches, and search for the largest that fits."""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn

from util.compute.distributed import all_gather_objects, world_size
from util.compute.memory import CHOSEN_SHARE, StepMemory
from util.compute.out_of_memory import is_out_of_memory
from util.compute.precision import Precision
from util.errors import InputError, counted
from util.progress import waiting
from util.settings.optim import IterationSettings, OptimSettings

logger = logging.getLogger(__name__)

MEMORY_FRACTION = 0.9  # of free memory; the rest is for fragmentation and prefetched batches
MAX_CPU_BATCH = 64  # a larger one is not faster on a CPU


class BatchPlan(NamedTuple):
    """Images per process and micro-step, and micro-steps per step."""

    batch_size: int
    accum_iter: int


def plan_batches(
    optim: OptimSettings | IterationSettings,
    model: nn.Module | None = None,
    *,
    step: StepMemory | None = None,
    example: Callable[[int], tuple] | None = None,
    precision: Precision | None = None,
    multiple_of: int = 1,
) -> BatchPlan:
    """Determine the batch size and micro-steps; "auto" needs `model`, `example` and `precision`.

    Args:
        model: inputs -> loss, on its device.
        step: memory of a step, for "auto" on a CPU.
        example: number of images -> inputs of the model.
        multiple_of: divisor of the batch size: the number of crops of each image.

    Raises:
        InputError: the effective batch size cannot be reached, no batch fits, "auto" does not work
            here, or the chosen attention kernel cannot run a batch of that size.
    """
    batch_size = optim.batch_size
    if batch_size == "auto" and precision.device.type != "cuda":
        batch_size = foreseen_batch_size(step, optim.effective_batch_size, multiple_of)
    elif batch_size == "auto":

        def train_on(num_images: int) -> None:
            with precision.autocast():
                loss = model(*example(num_images))
            precision.backward(loss)

        batch_size = find_batch_size(
            train_on,
            optim.effective_batch_size,
            model=model,
            device=precision.device,
            multiple_of=multiple_of,
        )
        precision.check_attention_backend(model, example, batch_size)
    accum_iter = micro_steps(batch_size, optim.accum_iter, optim.effective_batch_size)
    return BatchPlan(batch_size, accum_iter)


def micro_steps(batch_size: int, accum_iter: int, effective_batch_size: int | None) -> int:
    """Micro-steps per step: `accum_iter`, or what the effective batch size needs if given.

    Raises:
        InputError: the effective batch size cannot be reached.
    """
    if effective_batch_size is None:
        return accum_iter
    at_once = batch_size * world_size()
    if effective_batch_size % at_once:
        raise InputError(
            f"--effective_batch_size {effective_batch_size} must be a multiple of {at_once}, that "
            f"is --batch_size {batch_size} x {world_size()} (processes): change one of them"
        )
    return effective_batch_size // at_once


def candidates(effective_batch_size: int, multiple_of: int) -> list[int]:
    """Micro-batch sizes, ascending, that divide a process's part of an effective batch.

    Args:
        multiple_of: divisor of each size, see `plan_batches`.

    Raises:
        InputError: there are none.
    """
    per_process, rest = divmod(effective_batch_size, world_size())
    sizes = [n for n in range(multiple_of, per_process + 1, multiple_of) if per_process % n == 0]
    if rest or not sizes:
        raise InputError(
            f"--effective_batch_size {effective_batch_size} must be a multiple of "
            f"{multiple_of * world_size()}, that is {world_size()} (processes) x {multiple_of} "
            "(crops per image): change --effective_batch_size"
        )
    return sizes


def too_large(size: int) -> InputError:
    """Error for a model whose smallest batch does not fit."""
    return InputError(
        f"not even a batch of {size} fits in the memory that is free: use a smaller model or "
        "--memory low"
    )


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """Find the largest of ascending sizes that fits, by bisection.

    Raises:
        InputError: the smallest does not fit.
    """
    if not fits(sizes[0]):
        raise too_large(sizes[0])
    low, high = 0, len(sizes)  # sizes[low] fits, sizes[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low]


def step_fits(
    train_on: Callable[[int], None], size: int, *, model: nn.Module, device: torch.device
) -> bool:
    """Whether a step on `size` images leaves enough memory for the rest of a run.

    The rest is AdamW's two moments of every trained weight and, with several processes, the buckets
    in which gradients are averaged. Discards gradients and empties the device's memory cache.

    Args:
        train_on: runs forward and backward on a given number of images.
        device: a CUDA device.
    """
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    reserved = trained * (2 if world_size() == 1 else 3)
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    room = MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0] - reserved
    torch.cuda.reset_peak_memory_stats(device)
    try:
        train_on(size)
        return torch.cuda.max_memory_allocated(device) - before <= room
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@waiting("finding the largest batch that fits")
def find_batch_size(
    train_on: Callable[[int], None],
    effective_batch_size: int,
    *,
    model: nn.Module,
    device: torch.device,
    multiple_of: int = 1,
) -> int:
    """Find the largest micro-batch that fits on every GPU and divides a process's part of a step.

    Args:
        train_on: runs forward and backward on a given number of images, as training does.
        device: a CUDA device.
        multiple_of: divisor of the size, see `plan_batches`.

    Raises:
        InputError: no size fits.
    """
    sizes = candidates(effective_batch_size, multiple_of)
    size = largest_that_fits(sizes, lambda n: step_fits(train_on, n, model=model, device=device))
    size = min(all_gather_objects([size]))
    log_choice(size, sizes)
    return size


def foreseen_batch_size(
    step: StepMemory | None, effective_batch_size: int, multiple_of: int = 1
) -> int:
    """Choose a micro-batch for a CPU, by the memory that a step is foreseen to take.

    Args:
        step: None if its memory cannot be foreseen.
        multiple_of: divisor of the size, see `plan_batches`.

    Raises:
        InputError: no size fits, or what fits is unknown.
    """
    room = step and step.room()
    if room is None:
        raise InputError("--batch_size auto cannot tell how much memory is free: give a number")
    sizes = candidates(effective_batch_size, multiple_of)
    useful = [size for size in sizes if size <= MAX_CPU_BATCH] or sizes[:1]
    size = step.largest(useful, int(CHOSEN_SHARE * room))
    if size is None:
        raise too_large(sizes[0])
    log_choice(size, sizes)
    return size


def log_choice(size: int, sizes: Sequence[int]) -> None:
    """Log a chosen micro-batch; the last of `sizes` is a process's part of a step."""
    logger.info(
        "--batch_size auto: %s of the %d in a step of a process",
        *(counted(size, "image"), sizes[-1]),
    )
