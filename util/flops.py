"""Floating-point operations of one image's forward pass, from the sizes of a model alone.

Two operations for each multiply-add, matrix products only, which is what
`torch.utils.flop_counter.FlopCounterMode` counts. In the formulas, V of an image's patches are
visible and P predicted, D and E are the widths of encoder and decoder, K feature maps are mixed
for J decoder blocks, and a patch has p*p*C numbers. Products are written rows x inner x columns.
"""

from typing import NamedTuple


class ForwardFlops(NamedTuple):
    """Operations for one image."""

    encoder: int
    decoder: int

    @property
    def total(self) -> int:
        """Of the forward pass."""
        return self.encoder + self.decoder

    @property
    def training(self) -> int:
        """Of forward and backward pass.

        For each product of the forward pass the backward pass has two of the same size, the
        gradients of its two factors. The one exception is left out: images need no gradient, which
        saves one product of the patches' embedding. What is computed a second time to save memory
        does not count, because it is not the model's.
        """
        return 3 * self.total


def product(rows: int, inner: int, columns: int) -> int:
    """Operations of a matrix product."""
    return 2 * rows * inner * columns


def attention(queries: int, keys: int, dim: int) -> int:
    """Scores and weighted sum over all heads, without projections: 2 of queries x dim x keys."""
    return 2 * product(queries, dim, keys)


def mlp(tokens: int, dim: int, mlp_dim: int | None = None) -> int:
    """Two layers: 2 of tokens x dim x mlp_dim, which is 4 dim for None."""
    return 2 * product(tokens, dim, mlp_dim or 4 * dim)


def self_attention(tokens: int, dim: int) -> int:
    """Self-attention with its projections q, k, v and output: 4 of tokens x dim x dim, and more."""
    return 4 * product(tokens, dim, dim) + attention(tokens, tokens, dim)


def cross_attention(queries: int, keys: int, dim: int, context_dim: int) -> int:
    """Cross-attention with its projections.

    q and output are 2 of queries x dim x dim; k and v, 2 of keys x context_dim x dim.
    """
    projections = 2 * product(queries, dim, dim) + 2 * product(keys, context_dim, dim)
    return projections + attention(queries, keys, dim)


def encoder_flops(
    visible: int, *, dim: int, depth: int, patch_dim: int, mlp_dim: int | None = None
) -> int:
    """The encoder on the visible patches (Sec. 3.1): embedding, then blocks on 1+V tokens.

    Args:
        visible: V.
        dim: D.
        depth: number of blocks.
        patch_dim: p*p*C.
        mlp_dim: width inside the MLPs, None for 4 D.
    """
    block = self_attention(1 + visible, dim) + mlp(1 + visible, dim, mlp_dim)
    return product(visible, patch_dim, dim) + depth * block


def inter_block_flops(visible: int, *, maps: int, mixes: int, dim: int, projection: bool) -> int:
    """Inter-block attention (Eq. 1), J x K x (1+V) D; zero for no maps.

    Args:
        visible: V.
        maps: K, 0 without inter-block attention.
        mixes: J.
        dim: D.
        projection: a linear layer before the mix, one for each map (Table 9).
    """
    mix = product(mixes, maps, (1 + visible) * dim)
    return mix + (maps * product(1 + visible, dim, dim) if projection else 0)


def crossmae_decoder_flops(
    visible: int,
    predicted: int,
    *,
    encoder_dim: int,
    dim: int,
    depth: int,
    patch_dim: int,
    maps: int,
    projection: bool = False,
    self_attends: bool = False,
) -> int:
    """CrossMAE's decoder (Sec. 3.2): J blocks of P queries into 1+V tokens, then P x E x p*p*C.

    Args:
        visible: V.
        predicted: P.
        encoder_dim: D.
        dim: E.
        depth: J.
        patch_dim: p*p*C.
        maps: K, see `inter_block_flops`.
        projection: see `inter_block_flops`.
        self_attends: predicted tokens see each other first, the ablation of Table 3a.
    """
    mixes = inter_block_flops(
        visible, maps=maps, mixes=depth, dim=encoder_dim, projection=projection
    )
    block = cross_attention(predicted, 1 + visible, dim, encoder_dim) + mlp(predicted, dim)
    if self_attends:
        block += self_attention(predicted, dim)
    return mixes + depth * block + product(predicted, dim, patch_dim)


def mae_decoder_flops(
    visible: int,
    predicted: int,
    *,
    encoder_dim: int,
    dim: int,
    depth: int,
    patch_dim: int,
    maps: int = 0,
    projection: bool = False,
) -> int:
    """MAE's decoder: (1+V) x D x E, J blocks on 1+V+P tokens, then P x E x p*p*C.

    MAE's own code maps all 1+V+P tokens to pixels and then drops those of visible patches.

    Args:
        visible: V.
        predicted: P, all masked patches.
        encoder_dim: D.
        dim: E.
        depth: J.
        patch_dim: p*p*C.
        maps: K of its single mix (Table 7), see `inter_block_flops`.
        projection: see `inter_block_flops`.
    """
    mix = inter_block_flops(visible, maps=maps, mixes=1, dim=encoder_dim, projection=projection)
    tokens = 1 + visible + predicted
    block = self_attention(tokens, dim) + mlp(tokens, dim)
    ends = product(1 + visible, encoder_dim, dim) + product(predicted, dim, patch_dim)
    return mix + depth * block + ends
