"""Decoders of masked autoencoders: whether that of a file fits a new model, and loading it."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from util.errors import InputError, counted
from util.weights.channels import adapt_prediction
from util.weights.encoder import resample_positions

# Names in every decoder of this project. These weights also depend on the images' form.
POSITIONS, PREDICTION = "pos_embed", ("pred.weight", "pred.bias")
FINAL_NORM = "context_norm"  # of a decoder that reads the last feature map

_logger = logging.getLogger(__name__)


def decoder_weights(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Return the weights of a masked autoencoder's decoder in float32.

    Args:
        path: for messages.

    Raises:
        InputError: one is not finite.
    """
    weights = {
        name.removeprefix("decoder."): tensor.detach().float()
        for name, tensor in state.items()
        if name.startswith("decoder.")
    }
    bad = next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)
    if bad:
        raise InputError(
            f"{path} has values in decoder.{bad} that are not finite: use another file"
        )
    return weights


def load_decoder(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    theirs: nn.Module,
    name: str,
    path: str | Path,
) -> bool:
    """Load the decoder of a file into a masked autoencoder if its layers are the same; log it.

    Args:
        weights: of the file's decoder.
        theirs: the masked autoencoder in the file, which may be on the meta device.
        name: of that autoencoder, such as mae_vit_base_patch16.
        path: for messages.

    Returns:
        Whether it is loaded.
    """
    if difference := different_decoder(theirs, model, name):
        _logger.warning(
            "the decoder starts from random weights, because that of %s %s", path, difference
        )
        return False
    state = fit_decoder(model, weights, theirs)
    model.decoder.load_state_dict(state, strict=False)
    _logger.info("loaded %s of the decoder", counted(len(state), "tensor"))
    before, channels = theirs.encoder.in_chans, model.encoder.in_chans
    if theirs.norm_pix_loss != model.norm_pix_loss:
        predicted = "normalized pixels" if theirs.norm_pix_loss else "pixels as they are"
        _logger.info(
            "prediction layer from random weights: that of %s predicts %s", path, predicted
        )
    elif channels != before:
        _logger.info("prediction layer adapted from %s to %d", counted(before, "channel"), channels)
    return True


def fit_decoder(
    model: nn.Module, weights: Mapping[str, Tensor], theirs: nn.Module
) -> dict[str, Tensor]:
    """Return what `load_decoder` loads: resampled and adapted.

    Positions are resampled as the encoder's are, because attention between the two relies on both.
    A prediction layer is left out if it predicts normalized pixels and the model does not, or the
    other way around.
    """
    state = dict(weights)
    if POSITIONS in state:
        grids = theirs.encoder.grid_size, model.encoder.grid_size
        state[POSITIONS] = resample_positions(state[POSITIONS], *grids)
    channels = theirs.encoder.in_chans, model.encoder.in_chans
    for name in PREDICTION:
        prediction = state.pop(name, None)
        if prediction is not None and theirs.norm_pix_loss == model.norm_pix_loss:
            state[name] = adapt_prediction(prediction, *channels)
    return state


def different_decoder(theirs: nn.Module, ours: nn.Module, name: str) -> str | None:
    """Say how the decoder of another masked autoencoder differs; None if its layers are the same.

    Args:
        name: of the other autoencoder.
    """
    if type(theirs.decoder) is not type(ours.decoder):
        return f"is another: it is loaded with --model {name}"
    wanted, found = _settings(theirs), _settings(ours)
    other = {flag: value for flag, value in wanted.items() if value != found[flag]}
    values = [f"{flag} {value}" for flag, value in other.items() if not isinstance(value, bool)]
    given = " ".join([*values, *(flag for flag, value in other.items() if value is True)])
    left_out = " ".join(flag for flag, value in other.items() if value is False)
    ways = [*([f"with {given}"] if given else []), *([f"without {left_out}"] if left_out else [])]
    if ways:
        return f"is another: it is loaded {' and '.join(ways)}"
    return None if _layers(theirs.decoder) == _layers(ours.decoder) else "has other layers"


def _settings(model: nn.Module) -> dict[str, object]:
    """Return the settings of a model's decoder by their flags; None for what it does not have."""
    decoder = model.decoder
    blocks = getattr(decoder, "blocks", ())
    mixer = getattr(decoder, "inter_block_attention", None)
    token = getattr(decoder, "mask_token", None)
    heads = (m.num_heads for m in decoder.modules() if hasattr(m, "num_heads"))
    maps = "last" if mixer is None else ",".join(map(str, mixer.map_ids))
    if mixer is not None and len(mixer.map_ids) == 1 + len(model.encoder.blocks):
        maps = "all"
    return {
        "--decoder_depth": len(blocks),
        "--decoder_embed_dim": None if token is None else token.shape[-1],
        "--decoder_num_heads": next(heads, None),
        "--feature_maps": maps,
        "--decoder_self_attention": any(getattr(b, "self_attn", None) is not None for b in blocks),
        "--iba_softmax": mixer is not None and mixer.softmax,
        "--iba_projection": mixer is not None and mixer.projections is not None,
    }


def _layers(decoder: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a decoder's weights that do not depend on the images."""
    form = {POSITIONS, *PREDICTION}
    return {name: t.shape for name, t in decoder.state_dict().items() if name not in form}


def load_final_norm(decoder: nn.Module, head_state: Mapping[str, Tensor]) -> None:
    """Load an encoder's final norm into a new decoder that normalizes the last feature map."""
    names = [name for name in head_state if name.startswith("norm.")]
    norm = getattr(decoder, FINAL_NORM, None)
    if names and norm is not None and getattr(decoder, "inter_block_attention", None) is None:
        norm.load_state_dict({name.removeprefix("norm."): head_state[name] for name in names})
        _logger.info("the encoder's final norm is loaded into the decoder (%s)", FINAL_NORM)
