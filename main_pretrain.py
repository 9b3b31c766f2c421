"""Pre-train CrossMAE, or the MAE baseline.

python main_pretrain.py --data_path IMAGES --pred_ratio 0.25
torchrun --standalone --nproc_per_node 8 main_pretrain.py --data_path IMAGES --pred_ratio 0.25
"""

import argparse
import logging
from collections.abc import Sequence
from functools import partial

from util.arguments import Parser, check_arguments, given_options, take
from util.errors import InputError
from util.normalization import check_counts
from util.settings.compute import (
    COMPILE_MODES,
    ComputeSettings,
    add_memory_args,
    add_precision_args,
)
from util.settings.data import DataSettings, add_crop_args, add_data_args
from util.settings.evaluation import MonitorSettings, add_monitor_args
from util.settings.masking import MaskSettings, add_masking_args
from util.settings.model import ModelSettings, add_model_args
from util.settings.optim import OptimSettings, add_optim_args
from util.settings.run import RunSettings, add_run_args
from util.settings.views import PRETRAIN_VIEW, ViewSettings, add_view_args

FIRST_FLAGS = ("--data_path", "--input_size", "--model", "--init_from", "--norm_pix_loss")
FIRST_FLAGS += ("--pred_ratio", "--batch_size", "--effective_batch_size", "--epochs")
FIRST_FLAGS += ("--output_dir", "--device")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; defaults are the paper's (Table 10, App. A.6)."""
    parser = Parser(
        prog="main_pretrain.py",
        usage="main_pretrain.py --data_path IMAGES [flags]",
        description="Pre-train CrossMAE or MAE.",
        first=FIRST_FLAGS,
    )
    add_data_args(parser, input_size=224, holds_out=True)
    add_model_args(parser, model="crossmae_vit_base_patch16")
    add_masking_args(parser, mask_ratio=0.75)
    add_optim_args(
        parser,
        batch_size=512,
        epochs=800,
        blr=1.5e-4,
        weight_decay=0.05,
        auto_batch_size=True,
    )
    add_run_args(parser, output_dir="output/pretrain", has_init_from=True)
    add_view_args(parser, crop_area=PRETRAIN_VIEW.crop_area)
    add_crop_args(parser)
    add_precision_args(parser, compile_modes=COMPILE_MODES)
    add_memory_args(parser)
    add_monitor_args(parser)
    args = parser.parse_args(argv)
    network, masks = take(ModelSettings, args), take(MaskSettings, args)
    for group in (RunSettings, ViewSettings):
        take(group, args)
    data = take(DataSettings, args)
    check_counts(data.mean, data.std, data.pixels.num_channels)
    if args.fsdp and args.batch_size == "auto":
        raise InputError("--batch_size auto cannot be combined with --fsdp: give a number")
    if network.is_mae and masks.pred_ratio not in (None, masks.mask_ratio):
        raise InputError(
            f"--pred_ratio {masks.pred_ratio} cannot be used with {network.model}: MAE's decoder "
            "predicts all masked patches at once (Sec. 3.3), so leave --pred_ratio out"
        )
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

from engine_pretrain import FIGURE, blank_batch, report, train_one_epoch
from models import build_model, start_from
from util.compute.batch_size import plan_batches
from util.compute.compiling import compile_model
from util.compute.distributed import data_parallel, is_main_process
from util.compute.memory import check_step, foresee_step
from util.compute.setup import place_model
from util.compute.sharding import unsharded
from util.data.broken_images import BrokenImages
from util.data.colors import choose_colors, compare_colors
from util.data.datasets import open_train_val
from util.data.decode import check_decoder
from util.data.loaders import build_loaders
from util.data.report import report_images
from util.data.transforms import eval_transform, pretrain_transform
from util.eval.knn import not_learning
from util.eval.monitor import draw, measure, open_monitor
from util.eval.reconstructions import BLIND, MOMENTS_NOTE
from util.masking import Masking
from util.optim import build_adamw
from util.runs.checkpoint import TrainState
from util.runs.resume import (
    CONTENT,
    EFFECTIVE_BATCH,
    WEIGHTS_HASH,
    RunRecord,
    changeable_settings,
    colors_of_run,
    init_or_continue,
    open_run,
)
from util.runs.run import run_main, start_run
from util.runs.start import describe_images, log_start, millions, num_parameters
from util.schedule import plan_learning_rate

SETTINGS = (RunSettings, DataSettings, OptimSettings, ComputeSettings)
SETTINGS += (ModelSettings, MaskSettings, MonitorSettings, ViewSettings)
SHAPE = ("img_size", "in_chans")  # options of a model that are flags of the data
MEMORY_ADVICE = (
    "use a lower --batch_size, or auto, with the same --effective_batch_size, or --memory medium "
    "or low"
)

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train from scratch or from existing weights, or continue a stopped run."""
    args = parse_args(argv)
    run, data, optim, compute, network, masks, monitoring, view = (
        take(group, args) for group in SETTINGS
    )
    device = start_run(
        device=run.device,
        seed=run.seed,
        timeout_minutes=run.timeout_minutes,
        num_threads=run.num_threads,
    )
    check_decoder(args.decode, device, data.pixels)

    # Data come first, so that problems show before a model is built.
    # Only a hint for timm's streams: --batch_size auto is decided by the model.
    known_batch_size = 1 if optim.batch_size == "auto" else optim.batch_size
    train_set, val_set = open_train_val(
        data, seed=run.seed, batch_size=known_batch_size, holds_out=True
    )
    found = report_images(train_set, val_set)
    reading = {"pixels": data.pixels, "tile": data.tile}
    earlier = partial(colors_of_run, run, "pretrain")
    mean, std = choose_colors(train_set, data.mean, data.std, **reading, earlier=earlier)
    options = network.options(data.input_size) | data.pixels.model_options
    colors = {"mean": mean, "std": std}
    plain_transform = eval_transform(options["img_size"], **colors, **reading)
    crops = {"num_crops": args.repeated_aug, "decode": args.decode}
    train_set.transform = pretrain_transform(
        options["img_size"], **colors, view=view, **crops, **reading
    )
    if val_set is not None:
        compare_colors(val_set, mean, std, **reading)
        val_set.transform = plain_transform

    # The model, and the batch size that fits its device
    build = partial(build_model, network.model, options)
    model = build()
    load = partial(start_from, model, network.model, **colors)
    origin = init_or_continue(load, run, "pretrain")
    grid_size = model.encoder.grid_size
    masking = Masking.of(masks, grid_size, seed=run.seed, all_masked=network.is_mae)
    example = partial(blank_batch, masking, options["img_size"], **colors, device=device)
    precision = place_model(model, compute, device, example, optim)
    crops_together = {"multiple_of": args.repeated_aug}
    step = foresee_step(model, example, precision, mode=compute.memory, batch_size=optim.batch_size)
    batches = plan_batches(
        optim, model, step=step, example=example, precision=precision, **crops_together
    )
    memory = check_step(step, *batches, **crops_together)
    compile_model(model, compute.compile, device=device, blocks=model.blocks)
    loader, val_loader = build_loaders(
        train_set, val_set, data, batches, seed=run.seed, device=device
    )

    # How weights are updated (App. A.6)
    optim = optim.with_defaults(warmup_epochs=optim.epochs / 20)
    ratios = {"mask_ratio": masks.mask_ratio, "pred_ratio": masks.predicted}
    lr = plan_learning_rate(optim, loader, **ratios)
    optimizer = build_adamw(model, weight_decay=optim.weight_decay, betas=(0.9, 0.95))
    broken = BrokenImages(loader.sampler.num_samples, data.max_broken)
    state = TrainState(model, optimizer, precision, broken)

    # Settings that must match on resume, and settings that may change
    model_flags = {f"--{name}": value for name, value in options.items() if name not in SHAPE}
    fixed = {
        "--model": network.model,
        WEIGHTS_HASH: origin.digest,
        "--input_size": options["img_size"],
        **model_flags,
        "--mask_ratio": masks.mask_ratio,
        "--pred_ratio": masks.predicted,
        "--mask_sampling": masks.mask_sampling,
        **data.pixels.recipe,
        "--mean": mean,
        "--std": std,
        "--tile": data.tile,
        "--seed": run.seed,
        "--weight_decay": optim.weight_decay,
        "--dataset": data.name,
        **train_set.identity(),
        EFFECTIVE_BATCH: loader.effective_batch_size,
        "--repeated_aug": args.repeated_aug,
        **view.recipe(),
    }
    may_change = changeable_settings(
        optim, data, lr=lr.peak, precision=precision, fsdp=compute.fsdp
    ) | {"--decode": args.decode, CONTENT: train_set.content_hash()}
    header = {
        "model_name": network.model,
        "model_options": options,
        **colors,
        **data.pixels.header,
        "tile": data.tile,
        "mask_ratio": masks.mask_ratio,
        "mask_sampling": masks.mask_sampling,
    }
    monitor = open_monitor(
        train_set,
        val_set,
        val_loader,
        data,
        monitoring,
        model_name=network.model,
        masking=masking,
        colors=(mean, std),
        precision=precision,
        batch_size=batches.batch_size,
        plain_transform=plain_transform,
        at_start=origin.at_start,
    )
    # Settings that an older version's checkpoint lacks count as changed only if they were given.
    given = given_options(args, parse_args([])) | ({WEIGHTS_HASH} if run.init_from else set())
    record = RunRecord(
        "pretrain",
        fixed,
        may_change,
        header,
        vars(args),
        given,
        data=found,
        evaluated_every=monitor.evaluated_every,
        notes={"val_psnr": MOMENTS_NOTE} if model.norm_pix_loss else None,
        at_start=origin.at_start,
    )
    encoder, counts = num_parameters(model.encoder), masking.counts
    log_start(
        run,
        optim,
        record,
        model=f"{network.model}: encoder {millions(encoder)} parameters, decoder "
        f"{millions(num_parameters(model) - encoder)}"
        + (f"; from {run.init_from}" if run.init_from else ""),
        images=f"{describe_images(train_set, val_set)}; {counts.visible} of "
        f"{counts.patches} patches seen, {counts.predicted} predicted"
        + (f"; blind: results of {BLIND[model.norm_pix_loss]}" if val_set else ""),
        precision=precision,
        loader=loader,
        batches=batches,
        lr=lr,
        memory=memory,
    )
    with open_run(state, loader, run, record) as (checkpoints, run_log):
        progress, parallel_model = state.progress, data_parallel(model, device)
        if progress.step == 0:
            if monitor.knn_loaders:
                _logger.info("measuring the k-NN accuracy before training")
            with unsharded(model, build) as full_model:
                untrained = measure(full_model, monitor, 0)
                figure = draw(full_model, monitor, 0)
            if figure is not None:
                run_log.log_image(FIGURE, figure, 0)
            run_log.start(untrained)

        while progress.epoch < optim.epochs:
            stats = train_one_epoch(
                parallel_model,
                loader,
                state,
                masking=masking,
                device=device,
                lr_at=lr.at,
                log_every=run.log_every,
                run_log=run_log,
                checkpoints=checkpoints,
            )
            is_last = progress.epoch == optim.epochs
            with unsharded(model, build) as full_model:
                stats |= measure(full_model, monitor, progress.epoch, is_last=is_last)
                figure = draw(full_model, monitor, progress.epoch, is_last=is_last)
            if figure is not None:
                run_log.log_image(FIGURE, figure, progress.epoch)
            run_log.end_epoch(stats, epoch=progress.epoch, step=progress.step)
            # Good weights may lose at first: then it says nothing.
            if progress.epoch == monitor.first_judged(optim.epochs) and not run.init_from:
                so_far = {"epoch": progress.epoch, "epochs": optim.epochs}
                so_far["normalized"] = model.norm_pix_loss
                if warning := not_learning(stats, run_log.untrained, **so_far):
                    _logger.warning("%s", warning)
            checkpoints.end_epoch(is_last=is_last)

    if is_main_process():
        report(run, progress.epoch, record.notes, at_start=origin.at_start)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
