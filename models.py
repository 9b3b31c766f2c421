"""Models by their names, and from files of weights: the one place that knows both."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from models_crossmae import MaskedAutoencoder, build_crossmae
from models_mae import build_mae
from models_vit import SIZES, VisionTransformer, build_vit
from util.errors import InputError, value_errors_are_input_errors
from util.kernels import use_fast_kernels
from util.masking import MASK_SAMPLINGS
from util.weights.encoder import checked_colours
from util.weights.files import check_format, read_weights_file, strange_content_is_input_error
from util.weights.released import from_released, released_options

BUILDERS = {"crossmae": build_crossmae, "mae": build_mae}
MODELS: dict[str, Callable[..., MaskedAutoencoder]] = {
    f"{method}_vit_{name}": partial(build, size)
    for method, build in BUILDERS.items()
    for name, size in SIZES.items()
}
# Of a decoder; beyond them no machine could build one, and some would try until they stand still.
MAX_DEPTH, MAX_WIDTH = 1000, 2**14


def find_size(patch_size: int, embed_dim: int, depth: int) -> str:
    """The name in SIZES of what weights have been measured to be.

    Raises:
        ValueError: no size is like that.
    """
    shape = (patch_size, embed_dim, depth)
    for name, size in SIZES.items():
        if (size.patch_size, size.embed_dim, size.depth) == shape:
            return name
    raise ValueError(
        f"a ViT of {depth} blocks, {embed_dim} wide, on patches of {patch_size} px is none of the "
        f"sizes {', '.join(SIZES)}"
    )


def choose_size(model: str | None, shape: tuple[int, int, int] | None) -> str:
    """The name in SIZES of a model such as vit_base_patch16, else of weights, else ViT-B's.

    Args:
        model: as the user names it, if they do.
        shape: (patch_size, embed_dim, depth) of the weights, if there are any.

    Raises:
        ValueError: no size is like that.
    """
    if model is not None:
        return model.removeprefix("vit_")
    return "base_patch16" if shape is None else find_size(*shape)


def build_model(name: str, options: dict) -> MaskedAutoencoder:
    """Build a model of MODELS.

    Raises:
        InputError: the options do not fit together, or leave encoder blocks untrained.
    """
    depth, width = options.get("decoder_depth", 1), options.get("decoder_embed_dim", 1)
    with value_errors_are_input_errors(f"{name} cannot be built"):
        if not (1 <= depth <= MAX_DEPTH and 1 <= width <= MAX_WIDTH):
            raise ValueError(
                f"a decoder has 1 to {MAX_DEPTH} blocks, 1 to {MAX_WIDTH} wide, not {depth} "
                f"blocks, {width} wide"
            )
        model = MODELS[name](**options)
    depth = len(model.encoder.blocks)
    if model.mixer is not None and max(model.mixer.map_ids) < depth:
        raise InputError(
            f"--feature_maps without {depth}, the last block's, would leave the encoder's last "
            "blocks untrained: add it"
        )
    use_fast_kernels(model)
    return model


def build_classifier(size: str, **options: object) -> VisionTransformer:
    """Build a classifier.

    Raises:
        InputError: the sizes do not fit together.
    """
    with value_errors_are_input_errors(f"vit_{size} cannot be built"):
        model = build_vit(SIZES[size], **options)
    use_fast_kernels(model.blocks)
    return model


def load_model(path: str | Path) -> tuple[MaskedAutoencoder, dict]:
    """Load a pre-trained model, in evaluation mode on the CPU.

    Args:
        path: a checkpoint of ours, or of the released CrossMAE or MAE code.

    Returns:
        The model, and how it was trained: `mean`, `std`, `mask_ratio`, `mask_sampling`.

    Raises:
        InputError: the file is missing, damaged or holds no masked autoencoder.
    """
    content = read_weights_file(path)
    with strange_content_is_input_error(path):
        return _load_model(content, path)


def _load_model(content: dict, path: str | Path) -> tuple[MaskedAutoencoder, dict]:
    if "format" in content:
        checkpoint = check_format(content, path, "pretrain")
        mean, std = checked_colours(checkpoint["mean"], checkpoint["std"])
        ratio, sampling = checkpoint["mask_ratio"], checkpoint["mask_sampling"]
        if not 0 < ratio < 1 or sampling not in MASK_SAMPLINGS:
            raise InputError(f"{path} tells of masks that there are none of: use another file")
        name, options = checkpoint["model_name"], checkpoint["model_options"]
        state = checkpoint["model"]
    else:
        released = content.get("model", content)
        args = vars(content["args"]) if "args" in content else {}
        found = released_options(released, args)
        mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        ratio, sampling = 0.75, "random"
        try:
            size = find_size(found["patch_size"], found["embed_dim"], found["depth"])
        except ValueError as error:
            raise InputError(f"{path} cannot be loaded: {error}") from error
        name, options = f"{found['kind']}_vit_{size}", found["options"]
        state = from_released(released)
    with torch.device("meta"):  # a file can tell of a model that is larger than the memory
        expected = build_model(name, options).state_dict()
    if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in expected.items()}:
        raise InputError(f"{path} does not hold the weights of the {name} that it tells of")
    model = build_model(name, options)
    model.load_state_dict(state)
    training = {"mean": mean, "std": std, "mask_ratio": ratio, "mask_sampling": sampling}
    return model.eval(), training
