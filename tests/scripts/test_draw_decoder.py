"""The drawing in README is what its script draws."""

import xml.etree.ElementTree as ET

from scripts.draw_decoder import HEIGHT, PREDICTED, VISIBLE, WIDTH, main
from tests.helpers.processes import ROOT
from tests.helpers.runs import run


def test_the_script_reproduces_the_committed_file(tmp_path):
    run("--output", tmp_path / "decoder.svg", main=main)
    assert (tmp_path / "decoder.svg").read_bytes() == (ROOT / "docs/decoder.svg").read_bytes()


def test_no_visible_patch_is_predicted():
    assert not set(VISIBLE) & set(PREDICTED)


def test_every_text_starts_inside_the_picture():
    root = ET.parse(ROOT / "docs/decoder.svg").getroot()
    texts = root.findall("{http://www.w3.org/2000/svg}text")
    assert len(texts) > 20
    for text in texts:
        assert 0 < float(text.get("x")) < WIDTH and 0 < float(text.get("y")) < HEIGHT
