"""Pre-train CrossMAE, or the MAE baseline.

python main_pretrain.py --data_path IMAGES --pred_ratio 0.25
torchrun --nproc_per_node 8 main_pretrain.py --data_path IMAGES --pred_ratio 0.25
"""

import argparse
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine_pretrain import (
    KNN_EVERY,
    build_knn_loaders,
    describe_knn,
    draw_reconstructions,
    evaluate,
    heldout_split,
    measure_knn,
    train_one_epoch,
)
from models import MODELS, build_model
from models_crossmae import MaskedAutoencoder, ViTEncoder
from util.arguments import (
    Parser,
    add_crop_args,
    add_data_args,
    add_masking_args,
    add_memory_args,
    add_model_args,
    add_optim_args,
    add_precision_args,
    add_run_args,
    check_batch_args,
    check_crop_args,
    check_data_args,
    check_masking_args,
    check_sharding_args,
    check_warmup,
    natural_int,
    positive_int,
    schedule_settings,
)
from util.compute.batch_size import find_batch_size, micro_steps
from util.compute.compiling import COMPILE_MODES, compile_model
from util.compute.distributed import data_parallel, is_main_process, world_size
from util.compute.precision import Precision
from util.compute.recompute import set_memory
from util.compute.sharding import shard, unsharded
from util.data.batch import Normalization, collate
from util.data.broken_images import BrokenImages
from util.data.datasets import default_dataset, open_pair
from util.data.images import IndexedImages
from util.data.loaders import build_loaders
from util.data.streams import StreamedImages
from util.data.transforms import eval_transform, pretrain_transform
from util.errors import InputError
from util.masking import TokenSplit, check_grid, count_tokens, split_tokens
from util.optim import build_adamw
from util.patches import RawImages
from util.runs.checkpoint import Progress, TrainState, last_checkpoint
from util.runs.meters import EpochMeters
from util.runs.resume import EFFECTIVE_BATCH
from util.runs.run import open_run, run_main, start_run
from util.runs.run_log import read_log
from util.schedule import lr_schedule, scaled_lr

NUM_SHOWN = 8  # images in the pictures of reconstructions
FIGURE = "reconstructions"
MEMORY_ADVICE = (
    "lower --batch_size and raise --accum_iter, let --batch_size auto choose both on a GPU, or use "
    "--memory medium or low"
)

_logger = logging.getLogger(__name__)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line; defaults are the paper's (Table 10, App. A.6)."""
    parser = Parser(prog="main_pretrain.py", description="Pre-train CrossMAE or MAE.")
    add_run_args(parser, output_dir="output/pretrain")
    add_data_args(parser, input_size=224)
    add_crop_args(parser)
    add_model_args(parser, models=MODELS, model="crossmae_vit_base_patch16")
    add_masking_args(parser, mask_ratio=0.75)
    add_optim_args(
        parser,
        batch_size=512,
        epochs=800,
        blr=1.5e-4,
        weight_decay=0.05,
        auto_batch_size=True,
    )
    add_precision_args(parser, compile_modes=COMPILE_MODES)
    add_memory_args(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--eval_every",
        type=positive_int,
        default=20,
        help="epochs between measurements of held-out loss and PSNR (%(default)s)",
    )
    group.add_argument(
        "--knn_every",
        type=natural_int,
        help=f"epochs between measurements of k-NN accuracy, 0 for none ({KNN_EVERY} where images "
        "have labels and some are held out)",
    )
    group.add_argument(
        "--visualize_every",
        type=positive_int,
        default=20,
        help="epochs between pictures of reconstructions (%(default)s)",
    )
    args = parser.parse_args(argv)
    check_data_args(args)
    check_masking_args(args)
    check_batch_args(args)
    check_sharding_args(args)
    check_warmup(args.warmup_epochs, args.epochs)
    if args.model.startswith("mae_"):
        if args.pred_ratio not in (None, args.mask_ratio):
            raise InputError(
                f"--pred_ratio {args.pred_ratio} does not go with {args.model}: MAE's decoder "
                "predicts all masked patches at once (Sec. 3.3), so leave it out"
            )
        if args.decoder_self_attention:
            raise InputError(
                f"--decoder_self_attention is an option of CrossMAE; {args.model} has nothing else"
            )
    return args


def model_options(args: argparse.Namespace) -> dict:
    """The arguments of the model's factory, as plain values that a checkpoint keeps."""
    names = ["decoder_depth", "decoder_embed_dim", "decoder_num_heads", "feature_maps"]
    names += ["norm_pix_loss", "iba_init", "iba_softmax", "iba_projection"]
    if args.model.startswith("crossmae_"):
        names.append("decoder_self_attention")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return {"img_size": args.input_size * (2 // len(args.input_size)), **options}


def open_datasets(
    args: argparse.Namespace, name: str, img_size: Sequence[int]
) -> tuple[IndexedImages | StreamedImages, IndexedImages | None, IndexedImages | None]:
    """Open the images to train on, the held-out ones, and those to draw.

    The last two are None where there are none; without held-out images, training ones are drawn.
    """
    plain_transform = eval_transform(img_size, args.mean, args.std)
    crops = {"num_crops": args.repeated_aug, "decode": args.decode}
    train_set, val_set = open_pair(
        name,
        args.data_path,
        val_path=args.val_path,
        transforms=(pretrain_transform(img_size, args.mean, args.std, **crops), plain_transform),
        seed=args.seed,
        num_samples=args.num_samples,
        batch_size=1 if args.batch_size == "auto" else args.batch_size,
    )
    shown_set = val_set
    if val_set is None and isinstance(train_set, IndexedImages):
        shown_set = train_set.with_transform(plain_transform)
    return train_set, val_set, shown_set


def summarize(output_dir: Path, log_dir: Path) -> None:
    """Say what the finished run reached, and where it is.

    Raises:
        RunError: the last checkpoint could not be written.
    """
    last = read_log(output_dir)[-1]
    path = last_checkpoint(output_dir, last["epoch"])
    if "val_loss" in last:
        _logger.info(
            "held-out loss %.4f, masked-patch PSNR %.2f dB over %d images",
            *(last["val_loss"], last["val_psnr"], last["val_images"]),
        )
    if "knn10" in last:
        _logger.info("pre-trained encoder: %s", describe_knn(last))
    _logger.info("checkpoint: %s", path)
    _logger.info("TensorBoard: %s", log_dir)
    figure = output_dir / f"{FIGURE}.png"
    if figure.exists():
        _logger.info("figure: %s", figure)


def make_splits(
    args: argparse.Namespace, encoder: ViTEncoder
) -> tuple[Callable[[Tensor], TokenSplit], Callable[[Tensor], TokenSplit]]:
    """How noise (B, L) becomes token splits: in training, and of held-out images.

    MAE predicts every masked patch in training, every model does of held-out images.

    Raises:
        InputError: the ratios or the way of masking do not fit the number of patches.
    """
    if args.mask_sampling == "grid":
        check_grid(encoder.grid_size, args.mask_ratio)
    split = partial(split_tokens, grid_size=encoder.grid_size, sampling=args.mask_sampling)
    all_masked = count_tokens(encoder.num_patches, args.mask_ratio, None)
    if args.model.startswith("mae_"):
        counts = all_masked
    else:
        pred_ratio = args.pred_ratio or args.mask_ratio
        counts = count_tokens(encoder.num_patches, args.mask_ratio, pred_ratio)
    return partial(split, counts=counts), partial(split, counts=all_masked)


def plan_batches(
    args: argparse.Namespace,
    model: MaskedAutoencoder,
    split_tokens: Callable[[Tensor], TokenSplit],
    precision: Precision,
    device: torch.device,
) -> tuple[int, int]:
    """The images of a micro-step on this process, and the micro-steps of a step.

    Raises:
        InputError: the effective batch size cannot be reached, or the chosen attention kernel
            cannot run.
    """

    def example(num_images: int) -> tuple[RawImages, TokenSplit]:
        shape = (num_images, 3, *model.encoder.img_size)
        pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        noise = torch.zeros(num_images, model.encoder.num_patches, device=device)
        return Normalization(tuple(args.mean), tuple(args.std)).later(pixels), split_tokens(noise)

    def train_on(num_images: int) -> None:
        with precision.autocast():
            loss = model(*example(num_images))
        precision.backward(loss)

    batch_size = args.batch_size
    if batch_size == "auto":
        precision.check_attention_backend(model, example)
        batch_size = find_batch_size(
            train_on,
            args.effective_batch_size,
            model=model,
            device=device,
            multiple_of=args.repeated_aug,
        )
    steps = micro_steps(batch_size, args.accum_iter, args.effective_batch_size)
    precision.check_attention_backend(model, example, batch_size)
    return batch_size, steps


def make_schedule(
    args: argparse.Namespace, batch_size: int, accum_iter: int, steps_per_epoch: int
) -> tuple[float, float, Callable[[int], float]]:
    """The peak learning rate (App. A.6), the warm-up in epochs, and the rate of every step.

    Args:
        args: of the command line.
        batch_size: images of a micro-step on this process.
        accum_iter: micro-steps of a step.
        steps_per_epoch: optimizer steps.
    """
    pred_ratio = args.pred_ratio or args.mask_ratio  # MAE's, too: its γ / p is 1
    effective = batch_size * accum_iter * world_size()
    scaled = scaled_lr(args.blr, effective, mask_ratio=args.mask_ratio, pred_ratio=pred_ratio)
    lr = args.lr or scaled
    warmup_epochs = args.epochs / 20 if args.warmup_epochs is None else args.warmup_epochs
    lr_at = lr_schedule(
        lr=lr,
        min_lr=args.min_lr,
        warmup_epochs=warmup_epochs,
        epochs=args.epochs,
        steps_per_epoch=steps_per_epoch,
    )
    origin = f"= {args.blr:g} x {lr / args.blr:.4g} (batch / 256 x pred_ratio / mask_ratio)"
    _logger.info(
        "effective batch size %d = %d x %d (--accum_iter) x %d (processes), lr %.4g %s",
        *(effective, batch_size, accum_iter, world_size(), lr),
        "as given" if args.lr else origin,
    )
    return lr, warmup_epochs, lr_at


def run_settings(
    args: argparse.Namespace,
    options: dict,
    *,
    data: dict[str, object],
    batch_size: int,
    lr: float,
    warmup_epochs: float,
    amp: str,
) -> tuple[dict, dict]:
    """What makes a run the run it is, and what may change when it is continued."""
    identity = {
        "--model": args.model,
        **{f"--{name}".replace("img_size", "input_size"): v for name, v in options.items()},
        "--mask_ratio": args.mask_ratio,
        "--pred_ratio": args.pred_ratio or args.mask_ratio,
        "--mask_sampling": args.mask_sampling,
        "--mean": args.mean,
        "--std": args.std,
        "--seed": args.seed,
        "--weight_decay": args.weight_decay,
        **data,
        EFFECTIVE_BATCH: batch_size,
        **({"--repeated_aug": args.repeated_aug} if args.repeated_aug > 1 else {}),
    }
    recipe = schedule_settings(
        args, epochs=args.epochs, warmup_epochs=warmup_epochs, lr=lr, amp=amp
    )
    if args.decode != "cpu":  # which gives slightly other pixels
        recipe["--decode"] = args.decode
    if args.fsdp:
        recipe["--fsdp"] = True
    return identity, recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train from the start, or from where the last start was stopped."""
    args = parse_args(argv)
    device = start_run(device=args.device, seed=args.seed, timeout_minutes=args.timeout_minutes)
    check_crop_args(args, device)
    output_dir = Path(args.output_dir)
    log_dir = Path(args.log_dir or output_dir / "tensorboard")
    options = model_options(args)

    # Data first: whatever is wrong with it shows before a model is built.
    dataset = default_dataset(args.dataset, args.data_path, None)
    train_set, val_set, shown_set = open_datasets(args, dataset, options["img_size"])

    model = build_model(args.model, options)
    set_memory(model.blocks, model.mixer, args.memory)
    if args.fsdp:
        shard(model, model.blocks, device)
    else:
        model.to(device)
    num_patches = model.encoder.num_patches
    train_split, full_split = make_splits(args, model.encoder)
    precision = Precision(
        args.amp, device, clip_grad=args.clip_grad, attention_backend=args.attention_backend
    )
    batch_size, accum_iter = plan_batches(args, model, train_split, precision, device)
    compile_model(model, args.compile, device=device, blocks=model.blocks)

    loader, val_loader = build_loaders(
        train_set,
        val_set,
        name=dataset,
        batch_size=batch_size,
        accum_iter=accum_iter,
        seed=args.seed,
        num_workers=args.num_workers,
        device=device,
    )
    knn_loaders = build_knn_loaders(
        train_set,
        val_set,
        every=args.knn_every,
        batch_size=batch_size,
        num_workers=args.num_workers,
        device=device,
    )
    num_images, num_steps = loader.sampler.num_samples, loader.steps_per_epoch
    lr, warmup_epochs, lr_at = make_schedule(args, batch_size, accum_iter, num_steps)

    # Where the run goes on, and whether it is still the same run.
    state = TrainState(
        model=model,
        optimizer=build_adamw(model, weight_decay=args.weight_decay, betas=(0.9, 0.95)),
        precision=precision,
        progress=Progress(),
        meters=EpochMeters(device),
        broken=BrokenImages(num_images, args.max_broken),
    )
    progress = state.progress
    identity, recipe = run_settings(
        args,
        options,
        data={"--dataset": dataset, **train_set.identity()},
        batch_size=loader.effective_batch_size,
        lr=lr,
        warmup_epochs=warmup_epochs,
        amp=precision.amp,
    )
    checkpoints, run_log = open_run(
        state,
        loader,
        kind="pretrain",
        output_dir=output_dir,
        log_dir=log_dir,
        resume=args.resume,
        identity=identity,
        recipe=recipe,
        header={
            "model_name": args.model,
            "model_options": options,
            "mean": args.mean,
            "std": args.std,
            "mask_ratio": args.mask_ratio,
            "mask_sampling": args.mask_sampling,
        },
        args=vars(args),
        every_minutes=args.save_every_minutes,
        keep_last=args.keep_last,
    )

    parallel_model = data_parallel(model, device)
    pixels = {"mean": args.mean, "std": args.std, "precision": precision}
    heldout = {
        "split_tokens": full_split,
        "num_patches": num_patches,
        "seed": args.seed,
        "device": device,
    }
    if shown_set:
        num_shown = min(NUM_SHOWN, len(shown_set))
        shown_ids = [i * len(shown_set) // num_shown for i in range(num_shown)]
        shown_images, _ = collate([shown_set[0, i] for i in shown_ids]).to(device)
        shown_split = heldout_split(shown_ids, **heldout)
    build = partial(build_model, args.model, options)
    if knn_loaders and progress.step == 0:
        with unsharded(model, build) as whole:
            untrained = measure_knn(whole.encoder, *knn_loaders, device=device, precision=precision)
        run_log.log_scalars(untrained, 0, "epoch")
        _logger.info("untrained encoder: %s", describe_knn(untrained))

    while progress.epoch < args.epochs:
        stats = train_one_epoch(
            parallel_model,
            loader,
            state,
            lr_at=lr_at,
            split_tokens=train_split,
            num_patches=num_patches,
            seed=args.seed,
            device=device,
            log_every=args.log_every,
            run_log=run_log,
            checkpoints=checkpoints,
        )
        is_last = progress.epoch == args.epochs
        with unsharded(model, build) as whole:
            if val_loader and (is_last or progress.epoch % args.eval_every == 0):
                stats |= evaluate(whole, val_loader, **heldout, **pixels)
            if knn_loaders and (is_last or progress.epoch % (args.knn_every or KNN_EVERY) == 0):
                stats |= measure_knn(
                    whole.encoder, *knn_loaders, device=device, precision=precision
                )
            draws = is_main_process() and shown_set
            if draws and (is_last or progress.epoch % args.visualize_every == 0):
                figure = draw_reconstructions(whole, shown_images, shown_split, **pixels)
                run_log.log_image(FIGURE, figure, progress.step)
        run_log.end_epoch(stats, epoch=progress.epoch, step=progress.step)
        if is_last or progress.epoch % args.save_every == 0:
            checkpoints.save()
        else:
            checkpoints.save_if_due()

    run_log.close()
    if is_main_process():
        summarize(output_dir, log_dir)


if __name__ == "__main__":
    run_main(main, trains=True, memory_advice=MEMORY_ADVICE)
