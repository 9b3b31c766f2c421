"""Small folders of images, and helpers to compare files."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
from PIL import Image


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
