"""Time the main operations of a pre-training step of ViT-B, one by one, in bfloat16.

python scripts/gpu/micro.py output/micro.json
"""

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmark.step import describe_machine, time_calls
from scripts.benchmark.tables import markdown
from util.runs.files import write_json
from util.runs.run import versions
from util.settings.compute import ATTENTION_BACKENDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 2 if os.environ.get("QUICK") else 1024
# Place, queries, keys, heads, width of a head.
ATTENTION = (
    ("encoder", 50, 50, 12, 64),
    ("decoder", 49, 50, 16, 32),
    ("decoder", 147, 50, 16, 32),
    ("MAE's decoder", 197, 197, 16, 32),
    ("encoder", 99, 99, 12, 64),
    ("encoder", 148, 148, 12, 64),
    ("encoder", 197, 197, 12, 64),
)
# Rows, inputs and outputs of linear layers.
LAYERS = {
    "encoder qkv": (BATCH * 50, 768, 2304),
    "encoder proj": (BATCH * 50, 768, 768),
    "encoder fc1": (BATCH * 50, 768, 3072),
    "encoder fc2": (BATCH * 50, 3072, 768),
    "decoder kv": (BATCH * 50, 768, 1024),
    "decoder fc1": (BATCH * 49, 512, 2048),
    "decoder fc2": (BATCH * 49, 2048, 512),
}
NUM_LAYERS = 6  # number of the largest layers to time
MAPS, PADDED_MAPS, MIXES, TOKENS = 13, 16, 12, (50, 768)

# Group, what, variant, call, operations, bytes read and written.
Case = tuple[str, str, str, Callable[[], object], int, int]


def normal(*shape: int) -> Tensor:
    """Random numbers in bfloat16."""
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def attend(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, backend: SDPBackend | None) -> None:
    """Run attention forward and backward, with a given kernel or PyTorch's choice."""
    with nullcontext() if backend is None else sdpa_kernel(backend):
        output = F.scaled_dot_product_attention(q, k, v)
    torch.autograd.grad(output, (q, k, v), grad)


def attention_cases() -> Iterator[Case]:
    """Yield every attention kernel for every shape."""
    for place, queries, keys, heads, width in ATTENTION:
        # As in the models, heads are a view of a token's channels.
        q, k, v = (
            normal(BATCH, num, heads, width).transpose(1, 2).requires_grad_()
            for num in (queries, keys, keys)
        )
        what, grad = f"{place}, {queries} x {keys}", torch.randn_like(q)
        flops = 12 * BATCH * heads * queries * keys * width
        num_bytes = 6 * (q.nbytes + k.nbytes)
        backends = {name: getattr(SDPBackend, kind) for name, kind in ATTENTION_BACKENDS.items()}
        for name, backend in {**backends, "auto": None}.items():
            call = partial(attend, q, k, v, grad, backend)
            yield "attention", what, name, call, flops, num_bytes


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Products of a (B, N, K) and b (B, K, M), summed over B to (N, M)."""
    return torch.bmm(a, b).sum(dim=0)


def mix_cases() -> Iterator[Case]:
    """Yield the three products of inter-block attention's mix, with 13 maps and padded to 16."""
    tokens, width = TOKENS
    size = BATCH * tokens * width
    grad = normal(MIXES, size)
    for num_maps in (MAPS, PADDED_MAPS):
        weight, maps = normal(MIXES, num_maps), normal(num_maps, size)
        # Per image, (B, mixes or maps, -1).
        grads_by_image, maps_by_image = (
            x.unflatten(1, (BATCH, -1)).transpose(0, 1) for x in (grad, maps)
        )
        calls = {
            "forward": partial(torch.mm, weight, maps),
            "gradient of the maps": partial(torch.mm, weight.T, grad),
            "gradient of the weight": partial(torch.mm, grad, maps.T),
            "gradient of the weight by image": partial(
                sum_of_products, grads_by_image, maps_by_image.transpose(1, 2)
            ),
        }
        for what, call in calls.items():
            flops, num_bytes = 2 * MIXES * num_maps * size, grad.nbytes + maps.nbytes
            yield "mix", what, f"{num_maps} maps", call, flops, num_bytes


def layer_cases() -> Iterator[Case]:
    """Yield the three products of each of the largest linear layers."""
    largest = sorted(LAYERS.items(), key=lambda layer: -layer[1][0] * layer[1][1] * layer[1][2])
    for what, (rows, inputs, outputs) in largest[:NUM_LAYERS]:
        x, weight, bias = normal(rows, inputs), normal(outputs, inputs), normal(outputs)
        grad = normal(rows, outputs)
        calls = {
            "forward": partial(F.linear, x, weight, bias),
            "gradient of the input": partial(torch.mm, grad, weight),
            "gradient of the weight": partial(torch.mm, grad.T, x),
        }
        num_bytes = x.nbytes + weight.nbytes + grad.nbytes
        for variant, call in calls.items():
            yield "layer", what, variant, call, 2 * rows * inputs * outputs, num_bytes


def measure(case: Case) -> dict[str, object]:
    """Time a case; if it cannot run, return the reason under `refused`."""
    group, what, variant, call, flops, num_bytes = case
    row: dict[str, object] = {"group": group, "what": what, "variant": variant}
    try:
        seconds = statistics.median(time_calls(call, 13, DEVICE)[3:])
    except RuntimeError as error:
        return {**row, "ms": None, "refused": " ".join(str(error).split())}
    rates = {"tflops": flops / seconds / 1e12, "gb_per_s": num_bytes / seconds / 1e9}
    return {**row, "ms": 1000 * seconds, **rates}


def main() -> None:
    """Measure case by case, write every row immediately, and print the table."""
    path, rows = Path(sys.argv[1]), []
    content = {"machine": {**describe_machine(DEVICE), **versions()}, "batch_size": BATCH}
    for cases in (attention_cases, mix_cases, layer_cases):
        for case in cases():
            rows.append(measure(case))
            write_json(path, {**content, "rows": rows}, keep_earlier=len(rows) == 1)
    titles = ["group", "what", "variant", "ms", "TFLOP/s", "GB/s"]
    keys = ["group", "what", "variant", "ms", "tflops", "gb_per_s"]
    lines = [[row.get(key) for key in keys] for row in rows]
    print(markdown(titles, lines))
    for row in rows:
        if "refused" in row:
            print("refused: {what}, {variant}: {refused}".format_map(row))


if __name__ == "__main__":
    main()
