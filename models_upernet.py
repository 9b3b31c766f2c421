"""Semantic segmentation: a ViT with a linear head or UperNet (App. B, Table 17)."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import RelPosBias
from timm.layers.pos_embed_rel import gen_relative_position_index
from torch import Tensor

from models_vit import GridBlock, SelfAttention, ViT, attend, split_heads
from util.patches import patchify
from util.settings.model import HEADS

POOL_SCALES = (1, 2, 3, 6)  # of UperNet's pyramid pooling
AUXILIARY_MAP, AUXILIARY_DIM = 2, 256  # the map that the auxiliary head reads, and its width


def default_out_indices(depth: int) -> tuple[int, ...]:
    """Blocks whose maps UperNet reads: MAE's 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24."""
    return (depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1)


class BiasedAttention(SelfAttention):
    """Self-attention with a learned bias for every head and relative position, as in BEiT.

    The table starts at zero, so that a pre-trained encoder computes what it did before.
    """

    def __init__(self, dim: int, num_heads: int, grid_size: tuple[int, int]) -> None:
        super().__init__(dim, num_heads)
        self.rel_pos = RelPosBias(grid_size, num_heads, prefix_tokens=1)
        nn.init.zeros_(self.rel_pos.relative_position_bias_table)

    def bias(self, grid_size: tuple[int, int]) -> Tensor:
        """Bias (1, h, 1+L, 1+L) for a grid of patches; the table is resampled to other grids."""
        own = self.rel_pos
        rows, columns = own.window_size
        if grid_size == (rows, columns):
            return own.get_bias()
        table = own.relative_position_bias_table  # the last three rows are the class token's
        distances = table[:-3].T.unflatten(1, (2 * rows - 1, 2 * columns - 1)).unsqueeze(0)
        size = [2 * side - 1 for side in grid_size]
        distances = F.interpolate(distances, size, mode="bicubic").flatten(2).squeeze(0)
        table = torch.cat((distances.T, table[-3:]))
        index = gen_relative_position_index(grid_size, class_token=True, device=table.device)
        return table[index].permute(2, 0, 1).unsqueeze(0).contiguous()

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """(B, 1+L, D) -> (B, 1+L, D)."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(attend(q, k, v, bias=self.bias(grid_size).to(q.dtype)))


class BiasedBlock(GridBlock):
    """Transformer block with BiasedAttention."""

    def __init__(
        self, dim: int, num_heads: int, grid_size: tuple[int, int], **options: object
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.attn = BiasedAttention(dim, num_heads, grid_size)


class LinearHead(nn.Module):
    """Batch norm and a 1x1 convolution on the last map (Kerssies et al., arXiv 2404.12172)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.classifier = nn.Conv2d(dim, num_classes, kernel_size=1)
        init_classifier(self.classifier)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps, each (B, D, h, w) -> one map of logits (B, num_classes, h, w)."""
        return [self.classifier(self.norm(maps[-1]))]


class Neck(nn.Module):
    """MAE's pyramid from four maps of one size: 4, 2, 1 and 1/2 times as large."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            (
                nn.Sequential(
                    nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2),
                    nn.BatchNorm2d(dim),
                    nn.GELU(),
                    nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2),
                ),
                nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True),  # a map may have one row
            )
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, D, h, w) -> (B, D, 4h, 4w), ..., (B, D, h/2, w/2)."""
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


class UperNet(nn.Module):
    """transformers' UperNet heads on MAE's neck, with dropout before the classifiers.

    Args:
        dim: D.
        head_dim: width of the head.
        dropout: probability of dropping a channel before a classifier in training.
    """

    def __init__(self, dim: int, num_classes: int, *, head_dim: int, dropout: float) -> None:
        super().__init__()
        from transformers import UperNetConfig  # takes seconds to import
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        config = UperNetConfig(
            num_labels=num_classes,
            hidden_size=head_dim,
            pool_scales=list(POOL_SCALES),
            auxiliary_in_channels=dim,
            auxiliary_channels=AUXILIARY_DIM,
            auxiliary_num_convs=1,
            auxiliary_concat_input=False,
        )
        self.neck = Neck(dim)
        self.decode_head = UperNetHead(config, in_channels=[dim] * 4)
        self.auxiliary_head = UperNetFCNHead(config, in_channels=[dim] * 4, in_index=AUXILIARY_MAP)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for head in (self.decode_head, self.auxiliary_head):
            init_classifier(head.classifier)
            head.classifier = nn.Sequential(nn.Dropout2d(dropout), head.classifier)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (B, D, h, w) -> logits (B, num_classes, 4h, 4w), in training also at (h, w)."""
        pyramid = self.neck(maps)
        logits = [self.decode_head(pyramid)]
        return [*logits, self.auxiliary_head(pyramid)] if self.training else logits


def init_classifier(layer: nn.Conv2d) -> None:
    """Start from small logits."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)


class SegmentationViT(ViT):
    """A ViT that classifies every pixel.

    Its encoder is a classifier's, with trained positions and no final norm.

    Args:
        num_classes: K.
        head: one of HEADS.
        out_indices: for UperNet, the four blocks whose outputs it reads, counted from 0; None is
            `default_out_indices`.
        head_dim, dropout: see UperNet.
        rel_pos_bias: learn a bias of attention for every relative position, see BiasedAttention.
        vit_options: see ViT; img_size is that of the training crops.

    Raises:
        ValueError: the sizes are incompatible.
    """

    pool = None  # no final norm is loaded

    def __init__(
        self,
        *,
        num_classes: int,
        head: str = "linear",
        out_indices: Sequence[int] | None = None,
        head_dim: int = 768,
        dropout: float = 0.1,
        rel_pos_bias: bool = False,
        **vit_options: object,
    ) -> None:
        super().__init__(**vit_options)
        if head not in HEADS:
            raise ValueError(f"head must be one of {HEADS}, not {head!r}")
        depth = len(self.blocks)
        self.out_indices = (depth - 1,)
        if head == "upernet":
            self.out_indices = tuple(out_indices or default_out_indices(depth))
            increasing = sorted({i for i in self.out_indices if i >= 0})
            if len(increasing) != 4 or list(self.out_indices) != [*increasing[:3], depth - 1]:
                raise ValueError(
                    f"UperNet reads four blocks in order, from 0 on and with the last, {depth - 1}"
                    f", not {', '.join(map(str, self.out_indices))}"
                )
        self.pos_embed.requires_grad_()
        self.rel_pos_bias = rel_pos_bias
        if rel_pos_bias:
            self.blocks = nn.ModuleList(
                BiasedBlock(
                    self.embed_dim,
                    block.attn.num_heads,
                    self.grid_size,
                    drop_path=block.drop_path.drop_prob,
                    mlp_dim=block.mlp.fc1.out_features,
                )
                for block in self.blocks
            )
        self.head = (
            LinearHead(self.embed_dim, num_classes)
            if head == "linear"
            else UperNet(self.embed_dim, num_classes, head_dim=head_dim, dropout=dropout)
        )

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Outputs of the blocks in `out_indices`: (B, C, H, W) -> each (B, D, H/p, W/p).

        Positions are resampled if the images are not as large as the training crops.

        Raises:
            ValueError: the patch size does not divide the images' sides.
        """
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"a patch size of {self.patch_size} does not divide {height}x{width}")
        grid_size = (height // self.patch_size, width // self.patch_size)
        positions = self.positions_for(grid_size)
        x = self.embed(patchify(images, self.patch_size), positions[:, 1:])  # (B, 1+L, D)
        context = (grid_size,) if self.rel_pos_bias else ()
        maps = []
        for number, block in enumerate(self.blocks):
            x = block(x, *context)
            if number in self.out_indices:
                maps.append(x[:, 1:].transpose(1, 2).unflatten(2, grid_size))  # (B, D, H/p, W/p)
        return maps

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalized images (B, C, H, W) -> maps of logits (B, K, h, w), smaller than the images.

        In training, UperNet's auxiliary logits follow.
        """
        return self.head(self.feature_maps(images))
