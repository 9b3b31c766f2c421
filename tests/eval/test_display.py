"""Which channels pictures show, and that images of few values are not dark."""

import numpy as np
import pytest
import torch

from util.data.batch import Crops, EncodedCrops, Normalization, Sample, collate
from util.errors import InputError
from util.eval.display import Display, choose_display, is_deep, visible
from util.normalization import RGB8, PixelFormat
from util.patches import patchify


def bands(channels, *, dtype=torch.float32, scale=1.0):
    """Two images (2, C, 6, 8) with values from 0 to `scale`."""
    images = torch.rand(2, channels, 6, 8, generator=torch.Generator().manual_seed(0))
    return (scale * images).to(dtype)


@pytest.mark.parametrize(
    ("channels", "given", "red_green_blue"),
    [
        (1, None, (0, 0, 0)),
        (2, None, (0, 1, None)),
        (3, None, (0, 1, 2)),
        (5, None, (0, 1, 2)),
        (5, [5, 4, 1], (4, 3, 0)),
        (5, [4], (3, 3, 3)),
        (2, [1, 2, 1], (0, 1, 0)),
    ],
)
def test_colors_are_the_channels_that_were_asked_for(channels, given, red_green_blue):
    images = bands(channels)
    pictures = choose_display(channels, given).of(images).images(images)
    assert pictures.shape == (2, 3, 6, 8)
    for color, channel in enumerate(red_green_blue):
        expected = torch.zeros(2, 6, 8) if channel is None else images[:, channel]
        assert torch.equal(pictures[:, color], expected)


@pytest.mark.parametrize("stretch", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_patches_get_the_colors_of_the_image_they_are_in(channels, stretch):
    images = bands(channels, scale=0.1)
    rendering = choose_display(channels, None, stretch=stretch).of(images)
    pictures = patchify(rendering.images(images).contiguous(), 2)
    assert torch.allclose(rendering.patches(patchify(images, 2)), pictures)


def test_each_channel_of_each_image_is_stretched_from_the_1st_to_the_99th_percentile():
    images = bands(3) * torch.tensor([0.01, 0.1, 1.0]).view(3, 1, 1)
    images[1] += 0.5
    pictures = Display(stretch=True).of(images).images(images)
    for image, picture in zip(images.numpy(), pictures.numpy(), strict=True):
        low, high = np.quantile(image, [0.01, 0.99], axis=(1, 2), keepdims=True)
        np.testing.assert_allclose(picture, (image - low) / (high - low), atol=1e-4)


def test_predictions_are_shown_on_the_scale_of_the_original():
    images = 0.1 * bands(1)
    rendering = choose_display(1, None, stretch=True).of(images)
    brighter = rendering.images(images + 0.05) - rendering.images(images)
    assert brighter.min() > 0.4  # half the range of the original


def test_a_constant_channel_is_black_not_an_error():
    images = torch.full((1, 1, 4, 4), 0.3)
    assert (choose_display(1, None, stretch=True).of(images).images(images) == 0).all()


def test_the_title_says_what_is_not_plain():
    assert Display().note == ""
    assert choose_display(1, None).note == ""
    assert choose_display(5, None).note == "shown: channels 1, 2, 3 of 5"
    assert choose_display(3, [3, 2, 1]).note == "shown: channels 3, 2, 1 of 3"
    note = choose_display(3, None, stretch=True).note
    assert note == "each from the original's 1st to its 99th percentile"


def test_a_channel_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"--show_channels 1 2 6: the images have only 5 channels"):
        choose_display(5, [1, 2, 6])


def batch_of(pixels):
    crops = Crops([pixels], [False], Normalization((0.0,), (1.0,)))
    return collate([Sample(crops, None, [])])


def test_8_bits_are_not_stretched_and_all_others_are():
    assert not is_deep(batch_of(torch.zeros(1, 2, 2, dtype=torch.uint8)))
    for dtype in (torch.uint16, torch.int16, torch.float32):
        assert is_deep(batch_of(torch.zeros(1, 2, 2, dtype=dtype)))
    encoded = EncodedCrops(torch.zeros(1), [1], [()], (2, 2), [True])
    assert not is_deep(batch_of(torch.zeros(1, 2, 2))._replace(encoded=encoded))


def test_8_bit_rgb_is_visible_as_it_is():
    image = bands(3, dtype=torch.uint8, scale=256)[0]
    assert np.array_equal(visible(image, RGB8), image.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("dtype", "scale", "value_range"),
    [
        (torch.uint16, 4095, None),
        (torch.uint16, 4095, (0.0, 4095.0)),
        (torch.int16, 900, None),
        (torch.float32, 0.01, None),
    ],
)
def test_few_bits_in_many_are_not_almost_black(dtype, scale, value_range):
    image = bands(2, dtype=dtype, scale=scale)[0]
    picture = visible(image, PixelFormat(2, value_range))
    assert picture.shape == (6, 8, 3)
    assert 90 < picture[..., :2].mean() < 165
    assert (picture[..., 2] == 0).all()
