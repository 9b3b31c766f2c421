"""Images of any number of channels and type, from the file to the normalized batch."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiffs import tiff
from util.data.batch import Box, Crops, Normalization, Sample, collate, resize_crop
from util.data.damage import BrokenImageError
from util.data.decode import read_pixels
from util.data.transforms import RandomCrops, crop_of_resized, eval_transform, pretrain_transform
from util.data.values import OpenImage, open_values, read_values
from util.errors import InputError
from util.normalization import RGB8, PixelFormat
from util.patches import RawImages, gather_patches, normalize, scale_to_unit
from util.settings.views import ViewSettings

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (12, 10), np.uint16)
RGB = RNG.integers(0, 256, (12, 10, 3), np.uint8)
STILL = ViewSettings(hflip=0.0, crop_area=(1.0, 1.0))


def file_of(image, file_format="PNG", **options):
    """Return an open file of an array or a Pillow image."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, file_format, **options)
    file.seek(0)
    return file


def numpy_file(values):
    file = io.BytesIO()
    np.save(file, values)
    file.seek(0)
    return file


def values_of(file, channels, value_range=None, axes=None):
    """Return (h, w, C) as an array."""
    tensor = read_values(file, PixelFormat(channels, value_range, axes))
    return tensor.permute(1, 2, 0).numpy()


def test_without_channels_images_are_rgb8_as_ever():
    for image in (RGB, DEEP, Image.fromarray(RGB).convert("P"), RGB[:, :, 0]):
        assert torch.equal(read_values(file_of(image), RGB8), read_pixels(file_of(image)))


def test_gray_png_keeps_its_16_bits():
    assert (values_of(file_of(DEEP), 1)[:, :, 0] == DEEP).all()
    assert read_values(file_of(DEEP), PixelFormat(1)).dtype == torch.uint16


def test_color_png_keeps_its_16_bits():
    imagecodecs = pytest.importorskip("imagecodecs")
    for channels in (3, 4):
        deep = RNG.integers(0, 65536, (12, 10, channels), np.uint16)
        file = io.BytesIO(imagecodecs.png_encode(deep))
        assert (values_of(file, channels) == deep).all()


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "TIFF", "WEBP"])
def test_rgb_files_have_the_same_values_with_three_channels_as_without(file_format):
    file = file_of(RGB, file_format)
    expected = read_pixels(io.BytesIO(file.getvalue())).permute(1, 2, 0).numpy()
    assert (values_of(file, 3) == expected).all()


def test_what_loses_nothing_is_converted():
    gray, alpha = RGB[:, :, :1], RGB[:, :, 1]
    same = np.repeat(gray, 3, axis=2)
    assert (values_of(file_of(gray[:, :, 0]), 3) == gray).all()
    assert (values_of(file_of(same), 1) == gray).all()
    assert (values_of(file_of(np.dstack([RGB, alpha])), 3) == RGB).all()
    assert (values_of(file_of(np.dstack([RGB, alpha])), 4)[:, :, 3] == alpha).all()
    assert (values_of(file_of(np.dstack([same, alpha])), 1) == gray).all()
    palette = Image.fromarray(RGB).quantize(16)
    assert (values_of(file_of(palette), 3) == np.array(palette.convert("RGB"))).all()
    bits = Image.fromarray(DEEP > 30000)
    assert (values_of(file_of(bits), 1)[:, :, 0] == 255 * (DEEP > 30000)).all()


@pytest.mark.parametrize(
    ("file", "channels", "reason"),
    [
        (lambda: file_of(RGB), 1, r"it has 3 channels \(colors that differ\), but --channels is 1"),
        (lambda: file_of(RGB), 5, "it has 3 channels, but --channels is 5"),
        (lambda: file_of(DEEP), 2, "it has 1 channel, but --channels is 2"),
        (lambda: numpy_file(np.full((4, 4), np.nan, np.float32)), 1, "NaN or infinite values"),
        (lambda: io.BytesIO(b""), 1, "an empty file"),
    ],
)
def test_any_other_image_is_broken_and_says_why(file, channels, reason):
    with pytest.raises(BrokenImageError, match=reason):
        read_values(file(), PixelFormat(channels))


def test_colors_of_16_bits_that_would_be_read_with_8_are_broken_images():
    deep = RNG.integers(0, 65536, (12, 10, 3), np.uint16)
    ppm = b"P6 # a comment\n10 12\n65535\n" + deep.astype(">u2").tobytes()
    with pytest.raises(BrokenImageError, match="PPM with 16-bit colors, of which 8 would be read"):
        read_values(io.BytesIO(ppm), PixelFormat(3))
    imagecodecs = pytest.importorskip("imagecodecs")
    for number, codec in ((3, "JPEG 2000 with 16-bit colors"), (1, None)):
        file = io.BytesIO(
            imagecodecs.jpeg2k_encode(deep[:, :, :number], level=0, codecformat="jp2")
        )
        if codec is None:
            assert (values_of(file, 1) == deep[:, :, :1]).all()
            continue
        with pytest.raises(BrokenImageError, match=codec):
            read_values(file, PixelFormat(number))


def test_values_of_a_pgm_are_as_in_the_file_where_a_range_is_given():
    values = RNG.integers(0, 4096, (12, 10), np.uint16)
    for highest, dtype in ((4095, ">u2"), (200, "u1")):
        stored = values % (highest + 1)
        pgm = b"P5\n10 12\n%d\n" % highest + stored.astype(dtype).tobytes()
        assert (values_of(io.BytesIO(pgm), 1, (0, highest))[:, :, 0] == stored).all()
        full = 65535 if highest > 255 else 255
        scaled = values_of(io.BytesIO(pgm), 1)[:, :, 0]
        assert np.abs(scaled - stored * (full / highest)).max() <= 1


def test_images_are_upright_in_their_own_depth():
    exif = Image.Exif()
    exif[0x112] = 6
    turned = values_of(file_of(DEEP, exif=exif), 1)[:, :, 0]
    assert (turned == np.rot90(DEEP, -1)).all()


# From values to a batch


@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_a_batch_is_the_values_scaled_and_normalized_whatever_their_type(channels, dtype):
    values = (RNG.random((8, 8, channels)) * 200).astype(dtype)
    mean, std = [0.1 + 0.1 * c for c in range(channels)], [0.2] * channels
    pixels = PixelFormat(channels, (0, 200), "HWC")
    transform = eval_transform((8, 8), mean, std, pixels=pixels)
    image = transform.read(numpy_file(values))
    batch = collate([Sample(transform(image), None, [])])
    assert batch.images.dtype == torch.from_numpy(values).dtype
    expected = ((values.astype(np.float64) / 200 - mean) / std).transpose(2, 0, 1)
    assert np.abs(batch.to(CPU)[0][0].numpy() - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.uint8, 0, 255), (torch.uint16, 0, 65535), (torch.int16, -32768, 32767)],
)
def test_integers_have_the_range_of_their_type(dtype, low, high):
    scaled = scale_to_unit(torch.tensor([low, high]).to(dtype))
    assert torch.allclose(scaled, torch.tensor([0.0, 1.0]))


def test_flips_patches_and_masks_are_those_of_normalized_images_in_every_type():
    for dtype in (torch.uint8, torch.uint16, torch.int16, torch.float32):
        images = torch.from_numpy(DEEP[:8, :8].astype(np.int64) % 256).to(dtype).view(1, 1, 8, 8)
        crops = Crops([images[0]], [True], Normalization((0.2,), (0.5,)), vertical_flips=[True])
        batch = collate([Sample(crops, None, [])])
        whole = batch.to(CPU)[0]
        flipped = normalize(images, torch.tensor(0.2), torch.tensor(0.5)).flip(2, 3)
        assert torch.equal(whole, flipped)
        ids = torch.tensor([[3, 0]])
        raw = batch.raw(CPU)
        assert isinstance(raw, RawImages)
        assert torch.equal(gather_patches(raw, ids, 4), gather_patches(whole, ids, 4))


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_resizing_is_the_same_for_every_channel_and_type(channels):
    values = torch.from_numpy(RNG.integers(0, 256, (channels, 30, 26), np.uint8))
    box = Box(2, 3, 20, 22)
    eight = resize_crop(values, box, (12, 10))
    one_by_one = torch.cat([resize_crop(c[None], box, (12, 10)) for c in values])
    assert (eight.int() - one_by_one.int()).abs().max() <= 1
    for dtype in (torch.uint16, torch.int16, torch.float32):
        other = resize_crop(values.to(dtype), box, (12, 10)).double().clamp(0, 255)
        assert (eight.double() - other).abs().max() <= 1.01


def test_bicubic_overshoot_is_clipped_to_the_type():
    edge = torch.zeros(1, 16, 16, dtype=torch.int32)
    edge[:, :, 8:] = 65535
    resized = resize_crop(edge.to(torch.uint16), Box(0, 0, 16, 16), (37, 37)).int()
    assert (resized[0, 0].diff() >= 0).all() or resized.max() <= 65535
    assert resized.min() == 0 and resized.max() == 65535


def test_narrow_images_are_resized_in_their_own_type():
    values = torch.from_numpy(RNG.integers(0, 60000, (2, 4, 300)).astype(np.uint16))
    crop = crop_of_resized(values, (8, 600), Box(0, 200, 8, 8))
    assert crop.dtype == torch.uint16 and crop.shape == (2, 8, 8)
    whole = resize_crop(values, Box(0, 0, 4, 300), (8, 600))[:, :, 200:208]
    assert (crop.int() - whole.int()).abs().max() <= 2


def sample_of(values):
    normalization = Normalization((0.0,), (1.0,))
    return Sample(Crops([torch.from_numpy(values)[None]], [False], normalization), None, [])


def test_8_and_16_bits_in_one_batch_are_both_scaled_by_their_own_range():
    eight, sixteen = np.full((4, 4), 51, np.uint8), np.full((4, 4), 13107, np.uint16)
    images, _ = collate([sample_of(eight), sample_of(sixteen)]).to(CPU)
    assert torch.allclose(images, torch.full_like(images, 0.2))


def test_other_mixed_types_need_a_range():
    mixed = [sample_of(np.zeros((4, 4), np.uint8)), sample_of(np.zeros((4, 4), np.float32))]
    error = collate(mixed)
    assert isinstance(error, InputError)
    assert "different types (float32 and uint8): give --value_range" in str(error)


# Tiles


def scan(side=600):
    """Return an open TIFF whose pixels tell their place."""
    y, x = np.mgrid[:side, :side].astype(np.uint16)
    return io.BytesIO(tiff((x + 1000 * (y % 60), {})))


def test_a_tile_is_a_random_window_of_a_large_image_not_a_smaller_image():
    pixels = PixelFormat(1, (0, 1))
    whole = read_values(scan(), pixels).int()
    transform = pretrain_transform((16, 16), (0.0,), (1.0,), STILL, pixels=pixels, tile=16)
    tops = set()
    for seed in range(5):
        image = transform.read(scan())
        assert isinstance(image, OpenImage)
        crop = transform(image, seed).pixels[0].int()
        left = int(crop[0, 0, 0]) % 1000
        found = (whole[0, :, left : left + 16].unfold(0, 16, 1) == crop[0].T).all(dim=(1, 2))
        assert found.any()
        tops.add(left)
    assert len(tops) > 1


def test_crops_of_one_image_have_tiles_of_their_own():
    pixels = PixelFormat(1, (0, 1))
    options = {"pixels": pixels, "tile": 16, "num_crops": 3}
    transform = pretrain_transform((16, 16), (0.0,), (1.0,), STILL, **options)
    first, *others = transform(transform.read(scan()), 0).pixels
    assert not any(torch.equal(first.int(), other.int()) for other in others)


def test_evaluation_reads_the_tile_in_the_middle():
    pixels = PixelFormat(1, (0, 1))
    transform = eval_transform((16, 16), (0.0,), (1.0,), pixels=pixels, tile=16)
    crop = transform(transform.read(scan())).pixels[0].int()
    assert torch.equal(crop, read_values(scan(), pixels).int()[:, 292:308, 292:308])


def test_tiles_of_decoded_and_of_small_images_are_the_same_windows():
    large = RNG.integers(0, 256, (64, 48, 3), np.uint8)
    transform = pretrain_transform((16, 16), (0.0,) * 3, (1.0,) * 3, STILL, tile=16)
    lazy = transform(transform.read(file_of(large, "TIFF")), 1).pixels[0]
    whole = transform(transform.read(file_of(large, "PNG")), 1).pixels[0]
    assert torch.equal(lazy, whole)
    small = pretrain_transform((16, 16), (0.0,) * 3, (1.0,) * 3, STILL, tile=1000)
    plain = pretrain_transform((16, 16), (0.0,) * 3, (1.0,) * 3, STILL)
    boxes = [RandomCrops.draw(t, 64, 48, 7)[0] for t in (small, plain)]
    assert [b[2:] for b in boxes[0]] == [b[2:] for b in boxes[1]]


def test_a_window_that_cannot_be_read_is_a_broken_image():
    cut = io.BytesIO(scan().getvalue()[:-200])
    with pytest.raises(BrokenImageError):
        transform = pretrain_transform(
            (16, 16), (0.0,), (1.0,), STILL, pixels=PixelFormat(1), tile=600
        )
        transform(transform.read(cut), 0)


def test_open_values_closes_files_that_it_cannot_open():
    file = io.BytesIO(b"II*\0" + bytes(20))
    with pytest.raises(BrokenImageError):
        open_values(file, PixelFormat(1))
    assert file.closed
