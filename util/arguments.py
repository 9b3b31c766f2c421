"""Command-line arguments in groups; each main passes its own defaults, rows of the paper's tables.

A group is a pair: `add_X_args` declares, `check_X_args` refuses what cannot work together.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from util.compute.distributed import TIMEOUT_MINUTES, default_workers, world_size
from util.compute.precision import AMP_DTYPES, ATTENTION_BACKENDS
from util.compute.recompute import MEMORY_MODES
from util.errors import InputError, one_line
from util.masking import MASK_SAMPLINGS

MAX_COUNT = 10**9  # above it, the products of two no longer fit what they are computed in
MAX_WORKERS = 1000  # processes
MIN_CROP_SHARE = 0.1  # below it, resized images take more than a hundred times a crop's memory


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations and no empty words, and answers mistakes in one line."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_args(self, *args: Sequence[str] | None) -> argparse.Namespace:
        """As in argparse, but an empty word, as an unset shell variable leaves it, is refused."""
        parsed = super().parse_args(*args)
        for name, value in vars(parsed).items():
            if value == "" or (isinstance(value, list) and "" in value):
                self.error(f"--{name} is empty: give it a value, or leave it out")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def ratio(text: str) -> float:
    """A number strictly between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return value


def share(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in 0 to 1")
    return value


def crop_share(text: str) -> float:
    """A number from MIN_CROP_SHARE to 1."""
    value = float(text)
    if not MIN_CROP_SHARE <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie in {MIN_CROP_SHARE} to 1")
    return value


def whole_number(text: str, limit: int) -> int:
    """A whole number from 0 to a limit."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    if value > limit:
        raise argparse.ArgumentTypeError(f"{text} is above {limit}")
    return value


def positive_int(text: str) -> int:
    """A whole number from 1 to MAX_COUNT."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return whole_number(text, MAX_COUNT)


def natural_int(text: str) -> int:
    """A whole number from 0 to MAX_COUNT."""
    return whole_number(text, MAX_COUNT)


def process_count(text: str) -> int:
    """A number of processes; a mistyped one would start them until the machine stands still."""
    return whole_number(text, MAX_WORKERS)


def batch_size_choice(text: str) -> int | str:
    """A whole number from 1, or "auto"."""
    return text if text == "auto" else positive_int(text)


def seed_number(text: str) -> int:
    """A whole number that PyTorch takes as a seed."""
    return whole_number(text, 2**63 - 1)


def finite_float(text: str) -> float:
    """A finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value


def natural_float(text: str) -> float:
    """A finite number from 0."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = natural_float(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is not above 0")
    return value


def feature_map_choice(text: str) -> str | list[int]:
    """Either "all", "last" or indices with commas between."""
    if text in ("all", "last"):
        return text
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        message = f"{text!r} is neither all, nor last, nor indices such as 0,4,8,12"
        raise argparse.ArgumentTypeError(message) from None


def check_output_folders(*paths: Path | None) -> None:
    """Refuse files that could not be written, before hours of measuring; None is no file."""
    for path in filter(None, paths):
        if not path.parent.is_dir():
            raise InputError(f"the folder of {path} does not exist: make it first")


def add_run_args(parser: argparse.ArgumentParser, *, output_dir: str, save_every: int = 20) -> None:
    """Where a run computes, writes and continues."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir",
        default=output_dir,
        help="folder of checkpoints, logs and figures (%(default)s)",
    )
    group.add_argument("--log_dir", help="TensorBoard's folder (OUTPUT_DIR/tensorboard)")
    group.add_argument("--device", help="such as cuda, cuda:1 or cpu (cuda where there is one)")
    group.add_argument(
        "--seed", type=seed_number, default=0, help="decides everything random (%(default)s)"
    )
    group.add_argument(
        "--resume",
        default="auto",
        help="auto continues the newest good checkpoint in OUTPUT_DIR, a path that checkpoint, "
        "none starts anew (%(default)s)",
    )
    group.add_argument(
        "--save_every",
        type=positive_int,
        default=save_every,
        help="epochs between checkpoints (%(default)s)",
    )
    group.add_argument(
        "--save_every_minutes",
        type=natural_float,
        help="also save within epochs, at the first log point after so many minutes (off)",
    )
    group.add_argument(
        "--keep_last",
        type=natural_int,
        default=3,
        help="how many checkpoints to keep, 0 for all (%(default)s)",
    )
    group.add_argument(
        "--log_every", type=positive_int, default=20, help="steps between log points (%(default)s)"
    )
    group.add_argument(
        "--timeout_minutes",
        type=positive_float,
        default=TIMEOUT_MINUTES,
        help="a process that does nothing for so long ends those that wait for it (%(default)s)",
    )


def add_data_args(parser: argparse.ArgumentParser, *, input_size: int | None) -> None:
    """Which images, and how they are read; without `input_size`, as the weights were trained."""
    inherited = "" if input_size else "those of --finetune's file, else "
    group = parser.add_argument_group("data")
    group.add_argument("--data_path", help="folder or tar of images, or the root of --dataset")
    group.add_argument(
        "--dataset",
        help="digits, folder, tar, packed, inat2019, or a name of timm's such as torch/cifar10, "
        "torch/places365, hfds/NAME or wds/NAME (folder with --data_path, else digits)",
    )
    group.add_argument(
        "--val_path", help="held-out images, where --data_path brings none (its val folder)"
    )
    group.add_argument(
        "--num_samples",
        type=positive_int,
        help="images of a streamed set that does not tell (what it tells)",
    )
    group.add_argument(
        "--input_size",
        type=positive_int,
        nargs="+",
        default=[input_size] if input_size else None,
        metavar="PX",
        help="side of the square input, or height and width "
        f"({inherited}{input_size or 'the size of the model'})",
    )
    for name, imagenet in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        group.add_argument(
            f"--{name}",
            type=finite_float,
            nargs=3,
            metavar=("R", "G", "B"),
            default=list(imagenet) if input_size else None,
            help=f"of the channels, in 0 to 1 ({inherited}ImageNet's)",
        )
    if input_size is None:
        group.add_argument(
            "--crop_share",
            type=crop_share,
            help="of the side of held-out images that is seen (224 / 256 up to 224 px, 1 above)",
        )
    group.add_argument(
        "--max_broken",
        type=natural_float,
        default=0.01,
        help="share of unreadable files above which the run stops (%(default)s)",
    )
    group.add_argument(
        "--num_workers",
        type=process_count,
        default=default_workers(),
        help="loader processes of each process (its share of the CPU cores less an eighth, "
        "%(default)s on this machine)",
    )


def add_crop_args(parser: argparse.ArgumentParser) -> None:
    """How many crops are taken of the images, and where they are decoded."""
    group = parser.add_argument_group("crops")
    group.add_argument(
        "--repeated_aug",
        type=positive_int,
        default=1,
        metavar="K",
        help="crops of every image each time that it is read, which saves decoding. They share a "
        "micro-batch, --batch_size counts them, and an epoch has K times as many steps: lower "
        "--epochs (%(default)s)",
    )
    group.add_argument(
        "--decode",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where JPEGs are decoded: by loader processes or, with somewhat other pixels, on the "
        "CUDA device (%(default)s)",
    )


def check_crop_args(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse a device that does not decode."""
    if args.decode == "gpu" and device.type != "cuda":
        raise InputError(
            f"--decode gpu needs a CUDA device, and this run is on {device}: use --decode cpu"
        )


def check_data_args(args: argparse.Namespace) -> None:
    """Refuse image sizes and normalisations that mean nothing."""
    if args.input_size and len(args.input_size) > 2:
        raise InputError("--input_size takes one side, or a height and a width")
    if args.std and min(args.std) <= 0:
        raise InputError(f"--std must be above 0 in every channel, not {args.std}")


def add_model_args(parser: argparse.ArgumentParser, *, models: Iterable[str], model: str) -> None:
    """Which network (Sec. 3, Tables 3, 7, 8, 9)."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", choices=models, default=model, metavar="NAME", help="%(choices)s (%(default)s)"
    )
    group.add_argument(
        "--norm_pix_loss",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="predict pixels normalised by their patch (on)",
    )
    group.add_argument(
        "--decoder_depth", type=positive_int, help="decoder blocks (12 for CrossMAE, 8 for MAE)"
    )
    group.add_argument(
        "--decoder_embed_dim", type=positive_int, help="decoder's width (512; small 256, tiny 128)"
    )
    group.add_argument(
        "--decoder_num_heads", type=positive_int, help="decoder's heads (16; small 8, tiny 4)"
    )
    group.add_argument(
        "--decoder_self_attention",
        action="store_true",
        help="CrossMAE with self-attention in the decoder, Table 3a (off)",
    )
    group.add_argument(
        "--feature_maps",
        type=feature_map_choice,
        help="encoder maps that inter-block attention mixes: all, or indices such as 0,4,8,12, 0 "
        "being the encoder's input; last is no inter-block attention, Table 3d (all for CrossMAE, "
        "last for MAE)",
    )
    group.add_argument(
        "--iba_init",
        choices=("normal", "xavier"),
        default="normal",
        help="start of the mixing weights; xavier is what the released code used (%(default)s)",
    )
    group.add_argument(
        "--iba_softmax", action="store_true", help="mixing weights that sum to one, Table 8 (off)"
    )
    group.add_argument(
        "--iba_projection",
        action="store_true",
        help="a linear layer for each map before the mix, Table 9 (off)",
    )


def add_encoder_args(
    parser: argparse.ArgumentParser, *, models: Iterable[str], pools: Iterable[str], pool: str
) -> None:
    """Which encoder, and what of it is classified."""
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--finetune",
        metavar="PATH",
        help="weights to start from: a checkpoint of this project, of the released CrossMAE or "
        "MAE, or a file of timm's or Hugging Face's (none, which is training from scratch)",
    )
    group.add_argument(
        "--model",
        choices=models,
        metavar="NAME",
        help="%(choices)s (that of --finetune's file, else vit_base_patch16)",
    )
    group.add_argument(
        "--pool",
        choices=pools,
        help=f"classify the mean of the patch tokens, or the class token ({pool})",
    )
    group.add_argument(
        "--num_classes",
        "--nb_classes",
        type=positive_int,
        help="outputs of the head (the classes of the data)",
    )


def add_masking_args(parser: argparse.ArgumentParser, *, mask_ratio: float) -> None:
    """Which patches are hidden, and which of those are predicted (Sec. 3.3)."""
    group = parser.add_argument_group("masking")
    group.add_argument(
        "--mask_ratio", type=ratio, default=mask_ratio, help="share of patches hidden (%(default)s)"
    )
    group.add_argument(
        "--pred_ratio",
        "--kept_mask_ratio",
        type=ratio,
        help="share of all patches predicted; 0.25 is the setting of the paper's efficiency claims "
        "(the mask ratio)",
    )
    group.add_argument(
        "--mask_sampling",
        choices=MASK_SAMPLINGS,
        default="random",
        help="grid is Table 15 (%(default)s)",
    )


def check_masking_args(args: argparse.Namespace) -> None:
    """Refuse masking arguments that contradict each other."""
    if args.pred_ratio is not None and args.pred_ratio > args.mask_ratio:
        raise InputError(
            f"--pred_ratio {args.pred_ratio} is above --mask_ratio {args.mask_ratio}: only hidden "
            "patches can be predicted, so lower it or hide more"
        )


def add_optim_args(
    parser: argparse.ArgumentParser,
    *,
    batch_size: int,
    epochs: int | None,
    blr: float | None,
    weight_decay: float,
    warmup_epochs: str = "EPOCHS / 20",
    min_lr: float = 0.0,
    auto_batch_size: bool = False,
) -> None:
    """How weights are updated; `epochs` and `blr` of None depend on the model's size."""
    by_size = "by the model's size"
    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--batch_size",
        type=batch_size_choice if auto_batch_size else positive_int,
        default=batch_size,
        help="images of a process and micro-step"
        + (", auto for as many as the GPU holds" if auto_batch_size else "")
        + " (%(default)s)",
    )
    group.add_argument(
        "--accum_iter", type=positive_int, default=1, help="micro-steps a step (%(default)s)"
    )
    group.add_argument(
        "--effective_batch_size",
        type=positive_int,
        metavar="N",
        help="images of a step in all processes, however many there are; sets --accum_iter (what "
        "the others give)",
    )
    group.add_argument(
        "--epochs",
        type=positive_int,
        default=epochs,
        help=f"length of the run ({epochs or by_size})",
    )
    group.add_argument(
        "--warmup_epochs",
        type=natural_float,
        help=f"rise of the learning rate ({warmup_epochs})",
    )
    group.add_argument(
        "--blr",
        type=positive_float,
        default=blr,
        help=f"learning rate for a batch of 256 ({blr or by_size})",
    )
    group.add_argument(
        "--lr", type=positive_float, help="learning rate as it is (BLR, scaled to the batch)"
    )
    group.add_argument(
        "--min_lr", type=natural_float, default=min_lr, help="where the cosine ends (%(default)s)"
    )
    group.add_argument(
        "--weight_decay", type=natural_float, default=weight_decay, help="(%(default)s)"
    )
    group.add_argument("--clip_grad", type=positive_float, help="largest gradient norm (off)")


def check_batch_args(args: argparse.Namespace) -> None:
    """Refuse sizes of batches that leave a step's images open, or say them twice."""
    if args.batch_size == "auto" and args.effective_batch_size is None:
        raise InputError(
            "--batch_size auto needs --effective_batch_size, such as 4096: the learning rate "
            "follows from it"
        )
    if args.effective_batch_size is not None and args.accum_iter > 1:
        raise InputError("--effective_batch_size sets --accum_iter: give only one of them")


def check_warmup(warmup_epochs: float | None, epochs: int) -> None:
    """Refuse a warm-up that never ends."""
    if warmup_epochs is not None and warmup_epochs >= epochs:
        raise InputError(
            f"--warmup_epochs {warmup_epochs:g} is not below --epochs {epochs}: the learning rate "
            "would never reach its peak"
        )


def schedule_settings(
    args: argparse.Namespace, *, epochs: int, warmup_epochs: float, lr: float, amp: str
) -> dict:
    """What may change when a run is continued, with the values that were found."""
    return {
        "--epochs": epochs,
        "--warmup_epochs": warmup_epochs,
        "lr": lr,
        "--min_lr": args.min_lr,
        "--clip_grad": args.clip_grad,
        "--amp": amp,
        "--data_path": args.data_path,
        "--val_path": args.val_path,
        "processes": world_size(),
    }


def add_precision_args(
    parser: argparse.ArgumentParser, *, compile_modes: Sequence[str] = ("whole",)
) -> None:
    """In which numbers and by which kernels a step is computed."""
    group = parser.add_argument_group("precision and kernels")
    group.add_argument(
        "--amp", choices=AMP_DTYPES, help="number format (bf16 where the device has it, else fp32)"
    )
    group.add_argument(
        "--attention_backend",
        choices=("auto", *ATTENTION_BACKENDS),
        default="auto",
        help="PyTorch's attention kernel; a forced one runs or fails (%(default)s)",
    )
    by_blocks = ", or block by block, which compiles faster" if "blocks" in compile_modes else ""
    group.add_argument(
        "--compile",
        nargs="?",
        const="whole",
        choices=compile_modes,
        help=f"torch.compile the model as a whole{by_blocks} (off)",
    )


def add_memory_args(parser: argparse.ArgumentParser) -> None:
    """What a step keeps for its backward pass."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--memory",
        choices=MEMORY_MODES,
        default="high",
        help="what a step keeps of an image: high is all of it and fastest; medium computes norms "
        "and activations twice, low the MLPs as well, with the same results (%(default)s)",
    )
    group.add_argument(
        "--fsdp",
        action="store_true",
        help="spread weights, gradients and optimizer over the processes, for models that one GPU "
        "does not hold (off)",
    )


def check_sharding_args(args: argparse.Namespace) -> None:
    """Refuse what does not go with --fsdp."""
    if args.fsdp and args.compile:
        raise InputError("--compile does not go with --fsdp: leave one of them out")
    if args.fsdp and args.amp == "fp16":
        raise InputError("--amp fp16 does not go with --fsdp: use bf16 or fp32")
    if args.fsdp and args.batch_size == "auto":
        raise InputError("--batch_size auto does not go with --fsdp: give a number")
