"""The pages of a TIFF are told from its directories, cheaply and whatever is damaged."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.helpers.files import CountingFile
from tests.helpers.jpegs import file_of, photo
from tests.helpers.tiffs import tiff
from util.data.tiff import MAX_PAGES, num_pages

GRAY = np.zeros((4, 4), np.uint8)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_full_pages_are_counted_and_smaller_versions_and_masks_are_not(tmp_path, order, big):
    smaller = [(GRAY, {254: 1}), (GRAY, {255: 2}), (GRAY, {254: 4})]
    (tmp_path / "a.tif").write_bytes(tiff((GRAY, {}), *smaller, order=order, big=big))
    assert num_pages(tmp_path / "a.tif") == 1
    several = tiff(*smaller, (GRAY, {254: 2}), (GRAY, {255: 3}), (GRAY, {}), order=order, big=big)
    (tmp_path / "b.tif").write_bytes(several)
    assert num_pages(f"{tmp_path}/b.tif") == 3


def test_pages_are_counted_as_by_pillow():
    file = file_of(photo(), "TIFF", save_all=True, append_images=[photo(9), photo(8)])
    assert num_pages(file) == Image.open(file).n_frames == 3


def test_an_open_file_keeps_its_position_and_few_bytes_are_read():
    file = CountingFile(tiff(*[(np.zeros((500, 500), np.uint8), {})] * 3))
    file.seek(7)
    assert num_pages(file) == 3
    assert file.tell() == 7
    assert file.num_read < 1000


def test_any_other_file_has_one_page(tmp_path):
    closed = io.BytesIO(tiff((GRAY, {})))
    closed.close()
    assert num_pages(closed) == num_pages(tmp_path) == num_pages(tmp_path / "missing.tif") == 1
    for content in (b"", b"II", b"II*\0", b"text", file_of(photo(), "PNG").getvalue()):
        assert num_pages(io.BytesIO(content)) == 1


def test_a_chain_of_pages_that_is_a_loop_ends():
    data = bytearray(tiff((GRAY, {}), (GRAY, {})))
    data[-4:] = data[4:8]
    assert num_pages(io.BytesIO(data)) == 2


def test_an_endless_chain_is_cut_short():
    file = io.BytesIO(tiff(*[(GRAY, {})] * (MAX_PAGES + 5)))
    assert num_pages(file) == MAX_PAGES


@pytest.mark.faults
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_damaged_directories_are_never_an_error(order, big):
    data = tiff((GRAY, {254: 1}), (GRAY, {}), (GRAY, {}), order=order, big=big)
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(data[: rng.integers(4, len(data) + 1)])
        damaged[4 + rng.integers(len(damaged) - 3) :: rng.integers(1, 99)] = b""
        assert 1 <= num_pages(io.BytesIO(damaged)) <= 3
        damaged = bytearray(data)
        damaged[rng.integers(4, len(data))] = rng.integers(256)
        assert 1 <= num_pages(io.BytesIO(damaged)) <= 4
