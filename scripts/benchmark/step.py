"""Measuring time and memory of training steps."""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from util.compute.distributed import available_cores
from util.compute.precision import Precision
from util.errors import is_out_of_memory
from util.flops import ForwardFlops
from util.kernels import linear

MIB = 2**20
VECTORS = ("avx", "amx", "sse4", "sve", "asimd")  # how their flags begin
MATMUL_SIDE = {"cuda": 8192, "cpu": 2048}
PROFILED_STEPS = 2
# Of a step, see MeasuredStep.results.
MEASURED = (
    "round_step_s",
    "first_step_s",
    "median_step_s",
    "ms_per_image",
    "images_per_s",
    "spread_percent",
    "utilisation_percent",
    "peak_memory_mb",
    "saved_mb_per_image",
    "saved_slope_mb_per_image",
)


def saved_bytes(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that are kept for the backward pass of `run()`: distinct storages.

    Those in autograd's graph, and those that only Python holds: what selective checkpointing caches
    is in no graph. Of what is computed again in the backward pass, the inputs are kept and counted.
    Copies of parameters in another dtype count, because they are kept; they do not grow with the
    batch.

    Args:
        run: a forward pass, which returns what the backward pass starts from.
        parameters: whose storages do not count, also where a view of them is saved.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    seen: dict[int, int] = {}
    opaque = []  # oneDNN's tensors have no storage; holding them keeps their ids apart

    def count(tensor: Tensor) -> Tensor:
        if tensor.is_mkldnn:
            opaque.append(tensor)
            seen[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    before = live_tensors()  # alive until the count is made, so that their ids stay theirs
    others = {id(tensor) for tensor in before}
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = run()  # alive until the count is made, and with it every address
    for tensor in live_tensors():
        if id(tensor) not in others and tensor is not result:
            count(tensor)
    total = sum(size for address, size in seen.items() if address not in known)
    del result
    return total


def live_tensors() -> list[Tensor]:
    """Every tensor that Python knows, wherever it is held."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]


def time_calls(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Seconds that each of several calls takes, one after the other.

    CUDA: between events around each call, so that the host is waited for at the end only. CPU with
    one thread: processor seconds of this process, which other processes disturb least. Otherwise
    seconds on the clock.
    """
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]
    clock = time.process_time if clock_of(device) == "CPU seconds" else time.perf_counter
    times = [clock()]
    for _ in range(count):
        call()
        times.append(clock())
    return [end - start for start, end in pairwise(times)]


def clock_of(device: torch.device) -> str:
    """Which seconds `time_calls` counts, in words."""
    if device.type == "cuda":
        return "CUDA events"
    return "CPU seconds" if torch.get_num_threads() == 1 else "seconds on the clock"


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most CUDA memory allocated during a call beyond what was there; None elsewhere."""
    if device.type != "cuda":
        call()
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def build_matmul(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """A large square matrix product by the kernel that the models use, and its operations."""
    side = MATMUL_SIDE.get(device.type, MATMUL_SIDE["cpu"])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    bias = torch.zeros(side, device=device, dtype=dtype)

    @torch.no_grad()
    def multiply() -> Tensor:
        return linear(a, b, bias)

    return multiply, 2 * side**3


class MeasuredStep:
    """A step of training, and what has been measured of it.

    Other models may be there in the meantime; their memory is not counted.

    Args:
        model: images -> loss.
        optimizer: of the model.
        precision: of the step.
        images: (B, C, H, W), on the device.
        before_turn: called before every turn, since others may share the model: what --memory is
            set by.
        compiled: the model compiles anew for every batch size, so that what one image more would
            keep is not measured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        precision: Precision,
        images: Tensor,
        *,
        before_turn: Callable[[], object] = lambda: None,
        compiled: bool = False,
    ) -> None:
        self.model, self.optimizer, self.precision = model, optimizer, precision
        self.images, self.before_turn, self.compiled = images, before_turn, compiled
        self.seconds: list[float] = []  # of a step, one median for each turn
        self.first: float | None = None  # seconds on the clock, compilation included
        self.kernels: list[dict] | None = None  # see profile
        self.peak: int | None = None  # bytes: weights, optimizer, images and what a step adds
        self.saved: int | None = None  # bytes for the batch, see saved_bytes
        self.saved_slope: float | None = None  # bytes for one image more
        self.out_of_memory = False

    def forward(self, images: Tensor) -> Tensor:
        """The loss."""
        with self.precision.autocast():
            return self.model(images)

    def step(self) -> None:
        """Train."""
        self.precision.backward(self.forward(self.images))
        self.precision.step(self.optimizer, self.model)
        self.optimizer.zero_grad(set_to_none=True)

    def prepare(self, warmup: int) -> None:
        """Measure memory, and warm up with at least so many steps."""
        self.out_of_memory = not self.attempt(lambda: self.warm_up(warmup))
        if not self.compiled and not self.out_of_memory:
            self.attempt(self.measure_slope)  # twice the batch may be too much, which is no fault

    def take_turn(self, steps: int) -> None:
        """Measure the time of a few steps."""
        if not self.out_of_memory:
            self.out_of_memory = not self.attempt(lambda: self.measure_time(steps))

    def attempt(self, call: Callable[[], None]) -> bool:
        """Do something of which memory may run out; whether it did not."""
        self.before_turn()
        try:
            call()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        self.model.zero_grad(set_to_none=True)  # other tensors of the call are gone by now
        if self.images.is_cuda:
            torch.cuda.empty_cache()
        return False

    def warm_up(self, warmup: int) -> None:
        """Measure memory; the peak after a step at least, which makes the optimizer's state."""
        with torch.compiler.set_stance("force_eager"):  # compiled, it would be for one image
            self.precision.check_attention_backend(
                self.model, lambda count: (self.images[:count],), len(self.images)
            )
        start = time.perf_counter()
        self.step()
        if self.images.is_cuda:
            torch.cuda.synchronize(self.images.device)
        self.first = time.perf_counter() - start
        parameters = list(self.model.parameters())
        self.saved = saved_bytes(lambda: self.forward(self.images), parameters)
        for _ in range(warmup - 1):
            self.step()
        self.peak = peak_bytes(self.step, self.images.device)
        if self.peak is not None:
            states = (value for state in self.optimizer.state.values() for value in state.values())
            tensors = [*parameters, *filter(torch.is_tensor, states), self.images]
            self.peak += sum(tensor.nbytes for tensor in tensors)

    def measure_slope(self) -> None:
        """What one image more would keep, from twice as many."""
        twice = torch.cat((self.images, self.images))
        saved = saved_bytes(lambda: self.forward(twice), self.model.parameters())
        self.saved_slope = (saved - self.saved) / len(self.images)

    def measure_time(self, steps: int) -> None:
        """Add a turn's median."""
        times = time_calls(self.step, steps, self.images.device)
        self.seconds.append(statistics.median(times))

    def profile(self) -> None:
        """List what a step computes, the longest first."""
        if not self.out_of_memory:
            self.out_of_memory = not self.attempt(self.list_kernels)

    def list_kernels(self) -> None:
        """Record PROFILED_STEPS."""
        is_cuda = self.images.is_cuda
        device = DeviceType.CUDA if is_cuda else DeviceType.CPU
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        with profile(activities=activities, acc_events=True) as profiler:
            for _ in range(PROFILED_STEPS):
                self.step()
            if is_cuda:
                torch.cuda.synchronize(self.images.device)
        kernels = [
            {
                "name": event.key,
                "calls": event.count / PROFILED_STEPS,
                "ms": (event.self_device_time_total if is_cuda else event.self_cpu_time_total)
                / 1000
                / PROFILED_STEPS,
            }
            for event in profiler.key_averages()
            if event.device_type == device and not event.is_user_annotation
        ]
        self.kernels = sorted(kernels, key=lambda kernel: -kernel["ms"])

    def results(self, flops: ForwardFlops, rate: float) -> dict[str, object]:
        """What was measured, as plain values; None for what could not be.

        Args:
            flops: of an image.
            rate: the device's operations a second.
        """
        found: dict[str, object] = {
            "out_of_memory": self.out_of_memory,
            "encoder_gflops": flops.encoder / 1e9,
            "decoder_gflops": flops.decoder / 1e9,
            "total_gflops": flops.total / 1e9,
        }
        if self.out_of_memory:
            return found | dict.fromkeys(MEASURED)
        num_images = len(self.images)
        seconds = statistics.median(self.seconds)
        slope = self.saved_slope
        measured = (
            self.seconds,
            self.first,
            seconds,
            1000 * seconds / num_images,
            num_images / seconds,
            50 * (max(self.seconds) - min(self.seconds)) / seconds,
            100 * flops.training * num_images / seconds / rate,
            None if self.peak is None else self.peak / MIB,
            self.saved / num_images / MIB,
            None if slope is None else slope / MIB,
        )
        return found | dict(zip(MEASURED, measured, strict=True))


def measure_in_turns(
    steps: Sequence[MeasuredStep],
    device: torch.device,
    *,
    warmup: int,
    rounds: int,
    num_steps: int,
) -> Iterator[dict[str, float]]:
    """Give every step its turns, round by round, and a large matrix product in each dtype, too.

    Args:
        steps: to measure, all on the device.
        device: where.
        warmup: steps before the first round.
        rounds: number of turns of each.
        num_steps: in a turn.

    Yields:
        After every turn, the device's floating-point operations a second in each dtype, by
        Precision's names.
    """
    progress = tqdm(total=rounds * len(steps), disable=None, unit="turn", leave=False)
    dtypes = {step.precision.amp: step.precision.dtype for step in steps}
    matmuls = {name: build_matmul(device, dtype) for name, dtype in dtypes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in matmuls}
    for number in range(rounds):
        for name, (multiply, _) in matmuls.items():
            seconds[name].append(time_calls(multiply, 2, device)[-1])
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        rates = {name: matmuls[name][1] / median for name, median in medians.items()}
        for step in steps:
            if number == 0:  # not before, so that the first rows are known when the last are not
                step.prepare(warmup)
            step.take_turn(num_steps)
            progress.update()
            yield rates
    progress.close()


def describe_machine(device: torch.device) -> dict[str, object]:
    """What a measurement depends on beside the code."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": str(device),
        **describe_cpu(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda if gpu else None,
        "clock": clock_of(device),
    }


def describe_cpu() -> dict[str, object]:
    """The processor's name, family and model, its vector instructions, and how many cores are ours.

    The name alone says little: processors of one name differ in what they can do.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().partition("\n\n")[0].splitlines() if cpuinfo.exists() else []
    known = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = known.get("flags", known.get("Features", "")).split()
    return {
        "cpu": known.get("model name") or platform.processor() or platform.machine(),
        "cpu_family": known.get("cpu family"),
        "cpu_model": known.get("model"),
        "vectors": [flag for flag in flags if flag.startswith(VECTORS)],
        "cores": available_cores(),
    }
