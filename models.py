"""Models by name, and from files of weights."""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from models_crossmae import IBA_INITS, MaskedAutoencoder, build_crossmae
from models_mae import build_mae
from models_upernet import HEADS, SegmentationViT
from models_vit import POOLS, SIZES, VisionTransformer, build_vit, make_linear_probe
from models_vitdet import DetectionViT
from util.arguments import fraction, natural_float, natural_int, positive_int
from util.errors import InputError, as_input_error
from util.kernels import use_fast_kernels
from util.masking import MASK_SAMPLINGS
from util.weights.encoder import (
    StartingPoint,
    input_format,
    load_encoder,
    read_encoder,
)
from util.weights.files import check_format, unknown_content
from util.weights.locations import read_weights
from util.weights.metadata import check_mean_std
from util.weights.released import from_released, released_options

_logger = logging.getLogger(__name__)

# To add a decoder, write a file with a builder and add it here.
BUILDERS = {"crossmae": build_crossmae, "mae": build_mae}
MODELS: dict[str, Callable[..., MaskedAutoencoder]] = {
    f"{method}_vit_{name}": partial(build, size)
    for method, build in BUILDERS.items()
    for name, size in SIZES.items()
}
# Limits of a decoder: a larger one would exhaust the machine before it failed.
MAX_DEPTH, MAX_WIDTH = 1000, 2**14


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
        }
        return {names.get(name, f"--{name}"): value for name, value in options.items()}


def starting_point(
    path: str | Path | None,
    model: str | None = None,
    *,
    img_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> StartingPoint:
    """Read an encoder's weights and the input format that they need.

    Args:
        path: a file that `read_encoder` reads; None starts from random weights.
        model: such as vit_base_patch16; None is the size of the weights, or ViT-B/16.
        img_size, mean, std: None is what the weights were trained with.

    Raises:
        InputError: the file cannot be read (see `read_encoder`), or its size is unknown.
    """
    weights = read_encoder(path) if path else None
    with as_input_error(f"{path} cannot be loaded"):
        size = choose_size(model, weights and weights.shape)
    default_size = SIZES[size].img_size
    colors = {"mean": mean, "std": std}
    img_size, mean, std = input_format(
        weights, img_size=img_size, default_size=default_size, **colors
    )
    return StartingPoint(weights, size, img_size, mean, std)


def find_size(patch_size: int, embed_dim: int, depth: int) -> str:
    """Name of the size with this patch size, width and depth.

    Raises:
        ValueError: no named size has this shape.
    """
    shape = (patch_size, embed_dim, depth)
    for name, size in SIZES.items():
        if (size.patch_size, size.embed_dim, size.depth) == shape:
            return name
    raise ValueError(
        f"a ViT of depth {depth} and width {embed_dim} with patches of {patch_size} px is not one "
        f"of the known sizes: {', '.join(SIZES)}"
    )


def choose_size(model: str | None, shape: tuple[int, int, int] | None) -> str:
    """Name of the size of a model such as vit_base_patch16, else of the weights, else ViT-B's.

    Args:
        shape: (patch_size, embed_dim, depth) of the weights, if there are any.

    Raises:
        ValueError: the weights have an unknown size.
    """
    if model is not None:
        return model.removeprefix("vit_")
    return "base_patch16" if shape is None else find_size(*shape)


def build_model(name: str, options: dict) -> MaskedAutoencoder:
    """Build a masked autoencoder of MODELS.

    Raises:
        InputError: the options are incompatible, or leave encoder blocks untrained.
    """
    limits = {"decoder_depth": MAX_DEPTH, "decoder_embed_dim": MAX_WIDTH}
    with as_input_error(f"{name} cannot be built"):
        for option, limit in limits.items():
            if not 1 <= options.get(option, 1) <= limit:
                raise ValueError(f"{option} must be between 1 and {limit}, not {options[option]}")
        model = MODELS[name](**options)
    depth = len(model.encoder.blocks)
    if model.mixer is not None and max(model.mixer.map_ids) < depth:
        raise InputError(
            f"--feature_maps without {depth}, the last block's, would leave the encoder's last "
            f"blocks untrained: add {depth}"
        )
    use_fast_kernels(model)
    return model


def build_classifier(size: str, **options: object) -> VisionTransformer:
    """Build a classifier of a size in SIZES.

    Raises:
        InputError: the sizes are incompatible.
    """
    with as_input_error(f"vit_{size} cannot be built"):
        model = build_vit(SIZES[size], **options)
    use_fast_kernels(model.blocks)
    return model


def build_segmenter(size: str, **options: object) -> SegmentationViT:
    """Build a segmentation model of a size in SIZES.

    Args:
        options: arguments of SegmentationViT besides those of the size.

    Raises:
        InputError: the sizes are incompatible.
    """
    with as_input_error(f"vit_{size} cannot be built"):
        model = SegmentationViT(**{**SIZES[size]._asdict(), **options})
    use_fast_kernels(model.blocks)
    return model


def build_detector(size: str, **options: object) -> DetectionViT:
    """Build a detector of a size in SIZES.

    Args:
        options: arguments of DetectionViT besides those of the size.

    Raises:
        InputError: the sizes are incompatible.
    """
    with as_input_error(f"vit_{size} cannot be built"):
        model = DetectionViT(**{**SIZES[size]._asdict(), **options})
    use_fast_kernels(model.blocks)
    return model


def load_classifier(
    path: str | Path,
    model: str | None = None,
    *,
    img_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    pool: str | None = None,
) -> tuple[VisionTransformer, StartingPoint]:
    """Load a classifier, which may be a linear probe, on the CPU and in evaluation mode.

    Args:
        path: a file with a head that `read_encoder` reads.
        model: such as vit_base_patch16; None is the size of the weights.
        img_size, mean, std, pool: None is what the weights were trained with.

    Returns:
        The model; and its weights, with the classes and the like, and its input format.

    Raises:
        InputError: the file cannot be read (see `read_encoder`), has no head, or does not fit.
    """
    start = starting_point(path, model, img_size=img_size, mean=mean, std=std)
    weights = start.weights
    if weights.num_classes is None:
        raise InputError(f"{path} has no head: fine-tune it first, or use another file")
    classifier = build_classifier(
        start.size,
        img_size=start.img_size,
        num_classes=weights.num_classes,
        pool=pool or weights.pool,
    )
    if weights.is_linear_probe:
        make_linear_probe(classifier, weights.num_classes)
    load_encoder(classifier, weights, head=True)
    return classifier.eval(), start


def load_segmenter(path: str | Path) -> tuple[SegmentationViT, dict]:
    """Load a segmentation model, a checkpoint of main_segmentation.py, see `_load_trained`."""
    return _load_trained(path, "segmentation", build_segmenter)


def load_detector(path: str | Path) -> tuple[DetectionViT, dict]:
    """Load a detector, a checkpoint of main_detection.py, see `_load_trained`."""
    return _load_trained(path, "detection", build_detector)


def _load_trained(
    path: str | Path, kind: str, build: Callable[..., torch.nn.Module]
) -> tuple[torch.nn.Module, dict]:
    """Load a model on the CPU, in evaluation mode; moving averages if there are any.

    Args:
        kind: one of KINDS.
        build: size and options -> model.

    Returns:
        The model, and the checkpoint's other content: `classes`, `mean`, `std` and the like.

    Raises:
        InputError: the file is missing, damaged or not such a checkpoint.
    """
    content = check_format(read_weights(path)[0], path, kind)
    with unknown_content(path):
        size, options = content["model_name"].removeprefix("vit_"), content["model_options"]
        with torch.device("meta"):  # a file may claim a model larger than memory
            expected = build(size, **options).state_dict()
        state = content.get("ema") or content["model"]
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in expected.items()}:
            raise InputError(
                f"{path} claims to be a vit_{size}, but its weights are not: use another file"
            )
        if None in check_mean_std(content["mean"], content["std"], path):
            raise ValueError("mean and std are missing")
        model = build(size, **options)
        model.load_state_dict(state)
    return model.eval(), content


def load_model(path: str | Path) -> tuple[MaskedAutoencoder, dict]:
    """Load a pre-trained model on the CPU, in evaluation mode.

    Args:
        path: a checkpoint of this project, or of the released CrossMAE or MAE code; or its
            address, see `local_path`.

    Returns:
        The model, and its `mean`, `std`, `mask_ratio` and `mask_sampling` of training.

    Raises:
        InputError: the file is missing, damaged or does not hold a masked autoencoder.
    """
    content, _ = read_weights(path)
    with unknown_content(path):
        return _load_model(content, path)


def _load_model(content: dict, path: str | Path) -> tuple[MaskedAutoencoder, dict]:
    if "format" in content:
        checkpoint = check_format(content, path, "pretrain")
        mean, std = check_mean_std(checkpoint["mean"], checkpoint["std"], path)
        ratio, sampling = checkpoint["mask_ratio"], checkpoint["mask_sampling"]
        if not 0 < ratio < 1 or sampling not in MASK_SAMPLINGS:
            raise InputError(
                f"{path} has invalid mask settings (mask_ratio {ratio}, mask_sampling {sampling}): "
                "use another file"
            )
        name, options = checkpoint["model_name"], checkpoint["model_options"]
        state = checkpoint["model"]
    else:
        released = content.get("model", content)
        args = vars(content["args"]) if "args" in content else {}
        if "norm_pix_loss" not in args:
            _logger.info(
                "%s does not say whether it predicts pixels normalized per patch: assuming that it "
                "does, unlike MAE's mae_visualize_*.pth",
                path,
            )
        mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        ratio, sampling = 0.75, "random"
        with as_input_error(f"{path} cannot be loaded", InputError, ValueError):
            found = released_options(released, args)
            size = find_size(found["patch_size"], found["embed_dim"], found["depth"])
            state = from_released(released)
        name, options = f"{found['kind']}_vit_{size}", found["options"]
    with torch.device("meta"):  # a file may claim a model larger than memory
        expected = build_model(name, options).state_dict()
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in expected.items()}:
        raise InputError(f"{path} claims to be a {name}, but its weights are not: use another file")
    model = build_model(name, options)
    model.load_state_dict(state)
    training = {"mean": mean, "std": std, "mask_ratio": ratio, "mask_sampling": sampling}
    return model.eval(), training


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
        "--model", choices=MODELS, default=model, metavar="NAME", help="%(choices)s (%(default)s)"
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


def add_encoder_args(parser: argparse.ArgumentParser, *, pool: str | None) -> None:
    """Add the flags of EncoderSettings; `pool` is the default pooling, None if there is none."""
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--finetune",
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
