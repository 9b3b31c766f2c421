"""Average precision of boxes and masks, computed as COCO does."""

import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as rle
from torch import Tensor

from util.errors import escaped

KINDS = {"box": "bbox", "mask": "segm"}  # our names and COCO's
MASK_THRESHOLD = 0.5
# Positions in COCO's arrays: of the areas all, small, medium and large, and of at most 1, 10 and
# 100 detections in an image.
AREAS = {"": 0, "_small": 1, "_medium": 2, "_large": 3}
IOUS = {"50": 0, "75": 5}


def encode_mask(probabilities: Tensor, box: Tensor, size: tuple[int, int]) -> dict:
    """Put the mask of a box into the image; return COCO's run lengths, as JSON can hold them.

    As in detectron2, every pixel's center is looked up in the mask. torchvision widens the box to
    whole pixels, which makes small objects up to a third larger.

    Args:
        probabilities: (1, m, m).
        box: (4,), left, top, right, bottom, in pixels.
        size: (height, width) of the image.
    """
    pasted = np.zeros(size, dtype=np.uint8, order="F")
    first = (box[:2].floor().int() - 1).clamp(min=0).tolist()
    last = (box[2:].ceil().int() + 1).tolist()
    last = map(min, last, size[::-1])
    x, y = (torch.arange(*ends) + 0.5 for ends in zip(first, last, strict=True))
    left, top, right, bottom = box.tolist()
    x, y = (x - left) / (right - left) * 2 - 1, (y - top) / (bottom - top) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (rows, columns, 2)
    found = F.grid_sample(probabilities[None], grid[None], align_corners=False)[0, 0]
    rows, columns = found.shape
    part = pasted[first[1] : first[1] + rows, first[0] : first[0] + columns]
    part[:] = (found >= MASK_THRESHOLD).numpy()
    return {"size": list(size), "counts": rle.encode(pasted)["counts"].decode("ascii")}


def scale_to_image(
    detections: dict[str, Tensor], shown: tuple[int, int], size: tuple[int, int]
) -> dict[str, Tensor]:
    """Move detections to the CPU and scale their boxes to the original image.

    Args:
        detections: see models_vitdet.
        shown: (height, width) of the image in the model's input.
        size: (height, width) of the original.
    """
    found = {name: value.detach().float().cpu() for name, value in detections.items()}
    scale = torch.tensor([size[1] / shown[1], size[0] / shown[0]]).repeat(2)
    limit = torch.tensor([size[1], size[0]]).repeat(2)
    found["boxes"] = (found["boxes"] * scale).clamp(min=0).minimum(limit)
    found["labels"] = detections["labels"].cpu()
    return found


def as_results(
    found: dict[str, Tensor], size: tuple[int, int], image_id: object, category_ids: Sequence[int]
) -> list[dict]:
    """Detections of an image in COCO's result format.

    Args:
        found: see `scale_to_image`.
        size: (height, width) of the image.
        category_ids: in the order of labels.
    """
    results = []
    for number, (box, score, label) in enumerate(
        zip(found["boxes"], found["scores"], found["labels"], strict=True)
    ):
        left, top, right, bottom = box.tolist()
        result = {
            "image_id": image_id,
            "category_id": category_ids[int(label) - 1],
            "bbox": [left, top, right - left, bottom - top],
            "score": score.item(),
        }
        if "masks" in found:
            result["segmentation"] = encode_mask(found["masks"][number], box, size)
        results.append(result)
    return results


class Precisions(NamedTuple):
    """Results for one kind, boxes or masks."""

    precision: np.ndarray
    """(IoU thresholds, recalls, classes, areas, numbers of detections), -1 without objects."""
    recall: np.ndarray
    """Without the axis of recalls."""

    def ap(self, iou: int | slice = slice(None), area: int = 0) -> float:
        """Average precision in percent; NaN if there is no object."""
        return _mean(self.precision[iou, :, :, area, -1])

    @property
    def by_class(self) -> list[float]:
        """Average precision of each class, in percent; NaN for those without objects."""
        return [_mean(own) for own in np.moveaxis(self.precision[..., 0, -1], 2, 0)]

    def stats(self, kind: str) -> dict[str, float]:
        """COCO's twelve numbers but for recall at 1 and 10 detections, by name, in percent."""
        stats = {f"{kind}_ap{name}": self.ap(area=area) for name, area in AREAS.items()}
        stats |= {f"{kind}_ap{name}": self.ap(iou) for name, iou in IOUS.items()}
        return stats | {f"{kind}_ar": _mean(self.recall[:, :, 0, -1])}


class DetectionScores(NamedTuple):
    """Results over a set of images."""

    kinds: dict[str, Precisions]
    """"box", and with a mask head "mask"."""
    num_objects: list[int]
    """Of each class, without crowds."""
    num_images: int

    def stats(self) -> dict[str, float]:
        """Values for the log, in percent; without those of sizes that no object has."""
        found = [own.stats(kind) for kind, own in self.kinds.items()]
        stats = {f"val_{n}": v for own in found for n, v in own.items() if not math.isnan(v)}
        return {**stats, "val_images": self.num_images}

    def table(self, classes: Sequence[str]) -> str:
        """Lines of text: each class with its AP and the number of its objects."""
        classes = [escaped(name) for name in classes]
        width = max(map(len, (*classes, "class")))
        kinds = "".join(f"  {kind + ' AP':>7}" for kind in self.kinds)
        lines = [f"{'class':{width}}{kinds}  objects"]
        columns = [own.by_class for own in self.kinds.values()]
        for name, count, *values in zip(classes, self.num_objects, *columns, strict=True):
            cells = ("-" if np.isnan(value) else f"{value:.1f}" for value in values)
            lines.append(f"{name:{width}}{''.join(f'  {c:>7}' for c in cells)}  {count:>7}")
        return "\n".join(lines)

    def as_json(self, classes: Sequence[str]) -> dict[str, object]:
        """Plain values; None for the AP of a class without objects."""
        rows = [{"class": n, "objects": c} for n, c in zip(classes, self.num_objects, strict=True)]
        for kind, own in self.kinds.items():
            for row, value in zip(rows, own.by_class, strict=True):
                row[f"{kind}_ap"] = None if np.isnan(value) else value
        return {**self.stats(), "classes": rows}


def describe(stats: dict[str, float]) -> str:
    """Format the results of `DetectionScores.stats`."""
    parts = [
        f"{kind} AP {stats[f'val_{kind}_ap']:.2f} (AP50 {stats[f'val_{kind}_ap50']:.2f})"
        for kind in KINDS
        if f"val_{kind}_ap" in stats
    ]
    images = "image" if stats["val_images"] == 1 else "images"
    return f"{', '.join(parts)} over {stats['val_images']} {images}"


def score_detections(truth: dict, results: list[dict], *, masks: bool) -> DetectionScores:
    """Average precision over the images of `truth`.

    Args:
        truth: annotations in COCO's format.
        results: detections in COCO's result format.
        masks: also score masks.
    """
    logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)
    kinds = {}
    for kind in KINDS if masks else ("box",):
        own = COCO(truth)
        # Copies, because they are changed. Without its box, the area of a result is its mask's.
        left_out = {"box": "segmentation", "mask": "bbox"}[kind]
        copies = [{n: v for n, v in result.items() if n != left_out} for result in results]
        evaluation = COCOeval_faster(own, own.loadRes(copies), KINDS[kind])
        evaluation.evaluate()
        evaluation.accumulate()
        kinds[kind] = Precisions(evaluation.eval["precision"], evaluation.eval["recall"])
    ids = [category["id"] for category in truth["categories"]]
    counts = dict.fromkeys(ids, 0)
    for entry in truth["annotations"]:
        counts[entry["category_id"]] += not entry["iscrowd"]
    return DetectionScores(kinds, [counts[number] for number in ids], len(truth["images"]))


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else float("nan")
