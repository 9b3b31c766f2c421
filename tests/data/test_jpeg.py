"""Which library decodes JPEG files, and that all of them give the same pixels."""

import io
import json
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.files import write_images
from tests.helpers.jpegs import JPEGS, exif, file_of, photo
from tests.helpers.models import use_nano_models
from tests.helpers.runs import TINY, refusal, run
from util.data import jpeg
from util.data.decode import read_pixels
from util.data.jpeg import CPU, JPEG_DECODER, LIBRARIES, decode_jpeg, decoder_on, open_decoder
from util.errors import InputError

ODD_EXIF = exif(6).tobytes()


@pytest.fixture
def without_choice(monkeypatch):
    """No decoder has been chosen yet."""
    monkeypatch.delenv(JPEG_DECODER, raising=False)
    decoder_on.cache_clear()
    yield
    decoder_on.cache_clear()


@pytest.fixture(params=LIBRARIES)
def library(request, monkeypatch, without_choice):
    """Each library in turn, which decodes everything in a test."""
    if open_decoder(request.param, CPU) is None:
        pytest.skip(f"{request.param} is not installed, or decodes no JPEG")
    monkeypatch.setenv(JPEG_DECODER, request.param)
    return request.param


def as_tensor(file):
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def pixels_by_pillow(file):
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)


OPTIONS = [
    *({"subsampling": n} for n in (0, 1, 2)),
    {"progressive": True},
    {"optimize": True},
    {"restart_marker_blocks": 1},
]


def test_every_library_has_pillows_pixels(library):
    files = [
        file_of(photo(width, height).convert(mode), "JPEG", quality=quality, **options)
        for width, height in [(1, 1), (8, 16), (67, 45), (150, 31)]
        for mode in ["RGB", "L"]
        for quality in [20, 75, 100]
        for options in OPTIONS
    ]
    for file in files:
        pixels = decode_jpeg(as_tensor(file))
        assert pixels.dtype == torch.uint8
        assert pixels.stride(0) == 1 or pixels.shape == (3, 1, 1)  # channels last
        assert torch.equal(pixels, pixels_by_pillow(file))


def after_the_frame(segment):
    """A JPEG with a segment that usually comes first."""
    data = file_of(photo(), "JPEG").getvalue()
    frame = data.index(b"\xff\xc0")
    end = frame + 2 + int.from_bytes(data[frame + 2 : frame + 4], "big")
    return io.BytesIO(data[:end] + segment + data[end:])


def app1(content):
    return b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content


# Orientations that Pillow does not find, and a lenient reader might.
UNHEEDED = {
    "not of EXIF": app1(b"Other\0" + ODD_EXIF.removeprefix(b"Exif\0\0")),
    "of an unknown byte order": app1(ODD_EXIF.replace(b"MM", b"XX").replace(b"II", b"XX")),
    "cut off": app1(ODD_EXIF[:-6]),
}


@pytest.mark.parametrize("case", UNHEEDED)
def test_an_orientation_that_pillow_does_not_find_turns_no_image(library, case):
    data = file_of(photo(), "JPEG").getvalue()
    file = io.BytesIO(data[:2] + UNHEEDED[case] + data[2:])
    expected = pixels_by_pillow(io.BytesIO(data))
    assert torch.equal(read_pixels(file), expected)


def test_exif_after_the_frame_turns_the_image(library):
    upright = read_pixels(after_the_frame(app1(ODD_EXIF)))
    assert torch.equal(upright, read_pixels(JPEGS["EXIF 6"]()))
    assert upright.shape == (3, 67, 45)


def test_a_truncated_file_is_a_runtime_error(library):
    data = as_tensor(file_of(photo(200, 150), "JPEG"))
    for length in (20, 700, len(data) // 2):
        with pytest.raises(RuntimeError):
            decode_jpeg(data[:length])


# The choice


@pytest.fixture
def installed(monkeypatch, without_choice):
    """A function that leaves only some libraries, which give pixels of one value each."""

    def leave(**values):
        for name, module in (
            ("torchcodec", "torchcodec.decoders"),
            ("torchvision", "torchvision.io"),
        ):
            fake = None
            if name in values:
                fake = types.ModuleType(module)
                fake.ImageReadMode = types.SimpleNamespace(RGB="RGB")
                fake.decode_jpeg = values[name]
            monkeypatch.setitem(sys.modules, module, fake)
        monkeypatch.setattr(jpeg.importlib.metadata, "version", lambda _: "1.2")

    return leave


def filled_with(value):
    return lambda files, *, mode, device: torch.full((3, 1, 1), value, dtype=torch.uint8)


def fails(*_, **__):
    raise RuntimeError("not compiled with libjpeg")


def warns(*_, **__):
    warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
    return filled_with(7)(None, mode="RGB", device=CPU)


@pytest.mark.parametrize(
    ("libraries", "name"),
    [
        ({"torchcodec": filled_with(7), "torchvision": filled_with(8)}, "torchcodec"),
        ({"torchvision": filled_with(7)}, "torchvision"),
        ({"torchcodec": fails, "torchvision": filled_with(7)}, "torchvision"),
        ({"torchcodec": fails, "torchvision": fails}, "pillow"),
        ({}, "pillow"),
    ],
)
def test_the_first_library_that_decodes_is_taken(installed, libraries, name):
    installed(**libraries)
    assert decoder_on(CPU).name == f"{name} 1.2"
    value = decode_jpeg(as_tensor(JPEGS["tiny"]())).unique().tolist()
    assert (value == [7]) == (name != "pillow")


@pytest.mark.filterwarnings("error")
def test_the_deprecation_of_torchvisions_decoder_is_not_shown(installed):
    installed(torchvision=warns)
    assert decode_jpeg(as_tensor(JPEGS["usual"]())).unique().tolist() == [7]


def test_the_environment_chooses_the_library(installed, monkeypatch):
    installed(torchcodec=filled_with(7), torchvision=filled_with(8))
    monkeypatch.setenv(JPEG_DECODER, "torchvision")
    assert decode_jpeg(as_tensor(JPEGS["usual"]())).unique().tolist() == [8]


def test_a_choice_that_does_not_work_is_refused(installed, monkeypatch):
    installed()
    monkeypatch.setenv(JPEG_DECODER, "torchcodec")
    with pytest.raises(InputError, match="torchcodec, which decodes no JPEG on cpu here: install"):
        decoder_on(CPU)


def test_a_gpu_on_which_nothing_decodes_is_refused(installed):
    installed(torchvision=fails)
    with pytest.raises(InputError, match=r"decodes JPEGs on cuda: .* use --decode cpu"):
        decoder_on(torch.device("cuda"))


def test_an_unknown_library_ends_a_run_before_it_starts(
    tmp_path, monkeypatch, without_choice, capsys
):
    monkeypatch.setenv(JPEG_DECODER, "pil")
    sentence = refusal(capsys, "--output_dir", tmp_path / "run")
    assert "CROSSMAE_JPEG_DECODER must be one of torchcodec, torchvision, pillow" in sentence
    assert not (tmp_path / "run").exists()


def test_the_library_is_recorded(tmp_path, monkeypatch, without_choice):
    monkeypatch.setenv(JPEG_DECODER, "pillow")
    use_nano_models(monkeypatch)
    images = write_images(tmp_path / "images", 8)
    run("--data_path", images, *TINY, "--epochs", 1, "--output_dir", tmp_path / "run")
    versions = json.loads((tmp_path / "run" / "args.json").read_text())["versions"]
    assert versions["jpeg_decoder"].startswith("pillow 1")
