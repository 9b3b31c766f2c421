"""Average precision equals pycocotools', and detections are put into the original image."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from util.data.coco import CocoFile, CocoImage, CocoObject
from util.eval.coco_ap import (
    KINDS,
    as_results,
    describe,
    encode_mask,
    scale_to_image,
    score_detections,
)

CATEGORY_IDS, CLASSES = (3, 7, 8, 20), ("box", "disc", "never", "star")  # no object is "never"
# Positions among pycocotools' twelve numbers.
STATS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar": 8}


def random_images(rng, count=12):
    """Images with objects of all sizes, some of them crowds; the last has none."""
    images = []
    for number in range(count):
        height, width = int(rng.integers(120, 260)), int(rng.integers(120, 260))
        objects = []
        for _ in range(rng.integers(1, 9) if number < count - 1 else 0):
            w, h = rng.choice([12, 30, 60, 110]) * rng.uniform(0.7, 1, 2)
            left, top = rng.uniform(0, (width - w, height - h))
            corners = [left, top, left + w, top, left + w / 2, top + h]
            label = int(rng.choice([1, 2, 4]))
            crowd = bool(rng.random() < 0.2)
            area = None if rng.random() < 0.5 else w * h / 2
            objects.append(CocoObject(label, [np.array(corners)], (left, top, w, h), crowd, area))
        images.append(CocoImage(100 - number, f"{number}.png", (height, width), objects))
    return CocoFile(Path("a.json"), images, CLASSES, CATEGORY_IDS)


def random_detections(rng, image):
    """Objects that are nearly right, some twice, and wrong ones; some scores are the same."""
    rows = []
    for own in image.objects:
        left, top, w, h = own.box
        for _ in range(rng.integers(0, 4)):
            box = np.array([left, top, left + w, top + h]) + rng.normal(0, 0.06, 4) * max(w, h)
            rows.append((box, own.label if rng.random() < 0.9 else 3))
    for _ in range(rng.integers(0, 150 if image.id == 100 else 6)):
        left, top = rng.uniform(0, 100, 2)
        rows.append(([left, top, left + rng.uniform(5, 90), top + rng.uniform(5, 90)], 2))
    boxes = torch.tensor(np.array([row[0] for row in rows]).reshape(-1, 4), dtype=torch.float32)
    height, width = image.size
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    shape = torch.linspace(0, 1, 28).repeat(28, 1).T  # narrower towards the bottom
    across = torch.linspace(-1, 1, 28).abs().repeat(28, 1)
    masks = torch.sigmoid(20 * (1.05 - shape - across))[None].repeat(len(rows), 1, 1, 1)
    return {
        "boxes": boxes,
        "labels": torch.tensor([row[1] for row in rows], dtype=torch.long),
        "scores": torch.from_numpy(rng.random(len(rows)).round(1 if image.id % 2 else 3)).float(),
        "masks": masks,
    }


def random_case(seed):
    rng = np.random.default_rng(seed)
    file = random_images(rng)
    found = {image.id: random_detections(rng, image) for image in file.images}
    return file, {
        image.id: as_results(found[image.id], image.size, image.id, CATEGORY_IDS)
        for image in file.images
    }


def flat(results):
    return [result for own in results.values() for result in own]


def quietly(function, *args):
    with redirect_stdout(StringIO()):
        return function(*args)


def their_evaluation(truth, results, kind):
    """pycocotools' evaluation; that of masks without boxes, as detectron2 does."""
    coco = COCO()
    coco.dataset = truth
    quietly(coco.createIndex)
    if kind == "mask":
        results = [{n: v for n, v in result.items() if n != "bbox"} for result in results]
    evaluation = COCOeval(coco, quietly(coco.loadRes, results), KINDS[kind])
    for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
        quietly(step)
    return evaluation


def agree(own, theirs):
    """Whether percents equal fractions, of which -1 is none."""
    if theirs == -1:
        return np.isnan(own)
    return own == pytest.approx(100 * theirs, abs=1e-9)


# Scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_those_of_pycocotools(kind, seed):
    file, results = random_case(seed)
    truth = file.ground_truth(file.images)
    scores = score_detections(truth, flat(results), masks=True)
    theirs = their_evaluation(truth, flat(results), kind)
    stats = scores.stats()
    for name, position in STATS.items():
        own = stats.get(f"val_{kind}_{name}", np.nan)
        assert agree(own, theirs.stats[position]), name
    assert 5 < stats[f"val_{kind}_ap"] < 95
    precision = theirs.eval["precision"][:, :, :, 0, -1]
    for number, own in enumerate(scores.kinds[kind].by_class):
        values = precision[:, :, number]
        assert agree(own, values[values > -1].mean() if (values > -1).any() else -1)
    assert np.isnan(scores.kinds[kind].by_class[2])
    assert scores.num_objects[2] == 0 and scores.num_images == 12
    crowds = sum(o.is_crowd for image in file.images for o in image.objects)
    assert crowds > 0
    assert sum(scores.num_objects) == len(truth["annotations"]) - crowds


def test_scoring_changes_no_results_and_boxes_need_no_masks():
    file, results = random_case(0)
    truth, before = file.ground_truth(file.images), json.dumps(flat(results))
    both = score_detections(truth, flat(results), masks=True)
    assert json.dumps(flat(results)) == before
    for result in flat(results):
        del result["segmentation"]
    boxes = score_detections(truth, flat(results), masks=False)
    assert list(boxes.kinds) == ["box"]
    assert boxes.stats()["val_box_ap"] == both.stats()["val_box_ap"]


def test_the_order_of_images_does_not_matter():
    file, results = random_case(1)
    stats = score_detections(file.ground_truth(file.images), flat(results), masks=True).stats()
    images = file.images[::-1]
    shuffled = {image.id: results[image.id] for image in images[5:] + images[:5]}
    again = score_detections(file.ground_truth(images), flat(shuffled), masks=True).stats()
    assert again == pytest.approx(stats, nan_ok=True)


def test_no_detections_are_zero_and_no_objects_are_nothing():
    file, _ = random_case(0)
    stats = score_detections(file.ground_truth(file.images), [], masks=True).stats()
    assert stats["val_box_ap"] == stats["val_mask_ap50"] == stats["val_box_ar"] == 0
    scores = score_detections(file.ground_truth(file.images[-1:]), [], masks=True)
    assert scores.stats() == {"val_images": 1}
    content = json.loads(json.dumps(scores.as_json(CLASSES), allow_nan=False))
    assert content["classes"][0] == {"class": "box", "objects": 0, "box_ap": None, "mask_ap": None}


def test_results_are_what_pycocotools_reads(tmp_path):
    file, results = random_case(2)
    truth = file.ground_truth(file.images)
    (tmp_path / "results.json").write_text(json.dumps(flat(results)))
    coco = COCO()
    coco.dataset = truth
    quietly(coco.createIndex)
    loaded = quietly(coco.loadRes, str(tmp_path / "results.json"))
    assert len(loaded.anns) == len(flat(results))
    for own in flat(results)[:20]:
        assert rle.decode(own["segmentation"]).shape == tuple(own["segmentation"]["size"])
        assert min(own["bbox"]) >= 0 and own["category_id"] in CATEGORY_IDS


def test_the_table_has_a_line_for_each_class():
    file, results = random_case(0)
    scores = score_detections(file.ground_truth(file.images), flat(results), masks=True)
    lines = scores.table(CLASSES).splitlines()
    assert [line.split()[0] for line in lines] == ["class", *CLASSES]
    assert len({len(line) for line in lines}) == 1
    assert lines[3].split() == ["never", "-", "-", "0"]
    text = describe(scores.stats())
    assert text.startswith("box AP ") and ", mask AP " in text and text.endswith("over 12 images")


# In the original image


def test_detections_are_scaled_to_the_image():
    boxes = torch.tensor([[0.0, 0, 32, 48], [10, 6, 20, 12], [30, 40, 35, 50]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 2, 1]), "scores": torch.rand(3)}
    scaled = scale_to_image(found, (48, 32), (96, 128))
    expected = [[0, 0, 128, 96], [40, 12, 80, 24], [120, 80, 128, 96]]  # within the image
    assert scaled["boxes"].tolist() == expected
    assert scaled["labels"].dtype is torch.int64
    assert found["boxes"] is boxes and boxes[0, 2] == 32


@pytest.mark.parametrize("box", [(8, 4, 24, 16), (7.6, 3.8, 24.4, 16.1), (-5, -2, 24, 16)])
def test_a_mask_is_pasted_into_its_box(box):
    left, top, right, bottom = box
    middle = (left + right) / 2
    mask = torch.zeros(1, 28, 28)
    mask[:, :, :14] = 1  # the left half
    encoded = json.loads(json.dumps(encode_mask(mask, torch.tensor(box).float(), (20, 30))))
    y, x = np.mgrid[:20, :30] + 0.5
    expected = (x > left) & (x < middle) & (y > top) & (y < bottom)
    difference = rle.decode(encoded) != expected
    assert encoded["size"] == [20, 30]
    assert not difference[:, : int(middle) - 2][: int(bottom) - 1][int(max(0, top)) + 1 :].any()
    assert difference.sum() <= 2 * (right - left + bottom - top)


@pytest.mark.parametrize("side", [10, 20, 40, 80])
def test_a_disc_is_pasted_as_large_as_it_is(side):
    radius = torch.linspace(-1, 1, 28 * 9)
    disc = F.avg_pool2d((radius[:, None] ** 2 + radius**2 <= 1).float()[None], 9)
    overlaps = []
    for corner in np.linspace(5, 6, 9):
        box = torch.tensor([corner, corner, corner + side, corner + side]).float()
        pasted = rle.decode(encode_mask(disc, box, (side + 12, side + 12))) > 0
        y, x = np.mgrid[: side + 12, : side + 12] + 0.5 - corner - side / 2
        true = x**2 + y**2 <= (side / 2) ** 2
        overlaps.append((pasted & true).sum() / (pasted | true).sum())
    assert np.mean(overlaps) > 0.97
