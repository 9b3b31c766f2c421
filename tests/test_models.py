"""Classifiers are loaded from any file with a head, ready to evaluate."""

import pytest
import torch

from models import load_classifier
from models_vit import make_probe
from tests.helpers.models import crossmae_nano, use_nano_models
from tests.helpers.weights import (
    finetuned,
    images,
    pretrained,
    randomized,
    stored,
    timm_nano,
    vit_nano,
)
from util.errors import InputError


@pytest.fixture(autouse=True)
def _nano(monkeypatch):
    use_nano_models(monkeypatch)


def probe_nano():
    model = vit_nano(pool="avg")
    make_probe(model, 3)
    return randomized(model)


CLASSIFIERS = {
    "avg": lambda: finetuned(vit_nano(pool="avg", num_classes=3), classes=["a", "b", "c"]),
    "cls": lambda: finetuned(vit_nano(pool="cls", num_classes=3)),
    "linear probe": lambda: finetuned(probe_nano(), kind="linprobe"),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_loaded_with_its_head_and_input(tmp_path, name):
    content = CLASSIFIERS[name]()
    model, start = load_classifier(stored(tmp_path / "classifier.pth", content))
    assert not model.training
    assert list(model.state_dict()) == list(content["model"])
    assert all(torch.equal(content["model"][n], t) for n, t in model.state_dict().items())
    assert start.weights.classes == content["classes"]
    assert start.input_format == ((16, 16), content["mean"], content["std"])


def test_a_classifier_of_timms_gives_timms_logits(tmp_path):
    theirs = timm_nano(num_classes=3)
    model, _ = load_classifier(stored(tmp_path / "timm.pth", theirs.state_dict()))
    x = images()
    torch.testing.assert_close(model(x), theirs(x))


def test_the_input_of_a_classifier_may_be_chosen(tmp_path):
    path = stored(tmp_path / "classifier.pth", CLASSIFIERS["avg"]())
    mean, std = [0.2] * 3, [0.3] * 3
    model, start = load_classifier(path, img_size=[24, 32], mean=mean, std=std)
    assert start.input_format == ((24, 32), mean, std)
    assert model(images(2, 24, 32)).shape == (2, 3)


def test_what_is_no_classifier_is_refused(tmp_path):
    path = stored(tmp_path / "pretrained.pth", pretrained(crossmae_nano()))
    with pytest.raises(InputError, match=r"pretrained\.pth has no head: fine-tune it"):
        load_classifier(path)
    path = stored(tmp_path / "classifier.pth", CLASSIFIERS["avg"]())
    with pytest.raises(InputError, match="lacks norm"):
        load_classifier(path, pool="cls")
