"""Measurement of the time and memory of training steps."""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from util.compute.memory import saved_bytes
from util.compute.out_of_memory import is_out_of_memory
from util.compute.precision import Precision
from util.flops import ForwardFlops
from util.kernels import linear
from util.machine import available_cores

MIB = 2**20
VECTORS = ("avx", "amx", "sse4", "sve", "asimd")  # prefixes of CPU flags
MATMUL_SIDE = {"cuda": 8192, "cpu": 2048}
PROFILED_STEPS = 2
# Keys of MeasuredStep.results.
MEASURED = (
    "round_step_s",
    "first_step_s",
    "median_step_s",
    "ms_per_image",
    "images_per_s",
    "spread_percent",
    "utilization_percent",
    "peak_memory_mb",
    "saved_mb_per_image",
    "saved_slope_mb_per_image",
)


def time_calls(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Measure the seconds that each of several consecutive calls takes.

    On CUDA, time between events around each call, with one synchronization at the end. On a CPU
    with one thread, CPU time of this process, which other processes disturb least. Otherwise wall
    time.
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
    """Name of the clock that `time_calls` uses."""
    if device.type == "cuda":
        return "CUDA events"
    return "CPU seconds" if torch.get_num_threads() == 1 else "wall-clock seconds"


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak CUDA memory allocated during a call, beyond that before it; None on other devices."""
    if device.type != "cuda":
        call()
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def build_matmul(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """Build a large square matrix product with the models' kernel; return it and its operations."""
    side = MATMUL_SIDE.get(device.type, MATMUL_SIDE["cpu"])
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    bias = torch.zeros(side, device=device, dtype=dtype)

    @torch.no_grad()
    def multiply() -> Tensor:
        return linear(a, b, bias)

    return multiply, 2 * side**3


class MeasuredStep:
    """A training step and its measurements.

    The memory of other models is not counted.

    Args:
        model: images -> loss.
        images: (B, C, H, W), on the device.
        before_turn: called before every turn, to set --memory, as rows may share a model.
        compiled: skips the bytes of one more image, because the model would be recompiled for
            another batch size.
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
        self.seconds: list[float] = []  # per step, one median for each turn
        self.first: float | None = None  # wall time in seconds, including compilation
        self.kernels: list[dict] | None = None  # see profile
        self.peak: int | None = None  # bytes, including weights, optimizer state and images
        self.saved: int | None = None  # bytes for the batch, see saved_bytes
        self.saved_slope: float | None = None  # bytes for one more image
        self.out_of_memory = False

    def forward(self, images: Tensor) -> Tensor:
        """Compute the loss."""
        with self.precision.autocast():
            return self.model(images)

    def step(self) -> None:
        """Run one training step."""
        self.precision.backward(self.forward(self.images))
        self.precision.step(self.optimizer, self.model)
        self.optimizer.zero_grad(set_to_none=True)

    def prepare(self, warmup: int) -> None:
        """Measure memory, with at least `warmup` steps."""
        self.out_of_memory = not self.attempt(lambda: self.warm_up(warmup))
        if not self.compiled and not self.out_of_memory:
            self.attempt(self.measure_slope)  # twice the batch may not fit, which is not an error

    def take_turn(self, steps: int) -> None:
        """Measure the time of a few steps."""
        if not self.out_of_memory:
            self.out_of_memory = not self.attempt(lambda: self.measure_time(steps))

    def attempt(self, call: Callable[[], None]) -> bool:
        """Make a call that may run out of memory; return whether it succeeded."""
        self.before_turn()
        try:
            call()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        self.model.zero_grad(set_to_none=True)  # the call's other tensors are already freed
        if self.images.is_cuda:
            torch.cuda.empty_cache()
        return False

    def warm_up(self, warmup: int) -> None:
        """Warm up and measure memory; the first step creates the optimizer state."""
        with torch.compiler.set_stance("force_eager"):  # else it would compile for one image
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
        """Measure the bytes saved for one more image, by doubling the batch."""
        twice = torch.cat((self.images, self.images))
        saved = saved_bytes(lambda: self.forward(twice), self.model.parameters())
        self.saved_slope = (saved - self.saved) / len(self.images)

    def measure_time(self, steps: int) -> None:
        """Add a turn's median."""
        times = time_calls(self.step, steps, self.images.device)
        self.seconds.append(statistics.median(times))

    def profile(self) -> None:
        """List the kernels of a step, the longest first."""
        if not self.out_of_memory:
            self.attempt(self.list_kernels)  # the profiler may not fit beside a step that does

    def list_kernels(self) -> None:
        """Profile PROFILED_STEPS steps."""
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
        """Return the measurements as plain values; None for those that are missing.

        Args:
            flops: for one image.
            rate: the device's operations per second.
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


def measure_interleaved(
    steps: Sequence[MeasuredStep],
    device: torch.device,
    *,
    warmup: int,
    rounds: int,
    num_steps: int,
) -> Iterator[dict[str, float]]:
    """Measure every step once per round, and a large matrix product in each dtype.

    Args:
        warmup: steps before the first round.
        num_steps: steps per turn.

    Yields:
        After every turn, the device's floating-point operations per second in each dtype, by
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
            if number == 0:  # not earlier, so that the first rows are reported before the last
                step.prepare(warmup)
            step.take_turn(num_steps)
            progress.update()
            yield rates
    progress.close()


def describe_machine(device: torch.device) -> dict[str, object]:
    """Describe the hardware and settings that a measurement depends on."""
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
    """Describe the CPU: name, family, model, vector instructions and available cores.

    The name is not enough: CPUs of the same name differ in their instructions.
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
