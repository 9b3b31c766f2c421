"""The MAE baseline: the same encoder with a self-attention decoder (Sec. 3.1, Fig. 3)."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from models_crossmae import (
    MaskedAutoencoder,
    ViTEncoder,
    build_autoencoder,
    inter_block_attention,
)
from models_vit import Block, fixed_positions, layer_norm, learned_token, xavier_linear
from util.masking import TokenSplit
from util.patches import gather_tokens
from util.settings.model import ModelSize


class MAEDecoder(nn.Module):
    """Decoder of self-attention over visible and mask tokens (Sec. 3.1).

    Every token sees every other, so a prediction is that of training only if all masked patches are
    decoded together.

    Args:
        encoder: the encoder whose feature maps are decoded; only its shapes are used.
        embed_dim: E, divisible by 4 and by num_heads.
        feature_maps: "last" is MAE; "all" or a list of indices adds inter-block attention with a
            single mix for the whole decoder (Table 7, App. A.3).
        iba_options: iba_init, iba_softmax, iba_projection, see `inter_block_attention`.
    """

    def __init__(
        self,
        encoder: ViTEncoder,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        feature_maps: str | Sequence[int] = "last",
        **iba_options: object,
    ) -> None:
        super().__init__()
        self.mask_token = learned_token(embed_dim)
        self.pos_embed = fixed_positions(embed_dim, encoder.grid_size)
        self.inter_block_attention = inter_block_attention(
            encoder, 1, feature_maps=feature_maps, **iba_options
        )
        self.context_norm = layer_norm(encoder.embed_dim)
        self.embed = xavier_linear(encoder.embed_dim, embed_dim)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = layer_norm(embed_dim)
        self.pred = xavier_linear(embed_dim, encoder.patch_size**2 * encoder.in_chans)

    def forward(self, feature_maps: list[Tensor], split: TokenSplit) -> Tensor:
        """Predict the pixels of `split.predicted`; see CrossMAEDecoder.forward."""
        if self.inter_block_attention is None:
            context = feature_maps[-1]  # (B, 1+V, D)
        else:
            context = self.inter_block_attention(feature_maps)[0]  # (B, 1+V, D)
        positions = self.pos_embed[:, 1:]
        x = self.embed(self.context_norm(context))  # (B, 1+V, E)
        # Attention ignores order, so the tokens need not return to their places in the image.
        x = torch.cat(
            (
                x[:, :1] + self.pos_embed[:, :1],
                x[:, 1:] + gather_tokens(positions, split.visible),
                self.mask_token + gather_tokens(positions, split.predicted),
            ),
            dim=1,
        )  # (B, 1+V+P, E)
        for block in self.blocks:
            x = block(x)
        x = x[:, -split.predicted.shape[1] :]  # (B, P, E)
        return self.pred(self.norm(x))  # (B, P, p*p*C)


def build_mae(size: ModelSize, *, decoder_depth: int = 8, **options: object) -> MaskedAutoencoder:
    """Build an MAE of a named size; the defaults are MAE's.

    Args:
        options: other arguments of `build_autoencoder` and MAEDecoder.
    """
    return build_autoencoder(size, MAEDecoder, decoder_depth=decoder_depth, **options)
