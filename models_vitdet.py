"""Object detection and instance segmentation: ViTDet with Mask R-CNN (Sec. 4.2, Table 2).

The encoder is a plain ViT whose blocks attend within windows, except for a few (Li et al.,
Exploring Plain Vision Transformer Backbones for Object Detection). torchvision's Mask R-CNN reads a
pyramid made from its last map. Where the two differ, the heads follow detectron2, as ViTDet does.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_area, roi_align

from models_vit import GridBlock, SelfAttention, ViT, attend, split_heads
from util.kernels import full_precision, grid_attention
from util.patches import patchify

Target = dict[str, Tensor]
"""Objects of an image: boxes (n, 4) as left, top, right, bottom; labels (n,) from 1; and for a mask
head, masks (n, H, W)."""
Detections = dict[str, Tensor]
"""Objects found: boxes (n, 4), labels (n,) from 1, scores (n,), masks (n, 1, 28, 28) in [0, 1]."""

PYRAMID = ("0", "1", "2", "3")  # maps that are 4, 2, 1 and 1/2 times as large as the encoder's
SMALLEST = "pool"  # half as large as the last, for proposals only
# The rest is detectron2's for patches of 16 px, in patches.
ANCHOR_SIDES = (2, 4, 8, 16, 32)  # one for each map, SMALLEST included
ASPECT_RATIOS = (0.5, 1.0, 2.0)
CANONICAL_SIDE, CANONICAL_MAP = 14, 2  # a box as large as ImageNet's images reads this map


def default_global_blocks(depth: int) -> tuple[int, ...]:
    """Blocks that attend to the whole image: the last of every quarter, as in ViTDet."""
    return tuple(sorted({depth * quarter // 4 - 1 for quarter in range(1, 5)} - {-1}))


class WindowAttention(SelfAttention):
    """Self-attention within windows, or over the whole grid, with learned relative positions.

    The bias of a query is its product with a vector for the distance in rows, and one for that in
    columns. These start at zero, so that a pre-trained encoder computes what it did before.

    Args:
        grid_size: (rows, columns) of patches.
        window_size: side of a window, in patches; None attends to the whole grid.
        rel_pos: whether there are relative positions.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        grid_size: tuple[int, int],
        window_size: int | None,
        rel_pos: bool,
    ) -> None:
        super().__init__(dim, num_heads)
        self.window_size, self.rel_pos = window_size, rel_pos
        if rel_pos:
            rows, columns = (window_size, window_size) if window_size else grid_size
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * rows - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * columns - 1, dim // num_heads))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, size: Sequence[int]) -> Tensor:
        """Attend on a grid of N = rows * columns patches: q, k, v (B, h, N, d) -> (B, N, h*d)."""
        if not self.rel_pos:
            return attend(q, k, v)
        on_grid = q.unflatten(2, size)  # (B, h, rows, columns, d)
        by_row = torch.einsum("bhyxd,ykd->bhyxk", on_grid, distance_vectors(self.rel_pos_h))
        by_column = torch.einsum("bhyxd,xkd->bhyxk", on_grid, distance_vectors(self.rel_pos_w))
        x = grid_attention(q, k, v, by_row.flatten(2, 3), by_column.flatten(2, 3))
        return x.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """(B, L, D) -> (B, L, D); the last windows are padded with zeros."""
        x = x.unflatten(1, grid_size)  # (B, rows, columns, D)
        if self.window_size:
            x, padded_size = window_partition(x, self.window_size)  # (B * windows, w, w, D)
        size = x.shape[1:3]
        qkv = self.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv)
        x = self.proj(self.attend(q, k, v, size)).unflatten(1, size)
        if self.window_size:
            x = window_unpartition(x, self.window_size, grid_size, padded_size)
        return x.flatten(1, 2)


def distance_vectors(table: Tensor) -> Tensor:
    """Look up the vector of every pair of n positions: table (2n - 1, d) -> (n, n, d)."""
    positions = torch.arange((len(table) + 1) // 2, device=table.device)
    return table[positions[:, None] - positions + len(positions) - 1]


class WindowedBlock(GridBlock):
    """Transformer block with WindowAttention; drop path skips whole images, not windows."""

    def __init__(
        self, dim: int, num_heads: int, attention: Mapping[str, object], **options: object
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.attn = WindowAttention(dim, num_heads, **attention)


class SimplePyramid(nn.Module):
    """ViTDet's feature pyramid from one map.

    Args:
        dim: D, channels of the map.
        out_dim: channels of the pyramid.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        half, quarter = dim // 2, dim // 4
        scales = (
            (
                nn.ConvTranspose2d(dim, half, kernel_size=2, stride=2),
                LayerNorm2d(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, kernel_size=2, stride=2),
            ),
            (nn.ConvTranspose2d(dim, half, kernel_size=2, stride=2),),
            (),
            (nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True),),
        )
        self.levels = nn.ModuleList(
            nn.Sequential(
                *scale,
                nn.Conv2d(channels, out_dim, kernel_size=1, bias=False),
                LayerNorm2d(out_dim),
                nn.Conv2d(out_dim, out_dim, kernel_size=3, padding=1, bias=False),
                LayerNorm2d(out_dim),
            )
            for scale, channels in zip(scales, (quarter, half, dim, dim), strict=True)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map (B, D, h, w) -> maps (B, out_dim, ...) of five sizes by name, the largest first."""
        maps = {name: level(x) for name, level in zip(PYRAMID, self.levels, strict=True)}
        return maps | {SMALLEST: F.max_pool2d(maps[PYRAMID[-1]], kernel_size=1, stride=2)}


class Anchors(AnchorGenerator):
    """torchvision's anchors, at exact strides, in float32 and without rounding.

    torchvision divides the image's side by the map's, which is wrong where that leaves a rest,
    takes the map's precision, where bfloat16 rounds coordinates to 4 px, and rounds the sides.
    """

    def __init__(self, sides: Sequence[float], strides: Sequence[float]) -> None:
        super().__init__(tuple((side,) for side in sides), (ASPECT_RATIOS,) * len(sides))
        self.strides = strides

    def generate_anchors(
        self, scales: Sequence[float], aspect_ratios: Sequence[float], **options: object
    ) -> Tensor:
        """Anchors (n, 4) around 0 with these sides of a square and ratios of height to width."""
        heights = torch.tensor(aspect_ratios).sqrt()[:, None]
        halves = torch.stack((1 / heights, heights), dim=-1) * torch.tensor(scales)[:, None] / 2
        halves = halves.flatten(0, 1)  # (n, 2), width and height
        return torch.cat((-halves, halves), dim=1)

    def forward(self, images: ImageList, maps: Sequence[Tensor]) -> list[Tensor]:
        """Anchors (n, 4) of every image, those of the first map first."""
        self.set_cell_anchors(torch.float32, maps[0].device)
        sizes = [x.shape[2:] for x in maps]
        anchors = torch.cat(self.grid_anchors(sizes, [(s, s) for s in self.strides]))
        return [anchors] * len(images.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's RPN head, with predictions in float32."""

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (B, C, h, w) -> logits (B, A, h, w) and offsets (B, 4A, h, w) of each."""
        hidden = [self.conv(x).float() for x in maps]
        with full_precision(hidden[0]):
            return [self.cls_logits(x) for x in hidden], [self.bbox_pred(x) for x in hidden]


class ProposalNetwork(RegionProposalNetwork):
    """torchvision's region proposals with detectron2's loss: L1 for boxes.

    detectron2 divides by 256 anchors for each image, here it is the number sampled; they differ
    only for inputs so small that there are fewer.
    """

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Mean losses of sampled anchors; labels are 1 for objects, 0 for background."""
        sampled = [torch.cat(masks).bool() for masks in self.fg_bg_sampler(labels)]
        objects, chosen = sampled[0], sampled[0] | sampled[1]
        count = chosen.sum()
        errors = F.l1_loss(
            pred_bbox_deltas[objects], torch.cat(regression_targets)[objects], reduction="sum"
        )
        logits, wanted = objectness.flatten()[chosen], torch.cat(labels)[chosen]
        return F.binary_cross_entropy_with_logits(logits, wanted), errors / count


class BoxPooling(nn.Module):
    """RoIAlign from the map that suits each box, with half-pixel offsets as in detectron2.

    Args:
        output_size: side of the result.
        strides: of the maps in PYRAMID, in pixels.
    """

    def __init__(self, output_size: int, strides: Sequence[float]) -> None:
        super().__init__()
        self.output_size, self.strides = output_size, strides

    def map_of(self, boxes: Tensor) -> Tensor:
        """Index (n,) of the map for each box (n, 4), by its size."""
        canonical = CANONICAL_SIDE * self.strides[CANONICAL_MAP]
        octaves = torch.log2(box_area(boxes).sqrt() / canonical + 1e-8)
        return (CANONICAL_MAP + octaves).floor().clamp(0, len(self.strides) - 1).long()

    def forward(
        self, maps: Mapping[str, Tensor], boxes: Sequence[Tensor], image_sizes: Sequence
    ) -> Tensor:
        """Boxes of every image (n, 4) -> (sum of n, C, output_size, output_size)."""
        rows = [F.pad(own, (1, 0), value=number) for number, own in enumerate(boxes)]
        rows, level = torch.cat(rows), self.map_of(torch.cat(list(boxes)))
        of_level = [torch.where(level == number)[0] for number in range(len(self.strides))]
        pooled = [
            roi_align(
                maps[name].float(),
                rows[ids],
                self.output_size,
                spatial_scale=1 / stride,
                sampling_ratio=0,  # as many samples as a cell has pixels
                aligned=True,
            )
            for name, stride, ids in zip(PYRAMID, self.strides, of_level, strict=True)
        ]
        return torch.cat(pooled)[torch.cat(of_level).argsort()]


class BoxPredictor(FastRCNNPredictor):
    """torchvision's box predictor, in float32 and with detectron2's initial weights."""

    def __init__(self, dim: int, num_outputs: int) -> None:
        super().__init__(dim, num_outputs)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, dim) -> logits (n, K) and offsets (n, 4K), with the background as class 0."""
        with full_precision(x):
            return super().forward(x.float())


def masks_in_boxes(masks: Tensor, boxes: Tensor, ids: Tensor, side: int) -> Tensor:
    """What boxes show of masks, as detectron2 does: with half-pixel offsets, 0 or 1.

    Args:
        masks: (n, H, W), uint8.
        boxes: (k, 4), in pixels.
        ids: (k,), the mask for each box.

    Returns:
        float32 (k, side, side).
    """
    rows = torch.cat((ids[:, None].to(boxes.dtype), boxes), dim=1)
    shown = roi_align(masks[:, None].to(boxes.dtype), rows, side, sampling_ratio=0, aligned=True)
    return (shown[:, 0] >= 0.5).to(boxes.dtype)


class Heads(RoIHeads):
    """torchvision's heads for boxes and masks with detectron2's losses."""

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> tuple[list[Detections], dict[str, Tensor]]:
        """Return detections, or in training losses by name."""
        if self.training:
            return [], self.losses(features, proposals, image_shapes, targets)
        return self.detections(features, proposals, image_shapes), {}

    def losses(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[Target],
    ) -> dict[str, Tensor]:
        """Mean losses of sampled proposals."""
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, found = self.box_predictor(self.box_head(pooled))
        classes = torch.cat(labels)
        objects = torch.where(classes > 0)[0]
        found = found.unflatten(1, (-1, 4))[objects, classes[objects]]  # (objects, 4)
        errors = F.l1_loss(found, torch.cat(offsets)[objects], reduction="sum")
        losses = {
            "loss_classifier": F.cross_entropy(logits, classes),
            "loss_box_reg": errors / len(classes),
        }
        if self.has_mask():
            objects = [torch.where(own > 0)[0] for own in labels]
            boxes = [own[ids] for own, ids in zip(proposals, objects, strict=True)]
            pooled = self.mask_roi_pool(features, boxes, image_shapes)
            logits = self.mask_predictor(self.mask_head(pooled)).float()
            rows = torch.arange(len(logits), device=logits.device)
            logits = logits[rows, classes[classes > 0]]  # (objects, m, m)
            matched = [own[ids] for own, ids in zip(matched, objects, strict=True)]
            masks = zip((target["masks"] for target in targets), boxes, matched, strict=True)
            wanted = torch.cat([masks_in_boxes(*own, logits.shape[-1]) for own in masks])
            errors = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
            losses["loss_mask"] = errors / max(1, wanted.numel())
        return losses

    def detections(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
    ) -> list[Detections]:
        """Objects of every image, the most certain first."""
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, offsets = self.box_predictor(self.box_head(pooled))
        found = self.postprocess_detections(logits, offsets, proposals, image_shapes)
        names = ("boxes", "scores", "labels")
        detections = [dict(zip(names, own, strict=True)) for own in zip(*found, strict=True)]
        if self.has_mask():
            boxes, _, labels = found
            pooled = self.mask_roi_pool(features, boxes, image_shapes)
            logits = self.mask_predictor(self.mask_head(pooled)).float()
            for own, masks in zip(detections, maskrcnn_inference(logits, labels), strict=True):
                own["masks"] = masks
        return detections


class DetectionViT(ViT):
    """A ViT that finds objects: their boxes, classes and masks.

    The positions are those of pre-training, trained, and resampled to the grid of the input in
    every step. The blocks see no class token, and no norm follows them.

    Args:
        num_classes: K, without the background.
        input_size: side of the square input, in pixels; divisible by patch_size.
        window_size: side of a window of attention, in patches; if the grid is not larger, all
            blocks attend to the whole image.
        global_blocks: blocks that attend to the whole image, counted from 0; None is
            `default_global_blocks`.
        rel_pos: see WindowAttention.
        fpn_dim: channels of the pyramid and the heads.
        box_convs: convolutions of the box head.
        roi_batch: proposals of an image that the heads are trained on.
        masks: whether there is a mask head.
        vit_options: see ViT; img_size is that of the positions.

    Raises:
        ValueError: the sizes are incompatible.
    """

    pool = None  # no final norm is loaded

    def __init__(
        self,
        *,
        num_classes: int,
        input_size: int,
        window_size: int = 14,
        global_blocks: Sequence[int] | None = None,
        rel_pos: bool = True,
        fpn_dim: int = 256,
        box_convs: int = 4,
        roi_batch: int = 512,
        masks: bool = True,
        **vit_options: object,
    ) -> None:
        super().__init__(**vit_options)
        if input_size % self.patch_size:
            raise ValueError(f"a patch size of {self.patch_size} does not divide {input_size} px")
        depth, side = len(self.blocks), input_size // self.patch_size
        if global_blocks is None:
            global_blocks = default_global_blocks(depth)
        if not set(global_blocks) <= set(range(depth)):
            given = ", ".join(map(str, global_blocks))
            raise ValueError(f"global blocks are numbered from 0 to {depth - 1}, not {given}")
        if window_size >= side:  # padding would only add tokens of zeros
            global_blocks = range(depth)
        self.input_size, self.has_masks = input_size, masks
        self.pos_embed.requires_grad_()
        self.cls_token.requires_grad_(False)  # not used
        attention = {"grid_size": (side, side), "rel_pos": rel_pos}
        self.blocks = nn.ModuleList(
            WindowedBlock(
                self.embed_dim,
                block.attn.num_heads,
                {**attention, "window_size": None if number in global_blocks else window_size},
                drop_path=block.drop_path.drop_prob,
                mlp_dim=block.mlp.fc1.out_features,
            )
            for number, block in enumerate(self.blocks)
        )
        strides = [self.patch_size * factor for factor in (0.25, 0.5, 1, 2, 4)]
        sides = [self.patch_size * factor for factor in ANCHOR_SIDES]
        self.pyramid = SimplePyramid(self.embed_dim, fpn_dim)
        self.rpn = ProposalNetwork(
            Anchors(sides, strides),
            ProposalHead(fpn_dim, len(ASPECT_RATIOS), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        hidden = 4 * fpn_dim
        box_head = FastRCNNConvFCHead(
            (fpn_dim, 7, 7), [fpn_dim] * box_convs, [hidden], norm_layer=LayerNorm2d
        )
        init_linear(box_head)
        self.roi_heads = Heads(
            BoxPooling(7, strides[:4]),
            box_head,
            BoxPredictor(hidden, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=roi_batch,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
        )
        if masks:
            self.roi_heads.mask_roi_pool = BoxPooling(14, strides[:4])
            layers = (fpn_dim,) * 4
            self.roi_heads.mask_head = MaskRCNNHeads(fpn_dim, layers, 1, norm_layer=LayerNorm2d)
            predictor = MaskRCNNPredictor(fpn_dim, fpn_dim, num_classes + 1)
            nn.init.normal_(predictor.mask_fcn_logits.weight, std=0.001)
            for layer in (predictor.conv5_mask, predictor.mask_fcn_logits):
                nn.init.zeros_(layer.bias)
            self.roi_heads.mask_predictor = predictor

    def feature_map(self, images: Tensor) -> Tensor:
        """Output of the last block: (B, C, S, S) -> (B, D, S/p, S/p)."""
        size = tuple(side // self.patch_size for side in images.shape[2:])
        positions = self.positions_for(size)
        x = self.patch_embed(patchify(images, self.patch_size)) + positions[:, 1:]  # (B, L, D)
        for block in self.blocks:
            x = block(x, size)
        return x.transpose(1, 2).unflatten(2, size)

    def forward(
        self,
        images: Tensor,
        sizes: list[tuple[int, int]],
        targets: list[Target] | None = None,
    ) -> list[Detections] | dict[str, Tensor]:
        """Find objects; in training, return the losses by name instead.

        Args:
            images: (B, C, S, S), normalized.
            sizes: (height, width) of the part of each image that is not padding.
            targets: for training, in pixels of `images`.
        """
        maps = self.pyramid(self.feature_map(images))
        proposals, losses = self.rpn(ImageList(images, sizes), maps, targets)
        detections, head_losses = self.roi_heads(maps, proposals, sizes, targets)
        return losses | head_losses if self.training else detections


def init_linear(head: nn.Module) -> None:
    """Initialize the linear layers of a head as detectron2 does."""
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
