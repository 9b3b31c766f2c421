"""Memory of a training step, foreseen before the first one from one or two images."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from util.compute.distributed import all_gather_objects, world_size
from util.compute.precision import Precision
from util.errors import InputError, counted
from util.machine import available_memory, size_text, whole_number

FEW = 2  # images of the forward pass
# Memory of activations at its peak, as a multiple of what autograd keeps. On a CPU most of the
# difference is gaps on the C library's heap, see docs/performance.md. On a GPU 1 refuses nothing
# that fits; what does not fit after all ends in advice (util.compute.out_of_memory).
PEAK_PER_SAVED = {
    "cpu": {"high": 1.2, "medium": 1.8, "low": 2.7},
    "cuda": {"high": 1.0, "medium": 1.0, "low": 1.0},
}
AT_ONCE = 5  # tensors as large as the largest output: those of a layer, and gaps between them
CHOSEN_SHARE = 0.5  # of free memory, that a batch size chosen here may take


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step in each process.

    Args:
        device: where they are.
        mode: one of MEMORY_MODES; None if the program has no --memory.
        weights: of the model; they are there already.
        state: the optimizer's, and a moving average of the weights.
        gradients: of the trained weights.
        per_image: activations of one image, at their peak.
    """

    device: torch.device
    mode: str | None
    weights: int
    state: int
    gradients: int
    per_image: int

    def missing(self, batch_size: int, accum_iter: int) -> int:
        """Bytes that a step needs besides the weights."""
        activations = batch_size * self.per_image
        both = self.gradients + activations
        if accum_iter == 1 and world_size() == 1:
            # Gradients take the place of most activations.
            both -= 3 * min(self.gradients, activations) // 4
        return self.state + both

    def describe(self, batch_size: int, accum_iter: int) -> str:
        """Memory of a step with the weights, such as "about 1.4 GiB"."""
        return f"about {size_text(self.weights + self.missing(batch_size, accum_iter))}"

    def room(self) -> int | None:
        """Bytes that are free for each process of the run; None if the system does not say."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        elif (free := available_memory()) is not None:
            free //= whole_number("LOCAL_WORLD_SIZE") or 1
        rooms = all_gather_objects([free])
        return None if None in rooms else min(rooms)

    def largest(self, sizes: Iterable[int], room: int) -> int | None:
        """Largest of these batch sizes that fits into `room` bytes; None if none does."""
        return max((n for n in sizes if self.missing(n, accum_iter=2) <= room), default=None)

    def check(self, batch_size: int, accum_iter: int, multiple_of: int = 1) -> None:
        """Refuse a step that cannot fit.

        Args:
            multiple_of: divisor of a batch size: the number of crops of each image.

        Raises:
            InputError: it cannot; names flags with which it can.
        """
        room, missing = self.room(), self.missing(batch_size, accum_iter)
        if room is None or missing <= room:
            return
        per_step = batch_size * accum_iter
        sizes = [n for n in range(multiple_of, batch_size, multiple_of) if per_step % n == 0]
        size = self.largest(sizes, int(CHOSEN_SHARE * room)) or self.largest(sizes, room)
        if size is not None:
            advice = f"use --batch_size {size} --effective_batch_size {per_step * world_size()}"
            if accum_iter > 1:
                advice += " without --accum_iter"
        else:
            advice = "use a smaller model"
            if self.mode in ("high", "medium"):
                advice += " or --memory low"
        micro_step = "step" if accum_iter == 1 else "micro-step"
        raise InputError(
            f"a {micro_step} of {counted(batch_size, 'image')} needs about {size_text(missing)} of "
            f"memory, but {size_text(room)} are free"
            f"{' for each process' if world_size() > 1 else ''}: {advice}"
        )


def foresee_step(
    model: nn.Module,
    example: Callable[[int], tuple],
    precision: Precision,
    *,
    mode: str | None,
    batch_size: int | str,
    forward: Callable[..., object] | None = None,
    moments: int = 2,
    has_average: bool = False,
    peak_in_heads: bool = False,
) -> StepMemory | None:
    """Foresee the memory of a training step; None for a sharded model or an unknown device.

    The model and the generators of random numbers are afterwards as they were.

    Args:
        model: on its device, not yet compiled.
        example: number of images -> inputs of the model, of at least as many images.
        mode: one of MEMORY_MODES; None if the program has no --memory.
        batch_size: images per micro-step, or "auto".
        forward: what a step computes from the inputs; None is the model.
        moments: numbers that the optimizer keeps for each trained weight: 2 for AdamW.
        has_average: whether the run keeps a moving average of the weights.
        peak_in_heads: whether memory is at its peak in heads, which are never recomputed.
    """
    if isinstance(model, FSDPModule) or precision.device.type not in PEAK_PER_SAVED:
        return None
    parameters = list(model.parameters())

    def run(inputs: tuple) -> object:
        with precision.autocast():
            return (forward or model)(*inputs)

    inputs = example(FEW if batch_size == "auto" else min(FEW, batch_size))
    count = inputs[0].shape[0]
    with unchanged(model, precision.device), largest_output(model) as largest:
        keep = {"parameters": parameters, "recomputes": mode in ("medium", "low")}
        saved = saved_bytes(lambda: run(inputs), **keep)
        if precision.dtype is torch.float32:
            per_image = saved / count
        else:  # what autocast makes of weights is kept once
            more = example(count + 1)
            per_image = saved_bytes(lambda: run(more), **keep) - saved
    weights = sum(parameter.nbytes for parameter in parameters)
    trained = sum(parameter.nbytes for parameter in parameters if parameter.requires_grad)
    peak_mode = "high" if mode is None or peak_in_heads else mode
    per_image *= PEAK_PER_SAVED[precision.device.type][peak_mode]
    return StepMemory(
        precision.device,
        mode,
        weights=weights,
        state=moments * trained + (weights if has_average else 0),
        gradients=trained,
        per_image=round(max(per_image, AT_ONCE * max(largest) / count)),
    )


@contextmanager
def unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context after which buffers and generators of random numbers are as before."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    for buffer, earlier in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(earlier)


@contextmanager
def largest_output(model: nn.Module) -> Iterator[list[int]]:
    """Context that collects the bytes of the tensors that the model's parts return."""
    sizes = [0]

    def note(module: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.nbytes)

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def check_step(
    step: StepMemory | None, batch_size: int, accum_iter: int, multiple_of: int = 1
) -> str | None:
    """Refuse a step that cannot fit, and describe its memory; None if that is unknown.

    Args:
        batch_size, accum_iter, multiple_of: see `StepMemory.check`.

    Raises:
        InputError: see `StepMemory.check`.
    """
    if step is None:
        return None
    step.check(batch_size, accum_iter, multiple_of)
    return step.describe(batch_size, accum_iter)


def saved_bytes(
    run: Callable[[], object], parameters: Iterable[Tensor], *, recomputes: bool = True
) -> int:
    """Bytes of the distinct storages that `run()` saves for its backward pass.

    Counts those in autograd's graph and those that only Python holds, because selective
    checkpointing keeps its cache outside the graph. For recomputed parts, the saved inputs count.
    Copies of parameters in another dtype count as well, though they do not grow with the batch.

    Args:
        run: a forward pass; returns what the backward pass starts from.
        parameters: their storages do not count, even if a view of them is saved.
        recomputes: whether parts may be recomputed; without, Python's objects are not searched,
            which would take up to a second.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, int] = {}
    opaque = []  # oneDNN's tensors have no storage; references keep their ids unique

    def count(tensor: Tensor) -> Tensor:
        if tensor.is_mkldnn:
            opaque.append(tensor)
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
            return tensor
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        # Detached: a result that its own node saves would refer to itself and never be freed.
        return tensor.detach()

    # Kept alive until counting is done, so that ids stay unique.
    before = live_tensors() if recomputes else []
    others = {id(tensor) for tensor in before}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = run()  # kept alive until counting is done, so that addresses stay unique
    for tensor in live_tensors() if recomputes else ():
        if id(tensor) not in others and tensor is not result:
            count(tensor)
    total = sum(size for address, size in seen.items() if address not in known)
    del result
    return total


def live_tensors() -> list[Tensor]:
    """List every tensor that Python's garbage collector tracks."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
