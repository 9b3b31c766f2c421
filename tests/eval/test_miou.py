"""Predictions of whole images, their scores and pictures, and the loss of segmentation."""

import json

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchmetrics.classification import MulticlassJaccardIndex

from engine_segmentation import draw_predictions, evaluate, predict_classes, segmentation_loss
from models_upernet import SegmentationViT
from tests.helpers.models import NANO
from tests.helpers.weights import randomized
from util.compute.precision import Precision
from util.data.batch import Normalization
from util.data.broken_images import BrokenImages
from util.data.joint_transforms import WholeImage
from util.data.masks import UNLABELED, LabelRule, Pair
from util.data.segmentation import SegmentationImages
from util.errors import InputError
from util.eval.miou import Confusion, Scores, Windows, describe, predict, resize_logits, starts
from util.eval.overlays import (
    COLUMNS,
    GAP,
    MAX_IN_LEGEND,
    MAX_WIDTH,
    TEXT_HEIGHT,
    class_colors,
    comparison,
    overlay,
    paint,
)
from util.settings.evaluation import WindowSettings

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)
CLASSES = ("road", "sky", "traffic light", "car")
IDENTITY = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


# Scores


def random_maps(count=3, num_classes=4, size=(9, 7)):
    """Predictions and labels, which have unlabeled pixels and agree by half."""
    labels = torch.randint(-1, num_classes, (count, *size))
    random = torch.randint(num_classes, (count, *size))
    agree = (torch.rand(count, *size) < 0.5) & (labels >= 0)
    return torch.where(agree, labels, random), labels


def scores_of(*batches, num_classes=4):
    confusion = Confusion(num_classes, CPU)
    for predictions, labels in batches:
        confusion.add(predictions, labels)
    return confusion.scores()


def numpy_confusion(predictions, labels, num_classes):
    counts = np.zeros((num_classes, num_classes), int)
    for label, prediction in zip(
        labels.flatten().tolist(), predictions.flatten().tolist(), strict=True
    ):
        if label != UNLABELED:
            counts[label, prediction] += 1
    return counts


def test_scores_equal_those_of_numpy():
    predictions, labels = random_maps()
    counts = numpy_confusion(predictions, labels, 4)
    scores = scores_of((predictions, labels))
    assert scores.confusion.tolist() == counts.tolist()
    hits, labeled = counts.diagonal(), counts.sum(1)
    iou = hits / (labeled + counts.sum(0) - hits)
    assert scores.iou.tolist() == pytest.approx(iou.tolist())
    assert scores.accuracy.tolist() == pytest.approx((hits / labeled).tolist())
    assert scores.pixels.tolist() == pytest.approx((labeled / labeled.sum()).tolist())
    assert scores.stats() == pytest.approx(
        {
            "val_miou": 100 * iou.mean(),
            "val_mean_accuracy": 100 * (hits / labeled).mean(),
            "val_pixel_accuracy": 100 * hits.sum() / labeled.sum(),
            "val_images": 3,
        }
    )


@pytest.mark.parametrize("num_classes", [4, 7])
def test_scores_equal_those_of_torchmetrics(num_classes):
    predictions, labels = random_maps()  # of 4 classes
    scores = scores_of((predictions, labels), num_classes=num_classes)
    options = {"num_classes": num_classes, "ignore_index": UNLABELED}
    macro = MulticlassJaccardIndex(average="macro", **options)(predictions, labels)
    each = MulticlassJaccardIndex(average="none", **options)(predictions, labels)
    assert scores.stats()["val_miou"] == pytest.approx(100 * macro.item(), rel=1e-6)
    torch.testing.assert_close(scores.iou[:4].float(), each[:4])
    assert scores.iou[4:].isnan().all()


def test_the_split_into_batches_does_not_matter():
    predictions, labels = random_maps(6)
    whole = scores_of((predictions, labels))
    parts = scores_of(*((predictions[i : i + 1], labels[i : i + 1]) for i in range(6)))
    assert torch.equal(whole.confusion, parts.confusion)
    assert whole.num_images == parts.num_images == 6


def test_right_predictions_are_perfect():
    _, labels = random_maps()
    stats = scores_of((labels.clamp(min=0), labels)).stats()
    assert [stats[n] for n in ("val_miou", "val_mean_accuracy", "val_pixel_accuracy")] == [100] * 3


def test_classes_that_occur_nowhere_do_not_count():
    labels = torch.tensor([[[0, 0, 0, 1]]])
    predictions = torch.tensor([[[0, 0, 2, 1]]])  # 2 is only predicted, 3 is nowhere
    scores = scores_of((predictions, labels))
    assert scores.iou[:3].tolist() == pytest.approx([2 / 3, 1, 0])
    assert scores.iou[3].isnan()
    assert scores.accuracy[2:].isnan().all()
    assert scores.stats()["val_miou"] == pytest.approx(100 * (2 / 3 + 1) / 3)
    assert scores.stats()["val_mean_accuracy"] == pytest.approx(100 * (2 / 3 + 1) / 2)


def test_predictions_of_unlabeled_pixels_do_not_matter():
    predictions, labels = random_maps()
    other = torch.where(labels == UNLABELED, (predictions + 1) % 4, predictions)
    assert torch.equal(
        scores_of((predictions, labels)).confusion, scores_of((other, labels)).confusion
    )


def some_scores():
    return Scores(torch.tensor([[6, 2, 0, 0], [0, 0, 0, 0], [1, 1, 2, 0], [0, 0, 0, 0]]), 2)


def test_json_has_no_nan():
    content = some_scores().as_json(CLASSES)
    text = json.dumps(content, allow_nan=False)
    assert json.loads(text) == content
    assert [row["class"] for row in content["classes"]] == list(CLASSES)
    assert content["classes"][3] == {"class": "car", "iou": None, "accuracy": None, "pixels": 0}
    assert content["classes"][0]["iou"] == pytest.approx(100 * 6 / 9)
    assert content["classes"][1] == {"class": "sky", "iou": 0, "accuracy": None, "pixels": 0}
    assert content["val_images"] == 2


def test_json_without_any_labels_has_no_nan():
    empty = Scores(torch.zeros(4, 4, dtype=torch.long), 1)
    json.dumps(empty.as_json(CLASSES), allow_nan=False)


def test_the_table_is_aligned():
    lines = some_scores().table(CLASSES).splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert [line[:13].strip() for line in lines] == ["class", *CLASSES]
    assert lines[1].split()[1:] == ["66.67", "75.00", "66.67"]
    assert lines[4].split()[1:] == ["-", "-", "0.00"]


@pytest.mark.parametrize(("images", "noun"), [(1, "1 image"), (2, "2 images")])
def test_results_are_described(images, noun):
    text = describe(Scores(some_scores().confusion, images).stats())
    assert text.endswith(f"over {noun}")
    assert "pixel accuracy 66.67 %" in text


# Windows


def usual_starts(length, window, stride):
    """mmsegmentation's rule."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


def test_windows_of_a_typical_image():
    windows = Windows.of(WindowSettings(), (512, 512), 16)
    assert windows.stride == 341
    assert windows.boxes(512, 683) == [(0, 0), (0, 171)]
    assert windows.boxes(512, 512) == [(0, 0)]
    assert windows.boxes(683, 1024) == [(t, x) for t in (0, 171) for x in (0, 341, 512)]


@pytest.mark.parametrize("window", [1, 4, 9])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_windows_start_by_the_usual_rule_and_leave_no_gaps(window, stride):
    stride = min(stride, window)
    for length in range(1, 30):
        found = list(starts(length, window, stride))
        assert found == usual_starts(length, window, stride)
        assert found == sorted(set(found))
        covered = {x for start in found for x in range(start, start + window)}
        assert covered >= set(range(length))
        assert max(covered) == max(length, window) - 1


def test_settings_of_windows():
    windows = Windows.of(WindowSettings("whole", 5, 3), (8, 12), 4)
    assert windows == Windows("whole", (8, 12), 5, 4, 3)
    assert Windows.of(WindowSettings(), (1, 12), 1).stride == 1
    Windows.of(WindowSettings(stride=8), (8, 12), 4)
    with pytest.raises(InputError, match="--stride 9 would leave gaps between windows of 8 px"):
        Windows.of(WindowSettings(stride=9), (8, 12), 4)


def windows_of(mode="slide", size=(16, 16), stride=10, batch_size=8):
    return Windows(mode, size, stride, 4, batch_size)


IMAGE_SIZES = pytest.mark.parametrize(
    ("height", "width"), [(16, 16), (23, 37), (40, 16), (9, 13), (5, 50), (1, 1)]
)


@IMAGE_SIZES
@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_a_model_without_context_gives_the_same_by_windows_as_at_once(height, width, size):
    conv = nn.Conv2d(3, 4, kernel_size=1)
    image = torch.randn(1, 3, height, width)
    slide = windows_of(size=size, stride=7)
    with torch.no_grad():
        found = [predict(lambda x: [conv(x)], image, how) for how in (slide, windows_of("whole"))]
        expected = conv(image)
    for logits in found:
        torch.testing.assert_close(logits, expected)


@IMAGE_SIZES
def test_every_pixel_has_the_mean_of_its_windows(height, width):
    windows, number = windows_of(stride=7, batch_size=1), iter(range(1000))
    found = predict(
        lambda x: [x.new_full((1, 1, 4, 4), next(number))],
        torch.randn(1, 3, height, width),
        windows,
    )
    total, count = (np.zeros((max(16, height), max(16, width))) for _ in range(2))
    for value, (top, left) in enumerate(windows.boxes(height, width)):
        total[top : top + 16, left : left + 16] += value
        count[top : top + 16, left : left + 16] += 1
    assert count.min() > 0
    expected = (total / count)[:height, :width]
    np.testing.assert_allclose(found[0, 0], expected, rtol=1e-5)


def nano_segmenter(num_classes=4):
    sizes = NANO._asdict()
    return randomized(SegmentationViT(**sizes, num_classes=num_classes, rel_pos_bias=True))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_windows_computed_together_give_the_same(batch_size):
    model, image = nano_segmenter(), torch.randn(1, 3, 30, 37)
    with torch.no_grad():
        expected = predict(model, image, windows_of(batch_size=100))
        found = predict(model, image, windows_of(batch_size=batch_size))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_no_more_windows_than_asked_for_are_computed_together(batch_size):
    sizes = []

    def model(x):
        sizes.append(tuple(x.shape))
        return [x]

    predict(model, torch.randn(1, 3, 30, 37), windows_of(batch_size=batch_size))
    boxes = windows_of().boxes(30, 37)
    assert sum(s[0] for s in sizes) == len(boxes) == 12
    assert max(s[0] for s in sizes) == min(batch_size, 12)
    assert {s[1:] for s in sizes} == {(3, 16, 16)}


def test_one_window_is_the_image_at_once():
    model, image = nano_segmenter(), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        slide, whole = (predict(model, image, windows_of(mode)) for mode in ("slide", "whole"))
        expected = resize_logits(model(image)[0], (16, 16))
    torch.testing.assert_close(slide, expected)
    torch.testing.assert_close(whole, expected)


def test_whole_images_are_padded_to_the_patches():
    model, image = nano_segmenter(), torch.randn(1, 3, 18, 21)
    padded = torch.zeros(1, 3, 20, 24)
    padded[:, :, :18, :21] = image
    with torch.no_grad():
        found = predict(model, image, windows_of("whole"))
        expected = resize_logits(model(padded)[0], (20, 24))[:, :, :18, :21]
    assert torch.equal(found, expected)


def test_an_image_smaller_than_the_window_is_padded_once():
    model, image = nano_segmenter(), torch.randn(1, 3, 9, 13)
    padded = torch.zeros(1, 3, 16, 16)
    padded[:, :, :9, :13] = image
    with torch.no_grad():
        found = predict(model, image, windows_of())
        expected = resize_logits(model(padded)[0], (16, 16))[:, :, :9, :13]
    torch.testing.assert_close(found, expected)


def test_only_the_first_map_is_the_prediction():
    image = torch.randn(1, 3, 16, 16)
    for mode in ("slide", "whole"):
        found = predict(lambda x: [x, torch.full_like(x, 9)], image, windows_of(mode))
        assert torch.equal(found, image)


def test_reduced_precision_is_averaged_in_float32():
    image = torch.randn(1, 3, 23, 37)
    found = predict(lambda x: [x.bfloat16()], image, windows_of(stride=3))
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, image.bfloat16().float())


# The loss


def logits_and_labels(batch_size=6, unlabeled=0.3):
    logits = torch.randn(batch_size, 4, 5, 6, requires_grad=True)
    labels = torch.randint(4, (batch_size, 10, 12))
    labels[torch.rand(labels.shape) < unlabeled] = UNLABELED
    return logits, labels


def test_unlabeled_pixels_count_as_zero():
    logits, labels = logits_and_labels()
    resized = F.interpolate(logits, (10, 12), mode="bilinear")
    probabilities = resized.log_softmax(dim=1)
    total = sum(
        -probabilities[b, labels[b, y, x], y, x]
        for b in range(6)
        for y in range(10)
        for x in range(12)
        if labels[b, y, x] != UNLABELED
    )
    torch.testing.assert_close(segmentation_loss([logits], labels, 0.4), total / (6 * 10 * 12))


def test_with_all_pixels_labeled_it_is_the_usual_loss():
    logits, labels = logits_and_labels(unlabeled=0)
    resized = F.interpolate(logits, (10, 12), mode="bilinear")
    expected = F.cross_entropy(resized, labels)
    torch.testing.assert_close(segmentation_loss([logits], labels, 0.4), expected)


@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (1, 1, 4), (6,)])
def test_the_mean_over_images_does_not_depend_on_the_split(sizes):
    logits, labels = logits_and_labels()
    labels[0] = UNLABELED
    labels[1, 1:] = UNLABELED
    whole = segmentation_loss([logits], labels, 0.4)
    (expected,) = torch.autograd.grad(whole, logits)
    parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
    split = sum(len(t) / 6 * segmentation_loss([x], t, 0.4) for x, t in parts)
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(torch.autograd.grad(split, logits)[0], expected)


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    logits, labels = logits_and_labels()
    loss = segmentation_loss([logits, logits], torch.full_like(labels, UNLABELED), 0.4)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits)[0].abs().max() == 0


def test_unlabeled_pixels_have_no_gradient():
    logits, labels = logits_and_labels(2)
    labels[1] = UNLABELED
    (grad,) = torch.autograd.grad(segmentation_loss([logits], labels, 0.4), logits)
    assert grad[0].abs().max() > 0
    assert grad[1].abs().max() == 0


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_auxiliary_logits_have_a_weight(weight):
    logits, labels = logits_and_labels()
    auxiliary = torch.randn(6, 4, 3, 3)
    parts = [segmentation_loss([x], labels, 0.0) for x in (logits, auxiliary)]
    loss = segmentation_loss([logits, auxiliary], labels, weight)
    torch.testing.assert_close(loss, parts[0] + weight * parts[1])


def test_the_loss_is_computed_in_float32():
    logits, labels = logits_and_labels()
    reduced = logits.detach().bfloat16()
    loss = segmentation_loss([reduced], labels, 0.4)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, segmentation_loss([reduced.float()], labels, 0.4))


# Evaluation


@pytest.fixture
def images(tmp_path):
    """Images of three sizes, whose gray values are 60 times the class, with their masks."""
    pairs = []
    for number, (height, width) in enumerate([(16, 16), (20, 30), (9, 11)]):
        values = np.random.default_rng(number).integers(0, 4, (height, width), np.uint8)
        image = np.repeat((60 * values)[..., None], 3, axis=2)
        values[0, :5] = 255
        paths = [tmp_path / f"{kind}{number}.png" for kind in ("image", "mask")]
        for path, content in zip(paths, (image, values), strict=True):
            Image.fromarray(content).save(path)
        pairs.append(Pair(f"{number}", *paths))
    rule = LabelRule(4, 255, reduce_zero_label=False)
    return SegmentationImages(pairs, rule, WholeImage(), IDENTITY, seed=0, replace_broken=False)


class Reader(nn.Module):
    """Finds the class in a pixel's color, and takes unknown ones for the first."""

    def forward(self, x):
        classes = torch.tensor([0.0, 60, 120, 180]).view(1, 4, 1, 1) / 255
        return [-1e4 * (x[:, :1] - classes) ** 2]


def batches_of(images):
    return [images.collate(images.__getitems__([(0, i)])) for i in range(len(images))]


def evaluated(model, images, *, limit=1.0, mode="slide"):
    broken = BrokenImages(len(images), limit)
    options = {"classes": CLASSES, "windows": windows_of(mode), "precision": FP32}
    return evaluate(model, batches_of(images), broken=broken, **options), broken


@pytest.mark.parametrize("mode", ["slide", "whole"])
def test_a_model_that_reads_the_labels_is_perfect(images, mode):
    scores, broken = evaluated(Reader(), images, mode=mode)
    assert scores.stats()["val_miou"] == 100
    assert scores.num_images == 3
    assert scores.confusion.sum() == 16 * 16 + 20 * 30 + 9 * 11 - 3 * 5
    assert not broken.count


def test_results_are_those_of_the_predictions(images):
    model = nano_segmenter().train()
    scores, _ = evaluated(model, images)
    assert not model.training
    counts = np.zeros((4, 4), int)
    for batch in batches_of(images):
        predictions, labels = predict_classes(model, batch, windows=windows_of(), precision=FP32)
        assert predictions.shape == labels.shape == batch.labels.shape
        counts += numpy_confusion(predictions, labels, 4)
    assert scores.confusion.tolist() == counts.tolist()


def test_predictions_have_the_size_of_the_mask_whatever_that_of_the_image(images):
    images.transform = WholeImage(short_side=24)
    (batch, *_) = batches_of(images)
    assert batch.images.shape[2:] == (24, 24)
    predictions, labels = predict_classes(Reader(), batch, windows=windows_of(), precision=FP32)
    assert predictions.shape == labels.shape == (1, 16, 16)


def test_broken_images_are_left_out_and_counted(images, caplog):
    images.pairs[1].image.write_bytes(b"")
    scores, broken = evaluated(Reader(), images, limit=0.5)
    assert scores.num_images == 2
    assert broken.count == 1
    assert str(images.pairs[1].image) in caplog.text
    with pytest.raises(InputError, match="1 of 3 images"):
        evaluated(Reader(), images, limit=0.1)


# Pictures


@pytest.mark.parametrize("num_classes", [1, 21, 150, 1000])
def test_classes_have_colors_of_their_own(num_classes):
    colors = class_colors(num_classes)
    assert colors.shape == (num_classes, 3) and colors.dtype == np.uint8
    assert len(np.unique(colors, axis=0)) == num_classes
    assert colors.any(axis=1).all()  # none is black


def test_colors_are_those_of_pascal_voc():
    assert class_colors(5).tolist() == [
        [128, 0, 0],
        [0, 128, 0],
        [128, 128, 0],
        [0, 0, 128],
        [128, 0, 128],
    ]
    assert np.array_equal(class_colors(150)[:5], class_colors(5))


def test_painting_leaves_unlabeled_pixels_black():
    labels = np.array([[0, 1], [UNLABELED, 149]])
    colors = class_colors(150)
    assert paint(labels).tolist() == [
        [colors[0].tolist(), colors[1].tolist()],
        [[0] * 3, colors[149].tolist()],
    ]
    assert not paint(np.full((2, 3), UNLABELED)).any()


def test_an_overlay_leaves_unlabeled_pixels():
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    labels = np.random.default_rng(1).integers(-1, 4, (6, 8))
    found = overlay(image, labels)
    assert found.dtype == np.uint8 and found.shape == image.shape
    assert np.array_equal(found[labels < 0], image[labels < 0])
    expected = 0.6 * class_colors(4)[labels] + 0.4 * image
    assert np.abs(found - expected)[labels >= 0].max() <= 0.5 + 1e-6
    assert np.array_equal(overlay(image, np.full((6, 8), UNLABELED)), image)


def gray_row(height, width, label, prediction):
    image = np.full((height, width, 3), 200, np.uint8)
    return image, np.full((height, width), label), np.full((height, width), prediction)


def test_a_comparison_has_three_columns_and_a_legend():
    figure = comparison([gray_row(30, 50, 0, 1), gray_row(20, 40, 2, UNLABELED)], CLASSES)
    assert figure.dtype == np.uint8
    body = TEXT_HEIGHT + 30 + 20 + 2 * GAP
    assert figure.shape[1:] == (len(COLUMNS) * (50 + GAP) - GAP, 3)
    legend_lines, rest = divmod(figure.shape[0] - body, TEXT_HEIGHT)
    assert legend_lines >= 1 and rest == 0

    cells = [figure[TEXT_HEIGHT : TEXT_HEIGHT + 30, i * (50 + GAP) :][:, :50] for i in range(3)]
    assert (cells[0] == 200).all()
    for cell, label in zip(cells[1:], (0, 1), strict=True):
        assert (cell == np.round(0.6 * class_colors(4)[label] + 80).astype(np.uint8)).all()
    second = figure[TEXT_HEIGHT + 30 + GAP :][:20, 2 * (50 + GAP) :][:, :40]
    assert (second == 200).all()  # nothing is predicted

    legend = {tuple(color) for color in figure[body:].reshape(-1, 3).tolist()}
    for number, color in enumerate(class_colors(4).tolist()):
        assert (tuple(color) in legend) == (number < 3)  # only classes that occur


def test_wide_images_are_drawn_smaller():
    figure = comparison([gray_row(100, 2 * MAX_WIDTH, 0, 1)], CLASSES)
    assert figure.shape[1] == 3 * (MAX_WIDTH + GAP) - GAP
    assert figure.shape[0] == TEXT_HEIGHT + 50 + GAP + TEXT_HEIGHT


def test_a_legend_of_many_classes_ends():
    labels = np.arange(150).reshape(10, 15)
    image = np.zeros((10, 15, 3), np.uint8)
    names = [f"class {n}" for n in range(150)]
    few, many = (
        comparison([(image, np.minimum(labels, last), np.minimum(labels, last))], names)
        for last in (MAX_IN_LEGEND, 149)
    )
    assert few.shape == many.shape


def test_a_legend_without_classes_is_empty():
    figure = comparison([gray_row(30, 50, UNLABELED, UNLABELED)], CLASSES)
    assert (figure[TEXT_HEIGHT + 30 + GAP :] == 255).all()


def test_drawn_images_are_readable_ones_and_evenly_spaced(images):
    options = {"windows": windows_of(), "precision": FP32}
    figure = draw_predictions(Reader(), images, CLASSES, **options)
    heights = 16 + 20 + 9 + 3 * GAP
    assert figure.shape[1] == 3 * (30 + GAP) - GAP
    assert (figure.shape[0] - TEXT_HEIGHT - heights) % TEXT_HEIGHT == 0
    cell = figure[TEXT_HEIGHT : TEXT_HEIGHT + 16, :16, 0]
    assert sorted(set(cell.flatten().tolist())) == [0, 60, 120, 180]
    labels, prediction = (figure[TEXT_HEIGHT + 1 :][:15, i * (30 + GAP) :][:, :16] for i in (1, 2))
    assert np.array_equal(labels, prediction)

    images.pairs[0].image.write_bytes(b"")
    smaller = draw_predictions(Reader(), images, CLASSES, **options)
    assert smaller.shape[0] == figure.shape[0] - 16 - GAP
    for pair in images.pairs:
        pair.mask.write_bytes(b"")
    assert draw_predictions(Reader(), images, CLASSES, **options) is None
