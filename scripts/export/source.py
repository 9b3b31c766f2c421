"""What is exported: a checkpoint's weights, and how images are prepared for them."""

import logging
from typing import NamedTuple

from models import find_size
from models_vit import VisionTransformer, build_vit, fold_probe
from util.data.transforms import default_crop_pct
from util.errors import InputError, counted
from util.normalization import PixelFormat, usual_colors
from util.settings.model import ATTENTION, SIZES
from util.weights.encoder import EncoderWeights, load_encoder, read_encoder
from util.weights.metadata import TASKS

# A weight that only a decoder of this method has, in our checkpoints and in released ones.
DECODERS = {
    "CrossMAE": {
        "decoder.blocks.0.cross_attn.q.weight",
        "decoder_blocks.0.cross_attn.q.weight",
    },
    "MAE": {"decoder.embed.weight", "decoder_embed.weight"},
}

_logger = logging.getLogger(__name__)


class Preparation(NamedTuple):
    """What `eval_transform` does to an image before the model sees it."""

    img_size: tuple[int, int]
    mean: list[float]
    std: list[float]
    crop_pct: float
    interpolation: str
    squash: bool
    tile: int | None
    pixels: PixelFormat

    @property
    def cover_size(self) -> tuple[int, int]:
        """Height and width that a resized image covers before it is cropped."""
        height, width = (int(side / self.crop_pct) for side in self.img_size)
        return height, width

    def __str__(self) -> str:
        """Such as `224 x 224 px, mean=(...), std=(...), crop_pct=0.875, bicubic`."""
        words = [
            f"{self.img_size[0]} x {self.img_size[1]} px",
            f"mean={tuple(self.mean)}",
            f"std={tuple(self.std)}",
            f"crop_pct={self.crop_pct}",
            self.interpolation,
        ]
        words += ["squeezed, not cropped"] * self.squash
        return ", ".join([*words, *([] if self.pixels.is_rgb8 else [self.kind]), *self.notes])

    @property
    def kind(self) -> str:
        """Such as `RGB images`."""
        if self.pixels.is_rgb8:
            return "RGB images"
        return f"images of {counted(self.pixels.num_channels, 'channel')}"

    @property
    def notes(self) -> list[str]:
        """Say which part of large images is taken, and which values become 0 and 1, if unusual."""
        notes = []
        if self.tile is not None:
            notes.append(f"larger images are cropped to {self.tile} px in their middle first")
        if self.pixels.value_range is not None:
            low, high = self.pixels.value_range
            notes.append(f"values are scaled so that {low:g} becomes 0 and {high:g} becomes 1")
        elif not self.pixels.is_rgb8:
            notes.append(
                "values are scaled by their type, so that 0 to 255, 0 to 65535 or -32768 to 32767 "
                "becomes 0 to 1 and floating point stays as it is"
            )
        return notes


class Source(NamedTuple):
    """A checkpoint to export."""

    checkpoint: str
    weights: EncoderWeights
    size: str
    """Such as base_patch16."""
    images: Preparation
    encoder_only: bool

    @property
    def method(self) -> str | None:
        """The method whose decoder the checkpoint has, or None."""
        left_out = set(self.weights.left_out)
        return next((method for method, names in DECODERS.items() if names & left_out), None)


def read_source(checkpoint: str, *, encoder_only: bool) -> Source:
    """Read a checkpoint.

    Args:
        checkpoint: what `read_encoder` reads.
        encoder_only: without its head and its decoder.

    Raises:
        InputError: it cannot be read, or its size is unknown.
    """
    weights = read_encoder(checkpoint)
    try:
        size = find_size(*weights.shape)
    except ValueError as error:
        raise InputError(f"{checkpoint} cannot be exported: {error}") from error
    if encoder_only:
        weights = without_head(weights)
    return Source(checkpoint, weights, size, preparation(weights), encoder_only)


def without_head(weights: EncoderWeights) -> EncoderWeights:
    """Leave out the head and what is known about it, but not the norm before it."""
    norms = {n: t for n, t in weights.head_state.items() if not n.startswith(("head.", "attn_"))}
    about = dict.fromkeys(("classes", "pool", "layers", "task", "target_scale"))
    return weights._replace(head_state=norms, **about)


def without_fc_norm(weights: EncoderWeights) -> EncoderWeights:
    """Leave out the head and fc_norm, which libraries that normalize every token lack."""
    weights = without_head(weights)
    norms = {n: t for n, t in weights.head_state.items() if n.startswith("norm.")}
    return weights._replace(head_state=norms)


def preparation(weights: EncoderWeights) -> Preparation:
    """Return how images are prepared; with usual values for what the file does not say."""
    mean, std = usual_colors(weights.in_chans)
    if weights.mean is None or weights.std is None:
        taken = "ImageNet's" if weights.in_chans == 3 else "0 and 1"
        _logger.info("the checkpoint has no mean and std, so %s are taken", taken)
    crop_pct = weights.crop_pct
    return Preparation(
        weights.img_size,
        weights.mean or mean,
        weights.std or std,
        default_crop_pct(weights.img_size) if crop_pct is None else crop_pct,
        **weights.resizing,
        tile=weights.tile,
        pixels=weights.pixels,
    )


def reading_settings(weights: EncoderWeights) -> dict[str, object]:
    """Return what a config.json says about reading images, if unusual, for our own reader."""
    settings = {} if weights.tile is None else {"tile": weights.tile}
    return settings if weights.pixels.is_rgb8 else settings | weights.pixels.header


def problem_type(weights: EncoderWeights) -> str:
    """Return Hugging Face's name of what the head was trained for."""
    names = {task: name for name, task in TASKS.items()}
    return names[weights.task or "classification"]


def check_features(weights: EncoderWeights) -> None:
    """Raise InputError for a head on features that other projects do not have."""
    if weights.pool == ATTENTION or weights.layers not in (None, (weights.shape[2],)):
        what = "learned queries" if weights.pool == ATTENTION else "features of earlier blocks"
        raise InputError(
            f"the head reads {what}, which only this project's classifier has: use --format "
            "safetensors or --encoder_only"
        )


def linear_head(weights: EncoderWeights) -> EncoderWeights:
    """Fold a probe's normalization and a regression's scale into the head's linear layer."""
    head_state = fold_probe(weights.head_state)
    if weights.target_scale is not None:
        mean, std = weights.target_scale
        head_state["head.weight"] = head_state["head.weight"] * std
        head_state["head.bias"] = head_state["head.bias"] * std + mean
    return weights._replace(head_state=head_state, target_scale=None)


def build(weights: EncoderWeights, size: str, *, head: bool = True) -> VisionTransformer:
    """Build a new model that fits the weights, with their head or without one."""
    pool = "norm_avg" if weights.pool == "norm_avg" else "cls"
    return build_vit(
        SIZES[size],
        img_size=weights.img_size,
        in_chans=weights.in_chans,
        num_classes=(weights.num_classes or 0) if head else 0,
        pool="avg" if "fc_norm.weight" in weights.head_state else pool,
    )


def complete(weights: EncoderWeights, size: str) -> VisionTransformer:
    """Build a model and load the weights; a norm that they lack has scale 1 and shift 0.

    Args:
        weights: with a head that is one linear layer, see `linear_head`, or without one.

    Raises:
        InputError: the weights do not fit a ViT of that size.
    """
    model = build(weights, size)
    load_encoder(model, weights, head=weights.num_classes is not None)
    if not any(name in weights.head_state for name in ("norm.weight", "fc_norm.weight")):
        _logger.info("no final norm was trained: writing one with scale 1 and shift 0")
    return model.eval()
