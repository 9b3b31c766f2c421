"""The examples of docs/own_images.md run, on a small model and few images."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from transformers import ViTModel

from models import build_model
from tests.helpers.processes import ROOT
from tests.helpers.runs import run
from tests.helpers.weights import released, stored

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "own_images.md").read_text()
MODEL = ["--model", "crossmae_vit_tiny_patch4", "--input_size", 16, "--decoder_depth", 2]
QUICK = ["--epochs", 1, "--batch_size", 8, "--num_workers", 0]
SMALL = {  # flags after those of the page
    "main_pretrain": [*MODEL, *QUICK, "--knn_every", 1],
    "main_knn": ["--k", 3, "--num_workers", 0],
    "main_finetune": [*QUICK, "--input_size", 16],
    "draw_cells": ["--images", 24, "--val_images", 8, "--size", 20],
    "predict": ["--num_workers", 0],
}


def commands_of(heading):
    """Return the commands below a heading as lists of words."""
    section = re.search(rf"^## {heading}\n(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)[1]
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def run_all(commands, more=()):
    """Run commands with `SMALL`, in the current folder; the first epoch's checkpoint is the last.

    Args:
        more: flags for what reads images.
    """
    for _, path, *argv in commands:
        name = path.removesuffix(".py").replace("/", ".")
        argv = [re.sub(r"-e\d{4}-", "-e0001-", word) for word in argv]
        small = SMALL.get(name.rpartition(".")[2], [])
        images = more if "--data_path" in argv else []
        run(*argv, *small, *images, main=import_module(name).main)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def channels_of(folder):
    """Run the timm export in a folder on images of its own number of channels; return that."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    channels = model.patch_embed.proj.in_channels
    assert model(torch.randn(2, channels, 16, 16)).isfinite().all()
    return channels


def test_bands_of_12_bits_go_from_pretraining_to_timm():
    run_all(commands_of("Satellite or microscope bands"))
    assert Path("output/cells-knn/knn.json").exists()
    rows = Path("output/cells.csv").read_text().splitlines()
    assert len(rows) == 1 + 8 and not any("error" in row for row in rows[1:])
    assert channels_of("output/cells-timm") == 5


def test_arrays_of_one_channel_go_from_pretraining_to_timm_and_hugging_face():
    run_all(commands_of("X-rays in .npy files"))
    assert Path("output/xrays-knn/knn.json").exists()
    assert channels_of("output/xrays-timm") == 1
    encoder = ViTModel.from_pretrained("output/xrays-hf", add_pooling_layer=False)
    assert encoder.config.num_channels == 1


def test_photographs_start_from_released_weights(images):
    model = build_model("crossmae_vit_tiny_patch4", {"img_size": [16, 16], "decoder_depth": 2})
    stored(Path("crossmae_pretrain.pth"), released(model))
    folders = ["--dataset", "folder", "--data_path", images]
    run_all(commands_of("Photographs, from ImageNet's weights"), folders)
    assert Path("output/cifar-knn/knn.json").exists()
    assert channels_of("output/cifar-timm") == 3
