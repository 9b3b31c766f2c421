"""Fine-tune an encoder on labels, train one from scratch, or evaluate a classifier.

python main_finetune.py --finetune PRETRAINED --data_path IMAGES
torchrun --standalone --nproc_per_node 8 main_finetune.py --finetune PRETRAINED --data_path IMAGES
python main_finetune.py --eval --finetune FINETUNED --data_path IMAGES
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3

from engine_finetune import describe, describe_classifier, evaluate, train_one_epoch
from models import EncoderSettings, add_encoder_args, build_classifier, starting_point
from models_vit import make_linear_probe
from util.arguments import Parser, given_options, take
from util.compute.batch_size import plan_batches
from util.compute.compiling import compile_model
from util.compute.distributed import data_parallel, is_main_process
from util.compute.precision import blank_images
from util.compute.setup import ComputeSettings, add_memory_args, add_precision_args, place_model
from util.compute.sharding import unsharded
from util.data.broken_images import BrokenImages
from util.data.classes import check_classes, check_output_order
from util.data.datasets import open_train_val, open_val
from util.data.loaders import build_eval_loader, build_loaders
from util.data.mixing import MixSettings, add_mix_args, build_mixup
from util.data.report import report_images
from util.data.settings import DataSettings, add_data_args
from util.data.transforms import (
    AugmentSettings,
    add_augmentation_args,
    default_crop_pct,
    eval_transform,
    finetune_transform,
)
from util.errors import InputError
from util.optim import (
    FineTuneSettings,
    OptimSettings,
    add_finetune_args,
    add_optim_args,
    build_layer_decay_adamw,
)
from util.runs.checkpoint import TrainState
from util.runs.report import report
from util.runs.resume import (
    CONTENT,
    EFFECTIVE_BATCH,
    RunRecord,
    changeable_settings,
    checkpoint_to_evaluate,
    log_settings,
    open_run,
)
from util.runs.run import RunSettings, add_run_args, run_main, start_run
from util.schedule import plan_learning_rate
from util.weights.encoder import load_encoder

SETTINGS = (RunSettings, DataSettings, OptimSettings, ComputeSettings)
SETTINGS += (EncoderSettings, FineTuneSettings, AugmentSettings, MixSettings)
MEMORY_ADVICE = (
    "use a lower --batch_size with the same --effective_batch_size, or --memory medium or low"
)

_logger = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """Hyperparameters that depend on the model's size (Table 11 and the authors' commands)."""

    epochs: int
    blr: float
    layer_decay: float
    drop_path: float


SMALL_RECIPE = Recipe(epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.1)
HUGE_RECIPE = Recipe(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.3)
RECIPES = {
    "tiny_patch4": SMALL_RECIPE,
    "tiny_patch16": SMALL_RECIPE,
    "small_patch16": SMALL_RECIPE,
    "base_patch16": SMALL_RECIPE,
    "large_patch16": Recipe(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2),
    "huge_patch14": HUGE_RECIPE,
    "giant_patch14": HUGE_RECIPE,  # the paper has no ViT-g
}
WARMUP_EPOCHS = 5  # at most a tenth of the run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; defaults are the paper's (Table 11)."""
    parser = Parser(
        prog="main_finetune.py",
        description="Fine-tune an encoder, train one from scratch, or evaluate a classifier.",
    )
    add_run_args(parser, output_dir="output/finetune", save_every=1)
    add_data_args(parser, input_size=None)
    add_encoder_args(parser, pool="avg")
    add_optim_args(
        parser,
        batch_size=128,
        epochs=None,
        blr=None,
        weight_decay=0.05,
        warmup_epochs=f"{WARMUP_EPOCHS}, at most EPOCHS / 10",
        min_lr=1e-6,
    )
    add_precision_args(parser)
    add_memory_args(parser)
    group = add_finetune_args(parser)
    group.add_argument(
        "--eval",
        action="store_true",
        help="only evaluate the classifier of --finetune or --resume, else the newest in "
        "OUTPUT_DIR (off)",
    )
    add_augmentation_args(parser)
    add_mix_args(parser)
    args = parser.parse_args(argv)
    for settings in SETTINGS:
        take(settings, args)
    if args.fsdp and args.ema is not None:
        raise InputError("--ema cannot be combined with --fsdp: leave one of them out")
    return args


def resolve_recipe(args: argparse.Namespace, size: str) -> Recipe:
    """The recipe of a size, overridden by the command line."""
    given = {name: getattr(args, name) for name in Recipe._fields}
    return RECIPES[size]._replace(**{n: v for n, v in given.items() if v is not None})


def evaluate_only(
    path: str | Path,
    run: RunSettings,
    data: DataSettings,
    compute: ComputeSettings,
    encoder: EncoderSettings,
    batch_size: int,
    device: torch.device,
) -> None:
    """Measure a fine-tuned classifier on the validation images, without writing anything.

    Raises:
        InputError: the file does not hold a classifier, or not one for these images.
    """
    start = starting_point(
        path, encoder.model, img_size=data.input_size, mean=data.mean, std=data.std
    )
    weights = start.weights
    if weights.num_classes is None:
        raise InputError(f"{path} has no head to evaluate: fine-tune it first, without --eval")
    if encoder.num_classes not in (None, weights.num_classes):
        raise InputError(
            f"{path} has a head of {weights.num_classes} classes: correct --num_classes "
            f"{encoder.num_classes} or leave it out"
        )
    crop_pct = data.crop_pct or weights.crop_pct or default_crop_pct(start.img_size)
    transform = eval_transform(*start.input_format, crop_pct)
    val_set = open_val(data, transform, seed=run.seed)
    if val_set is None:
        raise InputError(f"{data.name} has no validation images: set --val_path")
    report_images(None, val_set)
    num_classes = check_classes(None, val_set, weights.num_classes, weights.classes)
    if weights.classes is None and data.dataset is None:
        check_output_order(path, val_set, data.name)
    pool = encoder.pool or weights.pool
    model = build_classifier(
        start.size, img_size=start.img_size, num_classes=num_classes, pool=pool
    )
    if weights.is_linear_probe:
        make_linear_probe(model, num_classes)
    load_encoder(model, weights, head=True)
    example = blank_images(start.img_size, device)
    # Not sharded, because processes may have different numbers of images.
    precision = place_model(model, replace(compute, fsdp=False), device, example)
    sizes = {"batch_size": batch_size, "num_workers": data.num_workers}
    loader = build_eval_loader(val_set, **sizes, device=device)
    broken = BrokenImages(len(val_set), data.max_broken)
    _logger.info(
        "%s: %s", path, describe(evaluate(model, loader, precision=precision, broken=broken))
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune from the beginning, or continue a stopped run."""
    args = parse_args(argv)
    run, data, optim, compute, encoder, tuning, augment, mix = (
        take(settings, args) for settings in SETTINGS
    )
    device = start_run(device=run.device, seed=run.seed, timeout_minutes=run.timeout_minutes)
    if args.eval:
        path = checkpoint_to_evaluate(run, encoder.finetune, "finetune")
        evaluate_only(path, run, data, compute, encoder, optim.batch_size, device)
        return

    # The weights determine the input format, and their size the recipe.
    start = starting_point(
        encoder.finetune, encoder.model, img_size=data.input_size, mean=data.mean, std=data.std
    )
    recipe = resolve_recipe(args, start.size)
    warmup_epochs = min(WARMUP_EPOCHS, recipe.epochs / 10)
    optim = optim.with_defaults(epochs=recipe.epochs, blr=recipe.blr, warmup_epochs=warmup_epochs)
    crop_pct = data.crop_pct or default_crop_pct(start.img_size)
    transforms = (
        finetune_transform(*start.input_format, augment),
        eval_transform(*start.input_format, crop_pct),
    )
    train_set, val_set = open_train_val(
        data, *transforms, seed=run.seed, batch_size=optim.batch_size
    )
    found = report_images(train_set, val_set)
    num_classes = check_classes(train_set, val_set, encoder.num_classes)
    batches = plan_batches(optim)
    loader, val_loader = build_loaders(
        train_set, val_set, data, batches, seed=run.seed, device=device
    )

    # The model
    pool = encoder.pool or "avg"
    options = {
        "img_size": list(start.img_size),
        "num_classes": num_classes,
        "pool": pool,
        "drop_path": recipe.drop_path,
    }
    build = partial(build_classifier, start.size, **options)
    model = build()
    if start.weights is not None:
        load_encoder(model, start.weights, head=False)
    example = blank_images(start.img_size, device)
    precision = place_model(model, compute, device, example, optim)
    ema = None if tuning.ema is None else ModelEmaV3(model, decay=tuning.ema)
    compile_model(model, compute.compile, device=device)

    # How it is trained
    lr = plan_learning_rate(optim, loader)
    optimizer = build_layer_decay_adamw(
        model, weight_decay=optim.weight_decay, layer_decay=recipe.layer_decay, betas=(0.9, 0.999)
    )
    broken = BrokenImages(loader.sampler.num_samples, data.max_broken)
    state = TrainState(model, optimizer, precision, broken, ema=ema)

    # Settings that must match on resume, and settings that may change
    fixed, header = describe_classifier(
        start, options, train_set, dataset=data.name, crop_pct=crop_pct
    )
    fixed |= {
        "--layer_decay": recipe.layer_decay,
        "--drop_path": recipe.drop_path,
        "--weight_decay": optim.weight_decay,
        **{f"--{name}": value for name, value in {**vars(augment), **vars(mix)}.items()},
        "--ema": tuning.ema,
        "--seed": run.seed,
        EFFECTIVE_BATCH: loader.effective_batch_size,
    }
    may_change = changeable_settings(optim, data, lr=lr.peak, amp=precision.amp, fsdp=compute.fsdp)
    may_change[CONTENT] = train_set.content_hash()
    log_settings({**fixed, **may_change})
    given = given_options(args, parse_args([]))
    record = RunRecord("finetune", fixed, may_change, header, vars(args), given, data=found)
    with open_run(state, loader, run, record) as (checkpoints, run_log):
        progress, parallel_model = state.progress, data_parallel(model, device)
        mixup = build_mixup(mix, num_classes)
        while progress.epoch < optim.epochs:
            stats = train_one_epoch(
                parallel_model,
                loader,
                state,
                num_classes=num_classes,
                seed=run.seed,
                device=device,
                mixup=mixup,
                smoothing=mix.smoothing,
                lr_at=lr.at,
                log_every=run.log_every,
                run_log=run_log,
                checkpoints=checkpoints,
            )
            if val_loader is not None:  # one without images is false
                broken = BrokenImages(len(val_set), data.max_broken)
                with unsharded(model, build) as full_model:
                    measured = full_model if ema is None else ema.module
                    stats |= evaluate(measured, val_loader, precision=precision, broken=broken)
            run_log.end_epoch(stats, epoch=progress.epoch, step=progress.step)
            checkpoints.save_if_best(stats, by="val_top1")
            checkpoints.end_epoch(is_last=progress.epoch == optim.epochs)

    if is_main_process():
        title = "fine-tuning" if start.weights else "training from scratch"
        report(run.folder, title, by="val_top1", describe=describe)


if __name__ == "__main__":
    run_main(main, trains=True, memory_advice=MEMORY_ADVICE)
