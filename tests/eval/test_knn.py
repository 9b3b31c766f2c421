"""Features of a whole dataset, and k-NN and few-shot regression compared with scikit-learn."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.helpers.files import write_images
from util.compute.precision import Precision
from util.data.batch import Batch, collate
from util.data.broken_images import BrokenImages
from util.data.datasets import open_train_val
from util.data.images import IndexedImages
from util.data.loaders import build_eval_loader
from util.data.sources import Digits
from util.data.transforms import eval_transform
from util.errors import InputError
from util.eval import frozen_features, knn
from util.eval.frozen_features import draw_shots, logistic_predict
from util.eval.knn import (
    build_knn_loaders,
    describe_knn,
    extract_features,
    knn_accuracy,
    knn_predict,
    measure_knn,
    not_learning,
    percent_equal,
)
from util.settings.data import DataSettings

CPU = torch.device("cpu")
FP32 = Precision("fp32", CPU)


def digits():
    """Training and validation features and labels: real images of 64 pixels."""
    pixels, labels = load_digits(return_X_y=True)
    features, labels = torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels)
    return features[:1200], labels[:1200], features[1200:], labels[1200:]


def gaussians(dim=16, num_classes=5):
    """Overlapping classes around random centers, with gaps between the labels."""
    labels = torch.randint(num_classes, (400,))
    centers = torch.randn(num_classes, dim)
    features = centers[labels] + 1.5 * torch.randn(400, dim)
    return features[:300], 3 * labels[:300] + 1, features[300:], 3 * labels[300:] + 1


# k nearest neighbors


@pytest.mark.parametrize("data", [digits, gaussians])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("similarities_at_once", [1, 30_000, 2**26])
def test_knn_equals_scikit_learns(monkeypatch, data, temperature, similarities_at_once):
    train_features, train_labels, features, labels = data()
    if similarities_at_once == 1:  # image by image
        features, labels = features[:50], labels[:50]
    monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", similarities_at_once)
    ks = (1, 10, 20, 100)
    sets = (train_features, train_labels, features)
    predicted = knn_predict(*sets, ks=ks, temperature=temperature, device=CPU)
    accuracy = knn_accuracy(*sets, labels, ks=ks, temperature=temperature, device=CPU)
    assert tuple(predicted) == tuple(accuracy) == ks
    for k in ks:
        oracle = KNeighborsClassifier(
            n_neighbors=k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature)
        ).fit(train_features.double(), train_labels)
        assert predicted[k].tolist() == oracle.predict(features.double()).tolist()
        assert accuracy[k] == pytest.approx(100 * oracle.score(features.double(), labels))


def test_more_neighbors_than_images_are_all_images():
    train_features, train_labels, features, _ = gaussians()
    sets = (train_features, train_labels, features)
    predicted = knn_predict(*sets, ks=(300, 1000), temperature=0.07, device=CPU)
    assert torch.equal(predicted[1000], predicted[300])


def test_equal_votes_go_to_the_smallest_label():
    train_features = torch.eye(3)
    guess = knn_predict(
        train_features, torch.tensor([7, 2, 5]), torch.ones(1, 3), ks=[3], temperature=1, device=CPU
    )
    assert guess[3].tolist() == [2]


def test_low_temperatures_use_only_the_nearest():
    train_features, train_labels, features, _ = digits()
    options = {"temperature": 1e-9, "device": CPU}  # exp(1 / 1e-9) would be infinite
    predicted = knn_predict(train_features, train_labels, features, ks=(1, 20), **options)
    assert torch.equal(predicted[20], predicted[1])


def test_the_precision_of_products_is_float32_and_stays_as_it_was(monkeypatch):
    seen = []
    topk = torch.Tensor.topk

    def spy(self, k):
        seen.append((self.dtype, torch.get_float32_matmul_precision()))
        return topk(self, k)

    monkeypatch.setattr(torch.Tensor, "topk", spy)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        knn_accuracy(*gaussians(), device=CPU)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [(torch.float32, "highest")]


# Logistic regression


def logistic_accuracy(train_features, train_labels, features, labels, **options):
    guesses = logistic_predict(train_features, train_labels, features, **options)
    return percent_equal(guesses, labels)


def oracle_accuracy(train_features, train_labels, features, labels):
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return 100 * pipeline.fit(train_features, train_labels).score(features, labels)


def test_logistic_regression_equals_scikit_learns():
    sets = digits()
    accuracy = logistic_accuracy(*sets, shots=None, seed=0)
    assert accuracy == pytest.approx(oracle_accuracy(*sets), abs=0.4)  # two of 597 images
    assert accuracy > 85


def test_shots_see_only_the_images_drawn():
    train_features, train_labels, *held_out = digits()
    chosen = draw_shots(train_labels, 5, seed=3)
    accuracy = logistic_accuracy(train_features, train_labels, *held_out, shots=5, seed=3)
    expected = oracle_accuracy(train_features[chosen], train_labels[chosen], *held_out)
    assert accuracy == pytest.approx(expected, abs=0.4)
    assert accuracy < logistic_accuracy(train_features, train_labels, *held_out, shots=None, seed=3)


@pytest.mark.parametrize("shots", [1, 5, 20])
def test_shots_are_equally_many_of_each_class(shots):
    labels = digits()[1]
    chosen = draw_shots(labels, shots, seed=0)
    assert labels[chosen].bincount().tolist() == [shots] * 10
    assert len(chosen.unique()) == len(chosen)
    assert set(chosen.tolist()) <= set(draw_shots(labels, shots + 1, seed=0).tolist())
    assert torch.equal(chosen, draw_shots(labels, shots, seed=0))
    assert not torch.equal(chosen, draw_shots(labels, shots, seed=1))


def test_a_class_with_too_few_images_gives_all_and_is_logged(caplog):
    chosen = draw_shots(torch.tensor([4, 0, 4, 4, 0, 9]), 2, seed=0)
    assert torch.tensor([4, 0, 4, 4, 0, 9])[chosen].tolist() == [0, 0, 4, 4, 9]
    assert "2-shot: 1 of the classes have fewer images" in caplog.text


def test_a_regression_that_does_not_converge_is_logged(monkeypatch, caplog, recwarn):
    monkeypatch.setattr(frozen_features, "MAX_ITER", 2)
    logistic_accuracy(*gaussians(), shots=None, seed=0)
    assert "did not converge in 2 iterations" in caplog.text
    assert not recwarn.list


# Features


def encode(images):
    return images.mean(dim=1).flatten(1)  # (B, 16 * 16)


def digits_loader(num_images, rank=0, world_size=1):
    """Loader of one process's part of the first validation digits."""
    transform = eval_transform((16, 16), [0.5] * 3, [0.25] * 3)
    dataset = IndexedImages(Digits("validation"), transform, seed=0)
    dataset.num_samples = num_images
    place = {"rank": rank, "world_size": world_size}
    return build_eval_loader(dataset, batch_size=4, num_workers=0, device=CPU, **place)


def extract(loader, *, encode=encode, precision=FP32, max_broken=1.0):
    broken = BrokenImages(10, max_broken)
    return extract_features(encode, loader, device=CPU, precision=precision, broken=broken)


def test_features_come_in_order():
    loader = digits_loader(30)
    features, labels = extract(loader)
    images, _ = collate([loader.dataset[0, i] for i in range(30)]).to(CPU)
    assert features.dtype == torch.float32
    assert torch.equal(features, encode(images))
    assert labels.dtype == torch.int64
    assert labels.tolist() == Digits("validation").labels[:30].tolist()


def test_features_are_computed_under_autocast_and_without_a_graph():
    linear = torch.nn.Linear(256, 8)
    results = []

    def record(images):
        results.append(linear(encode(images)))
        return results[-1]

    features, _ = extract(digits_loader(5), encode=record, precision=Precision("bf16", CPU))
    assert {result.dtype for result in results} == {torch.bfloat16}
    assert not any(result.requires_grad for result in results)
    assert features.dtype == torch.float32


def one_batch(num_broken=0):
    broken = [(f"{i}.png", "empty") for i in range(num_broken)]
    return [Batch(torch.zeros(10, 3, 4, 4), torch.zeros(10, dtype=torch.int64), broken)]


@pytest.mark.parametrize("labels", [[None, None], [torch.arange(10), None]])
def test_features_have_no_labels_if_an_image_has_none(labels):
    images = torch.rand(2, 10, 3, 4, 4)
    batches = [Batch(own, known, []) for own, known in zip(images, labels, strict=True)]
    features, found = extract(batches)
    assert torch.equal(features, encode(images.flatten(0, 1)))
    assert found is None


def folders(tmp_path, *, train_labeled=True, val_labeled=True):
    for split, is_labeled in (("train", train_labeled), ("val", val_labeled)):
        for name in ("ant", "bee"):
            write_images(tmp_path / split / (name if is_labeled else ""), 3)
    transform = eval_transform((16, 16), [0.5] * 3, [0.25] * 3)
    return open_train_val(DataSettings(data_path=tmp_path), transform, transform, seed=0)


@pytest.mark.parametrize("unlabeled", ["training", "validation"])
def test_without_labels_it_is_measured_only_if_that_is_asked_for(tmp_path, caplog, unlabeled):
    sets = folders(
        tmp_path, train_labeled=unlabeled != "training", val_labeled=unlabeled != "validation"
    )
    options = {"num_images": 9, "batch_size": 4, "num_workers": 0, "device": CPU}
    reason = f"the {unlabeled} images have no labels"
    with caplog.at_level(logging.INFO):
        assert build_knn_loaders(*sets, every=None, **options) is None
    assert "k-NN" not in caplog.text  # nobody asked
    assert build_knn_loaders(*sets, every=0, **options) is None
    with pytest.raises(InputError, match=f"--knn_every 2: {reason}"):
        build_knn_loaders(*sets, every=2, **options)


def test_only_some_training_images_are_compared_with(tmp_path):
    options = {"batch_size": 4, "num_workers": 0, "device": CPU}
    train, val = build_knn_loaders(*folders(tmp_path), every=1, num_images=2, **options)
    assert [batch.labels.tolist() for batch in train] == [[0, 1]]
    assert sum(batch.num_images for batch in val) == 6


def test_the_accuracy_is_one_line_with_that_of_the_untrained_network():
    stats, untrained = {"knn10": 92.0, "knn20": 92.46}, {"knn20": 65.6}
    assert describe_knn(stats, untrained) == "k-NN 65.6% (untrained) -> 92.5%"
    assert describe_knn(stats, {}) == "k-NN 92.5%"


def test_a_run_that_does_not_learn_is_told_so_with_the_flags_to_change():
    lengths = {"epoch": 3, "epochs": 24, "normalized": True}
    warning = not_learning({"knn20": 65.6}, {"knn20": 65.6}, **lengths)
    assert warning.startswith("after 3 epochs of 24, k-NN is 65.6%, not above the 65.6%")
    assert "--lr" in warning and "--no-norm_pix_loss" in warning
    raw = {**lengths, "normalized": False}
    assert "--no-norm_pix_loss" not in not_learning({"knn20": 65.6}, {"knn20": 65.6}, **raw)
    for stats, untrained in (({"knn20": 65.7}, {"knn20": 65.6}), ({"knn20": 1.0}, {}), ({}, {})):
        assert not_learning(stats, untrained, **lengths) is None
    assert not_learning({"knn20": 100.0}, {"knn20": 100.0}, **lengths) is None  # cannot rise


class Encoder(torch.nn.Module):
    features = staticmethod(encode)


def test_a_label_that_turns_out_to_be_missing_stops_the_measurement(tmp_path):
    train_set, val_set = folders(tmp_path)
    val_set.reader.listed.labels[2] = None
    loaders = build_knn_loaders(
        train_set, val_set, every=1, num_images=9, batch_size=4, num_workers=0, device=CPU
    )
    with pytest.raises(InputError, match="one of the validation images has none: label it, or use"):
        measure_knn(Encoder(), *loaders, device=CPU, precision=FP32)


def test_broken_images_are_logged_and_limited(caplog):
    features, _ = extract(one_batch(num_broken=1), max_broken=0.1)
    assert len(features) == 10
    assert "0.png (empty)" in caplog.text
    with pytest.raises(InputError, match="2 of 10 images"):
        extract(one_batch(num_broken=2), max_broken=0.1)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="--amp fp32"):
        extract(one_batch(), encode=lambda images: encode(images) / 0)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("num_images", [1, 2, 9, 30])
def test_processes_share_the_images_and_have_all_features_in_order(
    monkeypatch, world_size, num_images
):
    # Threads simulate the processes: each waits at the exchange until all have arrived.
    ranks, rows = {}, [None] * world_size
    barrier = threading.Barrier(world_size, timeout=30)

    def stack(values):
        rows[ranks[threading.get_ident()]] = values
        barrier.wait()
        stacked = torch.stack(rows)
        barrier.wait()
        return stacked

    def process(rank):
        barrier.wait()  # so that each process has its own thread
        ranks[threading.get_ident()] = rank
        return extract(digits_loader(num_images, rank, world_size))

    monkeypatch.setattr(knn, "all_gather", stack)
    monkeypatch.setattr(knn, "ROWS_AT_ONCE", 3)
    with ThreadPoolExecutor(world_size) as pool:
        found = list(pool.map(process, range(world_size)))
    monkeypatch.undo()
    alone = extract(digits_loader(num_images))
    for features, labels in found:
        assert torch.equal(features, alone[0])
        assert torch.equal(labels, alone[1])
