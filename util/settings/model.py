"""Settings and flags of models, and the sizes of ViTs."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from util.arguments import fraction, natural_float, natural_int, positive_int
from util.errors import InputError


class ModelSize(NamedTuple):
    """An encoder's size (Sec. 4, App. A.6)."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    img_size: int = 224
    mlp_dim: int | None = None
    """None is 4 x embed_dim."""


SIZES = {
    "micro_patch4": ModelSize(4, 128, 6, 4, img_size=32),  # for a first look on a CPU
    "tiny_patch4": ModelSize(4, 192, 12, 3, img_size=32),
    "tiny_patch16": ModelSize(16, 192, 12, 3),
    "small_patch16": ModelSize(16, 384, 12, 6),
    "base_patch16": ModelSize(16, 768, 12, 12),
    "large_patch16": ModelSize(16, 1024, 24, 16),
    "huge_patch14": ModelSize(14, 1280, 32, 16),
    # Not in the paper: Zhai et al., Scaling Vision Transformers, Table 2.
    "giant_patch14": ModelSize(14, 1408, 40, 16, mlp_dim=6144),
}


METHODS = ("crossmae", "mae")
MODEL_NAMES = tuple(f"{method}_vit_{size}" for method in METHODS for size in SIZES)
POOLS = ("avg", "cls", "norm_avg")
ATTENTION = "attention"  # a pool with weights of its own, which only probes train
PROBES = ("linear", "attentive")
IBA_INITS = ("normal", "xavier")
HEADS = ("linear", "upernet")  # of segmentation


@dataclass(frozen=True)
class ModelSettings:
    """The network to pre-train (Sec. 3, Tables 3, 7, 8, 9); None is the model's default.

    Raises:
        InputError: the model does not have an option that is given.
    """

    model: str
    norm_pix_loss: bool = True
    decoder_depth: int | None = None
    decoder_embed_dim: int | None = None
    decoder_num_heads: int | None = None
    decoder_self_attention: bool = False
    feature_maps: str | list[int] | None = None
    iba_init: str = "normal"
    iba_softmax: bool = False
    iba_projection: bool = False

    def __post_init__(self) -> None:
        if self.decoder_self_attention and not self.model.startswith("crossmae_"):
            raise InputError(
                f"--decoder_self_attention is for CrossMAE only: leave it out for {self.model}"
            )

    @property
    def is_mae(self) -> bool:
        """Whether all masked patches are decoded together, by self-attention."""
        return self.model.startswith("mae_")

    def options(self, input_size: Sequence[int]) -> dict[str, object]:
        """Arguments of the model's builder, as plain values that a checkpoint can hold.

        Args:
            input_size: [side] or [height, width], in pixels.
        """
        options = {n: v for n, v in vars(self).items() if n != "model" and v is not None}
        if not self.model.startswith("crossmae_"):
            del options["decoder_self_attention"]
        return {"img_size": list(input_size) * (2 // len(input_size)), **options}


@dataclass(frozen=True)
class EncoderSettings:
    """The encoder to use and how it is pooled; None takes what the weights say.

    Raises:
        InputError: there is no head to keep.
    """

    finetune: str | None = None
    model: str | None = None
    pool: str | None = None
    num_classes: int | None = None
    keep_head: bool = False
    """Whether to train on from the head of the weights, too."""

    def __post_init__(self) -> None:
        if self.keep_head and not self.finetune:
            raise InputError("--keep_head needs a classifier: name it with --finetune")


NUM_QUERIES = 32  # divides the width of every size


@dataclass(frozen=True)
class ProbeSettings:
    """What is trained on which frozen features; see the flags.

    Raises:
        InputError: a setting is of the other probe.
    """

    probe: str = "linear"
    pool: str | None = None
    num_queries: int | None = None
    layer: list[int] | None = None

    def __post_init__(self) -> None:
        if self.probe == "linear" and self.num_queries is not None:
            raise InputError("--num_queries is for --probe attentive: leave it out")
        if self.probe == "attentive" and self.pool is not None:
            raise InputError("--probe attentive learns how to pool: leave --pool out")

    @property
    def options(self) -> dict[str, object]:
        """Arguments of VisionTransformer, as plain values that a checkpoint can hold."""
        options = {"pool": self.pool or "cls"}
        if self.probe == "attentive":
            options = {"pool": ATTENTION, "num_queries": self.num_queries or NUM_QUERIES}
        return options | ({"layers": sorted({*self.layer})} if self.layer else {})


HEAD_DIM, AUX_WEIGHT, DROPOUT = 768, 0.4, 0.1  # of UperNet, as in MAE


@dataclass(frozen=True)
class HeadSettings:
    """The head of a segmentation model; see the flags. None is MAE's.

    Raises:
        InputError: a setting is of the other head.
    """

    head: str = "linear"
    crop_size: tuple[int, ...] = (512,)
    out_indices: list[int] | None = None
    head_dim: int | None = None
    aux_weight: float | None = None
    dropout: float | None = None
    rel_pos_bias: bool | None = None

    def __post_init__(self) -> None:
        if len(self.crop_size) > 2:
            raise InputError("--crop_size takes one side, or a height and a width")
        if self.head == "linear":
            names = ("out_indices", "head_dim", "aux_weight", "dropout")
            for name in (n for n in names if getattr(self, n) is not None):
                raise InputError(f"--{name} is for --head upernet: leave it out")

    @property
    def crop(self) -> tuple[int, int]:
        """(height, width) of a training crop."""
        return tuple(self.crop_size) * (2 // len(self.crop_size))

    def check_batch_size(self, batch_size: int) -> None:
        """Raise InputError for 1 image: UperNet pools to one position, so batch norm needs two."""
        if self.head == "upernet" and batch_size < 2:
            raise InputError("--head upernet cannot normalize a batch of 1: use --batch_size 2")

    @property
    def auxiliary(self) -> float:
        """Weight of the auxiliary loss."""
        return AUX_WEIGHT if self.aux_weight is None else self.aux_weight

    def recipe(self, options: dict[str, object]) -> dict[str, object]:
        """Name `options` and the weight of the auxiliary loss as the flags are."""
        names = {"img_size": "--crop_size", "num_classes": "number of classes"}
        names["in_chans"] = "--channels"
        recipe = {names.get(name, f"--{name}"): value for name, value in options.items()}
        return recipe | ({"--aux_weight": self.auxiliary} if self.head == "upernet" else {})

    def options(self, **others: object) -> dict[str, object]:
        """Arguments of SegmentationViT, as plain values that a checkpoint can hold."""
        is_upernet = self.head == "upernet"
        options = {
            "img_size": list(self.crop),
            "head": self.head,
            "rel_pos_bias": is_upernet if self.rel_pos_bias is None else self.rel_pos_bias,
            **others,
        }
        if is_upernet:
            options["out_indices"] = self.out_indices
            options["head_dim"] = self.head_dim or HEAD_DIM
            options["dropout"] = DROPOUT if self.dropout is None else self.dropout
        return options


@dataclass(frozen=True)
class DetectorSettings:
    """The windows, the pyramid and the heads of a detector; see the flags."""

    input_size: int = 1024
    window_size: int = 14
    global_blocks: list[int] | None = None
    rel_pos: bool = True
    fpn_dim: int = 256
    box_convs: int = 4
    roi_batch: int = 512
    masks: bool = True

    def options(self, **others: object) -> dict[str, object]:
        """Arguments of DetectionViT, as plain values that a checkpoint can hold."""
        return {**vars(self), **others}

    @staticmethod
    def recipe(options: dict[str, object]) -> dict[str, object]:
        """Name `options` as the flags are."""
        names = {
            "img_size": "size of the positions",
            "num_classes": "number of classes",
            "rel_pos": "relative positions",
            "masks": "masks",
            "in_chans": "--channels",
        }
        return {names.get(name, f"--{name}"): value for name, value in options.items()}


def feature_map_choice(text: str) -> str | list[int]:
    """Read "all", "last" or indices separated by commas."""
    if text in ("all", "last"):
        return text
    try:
        return [int(index) for index in text.split(",")]
    except ValueError:
        message = f"must be all, last or indices such as 0,4,8,12, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def add_model_args(parser: argparse.ArgumentParser, *, model: str) -> None:
    """Add the flags of ModelSettings."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        choices=MODEL_NAMES,
        default=model,
        metavar="NAME",
        help="%(choices)s (%(default)s)",
    )
    group.add_argument(
        "--norm_pix_loss",
        action=argparse.BooleanOptionalAction,
        default=ModelSettings.norm_pix_loss,
        help="predict pixels normalized per patch (on)",
    )
    group.add_argument(
        "--decoder_depth", type=positive_int, help="decoder blocks (12 for CrossMAE, 8 for MAE)"
    )
    group.add_argument(
        "--decoder_embed_dim",
        type=positive_int,
        help="width of the decoder (512; small 256, tiny 128)",
    )
    group.add_argument(
        "--decoder_num_heads",
        type=positive_int,
        help="attention heads of the decoder (16; small 8, tiny 4)",
    )
    group.add_argument(
        "--decoder_self_attention",
        action="store_true",
        help="add self-attention to CrossMAE's decoder, Table 3a (off)",
    )
    group.add_argument(
        "--feature_maps",
        type=feature_map_choice,
        help="feature maps for inter-block attention to mix: all, or indices such as 0,4,8,12, "
        "where 0 is the encoder's input; last turns inter-block attention off, Table 3d (all for "
        "CrossMAE, last for MAE)",
    )
    group.add_argument(
        "--iba_init",
        choices=IBA_INITS,
        default=ModelSettings.iba_init,
        help="initialization of the mixing weights; the released code used xavier (%(default)s)",
    )
    group.add_argument(
        "--iba_softmax", action="store_true", help="make mixing weights sum to one, Table 8 (off)"
    )
    group.add_argument(
        "--iba_projection",
        action="store_true",
        help="apply a linear layer to each map before mixing, Table 9 (off)",
    )


def add_checkpoint_arg(group: argparse._ActionsContainer, text: str) -> None:
    """Add the flag of programs that train nothing, also by its name in those that train.

    Args:
        text: says which files it takes.
    """
    group.add_argument("--checkpoint", "--finetune", required=True, metavar="PATH", help=text)


def add_encoder_args(parser: argparse.ArgumentParser, *, pool: str | None) -> None:
    """Add the flags of EncoderSettings; `pool` is the default pooling, None if there is none."""
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--finetune",
        "--checkpoint",
        metavar="PATH",
        help="weights to start from: a checkpoint of this project or of the released CrossMAE or "
        "MAE code, or a timm or Hugging Face ViT; a path, hf-hub:OWNER/NAME, or an https:// "
        "address (none: train from scratch)",
    )
    group.add_argument(
        "--model",
        choices=[f"vit_{size}" for size in SIZES],
        metavar="NAME",
        help="%(choices)s (the size of the --finetune weights, else vit_base_patch16)",
    )
    if pool is None:
        return
    group.add_argument(
        "--pool",
        choices=POOLS,
        help="classify the mean of the patch tokens (avg), the class token (cls), or the mean of "
        f"normalized patch tokens (norm_avg) ({pool})",
    )
    group.add_argument(
        "--num_classes",
        "--nb_classes",
        type=positive_int,
        help="outputs of the head (the number of classes in the data)",
    )


def add_layer_arg(group: argparse._ActionsContainer) -> None:
    """Add the flag of the blocks that features are taken from."""
    group.add_argument(
        "--layer",
        type=natural_int,
        nargs="+",
        metavar="BLOCK",
        help="take the features of this block, counted from 1 (0: its input), or the mean of those "
        "of several; the final norm is applied to each (the last block)",
    )


def add_probe_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ProbeSettings, except for the pooling, which is the encoder's."""
    group = parser.add_argument_group("probe")
    group.add_argument(
        "--probe",
        choices=PROBES,
        default=ProbeSettings.probe,
        help="a linear classifier of the pooled features (linear), or one of all patch tokens, "
        "pooled by learned queries (attentive; Psomas et al., ICLR 2026) (%(default)s)",
    )
    group.add_argument(
        "--num_queries",
        type=positive_int,
        help=f"queries of the attentive probe, a divisor of the encoder's width ({NUM_QUERIES})",
    )
    add_layer_arg(group)


def add_head_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of HeadSettings."""
    group = parser.add_argument_group("head")
    group.add_argument(
        "--head",
        choices=HEADS,
        default=HeadSettings.head,
        help="batch norm and a 1x1 convolution on the last feature map (linear), or the paper's "
        "UperNet (upernet) (%(default)s)",
    )
    group.add_argument(
        "--crop_size",
        type=positive_int,
        nargs="+",
        default=HeadSettings.crop_size,
        metavar="PX",
        help="side of the training crops, or height and width; positions are resampled to it (512)",
    )
    group.add_argument(
        "--out_indices",
        type=natural_int,
        nargs=4,
        metavar="BLOCK",
        help="blocks that UperNet reads, from 0 (3 5 7 11 of 12, 7 11 15 23 of 24)",
    )
    group.add_argument("--head_dim", type=positive_int, help=f"width of UperNet ({HEAD_DIM})")
    group.add_argument(
        "--aux_weight",
        type=natural_float,
        help=f"weight of the loss of UperNet's auxiliary head ({AUX_WEIGHT})",
    )
    group.add_argument("--dropout", type=fraction, help=f"before UperNet's classifiers ({DROPOUT})")
    group.add_argument(
        "--rel_pos_bias",
        action=argparse.BooleanOptionalAction,
        help="learn a bias of attention for every relative position (on for upernet)",
    )


def add_detector_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of DetectorSettings."""
    group = parser.add_argument_group("detector")
    group.add_argument(
        "--input_size",
        type=positive_int,
        default=DetectorSettings.input_size,
        metavar="PX",
        help="side of the square that images are fitted into (%(default)s)",
    )
    group.add_argument(
        "--window_size",
        type=positive_int,
        default=DetectorSettings.window_size,
        metavar="PATCHES",
        help="side of a window of attention (%(default)s)",
    )
    group.add_argument(
        "--global_blocks",
        type=natural_int,
        nargs="+",
        metavar="BLOCK",
        help="blocks that attend to the whole image, from 0 (the last of every quarter)",
    )
    group.add_argument(
        "--no_rel_pos",
        dest="rel_pos",
        action="store_false",
        help="attention without relative positions (learned)",
    )
    group.add_argument(
        "--no_masks",
        dest="masks",
        action="store_false",
        help="predict boxes only, for annotations without segmentation (boxes and masks)",
    )
    group.add_argument(
        "--fpn_dim",
        type=positive_int,
        default=DetectorSettings.fpn_dim,
        help="width of the pyramid and the heads (%(default)s)",
    )
    group.add_argument(
        "--box_convs",
        type=natural_int,
        default=DetectorSettings.box_convs,
        help="convolutions of the box head (%(default)s)",
    )
    group.add_argument(
        "--roi_batch",
        type=positive_int,
        default=DetectorSettings.roi_batch,
        help="proposals of an image that the heads are trained on (%(default)s)",
    )
