"""Floating-point operations of one image's forward pass, computed from the model's sizes.

Two operations per multiply-add, matrix products only, as in
`torch.utils.flop_counter.FlopCounterMode`. `visible` is V, `predicted` P, `maps` K (0 without
inter-block attention), and `patch_dim` p*p*C. Products are written rows x inner x columns.
"""

from typing import NamedTuple


class ForwardFlops(NamedTuple):
    """Operations for one image."""

    encoder: int
    decoder: int

    @property
    def total(self) -> int:
        """Operations of the forward pass."""
        return self.encoder + self.decoder

    @property
    def training(self) -> int:
        """Operations of the forward and backward pass.

        The backward pass has two products of the same size for each product of the forward pass:
        the gradients of its two factors. That images need no gradient, which saves one product in
        the patch embedding, is ignored, and so is recomputation to save memory.
        """
        return 3 * self.total


def product(rows: int, inner: int, columns: int) -> int:
    """Operations of a matrix product."""
    return 2 * rows * inner * columns


def attention(queries: int, keys: int, dim: int) -> int:
    """Scores and weighted sum over all heads, without projections: 2 times queries x dim x keys."""
    return 2 * product(queries, dim, keys)


def mlp(tokens: int, dim: int, mlp_dim: int | None = None) -> int:
    """Two layers: 2 times tokens x dim x mlp_dim (None: 4 dim)."""
    return 2 * product(tokens, dim, mlp_dim or 4 * dim)


def self_attention(tokens: int, dim: int) -> int:
    """Self-attention and its projections q, k, v and output: 4 times tokens x dim x dim."""
    return 4 * product(tokens, dim, dim) + attention(tokens, tokens, dim)


def cross_attention(queries: int, keys: int, dim: int, context_dim: int) -> int:
    """Cross-attention and its projections.

    q and output take 2 times queries x dim x dim, k and v 2 times keys x context_dim x dim.
    """
    projections = 2 * product(queries, dim, dim) + 2 * product(keys, context_dim, dim)
    return projections + attention(queries, keys, dim)


def encoder_flops(
    visible: int, *, dim: int, depth: int, patch_dim: int, mlp_dim: int | None = None
) -> int:
    """The encoder on the visible patches (Sec. 3.1): embedding, then blocks on 1+V tokens."""
    block = self_attention(1 + visible, dim) + mlp(1 + visible, dim, mlp_dim)
    return product(visible, patch_dim, dim) + depth * block


def inter_block_flops(visible: int, *, maps: int, mixes: int, dim: int, projection: bool) -> int:
    """Inter-block attention (Eq. 1), J x K x (1+V) D; zero without maps.

    Args:
        mixes: J.
        dim: D.
        projection: each map passes through its own linear layer before the mix (Table 9).
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
        encoder_dim: D.
        dim: E.
        depth: J.
        projection: see `inter_block_flops`.
        self_attends: each block starts with self-attention among predicted tokens (Table 3a).
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

    MAE's own code maps all 1+V+P tokens to pixels, then drops those of visible patches.

    Args:
        predicted: all masked patches.
        encoder_dim: D.
        dim: E.
        depth: J.
        maps: feature maps in the single mix (Table 7).
        projection: see `inter_block_flops`.
    """
    mix = inter_block_flops(visible, maps=maps, mixes=1, dim=encoder_dim, projection=projection)
    tokens = 1 + visible + predicted
    block = self_attention(tokens, dim) + mlp(tokens, dim)
    ends = product(1 + visible, encoder_dim, dim) + product(predicted, dim, patch_dim)
    return mix + depth * block + ends
