"""docs/extending.md stays true: every section's code works in a copy of the repository."""

import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest

from tests.helpers.files import write_images
from tests.helpers.processes import ROOT, command, finish, start

TEXT = (ROOT / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.+?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
BLOCK = re.compile(r"^```(python|diff|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MAIN = ["--epochs", 1, "--batch_size", 8, "--num_workers", 0, "--amp", "fp32", "--device", "cpu"]
PRETRAIN = ["--model", "crossmae_vit_tiny_patch4", "--input_size", 16, "--decoder_depth", 1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 16)


@pytest.fixture
def copy(tmp_path):
    """The tracked files, where a section may change them."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        if name.endswith(".py") or name == "pyproject.toml":
            place = tmp_path / "copy" / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, place)
    return tmp_path / "copy"


def apply(section, copy):
    """Write a section's files, and change others as it says; return its commands."""
    commands = []
    for kind, block in BLOCK.findall(SECTIONS[section]):
        head, _, body = block.partition("\n")
        if kind == "bash":
            commands += block.splitlines()
        elif kind == "python":
            (copy / head.removeprefix("# ")).write_text(body)
        else:
            change(copy / head.removeprefix("# "), body)
    return [shlex.split(line) for line in commands]


def change(path, text):
    """Put the new lines of every hunk into the place of its old ones."""
    content = path.read_text()
    for hunk in text.split("@@\n"):
        lines = [line or " " for line in hunk.splitlines()]
        old, new = (
            "".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in (" -", " +")
        )
        assert content.count(old) == 1, (
            f"{path.name} has these lines {content.count(old)} times:\n{old}"
        )
        content = content.replace(old, new)
    path.write_text(content)


def run_in(copy, words, *options, images=None):
    """Run a command of a section in the copy; return its exit code, output and errors."""
    names = {"python": command()[0], "IMAGES": images, "ARRAYS": copy / "arrays"}
    words = [str(names.get(word, word)) for word in (*words, *options)]
    return finish(start(words, cwd=copy))


def succeeds(*args, **options):
    code, out, err = run_in(*args, **options)
    assert code == 0, out + err
    return out


def test_a_decoder(copy, images):
    test, train = apply("A decoder", copy)
    succeeds(copy, test)
    options = [*MAIN, "--input_size", 16, "--decoder_depth", 1, "--memory", "low"]
    assert "checkpoint:" in succeeds(copy, train, *options, images=images)


def test_a_dataset(copy):
    (train,) = apply("A dataset", copy)
    (copy / "arrays").mkdir()
    for split, count in (("train", 16), ("validation", 8)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
        np.savez(copy / "arrays" / split, images=pixels, labels=np.arange(count) % 2)
    out = succeeds(copy, train, *MAIN, *PRETRAIN)
    assert "images   16 for training, 8 for validation" in out
    assert "k-NN" in out


def test_a_way_of_masking(copy, images):
    test, train = apply("A way of masking", copy)
    assert "passed" in succeeds(copy, test)
    succeeds(copy, train, *MAIN, *PRETRAIN, images=images)


def test_an_option(copy, images):
    before = ["python", "main_pretrain.py", "--data_path", "IMAGES", *MAIN, *PRETRAIN]
    succeeds(copy, before, images=images)
    (changed,) = apply("An option", copy)
    out = succeeds(copy, before, "--epochs", 2, images=images)
    assert "after 1 epoch and 0 steps" in out
    code, _, err = run_in(copy, changed, *MAIN, *PRETRAIN, "--epochs", 2, images=images)
    assert code == 2
    assert "--loss was 'mse' and is now 'l1'" in err
    succeeds(copy, changed, *MAIN, *PRETRAIN, "--output_dir", "other", images=images)


def test_a_task(copy, images):
    train, launch = apply("A task", copy)
    options = ["--input_size", 16, *MAIN]
    succeeds(copy, train, *options, images=images)
    assert "nothing is left to train" in succeeds(copy, launch, *options, images=images)
