"""The command line of the export, and encoder-only files."""

import pytest

import models_vit
from models_crossmae import build_crossmae
from scripts.export_encoder import main
from tests.helpers.exports import TINY_PATCH4, export
from tests.helpers.files import files_in
from tests.helpers.models import NANO, crossmae_nano, use_nano_models
from tests.helpers.processes import command, finish, start
from tests.helpers.runs import refusal
from tests.helpers.weights import (
    attentive_probe,
    finetuned,
    pretrained,
    stored,
    vit_nano,
)
from util.weights.encoder import read_encoder


@pytest.fixture(autouse=True)
def _nano(monkeypatch):
    """Replace the tiny models by ones that are fast to write."""
    use_nano_models(monkeypatch)


@pytest.mark.parametrize("content", [pretrained(crossmae_nano()), finetuned(vit_nano())])
def test_our_own_files_hold_what_was_trained(tmp_path, content):
    path, log = export(tmp_path, content, "safetensors", "encoder.safetensors")
    original, again = read_encoder(tmp_path / "checkpoint.pth"), read_encoder(path)
    assert again.hash() == original.hash()
    assert again.head_state.keys() == original.head_state.keys()
    assert (again.mean, again.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert "images: 16 x 16 px, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), crop_pct=0.875" in log


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"--checkpoint": "nowhere.pth"}, "checkpoint not found: nowhere.pth"),
        ({"--output": "encoder.pth", "--format": "safetensors"}, "must end in .safetensors"),
        ({"--output": "encoder", "--format": "mae"}, "must end in .pth"),
        ({"--output": "encoder", "--format": "onnx"}, "must end in .onnx"),
        ({"--output": "nowhere/encoder.pth"}, "cannot write --output nowhere/encoder.pth"),
        ({"--output": "nowhere/encoder"}, "nowhere is not a folder, so create it, or choose"),
        ({"--output": "encoder.pt"}, "encoder.pt would be a folder: leave .pt out"),
        ({"--output": "encoder.pth", "--format": "hf"}, "encoder.pth would be a folder"),
        ({"--format": "coreml"}, "invalid choice: 'coreml'"),
        ({"--sort": "x"}, "--sort"),
    ],
    ids=str,
)
def test_wrong_input_is_refused_in_one_sentence(tmp_path, capsys, changes, reason):
    checkpoint = stored(tmp_path / "checkpoint.pth", finetuned(vit_nano()))
    argv = {"--checkpoint": checkpoint, "--format": "timm", "--output": tmp_path / "out.pth"}
    words = [word for pair in (argv | changes).items() for word in pair]
    assert reason in refusal(capsys, *words, main=main)
    assert list(tmp_path.iterdir()) == [checkpoint]


SUFFIXES = {"mae": ".pth", "onnx": ".onnx"}
EARLIER = finetuned(vit_nano())
EARLIER["model_options"]["layers"] = [1]


@pytest.mark.parametrize("form", ["timm", "hf", "mae", "onnx"])
@pytest.mark.parametrize(
    ("content", "what"),
    [(attentive_probe(), "learned queries"), (EARLIER, "features of earlier blocks")],
    ids=["attentive", "layer"],
)
def test_a_head_on_features_of_ours_only_is_refused(tmp_path, capsys, form, content, what):
    checkpoint = stored(tmp_path / "checkpoint.pth", content)
    output = tmp_path / f"out{SUFFIXES.get(form, '')}"
    words = ["--checkpoint", checkpoint, "--format", form, "--output", output]
    sentence = refusal(capsys, *words, main=main)
    assert f"the head reads {what}" in sentence and "--encoder_only" in sentence
    assert not output.exists()


@pytest.mark.parametrize("content", [attentive_probe(), attentive_probe(layers=[0, 2]), EARLIER])
def test_our_own_file_keeps_what_a_head_reads(tmp_path, content):
    path, _ = export(tmp_path, content, "safetensors", "probe.safetensors")
    original, again = read_encoder(tmp_path / "checkpoint.pth"), read_encoder(path)
    assert again.pooling == original.pooling
    assert (again.hash(), again.is_probe) == (original.hash(), original.is_probe)


def test_another_size_is_refused(tmp_path, capsys):
    model = models_vit.build_vit(NANO._replace(depth=3), pool="cls", num_classes=0)
    path = stored(tmp_path / "checkpoint.pth", model.state_dict())
    words = ["--checkpoint", path, "--format", "timm", "--output", tmp_path / "out.pth"]
    assert "a ViT of depth 3 and width 32" in refusal(capsys, *words, main=main)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("timm", "a.pth"),
        ("timm", "a"),
        ("hf", "a"),
        ("mae", "a.pth"),
        ("safetensors", "a.safetensors"),
    ],
)
def test_nothing_is_overwritten(tmp_path, capsys, form, name):
    checkpoint = stored(tmp_path / "checkpoint.pth", finetuned(vit_nano()))
    place = tmp_path / name
    place.write_text("precious") if place.suffix else place.mkdir()
    before = files_in(tmp_path)
    words = ["--checkpoint", checkpoint, "--format", form, "--output", place]
    assert f"{place} already exists" in refusal(capsys, *words, main=main)
    assert files_in(tmp_path) == before


def test_it_runs_as_a_script(tmp_path):
    model = build_crossmae(TINY_PATCH4, decoder_depth=1)
    checkpoint = stored(tmp_path / "checkpoint.pth", pretrained(model, decoder_depth=1))
    output = tmp_path / "encoder.safetensors"
    words = ["--checkpoint", checkpoint, "--format", "safetensors", "--output", output]
    code, out, err = finish(start(command("scripts/export_encoder.py", *words)))
    assert (code, err) == (0, "")
    assert f"wrote {output}" in out
    assert read_encoder(output).shape == (4, 192, 12)
