"""The ViT: its parts and sizes, the encoder that pre-training trains, and the classifier.

Parameter names are timm's and MAE's, so that weights move between projects without a table.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor

from util.kernels import attention, linear
from util.masking import TokenSplit
from util.patches import RawImages, gather_patches, gather_tokens, patchify
from util.pos_embed import sincos_table
from util.recompute import Recomputing

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
    mlp_dim: int | None = None
    """Of the encoder; None is 4 x embed_dim."""


# The decoder's width is MAE's 512 except for small models; every decoder head is 32 wide.
TINY_PATCH4 = ModelSize(4, 192, 12, 3, decoder_embed_dim=128, decoder_num_heads=4, img_size=32)
TINY_PATCH16 = ModelSize(16, 192, 12, 3, decoder_embed_dim=128, decoder_num_heads=4)
SMALL_PATCH16 = ModelSize(16, 384, 12, 6, decoder_embed_dim=256, decoder_num_heads=8)
BASE_PATCH16 = ModelSize(16, 768, 12, 12, decoder_embed_dim=512, decoder_num_heads=16)
LARGE_PATCH16 = ModelSize(16, 1024, 24, 16, decoder_embed_dim=512, decoder_num_heads=16)
HUGE_PATCH14 = ModelSize(14, 1280, 32, 16, decoder_embed_dim=512, decoder_num_heads=16)
# Not of the paper: Zhai et al., Scaling Vision Transformers, Table 2.
GIANT_PATCH14 = ModelSize(
    14, 1408, 40, 16, decoder_embed_dim=512, decoder_num_heads=16, mlp_dim=6144
)
SIZES = {
    "tiny_patch4": TINY_PATCH4,
    "tiny_patch16": TINY_PATCH16,
    "small_patch16": SMALL_PATCH16,
    "base_patch16": BASE_PATCH16,
    "large_patch16": LARGE_PATCH16,
    "huge_patch14": HUGE_PATCH14,
    "giant_patch14": GIANT_PATCH14,
}
POOLS = ("avg", "cls")


def layer_norm(dim: int) -> nn.LayerNorm:
    """A LayerNorm as everywhere in MAE: scale 1, shift 0, eps 1e-6."""
    return nn.LayerNorm(dim, eps=NORM_EPS)


class Linear(nn.Linear):
    """A linear layer started as in MAE: Xavier-uniform weights, no bias at first."""

    def reset_parameters(self) -> None:
        """Start anew."""
        super().reset_parameters()  # its draws are part of what a seed stands for
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError where a width cannot be split into so many heads."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{num_heads} attention heads do not divide a width of {dim}")


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, h*d) -> (B, h, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, its heads joined again: q (B, h, N, d), k and v (B, h, M, d) -> (B, N, h*d)."""
    return attention(q, k, v).transpose(1, 2).flatten(2)


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
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def read(self, qkv: Tensor) -> Tensor:
        """What `qkv` made of the tokens, (B, N, 3D) -> (B, N, D)."""
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        return self.proj(attend(q, k, v))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.read(self.qkv(x))


class Mlp(nn.Module):
    """Two linear layers with a GELU between, M = `mlp_dim` wide inside; None is four times D."""

    def __init__(self, dim: int, mlp_dim: int | None = None) -> None:
        super().__init__()
        mlp_dim = mlp_dim or 4 * dim
        self.fc1 = Linear(dim, mlp_dim)
        self.fc2 = Linear(mlp_dim, dim)

    def contract(self, hidden: Tensor) -> Tensor:
        """What `fc1` made of the tokens, (B, N, M) -> (B, N, D)."""
        return self.fc2(F.gelu(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.contract(self.fc1(x))


class ResidualBlock(Recomputing):
    """What the blocks of encoder and decoder have in common: the normalised MLP at their end.

    They make `norm2`, `mlp` and `drop_path` themselves, each in its place among the parameters:
    saved optimizers know parameters by their order.
    """

    norm2: nn.LayerNorm
    mlp: Mlp
    drop_path: DropPath

    def add_branches(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the output of attention to the stream, then the MLP's; all (B, N, D)."""
        attended = self.drop_path(attended)
        if self.memory == "low":
            draws = self.drop_path.drop_prob > 0
            return self.recomputed(self.add_at_once, x, attended, draws=draws)
        x = x + attended
        hidden = self.recomputed(lambda x: self.mlp.fc1(self.norm2(x)), x)  # (B, N, M)
        return x + self.drop_path(self.recomputed(self.mlp.contract, hidden))

    def add_at_once(self, x: Tensor, attended: Tensor) -> Tensor:
        """`add_branches` as one piece: neither the sum nor the MLP's inside need be kept."""
        x = x + attended
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Block(ResidualBlock):
    """A pre-norm transformer block: self-attention, then MLP, each added to the stream.

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
        qkv = self.recomputed(lambda x: self.attn.qkv(self.norm1(x)), x)  # (B, N, 3D)
        return self.add_branches(x, self.recomputed(self.attn.read, qkv))


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


class ViTEncoder(nn.Module):
    """A ViT that sees only the visible patches and the class token (Sec. 3.1).

    The final LayerNorm is not part of it: with inter-block attention there is none (App. A.3).

    Args:
        img_size: side, or (height, width), in pixels; divisible by patch_size.
        patch_size: p in pixels.
        in_chans: C.
        embed_dim: D, divisible by 4 and by num_heads.
        depth: number of blocks.
        num_heads: attention heads of each block.
        drop_path: of the last block, see Block; it rises linearly from 0 in the first.
        mlp_dim: of each block, see Mlp.

    Raises:
        ValueError: the patch side does not divide the image.
    """

    def __init__(
        self,
        *,
        img_size: int | Sequence[int],
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        drop_path: float = 0.0,
        mlp_dim: int | None = None,
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

    def tokens(self, images: Tensor | RawImages, split: TokenSplit | None = None) -> Tensor:
        """Embed the visible patches, or all of them, behind the class token; see `forward`.

        Patches are picked before they are embedded, so that a masked patch costs nothing.

        Returns:
            The input of the first block, (B, 1+V, D) or (B, 1+L, D).
        """
        if images.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f"the encoder takes images of {self.in_chans} x {self.img_size[0]} x "
                f"{self.img_size[1]}, not {' x '.join(map(str, images.shape[1:]))}"
            )
        if split is not None and len(split.visible) != len(images):
            raise ValueError(f"a split of {len(split.visible)} images came with {len(images)}")
        positions = self.pos_embed[:, 1:]
        if split is None:
            patches = patchify(images, self.patch_size)  # (B, L, p*p*C)
        else:
            patches = gather_patches(images, split.visible, self.patch_size)  # (B, V, p*p*C)
            positions = gather_tokens(positions, split.visible)  # (B, V, D)
        tokens = self.patch_embed(patches) + positions  # (B, V or L, D)
        # Flat, so that its gradient is contiguous, as DDP's buckets want it.
        cls_token = (self.cls_token + self.pos_embed[:, :1]).flatten()  # (D,)
        return torch.cat((cls_token.expand(tokens.shape[0], 1, -1), tokens), dim=1)

    def features(self, images: Tensor) -> Tensor:
        """The mean of the last block's patch tokens, normalised; (B, C, H, W) -> (B, D).

        What k-NN compares. The norm has no scale and shift, because an encoder has none.
        """
        return F.layer_norm(self(images)[-1][:, 1:].mean(dim=1), (self.embed_dim,), eps=NORM_EPS)

    def forward(self, images: Tensor | RawImages, split: TokenSplit | None = None) -> list[Tensor]:
        """Encode the visible patches, or all of them.

        Args:
            images: (B, C, H, W), normalised; with a split, raw ones too.
            split: `visible` is (B, V); None encodes every patch, for downstream use.

        Returns:
            K = 1 + depth feature maps (B, 1+V, D), or (B, 1+L, D) without a split, class token
            first: the input of the first block, then every block's output.

        Raises:
            ValueError: the images have another size, or the split another batch size.
        """
        x = self.tokens(images, split)
        feature_maps = [x]
        for block in self.blocks:
            x = block(x)
            feature_maps.append(x)
        return feature_maps


class VisionTransformer(ViTEncoder):
    """The encoder with a pooled, normalised output and a linear head (App. A.6).

    Weights have timm's names. Positions start from the sine-cosine table and are trained.

    Args:
        num_classes: of the head; 0 is no head, and the output is the features.
        pool: "avg" takes the mean of the patch tokens and normalises it (`fc_norm`), "cls"
            normalises the class token (`norm`).
        head_init_std: of the head's weights at the start.
        encoder_options: see ViTEncoder.

    Raises:
        ValueError: the sizes do not fit together.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        pool: str,
        head_init_std: float = 2e-5,
        **encoder_options: object,
    ) -> None:
        super().__init__(**encoder_options)
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
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x)
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
    return VisionTransformer(
        img_size=size.img_size if img_size is None else img_size,
        patch_size=size.patch_size,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_dim=size.mlp_dim,
        **{"in_chans": 3, **options},
    )


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
