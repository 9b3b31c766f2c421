"""The detector equals transformers' backbone and torchvision's heads, except where it should."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torchvision.models.detection import roi_heads, rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from models_vit import ViT
from models_vitdet import (
    ANCHOR_SIDES,
    ASPECT_RATIOS,
    PYRAMID,
    Anchors,
    BoxPooling,
    DetectionViT,
    SimplePyramid,
    WindowedBlock,
    default_global_blocks,
    masks_in_boxes,
)
from tests.helpers.weights import randomized
from util.optim import build_layer_decay_adamw
from util.patches import patchify
from util.settings.model import ModelSize

DEPTH, CLASSES = 4, 3
SIZE = ModelSize(16, 32, DEPTH, 2, img_size=224)
SMALL = ModelSize(4, 32, DEPTH, 2, img_size=32)
STRIDES = (4, 8, 16, 32)
THEIRS = {
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "attention.": "attn.",
}


def detector(size=SMALL, **options):
    usual = {"num_classes": CLASSES, "input_size": 32, "window_size": 3, "fpn_dim": 16}
    usual |= {"box_convs": 1, "roi_batch": 16, "global_blocks": [1, 3]}
    return DetectionViT(**{**size._asdict(), **usual, **options})


def batch_of(*, objects=(2, 1), side=32):
    """Images, sizes and targets with these numbers of objects."""
    targets = []
    for count in objects:
        masks = torch.zeros(count, side, side, dtype=torch.uint8)
        boxes = torch.tensor([[3.0, 5, 19, 27], [12, 8, 30, 20]])[:count]
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.arange(count) % CLASSES + 1
        targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    images = torch.randn(len(objects), 3, side, side)
    return images, [(side, side), (side - 4, side)][: len(objects)], targets


# The encoder


@pytest.mark.parametrize(
    ("input_size", "window_size", "rel_pos"),
    [
        (224, 7, True),  # windows that fit
        (320, 14, True),  # positions are resampled, windows padded
        (320, 6, True),
        (320, 7, False),
    ],
)
def test_the_encoder_equals_that_of_transformers(input_size, window_size, rel_pos):
    options = {"input_size": input_size, "window_size": window_size, "rel_pos": rel_pos}
    ours = randomized(detector(SIZE, **options))
    config = transformers.VitDetConfig(
        hidden_size=32,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        image_size=input_size,
        window_size=window_size,
        window_block_indices=[0, 2],
        use_relative_position_embeddings=rel_pos,
        out_features=[f"stage{DEPTH}"],
    )
    theirs = transformers.VitDetBackbone(config).eval()
    state, names = {}, theirs.state_dict()
    for name in names:
        renamed = name
        for their_part, our_part in THEIRS.items():
            renamed = renamed.replace(their_part, our_part)
        state[name] = ours.state_dict()[renamed]
    theirs.load_state_dict(state, strict=True)
    assert any("rel_pos" in name for name in names) == rel_pos
    images = torch.randn(2, 3, input_size, input_size, dtype=torch.float64)
    with torch.no_grad():
        (expected,) = theirs.double()(images).feature_maps
        found = ours.double().feature_map(images)
    # timm resamples positions in float32; a mistake would differ by far more.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("window_size", [7, 8, 11])
def test_without_relative_positions_one_window_is_a_plain_vit(window_size):
    """A window larger than the grid of 8 x 8 patches is not padded: its zeros would have keys."""
    model = randomized(detector(window_size=window_size, global_blocks=[])).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:
                parameter.zero_()
    plain = ViT(**SMALL._asdict()).double()
    plain.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x = plain.patch_embed(patchify(images, 4)) + plain.pos_embed[:, 1:]
    for block in plain.blocks:
        x = block(x)
    found = model.feature_map(images).flatten(2).mT
    assert torch.allclose(found, x, atol=1e-9) == (window_size >= 8)


@pytest.mark.parametrize(("window_size", "rows"), [(7, [13, 15]), (8, [15, 15]), (11, [15, 15])])
def test_no_window_is_larger_than_the_grid(window_size, rows):
    blocks = detector(window_size=window_size).blocks[:2]  # the second is global
    assert [len(block.attn.rel_pos_h) for block in blocks] == rows
    assert [len(block.attn.rel_pos_w) for block in blocks] == rows
    windows = [block.attn.window_size for block in blocks]
    assert windows == [7 if window_size == 7 else None, None]


def test_relative_positions_start_without_effect():
    model, without = detector(), detector(rel_pos=False)
    without.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.feature_map(images), without.feature_map(images))


def test_drop_path_drops_whole_images():
    options = {"grid_size": (6, 6), "window_size": 2, "rel_pos": True}
    block = randomized(WindowedBlock(32, 2, options, drop_path=0.5)).train()
    x = torch.randn(64, 36, 32)
    branch = block.attn(block.norm1(x), (6, 6))
    kept = []
    block.norm2.register_forward_pre_hook(lambda _, args: kept.append(args[0] - x))
    block(x, (6, 6))
    for found, whole in zip(kept[0], branch, strict=True):
        assert torch.allclose(found, 2 * whole, atol=1e-4) or not found.any()
    dropped = sum(not found.any() for found in kept[0])
    assert 10 < dropped < 54


@pytest.mark.parametrize(
    ("depth", "blocks"),
    [
        (1, (0,)),
        (2, (0, 1)),
        (12, (2, 5, 8, 11)),
        (24, (5, 11, 17, 23)),
        (32, (7, 15, 23, 31)),
    ],
)
def test_global_blocks_are_vitdets(depth, blocks):
    assert default_global_blocks(depth) == blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 30}, "a patch size of 4 does not divide 30 px"),
        ({"global_blocks": [1, 12]}, "numbered from 0 to 3, not 1, 12$"),
        ({"global_blocks": [-1]}, "numbered from 0 to 3, not -1$"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        detector(**options)


# The pyramid, anchors and pooling


@pytest.mark.parametrize("side", [4, 7])
def test_the_pyramid_has_five_sizes(side):
    maps = SimplePyramid(32, 16)(torch.randn(2, 32, side, side))
    half = -(-side // 2)
    sides = [4 * side, 2 * side, side, half, -(-half // 2)]
    assert [tuple(x.shape) for x in maps.values()] == [(2, 16, own, own) for own in sides]


def anchors_on(side, dtype=torch.float32):
    """Ours, torchvision's, and the sides of the maps."""
    sides, strides = [16 * s for s in ANCHOR_SIDES], [16 * s for s in (0.25, 0.5, 1, 2, 4)]
    grids = [math.ceil(side / stride) for stride in strides]
    images = ImageList(torch.zeros(1, 3, side, side), [(side, side)])
    maps = [torch.zeros(1, 8, own, own, dtype=dtype) for own in grids]
    theirs = AnchorGenerator(tuple((s,) for s in sides), (ASPECT_RATIOS,) * 5)
    return Anchors(sides, strides)(images, maps)[0], theirs(images, maps)[0], grids


def test_anchors_equal_torchvisions_but_for_its_rounding_where_the_side_leaves_no_rest():
    ours, theirs, _ = anchors_on(128)
    assert torch.equal(ours.round(), theirs)  # centers are whole numbers
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("side", [1.0, 8.0, 32.0, 448.0])
def test_anchors_have_the_area_of_their_side_and_the_exact_ratio(side):
    (found,) = Anchors([side], [4]).cell_anchors
    width, height = (found[:, 2:] - found[:, :2]).T
    ratios = torch.tensor(ASPECT_RATIOS).sqrt()
    torch.testing.assert_close(height, side * ratios)
    torch.testing.assert_close(width, side / ratios)
    assert torch.equal(found[:, 2:], -found[:, :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [128, 144, 1008])
def test_anchors_are_float32_at_exact_strides(side, dtype):
    anchors, _, grids = anchors_on(side, dtype)
    assert anchors.dtype is torch.float32
    assert len(anchors) == 3 * sum(own**2 for own in grids)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    per_map = centers.split([3 * own**2 for own in grids])
    for found, stride, own in zip(per_map, (4, 8, 16, 32, 64), grids, strict=True):
        places = stride * torch.arange(own)
        y, x = torch.meshgrid(places, places, indexing="ij")
        expected = torch.stack((x, y), dim=-1).flatten(0, 1).repeat_interleave(3, dim=0)
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-3)


def test_a_box_reads_the_map_of_the_fpn_papers_equation():
    sides = torch.tensor([1.0, 55, 111, 112, 113, 223, 224, 300, 447, 448, 449, 895, 896, 5000])
    boxes = torch.stack((torch.zeros_like(sides), sides, 2 * sides, 1.5 * sides), dim=1)
    boxes[:, 3] = sides + sides / 2  # 2s wide and s/2 high: the same area as a square
    levels = BoxPooling(7, STRIDES).map_of(boxes)
    expected = [2 + np.floor(np.log2(side / 224)) for side in sides.tolist()]
    assert levels.tolist() == np.clip(expected, 0, 3).tolist()
    theirs = LevelMapper(2, 5, canonical_scale=224, canonical_level=4)([boxes])
    assert levels.tolist() == theirs.tolist()
    quarter = BoxPooling(7, [s / 4 for s in STRIDES])  # patches of 4 px
    assert torch.equal(quarter.map_of(boxes / 4), levels)


def test_pooling_equals_roi_align_on_the_map_of_each_box():
    pooling = BoxPooling(5, STRIDES)
    side = 1024
    maps = {
        n: torch.randn(2, 6, side // s, side // s) for n, s in zip(PYRAMID, STRIDES, strict=True)
    }
    corner, extent = 400 * torch.rand(2, 12, 2), 2 ** (3 + 6 * torch.rand(2, 12, 1))
    boxes = list(torch.cat((corner, corner + extent * torch.tensor([1.2, 0.9])), dim=2))
    boxes[1] = boxes[1][:5]
    found = pooling(maps, boxes, [(side, side)] * 2)
    expected = []
    for number, own in enumerate(boxes):
        for box, level in zip(own, pooling.map_of(own).tolist(), strict=True):
            source = maps[PYRAMID[level]][number : number + 1]
            rows = [box[None]]
            expected.append(roi_align(source, rows, 5, 1 / STRIDES[level], 0, aligned=True))
    torch.testing.assert_close(found, torch.cat(expected))
    assert len(pooling.map_of(torch.cat(boxes)).unique()) == 4


def test_pooling_of_no_boxes_is_empty():
    maps = {name: torch.randn(1, 6, 8, 8) for name in PYRAMID}
    assert BoxPooling(7, STRIDES)(maps, [torch.zeros(0, 4)], [(8, 8)]).shape == (0, 6, 7, 7)


# Losses


@pytest.mark.parametrize("found_any", [True, False])
def test_the_loss_of_proposals_is_torchvisions_with_l1(found_any, monkeypatch):
    network = detector().rpn
    labels = [torch.randint(-1, 2 if found_any else 1, (400,)).float() for _ in range(2)]
    logits, deltas = torch.randn(800, 1), torch.randn(800, 4)
    wanted = [torch.randn(400, 4) for _ in range(2)]
    torch.manual_seed(3)
    found = network.compute_loss(logits, deltas, labels, wanted)
    torch.manual_seed(3)
    sampled = network.fg_bg_sampler(labels)
    objects, background = (torch.cat(own).bool().numpy() for own in sampled)
    errors = np.abs(deltas.numpy() - torch.cat(wanted).numpy())[objects].sum()
    assert found[1].item() == pytest.approx(errors / (objects | background).sum(), rel=1e-5)
    assert (errors > 0) == found_any

    def l1(found, wanted, *, beta, reduction):
        return F.l1_loss(found, wanted, reduction=reduction)

    monkeypatch.setattr(F, "smooth_l1_loss", l1)
    torch.manual_seed(3)
    theirs = rpn.RegionProposalNetwork.compute_loss(network, logits, deltas, labels, wanted)
    torch.testing.assert_close(found, theirs)


@pytest.mark.parametrize("objects", [(2, 1), (0, 1), (0, 0)])
def test_the_losses_of_heads_are_torchvisions_with_l1(objects, monkeypatch):
    model = randomized(detector()).train()
    images, sizes, targets = batch_of(objects=objects)
    maps = model.pyramid(model.feature_map(images))
    proposals = [torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 28], [1, 9, 31, 25]])] * 2
    torch.manual_seed(3)
    found = model.roi_heads.losses(maps, list(proposals), sizes, targets)

    def l1(found, wanted, *, beta, reduction):
        return F.l1_loss(found, wanted, reduction=reduction)

    monkeypatch.setattr(F, "smooth_l1_loss", l1)
    torch.manual_seed(3)
    theirs = roi_heads.RoIHeads.forward(model.roi_heads, maps, list(proposals), sizes, targets)[1]
    assert found.keys() == theirs.keys()
    assert (found["loss_mask"] > 0) == any(objects) == (found["loss_box_reg"] > 0)
    del found["loss_mask"], theirs["loss_mask"]  # its targets are detectron2's
    torch.testing.assert_close(found, theirs)


def test_masks_are_learned_from_what_lies_in_the_box():
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[1, 4:12, 6:20] = 1
    boxes = torch.tensor([[6.0, 4, 20, 12], [6, 4, 34, 12], [6, 4, 20, 12], [20, 12, 30, 30]])
    found = masks_in_boxes(masks, boxes, torch.tensor([1, 1, 0, 1]), side=8)
    half = torch.tensor([1.0] * 4 + [0] * 4).expand(8, 8)
    expected = torch.stack((torch.ones(8, 8), half, *torch.zeros(2, 8, 8)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("objects", [(2, 1), (0, 1), (0, 0)])
def test_every_trained_parameter_gets_a_gradient(masks, objects):
    model = detector(masks=masks).train()
    losses = model(*batch_of(objects=objects))
    assert ("loss_mask" in losses) == masks
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != "cls_token"), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or objects != (2, 1), name


def test_losses_start_at_those_of_even_odds():
    losses = detector(roi_batch=64).train()(*batch_of())
    assert losses["loss_classifier"].item() == pytest.approx(np.log(CLASSES + 1), abs=0.2)
    assert losses["loss_objectness"].item() == pytest.approx(np.log(2), abs=0.1)
    assert losses["loss_mask"].item() == pytest.approx(np.log(2), abs=0.1)


# What is found


@pytest.mark.parametrize("masks", [True, False])
def test_detections_lie_in_the_part_that_is_not_padding(masks):
    model = detector(masks=masks).eval()
    model.roi_heads.score_thresh = 0.0
    images, _, _ = batch_of()
    sizes = [(20, 32), (32, 12)]
    for found, (height, width) in zip(model(images, sizes), sizes, strict=True):
        assert len(found["boxes"]) > 0
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)
        assert set(found["labels"].tolist()) <= {1, 2, 3}
        assert ("masks" in found) == masks
        if masks:
            assert found["masks"].shape == (len(found["boxes"]), 1, 28, 28)


def test_an_image_may_have_nothing_to_find():
    model = detector().eval()
    model.roi_heads.score_thresh = 1.0
    images, sizes, _ = batch_of()
    for found in model(images, sizes):
        assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 1, 28, 28)


def test_predictions_are_float32_under_autocast():
    model, outputs = detector(), []
    model.rpn.head.register_forward_hook(lambda _, __, out: outputs.extend(out[0] + out[1]))
    model.roi_heads.box_predictor.register_forward_hook(lambda _, __, out: outputs.extend(out))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(*batch_of())
        images, sizes, _ = batch_of()
        detections = model.eval()(images, sizes)
    assert len(outputs) == 2 * (10 + 2)
    values = [
        *outputs,
        *losses.values(),
        *(v for own in detections for n, v in own.items() if n != "labels"),
    ]
    assert all(value.dtype is torch.float32 for value in values)


def test_layer_decay_ends_at_the_heads():
    model = detector()
    optimizer = build_layer_decay_adamw(
        model, weight_decay=0.1, layer_decay=0.7, betas=(0.9, 0.999)
    )
    scales = {p: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(scales) == len(trained)
    for name, parameter in trained.items():
        first, number, *_ = f"{name}.".split(".")
        layer = {"blocks": int(number) + 1 if number.isdigit() else None}.get(first, DEPTH + 1)
        if first in ("pos_embed", "patch_embed"):
            layer = 0
        assert scales[parameter] == pytest.approx(0.7 ** (DEPTH + 1 - layer)), name
        if parameter.ndim == 1 or name == "pos_embed":
            (group,) = (
                g for g in optimizer.param_groups if any(p is parameter for p in g["params"])
            )
            assert group["weight_decay"] == 0, name
