"""Train a linear classifier on frozen features (App. B.1).

python main_linprobe.py --finetune PRETRAINED --data_path IMAGES
torchrun --nproc_per_node 8 main_linprobe.py --finetune PRETRAINED --data_path IMAGES
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine_finetune import evaluate, report, train_one_epoch
from models import build_classifier, choose_size
from models_vit import POOLS, SIZES, make_linear_probe
from util.arguments import (
    Parser,
    add_data_args,
    add_encoder_args,
    add_optim_args,
    add_precision_args,
    add_run_args,
    check_batch_args,
    check_data_args,
    check_warmup,
    schedule_settings,
)
from util.compute.batch_size import micro_steps
from util.compute.compiling import compile_model
from util.compute.distributed import data_parallel, is_main_process, same_buffers
from util.compute.precision import Precision, blank_images
from util.data.broken_images import BrokenImages
from util.data.classes import check_classes
from util.data.datasets import default_dataset, open_pair
from util.data.loaders import build_loaders
from util.data.transforms import default_crop_share, eval_transform, probe_transform
from util.errors import value_errors_are_input_errors
from util.optim import build_lars
from util.runs.checkpoint import Progress, TrainState
from util.runs.meters import EpochMeters
from util.runs.resume import EFFECTIVE_BATCH
from util.runs.run import describe_classifier, log_settings, open_run, run_main, start_run
from util.schedule import lr_schedule, scaled_lr
from util.weights.encoder import input_format, load_encoder, read_encoder

WARMUP_SHARE = 1 / 9  # of the run: 10 of 90 epochs
MEMORY_ADVICE = "lower --batch_size and raise --accum_iter"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; defaults are MAE's, which the paper takes over."""
    parser = Parser(
        prog="main_linprobe.py", description="Train a linear classifier on frozen features."
    )
    add_run_args(parser, output_dir="output/linprobe", save_every=1)
    add_data_args(parser, input_size=None)
    add_encoder_args(parser, models=[f"vit_{size}" for size in SIZES], pools=POOLS, pool="cls")
    add_optim_args(
        parser,
        batch_size=512,
        epochs=90,
        blr=0.1,
        weight_decay=0.0,
        warmup_epochs="EPOCHS / 9",
    )
    add_precision_args(parser)
    args = parser.parse_args(argv)
    check_data_args(args)
    check_batch_args(args)
    check_warmup(args.warmup_epochs, args.epochs)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Probe from the start, or from where the last start was stopped."""
    args = parse_args(argv)
    device = start_run(device=args.device, seed=args.seed, timeout_minutes=args.timeout_minutes)
    output_dir = Path(args.output_dir)
    log_dir = Path(args.log_dir or output_dir / "tensorboard")

    weights = read_encoder(args.finetune) if args.finetune else None
    with value_errors_are_input_errors("--finetune cannot be loaded"):
        size = choose_size(args.model, weights and weights.shape)
    img_size, mean, std = input_format(
        weights,
        img_size=args.input_size,
        mean=args.mean,
        std=args.std,
        default_size=SIZES[size].img_size,
    )
    dataset = default_dataset(args.dataset, args.data_path, args.val_path)
    crop_share = args.crop_share or default_crop_share(img_size)
    train_set, val_set = open_pair(
        dataset,
        args.data_path,
        val_path=args.val_path,
        transforms=(
            probe_transform(img_size, mean, std),
            eval_transform(img_size, mean, std, crop_share),
        ),
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

    pool = args.pool or "cls"
    options = {"img_size": list(img_size), "num_classes": num_classes, "pool": pool}
    model = build_classifier(size, **options)
    if weights is not None:
        load_encoder(model, weights, head=False)
    make_linear_probe(model, num_classes)
    model.to(device)

    batch_size = loader.effective_batch_size
    lr = args.lr or scaled_lr(args.blr, batch_size)
    warmup_epochs = args.epochs * WARMUP_SHARE if args.warmup_epochs is None else args.warmup_epochs
    lr_at = lr_schedule(
        lr=lr,
        min_lr=args.min_lr,
        warmup_epochs=warmup_epochs,
        epochs=args.epochs,
        steps_per_epoch=loader.steps_per_epoch,
    )
    precision = Precision(
        args.amp, device, clip_grad=args.clip_grad, attention_backend=args.attention_backend
    )
    precision.check_attention_backend(model, blank_images(img_size, device), args.batch_size)
    compile_model(model, args.compile, device=device)

    state = TrainState(
        model=model,
        optimizer=build_lars(model, weight_decay=args.weight_decay),
        precision=precision,
        progress=Progress(),
        meters=EpochMeters(device),
        broken=BrokenImages(loader.sampler.num_samples, args.max_broken),
    )
    progress = state.progress
    identity, header = describe_classifier(
        f"vit_{size}",
        options,
        weights=weights,
        train_set=train_set,
        dataset=dataset,
        mean=mean,
        std=std,
        crop_share=crop_share,
    )
    identity |= {
        "--weight_decay": args.weight_decay,
        "--seed": args.seed,
        EFFECTIVE_BATCH: batch_size,
    }
    recipe = schedule_settings(
        args, epochs=args.epochs, warmup_epochs=warmup_epochs, lr=lr, amp=precision.amp
    )
    log_settings({**identity, **recipe})
    checkpoints, run_log = open_run(
        state,
        loader,
        kind="linprobe",
        output_dir=output_dir,
        log_dir=log_dir,
        resume=args.resume,
        identity=identity,
        recipe=recipe,
        header=header,
        args=vars(args),
        every_minutes=args.save_every_minutes,
        keep_last=args.keep_last,
    )

    parallel_model = data_parallel(model, device)
    while progress.epoch < args.epochs:
        stats = train_one_epoch(
            parallel_model,
            loader,
            state,
            mixup=None,
            smoothing=0.0,
            num_classes=num_classes,
            seed=args.seed,
            device=device,
            lr_at=lr_at,
            log_every=args.log_every,
            run_log=run_log,
            checkpoints=checkpoints,
        )
        same_buffers(model)  # each process has normalised its own features
        if val_loader:
            stats |= evaluate(
                model,
                val_loader,
                device=device,
                precision=precision,
                broken=BrokenImages(len(val_set), args.max_broken),
            )
        run_log.end_epoch(stats, epoch=progress.epoch, step=progress.step)
        checkpoints.save_if_best(stats, by="val_top1")
        if progress.epoch == args.epochs or progress.epoch % args.save_every == 0:
            checkpoints.save()
        else:
            checkpoints.save_if_due()

    run_log.close()
    if is_main_process():
        report(output_dir, f"linear probe, pool {pool}")


if __name__ == "__main__":
    run_main(main, trains=True, memory_advice=MEMORY_ADVICE)
