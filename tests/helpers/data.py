"""Images that can be told apart, in datasets of every layout, and loaders of them."""

import io
import tarfile

import numpy as np
import torch
from PIL import Image

from util.data.batch import collate
from util.data.datasets import build_dataset
from util.data.loaders import build_eval_loader, build_train_loader
from util.data.transforms import eval_transform, pretrain_transform

IDENTITY = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CPU = torch.device("cpu")
STILL = eval_transform((8, 8), *IDENTITY)
RANDOM = pretrain_transform((8, 8), *IDENTITY)
SEED = 5


def encoded(value, file_format="PNG", side=8):
    """Image file of one gray value, which identifies the image in a tensor."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value, value, value)).save(file, file_format)
    return file.getvalue()


def write_grays(folder, values, suffix=".png", file_format="PNG"):
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        (folder / f"{value:03d}{suffix}").write_bytes(encoded(value, file_format))


def write_noise(folder, num_images, num_classes=2):
    """Write images in which every crop differs."""
    pixels = np.random.default_rng(0).integers(0, 256, (num_images, 12, 12, 3), np.uint8)
    for index, image in enumerate(pixels):
        path = folder / f"class_{index % num_classes}" / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def open_train(name, path, transform=STILL, **options):
    return build_dataset(name, path, split="train", transform=transform, seed=SEED, **options)


def open_val_split(name, path, **options):
    return build_dataset(name, path, split="validation", transform=STILL, seed=SEED, **options)


def train_loader(dataset, **options):
    usual = {"batch_size": 2, "accum_iter": 1, "rank": 0, "world_size": 1, "seed": SEED}
    usual |= {"num_workers": 0, "pin_memory": False}
    return build_train_loader(dataset, **(usual | options))


def eval_loader(dataset, **options):
    usual = {"batch_size": 4, "rank": 0, "world_size": 1, "num_workers": 0, "device": CPU}
    return build_eval_loader(dataset, **(usual | options))


def values_of(batches):
    return [round(float(value) * 255) for b in batches for value in b.to(CPU)[0][:, 0, 0, 0]]


def all_values(dataset):
    return values_of(eval_loader(dataset))


def labels_of(batches):
    """The label of each image; None for all of a batch in which one has none."""
    labels = []
    for batch in batches:
        labels += [None] * batch.num_images if batch.labels is None else batch.labels.tolist()
    return labels


def all_labels(dataset):
    return labels_of(eval_loader(dataset))


def pixels_of(sample):
    return collate([sample]).to(CPU)[0]


def flat(steps):
    return [batch for step in steps for batch in step]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch.to(CPU)[0], other.to(CPU)[0])
        assert labels_of([batch]) == labels_of([other])
        assert batch.broken == other.broken


def write_parquet(folder, values, split="train", column="label"):
    import datasets

    features = {"image": datasets.Image(), column: datasets.ClassLabel(names=["a", "b", "c"])}
    images = [{"bytes": encoded(v) if v else b"broken", "path": None} for v in values]
    table = {"image": images, column: [v % 3 for v in values]}
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(table, datasets.Features(features)).to_parquet(
        folder / f"{split}-00000-of-00001.parquet"
    )


def write_shards(folder, sizes, labeled=True):
    """Write shards of numbered images; the numbers continue from shard to shard."""
    numbers = iter(range(1, 1 + sum(sizes)))
    for shard, size in enumerate(sizes):
        files = {}
        for number in [next(numbers) for _ in range(size)]:
            files[f"{number:03d}.png"] = encoded(number)
            if labeled:
                files[f"{number:03d}.cls"] = str(number % 3).encode()
        write_tar(folder / f"train-{shard}.tar", files)


def open_shards(folder, num_samples, pattern="train-{0..1}.tar", transform=STILL):
    return open_train(f"wds/{pattern}", folder, transform, num_samples=num_samples)
