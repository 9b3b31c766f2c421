"""Several crops per image: what the loader counts, and that they stay together."""

import pytest
import torch

from tests.helpers.data import open_shards, write_shards
from tests.helpers.files import write_images
from util.data.batch import Normalization
from util.data.datasets import build_dataset
from util.data.images import IndexedImages
from util.data.loaders import build_eval_loader, build_train_loader, image_bytes
from util.data.transforms import eval_transform, pretrain_transform
from util.errors import InputError

CPU = torch.device("cpu")
PLAIN = Normalization((0.0,) * 3, (1.0,) * 3)
SPLITS = [(6, 1, 1), (6, 2, 1), (3, 1, 2), (6, 2, 3), (3, 1, 9)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 7)


def dataset_of(images, num_crops=3, **options):
    transform = pretrain_transform((8, 8), PLAIN.mean, PLAIN.std, num_crops=num_crops, **options)
    return build_dataset("folder", images, split="train", transform=transform, seed=0)


def loader_of(dataset, batch_size=6, accum_iter=1, rank=0, world_size=1, num_workers=0):
    place = {"rank": rank, "world_size": world_size, "seed": 0}
    workers = {"num_workers": num_workers, "pin_memory": False}
    sizes = {"batch_size": batch_size, "accum_iter": accum_iter}
    return build_train_loader(dataset, **sizes, **place, **workers)


def crops_of(steps):
    """Return every crop of an epoch as bytes."""
    batches = [batch.to(CPU)[0] for step in steps for batch in step]
    return [crop.numpy().tobytes() for images in batches for crop in images]


@pytest.mark.parametrize(("batch_size", "accum_iter", "world_size"), SPLITS)
def test_the_loader_counts_crops(images, batch_size, accum_iter, world_size):
    ranks = [
        loader_of(dataset_of(images), batch_size, accum_iter, rank, world_size)
        for rank in range(world_size)
    ]
    effective = batch_size * accum_iter * world_size
    assert {loader.effective_batch_size for loader in ranks} == {effective}
    assert {loader.steps_per_epoch for loader in ranks} == {-(-21 // effective)}
    epochs = [list(loader.steps(0)) for loader in ranks]
    for step in range(ranks[0].steps_per_epoch):
        size = min(effective, 21 - step * effective)  # the last one is smaller
        assert {loader.images_in_step(step) for loader in ranks} == {size}
        sizes = [batch.num_images for epoch in epochs for batch in epoch[step]]
        stand_ins = 3 * max(0, world_size - size // 3)
        assert sum(sizes) == size + stand_ins
        assert max(sizes) <= batch_size


def test_an_images_crops_are_side_by_side_and_the_first_is_what_it_was(images):
    several, one = (crops_of(loader_of(dataset_of(images, n)).steps(2)) for n in (3, 1))
    assert len(several) == 21
    assert len(set(several)) > 15
    assert several[::3] == one


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_a_restart_within_an_epoch_gives_the_remaining_crops(images, num_workers, decode):
    expected = crops_of(loader_of(dataset_of(images)).steps(3))
    dataset = dataset_of(images, decode=decode)
    assert crops_of(loader_of(dataset, num_workers=num_workers).steps(3, 2)) == expected[12:]


def test_processes_together_read_the_crops_that_one_reads(images):
    whole = loader_of(dataset_of(images), batch_size=6).steps(0)
    shares = [loader_of(dataset_of(images), 3, rank=r, world_size=2).steps(0) for r in range(2)]
    for step, *parts in zip(whole, *shares, strict=True):
        parts = [crops_of([part]) for part in parts]
        crops = crops_of([step])
        first, second = crops[:3], crops[3:] or crops[:3]  # a stand-in for the last
        assert parts == [first, second]


def test_a_batch_that_would_separate_an_images_crops_is_refused(images):
    with pytest.raises(
        InputError, match="--batch_size 8 must be a multiple of --repeated_aug 3"
    ) as caught:
        loader_of(dataset_of(images), batch_size=8)
    assert "\n" not in str(caught.value)


def test_a_stream_gives_several_crops_too(tmp_path):
    write_shards(tmp_path, [8, 6])
    transform = pretrain_transform((8, 8), PLAIN.mean, PLAIN.std, num_crops=2)
    loader = loader_of(open_shards(tmp_path, 14, transform=transform), batch_size=8)
    assert (loader.steps_per_epoch, loader.effective_batch_size) == (3, 8)  # drops two images
    assert [loader.images_in_step(step) for step in range(3)] == [8, 8, 8]
    crops = crops_of(loader.steps(1))
    assert len(crops) == 24
    assert crops[::2] == crops[1::2]  # each image has one color
    assert len(set(crops)) == 12


def test_a_source_of_arrays_is_read_too():
    pixels = torch.randint(256, (5, 20, 30, 3), dtype=torch.uint8)
    source = [(array, label) for label, array in enumerate(pixels.numpy())]
    dataset = IndexedImages(source, eval_transform((20, 30), PLAIN.mean, PLAIN.std), seed=0)
    loader = build_eval_loader(
        dataset, batch_size=5, rank=0, world_size=1, num_workers=0, device=CPU
    )
    ((images, labels),) = (batch.to(CPU) for batch in loader)
    assert torch.equal((images * 255).round().to(torch.uint8), pixels.permute(0, 3, 1, 2))
    assert labels.tolist() == [0, 1, 2, 3, 4]


def test_the_bytes_of_a_batch_are_known_before_it_is_read(images):
    dataset = dataset_of(images)
    (batch, *_) = build_eval_loader(dataset, batch_size=7, num_workers=0, device=CPU)
    assert batch.images.nbytes == 7 * image_bytes(dataset)
    assert image_bytes(dataset_of(images, decode="gpu")) == 0
