"""Count a pre-training step's operations, bytes, FLOPs and peak memory on a GPU, without a GPU.

    python scripts/count_operations.py
    python scripts/count_operations.py --models mae_vit_base_patch16 --json mae.json

A step, from the loader's batch to AdamW's update in bfloat16, runs on fake tensors, which have
shapes but no content. Bytes are counted as each operation reads and writes them in eager mode;
FLOPs are those of matrix products. Divided by a GPU's rates, they give the least time that a step
can take, and show where a measured step loses time.
"""

import argparse
import sys
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments, check_output_folders, positive_int, ratio
from util.errors import counted
from util.settings.compute import MEMORY_MODES
from util.settings.masking import MaskSettings
from util.settings.model import MODEL_NAMES


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODEL_NAMES,
        default=["crossmae_vit_base_patch16"],
        metavar="NAME",
        help=f"{', '.join(MODEL_NAMES)} (crossmae_vit_base_patch16)",
    )
    parser.add_argument("--batch_size", type=positive_int, default=1024, help="(%(default)s)")
    parser.add_argument("--input_size", type=positive_int, default=224, help="(%(default)s)")
    parser.add_argument("--mask_ratio", type=ratio, default=0.75, help="(%(default)s)")
    parser.add_argument("--pred_ratio", type=ratio, default=0.25, help="(%(default)s)")
    parser.add_argument(
        "--memory", nargs="+", choices=MEMORY_MODES, default=MEMORY_MODES, help="(all)"
    )
    parser.add_argument("--json", type=Path, help="output file for all numbers")
    args = parser.parse_args(argv)
    check_output_folders(args.json)
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine_pretrain import step_noise
from models import build_model
from models_crossmae import MaskedAutoencoder
from scripts.benchmark.tables import markdown
from util.compute.precision import Precision
from util.compute.recompute import set_memory
from util.data.batch import Batch, Normalization
from util.masking import Masking
from util.optim import build_adamw
from util.runs.files import write_json
from util.runs.run import run_main, start_logging, versions

GB, TFLOP, GIB = 1e9, 1e12, 2**30
DEVICE = torch.device("cpu")
NORMALIZATION = Normalization((0.5,) * 3, (0.25,) * 3)
LINEAR, MIX, CAST = "linear layers", "inter-block attention", "casts"
ADD, NORM, GELU = "residual adds, gradient accumulation", "LayerNorm", "GELU"
BIAS, ATTENTION, CAT = "bias gradients", "attention", "cat, stack"
OPTIMIZER, REST = "gradient norm, AdamW", "images, masks, targets, loss"
CLASSES = {
    "mm": LINEAR,
    "addmm": LINEAR,
    "_to_copy": CAST,
    "add": ADD,
    "native_layer_norm": NORM,
    "native_layer_norm_backward": NORM,
    "gelu": GELU,
    "gelu_backward": GELU,
    "sum": BIAS,
    "_scaled_dot_product_flash_attention_for_cpu": ATTENTION,
    "_scaled_dot_product_flash_attention_for_cpu_backward": ATTENTION,
    "cat": CAT,
    "stack": CAT,
    "linalg_vector_norm": OPTIMIZER,
    "_foreach_add_": OPTIMIZER,
    "_fused_adamw_": OPTIMIZER,
}
# Substitute for the GPU's kernel, which reads and writes the same.
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
MOVES_NOTHING = ("empty", "new_empty", "new_empty_strided", "detach", "alias", "_unsafe_view")


def tensors_in(*content: object) -> list[Tensor]:
    """List all tensors in nested containers."""
    return [leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)]


def flops_of(name: str, args: Sequence[object]) -> int:
    """Operations of a matrix product or attention, 0 for anything else."""
    if name in ("mm", "addmm"):
        a, b = args[-2:]
        return 2 * a.shape[0] * a.shape[1] * b.shape[1]
    if CLASSES.get(name) == ATTENTION:
        backward = name.endswith("_backward")
        q, k = args[1:3] if backward else args[:2]
        products = 5 if backward else 2  # the backward pass recomputes the scores
        return products * 2 * q.numel() * k.shape[2]
    return 0


def class_of(name: str, args: Sequence[object], mix: Sequence[int]) -> str:
    """Row of the table that an operation belongs to, by its name and shapes.

    Args:
        mix: the numbers of mixes and feature maps, which no layer's width equals.
    """
    if name == "mm" and any(set(t.shape) & set(mix) for t in tensors_in(args)):
        return MIX
    if name == "_to_copy" and args[0].dtype is torch.uint8:
        return REST
    return CLASSES.get(name, REST)


def as_cuda_autocasts(norm: nn.LayerNorm, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Cast a LayerNorm's input to float32 as CUDA's autocast does, unlike a CPU's."""
    return (inputs[0].float(),)


@dataclass
class Counts:
    """Totals of the operations of a class."""

    operations: int = 0
    bytes: int = 0
    flops: int = 0


@dataclass
class OperationCounter(TorchDispatchMode):
    """Counts operations by class, and the bytes of tensors that are alive at once.

    Args:
        known: tensors whose storage is not counted as alive: weights, optimizer state, batch.
        mix: see `class_of`.
    """

    known: Sequence[Tensor]
    mix: Sequence[int] = ()
    classes: dict[str, Counts] = field(default_factory=dict)
    peak: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self.alive: Counter[int] = Counter()
        self.uncounted = {tensor.untyped_storage()._cdata for tensor in self.known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        """Run an operation and count it."""
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in MOVES_NOTHING:
            read, written = tensors_in(args, kwargs), tensors_in(output)
            counts = self.classes.setdefault(class_of(name, args, self.mix), Counts())
            counts.operations += 1
            # An operation without output, such as a fused optimizer, writes what it reads.
            counts.bytes += sum(t.numel() * t.element_size() for t in read + (written or read))
            counts.flops += flops_of(name, args)
        for tensor in tensors_in(output):
            self.watch(tensor)
        return output

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self.uncounted or address in self.alive:
            return
        self.alive[address] = storage.nbytes()
        self.peak = max(self.peak, self.alive.total())
        weakref.finalize(storage, self.alive.pop, address)


def fake_batch(batch_size: int, img_size: tuple[int, int]) -> Batch:
    """Build a batch like the loader's: uint8, channels last, with flips to apply."""
    images = torch.zeros(batch_size, *img_size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    labels, flips = torch.zeros(batch_size, dtype=torch.long), torch.zeros(batch_size, dtype=bool)
    return Batch(images, labels, [], flips, NORMALIZATION)


def train_step(
    model: MaskedAutoencoder,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    batch: Batch,
    masking: Masking,
) -> None:
    """Run a step like engine_pretrain.py's."""
    noise = step_noise(masking, 0, batch.num_images, 1, DEVICE)  # (B, L)
    images = batch.raw(DEVICE)  # (B, 3, H, W)
    with precision.autocast():
        loss = model(images, masking.split(noise))
    precision.backward(loss)
    precision.step(optimizer, model)
    optimizer.zero_grad(set_to_none=True)


def count_step(
    name: str,
    *,
    batch_size: int,
    memory: str = "high",
    img_size: int = 224,
    mask_ratio: float = 0.75,
    pred_ratio: float = 0.25,
) -> OperationCounter:
    """Count a step of a model.

    Args:
        name: one of MODELS; an MAE predicts all masked patches.
        memory: one of MEMORY_MODES.
        mask_ratio, pred_ratio: p and γ.
    """
    precision = Precision("bf16", DEVICE, attention_backend="flash")
    NORMALIZATION(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))  # caches its tensors, not as fakes
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(name, {"img_size": img_size}).train()
        set_memory(model.blocks, model.mixer, memory, attention=[FLASH])
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(as_cuda_autocasts)
        masks, is_mae = MaskSettings(mask_ratio, pred_ratio), name.startswith("mae_")
        masking = Masking.of(masks, model.encoder.grid_size, seed=0, all_masked=is_mae)
        optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
        step = model, optimizer, precision, fake_batch(batch_size, model.encoder.img_size), masking
        train_step(*step)  # creates the optimizer's moments
        states = [*model.parameters(), *model.buffers(), *optimizer.state.values()]
        mix = () if model.mixer is None else tuple(model.mixer.weight.shape)
        with OperationCounter(tensors_in(states, step[3]), mix) as counter:
            train_step(*step)
    return counter


def rows_of(counter: OperationCounter) -> list[dict[str, object]]:
    """Build a row for each class, most bytes first, and one with their sum."""
    classes = sorted(counter.classes.items(), key=lambda item: -item[1].bytes)
    rows = [
        {"class": name, "operations": c.operations, "gb": c.bytes / GB, "tflop": c.flops / TFLOP}
        for name, c in classes
    ]
    keys = ("operations", "gb", "tflop")
    return [*rows, {"class": "sum", **{key: sum(row[key] for row in rows) for key in keys}}]


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print tables, and write the requested file."""
    args = parse_args(argv)
    start_logging()
    about = {**versions(), "command": sys.argv, "date": time.strftime("%Y-%m-%d %H:%M")}
    step = {"batch_size": args.batch_size, "img_size": args.input_size}
    step |= {"mask_ratio": args.mask_ratio, "pred_ratio": args.pred_ratio}
    steps = []
    for name in args.models:
        for memory in args.memory:
            counter = count_step(name, memory=memory, **step)
            rows, peak = rows_of(counter), counter.peak / GIB
            steps.append({"model": name, "memory": memory, "peak_gib": peak, "rows": rows})
            images = counted(args.batch_size, "image")
            print(f"\n{name}, --memory {memory}, {images}: peak {peak:.3g} GiB\n")
            titles = ["what", "operations", "GB read and written", "TFLOP"]
            print(markdown(titles, [[value or "" for value in row.values()] for row in rows]))
    if args.json:
        write_json(args.json, {"about": about, **step, "steps": steps})


if __name__ == "__main__":
    run_main(main)
