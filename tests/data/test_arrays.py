"""TIFF and NumPy files are read as the numbers in them, whole or in windows, or named as broken."""

import io
import struct
import zipfile

import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.helpers.files import CountingFile
from tests.helpers.jpegs import UPRIGHT, file_of, photo
from tests.helpers.tiffs import packed_12_bit, shape_of, tiff
from util.data import stored, tiff_arrays
from util.data.arrays import is_array, open_array
from util.data.damage import BrokenImageError
from util.normalization import RGB8, PixelFormat

FIVE = PixelFormat(channels=5)
ONE = PixelFormat(channels=1)
THREE = PixelFormat(channels=3)
PIXELS = np.random.default_rng(0).integers(0, 65536, (45, 70, 5), np.uint16)
PLANES = np.ascontiguousarray(np.moveaxis(PIXELS, 2, 0))
BYTES = PIXELS.astype(np.uint8)


def tiff_of(pixels, **options):
    file = CountingFile()
    tifffile.imwrite(file, pixels, **options)
    return file


def npy_of(array, *, version=None):
    file = CountingFile()
    np.lib.format.write_array(file, array, version)
    return file


def npz_of(save=np.savez, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file


def plain_tiff(pixels, **tags):
    numbers = {"photometric": 262, "orientation": 274, "bits": 258, "kind": 254}
    return io.BytesIO(tiff((pixels, {numbers[name]: tag for name, tag in tags.items()})))


def values_of(file, pixels=FIVE):
    return open_array(file, pixels).read()


def reason_of(file, pixels=FIVE):
    with pytest.raises(BrokenImageError) as caught:
        open_array(file, pixels).read()
    return str(caught.value)


def assert_same_windows(file, expected, pixels=FIVE):
    """Whole and in windows, an image has the expected pixels."""
    image = open_array(file, pixels)
    assert (image.shape, image.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(image.read(), expected)
    rng = np.random.default_rng(1)
    for _ in range(8):
        (top, bottom), (left, right) = (
            sorted(map(int, rng.choice(size + 1, 2, replace=False))) for size in expected.shape[:2]
        )
        window = image.read(top, left, bottom - top, right - left)
        np.testing.assert_array_equal(window, expected[top:bottom, left:right])
        assert window.flags.writeable
        assert window.flags.c_contiguous


LAYOUTS = {
    "one strip": {},
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (16, 32)},
    "channels apart": {"planarconfig": "separate"},
    "strips of channels apart": {"planarconfig": "separate", "rowsperstrip": 7},
    "tiles of channels apart": {"planarconfig": "separate", "tile": (32, 16)},
}


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_of_a_tiff_is_that_part_of_the_image(layout, bigtiff, byteorder):
    options = {"planarconfig": "contig"} | LAYOUTS[layout]
    options |= {"photometric": "minisblack", "bigtiff": bigtiff, "byteorder": byteorder}
    pixels = PLANES if options["planarconfig"] == "separate" else PIXELS
    for compression in (None, "lzw", "deflate"):
        assert_same_windows(tiff_of(pixels, compression=compression, **options), PIXELS)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_predictors_of_compressed_tiffs_are_undone(dtype):
    pixels = (PIXELS.astype(float) - 30000).astype(dtype)
    options = {"photometric": "minisblack", "planarconfig": "contig", "tile": (16, 16)}
    for compression in ("lzw", "zstd"):
        file = tiff_of(pixels, compression=compression, predictor=True, **options)
        assert_same_windows(file, pixels)


PAGES = {
    "pages": lambda: tiff_of(PLANES, metadata=None),
    "tifffile": lambda: tiff_of(PLANES),
    "tifffile, compressed": lambda: tiff_of(PLANES, compression="zlib"),
    "tifffile, channels last": lambda: tiff_of(PIXELS),
    "tifffile, channels last, compressed": lambda: tiff_of(PIXELS, compression="zlib"),
    "ImageJ": lambda: tiff_of(PLANES, imagej=True, metadata={"axes": "CYX"}),
    "ImageJ, slices": lambda: tiff_of(PLANES, imagej=True, metadata={"axes": "ZYX"}),
    "OME": lambda: tiff_of(PLANES, ome=True, metadata={"axes": "CYX"}),
    "first of a series in time": lambda: tiff_of(
        np.stack([PLANES, PLANES + 1]), ome=True, metadata={"axes": "TCYX"}
    ),
    "one directory": lambda: tiff_of(PLANES, truncate=True),
    "volume": lambda: tiff_of(PLANES, volumetric=True, tile=(2, 16, 16), compression="zlib"),
}


@pytest.mark.parametrize("kind", PAGES)
def test_pages_are_channels(kind):
    assert_same_windows(PAGES[kind](), PIXELS)


@pytest.mark.parametrize("on_disk", [True, False])
def test_of_an_ome_tiff_whose_channels_are_in_several_files_each_is_an_image(tmp_path, on_disk):
    names = [tmp_path / f"{channel}.ome.tif" for channel in range(2)]
    ids = [f"urn:uuid:{channel}0000000-0000-0000-0000-000000000000" for channel in range(2)]
    places = "".join(
        f'<TiffData FirstC="{c}" IFD="0" PlaneCount="1"><UUID FileName="{name.name}">{uuid}</UUID>'
        "</TiffData>"
        for c, (name, uuid) in enumerate(zip(names, ids, strict=True))
    )
    for name, uuid, plane in zip(names, ids, PLANES, strict=False):
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}"><Image '
            'ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="70" '
            f'SizeY="45" SizeC="2" SizeZ="1" SizeT="1">{places}</Pixels></Image></OME>'
        )
        tifffile.imwrite(name, plane, description=xml, metadata=None)
    for name, plane in zip(names, PLANES, strict=False):
        with name.open("rb") if on_disk else io.BytesIO(name.read_bytes()) as file:
            assert_same_windows(file, plane[..., None], ONE)


def test_of_a_pyramid_and_masks_only_the_full_image_is_read():
    gray, small = BYTES[..., 0], BYTES[::2, ::2, 0]
    file = io.BytesIO(tiff((small, {254: 1}), (gray, {254: 4}), (gray, {}), (small, {254: 1})))
    assert_same_windows(file, BYTES[..., :1], ONE)


def test_without_a_number_of_channels_pages_are_further_images():
    file = tiff_of(
        BYTES[..., :3].transpose(2, 0, 1).copy(), metadata=None, photometric="minisblack"
    )
    assert open_array(file, RGB8).shape == (45, 70, 1)
    assert open_array(file, THREE).shape == (45, 70, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_as_it_says(orientation):
    rgb = BYTES[..., :3]
    file = plain_tiff(rgb, photometric=2, orientation=orientation)
    turned = UPRIGHT[orientation](rgb)
    assert_same_windows(file, turned, THREE)
    np.testing.assert_array_equal(np.asarray(Image.open(file)), turned)


@pytest.mark.parametrize("mode", ["P", "1", "L", "RGB", "RGBA", "LA", "CMYK"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "packbits"])
def test_8_bit_tiffs_are_read_as_by_pillow(mode, compression):
    image = photo().convert(mode)
    read = np.asarray(image.convert({"P": "RGB", "1": "L"}.get(mode, mode)))
    file = file_of(image, "TIFF", compression=compression)
    channels = PixelFormat(channels=len(image.getbands()))
    assert_same_windows(file, read.reshape(45, 67, -1), channels)
    assert open_array(file, channels).has_alpha == mode.endswith("A")


def test_a_jpeg_in_a_tiff_is_read_as_rgb():
    file = file_of(photo(), "TIFF", compression="jpeg", quality=95)
    read, expected = values_of(file, THREE), np.asarray(Image.open(file).convert("RGB"))
    assert abs(read.astype(int) - expected).max() <= 2
    assert abs(read.astype(int) - np.asarray(photo())).mean() < 5


def test_where_0_is_white_values_are_inverted():
    gray = BYTES[..., :1]
    assert_same_windows(plain_tiff(gray, photometric=0), 255 - gray, ONE)
    assert_same_windows(plain_tiff(PIXELS[..., :1], photometric=0), 65535 - PIXELS[..., :1], ONE)
    file = tiff_of(gray[..., 0] > 99, photometric="miniswhite")
    assert_same_windows(file, np.asarray(Image.open(file).convert("L"))[..., None], ONE)
    text = reason_of(plain_tiff(gray.astype(np.float32), photometric=0), ONE)
    assert text == "TIFF in which 0 is white, with float32 values"


def test_numbers_of_12_and_4_bits_fill_their_type_unless_a_range_is_given():
    deep = PIXELS[:44, :, :1] >> 4
    tags = {256: 70, 258: 12}
    file = io.BytesIO(tiff((packed_12_bit(deep), shape_of(deep) | tags)))
    given = PixelFormat(channels=1, value_range=(0, 4095))
    assert_same_windows(file, deep, given)
    scaled = np.round(deep / 4095 * 65535).astype(np.uint16)
    assert_same_windows(file, scaled, ONE)
    shallow = BYTES[..., :1] >> 4
    packed = shallow[:, ::2] << 4 | shallow[:, 1::2]
    file = io.BytesIO(tiff((packed, shape_of(shallow) | {258: 4})))
    assert_same_windows(file, shallow * 17, ONE)


def test_tiles_that_a_file_leaves_out_have_its_value_for_no_data():
    def tiles():
        yield from (np.full((16, 16), 7, np.uint8), None)

    tags = [(42113, "s", 0, "9", True)]
    options = {"shape": (16, 32), "dtype": np.uint8, "tile": (16, 16), "compression": "zlib"}
    file = tiff_of(tiles(), extratags=tags, **options)
    expected = np.repeat(np.uint8([7, 9]), 16)[None, :, None].repeat(16, axis=0)
    assert_same_windows(file, expected, ONE)


TYPES = {
    **dict.fromkeys(("uint8", "uint16", "int16", "float32"), None),
    "bool": "uint8",
    "int8": "int16",
    **dict.fromkeys(("float16", "float64", "uint32", "int32", "uint64", "int64"), "float32"),
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("order", "<>")
def test_values_are_read_in_one_of_four_types(dtype, order):
    values = (BYTES % 100 - 40.0 * (np.dtype(dtype).kind in "if")).astype(dtype)
    expected = values.astype(TYPES[dtype] or dtype)
    pixels = PixelFormat(channels=5, value_range=(-100, 100))
    assert_same_windows(npy_of(values.astype(values.dtype.newbyteorder(order))), expected, pixels)
    if dtype != "bool":  # tifffile writes it for a single channel
        options = {"photometric": "minisblack", "planarconfig": "contig", "byteorder": order}
        assert_same_windows(tiff_of(values, **options), expected, pixels)


def test_yes_and_no_are_0_and_255_unless_a_range_is_given():
    values = BYTES[..., 0] > 99
    expected = values[..., None].astype(np.uint8)
    for file in (npy_of(values), tiff_of(values, photometric="minisblack")):
        assert_same_windows(file, expected * 255, ONE)
        assert_same_windows(file, expected, PixelFormat(channels=1, value_range=(0, 1)))


@pytest.mark.parametrize("dtype", ["uint32", "int64"])
def test_integers_of_32_bits_and_more_need_a_range(dtype):
    reason = f"{dtype} values have no known range: give --value_range"
    assert reason_of(npy_of(PIXELS.astype(dtype))) == reason


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_the_axes_of_an_array_are_told_by_its_number_of_channels(order, version):
    for array in (PIXELS, PLANES):
        assert_same_windows(npy_of(np.asarray(array, order=order), version=version), PIXELS)
    gray = np.asarray(PIXELS[..., 0], order=order)
    for array in (gray, gray[None], gray[..., None]):
        for pixels in (ONE, FIVE):
            assert_same_windows(npy_of(array, version=version), PIXELS[..., :1], pixels)


def test_axes_are_as_stated_where_both_ends_may_be_the_channels():
    array = PIXELS[:5, :, :5]
    reason = "an array of shape (5, 70, 5): give --axes HWC or CHW"
    assert reason_of(npy_of(array)) == reason
    assert reason_of(tiff_of(array)) == reason
    assert_same_windows(npy_of(array), array, PixelFormat(channels=5, axes="HWC"))
    turned = np.moveaxis(array, 0, 2)
    for pixels in (PixelFormat(channels=5, axes="CHW"), PixelFormat(channels=3, axes="CHW")):
        assert_same_windows(npy_of(array), turned, pixels)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_one_array_is_an_image(save):
    for array in (PIXELS, PLANES, np.asfortranarray(PIXELS)):
        assert_same_windows(npz_of(save, image=array), PIXELS)
    assert_same_windows(npz_of(save, image=PIXELS[..., 0]), PIXELS[..., :1], ONE)


def zip_of(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file


CMYK = {"photometric": "separated", "planarconfig": "contig"}
REASONS = {
    "an array of shape (2, 3, 4, 5), not of (H, W), (H, W, C) or (C, H, W)": (
        lambda: npy_of(np.zeros((2, 3, 4, 5), np.uint8))
    ),
    "an array of shape (7,), not of (H, W), (H, W, C) or (C, H, W)": lambda: npy_of(np.zeros(7)),
    "an array of shape (45, 70, 4), with 5 channels at neither end: correct --channels": lambda: (
        npy_of(PIXELS[..., :4])
    ),
    "values of type complex128, which are no real numbers": (
        lambda: npy_of(PIXELS.astype(complex))
    ),
    "values of type object, which are no real numbers": lambda: npy_of(PIXELS.astype(object)),
    "values of type void16, which are no real numbers": (
        lambda: npy_of(np.zeros((4, 4, 5), [("a", "u1"), ("b", "u1")]))
    ),
    ".npy of 70 x 0 pixels, 5 channels": lambda: npy_of(PIXELS[:0]),
    ".npz of 2 arrays (image, mask): keep one in each file": (
        lambda: npz_of(image=PIXELS, mask=PIXELS)
    ),
    "a ZIP archive without arrays of NumPy": lambda: zip_of(a="text"),
    "TIFF whose channels have different numbers of bits (5, 6, 5)": lambda: with_tag(
        258, (5, 6, 5)
    ),
    "TIFF whose channels have different types (1, 3, 1)": lambda: with_tag(339, (1, 3, 1)),
    "TIFF of 5 times and 5 channels, which may all be channels: keep one of them in a file": (
        lambda: tiff_of(np.stack([PLANES] * 5), ome=True, metadata={"axes": "TCYX"})
    ),
    "TIFF of 2 times and 3 channels, which may all be channels: keep one of them in a file": (
        lambda: tiff_of(np.stack([PLANES[:3]] * 2), ome=True, metadata={"axes": "TCYX"})
    ),
    "TIFF with CIELAB colors: save it as RGB": lambda: plain_tiff(BYTES[..., :3], photometric=8),
    "TIFF with YCbCr colors: save it as RGB": lambda: plain_tiff(BYTES[..., :3], photometric=6),
    "TIFF without its palette": lambda: plain_tiff(BYTES[..., 0], photometric=3),
    "TIFF of 40-bit numbers of format 1, which cannot be read": (
        lambda: plain_tiff(BYTES[..., 0], bits=40)
    ),
    "TIFF of 70 x 0 pixels": lambda: io.BytesIO(tiff((BYTES[..., 0], {257: 0}))),
    "TIFF without a readable directory: truncated or damaged": (
        lambda: io.BytesIO(tiff((BYTES[..., 0], {}))[:50])
    ),
}


def with_tag(tag, values):
    """A TIFF of three channels of int16 with other values of a tag."""
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    data = bytearray(tiff_of(PIXELS[..., :3].astype(np.int16), **options).getvalue())
    entry = data.index(struct.pack("<HHI", tag, 3, 3))
    start = int.from_bytes(data[entry + 8 : entry + 12], "little")
    data[start : start + 6] = struct.pack("<3H", *values)
    return io.BytesIO(data)


@pytest.mark.parametrize("reason", REASONS)
def test_what_cannot_be_read_is_named(reason):
    assert reason_of(REASONS[reason]()) == reason


@pytest.mark.faults
@pytest.mark.parametrize(
    "file",
    [
        npy_of(PIXELS),
        npz_of(image=PIXELS),
        tiff_of(PLANES),
        tiff_of(PIXELS, photometric="minisblack", planarconfig="contig", rowsperstrip=9),
        tiff_of(PLANES, compression="zlib"),
    ],
)
def test_a_file_that_ends_too_early_is_broken(file):
    data = file.getvalue()
    for size in (3, 30, len(data) // 2, len(data) - 100):
        assert reason_of(io.BytesIO(data[:size]))
    assert open_array(io.BytesIO(data), FIVE).shape == PIXELS.shape


@pytest.mark.faults
def test_damage_is_always_a_broken_image():
    options = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}
    files = [npy_of(PIXELS), npz_of(image=PIXELS), tiff_of(PIXELS, tile=(16, 16), **options)]
    rng = np.random.default_rng(0)
    for file in files:
        data = file.getvalue()
        for _ in range(150):
            damaged = bytearray(data)
            for at in rng.integers(0, 400, 4):
                damaged[at] = rng.integers(256)
            try:
                image = open_array(io.BytesIO(damaged), FIVE)
                image.read(0, 0, min(9, image.shape[0]), min(9, image.shape[1]))
            except BrokenImageError as error:
                assert str(error)


@pytest.mark.parametrize(
    ("file", "share"),
    [
        (npy_of(np.repeat(PIXELS, 9, axis=0)), 0.05),
        (npy_of(np.repeat(PLANES, 9, axis=1)), 0.05),
        (npy_of(np.asfortranarray(np.repeat(PIXELS, 9, axis=0))), 0.05),
        (tiff_of(np.repeat(PLANES, 9, axis=1), contiguous=True), 0.15),
        (tiff_of(np.repeat(PLANES, 9, axis=1), tile=(16, 16), compression="zlib"), 0.2),
    ],
)
def test_a_window_reads_only_a_part_of_the_file(file, share):
    image = open_array(io.BytesIO(file.getvalue()), FIVE)
    expected = image.read()
    file.num_read = 0
    window = open_array(file, FIVE).read(100, 20, 16, 16)
    assert file.num_read < share * len(file.getvalue())
    np.testing.assert_array_equal(window, expected[100:116, 20:36])


def test_what_is_too_large_to_read_at_once_asks_for_tiles(monkeypatch):
    monkeypatch.setattr(stored, "MAX_VALUES", 1000)
    monkeypatch.setattr(tiff_arrays, "MAX_VALUES", 1000)
    reason = "70 x 45 pixels with 5 channels are too many to read at once: use --tile"
    options = {"photometric": "minisblack", "planarconfig": "contig", "compression": "zlib"}
    for file in (npy_of(PIXELS), npz_of(image=PIXELS), tiff_of(PLANES), tiff_of(PIXELS, **options)):
        assert reason_of(file) == reason
    assert open_array(npy_of(PIXELS), FIVE).read(0, 0, 10, 10).shape == (10, 10, 5)
    with pytest.raises(BrokenImageError, match="compressed in one piece: use tiles"):
        open_array(tiff_of(PIXELS, **options), FIVE).read(0, 0, 10, 10)


def test_arrays_are_told_by_their_first_bytes():
    for file in (npy_of(PIXELS), npz_of(a=PIXELS), tiff_of(PIXELS), tiff_of(PIXELS, bigtiff=True)):
        assert is_array(file.getvalue()[:4])
    assert not is_array(b"")
    assert not is_array(file_of(photo(), "PNG").getvalue())
