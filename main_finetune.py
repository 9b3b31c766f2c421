"""Fine-tune an encoder on labels, train one from scratch, or evaluate a classifier.

python main_finetune.py --finetune PRETRAINED --data_path IMAGES
python main_finetune.py --finetune PRETRAINED --data_csv TABLE --task multilabel
torchrun --standalone --nproc_per_node 8 main_finetune.py --finetune PRETRAINED --data_path IMAGES
python main_finetune.py --eval --finetune FINETUNED --data_path IMAGES
"""

import argparse
import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
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
from util.settings.data import DataSettings, add_data_args
from util.settings.evaluation import TaskSettings, add_task_args
from util.settings.model import EncoderSettings, add_encoder_args
from util.settings.optim import FineTuneSettings, OptimSettings, add_finetune_args, add_optim_args
from util.settings.run import RunSettings, add_run_args
from util.settings.views import (
    LABELED_VIEW,
    AugmentSettings,
    MixSettings,
    ViewSettings,
    add_augmentation_args,
    add_mix_args,
    add_view_args,
)

SETTINGS = (RunSettings, DataSettings, OptimSettings, ComputeSettings)
SETTINGS += (EncoderSettings, TaskSettings, FineTuneSettings)
SETTINGS += (ViewSettings, AugmentSettings, MixSettings)
WARMUP_EPOCHS = 5  # at most a tenth of the run
FIRST_FLAGS = ("--finetune", "--data_path", "--val_path", "--data_csv", "--output_dir")
FIRST_FLAGS += ("--batch_size", "--epochs", "--lr", "--eval", "--device")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; defaults are the paper's (Table 11)."""
    parser = Parser(
        prog="main_finetune.py",
        usage="main_finetune.py --finetune WEIGHTS --data_path IMAGES [flags]",
        first=FIRST_FLAGS,
        description="Fine-tune an encoder, train one from scratch, or evaluate a classifier.",
    )
    add_encoder_args(parser, pool="avg")
    add_data_args(parser, input_size=None)
    add_task_args(parser)
    add_optim_args(
        parser,
        batch_size=128,
        epochs=None,
        blr=None,
        weight_decay=0.05,
        warmup_epochs=f"{WARMUP_EPOCHS}, at most EPOCHS / 10",
        min_lr=1e-6,
    )
    add_run_args(parser, output_dir="output/finetune", save_every=1)
    add_precision_args(parser)
    add_memory_args(parser)
    group = add_finetune_args(parser)
    group.add_argument(
        "--keep_head",
        action="store_true",
        help="train on from the head of --finetune, a classifier of the same classes (a new head)",
    )
    add_view_args(parser, crop_area=LABELED_VIEW.crop_area)
    add_augmentation_args(parser)
    add_mix_args(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval",
        action="store_true",
        help="only evaluate the classifier of --finetune or --resume, else the newest in "
        "OUTPUT_DIR (off)",
    )
    group.add_argument(
        "--only_these_classes",
        action="store_true",
        help="with --eval, if the images have only some of the classifier's classes: leave its "
        "other outputs out (all compete)",
    )
    group.add_argument(
        "--dump_json",
        type=Path,
        metavar="FILE",
        help="with --eval, a new file for the results",
    )
    args = parser.parse_args(argv)
    if args.task == "regression" and args.num_classes not in (None, 1):
        raise InputError("--task regression has one output: leave --num_classes out")
    if args.task != "classification":
        turn_off_mixing(args, given_options(args, parser.parse_args([])))
    for settings in SETTINGS:
        take(settings, args)
    if args.fsdp and args.ema is not None:
        raise InputError("--ema cannot be combined with --fsdp: leave one of them out")
    for name in ("only_these_classes", "dump_json"):
        if getattr(args, name) and not args.eval:
            raise InputError(f"--{name} needs --eval: leave it out")
    if args.eval and args.keep_head:
        raise InputError("--eval always takes the head of the file: leave --keep_head out")
    return args


def turn_off_mixing(args: argparse.Namespace, given: Collection[str]) -> None:
    """Turn off what mixes and smooths classes, for other tasks.

    Raises:
        InputError: one of these is among the given options.
    """
    for name in ("mixup", "cutmix", "smoothing"):
        if f"--{name}" in given and getattr(args, name):
            raise InputError(f"--{name} is for --task classification: leave it out")
        setattr(args, name, 0.0)


def turn_off_color_changes(args: argparse.Namespace, given: Collection[str]) -> None:
    """Turn off the augmentation that needs 8-bit RGB, for other images.

    Raises:
        InputError: it is among the given options.
    """
    for name, off in (("auto_augment", "none"), ("color_jitter", None)):
        if f"--{name}" in given and getattr(args, name) not in (off, 0):
            raise InputError(
                f"--{name} changes colors, which needs 8-bit RGB images, not those of --channels "
                "or --value_range: leave it out"
            )
        setattr(args, name, off)


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch

from engine_finetune import describe_classifier, evaluate, show, train_one_epoch
from models import build_classifier, load_classifier, starting_point
from models_vit import fold_probe, keep_outputs, rescale_head
from util.compute.batch_size import plan_batches
from util.compute.compiling import compile_model
from util.compute.distributed import data_parallel, is_main_process
from util.compute.memory import check_step, foresee_step
from util.compute.precision import blank_images
from util.compute.setup import place_model
from util.compute.sharding import unsharded
from util.data.broken_images import BrokenImages
from util.data.classes import (
    check_classes,
    check_output_order,
    imagenet_classes,
    match_classes,
)
from util.data.colors import choose_colors, compare_colors
from util.data.datasets import open_train_val, open_val
from util.data.loaders import build_eval_loader, build_loaders
from util.data.mixing import build_mixup
from util.data.report import report_images
from util.data.transforms import default_crop_pct, eval_transform, finetune_transform
from util.eval.tasks import Classification, Multilabel, Regression, Task, build_task, describe
from util.optim import build_ema, build_layer_decay_adamw
from util.runs.checkpoint import Best, TrainState
from util.runs.files import write_json
from util.runs.report import report
from util.runs.resume import (
    CONTENT,
    EFFECTIVE_BATCH,
    EMA_DECAY,
    RunRecord,
    changeable_settings,
    checkpoint_to_evaluate,
    colors_of_run,
    open_run,
    start_or_continue,
)
from util.runs.run import log_lines, run_main, start_run
from util.runs.start import describe_encoder, describe_images, log_start
from util.schedule import plan_learning_rate
from util.weights.encoder import EncoderWeights, load_encoder
from util.weights.files import write_new

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
    "micro_patch4": SMALL_RECIPE,
    "tiny_patch4": SMALL_RECIPE,
    "tiny_patch16": SMALL_RECIPE,
    "small_patch16": SMALL_RECIPE,
    "base_patch16": SMALL_RECIPE,
    "large_patch16": Recipe(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2),
    "huge_patch14": HUGE_RECIPE,
    "giant_patch14": HUGE_RECIPE,  # the paper has no ViT-g
}


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
    *,
    task: str,
    only_these_classes: bool,
) -> dict[str, object]:
    """Measure a classifier or regressor on the validation images; return the results.

    Args:
        task: the user's choice, which has to be the head's.
        only_these_classes: leave out the outputs of classes that the images do not have.

    Raises:
        InputError: the file does not hold a classifier, or not one for these images.
    """
    model, start = load_classifier(path, encoder.model, pool=encoder.pool, **data.input_form)
    weights, data = start.weights, data.read_as(start.pixels)
    check_num_classes(path, weights, encoder.num_classes)
    crop_pct = data.crop_pct or weights.crop_pct or default_crop_pct(start.img_size)
    kind = weights.task or "classification"
    if task not in (kind, TaskSettings.task):
        raise InputError(f"{path} was trained for --task {kind}: leave --task {task} out")
    if only_these_classes and kind != "classification":
        raise InputError(f"--only_these_classes is not for --task {kind}: leave it out")
    reading = {"pixels": start.pixels, "tile": data.tile or weights.tile}
    transform = eval_transform(*start.input_format, crop_pct, **weights.resizing, **reading)
    names = weights.classes if kind == "multilabel" else None  # others are matched below
    val_set = open_val(data, transform, seed=run.seed, task=kind, classes=names)
    if val_set is None:
        source, flag = (data.data_csv, "--val_csv") if data.data_csv else (data.name, "--val_path")
        raise InputError(f"{source} has no validation images: name them by {flag}")
    report_images(None, val_set)
    choose_colors(val_set, start.mean, start.std, **reading)  # compares them with the images

    classes = weights.classes or imagenet_classes(val_set.classes, weights.num_classes)
    num_outputs, outputs = weights.num_classes, None
    if kind != "regression":
        outputs = match_classes(val_set, num_outputs, classes)
        if classes is None and data.dataset is None:
            check_output_order(path, val_set, data.name)
    if outputs is not None and len(outputs) < num_outputs:
        which = "only their outputs" if only_these_classes else "all outputs"
        found = (len(outputs), num_outputs, which)
        _logger.info("the images have %d of the head's %d classes: %s compete", *found)
    if outputs is not None and only_these_classes:
        keep_outputs(model, outputs)
        num_outputs, classes, outputs = len(outputs), val_set.classes, None
    trained_for = task_of(weights, num_outputs, outputs)
    example = blank_images(start.img_size, device, in_chans=start.pixels.num_channels)
    # Not sharded, because processes may have different numbers of images.
    precision = place_model(model, replace(compute, fsdp=False), device, example)
    sizes = {"batch_size": batch_size, "num_workers": data.num_workers}
    loader = build_eval_loader(val_set, **sizes, device=device)
    broken = BrokenImages(len(val_set), data.max_broken)
    scores = evaluate(model, loader, task=trained_for, precision=precision, broken=broken)
    if table := scores.table(classes):
        log_lines(table)
    _logger.info("%s: %s", path, describe(scores.stats()))
    return {"checkpoint": str(path), **scores.as_json(classes)}


def task_of(weights: EncoderWeights, num_outputs: int, outputs: Sequence[int] | None) -> Task:
    """Build what a trained head is measured by.

    Args:
        outputs: those of the labels; None if labels are outputs.
    """
    if weights.task == "regression":
        return Regression(weights.target_scale)
    if weights.task == "multilabel":
        return Multilabel(num_outputs)
    output_of = None if outputs is None else torch.tensor(outputs)
    return Classification(num_outputs, output_of=output_of)


def check_num_classes(path: str | Path, weights: EncoderWeights, given: int | None) -> None:
    """Raise InputError if the user gave another number of classes than a head has."""
    if given not in (None, weights.num_classes):
        raise InputError(
            f"{path} has a head of {weights.num_classes} classes: correct --num_classes {given} or "
            "leave it out"
        )


def head_to_keep(path: str, weights: EncoderWeights, task: str) -> EncoderWeights:
    """Return weights whose head training can go on from.

    Raises:
        InputError: there is none, or it was trained for another task.
    """
    if weights.num_classes is None:
        raise InputError(f"{path} has no head to keep: leave --keep_head out")
    trained_for = weights.task or "classification"
    if trained_for != task:
        raise InputError(
            f"the head of {path} was trained for --task {trained_for}, not {task}: change --task "
            "or leave --keep_head out"
        )
    return weights._replace(head_state=fold_probe(weights.head_state))


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune from the beginning, or continue a stopped run."""
    args = parse_args(argv)
    run, data, optim, compute, encoder, aim, tuning, view, augment, mix = (
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
        path = checkpoint_to_evaluate(run, encoder.finetune, "finetune")
        results = evaluate_only(
            path,
            run,
            data,
            compute,
            encoder,
            optim.batch_size,
            device,
            task=aim.task,
            only_these_classes=args.only_these_classes,
        )
        if args.dump_json and is_main_process():
            write = partial(write_json, content=results)
            write_new(args.dump_json, write, flag="--dump_json")
        return

    # The weights determine the input format, and their size the recipe.
    start, origin = start_or_continue(
        starting_point, encoder.finetune, run, "finetune", model=encoder.model, **data.input_form
    )
    weights, data = start.weights, data.read_as(start.pixels)
    if not start.pixels.is_rgb8:
        if augment.changes_colors:
            _logger.info("--auto_augment is off: it changes colors, which needs 8-bit RGB images")
        turn_off_color_changes(args, given_options(args, parse_args([])))
        augment = take(AugmentSettings, args)
    if encoder.keep_head:
        weights = head_to_keep(encoder.finetune, weights, aim.task)
    recipe = resolve_recipe(args, start.size)
    warmup_epochs = min(WARMUP_EPOCHS, recipe.epochs / 10)
    optim = optim.with_defaults(epochs=recipe.epochs, blr=recipe.blr, warmup_epochs=warmup_epochs)
    crop_pct = data.crop_pct or default_crop_pct(start.img_size)
    train_set, val_set = open_train_val(
        data, seed=run.seed, batch_size=optim.batch_size, task=aim.task
    )
    found = report_images(train_set, val_set)
    reading = {"pixels": start.pixels, "tile": data.tile}
    earlier = partial(colors_of_run, run, "finetune")
    mean, std = choose_colors(train_set, *start.told_colors, **reading, earlier=earlier)
    start = start._replace(mean=mean, std=std)
    train_set.transform = finetune_transform(*start.input_format, augment, view, **reading)
    if val_set is not None:
        compare_colors(val_set, mean, std, **reading)
        val_set.transform = eval_transform(*start.input_format, crop_pct, **reading)
    num_classes, classes = encoder.num_classes, None
    if encoder.keep_head:
        check_num_classes(encoder.finetune, weights, num_classes)
        num_classes = weights.num_classes
        classes = weights.classes or imagenet_classes(train_set.classes, num_classes)
    if aim.task == "regression":
        num_classes = 1
    else:
        num_classes = check_classes(train_set, val_set, num_classes, classes)
        if encoder.keep_head and classes is None and data.dataset is None:
            check_output_order(encoder.finetune, train_set, data.name)
    classes = classes or train_set.classes
    task = build_task(aim, train_set, num_classes, smoothing=mix.smoothing, device=device)
    if encoder.keep_head and isinstance(task, Regression):
        head_state = rescale_head(weights.head_state, weights.target_scale, task.scale)
        weights = weights._replace(head_state=head_state)
    batches = plan_batches(optim)
    loader, val_loader = build_loaders(
        train_set, val_set, data, batches, seed=run.seed, device=device
    )

    # The model
    pooling = weights.pooling if encoder.keep_head else {"pool": "avg"}
    if (layers := pooling.get("layers")) and max(layers) < weights.shape[2]:
        raise InputError(
            f"the head of {encoder.finetune} reads no features after block {max(layers)}, so later "
            "blocks would not be trained: leave --keep_head out"
        )
    options = {
        "img_size": list(start.img_size),
        "num_classes": task.num_outputs,
        **{name: value for name, value in pooling.items() if value is not None},
        **({"pool": encoder.pool} if encoder.pool else {}),
        "drop_path": recipe.drop_path,
        **start.pixels.model_options,
    }
    build = partial(build_classifier, start.size, **options)
    model = build()
    if weights is not None and not origin.is_gone:
        load_encoder(model, weights, head=encoder.keep_head)
    example = blank_images(start.img_size, device, in_chans=start.pixels.num_channels)
    precision = place_model(model, compute, device, example, optim)
    step = foresee_step(
        model,
        example,
        precision,
        mode=compute.memory,
        batch_size=batches.batch_size,
        has_average=tuning.ema is not None,
    )
    memory = check_step(step, *batches)
    ema = build_ema(model, tuning.ema, optim.epochs * loader.steps_per_epoch)
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
        start,
        origin.digest,
        options,
        train_set,
        dataset=data.name,
        crop_pct=crop_pct,
        tile=data.tile,
    )
    header |= {"task": aim.task, "classes": classes and list(classes)}
    if isinstance(task, Regression):
        header["target_scale"] = list(task.scale)
    fixed |= {
        "--task": aim.task,
        "--class_weights": aim.class_weights,
        "--keep_head": encoder.keep_head,
        "--layer_decay": recipe.layer_decay,
        "--drop_path": recipe.drop_path,
        "--weight_decay": optim.weight_decay,
        **view.recipe(),
        **{f"--{name}": value for name, value in {**vars(augment), **vars(mix)}.items()},
        "--ema": tuning.ema,
        "--seed": run.seed,
        EFFECTIVE_BATCH: loader.effective_batch_size,
    }
    computed = {"precision": precision, "fsdp": compute.fsdp, "ema": tuning.ema}
    may_change = changeable_settings(optim, data, lr=lr.peak, **computed)
    may_change |= {"--best_by": aim.best_by, CONTENT: train_set.content_hash()}
    given = given_options(args, parse_args([])) | {EMA_DECAY}
    record = RunRecord(
        "finetune",
        fixed,
        may_change,
        header,
        vars(args),
        given,
        data=found,
        evaluated_every=int(val_loader is not None),
    )
    log_start(
        run,
        optim,
        record,
        model=describe_encoder(start, encoder.finetune, model),
        images=describe_images(train_set, val_set),
        precision=precision,
        loader=loader,
        batches=batches,
        lr=lr,
        memory=memory,
    )
    with open_run(state, loader, run, record) as (checkpoints, run_log):
        progress, parallel_model = state.progress, data_parallel(model, device)
        mixup, best = build_mixup(mix, task.num_outputs), Best(*aim.best)
        while progress.epoch < optim.epochs:
            stats = train_one_epoch(
                parallel_model,
                loader,
                state,
                task=task,
                seed=run.seed,
                device=device,
                mixup=mixup,
                lr_at=lr.at,
                log_every=run.log_every,
                run_log=run_log,
                checkpoints=checkpoints,
            )
            if val_loader is not None:  # one without images is false
                measure = partial(evaluate, loader=val_loader, task=task, precision=precision)
                with unsharded(model, build) as full_model:
                    scores = measure(full_model, broken=BrokenImages(len(val_set), data.max_broken))
                if ema is not None:
                    raw = scores.stats()
                    stats |= {f"raw_{n}": value for n, value in raw.items() if n != "val_images"}
                    scores = measure(ema.module, broken=BrokenImages(len(val_set), data.max_broken))
                stats |= scores.stats()
                show(scores, classes, run_log, progress=progress)
                if progress.epoch == optim.epochs and (table := scores.table(classes)):
                    log_lines(table)
            run_log.end_epoch(stats, epoch=progress.epoch, step=progress.step)
            checkpoints.save_if_best(stats, by=best)
            checkpoints.end_epoch(is_last=progress.epoch == optim.epochs)

    if is_main_process():
        title = "fine-tuning" if origin.digest else "training from scratch"
        report(run.folder, title, progress, by=best.metric, describe=describe)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
