"""Hugging Face: a folder for transformers' `from_pretrained`."""

import logging
from functools import partial
from pathlib import Path

from PIL.Image import Resampling
from torch import Tensor

from models import load_model
from models_crossmae import MaskedAutoencoder
from models_vit import NORM_EPS
from scripts.export.folder import check_folder_name, model_card, write_folder
from scripts.export.source import (
    Preparation,
    Source,
    complete,
    linear_head,
    problem_type,
    reading_settings,
    without_fc_norm,
)
from util.errors import InputError
from util.settings.model import SIZES
from util.weights.encoder import EncoderWeights
from util.weights.files import write_new
from util.weights.names import DECODER_NAMES, ENCODER_NAMES, hugging_face_names

SQUEEZED = (
    "The processor squeezes the whole image to the input's size instead, because transformers "
    "cannot resize an image to cover a rectangle."
)

NOT_RGB = (
    "The processor takes an array of a file's numbers, (height, width, channels), with "
    '`input_data_format="channels_last"`.'
)
NOT_SCALED = "It does not scale them: do that before."

_logger = logging.getLogger(__name__)


def write_hugging_face(source: Source, output: Path) -> None:
    """Write a folder with a classifier, a whole MAE, or an encoder, and log the call.

    Raises:
        InputError: Hugging Face lacks such a head, or the folder cannot be written.
    """
    config, changes, option = vit_config(source.weights, source.size), {}, ""
    if source.weights.num_classes is not None:
        state, changes = classifier(source)
    else:
        state = encoder(source)
        mae = read_mae(source)
        if mae is not None:
            state, changes = whole_mae(state, *mae)
        else:
            option = ", add_pooling_layer=False"
    config |= changes
    name = config["architectures"][0]
    usage = (
        f"from transformers import AutoImageProcessor, {name}\n\n"
        'processor = AutoImageProcessor.from_pretrained("FOLDER")\n'
        f'model = {name}.from_pretrained("FOLDER"{option})'
    )
    notes = [SQUEEZED] if is_squeezed(source.images) else []
    if not source.images.pixels.is_rgb8:
        notes.append(NOT_RGB)
        notes += [] if source.images.pixels.value_range else [NOT_SCALED]
    for note in notes:
        _logger.info(note)
    card = model_card(source, library="transformers", usage=usage, more=" ".join(notes))
    settings = {
        "config.json": config,
        "preprocessor_config.json": processor_config(source.images),
    }
    check_folder_name(output)
    write_new(output, partial(write_folder, state, settings, card))
    _logger.info("transformers.%s.from_pretrained(%r%s)", name, str(output), option)


def classifier(source: Source) -> tuple[dict[str, Tensor], dict]:
    """Return the weights of a ViTForImageClassification, and its part of config.json."""
    weights = linear_head(source.weights)
    if weights.pool != "cls":
        raise InputError(
            "Hugging Face's ViT classifies the class token, but this head classifies the mean of "
            "the patch tokens: use --format timm, which transformers reads, too, or --encoder_only"
        )
    model = complete(weights, source.size)
    state = model.state_dict()
    head = {f"classifier.{kind}": state.pop(f"head.{kind}") for kind in ("weight", "bias")}
    names = weights.classes or [f"LABEL_{i}" for i in range(weights.num_classes)]
    changes = {
        "architectures": ["ViTForImageClassification"],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": problem_type(weights),
    }
    return {**prefixed(encoder_names(state)), **head}, changes


def whole_mae(
    encoder_state: dict[str, Tensor], mae: MaskedAutoencoder, mask_ratio: float
) -> tuple[dict[str, Tensor], dict]:
    """Return the weights of a ViTMAEForPreTraining, and its part of config.json."""
    theirs = mae.decoder.state_dict().items()
    parts = {name: t for name, t in theirs if not name.startswith("context_norm.")}
    decoder = hugging_face_names(parts, DECODER_NAMES, layers="decoder.decoder_layers")
    block = mae.decoder.blocks[0]
    changes = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": block.norm1.weight.shape[0],
        "decoder_num_hidden_layers": len(mae.decoder.blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": mask_ratio,
        "norm_pix_loss": mae.norm_pix_loss,
    }
    return {**prefixed(encoder_state), **decoder}, changes


def encoder(source: Source) -> dict[str, Tensor]:
    """Return the weights of a ViTModel, whose layernorm acts on every token, unlike fc_norm."""
    weights = without_fc_norm(source.weights)
    lost = [name for name in source.weights.head_state if name not in weights.head_state]
    if lost:
        _logger.info("left out, because ViTModel lacks it: %s", ", ".join(lost))
    return encoder_names(complete(weights, source.size).state_dict())


def encoder_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an encoder."""
    return hugging_face_names(state, ENCODER_NAMES, layers="encoder.layer")


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of an encoder that is part of another model."""
    return {f"vit.{name}": tensor for name, tensor in state.items()}


def read_mae(source: Source) -> tuple[MaskedAutoencoder, float] | None:
    """Load a whole model and its mask ratio if ViTMAE can represent it; otherwise, log why not."""
    if source.encoder_only:
        return None
    if source.method == "CrossMAE":
        reason = "ViTMAE has no decoder with cross-attention"
    elif source.method != "MAE":
        reason = "the checkpoint has no decoder"
    else:
        model, training = load_model(source.checkpoint)
        if model.mixer is not None:
            reason = "ViTMAE has no inter-block attention"
        elif model.encoder.img_size[0] != model.encoder.img_size[1]:
            reason = "ViTMAE takes square images only"
        else:
            return model, training["mask_ratio"]
    _logger.info("exporting only the encoder, as ViTModel: %s", reason)
    return None


def vit_config(weights: EncoderWeights, size: str) -> dict:
    """Return the config.json of a ViTModel."""
    height, width = weights.img_size
    patch_size, embed_dim, depth = weights.shape
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": embed_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": SIZES[size].num_heads,
        "intermediate_size": weights.mlp_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": NORM_EPS,
        "image_size": height if height == width else [height, width],
        "patch_size": patch_size,
        "num_channels": weights.in_chans,
        **reading_settings(weights),
        "qkv_bias": True,
        "torch_dtype": "float32",
    }


def is_squeezed(images: Preparation) -> bool:
    """Whether transformers cannot crop images as in evaluation."""
    height, width = images.img_size
    return height != width and not images.squash


def processor_config(images: Preparation) -> dict:
    """Return the preprocessor_config.json, which prepares images as in evaluation if it can."""
    height, width = images.img_size
    mean, factor = images.mean, 1 / 255
    if images.pixels.value_range:  # (x * factor - mean) / std, without subtracting `low` first
        low, high = images.pixels.value_range
        factor = 1 / (high - low)
        mean = [value + low * factor for value in mean]
    if is_squeezed(images):
        size = {"height": height, "width": width}
    elif images.squash:
        size = dict(zip(("height", "width"), images.cover_size, strict=True))
    else:
        size = {"shortest_edge": images.cover_size[0]}
    return {
        # Unlike ViTImageProcessor, it crops in every version of transformers.
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": images.pixels.is_rgb8,
        "do_resize": True,
        "size": size,
        "resample": int(Resampling[images.interpolation.upper()]),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": images.pixels.is_rgb8 or images.pixels.value_range is not None,
        "rescale_factor": factor,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": images.std,
    }
