"""What is said beside an encoder's weights: in the file itself, and in the files next to it."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from timm.models import is_model_in_modules
from torch import Tensor

from util.errors import InputError, as_input_error, counted
from util.json_text import parse_json
from util.normalization import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    RGB8,
    PixelFormat,
    check_scale,
)
from util.settings.model import ATTENTION, POOLS
from util.weights.files import KINDS, check_format

_logger = logging.getLogger(__name__)

ENCODER_FORMAT = "crossmae-encoder"  # in the metadata of an encoder-only file
OLD_KEYS = {"crop_share": "crop_pct"}  # names in earlier versions
# Settings in the header of a checkpoint of this project, under the same names as here.
HEADER_KEYS = ("classes", "interpolation", "squash", "task", "target_scale")
READING_KEYS = ("channels", "value_range", "tile")
HEADER_KEYS += READING_KEYS
POOLING_KEYS = ("pool", "layers")  # among the options of a model
TASKS = {  # Hugging Face's names -> ours
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
    "regression": "regression",
}
INTERPOLATIONS = ("bicubic", "bilinear")  # of `util.data.transforms.eval_transform`
TIMM_MODULES = ("vision_transformer", "deit")  # that have the architectures of plain ViTs
TIMM_CROP_PCT = 0.875  # where a config of timm does not say it
# Arguments of timm's ViT that leave its output in evaluation alone, or show in the weights.
TIMM_FREE_ARGS = {
    *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads"),
    *("mlp_ratio", "global_pool", "fc_norm", "qkv_bias", "proj_bias", "weight_init", "fix_init"),
    *("dynamic_img_size", "dynamic_img_pad", "strict_img_size"),
}
# Values of the others that build our ViT, besides None and, where nothing is named, false.
TIMM_PLAIN_ARGS = {
    "class_token": True,
    "final_norm": True,
    "pos_embed": "learn",
    "act_layer": "gelu",
    "norm_layer": "layernorm",
}


def own_metadata(content: dict, path: str | Path) -> dict:
    """Return the metadata of a file of this project, {} for another: img_size, mean and so on."""
    metadata = content.get("metadata", {})
    if metadata.get("format") == ENCODER_FORMAT:
        values = {key: json.loads(value) for key, value in metadata.items() if key != "format"}
        return {OLD_KEYS.get(key, key): value for key, value in values.items()}
    if "model_options" not in content:
        return {}
    kind = str(content.get("format")).removeprefix("crossmae-")
    check_format(content, path, kind)
    options = content["model_options"]
    return {
        "kind": f"{KINDS[kind]} checkpoint of this project",
        "img_size": options["img_size"],
        **{key: options.get(key) for key in POOLING_KEYS},
        "mean": content["mean"],
        "std": content["std"],
        "crop_pct": content.get("crop_pct", content.get("crop_share")),
        **{key: content.get(key) for key in HEADER_KEYS},
    }


def check_mean_std(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    path: str | Path,
    *,
    pixels: PixelFormat = RGB8,
) -> tuple[list[float] | None, list[float] | None]:
    """Check and return a file's mean and std of the channels, each of which may be None.

    Args:
        pixels: of the images that the file was trained on.

    Raises:
        TypeError, ValueError: one has another length or numbers that are not finite, or a std is
            not above 0.
        InputError: one is of pixels from 0 to 255, and images are 8-bit RGB.
    """
    checked = [None if v is None else [float(x) for x in v] for v in (mean, std)]
    for values in filter(None, checked):
        if len(values) != pixels.num_channels or not all(map(math.isfinite, values)):
            raise ValueError(f"{values} are not {pixels.num_channels} finite numbers")
    if std is not None and min(checked[1]) <= 0:
        raise ValueError(f"std must be above 0, not {std}")
    if pixels.is_rgb8:
        check_scale(*checked, path)
    return tuple(checked)


def check_pixels(metadata: Mapping[str, object], options: Mapping[str, object]) -> PixelFormat:
    """Check and return the format of the images that a file was trained on.

    Args:
        metadata: may have `channels` and `value_range`.
        options: of the model; its `in_chans` is 3 if absent.

    Raises:
        TypeError, ValueError: the format is not one, or not that of the model.
    """
    in_chans = options.get("in_chans", 3)
    channels, value_range = metadata.get("channels"), metadata.get("value_range")
    if channels is None and in_chans != 3:
        channels = in_chans
    if channels not in (None, in_chans):
        raise ValueError(f"{channels} channels for a model of {in_chans}")
    if value_range is not None:
        low, high = map(float, value_range)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"value_range {value_range}")
        value_range = low, high
    return PixelFormat(channels, value_range)


def check_metadata(metadata: dict) -> None:
    """Raise TypeError or ValueError if a file has invalid settings."""
    classes, crop_pct = metadata.get("classes"), metadata.get("crop_pct")
    if not all(isinstance(name, str) for name in classes or []):
        raise TypeError("class names must be strings")
    choices = {
        "pool": (*POOLS, ATTENTION),
        "task": TASKS.values(),
        "interpolation": INTERPOLATIONS,
        "squash": (False, True),
    }
    for key, values in choices.items():
        if metadata.get(key) not in (None, *values):
            raise ValueError(f"{key} {metadata[key]}")
    if (tile := metadata.get("tile")) is not None and not (isinstance(tile, int) and tile > 0):
        raise ValueError(f"tile {tile}")
    if not all(isinstance(number, int) for number in metadata.get("layers") or []):
        raise TypeError(f"layers {metadata['layers']}")
    if not 0 < (1 if crop_pct is None else crop_pct) <= 1:
        raise ValueError(f"crop_pct {crop_pct}")
    if not 0 <= (metadata.get("norm_eps") or 0) < 1:
        raise ValueError(f"layer_norm_eps {metadata['norm_eps']}")
    if metadata.get("target_scale") is not None:
        mean, std = map(float, metadata["target_scale"])
        if not math.isfinite(mean) or not 0 < std < math.inf:
            raise ValueError(f"target_scale {metadata['target_scale']}")


def of_channels(values: Sequence[float], channels: int, path: Path) -> list[float] | None:
    """Return a mean or std for each channel; None if it is of RGB, unlike the weights.

    Args:
        values: one number is for all channels.
    """
    if len(values) == 3 != channels:
        counts = (path, counted(channels, "channel"))
        _logger.info("%s has a mean and std of RGB, not of %s: leaving them out", *counts)
        return None
    return list(values) * (channels if len(values) == 1 else 1)


def timm_metadata(folder: Path, head_state: Mapping[str, Tensor], channels: int) -> dict:
    """Return the metadata in timm's `config.json` beside weights; {} without one.

    Args:
        head_state: final norm and head, by which the two ways to pool the mean differ.
        channels: of the images.

    Raises:
        InputError: the config describes another network than our ViT.
    """
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config.get("architecture"), str):  # not timm's
        return {}
    if not is_model_in_modules(config["architecture"], TIMM_MODULES):
        message = "%s is that of a %s, not of a ViT: leaving it out"
        _logger.warning(message, path, config["architecture"])
        return {}
    with as_input_error(
        f"{path} has invalid settings: correct it, or move it away",
        *(AttributeError, LookupError, TypeError, ValueError),
    ):
        metadata = _timm_metadata(config, head_state, channels, path)
        pixels = check_pixels(metadata, {"in_chans": channels})
        check_mean_std(metadata["mean"], metadata["std"], path, pixels=pixels)
        check_metadata(metadata)
    return metadata


def _timm_metadata(
    config: dict, head_state: Mapping[str, Tensor], channels: int, path: Path
) -> dict:
    preparation = config.get("pretrained_cfg", config)  # earlier versions wrote one flat table
    args = config.get("model_args") or {}
    foreign = {name: value for name, value in args.items() if not _is_plain(name, value)}
    if foreign:
        listed = ", ".join(f"{name} {value}" for name, value in foreign.items())
        raise InputError(f"{path} builds a network with {listed}, unlike our ViT: use another file")

    pool = args.get("global_pool", config.get("global_pool"))
    input_size = args.get("img_size") or preparation.get("input_size", [])[1:] or None
    mean = preparation.get("mean", IMAGENET_DEFAULT_MEAN)
    std = preparation.get("std", IMAGENET_DEFAULT_STD)
    crop_mode = preparation.get("crop_mode", "center")
    if crop_mode not in ("center", "squash"):
        _logger.warning("%s: crop_mode %s is not supported: using center", path, crop_mode)
    names = (config.get("label_names"), preparation.get("label_names"), preparation.get("labels"))
    labels = next(filter(None, names), None)
    return {
        "usual_size": input_size,
        "pool": _timm_pool(pool, head_state, path) if pool else None,
        "mean": of_channels(mean, channels, path),
        "std": of_channels(std, channels, path),
        **{key: config.get(key) for key in READING_KEYS},
        "crop_pct": preparation.get("crop_pct", TIMM_CROP_PCT),
        "interpolation": _supported(preparation.get("interpolation", "bicubic")),
        "squash": crop_mode == "squash",
        "classes": _in_order(labels) if isinstance(labels, dict) else labels,
        "num_heads": args.get("num_heads"),
        **_task(config),
    }


def _is_plain(name: str, value: object) -> bool:
    if value is None or name in TIMM_FREE_ARGS or name.endswith("_rate"):
        return True
    return value == TIMM_PLAIN_ARGS[name] if name in TIMM_PLAIN_ARGS else not value


def _timm_pool(pool: str, head_state: Mapping[str, Tensor], path: Path) -> str | None:
    """Return our name of a pooling of timm; None without a head."""
    if not any(name.startswith("head.") for name in head_state):
        return None
    found = {
        ("token", "norm.weight"): "cls",
        ("avg", "fc_norm.weight"): "avg",
        ("avg", "norm.weight"): "norm_avg",
    }
    ours = next((o for (theirs, n), o in found.items() if theirs == pool and n in head_state), None)
    if ours is None:
        norms = [name for name in head_state if name.endswith("norm.weight")]
        raise InputError(
            f"{path} has global_pool {pool!r} next to {norms[0] if norms else 'no final norm'}, "
            "but our ViT classifies the class token or the mean of the patches: use another file"
        )
    return ours


def _task(config: dict) -> dict:
    """Return the task of a head, None if the config does not say it, and what comes with it."""
    task = TASKS.get(config.get("problem_type"))
    if task == "regression":  # of the values themselves
        return {"task": task, "target_scale": (0.0, 1.0), "classes": None}
    return {"task": task}


def _in_order(labels: dict[str, str]) -> list[str]:
    """Class names by the number of their output."""
    return [labels[key] for key in sorted(labels, key=int)]


def _supported(interpolation: str) -> str | None:
    if interpolation in INTERPOLATIONS:
        return interpolation
    _logger.warning("interpolation %s is not supported: using bicubic", interpolation)
    return None


def hf_metadata(folder: Path, channels: int) -> dict:
    """Return the metadata in the files beside Hugging Face weights, where they exist.

    Args:
        channels: of the images.
    """
    config = read_json(folder / "config.json")
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise InputError(
            f"{folder / 'config.json'} has hidden_act {activation}, but our ViT uses gelu: use "
            "another file"
        )
    pixels = PixelFormat(config.get("channels"), config.get("value_range"))
    classes = _in_order(config.get("id2label") or {})
    if classes == [f"LABEL_{i}" for i in range(len(classes))]:  # Hugging Face's placeholders
        classes = None
    return {
        "img_size": config.get("image_size"),
        "num_heads": config.get("num_attention_heads"),
        "norm_eps": config.get("layer_norm_eps"),
        "classes": classes,
        **_hf_preparation(folder / "preprocessor_config.json", channels, pixels),
        **{key: config.get(key) for key in READING_KEYS},
        **_task(config),
    }


def _hf_preparation(path: Path, channels: int, pixels: PixelFormat) -> dict:
    """Return mean, std, interpolation and crop of an image processor of Hugging Face.

    Args:
        path: its settings.
        channels: of the images.
        pixels: how images are read, if this project wrote the settings.
    """
    processor = read_json(path)
    mean, std = (processor.get(f"image_{name}") for name in ("mean", "std"))
    mean, std = (values and of_channels(values, channels, path) for values in (mean, std))
    if processor.get("do_normalize") is False:
        mean, std = [0.0] * channels, [1.0] * channels
    if mean and std and (pixels.is_rgb8 or pixels.value_range):
        # Theirs are of pixels times a factor, ours of pixels on the [0, 1] scale.
        scaled = processor.get("do_rescale") is not False
        factor = processor.get("rescale_factor", 1 / 255) if scaled else 1
        low, high = pixels.value_range or (0, 255)
        scale = (high - low) * factor
        scale = 1 if math.isclose(scale, 1) else scale
        mean = [(value - low * factor) / scale for value in mean]
        std = [value / scale for value in std]
    resample, size = processor.get("resample"), processor.get("size")
    found = {"mean": mean, "std": std}
    if resample is not None:
        found["interpolation"] = _supported(Image.Resampling(resample).name.lower())
    if size is None or processor.get("do_resize") is False:
        return found
    cropped = bool(processor.get("do_center_crop"))
    if isinstance(size, int):
        size = {"shortest_edge": size} if cropped else {"height": size, "width": size}
    crop = processor.get("crop_size") if cropped else None
    crop_side = crop["height"] if isinstance(crop, dict) else crop
    resized_side = size.get("shortest_edge") or size["height"]
    found["squash"] = "height" in size
    found["crop_pct"] = processor.get("crop_pct") or (crop_side or resized_side) / resized_side
    return found


def read_json(path: Path) -> dict:
    """Return the settings in a JSON file; {} if there is none.

    Raises:
        InputError: it is damaged, or not a table of settings.
    """
    if not path.is_file():
        return {}
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not named settings")
    return content
