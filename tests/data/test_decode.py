"""Images are read as upright 8-bit RGB, JPEGs as Pillow reads them, and broken ones detected."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.data import IDENTITY
from tests.helpers.jpegs import JPEGS, ORIENTATION, UPRIGHT, file_of, photo
from util.data import decode
from util.data.decode import read_pixels, read_rgb, to_rgb
from util.data.transforms import pretrain_transform

COLORS = np.array([[[250, 10, 20], [30, 240, 50]], [[60, 70, 230], [0, 255, 128]]], np.uint8)
GRAY = np.array([[0, 7], [128, 255]], np.uint8)
GRAY_AS_RGB = np.stack([GRAY] * 3, axis=-1)
RAMP_16 = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
RAMP_16_AS_RGB = np.stack([np.arange(256, dtype=np.uint8).reshape(16, 16)] * 3, axis=-1)


def in_file(image, file_format, **options):
    """Write an image to a file and open it again."""
    return Image.open(file_of(image, file_format, **options))


def upright_pixels(file):
    """Read the pixels of a file with Pillow only, as a uint8 tensor (3, h, w)."""
    image = to_rgb(Image.open(io.BytesIO(file.getvalue())))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def palette_image(transparency=None):
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8))
    image = image.convert("P")
    image.putdata([0, 1, 2, 3])
    image.putpalette(COLORS.reshape(-1).tolist())
    options = {} if transparency is None else {"transparency": transparency}
    return in_file(image, "PNG", **options)


def with_alpha(array):
    alpha = np.array([[0, 85], [170, 255]], np.uint8)[..., None]
    return np.concatenate([array if array.ndim == 3 else array[..., None], alpha], axis=-1)


# The inks of the pixels: full cyan, half magenta, none, only black.
CMYK = np.array([[[255, 0, 0, 0], [0, 128, 0, 0]], [[0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8)
CMYK_AS_RGB = np.array([[[0, 255, 255], [255, 127, 255]], [[255, 255, 255], [0, 0, 0]]], np.uint8)
MODES = {
    "RGB": (lambda: in_file(Image.fromarray(COLORS), "PNG"), "RGB", COLORS),
    "gray": (lambda: in_file(Image.fromarray(GRAY), "PNG"), "L", GRAY_AS_RGB),
    "gray+alpha": (
        lambda: in_file(Image.fromarray(with_alpha(GRAY), "LA"), "PNG"),
        "LA",
        GRAY_AS_RGB,
    ),
    "RGB+alpha": (lambda: in_file(Image.fromarray(with_alpha(COLORS)), "PNG"), "RGBA", COLORS),
    "black and white": (
        lambda: in_file(Image.fromarray(GRAY > 100), "PNG"),
        "1",
        np.where(GRAY_AS_RGB > 100, 255, 0),
    ),
    "CMYK": (lambda: in_file(Image.fromarray(CMYK, "CMYK"), "TIFF"), "CMYK", CMYK_AS_RGB),
    "palette": (palette_image, "P", COLORS),
    "palette, one transparent": (lambda: palette_image(2), "P", COLORS),
    "palette, each transparent": (lambda: palette_image(bytes([0, 85, 170, 255])), "P", COLORS),
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
    assert image.mode == mode  # otherwise the case tests nothing
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(rgb), expected)
    np.testing.assert_array_equal(read_pixels(build()).permute(1, 2, 0), expected)


def test_cmyk_jpeg_has_its_colors():
    inks = np.broadcast_to(np.array([255, 0, 0, 0], np.uint8), (16, 16, 4))
    rgb = to_rgb(in_file(Image.fromarray(inks, "CMYK"), "JPEG", quality=100))
    np.testing.assert_allclose(np.asarray(rgb)[8, 8], [0, 255, 255], atol=3)


def test_16_bit_is_rounded_not_clipped():
    gray = np.array([[0, 128, 129, 255, 256, 40000, 65535]], np.uint16)
    rgb = np.asarray(to_rgb(in_file(Image.fromarray(gray), "PNG")))
    np.testing.assert_array_equal(rgb[0, :, 0], np.round(gray[0] / 257))


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
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
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
    Image.fromarray(COLORS).save(tmp_path / "image.png")
    file = (tmp_path / "image.png").open("rb")
    image = read_rgb(file)
    assert file.closed
    np.testing.assert_array_equal(np.asarray(image), COLORS)


# Reading pixels


FAST = {"usual", "progressive", "without subsampling", "RGB inside", "gray", "comment and profile"}
FAST |= {"EXIF 1", "two pictures", "tiny", "with a tail"}


@pytest.mark.parametrize("case", JPEGS)
def test_jpegs_read_as_pillow_reads_them(case):
    file = JPEGS[case]()
    expected = upright_pixels(file)
    assert isinstance(decode.read_record(io.BytesIO(file.getvalue())), decode.Jpeg) == (
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
def test_a_jpeg_truncated_anywhere_is_broken(decode):
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
    monkeypatch.setattr(decode, "MAX_UNCHECKED_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        read_pixels(JPEGS["usual"]())
