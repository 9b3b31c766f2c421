"""Fine-tune an encoder on labels, train one from scratch, or evaluate a classifier.

python main_finetune.py --finetune PRETRAINED --data_path IMAGES
torchrun --nproc_per_node 8 main_finetune.py --finetune PRETRAINED --data_path IMAGES
python main_finetune.py --eval --finetune FINETUNED --data_path IMAGES
"""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3

from engine_finetune import describe, evaluate, report, train_one_epoch
from models import build_classifier, choose_size
from models_vit import POOLS, SIZES, make_linear_probe
from util.arguments import (
    Parser,
    add_data_args,
    add_encoder_args,
    add_memory_args,
    add_optim_args,
    add_precision_args,
    add_run_args,
    check_batch_args,
    check_data_args,
    check_sharding_args,
    check_warmup,
    natural_float,
    positive_int,
    schedule_settings,
    share,
)
from util.compute.batch_size import micro_steps
from util.compute.compiling import compile_model
from util.compute.distributed import data_parallel, is_main_process
from util.compute.precision import Precision, blank_images
from util.compute.recompute import set_memory
from util.compute.sharding import shard, unsharded
from util.data.broken_images import BrokenImages
from util.data.classes import check_classes
from util.data.datasets import default_dataset, open_heldout, open_pair
from util.data.loaders import build_loaders, build_own_eval_loader
from util.data.transforms import default_crop_share, eval_transform, finetune_transform
from util.errors import InputError, value_errors_are_input_errors
from util.optim import build_layer_decay_adamw
from util.runs.checkpoint import Progress, TrainState
from util.runs.meters import EpochMeters
from util.runs.resume import EFFECTIVE_BATCH, newest_good_checkpoint
from util.runs.run import describe_classifier, log_settings, open_run, run_main, start_run
from util.schedule import lr_schedule, scaled_lr
from util.weights.encoder import input_format, load_encoder, read_encoder

MEMORY_ADVICE = "lower --batch_size and raise --accum_iter, or use --memory medium or low"

_logger = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """What Table 11 and the authors' commands make depend on the model's size."""

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
WARMUP_EPOCHS = 5  # and at most a tenth of the run
AUGMENTATION = (
    *("auto_augment", "color_jitter", "reprob", "remode", "recount"),
    *("mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_mode", "smoothing"),
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; defaults are the paper's (Table 11)."""
    parser = Parser(
        prog="main_finetune.py",
        description="Fine-tune an encoder, train one from scratch, or evaluate a classifier.",
    )
    add_run_args(parser, output_dir="output/finetune", save_every=1)
    add_data_args(parser, input_size=None)
    add_encoder_args(parser, models=[f"vit_{size}" for size in SIZES], pools=POOLS, pool="avg")
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

    group = parser.add_argument_group("fine-tuning")
    group.add_argument(
        "--layer_decay", type=share, help="of the learning rate, per layer (by the model's size)"
    )
    group.add_argument(
        "--drop_path", type=share, help="of the last block, rising from 0 (by the model's size)"
    )
    group.add_argument(
        "--ema",
        type=share,
        metavar="DECAY",
        help="keep a moving average of the weights, such as 0.9999, and evaluate that (off)",
    )
    group.add_argument(
        "--eval", action="store_true", help="evaluate --finetune's or OUTPUT_DIR's classifier only"
    )

    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--auto_augment",
        "--aa",
        default="rand-m9-mstd0.5-inc1",
        help="in timm's language, none for none (%(default)s)",
    )
    group.add_argument(
        "--color_jitter", type=natural_float, help="strength, without --auto_augment (off)"
    )
    group.add_argument(
        "--reprob", type=share, default=0.25, help="share of images erased in part (%(default)s)"
    )
    group.add_argument(
        "--remode",
        choices=("const", "rand", "pixel"),
        default="pixel",
        help="what erased pixels become (%(default)s)",
    )
    group.add_argument(
        "--recount", type=positive_int, default=1, help="most erased regions (%(default)s)"
    )
    group.add_argument(
        "--mixup", type=natural_float, default=0.8, help="alpha, 0 for none (%(default)s)"
    )
    group.add_argument(
        "--cutmix", type=natural_float, default=1.0, help="alpha, 0 for none (%(default)s)"
    )
    group.add_argument(
        "--mixup_prob", type=share, default=1.0, help="share of batches mixed (%(default)s)"
    )
    group.add_argument(
        "--mixup_switch_prob",
        type=share,
        default=0.5,
        help="share of those that are cut (%(default)s)",
    )
    group.add_argument(
        "--mixup_mode",
        choices=("batch", "pair", "elem"),
        default="batch",
        help="what shares one mixing ratio (%(default)s)",
    )
    group.add_argument(
        "--smoothing", type=share, default=0.1, help="of labels over all classes (%(default)s)"
    )
    args = parser.parse_args(argv)
    check_data_args(args)
    check_batch_args(args)
    check_sharding_args(args)
    if args.fsdp and args.ema is not None:
        raise InputError("--ema does not go with --fsdp: leave one of them out")
    if args.smoothing == 1:
        raise InputError("--smoothing 1 would leave nothing of the labels: lower it")
    if args.ema == 1:
        raise InputError("--ema 1 would never take in what is trained: lower it")
    if args.drop_path == 1:
        raise InputError("--drop_path 1 would leave nothing of the last block: lower it")
    return args


def resolve_recipe(args: argparse.Namespace, size: str) -> Recipe:
    """The recipe of a size, with what the command line gives instead."""
    given = {name: getattr(args, name) for name in Recipe._fields}
    return RECIPES[size]._replace(**{n: v for n, v in given.items() if v is not None})


def find_classifier(args: argparse.Namespace) -> str | Path:
    """The file that --eval is about.

    Raises:
        InputError: there is none, or there are two.
    """
    resumed = None if args.resume in ("auto", "none") else args.resume
    if args.finetune and resumed:
        raise InputError("--eval takes one classifier: leave --finetune or --resume out")
    if args.finetune or resumed:
        return args.finetune or resumed
    path = newest_good_checkpoint(Path(args.output_dir), "finetune")
    if path is None:
        raise InputError(
            f"--eval found no checkpoint in {args.output_dir}: name a fine-tuned one by --finetune"
        )
    return path


def evaluate_only(args: argparse.Namespace, device: torch.device) -> None:
    """Measure a fine-tuned classifier on the held-out images; nothing is written.

    Raises:
        InputError: the file holds no classifier, or it does not go with the images.
    """
    path = find_classifier(args)
    weights = read_encoder(path)
    if weights.num_classes is None:
        raise InputError(f"{path} has no head to evaluate: fine-tune it first, without --eval")
    if args.num_classes not in (None, weights.num_classes):
        raise InputError(
            f"{path} has a head of {weights.num_classes} classes: correct --num_classes "
            f"{args.num_classes}, or leave it out"
        )
    with value_errors_are_input_errors(f"{path} cannot be evaluated"):
        size = choose_size(args.model, weights.shape)
    img_size, mean, std = input_format(
        weights,
        img_size=args.input_size,
        mean=args.mean,
        std=args.std,
        default_size=SIZES[size].img_size,
    )
    crop_share = args.crop_share or weights.crop_share or default_crop_share(img_size)
    transform = eval_transform(img_size, mean, std, crop_share)
    dataset = default_dataset(args.dataset, args.data_path, args.val_path)
    val_set = open_heldout(
        dataset, args.data_path, val_path=args.val_path, transform=transform, seed=args.seed
    )
    if val_set is None:
        raise InputError(f"{dataset} has no held-out images to evaluate: name some by --val_path")
    num_classes = check_classes(None, val_set, weights.num_classes, weights.classes)
    model = build_classifier(
        size, img_size=img_size, num_classes=num_classes, pool=args.pool or weights.pool
    )
    if weights.is_linear_probe:
        make_linear_probe(model, num_classes)
    load_encoder(model, weights, head=True)
    model.to(device)
    precision = Precision(args.amp, device, attention_backend=args.attention_backend)
    precision.check_attention_backend(model, blank_images(img_size, device))
    stats = evaluate(
        model,
        build_own_eval_loader(
            val_set,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            device=device,
        ),
        device=device,
        precision=precision,
        broken=BrokenImages(len(val_set), args.max_broken),
    )
    _logger.info("%s: %s", path, describe(stats))


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """timm's mixup and CutMix; None if both are off."""
    if not (args.mixup or args.cutmix) or not args.mixup_prob:
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=0.0,  # cross-entropy smooths
        num_classes=num_classes,
    )


def run_settings(
    args: argparse.Namespace,
    recipe: Recipe,
    *,
    common: dict[str, object],
    batch_size: int,
    lr: float,
    warmup_epochs: float,
    amp: str,
) -> tuple[dict, dict]:
    """What makes a run the run it is, and what may change when it is continued."""
    identity = {
        **common,
        "--layer_decay": recipe.layer_decay,
        "--drop_path": recipe.drop_path,
        "--weight_decay": args.weight_decay,
        **{f"--{name}": getattr(args, name) for name in AUGMENTATION},
        "--ema": args.ema,
        "--seed": args.seed,
        EFFECTIVE_BATCH: batch_size,
    }
    may_change = schedule_settings(
        args, epochs=recipe.epochs, warmup_epochs=warmup_epochs, lr=lr, amp=amp
    )
    if args.fsdp:
        may_change["--fsdp"] = True
    return identity, may_change


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune from the start, or from where the last start was stopped."""
    args = parse_args(argv)
    device = start_run(device=args.device, seed=args.seed, timeout_minutes=args.timeout_minutes)
    if args.eval:
        evaluate_only(args, device)
        return
    output_dir = Path(args.output_dir)
    log_dir = Path(args.log_dir or output_dir / "tensorboard")

    weights = read_encoder(args.finetune) if args.finetune else None
    with value_errors_are_input_errors("--finetune cannot be loaded"):
        size = choose_size(args.model, weights and weights.shape)
    recipe = resolve_recipe(args, size)
    img_size, mean, std = input_format(
        weights,
        img_size=args.input_size,
        mean=args.mean,
        std=args.std,
        default_size=SIZES[size].img_size,
    )

    dataset = default_dataset(args.dataset, args.data_path, args.val_path)
    crop_share = args.crop_share or default_crop_share(img_size)
    transforms = (
        finetune_transform(
            img_size,
            mean,
            std,
            auto_augment=None if args.auto_augment == "none" else args.auto_augment,
            color_jitter=args.color_jitter,
            erase_prob=args.reprob,
            erase_mode=args.remode,
            erase_count=args.recount,
        ),
        eval_transform(img_size, mean, std, crop_share),
    )
    train_set, val_set = open_pair(
        dataset,
        args.data_path,
        val_path=args.val_path,
        transforms=transforms,
        seed=args.seed,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
    )
    num_classes = check_classes(train_set, val_set, args.num_classes)
    loader, val_loader = build_loaders(
        train_set,
        val_set,
        name=dataset,
        batch_size=args.batch_size,
        accum_iter=micro_steps(args.batch_size, args.accum_iter, args.effective_batch_size),
        seed=args.seed,
        num_workers=args.num_workers,
        device=device,
    )
    num_images, num_steps = loader.sampler.num_samples, loader.steps_per_epoch

    pool = args.pool or "avg"
    options = {
        "img_size": list(img_size),
        "num_classes": num_classes,
        "pool": pool,
        "drop_path": recipe.drop_path,
    }
    model = build_classifier(size, **options)
    set_memory(model.blocks, None, args.memory)
    if weights is not None:
        load_encoder(model, weights, head=False)
    if args.fsdp:
        shard(model, model.blocks, device)
    else:
        model.to(device)

    batch_size = loader.effective_batch_size
    lr = args.lr or scaled_lr(recipe.blr, batch_size)
    warmup_epochs = (
        min(WARMUP_EPOCHS, recipe.epochs / 10) if args.warmup_epochs is None else args.warmup_epochs
    )
    check_warmup(warmup_epochs, recipe.epochs)
    lr_at = lr_schedule(
        lr=lr,
        min_lr=args.min_lr,
        warmup_epochs=warmup_epochs,
        epochs=recipe.epochs,
        steps_per_epoch=num_steps,
    )
    precision = Precision(
        args.amp, device, clip_grad=args.clip_grad, attention_backend=args.attention_backend
    )
    precision.check_attention_backend(model, blank_images(img_size, device), args.batch_size)
    ema = None if args.ema is None else ModelEmaV3(model, decay=args.ema)
    compile_model(model, args.compile, device=device)

    # Where the run goes on, and whether it is still the same run.
    state = TrainState(
        model=model,
        optimizer=build_layer_decay_adamw(
            model,
            weight_decay=args.weight_decay,
            layer_decay=recipe.layer_decay,
            betas=(0.9, 0.999),
        ),
        precision=precision,
        progress=Progress(),
        meters=EpochMeters(device),
        broken=BrokenImages(num_images, args.max_broken),
        ema=ema,
    )
    progress = state.progress
    common, header = describe_classifier(
        f"vit_{size}",
        options,
        weights=weights,
        train_set=train_set,
        dataset=dataset,
        mean=mean,
        std=std,
        crop_share=crop_share,
    )
    identity, may_change = run_settings(
        args,
        recipe,
        common=common,
        batch_size=batch_size,
        lr=lr,
        warmup_epochs=warmup_epochs,
        amp=precision.amp,
    )
    log_settings({**identity, **may_change})
    checkpoints, run_log = open_run(
        state,
        loader,
        kind="finetune",
        output_dir=output_dir,
        log_dir=log_dir,
        resume=args.resume,
        identity=identity,
        recipe=may_change,
        header=header,
        args=vars(args),
        every_minutes=args.save_every_minutes,
        keep_last=args.keep_last,
    )

    parallel_model = data_parallel(model, device)
    mixup = build_mixup(args, num_classes)
    while progress.epoch < recipe.epochs:
        stats = train_one_epoch(
            parallel_model,
            loader,
            state,
            mixup=mixup,
            smoothing=args.smoothing,
            num_classes=num_classes,
            seed=args.seed,
            device=device,
            lr_at=lr_at,
            log_every=args.log_every,
            run_log=run_log,
            checkpoints=checkpoints,
        )
        if val_loader:
            with unsharded(model, partial(build_classifier, size, **options)) as whole:
                stats |= evaluate(
                    whole if ema is None else ema.module,
                    val_loader,
                    device=device,
                    precision=precision,
                    broken=BrokenImages(len(val_set), args.max_broken),
                )
        run_log.end_epoch(stats, epoch=progress.epoch, step=progress.step)
        checkpoints.save_if_best(stats, by="val_top1")
        if progress.epoch == recipe.epochs or progress.epoch % args.save_every == 0:
            checkpoints.save()
        else:
            checkpoints.save_if_due()

    run_log.close()
    if is_main_process():
        report(output_dir, "fine-tuning" if weights else "training from scratch")


if __name__ == "__main__":
    run_main(main, trains=True, memory_advice=MEMORY_ADVICE)
