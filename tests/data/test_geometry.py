"""Images of any type are resized, mirrored and padded as 8-bit ones are."""

import pytest
import torch
from torchvision.transforms.v2 import functional as v2f

from util.data.batch import Box, Normalization
from util.data.geometry import crop, in_type, mirror, pad, resize
from util.patches import TYPE_RANGES

TYPES = pytest.mark.parametrize("dtype", TYPE_RANGES, ids=str)
BYTES = torch.randint(0, 256, (5, 9, 12), dtype=torch.uint8)


def typed(dtype, image=BYTES):
    """The same image in another type, with whole numbers of it as far apart as the type allows."""
    low, high = TYPE_RANGES[dtype]
    values = low + (high - low) * image.double() / 255
    return values.round().to(dtype) if dtype != torch.float32 else values.float()


def on_unit_scale(image):
    low, high = TYPE_RANGES[image.dtype]
    return (image.double() - low) / (high - low)


@TYPES
def test_resizing_is_that_of_real_numbers_up_to_rounding(dtype):
    got = resize(typed(dtype), (6, 30))
    expected = v2f.resize(on_unit_scale(typed(dtype)), [6, 30], antialias=True)
    assert got.dtype == dtype
    low, high = TYPE_RANGES[dtype]
    # 8 bits are computed in integers, which rounds twice.
    steps = {torch.uint8: 1.01, torch.float32: 0}.get(dtype, 0.51)
    atol = steps / (high - low) + 1e-6
    torch.testing.assert_close(on_unit_scale(got), expected, rtol=0, atol=atol)


@TYPES
def test_cropping_mirroring_and_padding_move_values_and_change_none(dtype):
    image = typed(dtype)
    fill = in_type([0.5] * 5, dtype, None)

    def changed(values, fill):
        shown = mirror(crop(values, Box(1, 2, 7, 9)), horizontal=True, vertical=True)
        return pad(shown, (8, 11), fill)

    got = changed(image, fill)
    assert (got.dtype, got.shape) == (dtype, (5, 8, 11))
    expected = changed(image.double(), fill)
    assert torch.equal(got.double(), expected)
    assert torch.equal(expected[:, :7, :9], image.double()[:, 1:8, 2:11].flip(1, 2))
    assert torch.equal(expected[:, 7:], torch.tensor(fill).double().view(5, 1, 1).expand(5, 1, 11))


@pytest.mark.parametrize("value_range", [None, (-100.0, 300.0)])
@TYPES
def test_padding_by_the_mean_is_zero_once_normalized(dtype, value_range):
    mean = (0.25, 0.5)
    padded = pad(typed(dtype)[:2, :0, :0], (3, 4), in_type(mean, dtype, value_range))
    normalized = Normalization(mean, (0.5, 0.5), value_range)(padded[None])
    low, high = value_range or TYPE_RANGES[dtype]
    assert normalized.abs().max() <= 1 / (high - low) + 1e-6


def test_a_mean_outside_of_a_type_is_its_nearest_value():
    assert in_type((0.0, 0.25, 1.0), torch.uint8, (-100.0, 4000.0)) == [0, 255, 255]
