"""Compare a training step of UperNet on our ViT with transformers' UperNet on its BEiT.

    python scripts/benchmark_segmentation.py --json segmentation.json

Both have the same shape (relative position biases, MAE's neck, 768 channels, 150 classes), forward,
backward and AdamW on synthetic images on the device. Every round gives each a turn. Our linear head
is a third row. Results are a Markdown table on stdout.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments, check_output_folders, positive_int
from util.errors import InputError
from util.settings.compute import AMP_DTYPES
from util.settings.model import AUX_WEIGHT, HEAD_DIM, SIZES


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="base_patch16", help="(%(default)s)")
    parser.add_argument("--input_size", type=positive_int, default=512, help="px (%(default)s)")
    parser.add_argument("--batch_size", type=positive_int, default=2, help="(%(default)s)")
    parser.add_argument("--dtype", choices=AMP_DTYPES, help="(bf16 if the device supports it)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="turns (%(default)s)")
    parser.add_argument("--device", help="cuda, cuda:N or cpu (cuda if available)")
    parser.add_argument("--threads", type=positive_int, default=1, help="on a CPU (%(default)s)")
    parser.add_argument("--json", type=Path, help="output file for all numbers")
    args = parser.parse_args(argv)
    check_output_folders(args.json)
    if args.batch_size < 2:
        raise InputError("UperNet cannot normalize a batch of 1: use --batch_size 2")
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch
import torch.nn as nn
from torch import Tensor

from engine_segmentation import segmentation_loss
from models import build_segmenter
from models_upernet import AUXILIARY_DIM, POOL_SCALES, default_out_indices
from scripts.benchmark.step import MeasuredStep, describe_machine, measure_interleaved
from scripts.benchmark.tables import markdown
from util.compute.precision import Precision
from util.optim import build_adamw, set_lr
from util.runs.files import write_json
from util.runs.run import run_main, start_run, versions

NUM_CLASSES = 150


class LossOfImages(nn.Module):
    """Images (B, 3, H, W) -> loss, with fixed random labels."""

    def __init__(self, model: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.model, self.labels = model, labels

    def forward(self, images: Tensor) -> Tensor:
        """Compute the loss."""
        return segmentation_loss(self.model(images), self.labels, AUX_WEIGHT)


class TransformersLoss(LossOfImages):
    """The same with transformers' model, whose own loss has another weight for unlabeled pixels."""

    def forward(self, images: Tensor) -> Tensor:
        """Compute the loss."""
        maps = self.model.backbone(images).feature_maps
        logits = [self.model.decode_head(maps), self.model.auxiliary_head(maps)]
        return segmentation_loss(logits, self.labels, AUX_WEIGHT)


def build_transformers(size: str, input_size: int) -> nn.Module:
    """Build transformers' UperNet on a BEiT of the same shape as ours."""
    from transformers import BeitConfig, UperNetConfig, UperNetForSemanticSegmentation

    vit = SIZES[size]
    backbone = BeitConfig(
        image_size=input_size,
        patch_size=vit.patch_size,
        hidden_size=vit.embed_dim,
        num_hidden_layers=vit.depth,
        num_attention_heads=vit.num_heads,
        intermediate_size=4 * vit.embed_dim,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=True,
        layer_scale_init_value=0.0,
        drop_path_rate=0.0,
        add_fpn=True,
        reshape_hidden_states=True,
        out_indices=[index + 1 for index in default_out_indices(vit.depth)],
    )
    config = UperNetConfig(
        backbone_config=backbone,
        num_labels=NUM_CLASSES,
        hidden_size=HEAD_DIM,
        pool_scales=list(POOL_SCALES),
        auxiliary_in_channels=vit.embed_dim,
        auxiliary_channels=AUXILIARY_DIM,
    )
    return UperNetForSemanticSegmentation(config)


def build_steps(
    size: str, input_size: int, batch_size: int, dtype: str | None, device: torch.device
) -> dict[str, MeasuredStep]:
    """Build the rows, by name."""
    images = torch.randn(batch_size, 3, input_size, input_size, device=device)
    labels = torch.randint(NUM_CLASSES, (batch_size, input_size, input_size), device=device)
    options = {"img_size": input_size, "num_classes": NUM_CLASSES}
    models = {
        "ours, UperNet": build_segmenter(
            size, head="upernet", rel_pos_bias=True, dropout=0.0, head_dim=HEAD_DIM, **options
        ),
        "transformers, UperNet": build_transformers(size, input_size),
        "ours, linear": build_segmenter(size, head="linear", **options),
    }
    steps = {}
    for name, model in models.items():
        model.to(device).train()
        optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.999))
        set_lr(optimizer, 1e-5)
        loss = TransformersLoss if name.startswith("transformers") else LossOfImages
        precision = Precision(dtype, device)
        steps[name] = MeasuredStep(loss(model, labels), optimizer, precision, images, compiled=True)
    return steps


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the requested file."""
    args = parse_args(argv)
    device = start_run(device=args.device, seed=0)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    steps = build_steps(args.size, args.input_size, args.batch_size, args.dtype, device)
    machine = {**describe_machine(device), **versions(), "command": sys.argv}
    machine["date"] = time.strftime("%Y-%m-%d %H:%M")
    turns = {"warmup": 1, "rounds": args.rounds, "num_steps": 1}
    for number, _ in enumerate(measure_interleaved(list(steps.values()), device, **turns)):
        rows = [
            {"name": name, "round_step_s": step.seconds, "out_of_memory": step.out_of_memory}
            for name, step in steps.items()
        ]
        if args.json:
            write_json(args.json, {"machine": machine, "rows": rows}, keep_earlier=number == 0)
    medians = {name: statistics.median(step.seconds) for name, step in steps.items()}
    ours = medians["ours, UperNet"]
    lines = [
        [name, seconds, seconds / ours, ", ".join(f"{s:.2f}" for s in steps[name].seconds)]
        for name, seconds in medians.items()
    ]
    print(markdown(["model", "s per step", "relative to ours", "rounds"], lines))


if __name__ == "__main__":
    run_main(main)
