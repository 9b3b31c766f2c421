"""k-NN and few-shot measurements from the command line."""

import json
import re

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import main_knn
from models_vit import build_vit
from tests.helpers.files import write_images
from tests.helpers.models import NANO, use_nano_models
from tests.helpers.processes import NANO_MAIN, command, finish, start
from tests.helpers.runs import TINY, refusal, run
from util.data.batch import collate
from util.data.datasets import build_dataset
from util.data.transforms import eval_transform
from util.runs.checkpoint import list_checkpoints
from util.weights.encoder import load_encoder, read_encoder

QUICK = ["--num_workers", "0", "--amp", "fp32", "--device", "cpu"]
CLASSES = {"apple": 21, "bear": 25, "cup": 30}

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Class folders of 76 training images and 12 validation images."""
    folder = tmp_path_factory.mktemp("images")
    for number, (name, num_images) in enumerate(CLASSES.items(), start=3):
        write_images(folder / "train" / name, num_images)
        write_images(folder / "val" / name, number)
    return folder


@pytest.fixture(scope="session")
def weights(images, tmp_path_factory):
    """A pre-trained checkpoint, with a mean and size of its own."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        argv = [*TINY, "--data_path", images, "--lr", 1e-2, "--mean", 0.4, 0.5, 0.6]
        run(*argv, "--output_dir", folder)
    return list_checkpoints(folder)[-1]


def measure(folder, weights, *argv):
    """Run main_knn.py; return its report."""
    run(*QUICK, "--checkpoint", weights, "--output_dir", folder, *argv, main=main_knn.main)
    return json.loads((folder / "knn.json").read_text())


def test_layers_are_those_of_the_encoder(tmp_path, images, weights):
    reports = [
        measure(tmp_path / str(i), weights, "--data_path", images, "--k", 5, *options)
        for i, options in enumerate((["--layer", 2], [], ["--layer", 0, 1], ["--layer", 1]))
    ]
    assert [report["layers"] for report in reports] == [[2], [2], [0, 1], [1]]
    last, default, *_ = (report["results"] for report in reports)
    assert last == default


def test_saved_predictions_have_the_accuracies_of_the_report(tmp_path, images, weights):
    argv = ["--data_path", images, "--k", 5, 10, "--untrained", "--shots", 3]
    report = measure(tmp_path, weights, *argv, "--save_predictions")
    saved = np.load(tmp_path / "predictions.npz")
    assert saved["labels"].tolist() == [0] * 3 + [1] * 4 + [2] * 5
    names = {f"{name}, {by}" for name, column in report["results"].items() for by in column}
    assert set(saved) == {"labels", *names}
    for name, column in report["results"].items():
        for by, percent in column.items():
            is_right = saved[f"{name}, {by}"] == saved["labels"]
            assert 100 * is_right.mean() == pytest.approx(percent)


def test_digits_from_start_to_end(tmp_path, weights, capsys):
    report = measure(tmp_path, weights, "--untrained", "--shots", 5, "--k", 10, 5000)
    rows = ["10-NN", "5000-NN"]
    rows += ["logistic regression, all images", "logistic regression, 5 per class"]
    assert {name: list(column) for name, column in report["results"].items()} == {
        "pre-trained": rows,
        "untrained": rows,
    }
    assert report["num_images"] == {"training": 1437, "validation": 360}
    assert report["num_classes"] == 10
    assert report["weights"] == report["args"]["checkpoint"] == str(weights)
    assert report["model"] == "vit_tiny_patch4"
    assert {"commit", "python", "torch", "torchvision", "timm"} < set(report["versions"])
    for column in report["results"].values():
        assert column["10-NN"] > 40  # 10 by chance
        few, all_images = column[rows[3]], column[rows[2]]
        assert 10 < few < all_images

    out = capsys.readouterr().out
    lines = [line[9:] for line in out.splitlines()]  # behind the time
    (header,) = (i for i, line in enumerate(lines) if line.split() == ["pre-trained", "untrained"])
    for line, row in zip(lines[header + 1 : header + 5], rows, strict=True):
        numbers = [f"{column[row]:.2f}" for column in report["results"].values()]
        assert re.fullmatch(rf"{row} +{numbers[0]} +{numbers[1]}", line)
    assert "k = 5000 reduced to 1437" in out


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_numbers_are_those_of_the_encoder_loaded_and_at_its_start(tmp_path, images, weights, pool):
    argv = ["--data_path", images, "--pool", pool, "--k", 1, 7, "--temperature", 0.5]
    argv += ["--seed", 3, "--crop_pct", 1, "--no-logistic"]
    report = measure(tmp_path / "beside", weights, *argv, "--untrained")
    assert report["mean"] == [0.4, 0.5, 0.6]
    assert report["input_size"] == [16, 16]
    transform = eval_transform((16, 16), report["mean"], report["std"])
    torch.manual_seed(3)
    untrained, pretrained = (build_vit(NANO, num_classes=0, pool=pool).eval() for _ in range(2))
    load_encoder(pretrained, read_encoder(weights), head=False)

    def features_of(split, model):
        samples = build_dataset("folder", images, split=split, transform=transform, seed=0)
        batch = collate([samples[0, i] for i in range(len(samples))])
        pixels, labels = batch.to(torch.device("cpu"))
        with torch.no_grad():
            features = model(pixels)
        return features.double(), labels.tolist()

    for name, model in {"pre-trained": pretrained, "untrained": untrained}.items():
        for k in (1, 7):
            oracle = KNeighborsClassifier(
                k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.5)
            ).fit(*features_of("train", model))
            expected = 100 * oracle.score(*features_of("validation", model))
            assert report["results"][name][f"{k}-NN"] == pytest.approx(expected)
    alone = measure(tmp_path / "alone", weights, *argv)
    assert alone["results"] == {"pre-trained": report["results"]["pre-trained"]}


def test_given_sizes_and_colors_come_before_those_of_the_weights(tmp_path, images, weights):
    colors = ["--mean", 0, 0, 0, "--std", 1, 1, 1]
    argv = ["--data_path", images, "--input_size", 24, 20, *colors, "--crop_pct", 0.5]
    report = measure(tmp_path, weights, *argv, "--attention_backend", "math")
    assert report["input_size"] == [24, 20]
    assert (report["mean"], report["std"]) == ([0, 0, 0], [1, 1, 1])
    assert report["crop_pct"] == 0.5


def test_val_images_from_elsewhere(tmp_path, images, weights):
    paths = ["--data_path", images / "train", "--val_path", images / "val"]
    elsewhere = measure(tmp_path / "elsewhere", weights, *paths)
    together = measure(tmp_path / "together", weights, "--data_path", images)
    assert elsewhere["num_images"] == {"training": 76, "validation": 12}
    assert elsewhere["results"] == together["results"]


def test_an_earlier_report_is_kept(tmp_path, images, weights):
    for k in (3, 4):
        measure(tmp_path, weights, "--data_path", images, "--no-logistic", "--k", k)
    (earlier,) = tmp_path.glob("knn-*.json")
    reports = [json.loads(path.read_text()) for path in (earlier, tmp_path / "knn.json")]
    assert [list(report["results"]["pre-trained"]) for report in reports] == [["3-NN"], ["4-NN"]]
    assert not list(tmp_path.glob("*.tmp"))


# Command-line options -> what the one sentence has to say.
REFUSED = {
    "--data_path IMAGES/train": "no validation images",
    "--val_path OTHER": "dog",
    "--data_path UNSORTED --val_path IMAGES/val": "no labels",
    "--dataset wds/a.tar --num_samples 9": "stream",
    "--crop_pct 0": "must be between 0.1 and 1, not 0",
    "--crop_pct 2": "--crop_pct",
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.items(), ids=REFUSED.keys())
def test_wrong_input_is_refused_in_one_sentence(tmp_path, images, weights, capsys, options, reason):
    write_images(tmp_path / "other" / "apple", 2)
    write_images(tmp_path / "other" / "dog", 3)
    unsorted = write_images(tmp_path / "unsorted", 4)
    file = tmp_path / "file"
    file.write_text("mine")
    places = {"IMAGES": images, "OTHER": tmp_path / "other", "UNSORTED": unsorted, "FILE": file}
    for word, place in places.items():
        options = options.replace(word, str(place))
    argv = ["--finetune", weights, "--data_path", images, "--output_dir", tmp_path / "run"]
    sentence = refusal(capsys, *QUICK, *argv, *options.split(), main=main_knn.main)
    assert reason in sentence
    assert not (tmp_path / "run").exists()
    assert file.read_text() == "mine"


def test_weights_have_to_be_named(capsys):
    assert "--finetune" in refusal(capsys, main=main_knn.main)


@pytest.mark.faults
def test_broken_images_are_limited(tmp_path, images, weights, capsys):
    folder = tmp_path / "images"
    for name in CLASSES:
        write_images(folder / "train" / name, 5)
        write_images(folder / "val" / name, 4)
    (folder / "val" / "cup" / "001.png").write_bytes(b"")
    argv = ["--data_path", folder, "--k", 3, "--no-logistic"]
    sentence = refusal(
        capsys,
        *QUICK,
        "--finetune",
        weights,
        "--output_dir",
        tmp_path / "run",
        *argv,
        main=main_knn.main,
    )
    assert "1 of 12 images (8.33%) cannot be read" in sentence
    report = measure(tmp_path / "run", weights, *argv, "--max_broken", 0.1)
    assert report["num_images"]["validation"] == 12
    assert "cup/001.png" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path, images, weights):
    options = ["--data_path", images, "--untrained", "--shots", 3, "--batch_size", 8]
    argv = [*QUICK, "--finetune", weights, "--output_dir", tmp_path / "two", *options]
    process = start(command(NANO_MAIN, "knn", *argv, processes=2))
    one = measure(tmp_path / "one", weights, *options)
    code, out, err = finish(process)
    assert code == 0, out + err
    two = json.loads((tmp_path / "two" / "knn.json").read_text())
    assert two["results"] == one["results"]
    assert two["num_images"] == one["num_images"]
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == ["args.json", "knn.json"]
    assert out.count("10-NN") == 1
