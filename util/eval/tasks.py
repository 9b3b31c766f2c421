"""What a head is trained for: its loss, and how well it does on validation images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional import mean_absolute_error, r2_score
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multilabel_average_precision,
)

from util.compute.distributed import all_gather, all_gather_objects, all_sum
from util.data.classes import check_labels
from util.data.images import IndexedImages
from util.data.streams import StreamedImages
from util.errors import InputError, counted, escaped
from util.settings.evaluation import TaskSettings

MAX_CONFUSION = 2000  # classes; the matrix of more would take gigabytes
MAX_LISTED = 30  # classes in a table; of more, the worst

FORMATS = {
    "val_top1": "top-1 {:.2f}%",
    "val_top5": "top-5 {:.2f}%",
    "val_balanced": "balanced {:.2f}%",
    "val_map": "mAP {:.2f}%",
    "val_mae": "mean absolute error {:.5g}",
    "val_r2": "R2 {:.4f}",
    "val_loss": "loss {:.4f}",
}


class Scores(Protocol):
    """How well a model does on a set of images."""

    def stats(self) -> dict[str, float]:
        """Return the numbers of an epoch, `val_loss` and `val_images` among them."""

    def as_json(self, classes: Sequence[str] | None) -> dict[str, object]:
        """Return everything as plain values; `classes` are the names of the outputs."""

    def table(self, classes: Sequence[str] | None) -> str | None:
        """Return lines of text about the classes, if there are any."""


class Measurement(Protocol):
    """Collects the outputs of a model and the labels."""

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add those of a batch."""

    def scores(self) -> Scores:
        """Return the scores of the images of all processes; each must call it."""


class Task(Protocol):
    """What a head is trained for.

    Attributes:
        num_outputs: of the head.
    """

    num_outputs: int

    def check(self, labels: Tensor | None) -> None:
        """Raise InputError if labels, still on the host, are missing or out of range."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of logits (B, N) in float32."""

    def measurement(self, device: torch.device) -> Measurement:
        """Start to measure."""


@dataclass(frozen=True)
class Classification:
    """One class for each image; the loss is cross-entropy.

    Args:
        smoothing: label smoothing, in [0, 1).
        class_weights: (N,), of the images of each class in the loss; on the model's device.
        output_of: (C,), the output of each label, if labels are indices into other classes.
    """

    num_outputs: int
    smoothing: float = 0.0
    class_weights: Tensor | None = None
    output_of: Tensor | None = None

    def check(self, labels: Tensor | None) -> None:
        """See Task."""
        known = self.num_outputs if self.output_of is None else len(self.output_of)
        check_labels(labels, known)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See Task; targets are labels (B,), or shares of the classes (B, N)."""
        if self.class_weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        options = {
            "weight": self.class_weights,
            "label_smoothing": self.smoothing,
            "reduction": "none",
        }
        # PyTorch's own mean would weight an image by the others of its micro-batch.
        return F.cross_entropy(logits, targets, **options).mean()

    def measurement(self, device: torch.device) -> "ClassMeasurement":
        """See Task."""
        return ClassMeasurement(self.num_outputs, device, self.output_of)


class ClassMeasurement:
    """Counts of a classifier's hits, and its confusion matrix unless it has too many classes."""

    def __init__(self, num_outputs: int, device: torch.device, output_of: Tensor | None) -> None:
        self.num_outputs = num_outputs
        self.output_of = None if output_of is None else output_of.to(device)
        self.sums = torch.zeros(3, device=device)  # loss, top-5 hits, images
        # Of each class: images and hits.
        self.counts = torch.zeros(2, num_outputs, dtype=torch.int64, device=device)
        self.confusion = None
        if num_outputs <= MAX_CONFUSION:
            shape = (num_outputs, num_outputs)
            self.confusion = torch.zeros(shape, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of logits (B, N) and labels (B,)."""
        if self.output_of is not None:
            labels = self.output_of[labels]
        best = logits.topk(min(5, self.num_outputs)).indices  # (B, 5)
        hits = best == labels.unsqueeze(1)
        self.sums[0] += F.cross_entropy(logits, labels, reduction="sum")
        self.sums[1] += hits.sum()
        self.sums[2] += len(labels)
        for row, chosen in enumerate((labels, labels[hits[:, 0]])):
            self.counts[row] += torch.bincount(chosen, minlength=self.num_outputs)
        if self.confusion is not None:
            self.confusion += multiclass_confusion_matrix(
                best[:, 0], labels, self.num_outputs, validate_args=False
            )

    def scores(self) -> "ClassScores":
        """See Measurement."""
        loss, top5, num_images = all_gather(self.sums).sum(dim=0).tolist()
        images, hits = all_sum(self.counts).cpu()
        confusion = None if self.confusion is None else all_sum(self.confusion).cpu()
        return ClassScores(
            loss / num_images, 100 * top5 / num_images, int(num_images), images, hits, confusion
        )


class ClassScores(NamedTuple):
    """How well a classifier does."""

    loss: float
    top5: float
    """In percent."""
    num_images: int
    images: Tensor
    """(N,), images of each class."""
    hits: Tensor
    """(N,), those that were classified correctly."""
    confusion: Tensor | None
    """(N, N), images by class and predicted class; None if there are too many classes."""

    @property
    def accuracy(self) -> Tensor:
        """Accuracy of each class in percent, NaN without images, (N,)."""
        return 100 * self.hits.double() / self.images

    def stats(self) -> dict[str, float]:
        """Return loss and accuracies in percent; balanced accuracy is the mean of the classes'."""
        return {
            "val_loss": self.loss,
            "val_top1": 100 * self.hits.sum().item() / self.num_images,
            "val_top5": self.top5,
            "val_balanced": self.accuracy.nanmean().item(),
            "val_images": self.num_images,
        }

    def as_json(self, classes: Sequence[str] | None) -> dict[str, object]:
        """See Scores."""
        per_class = _per_class(classes, self.images, "accuracy", self.accuracy)
        matrix = None if self.confusion is None else self.confusion.tolist()
        return {**self.stats(), "classes": per_class, "confusion": matrix}

    def table(self, classes: Sequence[str] | None) -> str:
        """See Scores."""
        names = _names(classes, len(self.images))
        return _table(names, self.accuracy, self.images, "accuracy")


@dataclass(frozen=True)
class Multilabel:
    """Any number of classes for each image; the loss is binary cross-entropy of each class.

    Args:
        class_weights: (N,), of the images with each class, relative to those without it; on the
            model's device.
    """

    num_outputs: int
    class_weights: Tensor | None = None

    def check(self, labels: Tensor | None) -> None:
        """See Task."""
        _check_present(labels)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See Task; targets are (B, N), 1 for the classes of an image."""
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.class_weights)

    def measurement(self, device: torch.device) -> "Outputs":
        """See Task."""
        return Outputs(self._scores)

    def _scores(self, logits: Tensor, targets: Tensor) -> "MultilabelScores":
        loss = F.binary_cross_entropy_with_logits(logits, targets).item()
        positives = targets.sum(dim=0).long()  # (N,)
        precision = torch.full((self.num_outputs,), torch.nan)
        known = positives > 0
        if not known.any():
            raise InputError("none of the validation images has any of the classes: give others")
        found, target = logits[:, known], targets[:, known].long()
        if known.sum() == 1:  # torchmetrics wants two classes at least
            found, target = found.repeat(1, 2), target.repeat(1, 2)
        values = multilabel_average_precision(found, target, found.shape[1], average=None)
        precision[known] = values[: known.sum()]
        return MultilabelScores(loss, len(targets), positives, 100 * precision)


class MultilabelScores(NamedTuple):
    """How well a model finds the classes of images."""

    loss: float
    num_images: int
    images: Tensor
    """(N,), images with each class."""
    precision: Tensor
    """Average precision of each class in percent, NaN without images, (N,)."""

    def stats(self) -> dict[str, float]:
        """Return loss and mAP in percent, the mean over the classes that have images."""
        return {
            "val_loss": self.loss,
            "val_map": self.precision.nanmean().item(),
            "val_images": self.num_images,
        }

    def as_json(self, classes: Sequence[str] | None) -> dict[str, object]:
        """See Scores."""
        per_class = _per_class(classes, self.images, "average_precision", self.precision)
        return {**self.stats(), "classes": per_class}

    def table(self, classes: Sequence[str] | None) -> str:
        """See Scores."""
        names = _names(classes, len(self.images))
        return _table(names, self.precision, self.images, "AP")


@dataclass(frozen=True)
class Regression:
    """A number for each image; the loss is the squared error of standardized numbers.

    Args:
        scale: mean and standard deviation of the training images' numbers.
    """

    scale: tuple[float, float]
    num_outputs: int = 1

    def check(self, labels: Tensor | None) -> None:
        """See Task."""
        _check_present(labels)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See Task; targets are (B,), as in the data."""
        mean, std = self.scale
        return F.mse_loss(logits.squeeze(1), (targets - mean) / std)

    def measurement(self, device: torch.device) -> "Outputs":
        """See Task."""
        return Outputs(self._scores)

    def _scores(self, logits: Tensor, targets: Tensor) -> "RegressionScores":
        mean, std = self.scale
        found, targets = logits.squeeze(1).double(), (targets.double() - mean) / std
        r2 = r2_score(found, targets).item() if len(targets) > 1 else None
        error = std * mean_absolute_error(found, targets).item()
        return RegressionScores(F.mse_loss(found, targets).item(), error, r2, len(targets))


class RegressionScores(NamedTuple):
    """How close a model's numbers are."""

    loss: float
    error: float
    """Mean absolute error, in the unit of the data."""
    r2: float | None
    """Coefficient of determination; None for a single image."""
    num_images: int

    def stats(self) -> dict[str, float]:
        """See Scores."""
        r2 = {} if self.r2 is None else {"val_r2": self.r2}
        found = {"val_loss": self.loss, "val_mae": self.error, **r2}
        return {**found, "val_images": self.num_images}

    def as_json(self, classes: Sequence[str] | None) -> dict[str, object]:
        """See Scores."""
        return self.stats()

    def table(self, classes: Sequence[str] | None) -> None:
        """See Scores."""


class Outputs:
    """All outputs and labels, for scores that need them together."""

    def __init__(self, scores_of: Callable[[Tensor, Tensor], Scores]) -> None:
        self.scores_of = scores_of
        self.batches: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of logits (B, N) and labels (B, ...)."""
        self.batches.append((logits.cpu(), labels.cpu()))

    def scores(self) -> Scores:
        """See Measurement."""
        logits, labels = zip(*all_gather_objects(self.batches), strict=True)
        return self.scores_of(torch.cat(logits), torch.cat(labels))


def _check_present(labels: Tensor | None) -> None:
    if labels is None:
        raise InputError("an image has no label: label every image, or remove those without one")


def _names(classes: Sequence[str] | None, number: int) -> list[str]:
    return list(classes) if classes else [str(index) for index in range(number)]


def _per_class(
    classes: Sequence[str] | None, images: Tensor, title: str, values: Tensor
) -> dict[str, dict[str, object]]:
    """Return each class's number of images and its value, None without images."""
    rows = zip(_names(classes, len(images)), images.tolist(), values.tolist(), strict=True)
    return {name: {"images": n, title: value if n else None} for name, n, value in rows}


def _table(names: Sequence[str], values: Tensor, images: Tensor, title: str) -> str:
    """Return a line for each class that has images; of many, for those with the lowest values."""
    rows = [
        (name, value, count)
        for name, value, count in zip(names, values.tolist(), images.tolist(), strict=True)
        if count
    ]
    lines = []
    if len(rows) > MAX_LISTED:
        lines = [f"the {MAX_LISTED} lowest of {len(rows)} classes:"]
        rows = sorted(rows, key=lambda row: row[1])[:MAX_LISTED]
    width = max([5, *(len(escaped(name)) for name, _, _ in rows)])
    lines.append(f"{'class':{width}}  {title:>8}  images")
    lines += [f"{escaped(name):{width}}  {value:7.2f}%  {count:6}" for name, value, count in rows]
    return "\n".join(lines)


def describe(stats: dict[str, float]) -> str:
    """Format the numbers of an epoch; those of a model that is averaged come first."""
    text = _describe(stats)
    raw = {name.removeprefix("raw_"): v for name, v in stats.items() if name.startswith("raw_")}
    text += f" over {counted(stats['val_images'], 'image')}"
    return f"{text}; without averaging {_describe(raw)}" if raw else text


def _describe(stats: dict[str, float]) -> str:
    return ", ".join(form.format(stats[name]) for name, form in FORMATS.items() if name in stats)


def build_task(
    settings: TaskSettings,
    train_set: IndexedImages | StreamedImages,
    num_outputs: int,
    *,
    smoothing: float = 0.0,
    device: torch.device | str = "cpu",
) -> Task:
    """Build what a head is trained for.

    Args:
        num_outputs: classes; ignored for a regression.
        smoothing: of labels.
        device: of the model.

    Raises:
        InputError: the weights of classes cannot be known, or all numbers are equal.
    """
    if settings.task == "regression":
        targets = torch.tensor(train_set.reader.labels, dtype=torch.float64)
        std, mean = torch.std_mean(targets, correction=0)
        if std == 0:
            raise InputError(f"the label of every training image is {mean:g}: nothing to learn")
        return Regression((mean.item(), std.item()))
    weights = None
    if settings.class_weights:
        weights = balanced_weights(train_set, num_outputs, settings.task).to(device)
    if settings.task == "multilabel":
        return Multilabel(num_outputs, weights)
    return Classification(num_outputs, smoothing, weights)


def balanced_weights(
    train_set: IndexedImages | StreamedImages, num_classes: int, task: str
) -> Tensor:
    """Weights (N,) that make classes count alike: inverse to their numbers of images.

    Those of a classification have the mean 1 over the images. Of several labels, the images with a
    class count as much as those without it.

    Raises:
        InputError: the number of images of each class is not known before they are read.
    """
    sizes = train_set.class_sizes()
    if sizes is None:
        raise InputError(
            f"the labels of {train_set.place} are not known before they are read: leave "
            "--class_weights out"
        )
    counts = torch.tensor([sizes[label] for label in range(num_classes)], dtype=torch.float64)
    present = counts.clamp(min=1)
    if task == "multilabel":
        weights = ((train_set.num_samples - counts) / present).float()
        return weights.masked_fill(weights == 0, 1.0)  # of a class that every image has
    return (counts.sum() / ((counts > 0).sum() * present)).float()
