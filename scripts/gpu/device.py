"""Record a machine: GPU, versions, CPU, shared memory, and the rates it reaches.

python scripts/gpu/device.py output/env.json
"""

import importlib.metadata
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmark.step import build_matmul, describe_machine, time_calls
from util.runs.files import write_json
from util.runs.run import versions

GIB = 2**30


def driver() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(words, capture_output=True, text=True).stdout.partition("\n")[0]


def triton() -> str | None:
    """Triton's version; None without it."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def copy_gb_per_s(source: torch.Tensor, target: torch.Tensor, device: torch.device) -> float:
    """Measure the speed of a copy; a copy within a device reads and writes each byte once."""
    seconds = time_calls(lambda: target.copy_(source, non_blocking=True), 6, device)
    return source.nbytes / statistics.median(seconds[1:]) / 1e9


def main() -> None:
    """Measure, print and write the results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_cuda = device.type == "cuda"
    shm = Path("/dev/shm")
    host = torch.empty(GIB if is_cuda else GIB // 16, dtype=torch.uint8, pin_memory=is_cuda)
    here, there = (torch.empty_like(host, device=device) for _ in range(2))
    multiply, num_operations = build_matmul(device, torch.bfloat16)
    multiply()
    content = {
        "machine": {**describe_machine(device), **versions()},
        "driver": driver(),
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton(),
        "shm_gib": shutil.disk_usage(shm).free / GIB if shm.exists() else None,
        "host_to_device_gb_per_s": copy_gb_per_s(host, here, device),
        "device_to_device_gb_per_s": copy_gb_per_s(here, there, device),
        "matmul_tflops": num_operations / time_calls(multiply, 5, device)[-1] / 1e12,
    }
    write_json(Path(sys.argv[1]), content)
    print(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
