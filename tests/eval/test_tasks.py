"""Losses and scores of classification, several labels and regression, against scikit-learn."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    mean_absolute_error,
    r2_score,
)
from sklearn.utils.class_weight import compute_class_weight

from util.errors import InputError
from util.eval.confusion import draw_confusion
from util.eval.tasks import (
    MAX_CONFUSION,
    Classification,
    Multilabel,
    Regression,
    build_task,
    describe,
)
from util.settings.evaluation import TaskSettings

CPU = torch.device("cpu")


def measured(task, logits, labels, batch_size=7):
    measurement = task.measurement(CPU)
    for batch in zip(logits.split(batch_size), labels.split(batch_size), strict=True):
        measurement.add(*batch)
    return measurement.scores()


def random_logits(num_images, num_outputs):
    generator = torch.Generator().manual_seed(num_images)
    return torch.randn(num_images, num_outputs, generator=generator)


def unbalanced(num_images=200, num_classes=4):
    """Logits that know a little, and labels of which most are 0; class 2 has none."""
    labels = torch.tensor([0, 0, 0, 1, 0, 3, 0, 0, 1, 0]).repeat(num_images // 10)
    return random_logits(num_images, num_classes) + F.one_hot(labels, num_classes), labels


def test_scores_of_classes_equal_scikit_learns():
    logits, labels = unbalanced()
    scores = measured(Classification(4), logits, labels)
    predicted = logits.argmax(dim=1)
    expected = confusion_matrix(labels, predicted, labels=range(4))
    assert scores.confusion.tolist() == expected.tolist()
    assert scores.stats()["val_balanced"] == pytest.approx(
        100 * balanced_accuracy_score(labels, predicted)
    )
    found = scores.as_json(["ant", "bee", "cow", "dog"])
    assert found["classes"]["cow"] == {"images": 0, "accuracy": None}
    right = (predicted == labels)[labels == 3].double().mean().item()
    assert found["classes"]["dog"] == {"images": 20, "accuracy": pytest.approx(100 * right)}
    assert json.loads(json.dumps(found)) == found
    lines = scores.table(["ant", "bee", "cow", "dog"]).split("\n")
    assert [line.split()[0] for line in lines] == ["class", "ant", "bee", "dog"]


def test_very_many_classes_have_accuracies_but_no_confusion_matrix():
    labels = torch.arange(MAX_CONFUSION + 1)
    logits = torch.zeros(len(labels), len(labels))
    logits[:, 5] = 1.0
    scores = measured(Classification(len(labels)), logits, labels, batch_size=500)
    assert scores.confusion is None
    assert scores.stats()["val_balanced"] == pytest.approx(100 / len(labels))
    lines = scores.table(None).split("\n")
    assert lines[0] == f"the 30 lowest of {len(labels)} classes:"
    assert len(lines) == 32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_of_some_classes_are_compared_with_their_own_outputs(smoothing):
    logits, outputs = random_logits(30, 9), torch.tensor([7, 2, 4])
    labels = torch.arange(30) % 3
    scores = measured(Classification(9, smoothing, output_of=outputs), logits, labels)
    expected = measured(Classification(9), logits, outputs[labels])
    assert scores.stats() == expected.stats()


def images_with(labels, **more):
    """As much of a training set as a task needs."""
    return SimpleNamespace(
        class_sizes=lambda: None if labels is None else Counter(labels),
        num_samples=len(labels or ()),
        place="somewhere",
        **more,
    )


def test_balanced_weights_equal_scikit_learns():
    _, labels = unbalanced()
    labels[:3] = 2
    task = build_task(
        TaskSettings(class_weights="balanced"), images_with(labels.tolist()), 4, smoothing=0.1
    )
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels.numpy())
    np.testing.assert_allclose(task.class_weights, expected, rtol=1e-6)
    assert task.class_weights[labels].mean() == pytest.approx(1, rel=1e-5)


def test_the_weighted_loss_does_not_depend_on_how_images_are_batched():
    logits, labels = unbalanced(40)
    task = Classification(4, 0.1, torch.tensor([0.3, 2.0, 1.0, 4.0]))
    parts = [task.loss(*p) for p in zip(logits.split(10), labels.split(10), strict=True)]
    assert task.loss(logits, labels).item() == pytest.approx(sum(parts).item() / 4, rel=1e-5)
    # PyTorch's loss of one-hot targets is that of labels.
    targets = F.one_hot(labels, 4).float()
    assert task.loss(logits, targets).item() == pytest.approx(
        task.loss(logits, labels).item(), rel=1e-5
    )


def several_labels(num_images=60, num_classes=5):
    generator = torch.Generator().manual_seed(1)
    targets = (torch.rand(num_images, num_classes, generator=generator) < 0.3).float()
    targets[:, 3] = 0  # no image has it
    return random_logits(num_images, num_classes) + targets, targets


def test_scores_of_several_labels_equal_scikit_learns():
    logits, targets = several_labels()
    scores = measured(Multilabel(5), logits, targets)
    expected = [100 * average_precision_score(targets[:, i], logits[:, i]) for i in (0, 1, 2, 4)]
    assert scores.precision[[0, 1, 2, 4]].tolist() == pytest.approx(expected, rel=1e-5)
    assert scores.stats() == {
        "val_loss": pytest.approx(F.binary_cross_entropy_with_logits(logits, targets).item()),
        "val_map": pytest.approx(np.mean(expected), rel=1e-5),
        "val_images": 60,
    }
    assert scores.as_json(None)["classes"]["3"] == {"images": 0, "average_precision": None}


def test_one_label_is_measured_and_none_is_refused():
    logits, targets = several_labels()
    targets[:, [0, 1, 3, 4]] = 0
    precision = measured(Multilabel(5), logits, targets).precision
    assert precision.isfinite().nonzero().flatten().tolist() == [2]
    expected = 100 * average_precision_score(targets[:, 2], logits[:, 2])
    assert precision[2].item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="none of the validation images has any of the classes"):
        measured(Multilabel(5), logits, torch.zeros_like(targets))


def test_balanced_weights_of_several_labels_make_presence_and_absence_alike():
    labels = [0] * 10 + [1] * 2  # of 20 images; the class 2 has none
    images = images_with(labels)
    images.num_samples = 20
    task = build_task(TaskSettings("multilabel", "balanced"), images, 3)
    assert task.class_weights.tolist() == [1.0, 9.0, 20.0]


def test_scores_of_a_regression_equal_scikit_learns():
    targets = torch.linspace(1000, 1100, 50)
    images = images_with(None, reader=SimpleNamespace(labels=targets.tolist()))
    task = build_task(TaskSettings("regression"), images, 1)
    assert task.scale == pytest.approx((1050, targets.std(correction=0).item()))
    predictions = targets + 20 * random_logits(50, 1)[:, 0]
    logits = ((predictions - task.scale[0]) / task.scale[1]).unsqueeze(1)
    assert measured(task, logits, targets).stats() == {
        "val_loss": pytest.approx(task.loss(logits, targets).item(), rel=1e-4),
        "val_mae": pytest.approx(mean_absolute_error(targets, predictions), rel=1e-4),
        "val_r2": pytest.approx(r2_score(targets, predictions), rel=1e-4),
        "val_images": 50,
    }
    assert "val_r2" not in measured(task, logits[:1], targets[:1]).stats()


def test_numbers_that_are_all_equal_cannot_be_learned():
    images = images_with(None, reader=SimpleNamespace(labels=[3.0, 3.0]))
    with pytest.raises(InputError, match="of every training image is 3"):
        build_task(TaskSettings("regression"), images, 1)


def test_weights_need_labels_that_are_known():
    with pytest.raises(InputError, match="leave --class_weights out"):
        build_task(TaskSettings(class_weights="balanced"), images_with(None), 3)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("regression", None, "top1"), "choose mae or loss"),
        (("multilabel", None, "balanced"), "choose map or loss"),
        (("classification", None, "mae"), "choose top1, balanced or loss"),
        (("regression", "balanced", None), "leave it out with --task regression"),
    ],
)
def test_settings_of_another_task_are_refused(settings, reason):
    with pytest.raises(InputError, match=reason):
        TaskSettings(*settings)


@pytest.mark.parametrize("task", [Multilabel(3), Regression((0.0, 1.0)), Classification(3)])
def test_an_image_without_a_label_is_refused(task):
    with pytest.raises(InputError, match="an image has no label"):
        task.check(None)


def test_averaged_weights_are_described_beside_the_last_ones():
    averaged = {"val_top1": 80.0, "val_loss": 0.5, "val_images": 7}
    raw = {"raw_val_top1": 70.0, "raw_val_loss": 0.75}
    assert describe(averaged | raw) == (
        "top-1 80.00%, loss 0.5000 over 7 images; without averaging top-1 70.00%, loss 0.7500"
    )


@pytest.mark.parametrize("number", [2, 12, 45, 1500])
def test_a_confusion_matrix_is_drawn_in_a_readable_size(number):
    names = [f"a class with a very long name {i}\n" for i in range(number)]
    confusion = torch.eye(number, dtype=torch.int64)
    confusion[0, 1] = 3  # and one of the first right
    picture = draw_confusion(confusion, names if number < 1000 else None)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert max(picture.shape) < 1800
    # A right answer is dark, a wrong one in three of four darker than nothing.
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 3
