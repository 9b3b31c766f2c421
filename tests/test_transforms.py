import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from util.data import transforms
from util.data.batch import Sample, collate, denormalize
from util.data.images import IndexedImages
from util.data.loaders import build_train_loader
from util.data.transforms import (
    default_crop_share,
    draw_box,
    eval_transform,
    finetune_transform,
    pretrain_transform,
    probe_transform,
    read_pixels,
    read_rgb,
    to_rgb,
)
from util.errors import InputError

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
IDENTITY = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
ORIENTATION = 0x0112

COLOURS = np.array([[[250, 10, 20], [30, 240, 50]], [[60, 70, 230], [0, 255, 128]]], np.uint8)
GREY = np.array([[0, 7], [128, 255]], np.uint8)
GREY_AS_RGB = np.stack([GREY] * 3, axis=-1)
RAMP_16 = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
RAMP_16_AS_RGB = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=-1)

# What each EXIF orientation asks of a viewer.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


def file_of(image, file_format, **options):
    """The image as an open file."""
    file = io.BytesIO()
    image.save(file, file_format, **options)
    file.seek(0)
    return file


def in_file(image, file_format, **options):
    """The image as a file that has been written and opened again."""
    return Image.open(file_of(image, file_format, **options))


def prepared(transform, image, *place):
    """What a model gets of a Pillow image: (K, 3, H, W)."""
    crops = transform(transform.read(image.copy()), "test", *place)
    return collate([Sample(crops, label=-1, broken=[])]).to(CPU)[0]


def upright_pixels(file):
    """The pixels of a file by Pillow alone, as a uint8 tensor (3, h, w)."""
    image = to_rgb(Image.open(io.BytesIO(file.getvalue())))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def palette_image(transparency=None):
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8))
    image = image.convert("P")
    image.putdata([0, 1, 2, 3])
    image.putpalette(COLOURS.reshape(-1).tolist())
    options = {} if transparency is None else {"transparency": transparency}
    return in_file(image, "PNG", **options)


def with_alpha(array):
    alpha = np.array([[0, 85], [170, 255]], np.uint8)[..., None]
    return np.concatenate([array if array.ndim == 3 else array[..., None], alpha], axis=-1)


# The ink of each pixel: all of cyan, half of magenta, nothing, only black.
CMYK = np.array([[[255, 0, 0, 0], [0, 128, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
CMYK_AS_RGB = np.array([[[0, 255, 255], [255, 127, 255]], [[255, 255, 255], [0, 0, 0]]], np.uint8)

MODES = {
    "RGB": (lambda: in_file(Image.fromarray(COLOURS), "PNG"), "RGB", COLOURS),
    "grey": (lambda: in_file(Image.fromarray(GREY), "PNG"), "L", GREY_AS_RGB),
    "grey+alpha": (
        lambda: in_file(Image.fromarray(with_alpha(GREY), "LA"), "PNG"),
        "LA",
        GREY_AS_RGB,
    ),
    "RGB+alpha": (lambda: in_file(Image.fromarray(with_alpha(COLOURS)), "PNG"), "RGBA", COLOURS),
    "black and white": (
        lambda: in_file(Image.fromarray(GREY > 100), "PNG"),
        "1",
        np.where(GREY_AS_RGB > 100, 255, 0),
    ),
    "CMYK": (lambda: in_file(Image.fromarray(CMYK, "CMYK"), "TIFF"), "CMYK", CMYK_AS_RGB),
    "palette": (palette_image, "P", COLOURS),
    "palette, one transparent": (lambda: palette_image(2), "P", COLOURS),
    "palette, each transparent": (lambda: palette_image(bytes([0, 85, 170, 255])), "P", COLOURS),
    "16-bit PNG": (lambda: in_file(Image.fromarray(RAMP_16), "PNG"), "I;16", RAMP_16_AS_RGB),
    "16-bit TIFF": (lambda: in_file(Image.fromarray(RAMP_16), "TIFF"), "I;16", RAMP_16_AS_RGB),
    "16-bit TIFF, big-endian": (
        lambda: in_file(Image.fromarray(RAMP_16.astype(">u2")), "TIFF"),
        "I;16B",
        RAMP_16_AS_RGB,
    ),
    "mode I": (
        lambda: in_file(Image.fromarray(RAMP_16.astype(np.int32)), "TIFF"),
        "I",
        RAMP_16_AS_RGB,
    ),
}


@pytest.mark.parametrize("case", MODES)
@pytest.mark.filterwarnings("error")
def test_every_image_mode_reads_as_exactly_known_rgb(case):
    build, mode, expected = MODES[case]
    image = build()
    assert image.mode == mode  # else the case tests nothing
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(rgb), expected)
    np.testing.assert_array_equal(read_pixels(build()).permute(1, 2, 0), expected)


def test_cmyk_jpeg_has_its_colours():
    inks = np.broadcast_to(np.array([255, 0, 0, 0], np.uint8), (16, 16, 4))
    rgb = to_rgb(in_file(Image.fromarray(inks, "CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(np.asarray(rgb)[8, 8], [0, 255, 255], atol=3)


def test_16_bit_is_rounded_not_clipped():
    grey = np.array([[0, 128, 129, 255, 256, 40000, 65535]], np.uint16)
    rgb = np.asarray(to_rgb(in_file(Image.fromarray(grey), "PNG")))
    np.testing.assert_array_equal(rgb[0, :, 0], np.round(grey[0] / 257))


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("file_format", "is_16_bit"), [("PNG", 0), ("PNG", 1), ("TIFF", 0)])
def test_exif_orientation_is_applied(orientation, file_format, is_16_bit):
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.fromarray(stored.astype(np.uint16) * 257 if is_16_bit else stored)
    rgb = to_rgb(in_file(image, file_format, exif=exif))
    expected = UPRIGHT[orientation](stored)
    np.testing.assert_array_equal(np.asarray(rgb), np.stack([expected] * 3, axis=-1))


def test_an_animation_reads_as_its_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    image = in_file(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.asarray(to_rgb(image))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "pixels",
    [np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32), -np.eye(2, dtype="i4")],
)
def test_pixels_of_unknown_range_are_refused(pixels):
    with pytest.raises(ValueError, match=r"floating-point|outside 0\.\.65535"):
        to_rgb(in_file(Image.fromarray(pixels), "TIFF"))


def test_read_rgb_closes_the_file(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "image.png")
    file = (tmp_path / "image.png").open("rb")
    image = read_rgb(file)
    assert file.closed
    np.testing.assert_array_equal(np.asarray(image), COLOURS)


# Reading pixels


def photo(width=67, height=45):
    """Something like a photograph: smooth, with some noise."""
    rng = np.random.default_rng(width)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype("u1"))


def exif(orientation):
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def padded(file):
    """A JPEG file with bytes in front of its first segment that readers pass over."""
    data = file.getvalue()
    return io.BytesIO(data[:2] + b"\xff\xff" + data[2:])


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
JPEGS = {
    "usual": lambda: file_of(photo(), "JPEG", quality=95),
    "progressive": lambda: file_of(photo(), "JPEG", progressive=True),
    "without subsampling": lambda: file_of(photo(), "JPEG", subsampling=0),
    "RGB inside": lambda: file_of(photo(), "JPEG", keep_rgb=True),
    "grey": lambda: file_of(photo().convert("L"), "JPEG"),
    "CMYK": lambda: file_of(photo().convert("CMYK"), "JPEG"),
    "comment and profile": lambda: file_of(photo(), "JPEG", comment=b"no", icc_profile=b"i" * 999),
    **{f"EXIF {n}": lambda n=n: file_of(photo(), "JPEG", exif=exif(n)) for n in UPRIGHT},
    "EXIF behind padding": lambda: padded(JPEGS["EXIF 6"]()),
    "XMP": lambda: file_of(photo(), "JPEG", xmp=XMP),
    "two pictures": lambda: file_of(photo(), "MPO", save_all=True, append_images=[photo(9)]),
    "tiny": lambda: file_of(photo(1, 1), "JPEG"),
    "with a tail": lambda: io.BytesIO(file_of(photo(), "JPEG").getvalue() + b"tail"),
}
FAST = {"usual", "progressive", "without subsampling", "RGB inside", "grey", "comment and profile"}
FAST |= {"EXIF 1", "two pictures", "tiny", "with a tail"}


@pytest.mark.parametrize("case", JPEGS)
def test_jpegs_read_as_pillow_reads_them(case):
    file = JPEGS[case]()
    expected = upright_pixels(file)
    assert isinstance(transforms.read_record(io.BytesIO(file.getvalue())), transforms.Jpeg) == (
        case in FAST
    )
    pixels = read_pixels(file)
    assert file.closed
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, expected)
    record = {"bytes": upright_file(expected), "path": None}
    assert torch.equal(read_pixels(record), expected)


def upright_file(pixels):
    """The bytes of a PNG file."""
    return file_of(Image.fromarray(pixels.permute(1, 2, 0).numpy()), "PNG").getvalue()


def test_pixels_in_memory_are_taken_as_they_are():
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    for record in (array, Image.fromarray(array)):
        assert torch.equal(read_pixels(record), torch.from_numpy(array).permute(2, 0, 1))
    np.testing.assert_array_equal(np.asarray(read_rgb(array)), array)


@pytest.mark.filterwarnings("error")
def test_pixels_that_must_not_be_written_are_copied():
    array = np.zeros((5, 7, 3), np.uint8)
    array.flags.writeable = False
    read_pixels(array).fill_(1)
    assert not array.any()


@pytest.mark.faults
@pytest.mark.parametrize("decode", ["cpu", "gpu"])
def test_a_jpeg_that_was_cut_off_anywhere_is_broken(decode):
    transform = pretrain_transform((8, 8), *IDENTITY, decode=decode)
    data = file_of(photo(200, 150), "JPEG").getvalue()
    for length in [0, 1, 2, 3, 12, *range(20, len(data) - 200, 97)]:
        with pytest.raises((OSError, SyntaxError)):
            transform.read(io.BytesIO(data[:length]))


@pytest.mark.faults
def test_damaged_jpegs_are_broken_or_read_as_by_pillow():
    rng = np.random.default_rng(0)
    data = np.frombuffer(file_of(photo(), "JPEG").getvalue(), np.uint8)
    num_read = 0
    for _ in range(200):
        damaged = data.copy()
        damaged[rng.integers(2, len(data), 3)] = rng.integers(0, 256, 3)
        try:
            expected = upright_pixels(io.BytesIO(damaged.tobytes()))
        except Exception:
            continue
        num_read += 1
        assert torch.equal(read_pixels(io.BytesIO(damaged.tobytes())), expected)
    assert num_read > 20


def test_an_image_of_too_many_pixels_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(transforms, "SURELY_NO_BOMB", 1000)
    with pytest.raises(Image.DecompressionBombError):
        read_pixels(JPEGS["usual"]())


# Random crops


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 64), (100, 180)])
@pytest.mark.parametrize("min_area", [0.2, 0.08])
def test_boxes_are_distributed_as_torchvisions(size, min_area):
    rng, image = random.Random(0), torch.empty(3, *size)
    ours = np.array([draw_box(rng, *size, min_area) for _ in range(4000)])
    arguments = image, [min_area, 1.0], [3 / 4, 4 / 3]
    theirs = np.array([v1.RandomResizedCrop.get_params(*arguments) for _ in range(4000)])
    for boxes in (ours, theirs):
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= size).all()
    for measure in (
        *(lambda b, i=i: b[:, i] for i in range(4)),
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
    ):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 7), (7, 1), (1, 1), (3, 200)])
def test_the_box_of_an_extreme_image_is_torchvisions(size):
    arguments = torch.empty(3, *size), [0.9, 1.0], [3 / 4, 4 / 3]
    theirs = {v1.RandomResizedCrop.get_params(*arguments) for _ in range(50)}
    ours = {tuple(draw_box(random.Random(seed), *size, 0.9)) for seed in range(50)}
    assert ours == theirs


def test_crops_follow_from_the_place_and_the_first_ones_stay_with_more():
    few, many = (pretrain_transform((16, 16), *IDENTITY, num_crops=n) for n in (2, 5))
    first = few.draw(45, 67, 0, 1, 2)
    assert first == few.draw(45, 67, 0, 1, 2) == tuple(x[:2] for x in many.draw(45, 67, 0, 1, 2))
    assert first != few.draw(45, 67, 0, 1, 3)
    boxes, flips = pretrain_transform((16, 16), *IDENTITY, num_crops=1000).draw(45, 67, 0)
    assert len(set(boxes)) > 900
    assert 430 < sum(flips) < 570


# What transforms make of images


def coordinates_image(side=256):
    """Red is the column, green the row, so that a crop shows where it was cut."""
    rows, columns = np.mgrid[:side, :side].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1))


def finetune(size=(32, 48), normalization=IDENTITY, **options):
    plain = {"auto_augment": None, "color_jitter": None}
    plain |= {"erase_prob": 0.0, "erase_mode": "pixel", "erase_count": 1}
    return finetune_transform(size, *normalization, **(plain | options))


@pytest.mark.parametrize(
    ("build", "min_area"),
    [
        (lambda: pretrain_transform((32, 48), *IDENTITY), 0.2),
        (lambda: probe_transform((32, 48), *IDENTITY), 0.08),
        (finetune, 0.08),
    ],
)
def test_crops_of_a_share_of_the_area_to_all_of_it_and_half_of_them_flipped(build, min_area):
    image, transform = coordinates_image(), build()
    crops = torch.cat([prepared(transform, image, index) for index in range(400)])
    assert crops.shape == (400, 3, 32, 48)
    assert crops.dtype == torch.float32
    assert type(crops[0]) is torch.Tensor
    width = (crops[:, 0, 16, -2] - crops[:, 0, 16, 1]) * (48 / 45) * 255 / 256
    height = (crops[:, 1, -2, 24] - crops[:, 1, 1, 24]) * (32 / 29) * 255 / 256
    area = width.abs() * height
    assert 0.8 * min_area < area.min() < 1.5 * min_area
    assert area.max() < 1.02
    assert area.max() - area.min() > 0.7
    assert 0.4 < (width < 0).float().mean() < 0.6


@pytest.mark.parametrize(
    "build",
    [pretrain_transform, probe_transform, eval_transform, lambda size, *n: finetune(size, n)],
)
def test_resizing_is_antialiased(build):
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    tensor = prepared(build((16, 16), *IDENTITY), Image.fromarray(stripes))
    assert (tensor - 0.5).abs().max() < 0.1


def test_eval_transform_equals_torchvisions_for_squares():
    torch.manual_seed(0)
    usual = v2.Compose(
        [
            v2.Resize(256, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(224),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    ours = eval_transform((224, 224), MEAN, STD, crop_share=224 / 256)
    for width, height in ((300, 500), (640, 333), (256, 256), (50, 40)):
        noise = torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy()
        image = Image.fromarray(noise)
        # Resized in uint8 by torch and not by Pillow, whose rounding is another.
        difference = (prepared(ours, image)[0] - usual(image)) * torch.tensor(STD).view(3, 1, 1)
        assert 255 * difference.abs().mean() < 0.1
        assert 255 * difference.abs().max() < 2.5


@pytest.mark.parametrize("image_size", [(400, 100), (100, 400), (256, 256), (7, 5)])
def test_eval_transform_cuts_the_centre_without_padding(image_size):
    image = Image.new("RGB", image_size, "white")
    (tensor,) = prepared(eval_transform((32, 64), *IDENTITY, crop_share=0.8), image)
    assert tensor.shape == (3, 32, 64)
    assert (tensor == 1).all()


def test_eval_transform_keeps_the_aspect_ratio_and_the_middle():
    (tensor,) = prepared(eval_transform((64, 128), *IDENTITY), coordinates_image())
    assert tensor[1, 0, 0] * 255 == pytest.approx(64, abs=2)  # rows 64 to 192 of 256
    assert tensor[1, -1, 0] * 255 == pytest.approx(191, abs=2)
    assert tensor[0, 0, -1] * 255 == pytest.approx(254, abs=2)


@pytest.mark.parametrize(
    ("size", "share"),
    [((224, 224), 0.875), ((32, 32), 0.875), ((225, 225), 1), ((192, 384), 1), ((384, 384), 1)],
)
def test_small_images_are_cut_out_of_larger_ones(size, share):
    assert default_crop_share(size) == share


def test_crop_share_above_one_is_refused():
    with pytest.raises(ValueError, match="crop_share"):
        eval_transform((32, 32), MEAN, STD, crop_share=1.1)


def test_normalised_with_mean_and_std_and_back():
    image = Image.new("RGB", (8, 8), (255, 0, 51))
    (tensor,) = prepared(eval_transform((4, 4), MEAN, STD), image)
    expected = torch.tensor([(1 - 0.5) / 0.2, -0.4 / 0.25, (0.2 - 0.3) / 0.3])
    torch.testing.assert_close(tensor[:, 0, 0], expected)
    colours = denormalize(tensor[None], MEAN, STD)[0, :, 0, 0]
    torch.testing.assert_close(colours, torch.tensor([1.0, 0.0, 0.2]))


# Augmentation of fine-tuning

STRONG = {"auto_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.5}


class Noise:
    """Eight images with labels, whose every crop differs."""

    classes = ("a", "b")

    def __init__(self):
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
        self.images = [Image.fromarray(p).resize((40, 50)) for p in pixels]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.images[index].copy(), index % 2


def epoch_of(transform, epoch, num_workers=0):
    """The images of an epoch, by their index."""
    options = {"batch_size": 8, "accum_iter": 1, "rank": 0, "world_size": 1, "seed": 3}
    dataset = IndexedImages(Noise(), transform, seed=3)
    loader = build_train_loader(dataset, num_workers=num_workers, pin_memory=False, **options)
    return torch.cat([batch.to(CPU)[0] for step in loader.steps(epoch) for batch in step])


@pytest.mark.parametrize(
    "options",
    [
        STRONG,
        STRONG | {"erase_prob": 1.0, "erase_count": 3, "erase_mode": "rand"},
        {"color_jitter": 0.4},
        {"auto_augment": "augmix-m5-w4-d2-mstd1"},
        {"auto_augment": "rand-m9-n3-p0.5-mmax10-tweights"},
        {"auto_augment": "original-mstd0.5"},
        {"auto_augment": "3a", "color_jitter": 0.3},
    ],
)
def test_finetune_images_follow_from_seed_epoch_and_index(options):
    transform = finetune((32, 32), (MEAN, STD), **options)
    first = epoch_of(transform, epoch=1)
    random.seed(9)
    np.random.seed(9)  # noqa: NPY002
    torch.manual_seed(9)
    again = finetune((32, 32), (MEAN, STD), **options)
    assert torch.equal(epoch_of(again, epoch=1), first)
    assert torch.equal(epoch_of(again, epoch=1, num_workers=1), first)
    dataset = IndexedImages(Noise(), transform, seed=3)
    pairs = [(dataset[1, index].crops.pixels, dataset[2, index].crops.pixels) for index in range(8)]
    assert not any(torch.equal(*first, *second) for first, second in pairs)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (224, 160)])
def test_finetune_images_are_normalised_float32(size):
    transform = finetune(size, (MEAN, STD), **STRONG)
    ((image,), *_) = transform(coordinates_image(), "test")
    assert type(image) is torch.Tensor
    assert (image.shape, image.dtype) == ((3, *size), torch.float32)
    (white,) = prepared(finetune(size, (MEAN, STD)), Image.new("RGB", (50, 40), "white"))
    expected = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(white, expected.view(3, 1, 1).expand(3, *size))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_random_erasing_replaces_a_rectangle(mode):
    transform = finetune((64, 64), (MEAN, STD), erase_prob=1.0, erase_mode=mode)
    image = prepared(transform, Image.new("RGB", (64, 64), "white"))[0, 0]
    erased = image[image != image[image.isclose(torch.tensor((1 - MEAN[0]) / STD[0]))][0]]
    assert 0.01 < erased.numel() / image.numel() < 0.35  # timm's rectangles: 2 to 33 % of the area
    assert (len(erased.unique()) > 1) == (mode == "pixel")
    assert mode != "const" or not erased.any()


@pytest.mark.parametrize(
    "text",
    [
        *("", "none", "rand-9", "rand-mm9", "rand-m9.5", "rand-mstd", "rand-m9-tfoo", "random-m9"),
        *("augmix-n3", "original-m9", "v1", "rand-m9,mstd0.5", "rand-m9-"),
    ],
)
def test_a_bad_auto_augment_is_one_sentence(text):
    with pytest.raises(InputError, match=r"write it as in rand-m9-mstd0\.5-inc1") as error:
        finetune(auto_augment=text)
    assert "\n" not in str(error.value)
