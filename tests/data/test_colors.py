"""Mean and std of the channels: measured on images, or refused where they do not fit them."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiffs import packed_12_bit, shape_of, tiff
from util.data.colors import choose_colors, compare_colors
from util.data.datasets import build_dataset
from util.errors import InputError
from util.normalization import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, RGB8, PixelFormat
from util.weights.metadata import check_mean_std

RNG = np.random.default_rng(0)
USUAL = (list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))


def write_pngs(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")


def write_arrays(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        np.save(folder / f"{number}.npy", image)


def choose(folder, mean=None, std=None, pixels=RGB8, **options):
    images = build_dataset(
        "folder",
        str(folder),
        split="train",
        transform=None,
        seed=0,
        pixels=pixels,
    )
    return choose_colors(images, mean, std, pixels=pixels, **options)


def test_auto_is_the_mean_and_std_of_all_pixels_on_the_unit_scale(tmp_path, caplog):
    caplog.set_level("INFO")
    images = RNG.integers(0, 4096, (6, 8, 8), np.uint16)
    write_pngs(tmp_path, images)
    mean, std = choose(tmp_path, "auto", "auto", PixelFormat(1))
    unit = images / 65535
    assert np.allclose([*mean, *std], [unit.mean(), unit.std()], rtol=1e-4)
    assert "measured on 6 training images: --mean 0.03" in caplog.text


def test_auto_of_rgb_is_that_of_each_channel(tmp_path):
    images = RNG.integers(0, 100, (5, 8, 8, 3), np.uint8) * np.array([1, 2, 0], np.uint8)
    write_pngs(tmp_path, images)
    mean, std = choose(tmp_path, "auto", "auto")
    unit = images.reshape(-1, 3) / 255
    assert np.allclose(mean, unit.mean(axis=0), rtol=1e-4)
    assert np.allclose(std, [*unit.std(axis=0)[:2], 1], rtol=1e-4)  # a constant channel


def test_the_default_is_imagenets_for_three_channels_and_measured_for_others(tmp_path):
    write_pngs(tmp_path / "rgb", RNG.integers(0, 256, (4, 8, 8, 3), np.uint8))
    assert choose(tmp_path / "rgb") == USUAL
    assert choose(tmp_path / "rgb", pixels=PixelFormat(3)) == USUAL
    write_arrays(tmp_path / "five", RNG.integers(0, 256, (4, 8, 8, 5), np.uint8))
    mean, std = choose(tmp_path / "five", pixels=PixelFormat(5))
    assert len(mean) == len(std) == 5 and abs(mean[0] - 0.5) < 0.1


def test_12_bits_in_16_bit_files_are_refused_with_the_range_instead_of_turning_black(tmp_path):
    write_pngs(tmp_path, RNG.integers(0, 4001, (4, 8, 8), np.uint16))
    with pytest.raises(InputError, match=r"use --value_range 0 4095, or --mean auto --std auto"):
        choose(tmp_path, pixels=PixelFormat(3))
    assert choose(tmp_path, pixels=PixelFormat(3, (0, 4095))) == USUAL


@pytest.mark.parametrize("colors", [(None, None), ("auto", "auto")])
@pytest.mark.parametrize("pages", [1, 3])
def test_12_bits_are_not_cut_to_the_upper_8_without_a_word(tmp_path, caplog, colors, pages):
    images = [Image.fromarray(RNG.integers(0, 4001, (8, 8), np.uint16)) for _ in range(pages)]
    images[0].save(tmp_path / "a.tif", save_all=True, append_images=images[1:])
    with pytest.raises(InputError, match=r"at most .* upper 8 .* use --value_range 0 4095, which"):
        choose(tmp_path, *colors)
    choose(tmp_path, *USUAL)
    assert "almost black: use --value_range 0 4095" in caplog.text


def test_a_tiff_that_says_12_bits_is_scaled_by_itself(tmp_path):
    values = RNG.integers(0, 4096, (8, 8), np.uint16)
    tags = shape_of(values) | {258: 12}
    (tmp_path / "a.tif").write_bytes(tiff((packed_12_bit(values), tags)))
    assert choose(tmp_path) == USUAL


def test_a_run_that_is_continued_keeps_what_it_has_measured(tmp_path):
    write_pngs(tmp_path, RNG.integers(0, 256, (2, 8, 8), np.uint8))
    before = [0.25], [0.5]
    assert choose(tmp_path, "auto", "auto", PixelFormat(1), earlier=lambda: before) == before
    assert choose(tmp_path, [0.5], [0.2], PixelFormat(1), earlier=lambda: before) == ([0.5], [0.2])


def test_16_bits_that_fill_their_range_are_taken(tmp_path):
    write_pngs(tmp_path, RNG.integers(0, 65536, (4, 8, 8), np.uint16))
    assert choose(tmp_path) == USUAL


def test_numbers_that_the_user_chose_are_only_warned_of(tmp_path, caplog):
    write_pngs(tmp_path, RNG.integers(0, 4001, (4, 8, 8), np.uint16))
    assert choose(tmp_path, [0.5], [0.2], PixelFormat(1)) == ([0.5], [0.2])
    assert "use --value_range 0 4095" in caplog.text


def test_floating_point_needs_a_range_unless_it_is_zero_to_one(tmp_path):
    write_arrays(tmp_path / "unit", RNG.random((3, 8, 8), np.float32))
    mean, _ = choose(tmp_path / "unit", pixels=PixelFormat(1))
    assert abs(mean[0] - 0.5) < 0.1
    write_arrays(tmp_path / "other", RNG.random((3, 8, 8), np.float32) * 800 - 100)
    with pytest.raises(InputError, match=r"from -9\d.* to 6\d\d.*: give --value_range -9\d"):
        choose(tmp_path / "other", pixels=PixelFormat(1))
    mean, _ = choose(tmp_path / "other", pixels=PixelFormat(1, (-100, 700)))
    assert abs(mean[0] - 0.5) < 0.1


def test_the_number_of_values_has_to_be_that_of_the_channels(tmp_path):
    write_arrays(tmp_path, RNG.integers(0, 256, (2, 8, 8, 5), np.uint8))
    with pytest.raises(InputError, match="--mean has 3 numbers, but the images have 5 channels"):
        choose(tmp_path, *USUAL, PixelFormat(5))


def test_broken_images_are_left_to_training_unless_all_are(tmp_path):
    write_pngs(tmp_path, RNG.integers(0, 256, (3, 8, 8), np.uint8))
    (tmp_path / "broken.png").write_bytes(b"no image")
    mean, _ = choose(tmp_path, pixels=PixelFormat(1))
    assert abs(mean[0] - 0.5) < 0.1
    with pytest.raises(InputError, match=r"none of 4 images can be read.*\(.*not an image"):
        choose(tmp_path, "auto", "auto", PixelFormat(4))


def test_validation_images_of_another_depth_are_warned_of(tmp_path, caplog):
    write_pngs(tmp_path, RNG.integers(0, 256, (2, 8, 8), np.uint8))
    pixels = PixelFormat(1, (0, 4095))
    images = build_dataset(
        "folder", str(tmp_path), split="train", transform=None, seed=0, pixels=pixels
    )
    compare_colors(images, [0.5], [0.25], pixels=pixels, tile=None)
    assert "the values of 2 validation images are from" in caplog.text
    caplog.clear()
    compare_colors(images, [0.03], [0.02], pixels=pixels, tile=None)
    assert not caplog.text


def test_values_that_stand_for_missing_pixels_are_warned_of(tmp_path, caplog):
    images = RNG.random((2, 8, 8), np.float32)
    images[:, :2] = -9999
    write_arrays(tmp_path, images)
    with pytest.raises(InputError, match="if one of these stands for missing pixels"):
        choose(tmp_path, pixels=PixelFormat(1))
    with pytest.raises(InputError, match=r"outside --value_range 0 1: .* missing pixels, as in"):
        choose(tmp_path, pixels=PixelFormat(1, (0, 1)))
    images[images == -9999] = -99
    np.save(tmp_path / "1.npy", images[1])
    np.save(tmp_path / "0.npy", images[0])
    choose(tmp_path, pixels=PixelFormat(1, (0, 1)))
    assert "from -99 to" in caplog.text and "outside --value_range 0 1" in caplog.text
    np.save(tmp_path / "0.npy", np.full((8, 8), -3e38, np.float32))
    with pytest.raises(InputError, match=r"0\.npy"):
        choose(tmp_path, [0.5], [0.2], PixelFormat(1, (0, 1)))


def test_a_range_belongs_to_a_number_of_channels():
    five = PixelFormat(5, (0, 4095))
    assert RGB8.or_those_of(five) == five
    assert PixelFormat(5).or_those_of(five) == five
    assert PixelFormat(3).or_those_of(five) == PixelFormat(3)
    assert PixelFormat(5, (0, 1), "CHW").or_those_of(five) == PixelFormat(5, (0, 1), "CHW")


def test_only_colors_of_8_bit_rgb_have_to_be_small():
    large = [1000.0, 2000.0], [100.0, 200.0]
    assert check_mean_std(*large, "file", pixels=PixelFormat(2, (0, 1))) == large
    with pytest.raises(InputError, match="pixels from 0 to 255"):
        check_mean_std([120.0] * 3, [60.0] * 3, "file")
