"""The ViT: its layers and sizes, the classifier, and the linear probe.

Parameter names are timm's and MAE's, so that weights move between projects without a table.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor

from util.kernels import scaled_dot_product_attention
from util.patches import RawImages, patchify
from util.pos_embed import sincos_table

NORM_EPS = 1e-6  # of every LayerNorm, as in MAE


class ModelSize(NamedTuple):
    """An encoder's size (Sec. 4, App. A.6)."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    img_size: int = 224
    mlp_dim: int | None = None
    """None is 4 x embed_dim."""


SIZES = {
    "tiny_patch4": ModelSize(4, 192, 12, 3, img_size=32),
    "tiny_patch16": ModelSize(16, 192, 12, 3),
    "small_patch16": ModelSize(16, 384, 12, 6),
    "base_patch16": ModelSize(16, 768, 12, 12),
    "large_patch16": ModelSize(16, 1024, 24, 16),
    "huge_patch14": ModelSize(14, 1280, 32, 16),
    # Not in the paper: Zhai et al., Scaling Vision Transformers, Table 2.
    "giant_patch14": ModelSize(14, 1408, 40, 16, mlp_dim=6144),
}
POOLS = ("avg", "cls")


def layer_norm(dim: int) -> nn.LayerNorm:
    """A LayerNorm as everywhere in MAE: scale 1, shift 0, eps 1e-6."""
    return nn.LayerNorm(dim, eps=NORM_EPS)


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer started as in MAE: Xavier-uniform weights, no bias at first."""
    layer = nn.Linear(in_features, out_features)
    # Right after PyTorch's own draws: what a seed stands for depends on the order of all draws.
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError where a width cannot be split into so many heads."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{num_heads} attention heads do not divide a width of {dim}")


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, h*d) -> (B, h, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, its heads joined again: q (B, h, N, d), k and v (B, h, M, d) -> (B, N, h*d)."""
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class PatchProjection(nn.Conv2d):
    """The usual strided convolution, of patches that have been cut out already: a linear layer."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__(in_chans, embed_dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.weight.flatten(1))

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, p*p*C), laid out by `util.patches.patchify` -> (B, N, D)."""
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C)
        return F.linear(patches, weight, self.bias)  # (B, N, D)


class PatchEmbed(nn.Module):
    """Embeds flattened patches; the layer inside has timm's name and shape."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(in_chans, embed_dim, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, N, p*p*C), laid out by `util.patches.patchify` -> (B, N, D)."""
        return self.proj(patches)


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
        qkv = self.qkv(x).chunk(3, dim=-1)  # 3 of (B, N, D)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv)  # (B, h, N, d)
        return self.proj(attend(q, k, v))


class Mlp(nn.Module):
    """Two linear layers with a GELU between; None for `mlp_dim` is four times the width."""

    def __init__(self, dim: int, mlp_dim: int | None = None) -> None:
        super().__init__()
        mlp_dim = mlp_dim or 4 * dim
        self.fc1 = xavier_linear(dim, mlp_dim)
        self.fc2 = xavier_linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        dim: D.
        num_heads: attention heads.
        drop_path: chance in training to leave a branch out for an image (stochastic depth).
        mlp_dim: see Mlp.
    """

    def __init__(
        self, dim: int, num_heads: int, drop_path: float = 0.0, mlp_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim, mlp_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def learned_token(dim: int) -> nn.Parameter:
    """A learned (1, 1, dim) vector, started at N(0, 0.02²) as MAE's tokens."""
    return nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))


def fixed_positions(dim: int, grid_size: tuple[int, int]) -> nn.Parameter:
    """The sine-cosine table as a parameter that is saved with the weights and never trained."""
    return nn.Parameter(sincos_table(dim, grid_size), requires_grad=False)


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Read an image size: a side, or (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


class ViT(nn.Module):
    """A ViT without a final norm and a head.

    Args:
        img_size: side, or (height, width), in pixels; divisible by patch_size.
        patch_size: p in pixels.
        in_chans: C.
        embed_dim: D, divisible by 4 and by num_heads.
        depth: number of blocks.
        num_heads: attention heads of each block.
        mlp_dim: of each block, see Mlp.
        drop_path: of the last block, see Block; it rises linearly from 0 in the first.

    Raises:
        ValueError: the patch side does not divide the image.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int],
        patch_size: int,
        in_chans: int = 3,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_dim: int | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.in_chans = as_pair(img_size), patch_size, in_chans
        height, width = self.img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"patches of {patch_size} px do not divide {height} x {width} px")
        self.grid_size = (height // patch_size, width // patch_size)
        self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = learned_token(embed_dim)
        self.pos_embed = fixed_positions(embed_dim, self.grid_size)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate, mlp_dim) for rate in rates)

    @property
    def num_patches(self) -> int:
        """L, patches per image."""
        return self.grid_size[0] * self.grid_size[1]

    def check_images(self, images: Tensor | RawImages) -> None:
        """Raise ValueError for images that `pos_embed` does not fit."""
        if images.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f"the encoder takes images of {self.in_chans} x {self.img_size[0]} x "
                f"{self.img_size[1]}, not {' x '.join(map(str, images.shape[1:]))}"
            )

    def embed(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Embed patches (B, N, p*p*C) and add their positions (1 or B, N, D).

        Returns:
            The input of the first block, class token first, (B, 1+N, D).
        """
        x = self.patch_embed(patches) + positions  # (B, N, D)
        # Flat, so that its gradient is contiguous, as DDP's buckets want it.
        cls_token = (self.cls_token + self.pos_embed[:, :1]).flatten()  # (D,)
        return torch.cat((cls_token.expand(x.shape[0], 1, -1), x), dim=1)  # (B, 1+N, D)

    def tokens(self, images: Tensor) -> Tensor:
        """Embed every patch, (B, C, H, W) -> (B, 1+L, D)."""
        self.check_images(images)
        patches = patchify(images, self.patch_size)  # (B, L, p*p*C)
        return self.embed(patches, self.pos_embed[:, 1:])  # (B, 1+L, D)

    def encode(self, images: Tensor) -> Tensor:
        """The last block's output, (B, C, H, W) -> (B, 1+L, D)."""
        x = self.tokens(images)  # (B, 1+L, D)
        for block in self.blocks:
            x = block(x)
        return x

    def features(self, images: Tensor) -> Tensor:
        """The mean of the patch tokens, normalised; (B, C, H, W) -> (B, D).

        What k-NN compares. The norm has no scale and shift, because an encoder has none.
        """
        x = self.encode(images)[:, 1:].mean(dim=1)  # (B, D)
        return F.layer_norm(x, (self.embed_dim,), eps=NORM_EPS)


class VisionTransformer(ViT):
    """A classifier: a pooled, normalised output and a linear head (App. A.6).

    Weights have timm's names. Positions start from the sine-cosine table and are trained.

    Args:
        num_classes: of the head; 0 is no head, and the output is the features.
        pool: "avg" takes the mean of the patch tokens and normalises it (`fc_norm`), "cls"
            normalises the class token (`norm`).
        head_init_std: of the head's weights at the start.
        vit_options: see ViT.

    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        pool: str,
        head_init_std: float = 2e-5,
        **vit_options: object,
    ) -> None:
        super().__init__(**vit_options)
        if pool not in POOLS:
            raise ValueError(f"pool is one of {POOLS}, not {pool!r}")
        self.pool = pool
        self.pos_embed.requires_grad_()
        if pool == "avg":
            self.fc_norm = layer_norm(self.embed_dim)
        else:
            self.norm = layer_norm(self.embed_dim)
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.trunc_normal_(self.head.weight, std=head_init_std)
            nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised -> (B, D)."""
        x = self.encode(images)  # (B, 1+L, D)
        if self.pool == "avg":
            return self.fc_norm(x[:, 1:].mean(dim=1))
        return self.norm(x[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised -> logits (B, num_classes)."""
        return self.head(self.features(images))

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters are one layer to `timm.optim.param_groups_layer_decay`: MAE's rule.

        The embeddings, every block, and norm and head together.
        """
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}


def build_vit(
    size: ModelSize, *, img_size: int | Sequence[int] | None = None, **options: object
) -> VisionTransformer:
    """A classifier of a named size.

    Args:
        size: one of SIZES.
        img_size: side, or (height, width), in pixels; None takes the size's own.
        options: of VisionTransformer: num_classes, pool, drop_path, in_chans.
    """
    shape = size if img_size is None else size._replace(img_size=img_size)
    return VisionTransformer(**shape._asdict(), **options)


class FeatureNorm(nn.BatchNorm1d):
    """Batch normalisation without scale and shift, as MAE's linear probe has it (App. B.1)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, affine=False, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D), by the batch's statistics in training, else by running ones."""
        if self.training and len(x) == 1:  # one image has no variance
            return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)
        return super().forward(x)


def make_linear_probe(model: VisionTransformer, num_classes: int) -> None:
    """Freeze a model, and put a normalised linear head on it that is trained (App. B.1)."""
    model.requires_grad_(False)
    head = nn.Linear(model.embed_dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    model.head = nn.Sequential(FeatureNorm(model.embed_dim), head)
