"""Images with objects: layouts of files, views that keep boxes and masks in place, and batches."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as rle
from PIL import Image
from torchvision.ops import masks_to_boxes

from tests.helpers.files import COLORS, copied, write_coco, write_json
from util.data import detection
from util.data.batch import Box
from util.data.coco import CocoImage, CocoObject
from util.data.detection import (
    check_classes,
    check_files,
    make_target,
    open_detection,
    open_validation,
)
from util.data.jitter import LargeScaleJitter, View, WholeImage
from util.errors import InputError
from util.settings.detection import DetectionSettings

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
CPU = torch.device("cpu")
LABEL_COLORS = {1: COLORS[3], 2: COLORS[7]}
SIDE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco"))


def opened(folder=None, *, side=SIDE, masks=True, seed=0, **options):
    """Training and validation images."""
    settings = DetectionSettings(data_path=folder and str(folder), **options)
    return open_detection(settings, side=side, masks=masks, mean=MEAN, std=STD, seed=seed)


def refusal(function, *args, **options):
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rewritten(root, split, change):
    """A copy's annotation file after `change` of its content."""
    path = root / "annotations" / f"instances_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    return write_json(path, content)


def grown(mask, radius):
    """A mask (H, W) larger by this number of pixels; smaller if it is below 0."""
    if radius < 0:
        return ~grown(~mask, -radius)
    padded = F.pad(mask[None].float(), (radius,) * 4)
    return F.max_pool2d(padded, 2 * radius + 1, stride=1)[0].bool()


# Views


@pytest.mark.parametrize("scale", [(0.1, 2.0), (1.5, 2.0), (0.4, 1.0)])
def test_jitter_keeps_pixels_boxes_masks_and_labels_together(data, scale):
    images = opened(data, lsj_scale=scale).train
    checked = 0
    for epoch in range(20):
        for index in range(len(images)):
            (pixels, size, target, number), broken = images[epoch, index]
            assert pixels.shape == (3, SIDE, SIDE) and number == index and not broken
            view = images.transform.view(images.images[index].size, "augment", 0, epoch, index)
            factor = max(1, view.size[0] / view.box.height)
            everything = torch.zeros(SIDE, SIDE, dtype=torch.bool)
            rows = zip(target["boxes"], target["labels"], target["masks"], strict=True)
            for box, label, mask in rows:
                assert mask.dtype is torch.uint8 and set(mask.unique().tolist()) <= {0, 1}
                row, column = np.nonzero(mask.numpy())
                bounds = [column.min(), row.min(), column.max() + 1, row.max() + 1]
                assert box.tolist() == bounds
                inner = grown(mask.bool(), -math.ceil(factor) - 1)
                color = torch.tensor(LABEL_COLORS[label.item()])
                assert ((pixels[:, inner].T - color).abs() < 10).all()
                checked += inner.sum().item()
                everything |= mask.bool()
            if index > 0:  # without a crowd, there is no color where there is no mask
                outer = grown(everything, 2 * math.ceil(factor) + 1)
                outer[:, size[1] :], outer[size[0] :] = True, True
                assert (pixels[:2, ~outer] < 130).all()
    assert checked > 1000


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (30, 200), (7, 7)])
def test_jitter_resizes_crops_and_flips_within_its_range(size):
    views = [LargeScaleJitter(SIDE, (0.1, 2.0)).view(size, n) for n in range(400)]
    factors = []
    for view in views:
        top, left, height, width = view.box
        assert 0 <= top <= size[0] - height and 0 <= left <= size[1] - width
        assert min(view.size) >= 1 and max(view.size) <= SIDE
        factor = max(view.size) / max(height, width)
        if (height, width) == size:
            factors.append(max(view.size) / SIDE)
        for own, shown, limit in zip(view.size, (height, width), size, strict=True):
            assert own == pytest.approx(factor * shown, abs=1)
            # What does not fit is cropped, and only that, to whole pixels of the image.
            assert shown == limit or own >= SIDE - factor / 2 - 1
    share = len(factors) / len(views)  # of views of the whole image: a scale below 1
    assert 0.9 / 1.9 - 0.1 < share < 0.9 / 1.9 + 0.1
    assert min(factors) < 0.15 and max(factors) > 0.9
    assert 0.4 < sum(view.flip for view in views) / len(views) < 0.6
    assert not any(view.vertical_flip for view in views)
    cropped = [view for view in views if view.box.width < size[1]]
    assert len({view.box.left for view in cropped}) > min(3, size[1] // 4)


def test_jitter_flips_as_often_as_is_asked():
    views = [LargeScaleJitter(SIDE, hflip=0.0, vflip=0.25).view((48, 64), n) for n in range(400)]
    assert not any(view.flip for view in views)
    assert 0.17 < sum(view.vertical_flip for view in views) / len(views) < 0.33


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((48, 64), (48, 64)), ((64, 32), (64, 32)), ((100, 200), (32, 64)), ((9, 3), (64, 21))],
)
def test_evaluation_fits_the_whole_image_into_the_square(size, scaled):
    view = WholeImage(SIDE).view(size)
    assert (tuple(view.box), view.size, view.flip) == ((0, 0, *size), scaled, False)


def random_rectangle(rng, size):
    """A mask with one rectangle, and its box."""
    (top, bottom), (left, right) = (
        sorted(rng.choice(side + 1, 2, replace=False).tolist()) for side in size
    )
    mask = np.zeros(size, np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    return mask, [left, top, right, bottom]


def test_boxes_are_where_the_masks_of_their_rectangles_are():
    rng, shown = np.random.default_rng(0), 0
    for number in range(300):
        size = tuple(rng.integers(10, 120, 2).tolist())
        view = LargeScaleJitter(SIDE, vflip=0.5).view(size, number)
        rectangle, box = random_rectangle(rng, size)
        (found,) = view.boxes(torch.tensor([box], dtype=torch.float32))
        height, width = view.size
        assert (found >= 0).all() and (found <= torch.tensor([width, height] * 2)).all()
        mask = view.mask(rle.encode(rectangle))
        if mask.any():  # it has the pixels whose centers lie in the box
            (drawn,) = masks_to_boxes(mask[None])
            drawn[2:] += 1
            assert (found - drawn).abs().max() <= 0.5 + 1e-3
            shown += 1
        else:
            assert (found[2:] - found[:2]).min() <= 1 + 1e-3
    assert 150 < shown < 300


def test_boxes_are_moved_scaled_mirrored_and_clipped_without_rounding():
    boxes = torch.tensor([[10.5, 7.25, 20, 12], [0, 0, 60, 60], [0, 0, 8, 50]])
    view = View(Box(4, 8, 20, 30), (10, 45), flip=False, side=SIDE)
    expected = [[3.75, 1.625, 18, 4], [0, 0, 45, 10], [0, 0, 0, 10]]
    assert view.boxes(boxes).tolist() == expected
    mirrored = [[45 - right, top, 45 - left, bottom] for left, top, right, bottom in expected]
    assert view._replace(flip=True).boxes(boxes).tolist() == mirrored
    turned = [[left, 10 - bottom, right, 10 - top] for left, top, right, bottom in expected]
    assert view._replace(vertical_flip=True).boxes(boxes).tolist() == turned
    assert view.boxes(torch.zeros(0, 4)).shape == (0, 4)


def same(first, second):
    (a, size_a, target_a, _), (b, size_b, target_b, _) = first.content, second.content
    return (
        torch.equal(a, b)
        and size_a == size_b
        and all(torch.equal(target_a[n], target_b[n]) for n in target_a)
    )


def test_views_depend_on_seed_epoch_and_index_only(data):
    images, again, other = (opened(data, seed=seed).train for seed in (5, 5, 6))
    keys = [(epoch, index) for epoch in range(2) for index in range(4)]
    first = {key: images[key] for key in keys}
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    for key in reversed(keys):
        assert same(first[key], again[key])
        assert not same(first[key], other[key])
        assert not same(first[key], images[key[0] + 2, key[1]])


def test_without_augmentation_every_epoch_shows_the_whole_image(data):
    images = opened(data, aug=False).train
    assert same(images[0, 1], images[7, 1])
    (pixels, size, _, _), _ = images[0, 1]
    assert size == (64, 48)
    original = np.asarray(Image.open(data / "train" / "001.png"))
    assert np.array_equal(pixels[:, :, :48].permute(1, 2, 0).numpy(), original)


def test_padding_is_the_mean_color(data):
    images = opened(data, side=96, aug=False).train
    batch = images.collate([images[0, 0], images[0, 1]])
    pixels, sizes, _ = batch.to(CPU)
    assert sizes == [(72, 96), (96, 72)]
    assert pixels.dtype is torch.float32
    assert pixels[0, :, 72:].abs().max() < 0.01 > pixels[1, :, :, 72:].abs().max()


# Targets


def test_crowds_are_left_out_of_targets_and_kept_for_evaluation(data):
    images = opened(data, aug=False)
    for part in images.train, images.val:
        assert sum(own.is_crowd for own in part.images[0].objects) == 1
    (_, _, target, _), _ = images.train[0, 0]
    assert target["labels"].tolist() == [1, 2]
    (_, _, target, _), _ = images.val[0, 0]
    assert target == {}


def test_images_without_objects_are_trained_on(data):
    images = opened(data).train
    assert len(images) == 6
    batch = images.collate(images.__getitems__([(0, 5), (0, 1)]))
    _, _, (target, _) = batch.to(CPU)
    assert {n: tuple(v.shape) for n, v in target.items()} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, SIDE, SIDE),
    }
    assert [v.dtype for v in target.values()] == [torch.float32, torch.int64, torch.uint8]


def test_objects_that_a_view_does_not_show_are_left_out(data):
    images = opened(data, lsj_scale=(3.0, 4.0)).train
    counts = {len(images[epoch, 1].content[2]["labels"]) for epoch in range(30)}
    assert counts == {0, 1, 2}


def test_without_masks_targets_are_boxes_only(data, tmp_path):
    changed = copied(data, tmp_path / "data")

    def without(content):
        for entry in content["annotations"]:
            del entry["segmentation"]

    for split in ("train", "val"):
        rewritten(changed, split, without)
    (_, _, target, _), _ = opened(changed, masks=False, aug=False).train[0, 1]
    assert target.keys() == {"boxes", "labels"}
    (_, _, whole, _), _ = opened(data, aug=False).train[0, 1]
    torch.testing.assert_close(target["boxes"], whole["boxes"], rtol=0, atol=1)
    assert "has no segmentations: predict boxes only" in refusal(opened, changed)


def test_without_masks_boxes_are_not_rounded_and_those_not_shown_are_dropped():
    places = [(10.3, 5.7, 8.4, 9.1), (40, 0, 9, 9), (30.5, 2, 0.25, 3), (31, 20, 9, 10)]
    objects = [CocoObject(n, None, box, n == 4, None) for n, box in enumerate(places, start=1)]
    image = CocoImage(1, "a.png", (30, 50), objects)
    view = View(Box(0, 0, 30, 32), (60, 64), flip=False, side=SIDE)
    target = make_target(image, view, masks=False)
    assert target["labels"].tolist() == [1, 3]
    expected = torch.tensor([[20.6, 11.4, 37.4, 29.6], [61, 4, 61.5, 10]])
    torch.testing.assert_close(target["boxes"], expected)
    nothing = make_target(image._replace(objects=[]), view, masks=False)
    assert nothing["boxes"].shape == (0, 4) and nothing["labels"].shape == (0,)


def test_images_are_others_if_their_objects_are(data, tmp_path):
    changed = copied(data, tmp_path / "data")
    rewritten(changed, "train", lambda content: content["annotations"].pop())
    key, (own, other) = "hash of their objects", (opened(d).train for d in (data, changed))
    assert own.identity() == opened(data, seed=3).train.identity()
    assert own.identity()[key] != other.identity()[key]
    assert {**own.identity(), key: 0} == {**other.identity(), key: 0}


# Broken images


def test_a_broken_image_is_replaced_in_training_and_left_out_in_evaluation(data, tmp_path):
    changed = copied(data, tmp_path / "data")
    for split in ("train", "val"):
        (changed / split / "001.png").write_text("no image")
        Image.new("RGB", (20, 10)).save(changed / split / "002.png")  # of another size
    images = opened(changed)
    content, broken = images.train[0, 1]
    assert content[3] == 3
    assert [name for name, _ in broken] == [str(changed / "train" / f"00{n}.png") for n in (1, 2)]
    assert "it has 20 x 10 px, but its annotations are for 64 x 48" in broken[1][1]
    batch = images.val.collate([images.val[0, n] for n in range(3)])
    assert batch.ids == [0] and batch.num_images == 1 and len(batch.broken) == 2
    empty = images.val.collate([images.val[0, 1]])
    assert empty.num_images == 0 and len(empty.broken) == 1


def test_too_many_broken_images_in_a_row_end_the_run(data, tmp_path):
    changed = copied(data, tmp_path / "data")
    for path in (changed / "train").iterdir():
        path.write_text("no image")
    images = opened(changed).train
    (error,) = images.__getitems__([(0, 1), (0, 2)])
    assert images.collate([error]) is error
    assert "6 images in a row cannot be read" in str(error)


# Files


@pytest.mark.parametrize("year", ["", "2017"])
def test_cocos_layout_is_found_with_and_without_the_year(data, tmp_path, year):
    root = tmp_path / "data"
    copied(data, root)
    for split in ("train", "val"):
        (root / split).rename(root / f"{split}{year}")
        path = root / "annotations" / f"instances_{split}.json"
        path.rename(path.with_name(f"instances_{split}{year}.json"))
    images = opened(root)
    assert images.classes == ("box", "disc")
    assert images.train.folder == root / f"train{year}"
    assert len(images.train) == 6 and len(images.val) == 4


def test_files_may_lie_anywhere(data, tmp_path):
    ann = {f"{s}_ann": str(data / "annotations" / f"instances_{s}.json") for s in ("train", "val")}
    folders = {f"{s}_images": str(data / s) for s in ("train", "val")}
    images = opened(**ann, **folders)
    assert images.train.path(2) == str(data / "train" / "002.png")
    alone = opened(train_ann=ann["train_ann"], train_images=folders["train_images"])
    assert alone.val is None
    # Without a folder, names are relative to the annotations'.
    moved = copied(data / "train", tmp_path / "together")
    write_json(
        moved / "a.json", json.loads((data / "annotations/instances_train.json").read_text())
    )
    assert opened(train_ann=str(moved / "a.json")).train.folder == moved


def test_the_first_images_may_be_enough(data):
    assert len(opened(data, limit_images=2).train) == 2


def test_wrong_places_are_refused(data, tmp_path):
    assert "nowhere does not exist" in refusal(opened, "nowhere")
    assert "--data_path is missing" in refusal(opened)
    assert "has neither annotations/instances_train2017.json" in refusal(opened, tmp_path)
    ann = str(data / "annotations" / "instances_train.json")
    message = refusal(opened, train_ann=ann, train_images=str(data / "annotations"))
    assert "6 of 6 images listed are not in" in message and "such as 000.png: " in message
    assert "6 of 6 images listed are not in" in refusal(opened, train_ann=ann)
    message = refusal(opened, train_ann=str(tmp_path / "none.json"))
    assert message.endswith("none.json is not an existing file: correct the path")
    message = refusal(opened, train_ann=ann, train_images=ann)
    assert message == f"{ann} is not an existing folder: correct the path"
    assert "--val_images needs --val_ann" in refusal(opened, data, val_images="x")
    assert "takes the smaller factor first" in refusal(opened, data, lsj_scale=(2, 1))
    assert "above 0 in every channel" in refusal(opened, data, std=[1, 0, 1])


def test_too_many_missing_images_are_refused_before_the_run(data, tmp_path):
    changed = copied(data, tmp_path / "data")
    (changed / "train" / "004.png").unlink()
    message = refusal(opened, changed, max_broken=0.1)
    assert f"1 of 6 images listed are not in {changed / 'train'}, such as 004.png" in message
    assert len(opened(changed, max_broken=0.2).train) == 6
    (changed / "val" / "001.png").unlink()
    assert "1 of 4 images listed are not in" in refusal(opened, changed, max_broken=0.2)


def test_images_may_lie_in_the_current_folder_and_below(data, tmp_path, monkeypatch):
    folder = copied(data / "train", tmp_path / "together")
    (folder / "below").mkdir()
    (folder / "001.png").rename(folder / "below" / "001.png")
    monkeypatch.chdir(folder)
    listed = [CocoImage(n, name, (48, 64), []) for n, name in enumerate(("000.png", "none.png"))]
    check_files([*listed[:1], listed[0]._replace(name="below/001.png")], Path(), 0.0)
    check_files(listed, Path(), 0.5)
    assert "1 of 2 images listed are not in ., such as none.png" in refusal(
        check_files, listed, Path(), 0.4
    )


@pytest.mark.parametrize(("split", "count"), [("train", 6), ("val", 4)])
@pytest.mark.parametrize("crowds", [True, False])
def test_images_need_objects_besides_crowds(data, tmp_path, split, count, crowds):
    changed = copied(data, tmp_path / "data")

    def without(content):
        kept = [entry for entry in content["annotations"] if entry["iscrowd"] and crowds]
        content["annotations"] = kept

    path = rewritten(changed, split, without)
    assert f"{count} images used from {path} have no objects, except for crowds" in refusal(
        opened, changed
    )


def test_classes_of_validation_have_to_be_those_of_training(data, tmp_path):
    root = copied(data, tmp_path / "data")
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    other = copy.deepcopy(content)
    other["categories"][0]["name"] = "ring"
    write_json(path, other)
    assert "(ring instead of disc): they must have the same names" in refusal(opened, root)
    content["categories"].append({"id": 9, "name": "star"})
    write_json(path, content)
    assert "(3 instead of 2)" in refusal(opened, root)


def test_validation_images_open_alone(data):
    settings = DetectionSettings(data_path=str(data))
    images = open_validation(settings, side=SIDE, masks=True, mean=MEAN, std=STD)
    check_classes(images.file, ["box", "disc"], "the checkpoint's")
    message = refusal(check_classes, images.file, ["disc", "box"], "the checkpoint's")
    assert "(box instead of disc): they must have the same names in the same order" in message


def test_a_run_tells_what_it_reads(data, caplog):
    with caplog.at_level("INFO", logger=detection.__name__):
        opened(data)
    text = caplog.text
    assert (
        "6 training images, 1 of them without objects; 10 objects and 1 crowd of 2 classes" in text
    )
    assert (
        "4 validation images, 1 of them without objects; 6 objects and 1 crowd of 2 classes" in text
    )


def test_a_single_class_is_counted_as_one(data, tmp_path, caplog):
    changed = copied(data, tmp_path / "data")

    def one(content):
        content["categories"] = [entry for entry in content["categories"] if entry["id"] == 3]
        content["annotations"] = [e for e in content["annotations"] if e["category_id"] == 3]

    for split in ("train", "val"):
        rewritten(changed, split, one)
    with caplog.at_level("INFO", logger=detection.__name__):
        opened(changed)
    assert "5 objects and 0 crowds of 1 class\n" in caplog.text
