"""Fine-tune an encoder for object detection (Sec. 4.2, Table 2), or evaluate the result.

python main_detection.py --finetune PRETRAINED --data_path COCO --batch_size 8 \
    --effective_batch_size 64
torchrun --standalone --nproc_per_node 8 main_detection.py --finetune PRETRAINED \
    --data_path COCO --batch_size 8
python main_detection.py --eval --finetune DETECTION_CHECKPOINT --data_path COCO
"""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

from util.arguments import (
    Parser,
    check_arguments,
    check_new,
    check_output_folders,
    given_options,
    take,
)
from util.errors import InputError
from util.settings.compute import ComputeSettings, add_memory_args, add_precision_args
from util.settings.detection import DetectionSettings, add_detection_data_args
from util.settings.model import (
    DetectorSettings,
    EncoderSettings,
    add_detector_args,
    add_encoder_args,
)
from util.settings.optim import (
    FineTuneSettings,
    IterationSettings,
    add_finetune_args,
    add_iteration_args,
)
from util.settings.run import RunSettings, add_run_args

SETTINGS = (RunSettings, DetectionSettings, IterationSettings, ComputeSettings)
SETTINGS += (EncoderSettings, DetectorSettings, FineTuneSettings)
OF_THE_CHECKPOINT = {"--mean", "--std", "--channels", "--value_range"}
OF_THE_CHECKPOINT |= {f"--{field.name}" for field in fields(DetectorSettings)}
TURNED_OFF = {"--masks": "--no_masks", "--rel_pos": "--no_rel_pos"}
WARMUP_ITERS = 250
FIRST_FLAGS = ("--finetune", "--data_path", "--output_dir", "--input_size", "--window_size")
FIRST_FLAGS += ("--batch_size", "--epochs", "--lr", "--eval", "--device")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; defaults are ViTDet's for COCO."""
    parser = Parser(
        prog="main_detection.py",
        usage="main_detection.py --finetune WEIGHTS --data_path COCO [flags]",
        first=FIRST_FLAGS,
        description="Fine-tune an encoder for object detection and instance segmentation, or "
        "evaluate the result.",
    )
    add_encoder_args(parser, pool=None)
    add_detection_data_args(parser)
    add_detector_args(parser)
    add_iteration_args(
        parser,
        batch_size=64,
        max_iters=None,
        warmup_iters=WARMUP_ITERS,
        lr=1e-4,
        weight_decay=0.1,
    )
    add_run_args(parser, output_dir="output/detection", save_every=1)
    add_precision_args(parser, compile_modes=())
    add_memory_args(parser, fsdp=False)
    group = add_finetune_args(parser)
    group.add_argument(
        "--eval",
        action="store_true",
        help="only evaluate the model of --finetune or --resume, else the newest in OUTPUT_DIR "
        "(off)",
    )
    group.add_argument(
        "--dump_json",
        type=Path,
        metavar="FILE",
        help="with --eval, a new file for the detections in COCO's result format",
    )
    args = parser.parse_args(argv)
    for settings in SETTINGS:
        take(settings, args)
    given = given_options(args, parser.parse_args([])) & OF_THE_CHECKPOINT
    ignored = sorted(TURNED_OFF.get(flag, flag) for flag in given)
    if args.eval and ignored:
        it = "them" if len(ignored) > 1 else "it"
        raise InputError(f"--eval takes {', '.join(ignored)} from the checkpoint: leave {it} out")
    if args.dump_json and not args.eval:
        raise InputError("--dump_json needs --eval")
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch

from engine_detection import blank_losses, evaluate, show, train_one_epoch
from models import build_detector, load_detector, starting_point
from util.compute.batch_size import plan_batches
from util.compute.distributed import data_parallel, is_main_process, world_size
from util.compute.memory import check_step, foresee_step
from util.compute.precision import blank_images
from util.compute.setup import place_model
from util.data.broken_images import BrokenImages
from util.data.detection import check_classes, open_detection, open_validation
from util.data.images import names_hash
from util.data.loaders import build_eval_loader, build_iteration_loader
from util.data.report import report_images
from util.eval.coco_ap import describe
from util.eval.display import choose_display
from util.optim import build_ema, build_layer_decay_adamw
from util.progress import waiting
from util.runs.checkpoint import Best, TrainState
from util.runs.report import report
from util.runs.resume import (
    EFFECTIVE_BATCH,
    EMA_DECAY,
    MAX_ITERS,
    WEIGHTS_HASH,
    RunRecord,
    changeable_settings,
    checkpoint_to_evaluate,
    colors_of_run,
    open_run,
    start_or_continue,
)
from util.runs.run import log_lines, run_main, start_run
from util.runs.start import describe_encoder, describe_images, log_start
from util.schedule import plan_learning_rate, step_lr
from util.weights.encoder import load_encoder
from util.weights.files import unknown_content, write_new

BEST = Best("val_box_ap")
MEMORY_ADVICE = (
    "use a lower --batch_size with the same --effective_batch_size, or --memory medium or low"
)

_logger = logging.getLogger(__name__)


class Recipe(NamedTuple):
    """Hyperparameters that depend on the model's size (ViTDet)."""

    epochs: int
    layer_decay: float
    drop_path: float


SMALL_RECIPE = Recipe(epochs=100, layer_decay=0.7, drop_path=0.1)
LARGE_RECIPE = Recipe(epochs=100, layer_decay=0.8, drop_path=0.4)
HUGE_RECIPE = Recipe(epochs=75, layer_decay=0.9, drop_path=0.5)
RECIPES = {
    "large_patch16": LARGE_RECIPE,
    "huge_patch14": HUGE_RECIPE,
    "giant_patch14": HUGE_RECIPE,  # ViTDet has no ViT-g
}


def evaluate_only(
    path: str | Path,
    data: DetectionSettings,
    compute: ComputeSettings,
    device: torch.device,
) -> list[dict]:
    """Measure a detector on the validation images; return its detections in COCO's format.

    Raises:
        InputError: the file does not hold a detector, or not one for these images.
    """
    model, content = load_detector(path)
    with unknown_content(path):
        classes = tuple(content["classes"])
        colors = {"mean": content["mean"], "std": content["std"]}
        colors["pixels"] = data.pixels.or_those_of(content["pixels"])
    images = open_validation(data, side=model.input_size, masks=model.has_masks, **colors)
    if images is None:
        raise InputError("there are no validation images: give --val_ann and --val_images")
    report_images(None, images, classes)
    check_classes(images.file, classes, "the checkpoint's")
    example = blank_images((model.input_size,) * 2, device, in_chans=model.in_chans)
    precision = place_model(model, compute, device, example, forward=model.feature_map)
    sizes = {"batch_size": 1, "num_workers": data.num_workers}
    loader = build_eval_loader(images, **sizes, device=device)
    broken = BrokenImages(len(images), data.max_broken)
    scores, results = evaluate(model, loader, images, precision=precision, broken=broken)
    log_lines(f"AP of each class:\n{scores.table(classes)}")
    _logger.info("%s: %s", path, describe(scores.stats()))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune from the beginning, or continue a stopped run."""
    args = parse_args(argv)
    run, data, iterations, compute, encoder, detector, tuning = (
        take(settings, args) for settings in SETTINGS
    )
    device = start_run(
        device=run.device,
        seed=run.seed,
        timeout_minutes=run.timeout_minutes,
        num_threads=run.num_threads,
    )
    if args.eval:
        check_output_folders(args.dump_json)
        if args.dump_json:
            check_new(args.dump_json, flag="--dump_json")
        path = checkpoint_to_evaluate(run, encoder.finetune, "detection")
        results = evaluate_only(path, data, compute, device)
        if args.dump_json and is_main_process():
            text = json.dumps(results)
            write_new(args.dump_json, lambda file: file.write_text(text), flag="--dump_json")
        return

    # The weights determine the size of the encoder, its positions and the normalization.
    given = {"img_size": None, "mean": data.mean, "std": data.std, "pixels": data.pixels}
    start, origin = start_or_continue(
        starting_point, encoder.finetune, run, "detection", model=encoder.model, **given
    )
    recipe = RECIPES.get(start.size, SMALL_RECIPE)
    chosen = {n: v for n, v in vars(tuning).items() if n in Recipe._fields and v is not None}
    recipe = recipe._replace(**chosen)
    pixels = start.pixels
    choose_display(pixels.num_channels, data.show_channels)  # before it draws the first picture
    mean, std = start.told_colors
    images = open_detection(
        data,
        side=detector.input_size,
        masks=detector.masks,
        mean=mean,
        std=std,
        pixels=pixels,
        earlier=partial(colors_of_run, run, "detection"),
        seed=run.seed,
    )
    mean, std = images.train.normalization.colors
    start = start._replace(mean=mean, std=std)
    found = report_images(images.train, images.val, images.classes)
    batches = plan_batches(iterations)
    effective_batch_size = batches.batch_size * batches.accum_iter * world_size()
    iterations = iterations.with_passes(recipe.epochs, len(images.train), effective_batch_size)
    optim = iterations.optim(warmup_iters=WARMUP_ITERS)
    workers = {"num_workers": data.num_workers, "device": device}
    loader = build_iteration_loader(
        images.train,
        batches,
        steps_per_epoch=iterations.steps_per_epoch,
        seed=run.seed,
        **workers,
    )
    val_loader = None
    if images.val is not None:
        val_loader = build_eval_loader(images.val, batch_size=1, **workers)

    # The model
    options = detector.options(
        img_size=list(start.img_size),
        num_classes=len(images.classes),
        drop_path=recipe.drop_path,
        **pixels.model_options,
    )
    model = build_detector(start.size, **options)
    if start.weights is not None:
        load_encoder(model, start.weights, head=False)
    example = blank_images((detector.input_size,) * 2, device, in_chans=pixels.num_channels)
    precision = place_model(model, compute, device, example, optim, forward=model.feature_map)
    with waiting("a forward pass of one image, to foresee the memory of a step"):
        step = foresee_step(
            model,
            example,
            precision,
            mode=compute.memory,
            batch_size=1,  # whose heads take hundreds of MiB, and seconds on a CPU
            forward=partial(blank_losses, model),
            has_average=tuning.ema is not None,
            peak_in_heads=True,
        )
    memory = check_step(step, *batches)
    ema = build_ema(model, tuning.ema, iterations.max_iters)

    # How it is trained
    lr = plan_learning_rate(optim, loader, curve=step_lr)
    optimizer = build_layer_decay_adamw(
        model,
        weight_decay=optim.weight_decay,
        layer_decay=recipe.layer_decay,
        betas=(0.9, 0.999),
    )
    broken = BrokenImages(len(images.train), data.max_broken)
    state = TrainState(model, optimizer, precision, broken, ema=ema)

    # Settings that must match on resume, and settings that may change
    name = f"vit_{start.size}"
    fixed = {
        "--model": name,
        WEIGHTS_HASH: origin.digest,
        **detector.recipe(options),
        **pixels.recipe,
        "--mean": start.mean,
        "--std": start.std,
        "hash of the names of classes": names_hash(images.classes),
        **images.train.identity(),
        **data.recipe(),
        "--layer_decay": recipe.layer_decay,
        "--weight_decay": optim.weight_decay,
        "--ema": tuning.ema,
        "--eval_every": iterations.steps_per_epoch,
        "--seed": run.seed,
        EFFECTIVE_BATCH: loader.effective_batch_size,
    }
    may_change = changeable_settings(optim, data, lr=lr.peak, precision=precision, ema=tuning.ema)
    header = {
        "model_name": name,
        "model_options": options,
        "mean": start.mean,
        "std": start.std,
        **pixels.header,
        "classes": list(images.classes),
    }
    length = (MAX_ITERS, iterations.steps_per_epoch)
    given = given_options(args, parse_args([])) | {EMA_DECAY}
    record = RunRecord(
        "detection",
        fixed,
        may_change,
        header,
        vars(args),
        given,
        length,
        found,
        evaluated_every=int(val_loader is not None),
    )
    log_start(
        run,
        optim,
        record,
        model=describe_encoder(start, encoder.finetune, model),
        images=describe_images(images.train, images.val),
        precision=precision,
        loader=loader,
        batches=batches,
        lr=lr,
        memory=memory,
    )
    with open_run(state, loader, run, record) as (checkpoints, run_log):
        progress, parallel_model = state.progress, data_parallel(model, device)
        while progress.epoch < optim.epochs:
            stats = train_one_epoch(
                parallel_model,
                loader,
                state,
                seed=run.seed,
                device=device,
                lr_at=lr.at,
                log_every=run.log_every,
                run_log=run_log,
                checkpoints=checkpoints,
            )
            if val_loader is not None:  # one without images is false
                measured = model if ema is None else ema.module
                how = {"precision": precision}
                val_broken = BrokenImages(len(images.val), data.max_broken)
                scores, _ = evaluate(measured, val_loader, images.val, broken=val_broken, **how)
                stats |= scores.stats()
                show(scores, measured, images.val, run_log, step=progress.step, **how)
                if progress.epoch == optim.epochs:
                    log_lines(f"AP of each class:\n{scores.table(images.classes)}")
            run_log.end_epoch(stats, epoch=progress.epoch, step=progress.step)
            checkpoints.save_if_best(stats, by=BEST)
            checkpoints.end_epoch(is_last=progress.epoch == optim.epochs)

    if is_main_process():
        title = "fine-tuning" if origin.digest else "training from scratch"
        how = {"by": BEST.metric, "describe": describe, "in_steps": True}
        report(run.folder, title, progress, **how)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
