"""Models by name, and from files of weights."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from models_crossmae import MaskedAutoencoder, build_crossmae
from models_mae import build_mae
from models_upernet import SegmentationViT
from models_vit import VisionTransformer, build_vit, make_linear_probe
from models_vitdet import DetectionViT
from util.errors import InputError, as_input_error
from util.kernels import use_fast_kernels
from util.masking import MASK_SAMPLINGS
from util.normalization import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from util.settings.model import METHODS, SIZES
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

# To add a decoder, write a file with a builder, and add it here and to METHODS.
BUILDERS = {"crossmae": build_crossmae, "mae": build_mae}
MODELS: dict[str, Callable[..., MaskedAutoencoder]] = {
    f"{method}_vit_{name}": partial(BUILDERS[method], size)
    for method in METHODS
    for name, size in SIZES.items()
}
# Limits of a decoder: a larger one would exhaust the machine before it failed.
MAX_DEPTH, MAX_WIDTH = 1000, 2**14


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
        The model; and its `model_name`, with the `mean`, `std`, `mask_ratio`, `mask_sampling` and
        `epoch` of its training; the last is None if it is unknown.

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
        state, epoch = checkpoint["model"], checkpoint.get("progress", {}).get("epoch")
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
        ratio, sampling, epoch = 0.75, "random", None
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
    return model.eval(), training | {"model_name": name, "epoch": epoch}
