"""Predictions of a folder of images: every image has its row, whatever else is read with it."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from models import build_classifier, load_classifier
from models_vit import make_probe
from scripts import predict
from tests.helpers.files import write_images
from tests.helpers.models import crossmae_nano
from tests.helpers.runs import refusal, run
from tests.helpers.weights import (
    attentive_probe,
    finetuned,
    pretrained,
    randomized,
    stored,
    timm_nano,
    vit_nano,
)
from util.data.decode import read_pixels
from util.data.transforms import eval_transform
from util.weights.encoder import load_encoder, read_encoder

pytestmark = pytest.mark.usefixtures("nano")

CLASSES = ["apple, red", "bär", "cup"]
BROKEN = "broken.jpg"
QUICK = ["--num_workers", 0, "--amp", "fp32", "--device", "cpu"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images in nested folders, one of them broken, and files that are no images."""
    folder = write_images(tmp_path_factory.mktemp("images"), 5, size=24)
    write_images(folder / "nested" / "ü deep", 2, size=31)
    Image.open(folder / "000.png").save(folder / "000.jpg")
    (folder / BROKEN).write_bytes(b"not an image")
    write_images(folder / ".hidden", 1)
    (folder / "notes.txt").write_text("")
    return folder


NAMES = ["000.jpg", *(f"{n:03d}.png" for n in range(5)), BROKEN]
NAMES += [f"nested/ü deep/{n:03d}.png" for n in range(2)]
GOOD = [n != BROKEN for n in NAMES]


def classifier(**header):
    content = finetuned(vit_nano(pool="avg", num_classes=3), classes=CLASSES)
    return {**content, "crop_pct": 0.8, **header}


@pytest.fixture
def checkpoint(tmp_path):
    return stored(tmp_path / "classifier.pth", classifier())


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predicted(checkpoint, images, *options):
    """The table of predictions."""
    path = checkpoint.with_name("predictions.csv")
    argv = ["--checkpoint", checkpoint, "--images", images, "--output", path, *QUICK, *options]
    run(*argv, main=predict.main)
    return rows(path)


def pixels(images, transform):
    """The images that can be read, normalized, one by one: (1, 3, H, W)."""
    paths = [images / name for name, good in zip(NAMES, GOOD, strict=True) if good]
    for path in paths:
        with path.open("rb") as file:
            crops = transform(read_pixels(file))
        yield crops.normalization(crops.pixels[0].unsqueeze(0))


@torch.no_grad()
def outputs_of(checkpoint, images, **how):
    """The classifier's outputs for the images that can be read, (N, outputs)."""
    model, start = load_classifier(checkpoint)
    transform = eval_transform(*start.input_format, 0.8, **how)
    return torch.cat([model(x) for x in pixels(images, transform)])


def test_scores_are_those_of_the_classifier_as_it_is_evaluated(checkpoint, images):
    table = predicted(checkpoint, images, "--top", 2)
    assert list(table[0]) == ["path", "class", "score", "class_2", "score_2", "error"]
    assert [row["path"] for row in table] == NAMES
    good = [row for row in table if not row["error"]]
    best = outputs_of(checkpoint, images).softmax(dim=1).topk(2)
    for row, scores, labels in zip(good, best.values, best.indices, strict=True):
        assert [row["class"], row["class_2"]] == [CLASSES[i] for i in labels]
        got = [float(row["score"]), float(row["score_2"])]
        assert got == pytest.approx(scores.tolist(), rel=1e-4)


def test_a_broken_image_keeps_its_row_and_is_named(checkpoint, images, capsys):
    table = predicted(checkpoint, images)
    (broken,) = (row for row in table if row["error"])
    assert (broken["path"], broken["class"], broken["score_3"]) == (BROKEN, "", "")
    out = capsys.readouterr().out
    assert f"Broken image: {BROKEN} ({broken['error']})" in out
    assert "wrote 9 rows to" in out and "1 broken image among them" in out


@pytest.mark.parametrize("options", [["--batch_size", 2], ["--batch_size", 4, "--num_workers", 2]])
def test_rows_do_not_depend_on_how_images_are_loaded(checkpoint, images, tmp_path, options):
    results = []
    for number, own in enumerate(([], options)):
        path = tmp_path / f"{number}.csv"
        argv = ["--checkpoint", checkpoint, "--images", images, "--output", path, *QUICK, *own]
        run(*argv, "--features", path.with_suffix(".npy"), main=predict.main)
        results.append((rows(path), np.load(path.with_suffix(".npy"))))
    (expected, features), (table, others) = results
    np.testing.assert_allclose(others, features, rtol=1e-4, atol=1e-5)
    for row, other in zip(expected, table, strict=True):
        assert [row[key] for key in ("path", "class", "error")] == [
            other[key] for key in ("path", "class", "error")
        ]
        assert not row["score"] or float(other["score"]) == pytest.approx(float(row["score"]), 1e-3)


def test_several_labels_have_probabilities_of_their_own(tmp_path, images):
    path = stored(tmp_path / "multilabel.pth", classifier(task="multilabel"))
    table = predicted(path, images)
    scores = outputs_of(path, images).sigmoid().sort(dim=1, descending=True).values
    good = [row for row in table if not row["error"]]
    for row, own in zip(good, scores.tolist(), strict=True):
        keys = ("score", "score_2", "score_3")
        assert [float(row[key]) for key in keys] == pytest.approx(own, 1e-4)


def test_a_regression_gives_values_in_the_unit_of_its_targets(tmp_path, images):
    model = vit_nano(pool="avg", num_classes=1)
    content = {**finetuned(model), "task": "regression", "target_scale": [30.0, 5.0]}
    content["model_options"]["num_classes"] = 1
    path = stored(tmp_path / "regressor.pth", {**content, "crop_pct": 0.8})
    table = predicted(path, images)
    assert list(table[0]) == ["path", "value", "error"]
    values = 30 + 5 * outputs_of(path, images)[:, 0]
    got = [float(row["value"]) for row in table if not row["error"]]
    assert got == pytest.approx(values.tolist(), rel=1e-4)


def test_images_are_squeezed_as_the_file_says(tmp_path, images):
    path = stored(tmp_path / "squashed.pth", classifier(squash=True, interpolation="bilinear"))
    scores = [float(row["score"]) for row in predicted(path, images) if not row["error"]]
    how = {"squash": True, "interpolation": "bilinear"}
    expected = outputs_of(path, images, **how).softmax(dim=1).amax(dim=1)
    assert scores == pytest.approx(expected.tolist(), rel=1e-4)


def test_classes_without_names_are_numbers(tmp_path, images):
    table = predicted(stored(tmp_path / "timm.pth", timm_nano(num_classes=3).state_dict()), images)
    assert {row["class"] for row in table} <= {"0", "1", "2", ""}
    assert "score_3" in table[0] and "score_4" not in table[0]  # there are no five


def test_a_linear_probe_predicts(tmp_path, images):
    model = vit_nano(pool="avg")
    make_probe(model, 3)
    path = stored(tmp_path / "probe.pth", finetuned(randomized(model), kind="linprobe"))
    assert len(predicted(path, images)) == len(NAMES)


@pytest.mark.parametrize("layers", [None, [1], [0, 2]], ids=str)
def test_an_attentive_probe_predicts_from_its_own_blocks(tmp_path, images, layers):
    path = stored(tmp_path / "probe.pth", attentive_probe(layers=layers))
    model, _ = load_classifier(path)
    assert model.layers == (layers or [2]) and model.attn_pool.queries.shape == (4, 32)
    scores = [float(row["score"]) for row in predicted(path, images) if not row["error"]]
    assert len(scores) == sum(GOOD)

    features, _ = write_features(path, images)
    transform = eval_transform((16, 16), [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], 0.875)
    with torch.no_grad():
        expected = torch.cat([model.features(x) for x in pixels(images, transform)])
        best = torch.cat([model(x) for x in pixels(images, transform)]).softmax(dim=1).amax(dim=1)
    np.testing.assert_allclose(features[GOOD], expected, rtol=1e-4, atol=1e-5)
    assert scores == pytest.approx(best.tolist(), rel=1e-4)


def test_a_head_on_learned_queries_is_not_applied_to_other_features(tmp_path, images, capsys):
    path = stored(tmp_path / "probe.pth", attentive_probe())
    argv = ["--checkpoint", path, "--images", images, "--output", tmp_path / "x.csv", *QUICK]
    sentence = refusal(capsys, *argv, "--pool", "norm_avg", main=predict.main)
    assert sentence.endswith("reads learned queries: leave out --pool")


# Features


@torch.no_grad()
def features_of(path, images, *, pool="avg"):
    """Features of the encoder for the images that can be read, by hand."""
    weights = read_encoder(path)
    model = build_classifier("tiny_patch4", img_size=(16, 16), num_classes=0, pool=pool)
    load_encoder(model.eval(), weights, head=False)
    transform = eval_transform((16, 16), weights.mean, weights.std, weights.crop_pct or 224 / 256)
    return torch.cat([model(x) for x in pixels(images, transform)])


def write_features(path, images, *options):
    output = path.with_name("features.npy")
    argv = ["--checkpoint", path, "--images", images, "--features", output, *QUICK, *options]
    run(*argv, main=predict.main)
    return np.load(output), rows(output.with_suffix(".csv"))


@pytest.mark.parametrize("kind", ["pre-trained", "fine-tuned"])
def test_features_need_no_head(tmp_path, images, kind):
    content = pretrained(crossmae_nano()) if kind == "pre-trained" else classifier()
    path = stored(tmp_path / "weights.pth", content)
    features, table = write_features(path, images)
    assert features.dtype == np.float32 and features.shape == (len(NAMES), 32)
    np.testing.assert_allclose(features[GOOD], features_of(path, images), rtol=1e-4, atol=1e-5)
    assert np.isnan(features[NAMES.index(BROKEN)]).all()
    assert [row["path"] for row in table] == NAMES
    assert list(table[0]) == ["path", "error"]


def test_features_may_be_of_the_class_token(tmp_path, images):
    path = stored(tmp_path / "weights.pth", pretrained(crossmae_nano()))
    features, _ = write_features(path, images, "--pool", "cls")
    expected = features_of(path, images, pool="cls")
    np.testing.assert_allclose(features[GOOD], expected, rtol=1e-4, atol=1e-5)


# What is refused


def refused(capsys, checkpoint, images, *options):
    argv = ["--checkpoint", checkpoint, "--images", images, *options, *QUICK]
    return refusal(capsys, *argv, main=predict.main)


def test_existing_results_are_kept(checkpoint, images, tmp_path, capsys):
    for name in ("a.csv", "b.npy"):
        (tmp_path / name).write_text("mine")
    output, features = (["--output", tmp_path / "a.csv"], ["--features", tmp_path / "b.npy"])
    assert "choose another --output" in refused(capsys, checkpoint, images, *output)
    assert "choose another --features" in refused(capsys, checkpoint, images, *features)
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.npy").read_text() == "mine"
    assert not (tmp_path / "b.csv").exists()


def test_a_checkpoint_without_a_head_predicts_nothing(images, tmp_path, capsys):
    path = stored(tmp_path / "weights.pth", pretrained(crossmae_nano()))
    sentence = refused(capsys, path, images, "--output", tmp_path / "a.csv")
    assert "has no head" in sentence


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to write: give --output, --features or both"),
        (["--features", "features.csv"], "give it the suffix .npy"),
        (["--output", "a.npy", "--features", "a.npy"], "are both a.npy"),
        (["--output", "nowhere/a.csv"], "cannot write --output nowhere"),
    ],
)
def test_outputs_that_make_no_sense_are_refused(checkpoint, images, capsys, options, message):
    assert message in refused(capsys, checkpoint, images, *options)


def test_a_folder_without_readable_images_is_refused(checkpoint, tmp_path, capsys):
    output = ["--output", tmp_path / "a.csv"]
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "a.png").write_bytes(b"")
    assert "is not a folder" in refused(capsys, checkpoint, tmp_path / "none", *output)
    assert "no images found" in refused(capsys, checkpoint, empty, *output)
    assert "none of the images" in refused(capsys, checkpoint, broken, *output)
    assert not (tmp_path / "a.csv").exists()


def test_results_that_are_not_finite_are_refused(images, tmp_path, capsys):
    content = classifier()
    content["model"]["fc_norm.weight"] = torch.full((32,), 3e38)
    path = stored(tmp_path / "large.pth", content)
    sentence = refused(capsys, path, images, "--output", tmp_path / "a.csv")
    assert "results computed in fp32 are not finite" in sentence
    assert [p.name for p in tmp_path.iterdir()] == ["large.pth"]


def test_several_processes_are_refused(checkpoint, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(predict, "world_size", lambda: 2)
    assert "use python" in refused(capsys, checkpoint, images, "--output", tmp_path / "a.csv")
