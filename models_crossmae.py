"""CrossMAE: inter-block attention and the cross-attention decoder over a masked ViT (Sec. 3).

Read from the bottom up: `MaskedAutoencoder` is the training objective, `CrossMAEDecoder` the idea
of the paper.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
from timm.layers import DropPath
from torch import Tensor

from models_vit import (
    BASE_PATCH16,
    GIANT_PATCH14,
    HUGE_PATCH14,
    LARGE_PATCH16,
    SMALL_PATCH16,
    TINY_PATCH4,
    TINY_PATCH16,
    Linear,
    Mlp,
    ModelSize,
    ResidualBlock,
    SelfAttention,
    ViTEncoder,
    attend,
    check_heads,
    fixed_positions,
    layer_norm,
    learned_token,
    split_heads,
)
from util.kernels import stack_factors
from util.masking import TokenSplit
from util.patches import RawImages, gather_patches, gather_tokens, patch_moments
from util.recompute import Recomputing

IBA_INITS = ("normal", "xavier")


class InterBlockAttention(Recomputing):
    """Mixes the encoder's feature maps, once for each decoder block (Sec. 3.4, Eq. 1, App. A.3).

    Args:
        map_ids: the K feature maps that take part (Table 3d); 0 is the encoder's input.
        num_mixes: J, one mix for each decoder block.
        dim: D, width of the feature maps.
        init: "normal" is the paper's N(0, 1/K); "xavier" is what the released code trained with.
        softmax: make each mix sum to one (Table 8).
        projection: put a linear layer before the mix, one for each map (Table 9).
    """

    def __init__(
        self,
        map_ids: Sequence[int],
        num_mixes: int,
        *,
        dim: int,
        init: str = "normal",
        softmax: bool = False,
        projection: bool = False,
    ) -> None:
        super().__init__()
        self.map_ids = tuple(map_ids)
        self.softmax = softmax
        self.weight = nn.Parameter(torch.empty(num_mixes, len(self.map_ids)))
        if init == "normal":
            nn.init.normal_(self.weight, std=len(self.map_ids) ** -0.5)
        elif init == "xavier":
            nn.init.xavier_uniform_(self.weight)
        else:
            raise ValueError(f"init is one of {IBA_INITS}, not {init!r}")
        self.projections = (
            nn.ModuleList(Linear(dim, dim) for _ in self.map_ids) if projection else None
        )

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        """Mix all the encoder's maps (B, N, D), shallow to deep, into (J, B, N, D)."""
        maps = [feature_maps[i] for i in self.map_ids]
        if self.projections is not None:
            maps = [project(x) for project, x in zip(self.projections, maps, strict=True)]
        return self.recomputed(self.mix, *maps)

    def mix(self, *maps: Tensor) -> Tensor:
        """Mix the K maps (B, N, D) that take part into (J, B, N, D)."""
        weight = self.weight.softmax(dim=1) if self.softmax else self.weight
        # Maps stacked in front leave each decoder block's mix contiguous.
        stacked = stack_factors(maps)  # (K, B, N, D)
        return (weight @ stacked.flatten(1)).unflatten(1, stacked.shape[1:])  # (J, B, N, D)


def inter_block_attention(
    encoder: ViTEncoder,
    num_mixes: int,
    *,
    feature_maps: str | Sequence[int],
    iba_init: str = "normal",
    iba_softmax: bool = False,
    iba_projection: bool = False,
) -> InterBlockAttention | None:
    """Read the choice of feature maps: "all", a list of indices, or "last" for no mixing at all.

    Args:
        encoder: whose maps are mixed; index 0 is its input, i the output of its block i.
        num_mixes: J.
        feature_maps: the choice.
        iba_init, iba_softmax, iba_projection: see InterBlockAttention.

    Raises:
        ValueError: an index is out of range or given twice.
    """
    if feature_maps == "last":
        return None
    num_maps = len(encoder.blocks) + 1
    map_ids = range(num_maps) if feature_maps == "all" else tuple(feature_maps)
    in_range = all(isinstance(i, int) and 0 <= i < num_maps for i in map_ids)
    if not in_range or not map_ids or len(set(map_ids)) < len(map_ids):
        raise ValueError(
            f'feature maps are "all", "last" or different indices from 0 (the encoder\'s input) '
            f"to {num_maps - 1} (its last block), not {feature_maps!r}"
        )
    return InterBlockAttention(
        map_ids,
        num_mixes,
        dim=encoder.embed_dim,
        init=iba_init,
        softmax=iba_softmax,
        projection=iba_projection,
    )


class CrossAttention(nn.Module):
    """Multi-head attention from decoder tokens to encoder tokens of another width.

    The projection from the encoder's width is part of it; MAE has a layer of its own (Sec. 3.2).
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.kv = Linear(context_dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def read(self, q: Tensor, kv: Tensor) -> Tensor:
        """What `q` made of the queries, and `kv` of the context: (B, P, E), (B, 1+V, 2E)."""
        k, v = (split_heads(part, self.num_heads) for part in kv.chunk(2, dim=-1))
        return self.proj(attend(split_heads(q, self.num_heads), k, v))  # (B, P, E)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries x (B, P, E) read out of context (B, 1+V, D) -> (B, P, E)."""
        return self.read(self.q(x), self.kv(context))


class CrossAttentionBlock(ResidualBlock):
    """A decoder block without self-attention (Fig. 4b); with it, the ablation of Table 3a, Fig. 6.

    Args:
        dim: E, the decoder's width.
        context_dim: D, the encoder's.
        num_heads: attention heads.
        self_attention: let predicted tokens see each other first.
    """

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, *, self_attention: bool = False
    ) -> None:
        super().__init__()
        if self_attention:
            self.norm0 = layer_norm(dim)
            self.self_attn = SelfAttention(dim, num_heads)
        else:
            self.self_attn = None
        self.norm1 = layer_norm(dim)
        self.cross_attn = CrossAttention(dim, context_dim, num_heads)
        self.norm2 = layer_norm(dim)
        self.mlp = Mlp(dim)
        self.drop_path = DropPath(0.0)

    def forward(self, x: Tensor, mix: Tensor, context_norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens x (B, P, E), a mix (B, 1+V, D) and what normalises it -> (B, P, E)."""
        attention = self.cross_attn
        if self.self_attn is not None:
            x = x + self.self_attn(self.norm0(x))
        kv = self.recomputed(lambda mix: attention.kv(context_norm(mix)), mix)  # (B, 1+V, 2E)
        q = self.recomputed(lambda x: attention.q(self.norm1(x)), x)  # (B, P, E)
        return self.add_branches(x, self.recomputed(attention.read, q, kv))


class CrossMAEDecoder(Recomputing):
    """Reads masked patches out of the visible tokens by cross-attention alone (Sec. 3.2).

    No block lets predicted tokens see each other, so decoding a subset of positions gives the
    values that decoding all of them would. Partial reconstruction (Sec. 3.3) rests on this.

    Args:
        encoder: whose feature maps are read; only its shapes are used.
        embed_dim: E, divisible by 4 and by num_heads.
        depth: J, number of blocks.
        num_heads: attention heads of each block.
        feature_maps: "all", "last" (no inter-block attention) or a list of indices (Table 3d).
        self_attention: put self-attention back, the ablation of Table 3a.
        iba_options: iba_init, iba_softmax, iba_projection, see `inter_block_attention`.
    """

    def __init__(
        self,
        encoder: ViTEncoder,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        feature_maps: str | Sequence[int] = "all",
        self_attention: bool = False,
        **iba_options: object,
    ) -> None:
        super().__init__()
        self.mask_token = learned_token(embed_dim)
        self.pos_embed = fixed_positions(embed_dim, encoder.grid_size)
        self.inter_block_attention = inter_block_attention(
            encoder, depth, feature_maps=feature_maps, **iba_options
        )
        if self.inter_block_attention is None:
            self.context_norm = layer_norm(encoder.embed_dim)
        else:
            self.context_norms = nn.ModuleList(layer_norm(encoder.embed_dim) for _ in range(depth))
        self.blocks = nn.ModuleList(
            CrossAttentionBlock(
                embed_dim, encoder.embed_dim, num_heads, self_attention=self_attention
            )
            for _ in range(depth)
        )
        self.norm = layer_norm(embed_dim)
        self.pred = Linear(embed_dim, encoder.patch_size**2 * encoder.in_chans)

    def contexts(
        self, feature_maps: list[Tensor]
    ) -> list[tuple[Tensor, Callable[[Tensor], Tensor]]]:
        """What each of the J blocks reads, (B, 1+V, D), and what it normalises that by."""
        if self.inter_block_attention is None:  # the same for all, so normalised only once
            return [(self.context_norm(feature_maps[-1]), lambda x: x)] * len(self.blocks)
        mixes = self.inter_block_attention(feature_maps)  # (J, B, 1+V, D), Eq. 1
        return list(zip(mixes, self.context_norms, strict=True))

    def forward(self, feature_maps: list[Tensor], split: TokenSplit) -> Tensor:
        """Predict the pixels of `split.predicted`.

        Args:
            feature_maps: K encoder outputs (B, 1+V, D), shallow to deep, class token first.
            split: `predicted` is (B, P), patch indices in [0, L).

        Returns:
            (B, P, p*p*C) in target space: normalised per patch when norm_pix_loss is set.
        """
        x = self.mask_token + gather_tokens(self.pos_embed[:, 1:], split.predicted)  # (B, P, E)
        for block, context in zip(self.blocks, self.contexts(feature_maps), strict=True):
            x = block(x, *context)
        return self.recomputed(lambda x: self.pred(self.norm(x)), x)  # (B, P, p*p*C)


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder and the loss between them; a pure function of images and a token split.

    Args:
        encoder: images and split -> feature maps.
        decoder: any module with `forward(feature_maps, split) -> (B, P, p*p*C)`.
        norm_pix_loss: predict pixels normalised by their patch's mean and standard deviation.
    """

    def __init__(self, encoder: ViTEncoder, decoder: nn.Module, *, norm_pix_loss: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.norm_pix_loss = norm_pix_loss

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, in the order in which they compute."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def predict(self, images: Tensor | RawImages, split: TokenSplit) -> Tensor:
        """Predict (B, P, p*p*C) in target space for images (B, C, H, W), see `forward`."""
        return self.decoder(self.encoder(images, split), split)

    def predicted_patches(self, images: Tensor | RawImages, split: TokenSplit) -> Tensor:
        """The original pixels (B, P, p*p*C) of the predicted patches, in at least float32."""
        patches = gather_patches(images, split.predicted, self.encoder.patch_size)
        return patches.to(torch.promote_types(patches.dtype, torch.float32))

    def target(self, images: Tensor | RawImages, split: TokenSplit) -> Tensor:
        """What `predict` should return, (B, P, p*p*C) in at least float32."""
        patches = self.predicted_patches(images, split)
        if self.norm_pix_loss:
            mean, std = patch_moments(patches)
            patches = (patches - mean) / std
        return patches  # (B, P, p*p*C)

    def pixels(self, pred: Tensor, images: Tensor | RawImages, split: TokenSplit) -> Tensor:
        """Take predictions (B, P, p*p*C) out of target space, for PSNR and pictures.

        With norm_pix_loss the model does not predict a patch's mean and standard deviation; they
        are taken from the original image (Fig. 5).
        """
        if not self.norm_pix_loss:
            return pred
        mean, std = patch_moments(self.predicted_patches(images, split))
        return pred * std + mean

    def forward(self, images: Tensor | RawImages, split: TokenSplit) -> Tensor:
        """Mean squared error over the predicted patches (Sec. 3.1), a scalar of at least float32.

        Args:
            images: (B, C, H, W), normalised, or raw ones.
            split: `visible` (B, V) and `predicted` (B, P).
        """
        target = self.target(images, split)
        return (self.predict(images, split).to(target.dtype) - target).square().mean()


def build_autoencoder(
    size: ModelSize,
    decoder_type: Callable[..., nn.Module],
    *,
    img_size: int | Sequence[int] | None = None,
    in_chans: int = 3,
    norm_pix_loss: bool = True,
    decoder_embed_dim: int | None = None,
    decoder_depth: int,
    decoder_num_heads: int | None = None,
    **decoder_options: object,
) -> MaskedAutoencoder:
    """A masked autoencoder of a named size.

    Args:
        size: of the encoder, and of the decoder where its own is not given.
        decoder_type: CrossMAEDecoder or another class with its arguments.
        img_size: side, or (height, width), in pixels; None takes the size's own.
        in_chans: C.
        norm_pix_loss: see MaskedAutoencoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: shape of the decoder.
        decoder_options: further ones of the decoder: feature_maps, iba_init, ...

    Raises:
        ValueError: the sizes do not fit together.
    """
    encoder = ViTEncoder(
        img_size=size.img_size if img_size is None else img_size,
        patch_size=size.patch_size,
        in_chans=in_chans,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_dim=size.mlp_dim,
    )
    embed_dim = size.decoder_embed_dim if decoder_embed_dim is None else decoder_embed_dim
    decoder = decoder_type(
        encoder,
        embed_dim=embed_dim,
        depth=decoder_depth,
        num_heads=size.decoder_num_heads if decoder_num_heads is None else decoder_num_heads,
        **decoder_options,
    )
    return MaskedAutoencoder(encoder, decoder, norm_pix_loss=norm_pix_loss)


def build_crossmae(
    size: ModelSize,
    *,
    decoder_depth: int = 12,
    decoder_self_attention: bool = False,
    **options: object,
) -> MaskedAutoencoder:
    """A CrossMAE of a named size; the defaults are the paper's (App. A.6).

    Args:
        size: one of models_vit's.
        decoder_depth: J, number of decoder blocks.
        decoder_self_attention: the ablation of Table 3a.
        options: of `build_autoencoder` and CrossMAEDecoder.
    """
    decoder_type = partial(CrossMAEDecoder, self_attention=decoder_self_attention)
    return build_autoencoder(size, decoder_type, decoder_depth=decoder_depth, **options)


crossmae_vit_tiny_patch4 = partial(build_crossmae, TINY_PATCH4)
crossmae_vit_tiny_patch16 = partial(build_crossmae, TINY_PATCH16)
crossmae_vit_small_patch16 = partial(build_crossmae, SMALL_PATCH16)
crossmae_vit_base_patch16 = partial(build_crossmae, BASE_PATCH16)
crossmae_vit_large_patch16 = partial(build_crossmae, LARGE_PATCH16)
crossmae_vit_huge_patch14 = partial(build_crossmae, HUGE_PATCH14)
crossmae_vit_giant_patch14 = partial(build_crossmae, GIANT_PATCH14)
