"""Images are read as upright 8-bit RGB, JPEGs as Pillow reads them, and broken ones detected."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from tests.helpers.data import IDENTITY
from tests.helpers.jpegs import JPEGS, UPRIGHT, XMP, exif, file_of, photo
from tests.helpers.tiffs import packed_12_bit, shape_of, tiff
from util.data import decode
from util.data.damage import BrokenImageError
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
    image = Image.fromarray(stored.astype(np.uint16) * 257 if is_16_bit else stored)
    rgb = to_rgb(in_file(image, file_format, exif=exif(orientation)))
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
    with pytest.raises(BrokenImageError, match=r"floating-point|outside 0\.\.65535"):
        to_rgb(in_file(Image.fromarray(pixels), "TIFF"))


def test_read_rgb_closes_the_file(tmp_path):
    Image.fromarray(COLORS).save(tmp_path / "image.png")
    file = (tmp_path / "image.png").open("rb")
    image = read_rgb(file)
    assert file.closed
    np.testing.assert_array_equal(np.asarray(image), COLORS)


def ramp(bits):
    """An image of all levels of 8-bit gray, in this many bits."""
    return np.round(np.arange(256).reshape(16, 16) * (2**bits - 1) / 255).astype(
        np.uint8 if bits == 8 else np.uint16
    )


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_a_tiff_has_the_same_pixels_in_8_and_16_bits_wherever_white_is(order, photometric):
    expected = ramp(8) if photometric else 255 - ramp(8)
    for bits in (8, 16):
        data = tiff((ramp(bits), {262: photometric}), order=order)
        for record in (io.BytesIO(data), {"bytes": data, "path": None}):
            np.testing.assert_array_equal(read_pixels(record)[0], expected)


@pytest.mark.parametrize("photometric", [0, 1])
def test_12_bit_gray_uses_the_whole_range(photometric):
    tags = shape_of(ramp(8)) | {258: 12, 262: photometric}
    pixels = read_pixels(io.BytesIO(tiff((packed_12_bit(ramp(12)), tags))))
    np.testing.assert_array_equal(pixels[0], ramp(8) if photometric else 255 - ramp(8))


def test_compressed_16_bit_gray_is_inverted_where_white_is_zero():
    pixels = Image.fromarray(ramp(16))
    file = file_of(pixels, "TIFF", compression="tiff_adobe_deflate", tiffinfo={262: 0})
    assert Image.open(io.BytesIO(file.getvalue())).tag_v2[262] == 0
    np.testing.assert_array_equal(read_pixels(file)[0], 255 - ramp(8))


@pytest.mark.parametrize("tags", [{254: 1}, {254: 4}, {255: 2}])
def test_the_first_full_page_of_a_tiff_is_read(tags):
    data = tiff((ramp(8)[:4, :4], tags), (ramp(8), {254: 2}), (255 - ramp(8), {}))
    for record in (io.BytesIO(data), Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(read_pixels(record)[0], ramp(8))


def test_a_tiff_of_reduced_pages_only_is_read_as_its_first():
    data = tiff((ramp(8), {254: 1}), (255 - ramp(8), {254: 1}))
    np.testing.assert_array_equal(read_pixels(io.BytesIO(data))[0], ramp(8))


# Metadata


# Orientation 6, and an exposure bias of -2/0, which Pillow reads but cannot write.
ODD_EXIF = (
    b"Exif\0\0II*\0\10\0\0\0\2\0\x12\1\3\0\1\0\0\0\6\0\0\0i\x87\4\0\1\0\0\0&\0\0\0\0\0\0\0"
    b"\1\0\4\x92\n\0\1\0\0\x008\0\0\0\0\0\0\0\xfe\xff\xff\xff\0\0\0\0"
)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_turned_although_its_exif_cannot_be_written(file_format):
    lossless = {"lossless": True} if file_format == "WEBP" else {}
    plain = read_pixels(file_of(photo(), file_format, **lossless))
    file = file_of(photo(), file_format, exif=ODD_EXIF, **lossless)
    for record in (Image.open(io.BytesIO(file.getvalue())), file):
        np.testing.assert_array_equal(
            read_pixels(record).permute(1, 2, 0), UPRIGHT[6](plain.permute(1, 2, 0).numpy())
        )


@pytest.mark.parametrize("metadata", [{"exif": ODD_EXIF}, {"xmp": XMP}])
def test_a_turned_image_is_not_turned_again(metadata):
    once = to_rgb(in_file(photo(), "JPEG", **metadata))
    assert once.size == photo().size[::-1]
    assert to_rgb(once).size == once.size


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("orientation", [1, 6])
def test_damaged_exif_warns_of_nothing_and_leaves_the_pixels(orientation):
    plain = read_pixels(file_of(photo(), "JPEG"))
    both = [plain, read_pixels(file_of(photo(), "JPEG", exif=exif(6)))]
    tags = exif(orientation)
    tags[ExifTags.Base.Make] = "a name that needs a place of its own"
    data = file_of(photo(), "JPEG", exif=tags).getvalue()
    start, end = data.index(b"Exif") + 6, data.index(b"\xff\xdb")
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        damaged[rng.integers(start, end)] = rng.integers(256)
        pixels = read_pixels(io.BytesIO(damaged))
        assert any(torch.equal(pixels, expected) for expected in both[: 1 + (orientation == 6)])


def test_a_device_gets_jpegs_without_metadata():
    plain = file_of(photo(), "JPEG").getvalue()
    for metadata in ({"exif": exif(1)}, {"comment": b"no"}, {"icc_profile": b"i" * 99}):
        image = decode.read_for_device(file_of(photo(), "JPEG", **metadata))
        assert image.data.numpy().tobytes() == plain
        assert image.shape == (3, 45, 67)


# Records


@pytest.mark.parametrize("read", [read_pixels, read_rgb, decode.read_for_device])
@pytest.mark.parametrize("record", [None, {"bytes": None, "path": None}])
def test_a_null_is_a_broken_image(read, record):
    with pytest.raises(BrokenImageError, match=r"^no image \(null\)$"):
        read(record)


def test_a_record_with_a_path_is_read_even_inside_an_archive(tmp_path):
    content = file_of(photo(), "JPEG", exif=ODD_EXIF).getvalue()
    (tmp_path / "a.jpg").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("a.jpg", content)
    expected = read_pixels(io.BytesIO(content))
    for path in (f"{tmp_path}/a.jpg", f"zip://a.jpg::{tmp_path}/all.zip"):
        assert torch.equal(read_pixels({"bytes": None, "path": path}), expected)


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
