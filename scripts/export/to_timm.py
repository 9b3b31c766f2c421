"""timm: a folder with its settings, or a file of bare weights."""

import logging
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from scripts.export.folder import check_folder_name, model_card, write_folder
from scripts.export.source import Source, complete, linear_head, problem_type, reading_settings
from util.settings.model import SIZES
from util.weights.encoder import save_encoder
from util.weights.files import write_new

# timm lacks ViTs with patches of 4 px, but takes their shapes as arguments.
TIMM_NAMES = {
    name: "vit_tiny_patch16_224" if name.endswith("_patch4") else f"vit_{name}_224"
    for name in SIZES
}

USAGE = """import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True)"""
TRANSFORM = "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"

_logger = logging.getLogger(__name__)


def write_timm(source: Source, output: Path) -> None:
    """Write a folder, or bare weights if the name ends in .pth or .safetensors, and log the call.

    Raises:
        InputError: the file or folder cannot be written.
    """
    source = source._replace(weights=linear_head(source.weights))
    state = complete(source.weights, source.size).state_dict()
    if output.suffix in (".pth", ".safetensors"):
        write_weights(source, state, output)
    else:
        usage = f"{USAGE}\n{TRANSFORM}" if source.images.pixels.is_rgb8 else USAGE
        card = model_card(source, library="timm", usage=usage, more=more(source))
        settings = {"config.json": timm_config(source)}
        check_folder_name(output)
        write_new(output, partial(write_folder, state, settings, card))
        _logger.info("timm.create_model(%r, pretrained=True)", f"local-dir:{output}")


def write_weights(source: Source, state: dict[str, Tensor], output: Path) -> None:
    """Write a file of weights; only the call in the log says how to prepare images for them."""
    if output.suffix == ".pth":
        write_new(output, partial(torch.save, state))
    else:
        head_state = {n: t for n, t in state.items() if n not in source.weights.encoder}
        write_new(output, partial(save_encoder, source.weights._replace(head_state=head_state)))
    overlay = {"file": str(output), **pretrained_cfg(source)}
    words = [repr(TIMM_NAMES[source.size]), "pretrained=True"]
    words += [f"{key}={value!r}" for key, value in model_args(source).items() if key != "img_size"]
    _logger.info("timm.create_model(%s, pretrained_cfg_overlay=%r)", ", ".join(words), overlay)


def model_args(source: Source) -> dict[str, object]:
    """Return the arguments of `timm.create_model` that differ from the named architecture's."""
    weights, args = source.weights, {}
    patch_size, *_ = weights.shape
    height, width = weights.img_size
    if (height, width) != (224, 224):
        args["img_size"] = height if height == width else [height, width]
    if f"patch{patch_size}_" not in TIMM_NAMES[source.size]:
        args["patch_size"] = patch_size
    if source.size.startswith("micro"):
        size = SIZES[source.size]
        args |= {"embed_dim": size.embed_dim, "depth": size.depth, "num_heads": size.num_heads}
    if weights.in_chans != 3:
        args["in_chans"] = weights.in_chans
    if "fc_norm.weight" in weights.head_state:
        args["global_pool"] = "avg"
    elif weights.pool == "norm_avg":
        args |= {"global_pool": "avg", "fc_norm": False}
    return args


def pretrained_cfg(source: Source) -> dict[str, object]:
    """Return timm's settings of the input and the head."""
    images = source.images
    return {
        "num_classes": source.weights.num_classes or 0,
        "input_size": (source.weights.in_chans, *images.img_size),
        "mean": tuple(images.mean),
        "std": tuple(images.std),
        "crop_pct": images.crop_pct,
        "crop_mode": "squash" if images.squash else "center",
        "interpolation": images.interpolation,
    }


def more(source: Source) -> str:
    """Return what a model card says about other calls."""
    auto = "AutoModelForImageClassification" if source.weights.num_classes else "AutoModel"
    return (
        "`num_classes=10` gives it a new head, and `features_only=True` makes it return feature "
        f'maps. transformers reads the folder, too: `{auto}.from_pretrained("FOLDER")`.'
    )


def timm_config(source: Source) -> dict[str, object]:
    """Return the config.json of a folder, which timm and transformers' TimmWrapper read."""
    weights, args = source.weights, model_args(source)
    config = {
        "architecture": TIMM_NAMES[source.size],
        "num_classes": weights.num_classes or 0,
        "num_features": weights.shape[1],
    }
    if weights.num_classes:
        config["global_pool"] = args.get("global_pool", "token")
        config["problem_type"] = problem_type(weights)  # timm does not read it, our reader does
    config |= reading_settings(weights)
    if weights.classes:
        config["label_names"] = weights.classes
    if args:
        config["model_args"] = args
    config["pretrained_cfg"] = {
        **pretrained_cfg(source),
        "fixed_input_size": True,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return config
