"""The ViT: its layers and sizes, the classifier, and the probes.

Parameters have timm's and MAE's names, so weights move between projects without renaming.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, resample_abs_pos_embed
from torch import Tensor

from util.kernels import scaled_dot_product_attention
from util.patches import RawImages, patchify
from util.pos_embed import sincos_table
from util.settings.model import ATTENTION, POOLS, ModelSize

NORM_EPS = 1e-6  # of every norm, as in MAE


def layer_norm(dim: int) -> nn.LayerNorm:
    """Build a LayerNorm with MAE's eps, 1e-6."""
    return nn.LayerNorm(dim, eps=NORM_EPS)


def xavier_linear(in_features: int, out_features: int) -> nn.Linear:
    """Build a linear layer initialized as in MAE: Xavier-uniform weights, zero bias."""
    layer = nn.Linear(in_features, out_features)
    # nn.Linear has drawn weights of its own before; skipping that would change what a seed gives.
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def check_heads(dim: int, num_heads: int) -> None:
    """Raise ValueError if a width cannot be split into this number of heads."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"a width of {dim} is not divisible by {num_heads} attention heads")


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, h*d) -> (B, h, N, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attend and join the heads: q (B, h, N, d), k and v (B, h, M, d) -> (B, N, h*d).

    Args:
        bias: (1 or B, h, N, M), added to the scores.
    """
    return scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


class PatchProjection(nn.Conv2d):
    """The usual strided convolution, applied to extracted patches as a linear layer."""

    def __init__(self, in_chans: int, embed_dim: int, patch_size: int) -> None:
        super().__init__(in_chans, embed_dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.weight.flatten(1))

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B, N, p*p*C) in the layout of `util.patches.patchify` -> (B, N, D)."""
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (D, p*p*C)
        return F.linear(patches, weight, self.bias)  # (B, N, D)


class PatchEmbed(nn.Module):
    """Patch embedding whose layer has timm's name and shape."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(in_chans, embed_dim, patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches (B, N, p*p*C) in the layout of `util.patches.patchify` -> (B, N, D)."""
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
    """Two linear layers with a GELU in between; `mlp_dim` defaults to four times the width."""

    def __init__(self, dim: int, mlp_dim: int | None = None) -> None:
        super().__init__()
        mlp_dim = mlp_dim or 4 * dim
        self.fc1 = xavier_linear(dim, mlp_dim)
        self.fc2 = xavier_linear(mlp_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        dim: D.
        drop_path: probability of skipping a branch for an image in training (stochastic depth).
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


class GridBlock(Block):
    """Transformer block whose attention also takes the (rows, columns) of the patches."""

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid_size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def learned_token(dim: int) -> nn.Parameter:
    """Build a learned (1, 1, dim) vector, initialized from N(0, 0.02²) as in MAE."""
    return nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))


def fixed_positions(dim: int, grid_size: tuple[int, int]) -> nn.Parameter:
    """The sine-cosine table as a parameter that is saved but not trained."""
    return nn.Parameter(sincos_table(dim, grid_size), requires_grad=False)


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Expand an image size, a side or (height, width), to (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


class ViT(nn.Module):
    """ViT without a final norm or a head.

    Args:
        img_size: side, or (height, width), in pixels; divisible by patch_size.
        patch_size: p, in pixels.
        in_chans: C.
        embed_dim: D, divisible by 4 and by num_heads.
        mlp_dim: see Mlp.
        drop_path: rate of the last block (see Block); it rises linearly from 0 in the first block.

    Raises:
        ValueError: the patch size does not divide the image size.
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
            raise ValueError(f"a patch size of {patch_size} does not divide {height} x {width} px")
        self.grid_size = (height // patch_size, width // patch_size)
        self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = learned_token(embed_dim)
        self.pos_embed = fixed_positions(embed_dim, self.grid_size)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate, mlp_dim) for rate in rates)

    @property
    def num_patches(self) -> int:
        """L, the number of patches per image."""
        return self.grid_size[0] * self.grid_size[1]

    def check_images(self, images: Tensor | RawImages) -> None:
        """Raise ValueError for images of another size than `pos_embed` is for."""
        if images.shape[1:] != (self.in_chans, *self.img_size):
            raise ValueError(
                f"the encoder takes images of {self.in_chans} x {self.img_size[0]} x "
                f"{self.img_size[1]}, not {' x '.join(map(str, images.shape[1:]))}"
            )

    def embed(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Embed patches (B, N, p*p*C) and add their positions (1 or B, N, D).

        Returns:
            The input of the first block (B, 1+N, D), class token first.
        """
        x = self.patch_embed(patches) + positions  # (B, N, D)
        # Flat, so that its gradient is contiguous, as DDP's buckets require.
        cls_token = (self.cls_token + self.pos_embed[:, :1]).flatten()  # (D,)
        return torch.cat((cls_token.expand(x.shape[0], 1, -1), x), dim=1)  # (B, 1+N, D)

    def positions_for(self, grid_size: tuple[int, int]) -> Tensor:
        """Positions (1, 1+L, D) for a grid of patches, resampled as in MAE if not `grid_size`."""
        if grid_size == self.grid_size:
            return self.pos_embed
        sizes = {"new_size": list(grid_size), "old_size": list(self.grid_size)}
        return resample_abs_pos_embed(self.pos_embed, antialias=False, **sizes)

    def tokens(self, images: Tensor) -> Tensor:
        """Embed every patch, (B, C, H, W) -> (B, 1+L, D)."""
        self.check_images(images)
        patches = patchify(images, self.patch_size)  # (B, L, p*p*C)
        return self.embed(patches, self.pos_embed[:, 1:])  # (B, 1+L, D)

    def encode(self, images: Tensor) -> Tensor:
        """Output of the last block, (B, C, H, W) -> (B, 1+L, D)."""
        return self.block_outputs(images, [len(self.blocks)])[0]

    def block_outputs(self, images: Tensor, layers: Collection[int]) -> list[Tensor]:
        """Encode images (B, C, H, W) -> feature maps (B, 1+L, D) of these blocks, in rising order.

        Args:
            layers: blocks, counted from 1; 0 is the input of the first. Later ones do not run.
        """
        x = self.tokens(images)  # (B, 1+L, D)
        outputs = [x] if 0 in layers else []
        for number, block in enumerate(self.blocks[: max(layers)], start=1):
            x = block(x)
            outputs += [x] if number in layers else []
        return outputs

    def features(self, images: Tensor) -> Tensor:
        """Normalized mean of the patch tokens, for k-NN; (B, C, H, W) -> (B, D).

        The norm has no scale or shift, because a pre-trained encoder has none.
        """
        x = self.encode(images)[:, 1:].mean(dim=1)  # (B, D)
        return F.layer_norm(x, (self.embed_dim,), eps=NORM_EPS)

    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for `timm.optim.param_groups_layer_decay`, by MAE's rule.

        The embeddings are one layer, every block is one, norm and head are one together.
        """
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}


class AttentionPool(nn.Module):
    """Pool tokens with learned queries: efficient probing (Psomas et al., ICLR 2026).

    Every query weighs the tokens by a softmax of its products with them, and pools a slice of their
    values. There are no keys; with queries of zero, what remains is the mean of the values.

    Args:
        dim: D.
        num_queries: M, a divisor of D.

    Raises:
        ValueError: `num_queries` does not divide `dim`.
    """

    def __init__(self, dim: int, num_queries: int) -> None:
        super().__init__()
        if dim % num_queries:
            raise ValueError(f"a width of {dim} is not divisible by {num_queries} queries")
        self.queries = nn.Parameter(torch.empty(num_queries, dim).normal_(std=0.02))  # (M, D)
        self.value = xavier_linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, D)."""
        num_queries, dim = self.queries.shape
        weights = (x @ self.queries.T / dim**0.5).softmax(dim=1)  # (B, N, M)
        values = self.value(x).unflatten(-1, (num_queries, -1))  # (B, N, M, D/M)
        return (weights.unsqueeze(-1) * values).sum(dim=1).flatten(1)  # (B, D)


class VisionTransformer(ViT):
    """Classifier: a ViT with pooling, a final norm and a linear head (App. A.6).

    Positions start from the sine-cosine table and are trained.

    Args:
        num_classes: outputs of the head; 0 returns the features instead.
        pool: "avg" normalizes the mean of the patch tokens (`fc_norm`), "cls" the class token
            (`norm`); "norm_avg" averages normalized patch tokens (`norm`), and "attention" has
            learned queries for them (`attn_pool`).
        num_queries: see AttentionPool; for "attention" only.
        layers: blocks, counted from 1, whose features are averaged (0: the first one's input);
            None is the last one.
        head_init_std: standard deviation of the head's initial weights.
        vit_options: see ViT.

    Raises:
        ValueError: the sizes are incompatible.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        pool: str,
        num_queries: int | None = None,
        layers: Collection[int] | None = None,
        head_init_std: float = 2e-5,
        **vit_options: object,
    ) -> None:
        super().__init__(**vit_options)
        if pool not in (*POOLS, ATTENTION):
            raise ValueError(f"pool must be one of {(*POOLS, ATTENTION)}, not {pool!r}")
        depth = len(self.blocks)
        self.pool, self.layers = pool, sorted({*layers}) if layers else [depth]
        if not {*self.layers} <= {*range(depth + 1)}:
            given = ", ".join(map(str, self.layers))
            raise ValueError(f"layers are numbered from 0, the input, to {depth}, not {given}")
        if pool == "cls" and 0 in self.layers:
            raise ValueError("the class token of layer 0 is the same for all images: pool others")
        self.pos_embed.requires_grad_()
        if pool == ATTENTION:
            if not num_queries:
                raise ValueError("pooling by attention needs queries")
            self.attn_pool = AttentionPool(self.embed_dim, num_queries)
        if pool == "avg":
            self.fc_norm = layer_norm(self.embed_dim)
        else:
            self.norm = layer_norm(self.embed_dim)
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.trunc_normal_(self.head.weight, std=head_init_std)
            nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """Normalized images (B, C, H, W) -> (B, D)."""
        pooled = [self.pooled(x) for x in self.block_outputs(images, self.layers)]  # of (B, D)
        return pooled[0] if len(pooled) == 1 else torch.stack(pooled).mean(dim=0)

    def pooled(self, x: Tensor) -> Tensor:
        """Pool and normalize a feature map, (B, 1+L, D) -> (B, D)."""
        if self.pool == "avg":
            return self.fc_norm(x[:, 1:].mean(dim=1))
        if self.pool == "norm_avg":
            return self.norm(x[:, 1:]).mean(dim=1)
        if self.pool == ATTENTION:
            return self.attn_pool(self.norm(x[:, 1:]))
        return self.norm(x[:, 0])

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, C, H, W) -> logits (B, num_classes)."""
        return self.head(self.features(images))


def build_vit(
    size: ModelSize, *, img_size: int | Sequence[int] | None = None, **options: object
) -> VisionTransformer:
    """Build a classifier of a named size.

    Args:
        img_size: side, or (height, width), in pixels; None is the size's default.
        options: other arguments of VisionTransformer.
    """
    shape = size if img_size is None else size._replace(img_size=img_size)
    return VisionTransformer(**shape._asdict(), **options)


class FeatureNorm(nn.BatchNorm1d):
    """Batch normalization without scale or shift, as in MAE's linear probe (App. B.1)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, affine=False, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D), with batch statistics in training and running ones otherwise."""
        if self.training and len(x) == 1:  # a single image has no variance
            return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)
        return super().forward(x)


def keep_outputs(model: VisionTransformer, outputs: Sequence[int]) -> None:
    """Reduce a classifier, which may be a probe, to some of its outputs."""
    head = model.head[-1] if isinstance(model.head, nn.Sequential) else model.head
    head.weight = nn.Parameter(head.weight[outputs])
    head.bias = nn.Parameter(head.bias[outputs])
    head.out_features = len(outputs)


def make_probe(model: VisionTransformer, num_classes: int) -> None:
    """Freeze a model and give it a trainable batch norm and linear head (App. B.1).

    Learned queries, if the model pools with them, stay trainable.
    """
    model.requires_grad_(False)
    if model.pool == ATTENTION:
        model.attn_pool.requires_grad_()
    head = nn.Linear(model.embed_dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    model.head = nn.Sequential(FeatureNorm(model.embed_dim), head)


def rescale_head(
    head_state: Mapping[str, Tensor], old: tuple[float, float], new: tuple[float, float]
) -> dict[str, Tensor]:
    """Make a regression's linear head predict the same values on another scale (mean, std)."""
    if old == new:
        return dict(head_state)
    (old_mean, old_std), (mean, std) = old, new
    weight, bias = head_state["head.weight"].double(), head_state["head.bias"].double()
    weight, bias = weight * (old_std / std), (bias * old_std + old_mean - mean) / std
    return {**head_state, "head.weight": weight.float(), "head.bias": bias.float()}


def fold_probe(head_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fold a probe's head, a normalization and a linear layer, into one linear layer."""
    if "head.0.running_var" not in head_state:
        return dict(head_state)
    scale = (head_state["head.0.running_var"].double() + NORM_EPS).rsqrt()
    weight = head_state["head.1.weight"].double() * scale
    bias = head_state["head.1.bias"] - weight @ head_state["head.0.running_mean"].double()
    rest = {name: tensor for name, tensor in head_state.items() if not name.startswith("head.")}
    return {**rest, "head.weight": weight.float(), "head.bias": bias.float()}
