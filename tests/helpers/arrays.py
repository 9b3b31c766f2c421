"""Small sets of images that are not 8-bit RGB, of two classes."""

import numpy as np
import tifffile
from PIL import Image

CLASSES = ("dark", "light")


def bands(rng, brightness, size=20):
    """Five bands of 12 bits in uint16, (h, w, 5): gradients and noise."""
    ramp = np.linspace(0, 900, size)[:, None, None] * np.arange(1, 6)
    noise = rng.integers(0, 400, (size, size, 5))
    return (ramp * brightness + noise).clip(0, 4095).astype(np.uint16)


def write_tiff(path, values):
    tifffile.imwrite(path.with_suffix(".tif"), values, photometric="minisblack", planarconfig=1)


def write_npy(path, values):
    """Write the first band as an array (h, w) of numbers from -1 to 1."""
    np.save(path.with_suffix(".npy"), values[..., 0].astype(np.float32) / 2048 - 1)


def write_gray_png(path, values):
    """Write the first band as gray of 16 bits, of which it fills 12."""
    Image.fromarray(values[..., 0]).save(path.with_suffix(".png"))


def rewrite_in_bands(images, write):
    """Replace the PNGs below a folder by files of five bands, the first three from its colors.

    Args:
        write: takes a path without suffix and bands (h, w, 5).
    """
    for path in sorted(images.rglob("*.png")):
        colors = np.asarray(Image.open(path)).astype(np.uint16) * 16  # 12 bits
        others = np.stack((colors.sum(axis=2) // 3, np.full(colors.shape[:2], 7)), axis=2)
        write(path, np.concatenate((colors, others), axis=2).astype(np.uint16))
        path.unlink()


def write_set(folder, write, num_train=12, num_val=4, size=20):
    """Write class folders; `write` takes a path without suffix and bands (h, w, 5)."""
    rng = np.random.default_rng(0)
    for split, count in (("train", num_train), ("val", num_val)):
        for brightness, name in enumerate(CLASSES):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count):
                write(place / f"{number:03d}", bands(rng, 0.3 + 0.5 * brightness, size))
    return folder
