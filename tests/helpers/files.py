"""Small folders of images and annotations, and helpers to compare files."""

import io
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
from faster_coco_eval.core import mask as rle
from PIL import Image


class CountingFile(io.BytesIO):
    """Counts the bytes that are read."""

    num_read = 0

    def read(self, size=-1):
        data = super().read(size)
        self.num_read += len(data)
        return data


class RunsCode:
    """Creates a folder when unpickled in the usual way."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_images(folder, num_images, size=20):
    """Write different images with some structure: a gradient, and noise a few pixels wide."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(num_images)
    ramp = np.linspace(0, 128, size).reshape(1, size, 1)
    for index in range(num_images):
        noise = Image.fromarray(random.integers(0, 128, (5, 5, 3), np.uint8))
        pixels = ramp + np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return folder


CLASSES = {"apple": 12, "bear": 12, "cup": 13}


def write_classes(folder):
    """Write class folders of 37 training images (5 steps of 8 per epoch) and 12 for validation."""
    for number, (name, num_images) in enumerate(CLASSES.items(), start=3):
        write_images(folder / "train" / name, num_images)
        write_images(folder / "val" / name, number)
    return folder


def files_in(folder):
    """Return the content of every file in a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def copied(folder, place):
    """Copy a folder for a test that changes it."""
    return Path(shutil.copytree(folder, place))


def write_masked_images(folder, num_train=9, num_val=3, size=(20, 24)):
    """Images of colored rectangles and masks of their classes, for main_segmentation.py.

    Class 0 is dark ground, 1 a red and 2 a green rectangle; the top row does not count.
    """
    rng = random.Random(0)
    for split, count in (("train", num_train), ("val", num_val)):
        for kind in ("images", "annotations"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            mask = Image.new("L", size[::-1])
            for label in (1, 2):
                left, top = rng.randrange(size[1] - 8), rng.randrange(size[0] - 8)
                mask.paste(label, (left, top, left + 8, top + 8))
            colors = np.array([(30, 30, 40), (200, 40, 40), (40, 180, 60)], dtype=np.uint8)
            pixels = colors[np.asarray(mask)]
            image = Image.fromarray(pixels)
            mask.paste(255, (0, 0, size[1], 1))
            image.save(folder / "images" / split / f"{number:03d}.png")
            mask.save(folder / "annotations" / split / f"{number:03d}.png")
    (folder / "classes.txt").write_text("0 ground\n1 red\n2 green\n255 nothing\n")
    return folder


COLORS = {3: (220, 40, 40), 7: (40, 180, 60)}  # of the objects of a category
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "box"}]  # not in order, with a gap


def write_coco(folder, num_train=6, num_val=4, size=(48, 64)):
    """Write images of red boxes and green discs on noise, and their annotations as COCO does.

    The first image of a split also has a crowd of discs along its top, the last has no objects.
    Every second image is upright.
    """
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", num_train), ("val", num_val)):
        (folder / split).mkdir()
        rng, images, objects = np.random.default_rng(count), [], []
        for number in range(count):
            height, width = size if number % 2 == 0 else size[::-1]
            pixels = rng.integers(0, 110, (height, width, 3), np.uint8)
            name = f"{number:03d}.png"
            images.append({"id": 10 + number, "file_name": name, "height": height, "width": width})
            for category, first_column in ((3, 0), (7, width // 2)):
                if number < count - 1:
                    polygon = _random_polygon(rng, category, first_column, (height, width))
                    objects.append(_coco_object(category, images[-1], polygon))
                    masks = rle.frPyObjects(objects[-1]["segmentation"], height, width)
                    pixels[rle.decode(rle.merge(masks)) > 0] = COLORS[category]
            if number == 0:
                pixels[:6] = COLORS[7]
                crowd = {"size": [height, width], "counts": [0, *[6, height - 6] * width]}
                objects.append(_coco_object(7, images[-1], [(0, 0), (width, 6)]))
                objects[-1] |= {"iscrowd": 1, "segmentation": crowd, "area": 6 * width}
            Image.fromarray(pixels).save(folder / split / name)
        numbered = [{"id": n, **own} for n, own in enumerate(objects)]
        content = {"images": images, "annotations": numbered, "categories": CATEGORIES}
        write_json(folder / "annotations" / f"instances_{split}.json", content)
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def _random_polygon(rng, category, first_column, size):
    """Corners of a box or of a disc, in the lower part of one half of an image."""
    side = int(rng.integers(12, 20))
    left = int(rng.integers(first_column, first_column + size[1] // 2 - side))
    top = int(rng.integers(10, size[0] - side))
    if category == 3:
        corners = ((0, 0), (1, 0), (1, 1), (0, 1))
        return [(left + side * x, top + side * y) for x, y in corners]
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    return [(left + side / 2 * (1 + np.cos(a)), top + side / 2 * (1 + np.sin(a))) for a in angles]


def _coco_object(category, image, polygon):
    x, y = np.array(polygon, dtype=float).T
    box = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    return {
        "image_id": image["id"],
        "category_id": category,
        "bbox": box,
        "segmentation": [np.array(polygon, dtype=float).ravel().tolist()],
        "area": area,
        "iscrowd": 0,
    }
