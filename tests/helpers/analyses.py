"""Tiny checkpoints for the analysis scripts, their results, and what all of them refuse."""

import json
import re
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from PIL import Image

from models import load_model
from scripts.analysis import outputs
from tests.helpers.files import files_in, write_images
from tests.helpers.models import crossmae_nano, mae_nano, use_nano_models
from tests.helpers.runs import refusal, run
from tests.helpers.weights import pretrained, randomized, released, stored
from util.normalization import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

FACTORIES = {"crossmae": crossmae_nano, "mae": mae_nano}
QUICK = ["--num_workers", 0, "--device", "cpu"]

# Changed flags -> what the one sentence has to say. The capitals are places that `refuse` makes.
WRONG_INPUT = [
    ({"--checkpoint": "nowhere.pth"}, "checkpoint not found: nowhere.pth"),
    ({"--checkpoint": "NOTES"}, "notes.txt"),
    ({"--data_path": "nowhere"}, "nowhere does not exist"),
    ({"--data_path": "DAMAGED"}, "001.png"),
    ({"--num_images": 0}, "must be at least 1, not 0"),
    ({"--batch_size": 0}, "must be at least 1, not 0"),
    ({"--device": "abacus"}, "--device abacus"),
    ({"--seed": -1}, "must be at least 0, not -1"),
    ({"--picture": "a"}, "--picture"),
]
WRONG_MASKS = [
    ({"--mask_ratio": 1}, "must be strictly between 0 and 1"),
    ({"--mask_ratio": 0.99}, "none of 16 patches visible"),
]
WRONG_PICTURES = [
    ({"--images": "nowhere"}, "--images nowhere does not exist"),
    ({"--images": "EMPTY"}, "no images found in"),
    ({"--images": "NOTES"}, "cannot read image"),
    ({"--images": "DAMAGED"}, "DAMAGED/a/001.png"),
]
WRONG_FOLDER = [
    ({"--output_dir": "NOTES"}, "choose another --output_dir"),
    ({"--output_dir": "NOTES/inside"}, "choose another --output_dir"),
]


def flags_of(value):
    """Name a case of wrong input after its flags."""
    return " ".join(map(str, sum(value.items(), ()))) if isinstance(value, dict) else ""


def save_model(path, method="crossmae", *, header=None, **options):
    """Write a pre-training checkpoint of random weights, unlike any initialization's.

    Args:
        header: other content than a mask ratio of 0.75 and the colors of ImageNet.
    """
    torch.manual_seed(0)
    colors = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD)}
    model = randomized(FACTORIES[method](**options))
    return stored(path, {**pretrained(model, **options), **colors, **(header or {})})


def save_released(path, checkpoint):
    """Write the same model as the released code does."""
    return stored(path, released(load_model(checkpoint)[0]))


def flat(flags):
    """Words of a command line from {flag: value or list of values}."""
    values = {flag: v if isinstance(v, list) else [v] for flag, v in flags.items()}
    return [word for flag, own in values.items() for word in (flag, *own)]


def analyse(main, report, *argv, save=False):
    """Run an analysis with tiny models; return its report, printed lines, and figures by name.

    Args:
        save: also save the figures, which takes most of the time.
    """
    figures, save_figure = {}, outputs.save_figure

    def keep(figure, path, advice):
        figures[path.name] = figure
        if save:
            save_figure(figure, path, advice)

    with redirect_stdout(StringIO()) as out, pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        patch.setattr(outputs, "save_figure", keep)
        run(*argv, *QUICK, main=main)
    return read_strictly(report), [line[9:] for line in out.getvalue().splitlines()], figures


def analyse_checkpoint(main, name, folder, checkpoint, *argv, **options):
    """Run the analysis that writes NAME.json into a folder; see `analyse`."""
    argv = ["--checkpoint", checkpoint, "--output_dir", folder, *argv]
    return analyse(main, folder / f"{name}.json", *argv, **options)


def grid_of(figure):
    """Rows and columns of a figure."""
    return figure.axes[0].get_gridspec().get_geometry()


def read_strictly(path):
    """Read JSON that has no NaN and no infinity."""

    def refuse_constant(name):
        raise ValueError(f"{path} has {name}")

    return json.loads(path.read_text(), parse_constant=refuse_constant)


def numbers_in(lines, start):
    """Numbers of the table rows that start with a pattern."""
    rows = [(re.match(start, line), line) for line in lines]
    words = [line[found.end() :].split() for found, line in rows if found]
    return [[float(word) for word in own if not word.isalpha()] for own in words]


def pictures_in(folder):
    """Names of a folder's images, all of which can be decoded."""
    paths = sorted(folder.glob("*.png"))
    for path in paths:
        with Image.open(path) as image:
            image.load()
            assert min(image.size) > 100
    return [path.name for path in paths]


def refuse(tmp_path, capsys, main, argv, changes):
    """Return the sentence with which changed flags are refused, after nothing has been written.

    Args:
        argv: flags that work, with outputs in `tmp_path`.
    """
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    write_images(tmp_path / "DAMAGED" / "a", 3)
    damaged = tmp_path / "DAMAGED" / "a" / "001.png"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    places = {name: tmp_path / name for name in ("EMPTY", "DAMAGED")}
    places |= {"NOTES": tmp_path / "notes.txt", "NOTES/inside": tmp_path / "notes.txt" / "inside"}
    argv = argv | {flag: places.get(str(value), value) for flag, value in changes.items()}
    before = files_in(tmp_path)
    sentence = refusal(capsys, *QUICK, *flat(argv), main=main)
    assert files_in(tmp_path) == before
    return sentence


def hide_matplotlib(monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)


def assert_needs_matplotlib(monkeypatch, capsys, main, argv):
    """Assert that a script says what to install before it measures or writes anything."""

    def measure(*_, **__):
        raise AssertionError("measured without matplotlib")

    hide_matplotlib(monkeypatch)
    monkeypatch.setattr("scripts.analysis.inputs.masked_batches", measure)
    monkeypatch.setattr("scripts.analyse_features.extract_features", measure)
    sentence = refusal(capsys, *flat(argv), *QUICK, main=main)
    assert sentence == "matplotlib is missing: pip install -r requirements-figures.txt"
    assert not argv["--output_dir"].exists()


def assert_earlier_kept(folder, rerun):
    """Assert that another run renames every file of the last one."""
    before = files_in(folder)
    rerun()
    after = files_in(folder)
    assert len(after) == 2 * len(before)
    for name, content in before.items():
        stem, _, suffix = name.rpartition(".")
        (kept,) = (n for n in after if re.fullmatch(rf"{stem}-\d{{8}}-\d{{6}}\.{suffix}", n))
        assert after[kept] == content
