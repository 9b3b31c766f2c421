"""The encoder of a file, whoever wrote it, and the way into a model.

`read_encoder` reads the encoder out of any file that has one, `load_encoder` puts it into a model.
"""

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
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from torch import Tensor

from util.errors import InputError
from util.weights.files import (
    KINDS,
    check_format,
    read_weights_file,
    save_safetensors,
    unknown_content,
)
from util.weights.names import (
    BLOCK_PARTS,
    EMBEDDING_NAMES,
    ENCODER,
    HUGGING_FACE,
    MIXING_WEIGHTS,
    PRETRAINED,
    TIMM,
    WeightNames,
)

_logger = logging.getLogger(__name__)

# Where a file has its weights, the moving average first; else it is the weights.
_MOVING_AVERAGES = ("ema", "state_dict_ema", "model_ema")
_STATE_KEYS = (*_MOVING_AVERAGES, "state_dict", "model")
ENCODER_FORMAT = "crossmae-encoder"  # in the metadata of an encoder-only file
OLD_KEYS = {"crop_share": "crop_pct"}  # as earlier versions called them


class EncoderWeights(NamedTuple):
    """The encoder of a file, in float32 under timm's names, and what the file tells about it."""

    encoder: dict[str, Tensor]
    """cls_token, pos_embed (1, 1+L, D), patch_embed.proj.*, blocks.*"""
    head_state: dict[str, Tensor]
    """Final norm and head, if the file has them: norm.*, fc_norm.*, head.*"""
    img_size: tuple[int, int]
    """Height and width in pixels."""
    kind: str
    """Where it comes from, for messages."""
    mean: list[float] | None = None
    std: list[float] | None = None
    """Of the channels, as it was trained; None where the file does not tell."""
    classes: list[str] | None = None
    pool: str | None = None
    """What a head classifies: "avg", the patch tokens' mean, or "cls", the class token."""
    crop_pct: float | None = None
    """Of the side of held-out images that a classifier was evaluated on."""
    num_heads: int | None = None
    norm_eps: float | None = None
    left_out: tuple[str, ...] = ()
    """The file's own names of what is not part of the encoder, such as its decoder."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """patch_size, embed_dim, depth."""
        embed_dim, _, patch_size, _ = self.encoder["patch_embed.proj.weight"].shape
        return patch_size, embed_dim, count_blocks(self.encoder)

    @property
    def mlp_dim(self) -> int:
        """Width inside the blocks' MLPs."""
        return self.encoder["blocks.0.mlp.fc1.bias"].numel()

    @property
    def in_chans(self) -> int:
        """C."""
        return self.encoder["patch_embed.proj.weight"].shape[1]

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.img_size[0] // self.shape[0], self.img_size[1] // self.shape[0]

    @property
    def num_classes(self) -> int | None:
        """Of the head; None where there is none."""
        head = (
            t for name, t in self.head_state.items() if name.startswith("head.") and t.ndim == 2
        )
        return next((weight.shape[0] for weight in head), None)

    @property
    def is_linear_probe(self) -> bool:
        """Whether the head normalises features first."""
        return "head.0.running_var" in self.head_state

    def hash(self) -> str:
        """A digest of all the weights: equal for equal ones, whatever file they come from."""
        digest = hashlib.blake2b(digest_size=8)
        for name, tensor in sorted({**self.encoder, **self.head_state}.items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


class StartingPoint(NamedTuple):
    """The weights that an encoder starts from, if any, and the size and input that go with them."""

    weights: EncoderWeights | None
    size: str
    """Such as base_patch16."""
    img_size: tuple[int, int]
    mean: list[float]
    std: list[float]

    @property
    def input_format(self) -> tuple[tuple[int, int], list[float], list[float]]:
        """What every transform needs: the size of images, mean and std of their channels."""
        return self.img_size, self.mean, self.std


def count_blocks(encoder: Mapping[str, Tensor]) -> int:
    """The depth of an encoder by timm's names."""
    ids = (int(name.split(".")[1]) for name in encoder if name.startswith("blocks."))
    return 1 + max(ids, default=-1)


def read_encoder(path: str | Path) -> EncoderWeights:
    """Read the encoder of a weights file.

    Args:
        path: a checkpoint of this project, an encoder-only file, released CrossMAE or MAE weights,
            a ViT of timm's, or one of Hugging Face's, which may be named by its folder.

    Raises:
        InputError: the file is missing or damaged, has no encoder, or has more than ours computes.
    """
    file = _file_of(Path(path))
    content = read_weights_file(file)
    with unknown_content(path):
        weights = _read_encoder(content, file)
    if weights.left_out:
        groups = sorted({re.split(r"\.", name)[0] for name in weights.left_out})
        _logger.info(
            "%s: left out %d tensors that are not of the encoder: %s",
            *(path, len(weights.left_out), ", ".join(groups)),
        )
    return weights


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = ("model.safetensors", "pytorch_model.bin")
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise InputError(f"{path} is a folder without {' or '.join(names)}: name a weights file")
    return file


def _read_encoder(content: dict, path: Path) -> EncoderWeights:
    key = next((key for key in _STATE_KEYS if content.get(key) is not None), None)
    state = content if key is None else content[key]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"no encoder in {path}: it holds no named weights")
    if key in _MOVING_AVERAGES:
        _logger.info("%s: reading the moving average of the weights", path)
    names, renamed, left_out = _rename(state, path)
    # What was trained is converted, not what counts batches.
    renamed = {n: t.detach().float() if t.is_floating_point() else t for n, t in renamed.items()}
    bad = next((name for name, tensor in renamed.items() if not tensor.isfinite().all()), None)
    if bad:
        raise InputError(f"{path} cannot be used: {bad} is not finite")
    encoder = {name: t for name, t in renamed.items() if re.fullmatch(ENCODER, name)}
    head_state = {name: t for name, t in renamed.items() if name not in encoder}
    has_head = any(name.startswith("head.") for name in head_state)
    _check_complete(encoder, head_state, path)

    metadata = _own_metadata(content, path)
    if names is HUGGING_FACE:
        metadata |= _hf_metadata(path.parent)
    *_, patch_height, patch_size = encoder["patch_embed.proj.weight"].shape
    if patch_height != patch_size:
        raise InputError(f"{path} has patches of {patch_height} x {patch_size} px; ours are square")
    _, num_positions, _ = encoder["pos_embed"].shape
    img_size = _image_size(num_positions - 1, patch_size, metadata, path)
    mean, std = check_mean_std(metadata.get("mean"), metadata.get("std"))
    _check_metadata(metadata)
    pool = (
        "avg" if "fc_norm.weight" in head_state else "cls" if "norm.weight" in head_state else None
    )
    return EncoderWeights(
        encoder,
        head_state,
        img_size,
        kind=metadata.get("kind") or names.kind,
        mean=mean,
        std=std,
        classes=metadata.get("classes") if has_head else None,
        pool=metadata.get("pool") or (pool if has_head else None),
        crop_pct=metadata.get("crop_pct"),
        num_heads=metadata.get("num_heads"),
        norm_eps=metadata.get("norm_eps"),
        left_out=tuple(left_out),
    )


def _rename(state: dict, path: Path) -> tuple[WeightNames, dict[str, Tensor], list[str]]:
    """Find how a file calls its weights; return that, the weights renamed, and what is left out."""
    cleaned = clean_state_dict(state)  # of what DDP and torch.compile put before a name
    found = (n for n in (PRETRAINED, TIMM, HUGGING_FACE) if "cls_token" in map(n.rename, cleaned))
    names = next(found, None)
    if names is None:
        raise InputError(
            f"no encoder in {path}: what is read is a ViT with a class token, under the names of "
            "this project, of released CrossMAE and MAE, of timm or of Hugging Face"
        )
    new_names = {name: names.rename(name) for name in cleaned}
    unknown = [name for name, new in new_names.items() if new is None]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(
            f"{path} has {unknown[0]}{more}, which a plain ViT does not compute: use another file"
        )
    if any(re.fullmatch(MIXING_WEIGHTS, name) for name in cleaned):
        new_names = {n: "" if new.startswith("norm.") else new for n, new in new_names.items()}
    kept = {name: new for name, new in new_names.items() if new}
    if len(set(kept.values())) < len(kept) or len(cleaned) < len(state):
        raise InputError(f"{path} has a weight twice, under two names: use another file")
    renamed = {new: cleaned[name] for name, new in kept.items()}
    return names, _join_qkv(renamed), [name for name, new in new_names.items() if not new]


def _join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = dict(state)
    for name in state:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if parts[0] != parts[1] and all(part in state for part in parts):
            tensors = [joined.pop(part) for part in parts]
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(tensors)
    return joined


def _check_complete(encoder: dict[str, Tensor], head_state: dict[str, Tensor], path: Path) -> None:
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
            f"{path} has both norm and fc_norm, and our ViT computes one of them: use another file"
        )


def _own_metadata(content: dict, path: Path) -> dict:
    """What a file of this project says: img_size, mean, std and the like."""
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
        "pool": options.get("pool"),
        "mean": content["mean"],
        "std": content["std"],
        "classes": content.get("classes"),
        "crop_pct": content.get("crop_pct", content.get("crop_share")),
    }


def check_mean_std(
    mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float] | None, list[float] | None]:
    """The mean and standard deviation of RGB channels, as a file tells them, or None.

    Raises:
        TypeError, ValueError: they are not three finite numbers each, std above 0.
    """
    checked = [None if v is None else [float(x) for x in v] for v in (mean, std)]
    for values in filter(None, checked):
        if len(values) != 3 or not all(map(math.isfinite, values)):
            raise ValueError(f"{values} are not three finite numbers")
    if std is not None and min(checked[1]) <= 0:
        raise ValueError(f"a std of {std} is not above 0")
    return tuple(checked)


def _check_metadata(metadata: dict) -> None:
    """Raise TypeError or ValueError where a file tells settings that mean nothing."""
    classes, pool, share = (metadata.get(name) for name in ("classes", "pool", "crop_pct"))
    if not all(isinstance(name, str) for name in classes or []):
        raise TypeError("classes are called by strings")
    if pool not in (None, "avg", "cls") or not 0 < (1 if share is None else share) <= 1:
        raise ValueError(f"pool {pool}, crop_pct {share}")
    if not 0 <= (metadata.get("norm_eps") or 0) < 1:
        raise ValueError(f"layer_norm_eps {metadata['norm_eps']}")


def _hf_metadata(folder: Path) -> dict:
    """The same of the files beside Hugging Face weights, as far as they are there."""
    config = _read_json(folder / "config.json")
    processor = _read_json(folder / "preprocessor_config.json")
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise InputError(f"{folder / 'config.json'} has hidden_act {activation}; our ViT has gelu")
    labels = config.get("id2label") or {}
    classes = [labels[key] for key in sorted(labels, key=int)]
    if classes == [f"LABEL_{i}" for i in range(len(classes))]:  # nobody has named them
        classes = None
    return {
        "img_size": config.get("image_size"),
        "num_heads": config.get("num_attention_heads"),
        "norm_eps": config.get("layer_norm_eps"),
        "mean": processor.get("image_mean"),
        "std": processor.get("image_std"),
        "classes": classes,
    }


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not named settings")
    return content


def _image_size(num_patches: int, patch_size: int, metadata: dict, path: Path) -> tuple[int, int]:
    """Height and width: as the file tells them, else a square; whole patches."""
    size = metadata.get("img_size") or math.isqrt(num_patches) * patch_size
    height, width = map(int, (size, size) if isinstance(size, int) else size)
    rows, columns = height // patch_size, width // patch_size
    if rows * columns != num_patches or rows < 1:
        raise InputError(
            f"{path} has positions for {num_patches} patches beside the class token, which are not "
            f"the {rows} x {columns} patches of images of {height} x {width}: use another file"
        )
    return rows * patch_size, columns * patch_size


def load_encoder(model: nn.Module, weights: EncoderWeights, *, head: bool) -> None:
    """Load weights into a VisionTransformer; the log says what is new and what is left out.

    Position embeddings are resampled where the images have another size. The norm before the head
    is the file's where it has one for the model's pooling, else it stays as it is.

    Args:
        model: of `models_vit`; unchanged if anything does not fit.
        weights: of `read_encoder`.
        head: load the head, too, and insist that the norm before it comes along.

    Raises:
        InputError: the weights do not fit the model.
    """
    state = fit_encoder(model, weights, head=head)
    if weights.norm_eps not in (None, model.blocks[0].norm1.eps):
        _logger.warning(
            "the %s was trained with layer_norm_eps %g and is used with %g: features differ a bit",
            *(weights.kind, weights.norm_eps, model.blocks[0].norm1.eps),
        )
    model.load_state_dict(state, strict=False)

    _logger.info("loaded %d tensors of the %s", len(state), weights.kind)
    if weights.grid_size != model.grid_size:
        grids = (*weights.grid_size, *model.grid_size)
        _logger.info("positions resampled from %d x %d patches to %d x %d", *grids)
    new = [name for name in model.state_dict() if name not in state]
    if new:
        _logger.info("new: %s", ", ".join(new))
    left_out = [name for name in weights.head_state if name not in state]
    if left_out:
        _logger.info("left out: %s", ", ".join(left_out))


def fit_encoder(model: nn.Module, weights: EncoderWeights, *, head: bool) -> dict[str, Tensor]:
    """What `load_encoder` loads of the weights: checked, and with its positions resampled.

    Raises:
        InputError: the weights do not fit the model.
    """
    _check_sizes(model, weights)
    norm = "fc_norm." if model.pool == "avg" else "norm."
    wanted = (norm, "head.") if head else (norm,)
    state = {
        **weights.encoder,
        **{name: tensor for name, tensor in weights.head_state.items() if name.startswith(wanted)},
    }
    if weights.grid_size != model.grid_size:
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"], new_size=list(model.grid_size), old_size=list(weights.grid_size)
        )
    own = model.state_dict()
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            ours = _size_text(own[name].shape) if name in own else "nothing"
            raise InputError(
                f"{name} of the {weights.kind} is {_size_text(tensor.shape)} and {ours} in the "
                "model: choose the model that it was trained as"
            )
    new = [name for name in own if name not in state]
    if head and new:
        raise InputError(
            f"the {weights.kind} has no {', '.join(new)}: with --pool {model.pool} the head cannot "
            "be used"
        )
    return state


def _check_sizes(model: nn.Module, weights: EncoderWeights) -> None:
    """Refuse weights of another size, before it shows as a shape that says little."""
    patch_size, embed_dim, depth = weights.shape
    sizes = [
        ("patches of {} px", patch_size, model.patch_size),
        ("{} channels", weights.in_chans, model.in_chans),
        ("a width of {}", embed_dim, model.embed_dim),
        ("{} blocks", depth, len(model.blocks)),
        ("an MLP {} wide", weights.mlp_dim, model.blocks[0].mlp.fc1.out_features),
        ("{} attention heads", weights.num_heads, model.blocks[0].attn.num_heads),
    ]
    for text, theirs, ours in sizes:
        if theirs not in (None, ours):
            raise InputError(
                f"the {weights.kind} has {text.format(theirs)} and the model {text.format(ours)}: "
                "choose the model that it was trained as"
            )


def _size_text(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def input_format(
    weights: EncoderWeights | None,
    *,
    img_size: Sequence[int] | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    default_size: int,
) -> tuple[tuple[int, int], list[float], list[float]]:
    """How images come into a model: as the user says, else as its weights were trained.

    Args:
        weights: None starts from scratch.
        img_size: one side, or height and width; as the user says, if they do.
        mean, std: of the channels, in 0 to 1; likewise.
        default_size: side in pixels where there are no weights. ImageNet's normalisation is taken
            where they do not tell theirs.

    Returns:
        (height, width), mean and std.
    """
    own_size = weights.img_size if weights else (default_size, default_size)
    own_mean, own_std = (weights.mean, weights.std) if weights else (None, None)
    height, width = tuple(img_size) * (2 // len(img_size)) if img_size else own_size
    return (
        (height, width),
        list(mean or own_mean or IMAGENET_DEFAULT_MEAN),
        list(std or own_std or IMAGENET_DEFAULT_STD),
    )


def save_encoder(weights: EncoderWeights, path: Path) -> None:
    """Write an encoder-only file (.safetensors), which `read_encoder` reads back bit for bit.

    Raises:
        OSError: it cannot be written.
    """
    metadata = weights._asdict()
    for key in ("encoder", "head_state", "left_out"):
        metadata.pop(key)
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    metadata["format"] = ENCODER_FORMAT
    save_safetensors({**weights.encoder, **weights.head_state}, path, metadata)
