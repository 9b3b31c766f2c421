import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from timm.data.transforms_factory import transforms_imagenet_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from util.data.batch import Box, Sample, collate, denormalize, resize_crop
from util.data.images import IndexedImages
from util.data.loaders import build_train_loader
from util.data.transforms import (
    default_crop_pct,
    draw_box,
    draw_clipped_box,
    eval_transform,
    finetune_transform,
    pretrain_transform,
    probe_transform,
)
from util.errors import InputError
from util.settings.views import LABELED_VIEW, AugmentSettings, ViewSettings

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
IDENTITY = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def prepared(transform, image, *place):
    """Return the input (K, 3, H, W) of a model for a Pillow image."""
    crops = transform(transform.read(image.copy()), "test", *place)
    return collate([Sample(crops, label=None, broken=[])]).to(CPU)[0]


# Random crops


def assert_same_distribution(ours, theirs, size):
    """Compare boxes (N, 4), rows of top, left, height and width, in an image of this size."""
    for boxes in (ours, theirs):
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= size).all()
    for measure in (
        *(lambda b, i=i: b[:, i] for i in range(4)),
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
    ):
        assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 64), (100, 180)])
@pytest.mark.parametrize("area", [(0.2, 1.0), (0.08, 1.0), (0.3, 0.5)])
def test_boxes_are_distributed_as_torchvisions(size, area):
    rng, image = random.Random(0), torch.empty(3, *size)
    ours = np.array([draw_box(rng, *size, area) for _ in range(4000)])
    arguments = image, area, [3 / 4, 4 / 3]
    theirs = np.array([v1.RandomResizedCrop.get_params(*arguments) for _ in range(4000)])
    assert_same_distribution(ours, theirs, size)


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 64), (10, 1000), (1, 1)])
def test_a_probes_boxes_are_drawn_once_and_clipped(size):
    rng, theirs = random.Random(0), np.random.default_rng(0)
    ours = np.array([draw_clipped_box(rng, *size, (0.08, 1.0)) for _ in range(4000)])
    area = theirs.uniform(0.08, 1, 4000) * size[0] * size[1]
    aspect = np.exp(theirs.uniform(np.log(3 / 4), np.log(4 / 3), 4000))
    sizes = np.stack([np.sqrt(area / aspect), np.sqrt(area * aspect)], axis=1).round()
    sizes = sizes.clip(1, size)
    places = np.floor(theirs.uniform(size=(4000, 2)) * (size - sizes + 1))
    assert_same_distribution(ours, np.concatenate([places, sizes], axis=1), size)


def test_only_a_probes_boxes_are_clipped():
    """A size higher than the image becomes its height, where torchvision draws another."""
    probe, pretrain = (f((8, 8), *IDENTITY) for f in (probe_transform, pretrain_transform))
    heights = [
        [transform.draw(375, 500, seed)[0][0].height for seed in range(200)]
        for transform in (probe, pretrain)
    ]
    assert heights[0].count(375) > 20 > 5 > heights[1].count(375)


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (1, 7), (7, 1), (1, 1), (3, 200)])
def test_the_box_of_an_extreme_image_is_torchvisions(size):
    arguments = torch.empty(3, *size), [0.9, 1.0], [3 / 4, 4 / 3]
    theirs = {v1.RandomResizedCrop.get_params(*arguments) for _ in range(50)}
    ours = {tuple(draw_box(random.Random(seed), *size, (0.9, 1.0))) for seed in range(50)}
    assert ours == theirs


def test_crops_follow_from_the_seed_and_the_first_ones_stay_with_more():
    few, many = (pretrain_transform((16, 16), *IDENTITY, num_crops=n) for n in (2, 5))
    first = few.draw(45, 67, 0, 1, 2)
    assert first == few.draw(45, 67, 0, 1, 2) == tuple(x[:2] for x in many.draw(45, 67, 0, 1, 2))
    assert first != few.draw(45, 67, 0, 1, 3)
    boxes, flips, vertical = few_crops(num_crops=1000).draw(45, 67, 0)
    assert len(set(boxes)) > 900
    assert 430 < sum(flips) < 570
    assert not any(vertical)


def few_crops(num_crops=3, **view):
    view = ViewSettings(**{"crop_area": (0.2, 1.0), **view})
    return pretrain_transform((16, 16), *IDENTITY, view, num_crops=num_crops)


def test_crops_and_flips_are_those_of_versions_without_flags_for_them():
    boxes = [Box(2, 6, 41, 43), Box(2, 13, 42, 38), Box(1, 6, 44, 42)]
    flips, unflipped = [False, False, True], [False] * 3
    assert few_crops().draw(45, 67, "augment", 0, 3, 0) == (boxes, flips, unflipped)
    with_vertical = few_crops(vflip=0.5).draw(45, 67, "augment", 0, 3, 0)
    assert with_vertical[0][0] == boxes[0] and with_vertical[1][0] == flips[0]


@pytest.mark.parametrize("view", [{"hflip": 0.0}, {"hflip": 1.0}, {"vflip": 0.0, "hflip": 0.3}])
def test_how_often_crops_are_flipped_left_to_right_leaves_the_crops(view):
    boxes, flips, _ = few_crops(**view).draw(45, 67, 5)
    assert boxes == few_crops().draw(45, 67, 5)[0]
    assert view["hflip"] == 0.3 or flips == [bool(view["hflip"])] * 3


@pytest.mark.parametrize("area", [(0.25, 0.25), (0.5, 0.6), (1.0, 1.0)])
def test_areas_of_crops_are_in_the_range_given(area):
    boxes, _, _ = few_crops(num_crops=300, crop_area=area).draw(300, 300, 0)
    areas = np.array([box.height * box.width for box in boxes]) / 300**2
    assert area[0] - 0.01 < areas.min() and areas.max() < area[1] + 0.01
    assert np.ptp(areas) >= 0.9 * (area[1] - area[0])


@pytest.mark.parametrize("area", [(0, 1), (0.5, 0.2), (0.2, 1.1), (float("nan"), 1)])
def test_a_range_of_areas_that_is_none_is_one_sentence(area):
    with pytest.raises(InputError, match=r"--crop_area takes the smallest .* such as 0\.2 1, not"):
        ViewSettings(crop_area=area)


@pytest.mark.parametrize(
    "build",
    [
        lambda view: pretrain_transform((32, 48), *IDENTITY, view),
        lambda view: probe_transform((32, 48), *IDENTITY, view),
        lambda view: finetune((32, 48), view=view),
    ],
)
@pytest.mark.parametrize(("hflip", "vflip"), [(0, 0), (1, 0), (0, 1), (1, 1), (0.5, 0.25)])
def test_images_are_flipped_as_often_as_is_asked(build, hflip, vflip):
    transform = build(ViewSettings(hflip, vflip, (0.9, 1.0)))
    count = 1 if {hflip, vflip} <= {0, 1} else 300
    image = coordinates_image(64)
    crops = torch.cat([prepared(transform, image, index) for index in range(count)])
    mirrored = (crops[:, 0, 16, -2] < crops[:, 0, 16, 1]).float().mean()
    upside_down = (crops[:, 1, -2, 24] < crops[:, 1, 1, 24]).float().mean()
    assert mirrored == pytest.approx(hflip, abs=0.1 * (count > 1))
    assert upside_down == pytest.approx(vflip, abs=0.1 * (count > 1))


# Results of transforms


def coordinates_image(side=256):
    """Image whose red is the column and green the row, so that a crop shows where it was cut."""
    rows, columns = np.mgrid[:side, :side].astype(np.uint8)
    return Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1))


def finetune(size=(32, 48), normalization=IDENTITY, view=LABELED_VIEW, **options):
    plain = {"auto_augment": "none", "reprob": 0.0}
    return finetune_transform(size, *normalization, AugmentSettings(**(plain | options)), view)


@pytest.mark.parametrize(
    ("build", "min_area"),
    [
        (lambda: pretrain_transform((32, 48), *IDENTITY), 0.2),
        (lambda: probe_transform((32, 48), *IDENTITY), 0.08),
        (finetune, 0.08),
    ],
)
def test_crops_cover_min_area_to_the_whole_image_and_half_are_flipped(build, min_area):
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
    ours = eval_transform((224, 224), MEAN, STD, crop_pct=224 / 256)
    for width, height in ((300, 500), (640, 333), (256, 256), (50, 40)):
        noise = torch.randint(256, (height, width, 3), dtype=torch.uint8).numpy()
        image = Image.fromarray(noise)
        # Resized in uint8 by PyTorch and not by Pillow, which rounds differently.
        difference = (prepared(ours, image)[0] - usual(image)) * torch.tensor(STD).view(3, 1, 1)
        assert 255 * difference.abs().mean() < 0.1
        assert 255 * difference.abs().max() < 2.5


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("size", [(224, 224), (48, 66)])
def test_eval_transform_is_timms(size, mode, interpolation, crop_pct):
    options = {"crop_pct": crop_pct, "interpolation": interpolation}
    timms = transforms_imagenet_eval(size, **options, crop_mode=mode, normalize=False)
    ours = eval_transform(size, *IDENTITY, **options, squash=mode == "squash")
    torch.manual_seed(0)
    for width, height in ((300, 500), (640, 333), (50, 40)):
        noise = torch.randint(256, (height, width, 3), dtype=torch.uint8)
        image = Image.fromarray(noise.numpy())
        difference = (ours(noise.permute(2, 0, 1)).pixels[0].int() - timms(image).int()).abs()
        assert difference.max() <= 2
        assert difference.float().mean() < 0.1


def test_another_interpolation_is_refused():
    with pytest.raises(ValueError, match="bicubic"):
        eval_transform((32, 32), MEAN, STD, interpolation="lanczos")


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_long_image_is_interpolated_as_any_other(interpolation):
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 2, 200)
    transform = eval_transform((16, 16), *IDENTITY, interpolation=interpolation)
    whole = resize_crop(ramp, Box(0, 0, 2, 200), (16, 1600), interpolation)
    difference = transform(ramp).pixels[0].int() - whole[:, :, 792:808].int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize("image_size", [(400, 100), (100, 400), (256, 256), (7, 5)])
def test_eval_transform_cuts_the_center_without_padding(image_size):
    image = Image.new("RGB", image_size, "white")
    (tensor,) = prepared(eval_transform((32, 64), *IDENTITY, crop_pct=0.8), image)
    assert tensor.shape == (3, 32, 64)
    assert (tensor == 1).all()


@pytest.mark.parametrize("image_size", [(8, 400), (400, 8), (30, 1700), (3, 55)])
def test_the_center_of_a_long_image_is_that_of_the_whole_image_resized(image_size):
    torch.manual_seed(0)
    noise = torch.randint(256, (3, *image_size), dtype=torch.uint8)
    transform = eval_transform((20, 28), *IDENTITY, crop_pct=0.8)
    scale = max(25 / image_size[0], 35 / image_size[1])
    whole = [round(side * scale) for side in image_size]
    top, left = (round((a - b) / 2) for a, b in zip(whole, (20, 28), strict=True))
    resized = resize_crop(noise, Box(0, 0, *image_size), whole)
    expected = resized[:, top : top + 20, left : left + 28].int()
    difference = (transform(noise).pixels[0].int() - expected).abs()
    assert difference.max() <= 2
    assert difference.float().mean() < 0.1


class LargestTensor(TorchDispatchMode):
    """Remembers the number of values in the largest result of an operation."""

    num_values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_values = max(self.num_values, result.numel())
        return result


@pytest.mark.parametrize("image_size", [(60_000, 1), (1, 60_000)])
@pytest.mark.parametrize(
    "build",
    [
        pretrain_transform,
        probe_transform,
        lambda size, *n: eval_transform(size, *n, 0.875),
        lambda size, *n: finetune(size, n),
    ],
)
def test_an_image_of_one_row_or_column_costs_no_more_than_its_pixels(build, image_size):
    image, transform = Image.new("RGB", image_size, "white"), build((32, 48), *IDENTITY)
    with LargestTensor() as largest:
        crops = transform(transform.read(image), "test")
    assert largest.num_values <= 3 * 60_000
    assert (crops.pixels[0].float() == (1 if crops.normalization is None else 255)).all()


def test_eval_transform_keeps_the_aspect_ratio_and_the_middle():
    (tensor,) = prepared(eval_transform((64, 128), *IDENTITY), coordinates_image())
    assert tensor[1, 0, 0] * 255 == pytest.approx(64, abs=2)  # rows 64 to 192 of 256
    assert tensor[1, -1, 0] * 255 == pytest.approx(191, abs=2)
    assert tensor[0, 0, -1] * 255 == pytest.approx(254, abs=2)


@pytest.mark.parametrize(
    ("size", "share"),
    [((224, 224), 0.875), ((32, 32), 0.875), ((225, 225), 1), ((192, 384), 1), ((384, 384), 1)],
)
def test_small_crops_are_cut_out_of_larger_images(size, share):
    assert default_crop_pct(size) == share


def test_crop_pct_above_one_is_refused():
    with pytest.raises(ValueError, match="crop_pct"):
        eval_transform((32, 32), MEAN, STD, crop_pct=1.1)


def test_normalized_with_mean_and_std_and_back():
    image = Image.new("RGB", (8, 8), (255, 0, 51))
    (tensor,) = prepared(eval_transform((4, 4), MEAN, STD), image)
    expected = torch.tensor([(1 - 0.5) / 0.2, -0.4 / 0.25, (0.2 - 0.3) / 0.3])
    torch.testing.assert_close(tensor[:, 0, 0], expected)
    colors = denormalize(tensor[None], MEAN, STD)[0, :, 0, 0]
    torch.testing.assert_close(colors, torch.tensor([1.0, 0.0, 0.2]))


# Augmentation of fine-tuning

STRONG = {"auto_augment": "rand-m9-mstd0.5-inc1", "reprob": 0.5}


class Noise:
    """Eight labeled images of which every crop differs."""

    classes = ("a", "b")

    def __init__(self):
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
        self.images = [Image.fromarray(p).resize((40, 50)) for p in pixels]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.images[index].copy(), index % 2


def epoch_of(transform, epoch, num_workers=0):
    """Return the images of an epoch in the order they are read."""
    options = {"batch_size": 8, "accum_iter": 1, "rank": 0, "world_size": 1, "seed": 3}
    dataset = IndexedImages(Noise(), transform, seed=3)
    loader = build_train_loader(dataset, num_workers=num_workers, pin_memory=False, **options)
    return torch.cat([batch.to(CPU)[0] for step in loader.steps(epoch) for batch in step])


@pytest.mark.parametrize(
    "options",
    [
        STRONG,
        STRONG | {"reprob": 1.0, "recount": 3, "remode": "rand"},
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
def test_finetune_images_are_normalized_float32(size):
    transform = finetune(size, (MEAN, STD), **STRONG)
    ((image,), *_) = transform(coordinates_image(), "test")
    assert type(image) is torch.Tensor
    assert (image.shape, image.dtype) == ((3, *size), torch.float32)
    (white,) = prepared(finetune(size, (MEAN, STD)), Image.new("RGB", (50, 40), "white"))
    expected = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(white, expected.view(3, 1, 1).expand(3, *size))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_random_erasing_replaces_a_rectangle(mode):
    transform = finetune((64, 64), (MEAN, STD), reprob=1.0, remode=mode)
    image = prepared(transform, Image.new("RGB", (64, 64), "white"))[0, 0]
    erased = image[image != image[image.isclose(torch.tensor((1 - MEAN[0]) / STD[0]))][0]]
    assert 0.01 < erased.numel() / image.numel() < 0.35  # timm's rectangles: 2 to 33% of the area
    assert (len(erased.unique()) > 1) == (mode == "pixel")
    assert mode != "const" or not erased.any()


@pytest.mark.parametrize(
    "text",
    [
        *("", "rand-9", "rand-mm9", "rand-m9.5", "rand-mstd", "rand-m9-tfoo", "random-m9"),
        *("augmix-n3", "original-m9", "v1", "rand-m9,mstd0.5", "rand-m9-"),
    ],
)
def test_a_bad_auto_augment_is_one_sentence(text):
    with pytest.raises(InputError, match=r"write it like rand-m9-mstd0\.5-inc1") as error:
        finetune(auto_augment=text)
    assert "\n" not in str(error.value)
