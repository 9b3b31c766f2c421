"""Damaged metadata cost no image, and for a broken image the reason says what is wrong."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.helpers.jpegs import UPRIGHT, XMP, exif, file_of, photo
from tests.helpers.tiffs import tiff
from util.data.broken_images import reason_of
from util.data.damage import without_metadata
from util.data.decode import read_for_device, read_pixels, read_rgb
from util.data.tiff import first_page

PIXELS = np.asarray(photo())
HAS_AVIF = ".avif" in Image.registered_extensions()  # since Pillow 11.3
AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(not HAS_AVIF, reason="Pillow lacks AVIF"))


def pixels_of(data):
    """Read the pixels (h, w, 3) in every way, which all have to agree."""
    records = [io.BytesIO(data), {"bytes": data, "path": None}]
    first, *others = [read_pixels(record) for record in records]
    others.append(torch.from_numpy(np.array(read_rgb(io.BytesIO(data)))).permute(2, 0, 1))
    assert all(torch.equal(first, other) for other in others)
    return first.permute(1, 2, 0).numpy()


def reason(data):
    """Return why a file is broken, which is the same in every way to read it."""
    reasons = set()
    for read in (read_pixels, read_rgb, read_for_device):
        for record in (io.BytesIO(data), {"bytes": data, "path": None}):
            with pytest.raises(Exception) as caught:
                read(record)
            reasons.add(reason_of(caught.value))
    (only,) = reasons
    assert only == " ".join(only.split())
    return only


# Metadata


def chunk(name, content, checksum=None):
    checksum = zlib.crc32(name + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def png_with(*chunks, before=b"IDAT"):
    data = file_of(photo(), "PNG").getvalue()
    at = data.index(before) - 4
    return data[:at] + b"".join(chunks) + data[at:]


TURNED = exif(6).tobytes()[6:]
LARGE = zlib.compress(bytes(1_500_000))
PNG_METADATA = {
    "a profile of 1.5 MB": chunk(b"iCCP", b"icc\0\0" + LARGE),
    "a profile compressed in an unknown way": chunk(b"iCCP", b"icc\0\1"),
    "a profile without a name": chunk(b"iCCP", b"icc"),
    "a text of 1.5 MB": chunk(b"zTXt", b"key\0\0" + LARGE),
    "an international text of 1.5 MB": chunk(b"iTXt", b"key\0\1\0\0\0" + LARGE),
    "a text with a wrong checksum": chunk(b"tEXt", b"key\0value", 1),
    "an international text with a wrong checksum": chunk(b"iTXt", b"key\0\0\0\0\0value", 1),
    "a compressed text with a wrong checksum": chunk(b"zTXt", b"key\0\0", 1),
    "a cut resolution": chunk(b"pHYs", b"\0"),
    "a cut gamma": chunk(b"gAMA", b"\0"),
    "a frame out of order": chunk(b"acTL", bytes([0, 0, 0, 2] * 2)) + chunk(b"fcTL", b"\1" * 26),
    "a text called as an entry of Pillow": chunk(b"tEXt", b"bbox\0value"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PNG_METADATA)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_damaged_metadata_of_a_png_are_passed_over(name, before):
    np.testing.assert_array_equal(pixels_of(png_with(PNG_METADATA[name], before=before)), PIXELS)


@pytest.mark.parametrize("turning", [chunk(b"eXIf", TURNED, 1), chunk(b"eXIf", b"II*\0")])
def test_damaged_exif_does_not_turn_a_png(turning):
    np.testing.assert_array_equal(pixels_of(png_with(turning)), PIXELS)


def test_much_text_in_a_png_is_passed_over():
    info = PngInfo()
    for number in range(70):
        info.add_text(f"key {number}", "x" * 1_000_000, zip=True)
    file = file_of(photo(9, 9), "PNG", pnginfo=info)
    np.testing.assert_array_equal(np.asarray(read_rgb(file)), photo(9, 9))


XMP_TEXT = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)


@pytest.mark.parametrize("turning", [chunk(b"eXIf", TURNED), XMP_TEXT])
@pytest.mark.parametrize("name", ["a profile of 1.5 MB", "a text with a wrong checksum"])
def test_beside_damaged_metadata_the_orientation_counts(name, turning):
    data = png_with(PNG_METADATA[name], turning)
    np.testing.assert_array_equal(pixels_of(data), UPRIGHT[6](PIXELS))


@pytest.mark.parametrize("mode", ["P", "L", "1", "LA", "RGBA", "I;16"])
def test_a_png_of_any_mode_keeps_its_pixels_without_metadata(mode):
    gray = np.asarray(photo().convert("L"), np.uint16) * 257
    image = Image.fromarray(gray) if mode == "I;16" else photo().convert(mode)
    image = photo().quantize(16) if mode == "P" else image
    options = {"transparency": 3} if mode == "P" else {}
    clean = file_of(image, "PNG", **options).getvalue()
    at = clean.index(b"IHDR") + 21
    damaged = clean[:at] + PNG_METADATA["a text with a wrong checksum"] + clean[at:]
    np.testing.assert_array_equal(pixels_of(damaged), pixels_of(clean))


def jpeg_with(*segments, **options):
    data = file_of(photo(), "JPEG", **options).getvalue()
    return data[:2] + b"".join(segments) + data[2:]


def segment(marker, content, length=None):
    length = len(content) + 2 if length is None else length
    return bytes([0xFF, marker]) + struct.pack(">H", length) + content


MPF_HEAD = b"MPF\0II*\0\10\0\0\0\2\0"
JPEG_METADATA = {
    "cut EXIF": segment(0xE1, b"Exif\0\0II*\0"),
    "EXIF of noise": segment(0xE1, b"Exif\0\0" + bytes(range(99, 199))),
    "EXIF of many tags": segment(0xE1, b"Exif\0\0II*\0\10\0\0\0\xff\xff" + b"\1" * 40),
    "cut XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
    "a cut profile": segment(0xE2, b"ICC_PROFILE\0"),
    "cut Photoshop metadata": segment(0xED, b"Photoshop 3.0\0008BIM\0\1"),
    "cut FlashPix": segment(0xE2, b"FPXR\0"),
    "two pictures without a list": segment(
        0xE2, MPF_HEAD + struct.pack("<HHII", 0xB001, 4, 1, 2) + bytes(16)
    ),
    "two pictures with a cut list": segment(
        0xE2,
        MPF_HEAD
        + struct.pack("<HHII", 0xB001, 4, 1, 2)
        + struct.pack("<HHII", 0xB002, 7, 4, 0)
        + bytes(4),
    ),
    "cut JFIF": segment(0xE0, b"JFIF\0"),
    "cut Adobe": segment(0xEE, b"Adobe"),
    "no length": segment(0xE3, b"", 0),
    "an unknown segment": segment(0xEB, b"\xff\xd8\xff\xdb"),
    "a comment": segment(0xFE, b"\0\xff"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", JPEG_METADATA)
def test_damaged_metadata_of_a_jpeg_are_passed_over(name):
    expected = pixels_of(jpeg_with())
    np.testing.assert_array_equal(pixels_of(jpeg_with(JPEG_METADATA[name])), expected)
    turned = pixels_of(jpeg_with(JPEG_METADATA[name], exif=exif(6)))
    assert any(np.array_equal(turned, UPRIGHT[n](expected)) for n in (1, 6))
    if "EXIF" not in name:
        np.testing.assert_array_equal(turned, UPRIGHT[6](expected))


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_without_metadata_a_jpeg_keeps_what_tells_its_colors(mode):
    options = {"keep_rgb": True} if mode == "RGB" else {}
    options |= {"exif": exif(1), "icc_profile": b"i" * 99, "comment": b"no"}
    data = file_of(photo().convert(mode), "JPEG", **options).getvalue()
    bare = without_metadata(data, keep_orientation=False)
    assert not re.search(b"Exif|ICC_PROFILE|\xff\xfe", bare)
    np.testing.assert_array_equal(pixels_of(bare), pixels_of(data))


def some_exif():
    tags = Image.Exif()
    tags[0x010F] = "a name that needs a place of its own"
    tags.get_ifd(0x8769)[0x9204] = -2.0
    return tags


@pytest.mark.faults
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("file_format", ["WEBP", AVIF])
def test_damaged_exif_of_other_formats_is_passed_over(file_format):
    data = file_of(photo(), file_format, exif=some_exif()).getvalue()
    expected = pixels_of(data)
    end = data.index(b"a name that needs")
    start = data.rindex(b"MM\0*" if b"MM\0*" in data else b"II*\0", 0, end)
    rng = np.random.default_rng(0)
    for _ in range(50):
        damaged = bytearray(data)
        for at in rng.integers(start, end, 3):
            damaged[at] = rng.integers(256)
        np.testing.assert_array_equal(pixels_of(bytes(damaged)), expected)


@pytest.mark.faults
@pytest.mark.filterwarnings("error")
def test_damaged_metadata_of_a_tiff_are_passed_over():
    tags = some_exif()
    tags[270], tags[305], tags[700] = "a description", "a program", b"<xmp/>"
    data = file_of(photo(), "TIFF", exif=tags, icc_profile=b"i" * 99).getvalue()
    page = first_page(data)
    tags = page.entries.keys() & {270, 271, 305, 700, 34665, 34675}
    assert len(tags) >= 4
    metadata = [page.entries[tag].position for tag in sorted(tags)]
    rng = np.random.default_rng(0)
    for position in metadata * 20:
        damaged = bytearray(data)
        damaged[position + 2 : position + 12] = rng.integers(0, 256, 10, np.uint8).tobytes()
        np.testing.assert_array_equal(pixels_of(bytes(damaged)), PIXELS)


def test_a_webp_cut_in_its_exif_is_read():
    data = file_of(photo(), "WEBP", lossless=True, exif=exif(1)).getvalue()
    np.testing.assert_array_equal(pixels_of(data[:-5]), PIXELS)


def test_an_image_that_pillow_has_opened_is_read_without_its_damaged_metadata(tmp_path):
    data = png_with(PNG_METADATA["a text of 1.5 MB"], before=b"IEND")
    (tmp_path / "a.png").write_bytes(data)
    for file in (io.BytesIO(data), tmp_path / "a.png"):
        np.testing.assert_array_equal(np.asarray(read_rgb(Image.open(file))), PIXELS)


@pytest.mark.faults
def test_a_palette_is_not_lost_as_metadata():
    clean = file_of(photo().quantize(16), "PNG").getvalue()
    for byte in set(range(256)) - {ord("P")}:
        damaged = clean.replace(b"PLTE", bytes([byte]) + b"LTE")
        assert re.search("checksum|chunk|header", reason(damaged))


# Reasons


TEXTS = {
    b"": "an empty file",
    bytes(999): "nothing but zero bytes",
    b"no such image": "not an image, but text",
    "größer".encode(): "not an image, but text",
    b"\n<!DOCTYPE html><html>": "not an image, but an HTML page",
    b"<?xml version='1.0'?><Error>": "not an image, but XML",
    b"<svg xmlns='a'>": "not an image, but an SVG drawing",
    b"version https://git-lfs.github.com/spec/v1\n": "Git LFS",
    b"%PDF-1.7": "PDF, which Pillow cannot read",
    b"\0\0\0\x18ftypheic\0\0\0\0": "HEIC, which Pillow cannot read",
    bytes(range(128, 256)): "not an image of a known format",
}


@pytest.mark.parametrize("data", TEXTS)
def test_what_is_no_image_is_named(data):
    assert TEXTS[data] in reason(data)


@pytest.mark.parametrize(
    "file_format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", AVIF, "JPEG2000", "PPM"]
)
def test_a_truncated_image_is_called_so(file_format):
    data = file_of(photo(), file_format).getvalue()
    assert reason(data[: len(data) * 2 // 3]) == "truncated"


@pytest.mark.parametrize("name", [b"IHDR", b"IDAT"])
def test_a_wrong_checksum_is_named_with_its_chunk(name):
    data = bytearray(png_with())
    data[data.index(name) + 5] ^= 255
    assert reason(bytes(data)) == f"wrong checksum of the chunk {name.decode()}"


@pytest.mark.parametrize(
    ("pixels", "part"),
    [
        (np.zeros((4, 4, 13), np.uint8), "13 channels of 8-bit numbers"),
        (np.zeros((4, 4)), "1 channel of 64-bit floating-point numbers"),
        (np.zeros((4, 4, 3), np.float32), "3 channels of 32-bit floating-point numbers"),
        (np.zeros((4, 4), np.float32), "floating-point pixels have no known range"),
        (
            np.full((4, 4), 70000, np.int32),
            "gray values 70000..70000 are outside 0..65535: give --value_range",
        ),
    ],
)
def test_a_tiff_of_an_unknown_kind_is_described(pixels, part):
    assert part in reason(tiff((pixels, {})))
    assert part in reason(tiff((pixels, {270: 0xFFFFFF})))


def test_a_jpeg_of_12_bits_is_described():
    data = bytearray(jpeg_with())
    data[data.index(b"\xff\xc0") + 4] = 12
    assert reason(bytes(data)) == "JPEG with 3 channels of 12 bits, which Pillow cannot read"


def test_too_many_pixels_are_called_so_also_beside_damaged_metadata():
    for extra in (b"", PNG_METADATA["a profile of 1.5 MB"]):
        data = png_with(extra)
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0))
        assert "10000000000 pixels" in reason(data[:8] + header + data[33:])


def test_an_unknown_error_keeps_the_name_of_its_class():
    assert reason_of(KeyError("size")) == "KeyError: 'size'"
    assert reason_of(ValueError("first\nsecond")) == "first second"
