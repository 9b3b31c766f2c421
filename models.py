"""Models by name, and from files of weights."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models_crossmae import MaskedAutoencoder, build_crossmae
from models_mae import build_mae
from models_upernet import SegmentationViT
from models_vit import VisionTransformer, build_vit, make_probe
from models_vitdet import DetectionViT
from util.errors import InputError, as_input_error
from util.kernels import use_fast_kernels
from util.masking import MASK_SAMPLINGS
from util.normalization import RGB8, PixelFormat, usual_colors
from util.progress import waiting
from util.settings.model import METHODS, SIZES
from util.weights.decoder import decoder_weights, load_decoder, load_final_norm
from util.weights.encoder import (
    EncoderWeights,
    StartingPoint,
    find_encoder,
    hash_weights,
    input_format,
    load_encoder,
    read_encoder,
)
from util.weights.files import check_format, unknown_content
from util.weights.locations import read_weights
from util.weights.metadata import check_mean_std, check_pixels
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
    mean: Sequence[float] | str | None,
    std: Sequence[float] | str | None,
    pixels: PixelFormat = RGB8,
) -> StartingPoint:
    """Read an encoder's weights and the input format that they need.

    Args:
        path: a file that `read_encoder` reads; None starts from random weights.
        model: such as vit_base_patch16; None is the size of the weights, or ViT-B/16.
        img_size, mean, std: None is what the weights were trained with, "auto" to be measured.
        pixels: as far as it says nothing, it is what the weights were trained with.

    Raises:
        InputError: the file cannot be read (see `read_encoder`), or its size is unknown.
    """
    weights = read_encoder(path) if path else None
    with as_input_error(f"{path} cannot be loaded"):
        size = choose_size(model, weights and weights.shape)
    default_size = SIZES[size].img_size
    if weights is not None:
        pixels = pixels.or_those_of(weights.pixels)
        if weights.tile is not None:
            text = "%s was trained on windows of %d px of larger images (--tile)"
            _logger.info(text, path, weights.tile)
    is_told = mean is not None or std is not None
    if weights is not None and weights.in_chans == pixels.num_channels:
        is_told = is_told or weights.mean is not None or weights.std is not None
    colors = {"mean": mean, "std": std, "pixels": pixels}
    img_size, mean, std = input_format(
        weights, img_size=img_size, default_size=default_size, **colors
    )
    return StartingPoint(weights, size, img_size, mean, std, pixels, is_told)


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
    mean: Sequence[float] | str | None = None,
    std: Sequence[float] | str | None = None,
    pixels: PixelFormat = RGB8,
    pool: str | None = None,
) -> tuple[VisionTransformer, StartingPoint]:
    """Load a classifier, which may be a probe, on the CPU and in evaluation mode.

    Args:
        path: a file with a head that `read_encoder` reads.
        model: such as vit_base_patch16; None is the size of the weights.
        img_size, mean, std, pool: None is what the weights were trained with.
        pixels: see `starting_point`.

    Returns:
        The model; and its weights, with the classes and the like, and its input format.

    Raises:
        InputError: the file cannot be read (see `read_encoder`), has no head, or does not fit; or
            its mean and std are unknown.
    """
    start = starting_point(path, model, img_size=img_size, mean=mean, std=std, pixels=pixels)
    weights = start.weights
    if weights.num_classes is None:
        raise InputError(f"{path} has no head: fine-tune it first, or use another file")
    classifier = build_classifier(
        start.size,
        img_size=start.img_size,
        num_classes=weights.num_classes,
        **weights.pooling | ({"pool": pool} if pool else {}),
        **start.pixels.model_options,
    )
    if weights.is_probe:
        make_probe(classifier, weights.num_classes)
    load_encoder(classifier, weights, head=True)
    start.check_colors()
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
        The model, and the checkpoint's other content: `classes`, `mean`, `std`, `pixels` (a
        PixelFormat) and the like.

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
        content["pixels"] = check_pixels(content, options)
        colors = content["mean"], content["std"]
        if None in check_mean_std(*colors, path, pixels=content["pixels"]):
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
        The model; and its `model_name`, with the `mean`, `std`, `pixels` (a PixelFormat),
        `tile`, `mask_ratio`, `mask_sampling` and `epoch` of its training; the last is None if it
        is unknown.

    Raises:
        InputError: the file is missing, damaged or does not hold a masked autoencoder.
    """
    content, _ = read_weights(path)
    stored = _read_autoencoder(content, path)
    with unknown_content(path):
        model = build_model(stored.name, stored.options)
        model.load_state_dict(stored.state)
    return model.eval(), stored.training | {"model_name": stored.name}


class StoredAutoencoder(NamedTuple):
    """The masked autoencoder of a file."""

    name: str
    options: dict[str, object]
    """Name and options of its builder."""
    empty: MaskedAutoencoder
    """The model on the meta device, without its weights."""
    state: dict[str, Tensor]
    training: dict[str, object]
    """What `load_model` returns of it, besides the name."""


def _read_autoencoder(content: dict, path: str | Path) -> StoredAutoencoder:
    """Find a masked autoencoder in a file's content.

    Raises:
        InputError: there is none.
    """
    with unknown_content(path):
        return _find_autoencoder(content, path)


def _find_autoencoder(content: dict, path: str | Path) -> StoredAutoencoder:
    if "format" in content:
        checkpoint = check_format(content, path, "pretrain")
        pixels = check_pixels(checkpoint, checkpoint["model_options"])
        mean, std = check_mean_std(checkpoint["mean"], checkpoint["std"], path, pixels=pixels)
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
        ratio, sampling, epoch = 0.75, "random", None
        with as_input_error(f"{path} cannot be loaded", InputError, ValueError):
            found = released_options(released, args)
            size = find_size(found["patch_size"], found["embed_dim"], found["depth"])
            state = from_released(released)
        pixels = check_pixels({}, found["options"])
        mean, std = usual_colors(pixels.num_channels)
        name, options = f"{found['kind']}_vit_{size}", found["options"]
    with torch.device("meta"):  # a file may claim a model larger than memory
        empty = build_model(name, options)
    expected = empty.state_dict()
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in expected.items()}:
        raise InputError(f"{path} claims to be a {name}, but its weights are not: use another file")
    training = {"mean": mean, "std": std, "pixels": pixels, "epoch": epoch}
    training["tile"] = content.get("tile")
    training |= {"mask_ratio": ratio, "mask_sampling": sampling}
    return StoredAutoencoder(name, options, empty, state, training)


@waiting("reading the weights")
def start_from(
    model: MaskedAutoencoder,
    name: str,
    path: str | Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> str:
    """Load a file's weights into a new model, and log what of it is loaded and what is new.

    The decoder is loaded if the file has one of the same layers. Positions are resampled to another
    image size, and the first and last layer adapted to another number of channels.

    Args:
        name: of the model, such as crossmae_vit_base_patch16.
        path: a file that `read_encoder` reads; or its address, see `local_path`.
        mean, std: of the run's images, per channel.

    Returns:
        A hash of the file's encoder, head and decoder.

    Raises:
        WeightsNotFoundError: it does not exist, or its address cannot be reached.
        InputError: the file cannot be read, or its encoder is of another size.
    """
    content, folder = read_weights(path)
    weights = find_encoder(content, folder, path)
    _check_size(weights, name, path)
    stored = _find_decoder(content, path)
    decoder = {} if stored is None else decoder_weights(stored.state, path)
    load_encoder(model.encoder, weights, head=False)
    if stored is None or not load_decoder(model, decoder, stored.empty, stored.name, path):
        load_final_norm(model.decoder, weights.head_state)
    colors = {"--mean": (weights.mean, list(mean)), "--std": (weights.std, list(std))}
    others = [
        f"{flag} {' '.join(f'{value:g}' for value in theirs)}"
        for flag, (theirs, ours) in colors.items()
        if theirs is not None and theirs != ours and len(theirs) == len(ours)
    ]
    if others:
        _logger.info("%s was trained with %s, unlike this run", path, " ".join(others))
    return hash_weights({**weights.encoder, **weights.head_state, **decoder})


def _check_size(weights: EncoderWeights, name: str, path: str | Path) -> None:
    """Refuse the encoder of another size than that of a masked autoencoder of MODELS."""
    method, _, own_size = name.partition("_vit_")
    with as_input_error(f"{path} cannot be loaded"):
        size = find_size(*weights.shape)
    if size != own_size:
        raise InputError(
            f"{path} holds a vit_{size}, not a vit_{own_size}: use --model {method}_vit_{size}, or "
            "another file"
        )


def _find_decoder(content: dict, path: str | Path) -> StoredAutoencoder | None:
    """Find a masked autoencoder whose decoder may be loaded; if there is none, log it.

    Raises:
        InputError: a checkpoint of this project is not what it claims to be.
    """
    if content.get("format") == "crossmae-pretrain":
        return _read_autoencoder(content, path)
    reason = f"{path} has none that this program reads"
    released = content.get("model", content)
    if isinstance(released, dict) and "mask_token" in released:
        try:
            return _read_autoencoder(content, path)
        except InputError as error:
            reason = str(error)
    _logger.info("the decoder starts from random weights: %s", reason)
    return None
