"""Sources that timm lacks or reads differently: the digits, iNaturalist 2019, packed images."""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from util.data.broken_images import reason_of
from util.data.decode import to_rgb
from util.data.packed import PackedImages
from util.errors import InputError
from util.json_text import parse_json


class Digits(Dataset):
    """scikit-learn's 1,797 digits, 8x8 resized to 32x32 RGB; every fifth is for validation."""

    classes = tuple("0123456789")

    def __init__(self, split: Literal["train", "validation"]) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        chosen = (np.arange(len(labels)) % 5 == 0) == (split == "validation")
        gray = np.round(pixels[chosen] * (255 / 16)).astype(np.uint8)  # scikit-learn's maximum: 16
        self.images = gray.reshape(-1, 8, 8)
        self.labels = labels[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[index])
        return to_rgb(image.resize((32, 32), Image.Resampling.BICUBIC)), self.labels[index]


class INat2019(Dataset):
    """iNaturalist 2019 as published: images, and lists of them in JSON (COCO style).

    Classes are the categories in the order of their ids, under their names, or under their ids if
    an anonymized list has no names.

    Args:
        root: folder of `train2019.json`, `val2019.json` and the images.

    Raises:
        InputError: the list is missing or malformed, or an image has zero or several annotations.
    """

    def __init__(self, root: str | Path, split: Literal["train", "validation"]) -> None:
        path = Path(root, {"train": "train2019.json", "validation": "val2019.json"}[split])
        try:
            content = parse_json(path.read_bytes())
            names = {category["id"]: category.get("name") for category in content["categories"]}
            files = {image["id"]: image["file_name"] for image in content["images"]}
            pairs = [(entry["image_id"], entry["category_id"]) for entry in content["annotations"]]
            ids = sorted(names)
            label_of_id = {category: label for label, category in enumerate(ids)}
            categories = dict(pairs)
            labels = {image: label_of_id[category] for image, category in categories.items()}
            samples = [(str(Path(root, file)), labels.get(image)) for image, file in files.items()]
        except FileNotFoundError as error:
            raise InputError(
                f"{path} does not exist: set --data_path to the folder of train2019.json, "
                "val2019.json and train_val2019/"
            ) from error
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} is not a list of iNaturalist 2019: download it again ({reason_of(error)})"
            ) from error
        sizes = len(names), len(files)
        if not samples or sizes != (len(content["categories"]), len(content["images"])):
            raise InputError(f"{path} has no images or repeats an id: download it again")
        if len(categories) != len(pairs) or set(categories) != set(files):
            raise InputError(
                f"{path} needs exactly one annotation for each of its {len(files)} images, but has "
                f"{len(pairs)} for {len(categories)} images: download it again"
            )
        self.samples = samples  # (path, label)
        self.classes = tuple(str(names[i] if all(names.values()) else i) for i in ids)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return Path(path).open("rb"), label


class Source(NamedTuple):
    """A source that this project reads instead of timm."""

    open: Callable[[str, str], Dataset]
    """(--data_path, "train" or "validation") -> a dataset of (image or its file, label)."""
    advice: str
    """What to do if it cannot be opened."""
    from_files: bool = True
    """Whether --data_path is required."""


OWN_SOURCES = {
    "packed": Source(lambda root, _: PackedImages(root), "prepare the images again"),
    "digits": Source(lambda _, split: Digits(split), "install the requirements", from_files=False),
    "inat2019": Source(INat2019, "download it again"),
}
