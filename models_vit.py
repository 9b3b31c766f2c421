"""The transformer parts that every model here is built from, and the sizes they come in.

Parameter names are timm's and MAE's, so that weights move between projects without a table.
"""

from typing import NamedTuple

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-6  # of every LayerNorm, as in MAE


class ModelSize(NamedTuple):
    """Encoder and decoder widths of a named size (Sec. 4, App. A.6)."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_num_heads: int
    img_size: int = 224


# The decoder's width is MAE's 512 except for small models; every decoder head is 32 wide.
TINY_PATCH4 = ModelSize(4, 192, 12, 3, decoder_embed_dim=128, decoder_num_heads=4, img_size=32)
TINY_PATCH16 = ModelSize(16, 192, 12, 3, decoder_embed_dim=128, decoder_num_heads=4)
SMALL_PATCH16 = ModelSize(16, 384, 12, 6, decoder_embed_dim=256, decoder_num_heads=8)
BASE_PATCH16 = ModelSize(16, 768, 12, 12, decoder_embed_dim=512, decoder_num_heads=16)
LARGE_PATCH16 = ModelSize(16, 1024, 24, 16, decoder_embed_dim=512, decoder_num_heads=16)
HUGE_PATCH14 = ModelSize(14, 1280, 32, 16, decoder_embed_dim=512, decoder_num_heads=16)


def layer_norm(dim: int) -> nn.LayerNorm:
    """A LayerNorm as everywhere in MAE: scale 1, shift 0, eps 1e-6."""
    return nn.LayerNorm(dim, eps=NORM_EPS)


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer started as in MAE: Xavier-uniform weights, no bias at first."""
    linear = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError where a width cannot be split into so many heads."""
    if dim % num_heads:
        raise ValueError(f"{num_heads} attention heads do not divide a width of {dim}")


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, h*d) -> (B, h, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention, heads joined again: q (B, h, N, d), k and v (B, h, M, d) -> (B, N, h*d).

    PyTorch chooses the kernel, FlashAttention-2 among them (App. A.7).
    """
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class PatchEmbed(nn.Module):
    """Linear embedding of flattened patches, with the weights of the usual strided convolution."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, p*p*C), laid out by `util.patches.patchify` -> (B, N, D)."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C)
        return F.linear(patches, weight, self.proj.bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = xavier_linear(dim, 3 * dim)
        self.proj = xavier_linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(attend(q, k, v))


class Mlp(nn.Module):
    """Two linear layers with a GELU between, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = xavier_linear(dim, 4 * dim)
        self.fc2 = xavier_linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block: self-attention, then MLP, each added to the stream."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
