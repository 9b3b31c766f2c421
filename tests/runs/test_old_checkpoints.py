"""Checkpoints that commit 1db5dff wrote after one of two epochs, one per training main.

They contain what a rewrite could break silently: the names and order of parameters, which saved
optimizers refer to by index, and the settings by which a run is recognized.
"""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest

import main_finetune
import main_linprobe
import main_pretrain
import models
from models_crossmae import build_crossmae
from models_mae import build_mae
from tests.helpers.files import write_classes, write_images
from tests.helpers.processes import ROOT
from tests.helpers.runs import run
from tests.helpers.versions import same_bernoulli
from util.data.transforms import probe_transform
from util.runs.epoch_log import read_log
from util.settings import model as model_settings
from util.settings.model import ModelSize

GOLDEN = ROOT / "tests" / "golden"
LOSSES = json.loads((GOLDEN / "losses_1db5dff.json").read_text())
PICO = ModelSize(4, 8, 2, 2, img_size=16)
DECODER = {"decoder_embed_dim": 8, "decoder_depth": 2, "decoder_num_heads": 2}
COMMON = ["--epochs", 2, "--batch_size", 8, "--num_workers", 0, "--amp", "fp32", "--device", "cpu"]
COMMON += ["--save_every", 1, "--keep_last", 0, "--lr", 0.01, "--warmup_epochs", 0]
PRETRAIN = ["--input_size", 16, *COMMON]
CLASSIFY = ["--model", "vit_tiny_patch4", *COMMON]
RUNS = {
    "pretrain": ["--model", "crossmae_vit_tiny_patch4", "--pred_ratio", 0.25, *PRETRAIN],
    "pretrain_ablations": [
        *("--model", "crossmae_vit_tiny_patch4", "--decoder_self_attention"),
        *("--feature_maps", "last", *PRETRAIN),
    ],
    "pretrain_mae": ["--model", "mae_vit_tiny_patch4", "--feature_maps", "all", *PRETRAIN],
    "finetune": ["--ema", 0.9, *CLASSIFY],
    "linprobe": CLASSIFY,
}
MAINS = {"finetune": main_finetune, "linprobe": main_linprobe}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_images(root / "images" / "train", 40)
    write_images(root / "images" / "val", 6)
    return {"images": root / "images", "classes": write_classes(root / "classes")}


@pytest.fixture
def pico(monkeypatch):
    for kind, build in (("crossmae", build_crossmae), ("mae", build_mae)):
        name = f"{kind}_vit_tiny_patch4"
        monkeypatch.setitem(models.MODELS, name, partial(build, PICO, **DECODER))
    monkeypatch.setitem(model_settings.SIZES, "tiny_patch4", PICO)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=same_bernoulli if name == "finetune" else []) for name in RUNS],
)
def test_a_run_of_an_old_version_continues_as_it_would_have_there(
    name, data, pico, tmp_path, monkeypatch
):
    # Its linear probes cropped as pre-training does.
    monkeypatch.setattr(
        main_linprobe,
        "probe_transform",
        lambda *form, **how: replace(probe_transform(*form, **how), clip=False),
    )
    shutil.copy(GOLDEN / f"{name}.pth", tmp_path / "checkpoint-e0001-s000000.pth")
    main = MAINS.get(name, main_pretrain)
    images = data["classes" if name in MAINS else "images"]
    run("--data_path", images, *RUNS[name], "--output_dir", tmp_path, main=main.main)
    (line,) = read_log(tmp_path)
    assert line["epoch"] == 2
    assert line["loss"] == pytest.approx(LOSSES[name][1], rel=1e-3)


def test_an_old_probe_that_continues_with_other_crops_says_so(data, pico, tmp_path, capsys):
    shutil.copy(GOLDEN / "linprobe.pth", tmp_path / "checkpoint-e0001-s000000.pth")
    argv = ["--data_path", data["classes"], *RUNS["linprobe"], "--output_dir", tmp_path]
    run(*argv, main=main_linprobe.main)
    changes = "random crops was None and is now 'drawn once and clipped'"
    assert f"continuing with a change: {changes}" in capsys.readouterr().out
    run(*argv, main=main_linprobe.main)
    assert "random crops was" not in capsys.readouterr().out
