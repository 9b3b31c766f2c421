"""Fine-tune an encoder for semantic segmentation (App. B, Table 17), or evaluate the result.

python main_segmentation.py --finetune PRETRAINED --data_path DATA
torchrun --standalone --nproc_per_node 8 main_segmentation.py --finetune PRETRAINED \
    --dataset ade20k --data_path ADEChallengeData2016 --head upernet --batch_size 2
python main_segmentation.py --eval --finetune SEGMENTATION_CHECKPOINT --data_path DATA
"""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

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
from util.settings.evaluation import WindowSettings, add_window_args
from util.settings.model import EncoderSettings, HeadSettings, add_encoder_args, add_head_args
from util.settings.optim import (
    FineTuneSettings,
    IterationSettings,
    add_finetune_args,
    add_iteration_args,
)
from util.settings.run import RunSettings, add_run_args
from util.settings.segmentation import TRAINED, SegmentationSettings, add_segmentation_data_args

SETTINGS = (RunSettings, SegmentationSettings, IterationSettings, ComputeSettings)
SETTINGS += (EncoderSettings, HeadSettings, WindowSettings, FineTuneSettings)
OF_THE_CHECKPOINT = {"--mean", "--std", "--channels", "--value_range"}
OF_THE_CHECKPOINT |= {f"--{field.name}" for field in fields(HeadSettings)}
WARMUP_ITERS = 1500
FIRST_FLAGS = ("--finetune", "--data_path", "--output_dir", "--head", "--crop_size")
FIRST_FLAGS += ("--batch_size", "--max_iters", "--lr", "--eval", "--device")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; defaults are MAE's for ADE20K, except for the head."""
    parser = Parser(
        prog="main_segmentation.py",
        usage="main_segmentation.py --finetune WEIGHTS --data_path FOLDER [flags]",
        first=FIRST_FLAGS,
        description="Fine-tune an encoder for semantic segmentation, or evaluate the result.",
    )
    add_encoder_args(parser, pool=None)
    add_segmentation_data_args(parser)
    add_head_args(parser)
    add_window_args(parser)
    add_iteration_args(
        parser,
        batch_size=16,
        max_iters=160_000,
        warmup_iters=WARMUP_ITERS,
        lr=1e-4,
        weight_decay=0.05,
    )
    add_run_args(parser, output_dir="output/segmentation", save_every=1)
    add_precision_args(parser)
    add_memory_args(parser, fsdp=False)
    group = add_finetune_args(parser, layer_decay=0.65, drop_path=0.1)
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
        help="with --eval, a new file for the results",
    )
    args = parser.parse_args(argv)
    for settings in SETTINGS:
        take(settings, args)
    ignored = sorted(given_options(args, parser.parse_args([])) & OF_THE_CHECKPOINT)
    if args.eval and ignored:
        raise InputError(f"--eval takes {', '.join(ignored)} from the checkpoint: leave it out")
    if args.dump_json and not args.eval:
        raise InputError("--dump_json needs --eval: a run writes segmentation.json to OUTPUT_DIR")
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch
import torch.nn as nn

from engine_segmentation import blank_loss, evaluate, show, train_one_epoch
from models import build_segmenter, load_segmenter, starting_point
from util.compute.batch_size import plan_batches
from util.compute.compiling import compile_model
from util.compute.distributed import data_parallel, is_main_process, world_size
from util.compute.memory import check_step, foresee_step
from util.compute.precision import blank_images, blank_pairs
from util.compute.setup import place_model
from util.data.batch import Normalization
from util.data.broken_images import BrokenImages
from util.data.images import names_hash
from util.data.loaders import build_eval_loader, build_iteration_loader
from util.data.report import report_images
from util.data.segmentation import label_rule, open_classes, open_segmentation, open_validation
from util.eval.display import choose_display
from util.eval.miou import Windows, describe
from util.optim import build_ema, build_layer_decay_adamw
from util.runs.checkpoint import Best, TrainState
from util.runs.files import write_json
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
from util.schedule import linear_lr, plan_learning_rate
from util.weights.encoder import load_encoder
from util.weights.files import unknown_content, write_new

BEST = Best("val_miou")
MEMORY_ADVICE = (
    "use a lower --batch_size with the same --effective_batch_size, or --memory medium or low; in "
    "an evaluation, a lower --window_batch"
)

_logger = logging.getLogger(__name__)


def evaluate_only(
    path: str | Path,
    data: SegmentationSettings,
    compute: ComputeSettings,
    window: WindowSettings,
    device: torch.device,
) -> dict[str, object]:
    """Measure a segmentation model on the validation images; return the results as plain values.

    Raises:
        InputError: the file does not hold such a model, or not one for these images.
    """
    model, content = load_segmenter(path)
    with unknown_content(path):
        data, trained_classes = data.as_trained(content), content["classes"]
    classes = open_classes(data, trained_classes)
    labels = ", ".join(f"--{name} {getattr(data.layout, name)}" for name in TRAINED)
    _logger.info("images and masks are read with %s", labels)
    pixels = data.pixels.or_those_of(content["pixels"])
    normalization = Normalization(tuple(content["mean"]), tuple(content["std"]), pixels.value_range)
    rule = label_rule(data, classes)
    val_set = open_validation(data, rule, normalization=normalization, pixels=pixels)
    report_images(None, val_set, classes)
    example = blank_images(model.img_size, device, in_chans=model.in_chans)
    precision = place_model(model, compute, device, example)
    windows = Windows.of(window, model.img_size, model.patch_size)
    sizes = {"batch_size": 1, "num_workers": data.num_workers}
    scores = evaluate(
        model,
        build_eval_loader(val_set, **sizes, device=device),
        classes=classes,
        windows=windows,
        precision=precision,
        broken=BrokenImages(len(val_set), data.max_broken),
    )
    log_lines(f"IoU and accuracy of each class:\n{scores.table(classes)}")
    _logger.info("%s: %s", path, describe(scores.stats()))
    return {"checkpoint": str(path), "windows": asdict(windows), **scores.as_json(classes)}


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune from the beginning, or continue a stopped run."""
    args = parse_args(argv)
    run, data, iterations, compute, encoder, head, window, tuning = (
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
        path = checkpoint_to_evaluate(run, encoder.finetune, "segmentation")
        results = evaluate_only(path, data, compute, window, device)
        if args.dump_json and is_main_process():
            write = partial(write_json, content=results)
            write_new(args.dump_json, write, flag="--dump_json")
        return

    # The weights determine the size of the encoder and the normalization.
    given = {"img_size": head.crop, "mean": data.mean, "std": data.std, "pixels": data.pixels}
    start, origin = start_or_continue(
        starting_point, encoder.finetune, run, "segmentation", model=encoder.model, **given
    )
    pixels = start.pixels
    if data.photometric is None and not pixels.is_rgb8:
        _logger.info("--photometric is off: it changes colors, which needs 8-bit RGB images")
    data = data.read_as(pixels)
    choose_display(pixels.num_channels, data.show_channels)  # before it draws the first picture
    mean, std = start.told_colors
    colors = {"mean": mean, "std": std, "pixels": pixels}
    colors["earlier"] = partial(colors_of_run, run, "segmentation")
    images = open_segmentation(data, crop_size=head.crop, **colors, seed=run.seed)
    mean, std = images.train.normalization.colors
    start = start._replace(mean=mean, std=std)
    found = report_images(images.train, images.val, images.classes)
    optim = iterations.optim(warmup_iters=WARMUP_ITERS)
    batches = plan_batches(optim)
    head.check_batch_size(batches.batch_size * (world_size() if device.type == "cuda" else 1))
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
    options = head.options(
        num_classes=len(images.classes), drop_path=tuning.drop_path, **pixels.model_options
    )
    model = build_segmenter(start.size, **options)
    if start.weights is not None:
        load_encoder(model, start.weights, head=False)
    if device.type == "cuda" and world_size() > 1:  # does not exist on CPUs
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    example = blank_pairs(head.crop, device, in_chans=pixels.num_channels)
    precision = place_model(model, compute, device, example, optim)
    step = foresee_step(
        model,
        example,
        precision,
        mode=compute.memory,
        batch_size=batches.batch_size,
        forward=partial(blank_loss, model, head.auxiliary),
        has_average=tuning.ema is not None,
    )
    memory = check_step(step, *batches)
    ema = build_ema(model, tuning.ema, iterations.max_iters)
    compile_model(model, compute.compile, device=device)

    # How it is trained
    lr = plan_learning_rate(optim, loader, curve=linear_lr)
    optimizer = build_layer_decay_adamw(
        model, weight_decay=optim.weight_decay, layer_decay=tuning.layer_decay, betas=(0.9, 0.999)
    )
    broken = BrokenImages(len(images.train), data.max_broken)
    state = TrainState(model, optimizer, precision, broken, ema=ema)

    # Settings that must match on resume, and settings that may change
    name = f"vit_{start.size}"
    fixed = {
        "--model": name,
        WEIGHTS_HASH: origin.digest,
        **head.recipe(options),
        **pixels.recipe,
        "--mean": start.mean,
        "--std": start.std,
        "--dataset": data.dataset,
        "hash of the names of classes": names_hash(images.classes),
        **images.train.identity(),
        **data.recipe(),
        "--layer_decay": tuning.layer_decay,
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
        **{name: getattr(data.layout, name) for name in TRAINED},
    }
    length = (MAX_ITERS, iterations.steps_per_epoch)
    given = given_options(args, parse_args([])) | {EMA_DECAY}
    record = RunRecord(
        "segmentation",
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
    windows = Windows.of(window, model.img_size, model.patch_size)
    how = {"classes": images.classes, "windows": windows, "precision": precision}
    with open_run(state, loader, run, record) as (checkpoints, run_log):
        progress, parallel_model = state.progress, data_parallel(model, device)
        while progress.epoch < optim.epochs:
            stats = train_one_epoch(
                parallel_model,
                loader,
                state,
                aux_weight=head.auxiliary,
                seed=run.seed,
                device=device,
                lr_at=lr.at,
                log_every=run.log_every,
                run_log=run_log,
                checkpoints=checkpoints,
            )
            if val_loader is not None:  # one without images is false
                measured = model if ema is None else ema.module
                val_broken = BrokenImages(len(images.val), data.max_broken)
                scores = evaluate(measured, val_loader, broken=val_broken, **how)
                stats |= scores.stats()
                show(scores, measured, images.val, run_log, step=progress.step, **how)
                if progress.epoch == optim.epochs:
                    log_lines(f"IoU and accuracy of each class:\n{scores.table(images.classes)}")
            run_log.end_epoch(stats, epoch=progress.epoch, step=progress.step)
            checkpoints.save_if_best(stats, by=BEST)
            checkpoints.end_epoch(is_last=progress.epoch == optim.epochs)

    if is_main_process():
        title = "fine-tuning" if origin.digest else "training from scratch"
        how = {"by": BEST.metric, "describe": describe, "in_steps": True}
        report(run.folder, title, progress, **how)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
