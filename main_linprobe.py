"""Train a linear classifier on frozen features (App. B.1), or an attentive one.

python main_linprobe.py --finetune PRETRAINED --data_path IMAGES
python main_linprobe.py --finetune PRETRAINED --data_path IMAGES --probe attentive
torchrun --standalone --nproc_per_node 8 main_linprobe.py --finetune PRETRAINED --data_path IMAGES
"""

import argparse
from collections.abc import Sequence
from functools import partial

from util.arguments import Parser, check_arguments, given_options, take
from util.settings.compute import ComputeSettings, add_precision_args
from util.settings.data import DataSettings, add_data_args
from util.settings.model import (
    EncoderSettings,
    ProbeSettings,
    add_encoder_args,
    add_probe_args,
)
from util.settings.optim import OptimSettings, add_optim_args
from util.settings.run import RunSettings, add_run_args
from util.settings.views import LABELED_VIEW, ViewSettings, add_view_args

SETTINGS = (RunSettings, DataSettings, OptimSettings, ComputeSettings, EncoderSettings)
SETTINGS += (ViewSettings, ProbeSettings)
FIRST_FLAGS = ("--finetune", "--data_path", "--val_path", "--output_dir", "--batch_size")
FIRST_FLAGS += ("--epochs", "--blr", "--pool", "--probe", "--device")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; defaults are MAE's, which the paper adopts."""
    parser = Parser(
        prog="main_linprobe.py",
        usage="main_linprobe.py --finetune WEIGHTS --data_path IMAGES [flags]",
        first=FIRST_FLAGS,
        description="Train a linear or an attentive classifier on frozen features.",
    )
    add_encoder_args(parser, pool="cls")
    add_probe_args(parser)
    add_data_args(parser, input_size=None)
    add_optim_args(
        parser,
        batch_size=512,
        epochs=90,
        blr=0.1,
        weight_decay=0.0,
        warmup_epochs="EPOCHS / 9",
    )
    add_run_args(parser, output_dir="output/linprobe", save_every=1)
    add_precision_args(parser)
    add_view_args(parser, crop_area=LABELED_VIEW.crop_area)
    args = parser.parse_args(argv)
    for group in SETTINGS:
        take(group, args)
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

from engine_finetune import describe_classifier, evaluate, show, train_one_epoch
from models import build_classifier, starting_point
from models_vit import make_probe
from util.compute.batch_size import plan_batches
from util.compute.compiling import compile_model
from util.compute.distributed import broadcast_buffers, data_parallel, is_main_process
from util.compute.memory import check_step, foresee_step
from util.compute.precision import blank_images
from util.compute.setup import place_model
from util.data.broken_images import BrokenImages
from util.data.classes import check_classes
from util.data.colors import choose_colors, compare_colors
from util.data.datasets import open_train_val
from util.data.loaders import build_loaders
from util.data.report import report_images
from util.data.transforms import default_crop_pct, eval_transform, probe_transform
from util.eval.tasks import Classification, describe
from util.optim import build_lars
from util.runs.checkpoint import Best, TrainState
from util.runs.report import report
from util.runs.resume import (
    CONTENT,
    EFFECTIVE_BATCH,
    RunRecord,
    changeable_settings,
    colors_of_run,
    open_run,
    start_or_continue,
)
from util.runs.run import log_lines, run_main, start_run
from util.runs.start import describe_encoder, describe_images, log_start
from util.schedule import plan_learning_rate
from util.weights.encoder import load_encoder

BEST = Best("val_top1")
WARMUP_FRACTION = 1 / 9  # of the epochs: 10 of 90
CROPS = "random crops"  # key in the settings that may change
MEMORY_ADVICE = "use a lower --batch_size with the same --effective_batch_size"


def main(argv: Sequence[str] | None = None) -> None:
    """Train a probe from the beginning, or continue a stopped run."""
    args = parse_args(argv)
    run, data, optim, compute, encoder, view, probe = (take(group, args) for group in SETTINGS)
    device = start_run(
        device=run.device,
        seed=run.seed,
        timeout_minutes=run.timeout_minutes,
        num_threads=run.num_threads,
    )

    # The weights determine the input format.
    start, origin = start_or_continue(
        starting_point, encoder.finetune, run, "linprobe", model=encoder.model, **data.input_form
    )
    data = data.read_as(start.pixels)
    train_set, val_set = open_train_val(data, seed=run.seed, batch_size=optim.batch_size)
    found = report_images(train_set, val_set)
    reading = {"pixels": start.pixels, "tile": data.tile}
    earlier = partial(colors_of_run, run, "linprobe")
    mean, std = choose_colors(train_set, *start.told_colors, **reading, earlier=earlier)
    start = start._replace(mean=mean, std=std)
    crop_pct = data.crop_pct or default_crop_pct(start.img_size)
    train_set.transform = probe_transform(*start.input_format, view, **reading)
    if val_set is not None:
        compare_colors(val_set, mean, std, **reading)
        val_set.transform = eval_transform(*start.input_format, crop_pct, **reading)
    num_classes = check_classes(train_set, val_set, encoder.num_classes)
    task = Classification(num_classes)
    batches = plan_batches(optim)
    loader, val_loader = build_loaders(
        train_set, val_set, data, batches, seed=run.seed, device=device
    )

    # The frozen encoder and its head
    options = {"img_size": list(start.img_size), "num_classes": num_classes, **probe.options}
    options |= start.pixels.model_options
    model = build_classifier(start.size, **options)
    if start.weights is not None and not origin.is_gone:
        load_encoder(model, start.weights, head=False)
    make_probe(model, num_classes)
    example = blank_images(start.img_size, device, in_chans=start.pixels.num_channels)
    precision = place_model(model, compute, device, example, optim)
    sizes = {"batch_size": batches.batch_size, "moments": 1}
    step = foresee_step(model, example, precision, mode=None, **sizes)
    memory = check_step(step, *batches)
    compile_model(model, compute.compile, device=device)

    # How it is trained
    optim = optim.with_defaults(warmup_epochs=optim.epochs * WARMUP_FRACTION)
    lr = plan_learning_rate(optim, loader)
    optimizer = build_lars(model, weight_decay=optim.weight_decay)
    broken = BrokenImages(loader.sampler.num_samples, data.max_broken)
    state = TrainState(model, optimizer, precision, broken)

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
    fixed |= {
        **view.recipe(),
        "--probe": probe.probe,
        "--weight_decay": optim.weight_decay,
        "--seed": run.seed,
        EFFECTIVE_BATCH: loader.effective_batch_size,
    }
    may_change = changeable_settings(optim, data, lr=lr.peak, precision=precision)
    may_change[CONTENT] = train_set.content_hash()
    may_change[CROPS] = "drawn once and clipped"
    # Counted as given, because checkpoints without it are of a version that cropped differently.
    given = given_options(args, parse_args([])) | {CROPS}
    record = RunRecord(
        "linprobe",
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
        while progress.epoch < optim.epochs:
            stats = train_one_epoch(
                parallel_model,
                loader,
                state,
                task=task,
                seed=run.seed,
                device=device,
                lr_at=lr.at,
                log_every=run.log_every,
                run_log=run_log,
                checkpoints=checkpoints,
            )
            broadcast_buffers(model)  # each process has normalized only its own features
            if val_loader is not None:  # one without images is false
                broken = BrokenImages(len(val_set), data.max_broken)
                scores = evaluate(model, val_loader, task=task, precision=precision, broken=broken)
                stats |= scores.stats()
                show(scores, train_set.classes, run_log, progress=progress)
                if progress.epoch == optim.epochs:
                    log_lines(scores.table(train_set.classes))
            run_log.end_epoch(stats, epoch=progress.epoch, step=progress.step)
            checkpoints.save_if_best(stats, by=BEST)
            checkpoints.end_epoch(is_last=progress.epoch == optim.epochs)

    if is_main_process():
        report(
            run.folder,
            f"{probe.probe} probe, pool {options['pool']}",
            progress,
            by=BEST.metric,
            describe=describe,
        )


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
