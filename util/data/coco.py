"""Annotation files in COCO's format: reading, checking, and masks of objects."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from faster_coco_eval.core import mask as rle

from util.errors import InputError, counted
from util.json_text import parse_json

MAX_LISTED = 20
MAX_REACH = 2.0  # of a polygon from the image's center, in sides
MIN_AREA = 4.0  # pixels; a smaller polygon may cover no pixel's center

_logger = logging.getLogger(__name__)


class CocoObject(NamedTuple):
    """One annotation, without its segmentation if only boxes are used."""

    label: int
    """From 1 on, in the order of the categories' ids; 0 is the background."""
    segmentation: list[np.ndarray] | dict | None
    """Polygons, each x0, y0, x1, y1, ...; or run lengths."""
    box: tuple[float, float, float, float]
    """Left, top, width, height, in pixels."""
    is_crowd: bool
    area: float | None
    """Of the mask, in pixels, as the file says; None if it does not."""

    def mask(self, size: tuple[int, int]) -> dict:
        """Compressed run lengths of the object in an image of (height, width)."""
        return run_lengths(self.segmentation, size)


def run_lengths(segmentation: list[np.ndarray] | dict, size: tuple[int, int]) -> dict:
    """Compressed run lengths of a segmentation in an image of (height, width)."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, *size))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, *size)
    return segmentation


class CocoImage(NamedTuple):
    """An image and its objects."""

    id: int
    name: str
    """Path below the folder of the images."""
    size: tuple[int, int]
    """(height, width)."""
    objects: list[CocoObject]


class CocoFile(NamedTuple):
    """The content of an annotation file."""

    path: Path
    images: list[CocoImage]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    """In the order of `classes`."""

    def ground_truth(self, images: Sequence[CocoImage]) -> dict:
        """What evaluation compares with, in COCO's format, for some of the images.

        Objects get new ids, from 1 on: evaluation takes an id of 0 for no match.
        """
        entries, objects = [], []
        for image in images:
            height, width = image.size
            entries.append({"id": image.id, "height": height, "width": width})
            for own in image.objects:
                mask, area = {}, own.box[2] * own.box[3]
                if own.segmentation is not None:
                    mask = {"segmentation": own.mask(image.size)}
                    area = float(rle.area(mask["segmentation"]))
                objects.append(
                    {
                        "id": len(objects) + 1,
                        "image_id": image.id,
                        "category_id": self.category_ids[own.label - 1],
                        "bbox": list(own.box),
                        "area": area if own.area is None else own.area,
                        "iscrowd": int(own.is_crowd),
                        **mask,
                    }
                )
        pairs = zip(self.category_ids, self.classes, strict=True)
        categories = [{"id": number, "name": name} for number, name in pairs]
        return {"images": entries, "annotations": objects, "categories": categories}


def read_coco(path: Path, *, masks: bool, max_broken: float) -> CocoFile:
    """Read an annotation file; broken annotations are logged and left out.

    Args:
        masks: whether every object needs a segmentation; if not, only boxes are read.
        max_broken: fraction of the annotations that may be broken.

    Raises:
        InputError: the file cannot be read or is not in COCO's format, or too many annotations are
            broken.
    """
    content = _read_lists(path)
    try:
        names = {entry["id"]: entry["name"] for entry in content["categories"]}
        ids = tuple(sorted(names))
        labels = {number: label for label, number in enumerate(ids, start=1)}
        images = {entry["id"]: _read_image(entry) for entry in content["images"]}
        wrong = [pair for pair in names.items() if list(map(type, pair)) != [int, str]]
        if wrong:
            raise TypeError(f"category {wrong[0][0]!r} is named {wrong[0][1]!r}")  # noqa: TRY301
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is not in COCO's format: an image needs id, file_name, height and width, a "
            f"category id and name; ids are whole numbers ({type(error).__name__}: {error})"
        ) from error
    for what, entries, found in (
        ("categories", content["categories"], names),
        ("images", content["images"], images),
    ):
        if len(found) < len(entries):
            raise InputError(f"{path} has {what} with the same id: give each an id of its own")
        if not found:
            raise InputError(f"{path} has no {what}: choose another file")
    repeated = [name for name, count in Counter(names.values()).items() if count > 1]
    if repeated:
        raise InputError(f"{path} has two categories named {repeated[0]}: rename one of them")
    if masks and content["annotations"] and not any(map(_has_segmentation, content["annotations"])):
        raise InputError(f"{path} has no segmentations: predict boxes only, with --no_masks")
    results = (_add(images, entry, labels, masks=masks) for entry in content["annotations"])
    broken = list(filter(None, results))
    _check_broken(path, broken, len(content["annotations"]), max_broken)
    classes = tuple(names[number] for number in ids)
    return CocoFile(path, list(images.values()), classes, ids)


def _read_lists(path: Path) -> dict[str, list]:
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the annotations in {path}: {error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): export it again") from error
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise InputError(f"{path} is not in COCO's format: it lacks a list of {name}")
    return content


def _has_segmentation(entry: object) -> bool:
    return isinstance(entry, dict) and bool(entry.get("segmentation"))


def _read_image(entry: dict) -> CocoImage:
    """Read an image's entry, without its objects.

    Raises:
        KeyError, OverflowError, TypeError, ValueError: it is not in COCO's format.
    """
    number, name, size = entry["id"], entry["file_name"], (entry["height"], entry["width"])
    height, width = map(int, size)
    if not isinstance(number, int) or not isinstance(name, str) or (height, width) != size:
        raise TypeError(f"image {number!r} named {name!r} with height and width {size}")
    if min(size) < 1:
        raise ValueError(f"{name} has height and width {size}")
    return CocoImage(number, name, (height, width), [])


def _add(
    images: dict[object, CocoImage], entry: dict, labels: dict[object, int], *, masks: bool
) -> str | None:
    """Add an annotation to its image; return which one it is and why if it is broken."""
    try:
        number = entry["image_id"]
        if number not in images:
            return f"annotation {entry.get('id')} (of image {number}, which is not listed)"
        image = images[number]
        image.objects.append(_read_object(entry, image.size, labels, masks=masks))
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        name = entry.get("id") if isinstance(entry, dict) else entry
        reason = str(error) if isinstance(error, ValueError) else "it is not in COCO's format"
        reason = f"it has no {error.args[0]}" if isinstance(error, KeyError) else reason
        return f"annotation {name} ({reason})"
    return None


def _read_object(
    entry: dict, size: tuple[int, int], labels: dict[int, int], *, masks: bool
) -> CocoObject:
    """Read and check an annotation.

    Raises:
        AttributeError, LookupError, OverflowError, TypeError, ValueError: it is broken.
    """
    label = labels.get(entry["category_id"])
    if label is None:
        raise ValueError(f"its category {entry['category_id']} is not listed")
    segmentation = _read_segmentation(entry.get("segmentation"), size) if masks else None
    if entry.get("bbox") is not None:
        box = tuple(float(value) for value in entry["bbox"])
    elif segmentation is None:
        raise ValueError("it has no bbox")
    else:
        box = tuple(rle.toBbox(run_lengths(segmentation, size)).tolist())
    if isinstance(entry.get("bbox"), str) or len(box) != 4 or not all(map(math.isfinite, box)):
        raise ValueError(f"its bbox is not left, top, width and height: {list(box)}")
    left, top, width, height = box
    if min(width, height) <= 0:
        raise ValueError(f"its bbox is {width:g} x {height:g} px")
    _check_inside((left, left + width), (top, top + height), size)
    area = entry.get("area")
    if area is not None and not 0 <= float(area) < math.inf:
        raise ValueError(f"its area is {area}")
    return CocoObject(
        label,
        segmentation,
        box,
        is_crowd=bool(int(entry.get("iscrowd", 0))),
        area=None if area is None else float(area),
    )


def _read_segmentation(found: object, size: tuple[int, int]) -> list[np.ndarray] | dict:
    if isinstance(found, dict):
        if list(found["size"]) != list(size):
            raise ValueError(
                f"its run lengths are of {found['size'][1]} x {found['size'][0]} px, the image has "
                f"{size[1]} x {size[0]}"
            )
        try:
            pixels = rle.decode(run_lengths(found, size)).any()
        except (RuntimeError, ValueError) as error:
            raise ValueError("its run lengths are not those of a mask of its size") from error
        if not pixels:
            raise ValueError("its mask has no pixel")
        return found
    if not found or not isinstance(found, list):
        raise ValueError("it has no segmentation: with --no_masks only boxes are used")
    polygons = [np.asarray(polygon, dtype=np.float64) for polygon in found]
    for polygon in polygons:
        if polygon.ndim != 1 or len(polygon) % 2 or not np.isfinite(polygon).all():
            raise ValueError("a polygon is not a list of x, y, x, y, ...")
        if len(polygon) < 6:  # also because COCO's library takes four numbers for a box
            raise ValueError(f"a polygon has {counted(len(polygon) // 2, 'point')}, not 3 or more")
    points = np.concatenate(polygons)
    _check_inside(*((own.min(), own.max()) for own in (points[::2], points[1::2])), size)
    if np.abs(points.reshape(-1, 2) / size[::-1] - 0.5).max() > MAX_REACH:
        raise ValueError("a polygon reaches far outside the image")  # drawing it takes its length
    if _area(polygons) < MIN_AREA and not rle.area(run_lengths(polygons, size)):
        raise ValueError("its mask has no pixel")
    return polygons


def _area(polygons: Sequence[np.ndarray]) -> float:
    """Sum of the areas of polygons, in pixels."""
    corners = ((polygon[::2], polygon[1::2]) for polygon in polygons)
    return sum(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2 for x, y in corners)


def _check_inside(
    across: tuple[float, float], down: tuple[float, float], size: tuple[int, int]
) -> None:
    height, width = size
    if across[0] >= width or across[1] <= 0 or down[0] >= height or down[1] <= 0:
        raise ValueError(f"it lies outside the image of {width} x {height} px")


def _check_broken(path: Path, broken: Sequence[str], total: int, max_broken: float) -> None:
    """Log broken annotations.

    Raises:
        InputError: there are too many.
    """
    more = f", and {len(broken) - MAX_LISTED} more" if len(broken) > MAX_LISTED else ""
    listed = f"{'; '.join(broken[:MAX_LISTED])}{more}"
    if len(broken) > max_broken * total:
        raise InputError(
            f"{len(broken)} of {counted(total, 'annotation')} in {path} are broken, above the "
            f"limit of {max_broken:.2%}: repair or remove them, or raise --max_broken: {listed}"
        )
    if broken:
        _logger.warning("broken annotations in %s, left out: %s", path, listed)
