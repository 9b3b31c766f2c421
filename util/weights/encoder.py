"""Encoders from any weights file: `read_encoder` reads one, `load_encoder` puts it into a model."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from util.errors import InputError, counted, first_few
from util.normalization import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    RGB8,
    PixelFormat,
    check_counts,
)
from util.progress import waiting
from util.settings.data import AUTO
from util.settings.model import ATTENTION
from util.weights.channels import adapt_embedding
from util.weights.files import save_safetensors, unknown_content
from util.weights.locations import read_weights
from util.weights.metadata import (
    ENCODER_FORMAT,
    check_mean_std,
    check_metadata,
    check_pixels,
    hf_metadata,
    own_metadata,
    timm_metadata,
)
from util.weights.names import (
    BLOCK_PARTS,
    EMBEDDING_NAMES,
    ENCODER,
    HUGGING_FACE,
    MIXING_WEIGHTS,
    WeightNames,
    find_encoders,
)

MAX_LISTED = 20  # names in the log

_logger = logging.getLogger(__name__)

# Keys of the weights in a file, moving averages first.
_MOVING_AVERAGES = ("ema", "state_dict_ema", "model_ema", "teacher")  # "student" is averaged
_STATE_KEYS = (*_MOVING_AVERAGES, "state_dict", "model")
AVERAGE_PREFIX = r"(?:^|[._])(?:ema|teacher)[._]"
PATCH_WEIGHT = "patch_embed.proj.weight"


class EncoderWeights(NamedTuple):
    """The encoder of a file, in float32 under timm's names, and the file's metadata about it."""

    encoder: dict[str, Tensor]
    """cls_token, pos_embed (1, 1+L, D), patch_embed.proj.*, blocks.*"""
    head_state: dict[str, Tensor]
    """Final norm and head, if the file has them: norm.*, fc_norm.*, head.*"""
    img_size: tuple[int, int]
    """Height and width in pixels."""
    kind: str
    """Origin of the weights, for messages."""
    mean: list[float] | None = None
    std: list[float] | None = None
    """Per channel, as in training; None if the file does not say."""
    classes: list[str] | None = None
    pool: str | None = None
    """What a head classifies, see VisionTransformer: "avg", "cls", "norm_avg" or "attention"."""
    layers: tuple[int, ...] | None = None
    """Blocks whose features a head classifies, see VisionTransformer; None for the last."""
    crop_pct: float | None = None
    interpolation: str | None = None
    squash: bool | None = None
    tile: int | None = None
    """As in the `eval_transform` that a classifier was evaluated with."""
    task: str | None = None
    """What the head was trained for: "classification", "multilabel" or "regression"."""
    target_scale: tuple[float, float] | None = None
    """Mean and std of a regression's targets; the head predicts (target - mean) / std."""
    channels: int | None = None
    value_range: tuple[float, float] | None = None
    """How images were read, see `PixelFormat`."""
    num_heads: int | None = None
    norm_eps: float | None = None
    left_out: tuple[str, ...] = ()
    """Names of the file's other weights, such as its decoder's."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """patch_size, embed_dim, depth."""
        embed_dim, _, patch_size, _ = self.encoder[PATCH_WEIGHT].shape
        return patch_size, embed_dim, count_blocks(self.encoder)

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLPs."""
        return self.encoder["blocks.0.mlp.fc1.bias"].numel()

    @property
    def in_chans(self) -> int:
        """Input channels C."""
        return self.encoder[PATCH_WEIGHT].shape[1]

    @property
    def pixels(self) -> PixelFormat:
        """How images were read."""
        return PixelFormat(self.channels, self.value_range)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.shape[0], self.img_size[1] // self.shape[0]

    @property
    def num_classes(self) -> int | None:
        """Outputs of the head; None without a head."""
        head = (
            t for name, t in self.head_state.items() if name.startswith("head.") and t.ndim == 2
        )
        return next((weight.shape[0] for weight in head), None)

    @property
    def pooling(self) -> dict[str, object]:
        """What a head classifies, as arguments of VisionTransformer."""
        queries = self.head_state.get("attn_pool.queries")
        options = {"pool": self.pool, "num_queries": None if queries is None else len(queries)}
        return options | {"layers": self.layers}

    @property
    def is_probe(self) -> bool:
        """Whether the head normalizes features first."""
        return "head.0.running_var" in self.head_state

    @property
    def resizing(self) -> dict[str, object]:
        """How images are resized for an evaluation, as arguments of `eval_transform`."""
        return {"interpolation": self.interpolation or "bicubic", "squash": bool(self.squash)}

    def hash(self) -> str:
        """Return a digest of all weights that does not depend on the file they come from."""
        return hash_weights({**self.encoder, **self.head_state})


class StartingPoint(NamedTuple):
    """The weights that an encoder starts from, if any, and the size and input to use with them."""

    weights: EncoderWeights | None
    size: str
    """Such as base_patch16."""
    img_size: tuple[int, int]
    mean: list[float] | str
    std: list[float] | str
    """"auto" until they are measured."""
    pixels: PixelFormat = RGB8
    """How images are read."""
    is_told: bool = True
    """Whether the user or the weights give a mean or std, instead of a default."""

    @property
    def told_colors(self) -> tuple[list[float] | str | None, list[float] | str | None]:
        """Mean and std, as `choose_colors` takes them: None for the default."""
        return (self.mean, self.std) if self.is_told else (None, None)

    @property
    def input_format(self) -> tuple[tuple[int, int], list[float], list[float]]:
        """Size of the images, mean and std of their channels, as every transform needs them."""
        return self.img_size, self.mean, self.std

    def check_colors(self) -> None:
        """Raise InputError if mean and std have to be measured, where no images are trained on."""
        if AUTO in (self.mean, self.std):
            raise InputError(
                "there are no training images to measure mean and std on: give "
                f"{counted(self.pixels.num_channels, 'number')} each by --mean and --std"
            )
        check_counts(self.mean, self.std, self.pixels.num_channels)


def hash_weights(state: Mapping[str, Tensor]) -> str:
    """Return a digest of weights and their names, in any order."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def count_blocks(encoder: Mapping[str, Tensor]) -> int:
    """Return the depth of an encoder with timm's names."""
    ids = (int(name.split(".")[1]) for name in encoder if name.startswith("blocks."))
    return 1 + max(ids, default=-1)


@waiting("reading the weights")
def read_encoder(path: str | Path) -> EncoderWeights:
    """Read the encoder of a weights file.

    Args:
        path: a checkpoint of this project, an encoder-only file, released CrossMAE or MAE weights,
            or a timm or Hugging Face ViT (its file or folder); or its address, see `local_path`.

    Raises:
        WeightsNotFoundError: it does not exist, or its address cannot be reached.
        InputError: the file is damaged, lacks an encoder, or has parts our ViT lacks.
    """
    weights = find_encoder(*read_weights(path), path)
    if weights.left_out:
        groups = sorted({re.split(r"\.", name)[0] for name in weights.left_out})
        _logger.info(
            "%s: reading the encoder; %s of other parts are not needed: %s",
            *(path, counted(len(weights.left_out), "tensor"), ", ".join(groups)),
        )
    return weights


def find_encoder(content: dict, folder: Path, path: str | Path) -> EncoderWeights:
    """Find the encoder in a file's content, and its metadata there or in the file's folder.

    Args:
        path: what the user gave, for messages.

    Raises:
        InputError: see `read_encoder`.
    """
    with unknown_content(path):
        return _find_encoder(content, folder, path)


def _find_encoder(content: dict, folder: Path, path: str | Path) -> EncoderWeights:
    names, renamed, left_out = _rename(_find_state(content, path), path)
    # Only floating-point tensors are converted: a batch norm's counter stays an integer.
    renamed = {n: t.detach().float() if t.is_floating_point() else t for n, t in renamed.items()}
    bad = next((name for name, tensor in renamed.items() if not tensor.isfinite().all()), None)
    if bad:
        raise InputError(f"{path} has values in {bad} that are not finite: use another file")
    encoder = {name: t for name, t in renamed.items() if re.fullmatch(ENCODER, name)}
    head_state = {name: t for name, t in renamed.items() if name not in encoder}
    has_head = any(name.startswith("head.") for name in head_state)
    _check_complete(encoder, head_state, path)
    encoder[PATCH_WEIGHT] = _as_convolution(encoder[PATCH_WEIGHT], path)

    in_chans = encoder[PATCH_WEIGHT].shape[1]
    metadata = own_metadata(content, path)
    if names is HUGGING_FACE:
        metadata |= hf_metadata(folder, in_chans)
    elif not metadata:
        metadata = timm_metadata(folder, head_state, in_chans)
        if metadata:
            _logger.info("%s: taking mean, std, crop and classes from its config.json", path)
    *_, patch_height, patch_size = encoder[PATCH_WEIGHT].shape
    if patch_height != patch_size:
        raise InputError(
            f"{path} has patches of {patch_height} x {patch_size} px, but only square ones are "
            "supported: use another file"
        )
    _, num_positions, _ = encoder["pos_embed"].shape
    img_size = _image_size(num_positions - 1, patch_size, metadata, path)
    pixels = check_pixels(metadata, {"in_chans": in_chans})
    colors = metadata.get("mean"), metadata.get("std")
    mean, std = check_mean_std(*colors, path, pixels=pixels)
    check_metadata(metadata)
    pool = (
        "avg" if "fc_norm.weight" in head_state else "cls" if "norm.weight" in head_state else None
    )
    weights = EncoderWeights(
        encoder,
        head_state,
        img_size,
        kind=metadata.get("kind") or names.kind,
        mean=mean,
        std=std,
        classes=metadata.get("classes") if has_head else None,
        pool=metadata.get("pool") or (pool if has_head else None),
        layers=metadata.get("layers") and tuple(metadata["layers"]),
        crop_pct=metadata.get("crop_pct"),
        interpolation=metadata.get("interpolation"),
        squash=metadata.get("squash"),
        tile=metadata.get("tile"),
        task=metadata.get("task"),
        target_scale=metadata.get("target_scale") and tuple(metadata["target_scale"]),
        channels=pixels.channels,
        value_range=pixels.value_range,
        num_heads=metadata.get("num_heads"),
        norm_eps=metadata.get("norm_eps"),
        left_out=tuple(left_out),
    )
    if weights.classes and weights.num_classes not in (None, len(weights.classes)):
        counts = (len(weights.classes), weights.num_classes)
        _logger.warning("%s names %d classes but has %d outputs: leaving out names", path, *counts)
        return weights._replace(classes=None)
    return weights


def _find_state(content: dict, path: str | Path) -> dict[str, Tensor]:
    """Return a file's table of tensors: under a known key, else its only one, else the file.

    Tables that have a class token go first: a moving average may be named beside its counters.
    """
    tables = [key for key, value in content.items() if _has_tensors(value)]
    tables = [key for key in tables if any(n.endswith("cls_token") for n in content[key])] or tables
    key = next((key for key in _STATE_KEYS if key in tables), None)
    if key in _MOVING_AVERAGES:
        _logger.info("%s: reading the moving average of the weights", path)
    elif key is None and len(tables) == 1:
        key = tables[0]
        _logger.info("%s: reading the weights under %r", path, key)
    state = content if key is None else content[key]
    if not _has_tensors(state):
        held = f"only {first_few(list(map(str, content)))}" if content else "nothing"
        raise InputError(f"no encoder in {path}, which holds {held}: use another file")
    return state


def _has_tensors(value: object) -> bool:
    """Whether a value is a table with tensors in it, by names."""
    return (
        isinstance(value, dict)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(tensor, Tensor) for tensor in value.values())
    )


def _rename(
    state: dict[str, Tensor], path: str | Path
) -> tuple[WeightNames, dict[str, Tensor], list[str]]:
    """Find a file's naming scheme; return it, the renamed weights and the names left out."""
    cleaned = {name.replace("_orig_mod.", ""): t for name, t in state.items()}  # torch.compile's
    names, prefix = _choose_encoder(list(cleaned), path)
    outside = [name for name in cleaned if not name.startswith(prefix)]
    within = {n.removeprefix(prefix): t for n, t in cleaned.items() if n.startswith(prefix)}
    new_names = {name: names.rename(name) for name in within}
    unknown = [prefix + name for name, new in new_names.items() if new is None]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(
            f"{path} has {unknown[0]}{more}, which a plain ViT does not have: use another file"
        )
    if any(re.fullmatch(MIXING_WEIGHTS, name) for name in within):
        new_names = {n: "" if new.startswith("norm.") else new for n, new in new_names.items()}
    kept = {name: new for name, new in new_names.items() if new}
    if len(set(kept.values())) < len(kept) or len(cleaned) < len(state):
        raise InputError(f"{path} has a weight twice, under two names: use another file")
    renamed = {new: within[name] for name, new in kept.items()}
    left_out = [*outside, *(prefix + name for name, new in new_names.items() if not new)]
    return names, _join_qkv(renamed), left_out


def _choose_encoder(names: list[str], path: str | Path) -> tuple[WeightNames, str]:
    """Return the naming scheme of a file's encoder and the prefix of its names, which is logged.

    Of several encoders, the moving average counts.
    """
    found = find_encoders(names)
    if "" in found:  # any other is refused by its names
        return found[""], ""
    if len(found) > 1:
        averages = {p: scheme for p, scheme in found.items() if re.search(AVERAGE_PREFIX, p)}
        if len(averages) == 1:
            _logger.info(
                "%s: of the encoders %s, %s is taken for the moving average",
                *(path, first_few(list(found)), next(iter(averages))),
            )
            found = averages
    if not found:
        raise InputError(
            f"no encoder in {path}, which has {first_few(names)}: use a ViT with a class token "
            "whose weights are named as in this project, the released CrossMAE or MAE, timm or "
            "Hugging Face"
        )
    if len(found) > 1:
        raise InputError(
            f"{path} has several encoders ({first_few(list(found))}): save the one to use on its "
            "own"
        )
    [(prefix, scheme)] = found.items()
    _logger.info("%s: the encoder's names have the prefix %s, which is stripped", path, prefix)
    return scheme, prefix


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = dict(state)
    for name in state:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if parts[0] != parts[1] and all(part in state for part in parts):
            tensors = [joined.pop(part) for part in parts]
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(tensors)
    return joined


def _as_convolution(weight: Tensor, path: str | Path) -> Tensor:
    """Return the weight of a patch embedding as a convolution's; a linear layer's is reshaped.

    Its inputs are ordered as in timm, which reads such weights too: channels, rows, columns.
    """
    if weight.ndim != 2:
        return weight
    dim, inputs = weight.shape
    side = math.isqrt(inputs // 3)
    if 3 * side**2 != inputs:
        raise InputError(
            f"{path} has a linear patch embedding of {inputs} inputs, which are not the pixels of "
            "a square RGB patch: use another file"
        )
    _logger.info(
        "%s: the linear patch embedding is read as timm's: its inputs are channels, rows, columns",
        path,
    )
    return weight.reshape(dim, 3, side, side)


def _check_complete(
    encoder: dict[str, Tensor], head_state: dict[str, Tensor], path: str | Path
) -> None:
    needed = [
        *EMBEDDING_NAMES,
        *(
            f"blocks.{i}.{part}.{kind}"
            for i in range(max(1, min(count_blocks(encoder), len(encoder))))
            for part in BLOCK_PARTS
            for kind in ("weight", "bias")
        ),
    ]
    missing = [name for name in needed if name not in encoder]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"the encoder in {path} lacks {missing[0]}{more}: use another file")
    if "norm.weight" in head_state and "fc_norm.weight" in head_state:
        raise InputError(
            f"{path} has both norm and fc_norm, but our ViT has only one of them: use another file"
        )


def _image_size(
    num_patches: int, patch_size: int, metadata: dict, path: str | Path
) -> tuple[int, int]:
    """Return height and width in whole patches: from the metadata, else of a square."""
    size = metadata.get("img_size") or math.isqrt(num_patches) * patch_size
    rows, columns = (side // patch_size for side in _as_pair(size))
    if (usual := metadata.get("usual_size")) is not None:
        their_rows, their_columns = (side // patch_size for side in _as_pair(usual))
        if their_rows * their_columns == num_patches:
            rows, columns = their_rows, their_columns
        else:
            _logger.warning(
                "%s has positions for %d patches, which images of %d x %d beside it do not have: "
                "going by the positions",
                *(path, num_patches, *_as_pair(usual)),
            )
    if rows * columns != num_patches or rows < 1:
        height, width = _as_pair(size)
        raise InputError(
            f"{path} has position embeddings of {num_patches} patches, but images of "
            f"{height} x {width} have {rows} x {columns}: use another file"
        )
    return rows * patch_size, columns * patch_size


def _as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def load_encoder(model: nn.Module, weights: EncoderWeights, *, head: bool) -> None:
    """Load weights into a VisionTransformer, and log what is new and what is left out.

    Position embeddings are resampled to another image size, and the patch embedding is adapted to
    another number of channels. The norm before the head is loaded if the file has one for the
    model's pooling.

    Args:
        model: unchanged if anything does not fit.
        head: also load the head, which requires the norm before it.

    Raises:
        InputError: the weights do not fit the model.
    """
    state = fit_encoder(model, weights, head=head)
    if weights.norm_eps not in (None, model.blocks[0].norm1.eps):
        _logger.warning(
            "the %s was trained with layer_norm_eps %g, not %g: features will differ slightly",
            *(weights.kind, weights.norm_eps, model.blocks[0].norm1.eps),
        )
    model.load_state_dict(state, strict=False)

    _logger.info("loaded %s from the %s", counted(len(state), "tensor"), weights.kind)
    if weights.grid_size != model.grid_size:
        grids = (*weights.grid_size, *model.grid_size)
        _logger.info("position embeddings resampled from %d x %d patches to %d x %d", *grids)
    if weights.in_chans != model.in_chans:
        counts = (counted(weights.in_chans, "channel"), model.in_chans)
        _logger.info("patch embedding adapted from %s to %d", *counts)
    new = [name for name in model.state_dict() if name not in state]
    if {*new} in ({"norm.weight", "norm.bias"}, {"fc_norm.weight", "fc_norm.bias"}):
        norm = new[0].partition(".")[0]
        _logger.info("features are normalized, without trained weights (%s)", norm)
    elif new:
        listed = new
        if len(new) > MAX_LISTED:  # those of all blocks, and whole parts, by one name
            listed = dict.fromkeys(
                re.sub(r"\.\d+\.", ".*.", name)
                if name.startswith("blocks.")
                else name.split(".")[0]
                for name in new
            )
        _logger.info("new for this task: %s", ", ".join(listed))
    left_out = [name for name in weights.head_state if name not in state]
    if left_out:
        _logger.info("in the file, but not needed here: %s", ", ".join(left_out))


def fit_encoder(model: nn.Module, weights: EncoderWeights, *, head: bool) -> dict[str, Tensor]:
    """Return what `load_encoder` loads: checked, resampled and adapted.

    Raises:
        InputError: the weights do not fit the model.
    """
    _check_sizes(model, weights, head=head)
    if head and weights.pool == ATTENTION != model.pool:
        raise InputError(f"the head of the {weights.kind} reads learned queries: leave out --pool")
    norms = {"avg": ("fc_norm.",), None: ()}.get(model.pool, ("norm.",))
    wanted = (*norms, "head.", *(["attn_pool."] * (model.pool == ATTENTION))) if head else norms
    state = {
        **weights.encoder,
        **{name: tensor for name, tensor in weights.head_state.items() if name.startswith(wanted)},
    }
    state["pos_embed"] = resample_positions(state["pos_embed"], weights.grid_size, model.grid_size)
    state[PATCH_WEIGHT] = adapt_embedding(state[PATCH_WEIGHT], model.in_chans)
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            ours = f"is {_size_text(own[name].shape)} in" if name in own else "is missing from"
            raise InputError(
                f"{name} is {_size_text(tensor.shape)} in the {weights.kind} but {ours} the "
                "model: use another file"
            )
    new = [name for name in own if name not in state]
    if head and new:
        raise InputError(
            f"the {weights.kind} lacks {', '.join(new)}, which --pool {model.pool} needs: leave "
            "out --pool, or use another file"
        )
    return state


def resample_positions(
    positions: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]
) -> Tensor:
    """Resample position embeddings (1, 1+L, D) to another grid of patches, as in MAE."""
    if old_size == new_size:
        return positions
    sizes = {"new_size": list(new_size), "old_size": list(old_size)}
    return resample_abs_pos_embed(positions, antialias=False, **sizes)


def _check_sizes(model: nn.Module, weights: EncoderWeights, *, head: bool) -> None:
    """Refuse weights of another size with a clearer message than a shape mismatch."""
    patch_size, embed_dim, depth = weights.shape
    by_name, fixed = "leave out --model, or set it to the size of the weights", "use another file"
    by_flag = "leave out --channels, because a trained head is for the channels of its training"
    sizes = [
        ("patches of {} px", patch_size, model.patch_size, by_name),
        *([("{} channels", weights.in_chans, model.in_chans, by_flag)] if head else []),
        ("a width of {}", embed_dim, model.embed_dim, by_name),
        ("{} blocks", depth, len(model.blocks), by_name),
        ("an MLP {} wide", weights.mlp_dim, model.blocks[0].mlp.fc1.out_features, fixed),
        ("{} attention heads", weights.num_heads, model.blocks[0].attn.num_heads, fixed),
    ]
    for text, theirs, ours, advice in sizes:
        if theirs not in (None, ours):
            raise InputError(
                f"the {weights.kind} has {text.format(theirs)}, but the model has "
                f"{text.format(ours)}: {advice}"
            )


def _size_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def input_format(
    weights: EncoderWeights | None,
    *,
    img_size: Sequence[int] | None,
    mean: Sequence[float] | str | None,
    std: Sequence[float] | str | None,
    pixels: PixelFormat = RGB8,
    default_size: int,
) -> tuple[tuple[int, int], list[float] | str, list[float] | str]:
    """Return (height, width), mean and std of the input: the user's choice, else the weights' own.

    Args:
        img_size: the user's choice; one side, or height and width.
        mean, std: the user's choice, on the [0, 1] scale. If neither the user nor the weights give
            them, they are ImageNet's, which the log says, or measured if there are not three
            channels.
        pixels: how images are read.
        default_size: side in pixels if there are no weights.
    """
    own_size = weights.img_size if weights else (default_size, default_size)
    own_mean, own_std = (weights.mean, weights.std) if weights else (None, None)
    height, width = tuple(img_size) * (2 // len(img_size)) if img_size else own_size
    if weights and weights.in_chans != pixels.num_channels:
        own_mean = own_std = None
    values = {"mean": mean or own_mean, "std": std or own_std}
    if pixels.num_channels != 3:
        return (height, width), *(value or AUTO for value in values.values())
    if weights and weights.in_chans != 3:
        text = "the %s is for %d channels: its mean and std are not taken"
        _logger.info(text, weights.kind, weights.in_chans)
    elif weights and None in values.values():
        untold = " and ".join(name for name, value in values.items() if value is None)
        _logger.info(
            "the %s does not tell the %s of its training: taking ImageNet's (many of timm's ViTs "
            "need --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5)",
            *(weights.kind, untold),
        )
    defaults = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    chosen = (value or list(usual) for value, usual in zip(values.values(), defaults, strict=True))
    return (height, width), *chosen


def save_encoder(weights: EncoderWeights, path: Path) -> None:
    """Write an encoder-only file (.safetensors) that `read_encoder` reads back bit for bit."""
    metadata = weights._asdict()
    for key in ("encoder", "head_state", "left_out"):
        metadata.pop(key)
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    metadata["format"] = ENCODER_FORMAT
    save_safetensors({**weights.encoder, **weights.head_state}, path, metadata)
