"""Predictions for whole images, and how well they agree with labels: IoU and accuracy."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from util.compute.distributed import all_gather
from util.data.masks import UNLABELED
from util.errors import InputError, escaped
from util.settings.evaluation import WindowSettings


@dataclass(frozen=True)
class Windows:
    """How a whole image is predicted.

    Args:
        mode: "slide" averages the logits of overlapping windows, "whole" takes the image at once.
        size: (height, width) of a window, in pixels; the patch size divides them.
        stride: distance of windows, in pixels.
        patch_size: whole images are padded to its multiples.
        batch_size: windows computed together.
    """

    mode: str
    size: tuple[int, int]
    stride: int
    patch_size: int
    batch_size: int

    @classmethod
    def of(cls, settings: WindowSettings, crop: tuple[int, int], patch_size: int) -> "Windows":
        """Windows as large as the training crops.

        Raises:
            InputError: the stride leaves gaps.
        """
        stride = max(1, 2 * min(crop) // 3) if settings.stride is None else settings.stride
        if stride > min(crop):
            raise InputError(
                f"--stride {stride} would leave gaps between windows of {min(crop)} px: lower it"
            )
        return cls(settings.eval_mode, tuple(crop), stride, patch_size, settings.window_batch)

    def boxes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Top and left of every window of an image; the last ones end at its borders."""
        return [
            (top, left)
            for top in starts(height, self.size[0], self.stride)
            for left in starts(width, self.size[1], self.stride)
        ]


def starts(length: int, window: int, stride: int) -> Iterator[int]:
    """Yield where windows start so that they cover a length."""
    yield from range(0, max(0, length - window), stride)
    yield max(0, length - window)


def predict(model: Callable[[Tensor], Sequence[Tensor]], image: Tensor, windows: Windows) -> Tensor:
    """Logits of an image, (1, C, H, W) -> float32 (1, K, H, W).

    Pixels outside the image are 0, the mean.

    Args:
        model: images (B, C, h, w) -> maps of logits, the first (B, K, ., .).
    """
    height, width = image.shape[2:]
    if windows.mode == "whole":
        size = [-(-side // windows.patch_size) * windows.patch_size for side in (height, width)]
        return _pixel_logits(model, _pad(image, size))[:, :, :height, :width]

    padded = _pad(image, [max(*sides) for sides in zip(windows.size, (height, width), strict=True)])
    boxes = windows.boxes(height, width)
    total, rows, columns = None, windows.size[0], windows.size[1]
    count = image.new_zeros(1, 1, *padded.shape[2:])
    for first in range(0, len(boxes), windows.batch_size):
        chunk = boxes[first : first + windows.batch_size]
        crops = [padded[..., top : top + rows, left : left + columns] for top, left in chunk]
        logits = _pixel_logits(model, torch.cat(crops))  # (B, K, rows, columns)
        if total is None:
            total = logits.new_zeros(1, logits.shape[1], *padded.shape[2:])
        for (top, left), own in zip(chunk, logits, strict=True):
            total[0, :, top : top + rows, left : left + columns] += own
            count[..., top : top + rows, left : left + columns] += 1
    return (total / count)[:, :, :height, :width]


def _pixel_logits(model: Callable[[Tensor], Sequence[Tensor]], images: Tensor) -> Tensor:
    return resize_logits(model(images)[0].float(), images.shape[2:])


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, K, h, w) -> (B, K, H, W), bilinear."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def _pad(image: Tensor, size: Sequence[int]) -> Tensor:
    height, width = image.shape[2:]
    return F.pad(image, (0, size[1] - width, 0, size[0] - height))


class Confusion:
    """Counts of pixels by class and prediction, over all processes.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        from torchmetrics.classification import MulticlassConfusionMatrix  # takes a second

        self.metric = MulticlassConfusionMatrix(
            num_classes, ignore_index=UNLABELED, validate_args=False, sync_on_compute=False
        ).to(device)
        self.images = torch.zeros((), dtype=torch.long, device=device)

    def add(self, predictions: Tensor, labels: Tensor) -> None:
        """Add predicted classes (B, H, W) and labels of the same shape."""
        self.metric.update(predictions, labels)
        self.images += len(labels)

    def scores(self) -> "Scores":
        """Combine all processes; every one of them has to call it."""
        counts = torch.cat((self.metric.confmat.flatten(), self.images.view(1)))
        total = all_gather(counts).sum(dim=0)
        return Scores(total[:-1].view_as(self.metric.confmat).cpu(), int(total[-1]))


class Scores(NamedTuple):
    """Results over a set of images.

    Args:
        confusion: pixels (K, K) by class, then prediction.
        num_images: number of images.
    """

    confusion: Tensor
    num_images: int

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class (K,); NaN if no label or prediction has it."""
        hits = self.confusion.diag().double()
        return hits / (self.confusion.sum(dim=0) + self.confusion.sum(dim=1) - hits)

    @property
    def accuracy(self) -> Tensor:
        """Fraction of each class's pixels that are predicted (K,); NaN if it has none."""
        return self.confusion.diag().double() / self.confusion.sum(dim=1)

    @property
    def pixels(self) -> Tensor:
        """Fraction of the labeled pixels that each class has (K,)."""
        return self.confusion.sum(dim=1).double() / self.confusion.sum()

    def stats(self) -> dict[str, float]:
        """Means for the log, in percent; classes with NaN do not count."""
        return {
            "val_miou": 100 * self.iou.nanmean().item(),
            "val_mean_accuracy": 100 * self.accuracy.nanmean().item(),
            "val_pixel_accuracy": 100 * (self.confusion.diag().sum() / self.confusion.sum()).item(),
            "val_images": self.num_images,
        }

    def table(self, classes: Sequence[str]) -> str:
        """Lines of text: each class with its IoU, accuracy and fraction of the pixels."""
        classes = [escaped(name) for name in classes]
        width = max(map(len, (*classes, "class")))
        lines = [f"{'class':{width}}  IoU %  accuracy %  pixels %"]
        for name, *values in zip(classes, self.iou, self.accuracy, self.pixels, strict=True):
            iou, accuracy, pixels = ("-" if v.isnan() else f"{100 * v:.2f}" for v in values)
            lines.append(f"{name:{width}}  {iou:>5}  {accuracy:>10}  {pixels:>8}")
        return "\n".join(lines)

    def as_json(self, classes: Sequence[str]) -> dict[str, object]:
        """Plain values; None instead of NaN."""

        def plain(values: Tensor) -> list[float | None]:
            return [None if v.isnan() else 100 * v.item() for v in values]

        rows = zip(classes, *map(plain, (self.iou, self.accuracy, self.pixels)), strict=True)
        names = ("class", "iou", "accuracy", "pixels")
        stats = {n: None if math.isnan(v) else v for n, v in self.stats().items()}
        return {**stats, "classes": [dict(zip(names, row, strict=True)) for row in rows]}


def describe(stats: dict[str, float]) -> str:
    """Format the results of `Scores.stats`."""
    images = "image" if stats["val_images"] == 1 else "images"
    return (
        f"mIoU {stats['val_miou']:.2f} %, mean accuracy {stats['val_mean_accuracy']:.2f} %, "
        f"pixel accuracy {stats['val_pixel_accuracy']:.2f} % over {stats['val_images']} {images}"
    )
