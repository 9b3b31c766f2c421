"""Measure a pre-training step: time, memory and FLOPs (Tables 4, 5 and 18, Fig. 7).

    python scripts/benchmark_pretrain.py --table 4
    python scripts/benchmark_pretrain.py --pred_ratios 0.25 0.75 --memory high low --json out.json
    python scripts/benchmark_pretrain.py --dtypes bf16 --against PROGRAM.py

A step draws masks, runs forward and backward, and updates with AdamW, on synthetic images on the
device. Every round gives every configuration a turn, so that changes in the machine's speed affect
all of them. Results are Markdown tables on stdout.
"""

import argparse
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import (
    Parser,
    check_arguments,
    check_output_folders,
    natural_int,
    positive_int,
    ratio,
)
from util.errors import InputError, counted
from util.settings.compute import AMP_DTYPES, ATTENTION_BACKENDS, COMPILE_MODES, MEMORY_MODES
from util.settings.model import MODEL_NAMES, SIZES

# transformers' ViTMAEForPreTraining in our sizes.
HF_SIZES = {f"hf_vitmae_{s.partition('_')[0]}": s for s in SIZES if not s.endswith("_patch4")}
# Models that --against compares -> their names in the reference program, which lacks ViT-g.
THEIR_SIZES = [s for s in HF_SIZES.values() if s != "giant_patch14"]
THEIR_MODELS = {f"crossmae_vit_{s}": s.partition("_")[0] for s in THEIR_SIZES}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    names = [*MODEL_NAMES, *HF_SIZES]
    parser.add_argument("--table", type=int, choices=(4, 5, 18), help="measure the paper's rows")
    parser.add_argument("--figure", type=int, choices=(7,), help="measure the paper's points")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"{', '.join(names)} (CrossMAE ViT-B); hf_ models are from transformers",
    )
    parser.add_argument("--mask_ratio", type=ratio, default=0.75, help="(%(default)s)")
    parser.add_argument("--pred_ratios", nargs="+", type=ratio, help="for CrossMAE (0.25)")
    parser.add_argument(
        "--decoder_depths", nargs="+", type=positive_int, help="(CrossMAE 12, MAE 8)"
    )
    parser.add_argument("--input_sizes", nargs="+", type=positive_int, help="in pixels (224)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=AMP_DTYPES,
        help="(bf16 if the device supports it, else fp32)",
    )
    parser.add_argument(
        "--memory",
        nargs="+",
        choices=MEMORY_MODES,
        help="memory modes; ignored for hf_ models (high)",
    )
    parser.add_argument(
        "--batch_size", nargs="+", type=positive_int, help="(GPU 1024 as in the paper, CPU 8)"
    )
    parser.add_argument(
        "--compile",
        nargs="?",
        const="whole",
        choices=COMPILE_MODES,
        help="torch.compile the models, as a whole or block by block (off)",
    )
    parser.add_argument(
        "--attention_backend", choices=["auto", *ATTENTION_BACKENDS], default="auto"
    )
    parser.add_argument("--rounds", type=positive_int, help="turns of each row (7)")
    parser.add_argument("--steps", type=positive_int, help="measured steps per turn (3)")
    parser.add_argument("--warmup", type=natural_int, help="steps before the first turn (2)")
    parser.add_argument("--device", help="cuda, cuda:N or cpu (cuda if available)")
    parser.add_argument(
        "--threads", type=positive_int, default=1, help="threads on a CPU (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the script")
    parser.add_argument(
        "--json", type=Path, help="output file for all numbers, written after every turn"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FILE",
        help="append each row's longest kernels to this file",
    )
    parser.add_argument(
        "--plot", type=Path, help="plot of time against decoder FLOPs, as in Fig. 7"
    )
    parser.add_argument(
        "--against",
        metavar="PROGRAM.py",
        help="reference program to compare with, alternately; by default in every --memory mode, "
        "and on a CPU in bf16 and fp32 (protocol: scripts/benchmark/against.py)",
    )
    parser.add_argument(
        "--against_dtype",
        choices=AMP_DTYPES,
        help="precision of the reference program (the same as ours)",
    )
    args = parser.parse_args(argv)
    defaults = {"rounds": 2, "steps": 1, "warmup": 1} if args.quick else {}
    for name, value in {"rounds": 7, "steps": 3, "warmup": 2, **defaults}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Check the arguments before hours of measuring.

    Raises:
        InputError: arguments contradict each other, or a package or file they need is missing.
    """
    chosen = [args.models, args.pred_ratios, args.decoder_depths, args.table and args.figure]
    if chosen_preset(args) and any(chosen):
        raise InputError(
            "--table and --figure define what to measure: use only one of them, without --models, "
            "--pred_ratios and --decoder_depths"
        )
    if args.against:
        if not Path(args.against).is_file():
            raise InputError(f"--against program not found: {args.against}")
        if args.table or args.figure or args.plot or args.profile:
            raise InputError(
                "--against cannot be combined with --table, --figure, --plot or --profile"
            )
        if args.quick and not args.models:
            raise InputError("--quick --against needs --models, such as crossmae_vit_tiny_patch16")
        if not all(name in THEIR_MODELS for name in args.models or THEIR_MODELS):
            raise InputError(f"--against needs --models from {', '.join(THEIR_MODELS)}")
    elif args.against_dtype:
        raise InputError("--against_dtype needs --against, the program that it applies to")
    check_output_folders(args.json, args.plot, args.profile)
    is_hf = any(name in HF_SIZES for name in args.models or [])
    for package, needed in {"matplotlib": args.plot, "transformers": is_hf}.items():
        if needed and importlib.util.find_spec(package) is None:
            flag = "--plot" if package == "matplotlib" else "--models hf_..."
            raise InputError(
                f"{flag} needs {package}: install it (pip install {package}), or leave {flag} out"
            )


def chosen_preset(args: argparse.Namespace) -> str | None:
    """Name of the requested entry of PRESETS, or None."""
    if args.table or args.figure:
        return f"table {args.table}" if args.table else f"figure {args.figure}"
    return None


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim import Optimizer

from models import build_model
from models_crossmae import HEAD_DIM, MaskedAutoencoder, decoder_width
from scripts.benchmark.against import compare_interleaved, flag_words, run_python
from scripts.benchmark.step import MeasuredStep, describe_machine, measure_interleaved
from scripts.benchmark.tables import (
    against_table,
    draw,
    flops_table,
    follow_flops,
    kernels_text,
    main_table,
)
from util.compute.compiling import RECOMPILE_LIMIT, compile_model
from util.compute.precision import Precision
from util.compute.recompute import set_memory
from util.flops import ForwardFlops, crossmae_decoder_flops, encoder_flops, mae_decoder_flops
from util.masking import TokenCounts, count_tokens, random_split
from util.optim import build_adamw, set_lr
from util.runs.files import write_json
from util.runs.run import run_main, start_run, versions

AGAINST_NOTE = (
    "Times faster: theirs / ours, median over rounds. Bytes: ours / theirs, saved per image of the "
    "batch, which may include weights, and for one more image; peak memory of a GPU."
)
NUM_PROFILED, NUM_KEPT = 40, 25  # kernels in --profile's tables, and in the JSON file
MAX_COMPILED = RECOMPILE_LIMIT // 2  # rows: one graph each, or two if memory modes differ
LAST_MAP, SELF_ATTENTION = {"feature_maps": "last"}, {"decoder_self_attention": True}
# The paper's rows as (kind of model, options that differ from the defaults), and its results.
PRESETS: dict[str, tuple[list[tuple[str, dict]], str]] = {
    "table 4": (
        [("mae", {}), ("crossmae", {"pred_ratio": 0.75}), ("crossmae", {"pred_ratio": 0.25})],
        "Table 4, 1024 images on each of 2 A100s: time 1, 0.90, 0.68, memory 1, 0.85, 0.54.",
    ),
    "table 5": (
        [("mae", {})]
        + [
            ("crossmae", {"pred_ratio": pred_ratio, "variant": variant})
            for pred_ratio in (0.75, 0.25)
            for variant in (SELF_ATTENTION, LAST_MAP, {})
        ],
        "Table 5 separates cross-attention, inter-block attention and partial prediction.",
    ),
    "table 18": (
        [("mae", {}), ("mae", {"batch_divisor": 2}), ("crossmae", {"pred_ratio": 0.25})],
        "Table 18, 1024 images on each of 4 A100s of 80 GB: MAE runs out of memory and needs two "
        "halves; CrossMAE takes 0.65 of that time.",
    ),
    "figure 7": (
        [("mae", {})]
        + [
            ("crossmae", {"pred_ratio": pred_ratio, "decoder_depth": depth})
            for pred_ratio, depth in itertools.product((0.15, 0.25, 0.75), (1, 4, 8, 12))
        ],
        "Fig. 7, App. C: decoder FLOPs up to 3.7 times lower than MAE's.",
    ),
}


@dataclass(frozen=True)
class Config:
    """Configuration measured in a row."""

    model: str
    pred_ratio: float | None  # None: every masked patch is predicted, as in MAE
    decoder_depth: int
    input_size: int
    dtype: str
    memory: str
    batch_size: int
    mask_ratio: float
    variant: str = "{}"  # further options of the model, as JSON because a Config must be hashable

    @property
    def size(self) -> str:
        """One of SIZES."""
        return HF_SIZES.get(self.model) or self.model.partition("_vit_")[2]

    @property
    def label(self) -> str:
        """Fig. 7's (prediction ratio, decoder blocks), and options that differ."""
        values = [f"{self.pred_ratio or self.mask_ratio:g}", f"{self.decoder_depth}"]
        values += [f"{name}={value}" for name, value in json.loads(self.variant).items()]
        return f"({', '.join(values)})"

    def count_tokens(self) -> TokenCounts:
        """Count the visible and predicted patches."""
        num_patches = (self.input_size // SIZES[self.size].patch_size) ** 2
        return count_tokens(num_patches, self.mask_ratio, self.pred_ratio)

    def count_flops(self) -> ForwardFlops:
        """Count operations per image; the extra work of transformers' MAE is not included."""
        size, counts, options = SIZES[self.size], self.count_tokens(), json.loads(self.variant)
        patch_dim = 3 * size.patch_size**2
        sizes = {"encoder_dim": size.embed_dim, "dim": decoder_width(size.embed_dim)}
        sizes |= {"depth": self.decoder_depth, "patch_dim": patch_dim}
        tokens = (counts.visible, counts.predicted)
        if self.model.startswith("crossmae"):
            maps = 0 if options.get("feature_maps") == "last" else 1 + size.depth
            self_attends = options.get("decoder_self_attention", False)
            decoder = crossmae_decoder_flops(*tokens, maps=maps, self_attends=self_attends, **sizes)
        else:
            decoder = mae_decoder_flops(*tokens, **sizes)
        encoder = encoder_flops(
            counts.visible,
            dim=size.embed_dim,
            depth=size.depth,
            patch_dim=patch_dim,
            mlp_dim=size.mlp_dim,
        )
        return ForwardFlops(encoder, decoder)


def list_configs(args: argparse.Namespace, device: torch.device) -> list[Config]:
    """List the rows to measure, in order.

    Raises:
        InputError: an input size or a ratio does not fit the model.
    """
    quick_size, size = ("tiny_patch4", 16), ("base_patch16", 224)
    size_name, input_size = quick_size if args.quick else size
    if preset := chosen_preset(args):
        rows = [(f"{kind}_vit_{size_name}", options) for kind, options in PRESETS[preset][0]]
    else:
        names = args.models or [f"crossmae_vit_{size_name}"]
        grid = itertools.product(names, args.pred_ratios or [0.25], args.decoder_depths or [None])
        rows = [(name, {"pred_ratio": r, "decoder_depth": depth}) for name, r, depth in grid]
    batch_sizes = args.batch_size or [2 if args.quick else 1024 if device.type == "cuda" else 8]
    fastest = Precision(None, device).amp
    everything = args.against and device.type == "cpu"
    dtypes = args.dtypes or ([fastest, "fp32"] if everything else [fastest])
    modes = args.memory or (MEMORY_MODES if args.against else ["high"])
    configs = []
    for (name, options), pixels, batch_size, dtype, memory in itertools.product(
        rows, args.input_sizes or [input_size], batch_sizes, dtypes, modes
    ):
        is_crossmae = name.startswith("crossmae")
        configs.append(
            Config(
                model=name,
                pred_ratio=options["pred_ratio"] if is_crossmae else None,
                decoder_depth=options.get("decoder_depth") or (12 if is_crossmae else 8),
                input_size=pixels,
                dtype=dtype,
                memory="high" if name in HF_SIZES else memory,
                batch_size=max(1, batch_size // options.get("batch_divisor", 1)),
                mask_ratio=args.mask_ratio,
                variant=json.dumps(options.get("variant", {})),
            )
        )
        patch_size = SIZES[configs[-1].size].patch_size
        if pixels % patch_size:
            raise InputError(
                f"--input_sizes {pixels} is not a multiple of {name}'s patch size, {patch_size}: "
                "change it"
            )
        configs[-1].count_tokens()
    return list(dict.fromkeys(configs))  # without duplicates among MAE's and transformers' rows


def build_ours(config: Config) -> nn.Module:
    """Build our model of a row."""
    options = {"img_size": config.input_size, "decoder_depth": config.decoder_depth}
    return build_model(config.model, {**options, **json.loads(config.variant)})


def build_hf(config: Config) -> nn.Module:
    """Build transformers' MAE of the same shape."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining  # optional

    size = SIZES[config.size]
    width = decoder_width(size.embed_dim)
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=config.input_size,
            patch_size=size.patch_size,
            hidden_size=size.embed_dim,
            num_hidden_layers=size.depth,
            num_attention_heads=size.num_heads,
            intermediate_size=size.mlp_dim or 4 * size.embed_dim,
            decoder_hidden_size=width,
            decoder_num_hidden_layers=config.decoder_depth,
            decoder_num_attention_heads=width // HEAD_DIM,
            decoder_intermediate_size=4 * width,
            mask_ratio=config.mask_ratio,
            norm_pix_loss=True,
        )
    )


class LossOfImages(nn.Module):
    """Model that draws its own masks: images (B, C, H, W) -> loss."""

    def __init__(self, model: nn.Module, counts: TokenCounts) -> None:
        super().__init__()
        self.model, self.counts = model, counts

    def forward(self, images: Tensor) -> Tensor:
        """Draw masks and compute the loss."""
        noise = torch.rand(len(images), self.counts.patches, device=images.device)  # (B, L)
        if isinstance(self.model, MaskedAutoencoder):
            return self.model(images, random_split(noise, self.counts))
        return self.model(images, noise=noise).loss


def build_steps(
    configs: Sequence[Config], device: torch.device, *, backend: str, compiled: str | None
) -> list[MeasuredStep]:
    """Build the steps to measure; rows of the same model share it and its optimizer."""
    models: dict[tuple, tuple[nn.Module, Optimizer]] = {}
    images: dict[tuple[int, int], Tensor] = {}
    steps = []
    for config in configs:
        key = (config.model, config.decoder_depth, config.input_size, config.variant)
        if key not in models:
            with device:  # initializing the weights there is faster
                model = build_hf(config) if config.model in HF_SIZES else build_ours(config)
            model.to(device).train()
            if compiled:
                blocks = getattr(model, "blocks", [model])  # transformers' model has no `blocks`
                compile_model(model, compiled, device=device, blocks=blocks)
            optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
            set_lr(optimizer, 1e-4)
            models[key] = model, optimizer
        pixels, batch_size = config.input_size, config.batch_size
        if (batch_size, pixels) not in images:
            images[batch_size, pixels] = torch.randn(batch_size, 3, pixels, pixels, device=device)
        model, optimizer = models[key]
        parts = getattr(model, "blocks", ()), getattr(model, "mixer", None)
        steps.append(
            MeasuredStep(
                LossOfImages(model, config.count_tokens()),
                optimizer,
                Precision(config.dtype, device, attention_backend=backend),
                images[batch_size, pixels],
                before_turn=partial(set_memory, *parts, config.memory),
                compiled=bool(compiled),
            )
        )
    return steps


def run_ours(
    configs: Sequence[Config], args: argparse.Namespace, device: torch.device
) -> list[dict]:
    """Measure rows that differ only in memory, in a separate process."""
    config = configs[0]
    flags = {
        "models": config.model,
        "pred_ratios": config.pred_ratio,
        "decoder_depths": config.decoder_depth,
        "input_sizes": config.input_size,
        "dtypes": config.dtype,
        **{name: getattr(config, name) for name in ("batch_size", "mask_ratio")},
        **{name: getattr(args, name) for name in ("attention_backend", "threads")},
        "device": device,
        "rounds": 1,
        "steps": args.steps,
        "warmup": args.warmup,
    }
    words = flag_words(flags)
    words += [
        "--memory",
        *(c.memory for c in configs),
        *(["--compile", args.compile] if args.compile else []),
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        run_python([__file__, *words, "--json", str(path)], threads=args.threads)
        return json.loads(path.read_text())["rows"]


def compare(
    configs: Sequence[Config], args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, object]]:
    """Run ours and the reference program alternately; yield the results after every round."""
    groups: dict[Config, list[Config]] = {}  # rows that differ only in memory
    for config in configs:
        groups.setdefault(replace(config, memory=""), []).append(config)
    matches = []
    for config, group in groups.items():
        names = ("batch_size", "decoder_depth", "mask_ratio", "pred_ratio")
        flags = {"model": THEIR_MODELS[config.model], "img_size": config.input_size}
        flags |= {name: getattr(config, name) for name in names}
        flags["dtype"] = args.against_dtype or config.dtype
        flags |= {"device": device, "steps": args.steps, "warmup": args.warmup}
        matches.append((partial(run_ours, group, args, device), flags))
    one_thread = device.type == "cpu" and args.threads == 1
    for rows in compare_interleaved(
        args.against,
        matches,
        rounds=args.rounds,
        threads=args.threads,
        seconds="median_step_cpu_s" if one_thread else "median_step_s",
    ):
        for row in rows:
            row["their_dtype"] = args.against_dtype or row["dtype"]
        yield {"rounds_done": len(rows[0]["pairs"]), "against": rows}


def measure(
    configs: Sequence[Config], args: argparse.Namespace, device: torch.device
) -> Iterator[dict[str, object]]:
    """Measure every row; yield the results so far after each turn, and after profiling."""
    steps = build_steps(configs, device, backend=args.attention_backend, compiled=args.compile)

    def results(rates: dict[str, float]) -> dict[str, object]:
        rows = []
        for config, step in zip(configs, steps, strict=True):
            if step.seconds or step.out_of_memory:
                values = step.results(config.count_flops(), rates[config.dtype])
                rows.append({**asdict(config), "label": config.label, **values})
                if step.kernels is not None:
                    rows[-1]["kernels"] = step.kernels[:NUM_KEPT]
        return {
            "matmul_gflops_per_s": {dtype: rate / 1e9 for dtype, rate in rates.items()},
            "rows": rows,
            "time_follows_flops": follow_flops(rows),
        }

    turns = {"warmup": args.warmup, "rounds": args.rounds, "num_steps": args.steps}
    for rates in measure_interleaved(steps, device, **turns):
        yield results(rates)
    if args.profile:
        for config, step in zip(configs, steps, strict=True):
            step.profile()
            if step.kernels is not None:
                with args.profile.open("a") as file:
                    file.write(kernels_text(title(config), step.kernels, num=NUM_PROFILED) + "\n")
        yield results(rates)


def title(config: Config) -> str:
    """Describe a row."""
    return (
        f"{config.model} {config.label}, {config.input_size} px, "
        f"{counted(config.batch_size, 'image')}, {config.dtype}, memory {config.memory}"
    )


def print_notes(args: argparse.Namespace, content: dict) -> None:
    """Print how the tables' numbers were measured."""
    machine, rates = content["machine"], content["matmul_gflops_per_s"]
    matmuls = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
    print(
        f"\n{machine['gpu'] or machine['cpu']}, time in {machine['clock']}, medians of "
        f"{counted(args.rounds, 'round')}. Utilization is 3 x forward FLOPs relative to a large "
        f"square matrix product, measured here: {matmuls}."
    )
    if preset := chosen_preset(args):
        print(f"The paper: {PRESETS[preset][1]}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write the requested files."""
    args = parse_args(argv)
    device = start_run(device=args.device, seed=0)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device} cannot be timed: use cuda, cuda:N or cpu")
    configs = list_configs(args, device)
    if args.compile and len(configs) > MAX_COMPILED:
        raise InputError(
            f"--compile measures at most {MAX_COMPILED} rows, not {len(configs)}: choose fewer"
        )
    machine = {**describe_machine(device), **versions(), "command": sys.argv}
    machine["date"] = time.strftime("%Y-%m-%d %H:%M")
    content: dict[str, object] = {"machine": machine, "rounds": args.rounds}
    found = (compare if args.against else measure)(configs, args, device)
    for number, results in enumerate(found):
        content |= results
        if args.json:  # stopping the program loses only the current turn
            write_json(args.json, content, keep_earlier=number == 0)
    if args.against:
        print(against_table(content["against"]), AGAINST_NOTE, sep="\n\n")
        return
    rows = content["rows"]
    print(main_table(rows), flops_table(content["time_follows_flops"]), sep="\n\n")
    print_notes(args, content)
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    run_main(main)
