"""The layout of the released MAE and CrossMAE: {"model": weights}, with the decoder."""

import logging
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from models import build_model, find_size, load_model
from models_crossmae import MaskedAutoencoder
from scripts.export.source import Source, complete, linear_head, without_fc_norm
from util.errors import InputError
from util.weights.files import write_new
from util.weights.released import released_options, to_released

_logger = logging.getLogger(__name__)


def write_mae(source: Source, output: Path) -> None:
    """Write a file that MAE's code and what builds on it load.

    Raises:
        InputError: the suffix is not .pth, MAE lacks such images or such a head, or the file cannot
            be written.
    """
    weights = source.weights
    if output.suffix != ".pth":
        raise InputError(f"--output {output} must end in .pth with --format mae")
    if weights.img_size[0] != weights.img_size[1]:
        raise InputError(
            "--format mae is for square images only, because its files do not say their size: use "
            "--format timm"
        )
    if weights.pool == "norm_avg":
        raise InputError(
            "MAE has no head on the mean of normalized tokens: use --format timm or --encoder_only"
        )
    content = None
    if weights.num_classes is not None:
        # A probe's normalization has a place in MAE, a regression's scale has none.
        known = linear_head(weights) if weights.target_scale else weights
        content = {"model": {**known.encoder, **known.head_state}}
    elif not source.encoder_only:
        content = whole_content(source)
    if content is None:
        content = {"model": complete(without_fc_norm(weights), source.size).state_dict()}
    write_new(output, partial(torch.save, content))
    _logger.info("torch.load(%r)['model'], as in released files, without mean and std", str(output))


def whole_content(source: Source) -> dict | None:
    """Return the content of a file with the decoder; if there cannot be one, log why not."""
    if source.method is None:
        reason = "the checkpoint has none that this project can read"
    else:
        model, _ = load_model(source.checkpoint)
        try:
            state, args = to_released(model.state_dict()), training_args(model)
            differing = differences(model, state, args)
        except InputError as error:
            reason = str(error)
        else:
            if not differing:
                # Only where it is needed: torch.load refuses it by default.
                return {"model": state, **({"args": Namespace(**args)} if args else {})}
            reason = f"the released code has no option for its {', '.join(differing)}"
    _logger.info("leaving out the decoder: %s", reason)
    return None


def training_args(model: MaskedAutoencoder) -> dict[str, object]:
    """Return the released code's arguments that `released_options` does not see in the weights."""
    args, mixer = {}, model.mixer
    if not model.norm_pix_loss:
        args["norm_pix_loss"] = False
    if mixer is not None and len(mixer.map_ids) <= len(model.encoder.blocks):
        blocks = [index - 1 for index in mixer.map_ids if index > 0]
        args |= {"weight_fm": True, "use_input": 0 in mixer.map_ids, "use_fm": blocks}
    return args


def differences(
    model: MaskedAutoencoder, state: dict[str, Tensor], args: dict[str, object]
) -> list[str]:
    """Name the parts of a model that would not come back from a file of the released layout."""
    found = released_options(state, args)
    size = find_size(found["patch_size"], found["embed_dim"], found["depth"])
    with torch.device("meta"):
        again = parts(build_model(f"{found['kind']}_vit_{size}", found["options"]))
    return [name for name, part in parts(model).items() if part != again[name]]


def parts(model: MaskedAutoencoder) -> dict[str, object]:
    """Return everything about a model besides the values of its weights."""
    mixer = model.mixer
    return {
        "inter-block attention": mixer and (mixer.map_ids, mixer.softmax),
        "attention heads": [getattr(module, "num_heads", None) for module in model.modules()],
        "norm_pix_loss": model.norm_pix_loss,
        "weights": {name: tensor.shape for name, tensor in model.state_dict().items()},
    }
