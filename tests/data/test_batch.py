"""What a worker returns, and that the device completes it as torchvision would."""

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, functional, v2

from tests.helpers.data import CPU, eval_loader, open_train, write_grays
from tests.helpers.jpegs import JPEGS, photo
from tests.helpers.training import MEAN, STD, HostReads
from util.data import batch
from util.data.batch import Box, Normalization, Sample, collate, denormalize, resize_crop
from util.data.decode import read_pixels
from util.data.transforms import eval_transform, pretrain_transform
from util.errors import RunError
from util.settings.views import PRETRAIN_VIEW, ViewSettings


@pytest.mark.parametrize("box", [(0, 0, 45, 67), (3, 11, 40, 30), (20, 0, 5, 60), (1, 2, 1, 1)])
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (90, 110)])
def test_the_pixels_of_a_box_are_pillows_up_to_rounding(box, size):
    image = photo()
    expected = functional.resized_crop(image, *box, list(size), InterpolationMode.BICUBIC)
    got = resize_crop(read_pixels(image), Box(*box), size)
    assert got.dtype == torch.uint8
    difference = np.asarray(expected).astype(int) - got.permute(1, 2, 0).numpy()
    assert np.abs(difference).mean() < 0.1
    assert np.abs(difference).max() <= 2


def test_resizing_as_a_gpu_does_differs_only_by_rounding():
    image = read_pixels(photo())[None]
    wanted = batch._resize(image, (24, 40)).int()
    difference = (batch._resize_in_float(image, (24, 40)) - wanted).abs()
    assert difference.max() <= 1  # the other also rounds between the two directions
    assert difference.float().mean() < 0.25


def test_flips_and_normalization_are_left_to_the_device_and_are_torchvisions():
    view = ViewSettings(vflip=0.5)
    transform = pretrain_transform((24, 32), MEAN, STD, view, num_crops=6)
    image = photo()
    crops = transform(read_pixels(image), "test", 1)
    assert {True, False} == set(crops.flips) == set(crops.vertical_flips)
    batch = collate([Sample(crops, label=3, broken=[("a", "b")])])
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    images, labels = batch.to(CPU)
    assert labels.tolist() == [3] * 6
    assert batch.broken == [("a", "b")]
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    flips = zip(crops.flips, crops.vertical_flips, strict=True)
    for got, pixels, (flip, vertical) in zip(images, crops.pixels, flips, strict=True):
        pixels = pixels.flip(2) if flip else pixels
        assert torch.equal(got, normalize(pixels.flip(1) if vertical else pixels))


def test_completing_a_batch_reads_nothing_from_the_device(monkeypatch):
    batch = batches_of("cpu", 3, ViewSettings(vflip=0.5))
    assert batch.flips is not None and batch.vertical_flips is not None
    with monkeypatch.context() as patch, HostReads(patch) as reads:
        batch.to(CPU)
    assert reads.found == []


def test_every_value_is_normalized_as_torchvision_does_bit_for_bit():
    values = torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 256)
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])(values)
    assert torch.equal(Normalization(MEAN, STD)(values), expected)


# Decoding on the device, here the CPU


def batches_of(decode, num_crops=1, view=PRETRAIN_VIEW):
    options = {"num_crops": num_crops, "decode": decode}
    transform = pretrain_transform((24, 32), MEAN, STD, view, **options)
    cases = ["usual", "EXIF 6", "gray", "CMYK", "usual", "with a tail"]
    samples = []
    for index, case in enumerate(cases):
        crops = transform(transform.read(JPEGS[case]()), "test", index)
        samples.append(Sample(crops, label=index, broken=[]))
    return collate(samples)


@pytest.mark.parametrize("num_crops", [1, 3])
@pytest.mark.parametrize("vflip", [0, 0.5])
def test_decoding_on_the_device_gives_the_batch_that_workers_decode(num_crops, vflip):
    view = ViewSettings(vflip=vflip)
    later, now = (batches_of(decode, num_crops, view) for decode in ("gpu", "cpu"))
    assert len(later.encoded.lengths) == 3  # the plain ones with an end marker
    assert len(later.images) == 3 * num_crops
    for got, expected in zip(later.to(CPU), now.to(CPU), strict=True):
        assert torch.equal(got, expected)


def test_crops_with_and_without_vertical_flips_share_a_batch():
    image, never = read_pixels(photo()), eval_transform((24, 32), MEAN, STD)
    always = pretrain_transform((24, 32), MEAN, STD, ViewSettings(hflip=0.0, vflip=1.0))
    crops = [transform(image, "test") for transform in (never, always)]
    images, _ = collate([Sample(own, None, []) for own in crops]).to(CPU)
    pixels = torch.stack([crops[0].pixels[0], crops[1].pixels[0].flip(1)])
    assert torch.equal(images, Normalization(MEAN, STD)(pixels))


@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_a_batch_in_which_an_image_has_no_label_has_none(decode):
    transform = pretrain_transform((24, 32), MEAN, STD, num_crops=2, decode=decode)
    crops = transform(transform.read(JPEGS["usual"]()), "test")
    labeled, partly = (collate([Sample(crops, n, []) for n in ns]) for ns in ((1, 0), (1, None)))
    assert labeled.labels.tolist() == [1, 1, 0, 0]
    assert labeled.num_images == partly.num_images == 4
    images, labels = partly.to(CPU)
    assert labels is partly.labels is None
    assert torch.equal(images, labeled.to(CPU)[0])
    assert partly.copied(CPU).labels is None
    assert torch.equal(partly.raw(CPU).pixels, labeled.raw(CPU).pixels)


@pytest.mark.parametrize("case", ["usual", "CMYK"])
def test_a_batch_of_one_kind_is_decoded_too(case):
    transform = pretrain_transform((24, 32), MEAN, STD, decode="gpu")
    crops = transform(transform.read(JPEGS[case]()), "test")
    batch = collate([Sample(crops, label=0, broken=[])] * 2)
    assert (batch.encoded is None) == (case == "CMYK")
    plain = pretrain_transform((24, 32), MEAN, STD)
    expected = collate([Sample(plain(plain.read(JPEGS[case]()), "test"), 0, [])] * 2)
    assert torch.equal(batch.to(CPU)[0], expected.to(CPU)[0])


@pytest.mark.faults
def test_a_device_that_cannot_decode_a_file_says_so_in_one_sentence():
    batch = batches_of("gpu")
    files = batch.encoded.files.clone()
    files[2:200] = 0
    with pytest.raises(RunError, match="use --decode cpu") as caught:
        batch._replace(encoded=batch.encoded._replace(files=files)).to(CPU)
    assert "\n" not in str(caught.value)


def test_denormalize_does_not_clip():
    assert denormalize(torch.full((1, 3, 2, 2), 9.0), MEAN, STD).min() > 1


def test_a_batch_has_the_documented_types(tmp_path):
    write_grays(tmp_path / "cat", [1, 2, 3])
    (batch,) = eval_loader(open_train("", tmp_path))
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.to(CPU)[0].dtype == torch.float32
    assert batch.labels.dtype == torch.int64
    assert batch.broken == []
