"""Where masked tokens attend in a decoder (Fig. 1b, Table 6, App. A.1 and A.2).

The maps are recomputed from queries and keys that forward hooks see, because the fast kernels never
form them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from util.masking import TokenSplit

KEYS = ("class", "visible", "masked", "itself")
"""Kinds of keys: the class token, visible tokens, masked ones, and of these the query itself."""
READINGS = {
    "received": "sum over the masked tokens, per key (i)",
    "per_key": "mean per key, relative to uniform attention (ii)",
    "logits": "mean score before the softmax (iii)",
}
"""Readings of the paper's numbers, properties of LayerAttention."""
LAYERS = {"attn": "self", "self_attn": "self", "cross_attn": "cross"}  # attribute of a block: kind


class AttentionLayer(NamedTuple):
    """An attention layer of a decoder."""

    block: int
    """Number of its block, from 1."""
    kind: str
    """"self" or "cross"."""
    module: nn.Module


def attention_layers(decoder: nn.Module) -> list[AttentionLayer]:
    """Attention layers of a decoder in the order of computation, as CrossMAE and MAE name them."""
    return [
        AttentionLayer(number, kind, layer)
        for number, block in enumerate(decoder.blocks, start=1)
        for name, kind in LAYERS.items()
        if (layer := getattr(block, name, None)) is not None
    ]


@contextmanager
def watch_scores(layer: nn.Module, use: Callable[[Tensor], None]) -> Iterator[None]:
    """Context in which a function gets the scores of each forward pass of an attention layer.

    Args:
        layer: has `num_heads` and the linear layers `qkv`, or `q` and `kv`.
        use: takes scaled scores before the softmax, (B, h, N, M), in at least float32.
    """
    queries: list[Tensor] = []

    def score(query: Tensor, key: Tensor) -> None:
        q, k = (_heads(part, layer.num_heads) for part in (query, key))  # (B, h, N or M, d)
        use((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1))

    def on_qkv(_: nn.Module, inputs: tuple, output: Tensor) -> None:
        score(*output.chunk(3, dim=-1)[:2])

    def on_kv(_: nn.Module, inputs: tuple, output: Tensor) -> None:
        score(queries.pop(), output.chunk(2, dim=-1)[0])

    if hasattr(layer, "qkv"):
        handles = [layer.qkv.register_forward_hook(on_qkv)]
    else:
        keep = layer.q.register_forward_hook(lambda *call: queries.append(call[-1]))
        handles = [keep, layer.kv.register_forward_hook(on_kv)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_layers(uses: Iterable[tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """Context of `watch_scores` for several layers, each with its own function."""
    with ExitStack() as watching:
        for layer, use in uses:
            watching.enter_context(watch_scores(layer, use))
        yield


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, h*d) -> (B, h, N, d), in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class LayerAttention(NamedTuple):
    """Attention of the masked tokens in one layer, averaged over these tokens and over images."""

    block: int
    kind: str
    mass: Tensor
    """(h, 4), in the order of KEYS: sum of the attention to keys of a kind. The first three sum to
    1; "itself" is a part of "masked", as in the paper."""
    logits: Tensor
    """(h, 4): mean score before the softmax; NaN for a kind without keys."""
    num_keys: tuple[int, int, int, int]
    """Keys of each kind that a masked token can attend to."""
    num_queries: int
    """P, the number of masked tokens."""

    @property
    def per_key(self) -> Tensor:
        """(h, 4): mean attention to a key of a kind, relative to uniform attention (reading ii)."""
        return self.mass / self._counts * sum(self.num_keys[:3])

    @property
    def received(self) -> Tensor:
        """(h, 4): attention that a key gets from all masked tokens together (reading i)."""
        return self.mass / self._counts * self.num_queries

    @property
    def _counts(self) -> Tensor:
        """(4,), NaN instead of 0."""
        counts = torch.tensor(self.num_keys, dtype=self.mass.dtype)
        return counts.where(counts > 0, torch.nan)


class _Totals:
    """Sums over the batches for one layer."""

    def __init__(self, layer: AttentionLayer) -> None:
        self.layer = layer
        self.mass = self.logits = 0.0
        self.num_images = self.num_queries = 0
        self.num_keys = (0, 0, 0, 0)

    def add(self, split: TokenSplit, scores: Tensor) -> None:
        """Add the scores (B, h, N, M) of a batch; the masked tokens are the last of N and M."""
        counts = _key_counts(self.layer.kind, split, scores.shape[-1])
        self.num_queries = split.predicted.shape[1]
        scores = scores[:, :, -self.num_queries :]  # (B, h, P, M)
        self.mass = self.mass + _sums(scores.softmax(dim=-1), counts)
        self.logits = self.logits + _sums(scores, counts)
        self.num_keys = (*counts, int(counts[2] > 0))
        self.num_images += len(scores)

    def result(self) -> LayerAttention:
        number = self.num_images * self.num_queries
        keys = torch.tensor(self.num_keys).double()
        logits = self.logits / number / keys.where(keys > 0, torch.nan)
        mass = self.mass / number
        block, kind, _ = self.layer
        return LayerAttention(block, kind, mass, logits, self.num_keys, self.num_queries)


def _key_counts(kind: str, split: TokenSplit, num_keys: int) -> tuple[int, int, int]:
    """Numbers of class, visible and masked keys: MAE's layers see all, CrossMAE's only a part."""
    visible, masked = split.visible.shape[1], split.predicted.shape[1]
    if kind == "cross":
        return 1, visible, 0
    return (0, 0, masked) if num_keys == masked else (1, visible, masked)


def _sums(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Sum values (B, h, P, M) over images, queries and keys of each kind -> float64 (h, 4)."""
    parts = values.split(list(counts), dim=-1)
    itself = parts[2].diagonal(dim1=-2, dim2=-1) if counts[2] else parts[2].sum(dim=-1)
    sums = [part.sum(dim=(0, 2, 3)) for part in parts]  # 3 of (h,)
    return torch.stack([*sums, itself.sum(dim=(0, 2))], dim=-1).cpu().double()


@torch.no_grad()
def measure_attention(
    model: nn.Module, batches: Iterable[tuple[Tensor, TokenSplit]]
) -> list[LayerAttention]:
    """Measure where the masked tokens of many images attend, in every layer of the decoder.

    Args:
        model: a MaskedAutoencoder, in evaluation mode.
        batches: at least one, of images (B, C, H, W) and a split that predicts every masked patch,
            with the same numbers of tokens in all batches.

    Returns:
        One for each layer of `attention_layers`.
    """
    totals = [_Totals(layer) for layer in attention_layers(model.decoder)]
    for images, split in batches:
        with watch_layers((total.layer.module, partial(total.add, split)) for total in totals):
            model.predict(images, split)
    return [total.result() for total in totals]


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, split: TokenSplit) -> Tensor:
    """Attention of every masked token, averaged over heads and layers.

    Args:
        model, images, split: see `measure_attention`.

    Returns:
        (B, P, 1+L), with a sum of 1: to the class token, then to every patch in row-major order; 0
        to those that the decoder does not attend to.
    """
    num_masked = split.predicted.shape[1]
    ids = torch.cat((split.visible, split.predicted), dim=1)  # (B, L)
    maps = torch.zeros(*split.predicted.shape, 1 + ids.shape[1], device=images.device)

    def add(kind: str, scores: Tensor) -> None:
        counts = _key_counts(kind, split, scores.shape[-1])
        attention = scores[:, :, -num_masked:].softmax(dim=-1).mean(dim=1)  # (B, P, M)
        to_class, *to_patches = attention.split(counts, dim=-1)
        own = ids[:, : counts[1]] if kind == "cross" else ids[:, -(counts[1] + counts[2]) :]
        places = (1 + own).unsqueeze(1).expand(-1, num_masked, -1)  # (B, P, M)
        maps.scatter_add_(2, places, torch.cat(to_patches, dim=-1).to(maps.dtype))
        maps[..., :1] += to_class.sum(dim=-1, keepdim=True)

    layers = attention_layers(model.decoder)
    with watch_layers((layer.module, partial(add, layer.kind)) for layer in layers):
        model.predict(images, split)
    return maps / len(layers)


class Comparison(NamedTuple):
    """The paper's comparison of visible and masked keys."""

    visible: float
    masked: float

    @property
    def ratio(self) -> float | None:
        """Above 1 if visible keys get more; None for scores that are not both above 0."""
        return self.visible / self.masked if min(self) > 0 else None


def compare_keys(layers: Sequence[LayerAttention]) -> dict[str, Comparison]:
    """Average attention to visible and masked keys over heads and layers, by reading.

    Args:
        layers: with keys of both kinds.

    The paper prints 1.42 and 0.39 without a normalization; two readings of probabilities fit, and
    the scores before the softmax may have any mean.
    """
    means = {
        name: torch.stack([getattr(layer, name) for layer in layers]).mean(dim=(0, 1))
        for name in READINGS
    }
    return {
        name: Comparison(mean[KEYS.index("visible")].item(), mean[KEYS.index("masked")].item())
        for name, mean in means.items()
    }
