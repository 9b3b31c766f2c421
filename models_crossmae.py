"""CrossMAE: a masked ViT, the cross-attention decoder and inter-block attention (Sec. 3).

In the paper's order: `ViTEncoder` encodes the visible patches and `MaskedAutoencoder` is the
objective (Sec. 3.1); `CrossMAEDecoder` is the paper's main idea (Sec. 3.2, 3.3);
`InterBlockAttention` mixes the feature maps that its blocks read (Sec. 3.4). Sections, tables and
figures are those of Fu et al., TMLR 2025.

In shapes, B is the batch, C channels, p the patch size; of an image's L patches V are visible and P
predicted; D and E are the widths of encoder and decoder; K feature maps are mixed into one context
for each of J decoder blocks.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

from models_vit import (
    Mlp,
    SelfAttention,
    ViT,
    attend,
    check_heads,
    fixed_positions,
    layer_norm,
    learned_token,
    split_heads,
    xavier_linear,
)
from util.kernels import linear_combinations
from util.masking import TokenSplit
from util.patches import RawImages, gather_patches, gather_tokens, patch_moments
from util.settings.model import IBA_INITS, ModelSize

HEAD_DIM = 32  # width of a decoder's attention heads by default


class ViTEncoder(ViT):
    """A ViT on the visible patches and the class token (Sec. 3.1).

    It has no final LayerNorm: the decoder normalizes the feature maps that it reads (App. A.3).
    """

    pool = None  # no final norm is loaded

    def visible_tokens(self, images: Tensor | RawImages, split: TokenSplit) -> Tensor:
        """Embed the visible patches only, so masked ones cost nothing -> (B, 1+V, D)."""
        self.check_images(images)
        if len(split.visible) != len(images):
            raise ValueError(f"the split is for {len(split.visible)} images, not for {len(images)}")
        patches = gather_patches(images, split.visible, self.patch_size)  # (B, V, p*p*C)
        positions = gather_tokens(self.pos_embed[:, 1:], split.visible)  # (B, V, D)
        return self.embed(patches, positions)  # (B, 1+V, D)

    def forward(self, images: Tensor | RawImages, split: TokenSplit | None = None) -> list[Tensor]:
        """Encode the visible patches, or all of them.

        Args:
            images: (B, C, H, W), normalized; or, with a split, `RawImages`, which are normalized as
                patches are gathered.
            split: `visible` is (B, V); None encodes every patch, for downstream use.

        Returns:
            K = 1 + depth feature maps, the input of the first block and then the output of every
            block: (B, 1+V, D), or (B, 1+L, D) without a split, with the class token first.

        Raises:
            ValueError: the images have the wrong size, or the split is for another batch size.
        """
        x = self.tokens(images) if split is None else self.visible_tokens(images, split)
        feature_maps = [x]
        for block in self.blocks:
            x = block(x)
            feature_maps.append(x)
        return feature_maps


class MaskedAutoencoder(nn.Module):
    """Encoder, decoder and loss; a pure function of images and a token split.

    Args:
        encoder: maps images and a split to feature maps.
        decoder: any module with `forward(feature_maps, split) -> (B, P, p*p*C)`.
        norm_pix_loss: predict pixels normalized by their patch's mean and standard deviation.
    """

    def __init__(self, encoder: ViTEncoder, decoder: nn.Module, *, norm_pix_loss: bool) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.norm_pix_loss = norm_pix_loss

    @property
    def blocks(self) -> list[nn.Module]:
        """All transformer blocks, in the order of computation."""
        return [*self.encoder.blocks, *getattr(self.decoder, "blocks", ())]

    @property
    def mixer(self) -> nn.Module | None:
        """The decoder's inter-block attention, or None."""
        return getattr(self.decoder, "inter_block_attention", None)

    def predict(self, images: Tensor | RawImages, split: TokenSplit) -> Tensor:
        """Predict the patches of `split.predicted` in target space, (B, P, p*p*C)."""
        return self.decoder(self.encoder(images, split), split)

    def predicted_patches(self, images: Tensor | RawImages, split: TokenSplit) -> Tensor:
        """Original pixels of the predicted patches, (B, P, p*p*C) in at least float32."""
        patches = gather_patches(images, split.predicted, self.encoder.patch_size)
        return patches.to(torch.promote_types(patches.dtype, torch.float32))

    def target(self, images: Tensor | RawImages, split: TokenSplit) -> Tensor:
        """The target of `predict`, (B, P, p*p*C) in at least float32."""
        patches = self.predicted_patches(images, split)
        if self.norm_pix_loss:
            mean, std = patch_moments(patches)
            patches = (patches - mean) / std
        return patches  # (B, P, p*p*C)

    def pixels(self, pred: Tensor, images: Tensor | RawImages, split: TokenSplit) -> Tensor:
        """Convert predictions (B, P, p*p*C) to pixel values, for PSNR and pictures.

        With norm_pix_loss the model does not predict a patch's mean and standard deviation; they
        come from the original image (Fig. 5).
        """
        if not self.norm_pix_loss:
            return pred
        mean, std = patch_moments(self.predicted_patches(images, split))
        return pred * std + mean

    def forward(self, images: Tensor | RawImages, split: TokenSplit) -> Tensor:
        """Mean squared error over the predicted patches (Sec. 3.1), a scalar of at least float32.

        Args:
            images: as for the encoder.
            split: `visible` (B, V) and `predicted` (B, P).
        """
        target = self.target(images, split)
        return (self.predict(images, split).to(target.dtype) - target).square().mean()


class CrossMAEDecoder(nn.Module):
    """Decoder that reconstructs masked patches by cross-attention only (Sec. 3.2).

    Predicted tokens never see each other, so decoding a subset of the masked patches gives the same
    values as decoding all of them. Partial reconstruction (Sec. 3.3) relies on this.

    Args:
        encoder: the encoder whose feature maps are decoded; only its shapes are used.
        embed_dim: E, divisible by 4 and by num_heads.
        depth: J, the number of blocks.
        feature_maps: "all", "last" (no inter-block attention) or a list of indices (Table 3d).
        self_attention: add self-attention to each block, the ablation of Table 3a.
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
        # The decoder reads one map or J mixes, and has a norm for each.
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
        self.pred = xavier_linear(embed_dim, encoder.patch_size**2 * encoder.in_chans)

    def forward(self, feature_maps: list[Tensor], split: TokenSplit) -> Tensor:
        """Predict the pixels of `split.predicted`.

        Args:
            feature_maps: K maps (B, 1+V, D) of the encoder, shallow to deep, class token first.
            split: `predicted` is (B, P), patch indices in [0, L).

        Returns:
            (B, P, p*p*C) in target space: normalized per patch if norm_pix_loss is set.
        """
        if self.inter_block_attention is None:  # Fig. 4a
            contexts = [feature_maps[-1]] * len(self.blocks)
            norms = [self.context_norm] * len(self.blocks)
        else:
            contexts = self.inter_block_attention(feature_maps)  # (J, B, 1+V, D), Eq. 1
            norms = self.context_norms
        x = self.mask_token + gather_tokens(self.pos_embed[:, 1:], split.predicted)  # (B, P, E)
        for block, context, norm in zip(self.blocks, contexts, norms, strict=True):
            x = block(x, context, norm)
        return self.pred(self.norm(x))  # (B, P, p*p*C)


class CrossAttentionBlock(nn.Module):
    """Decoder block of cross-attention and an MLP (Fig. 4b).

    Args:
        dim: E, the decoder's width.
        context_dim: D, the encoder's width.
        self_attention: let predicted tokens see each other first (Table 3a, Fig. 6).
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

    def forward(self, x: Tensor, context: Tensor, context_norm: nn.Module) -> Tensor:
        """Tokens x (B, P, E) attend to the context (B, 1+V, D) -> (B, P, E).

        The context is normalized inside the block to save memory: a block's inputs are kept for the
        backward pass, and the mix is in memory anyway, whereas a normalized copy would be extra.
        """
        if self.self_attn is not None:  # Table 3a
            x = x + self.self_attn(self.norm0(x))
        x = x + self.cross_attn(self.norm1(x), context_norm(context))
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Multi-head attention from decoder tokens to encoder tokens of another width.

    Keys and values project the encoder's width to the decoder's; MAE has a separate layer for that
    (Sec. 3.2).
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.q = xavier_linear(dim, dim)
        self.kv = xavier_linear(context_dim, 2 * dim)
        self.proj = xavier_linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries x (B, P, E) attend to the context (B, 1+V, D) -> (B, P, E)."""
        q = split_heads(self.q(x), self.num_heads)  # (B, h, P, d)
        kv = self.kv(context).chunk(2, dim=-1)  # 2 of (B, 1+V, E)
        k, v = (split_heads(part, self.num_heads) for part in kv)  # (B, h, 1+V, d)
        return self.proj(attend(q, k, v))  # (B, P, E)


class InterBlockAttention(nn.Module):
    """One learned mix of the encoder's feature maps per decoder block (Sec. 3.4, Eq. 1, App. A.3).

    Args:
        map_ids: indices of the K feature maps to mix (Table 3d); 0 is the encoder's input.
        num_mixes: J, the number of decoder blocks.
        dim: D, the width of the feature maps.
        init: "normal" draws with a variance of 1/K, the paper's N(0, 1/n); "xavier" is what the
            released code trained with.
        softmax: make the weights of each mix sum to one (Table 8).
        projection: apply a linear layer to each map before mixing (Table 9).
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
            raise ValueError(f"init must be one of {IBA_INITS}, not {init!r}")
        self.projections = (
            nn.ModuleList(xavier_linear(dim, dim) for _ in self.map_ids) if projection else None
        )

    def forward(self, feature_maps: list[Tensor]) -> Tensor:
        """Mix all the encoder's maps (B, N, D), shallow to deep, into (J, B, N, D)."""
        maps = [feature_maps[i] for i in self.map_ids]
        if self.projections is not None:
            maps = [project(x) for project, x in zip(self.projections, maps, strict=True)]
        weight = self.weight.softmax(dim=1) if self.softmax else self.weight
        return linear_combinations(weight, maps)


def inter_block_attention(
    encoder: ViTEncoder,
    num_mixes: int,
    *,
    feature_maps: str | Sequence[int],
    iba_init: str = "normal",
    iba_softmax: bool = False,
    iba_projection: bool = False,
) -> InterBlockAttention | None:
    """Build inter-block attention for a choice of feature maps.

    Args:
        num_mixes: J.
        feature_maps: "all"; a list of indices, 0 for the encoder's input and i for the output of
            blocks[i - 1]; or "last", which turns inter-block attention off.
        iba_init, iba_softmax, iba_projection: see InterBlockAttention.

    Raises:
        ValueError: an index is out of range or repeated.
    """
    if feature_maps == "last":
        return None
    num_maps = len(encoder.blocks) + 1
    map_ids = range(num_maps) if feature_maps == "all" else tuple(feature_maps)
    in_range = all(isinstance(i, int) and 0 <= i < num_maps for i in map_ids)
    if not in_range or not map_ids or len(set(map_ids)) < len(map_ids):
        raise ValueError(
            f'feature maps must be "all", "last" or distinct indices from 0 (the encoder\'s input) '
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


def decoder_width(encoder_width: int) -> int:
    """Default E: MAE's 512, or less for a small encoder."""
    return {128: 96, 192: 128, 384: 256}.get(encoder_width, 512)


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
    """Build a masked autoencoder of a named size.

    Args:
        decoder_type: CrossMAEDecoder, or another class with the same arguments.
        img_size: side, or (height, width), in pixels; None is the size's default.
        in_chans: C.
        norm_pix_loss: see MaskedAutoencoder.
        decoder_embed_dim: E; None is the size's default.
        decoder_depth: J.
        decoder_num_heads: None is the size's default, even if E is given.
        decoder_options: other arguments of the decoder, such as feature_maps and iba_init.

    Raises:
        ValueError: patches do not divide the image, heads do not divide a width, or feature_maps
            names maps that the encoder does not have.
    """
    shape = size if img_size is None else size._replace(img_size=img_size)
    encoder = ViTEncoder(**shape._asdict(), in_chans=in_chans)
    width = decoder_width(size.embed_dim)
    decoder = decoder_type(
        encoder,
        embed_dim=width if decoder_embed_dim is None else decoder_embed_dim,
        depth=decoder_depth,
        num_heads=width // HEAD_DIM if decoder_num_heads is None else decoder_num_heads,
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
    """Build a CrossMAE of a named size; the defaults are the paper's (App. A.6).

    Args:
        decoder_depth: J.
        decoder_self_attention: the ablation of Table 3a.
        options: other arguments of `build_autoencoder` and CrossMAEDecoder.
    """
    decoder_type = partial(CrossMAEDecoder, self_attention=decoder_self_attention)
    return build_autoencoder(size, decoder_type, decoder_depth=decoder_depth, **options)
