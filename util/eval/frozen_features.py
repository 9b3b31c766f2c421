"""Evaluation of frozen features for main_knn.py: k nearest neighbors and logistic regression."""

import logging
import warnings
from collections.abc import Sequence

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from util.data.classes import check_classes
from util.data.images import IndexedImages
from util.data.streams import StreamedImages
from util.errors import InputError
from util.eval.knn import knn_predict
from util.progress import waiting
from util.seeding import generator_for

LabeledFeatures = tuple[Tensor, Tensor]
"""Features (N, D) and labels (N,)."""

MAX_ITER = 1000  # of logistic regression

logger = logging.getLogger(__name__)


def check_measurable(
    name: str,
    train_set: IndexedImages | StreamedImages,
    val_set: IndexedImages | None,
    num_classes: int | None,
) -> int:
    """Check that both sets can be read by index and have the same classes; return their number.

    Raises:
        InputError: a set is missing or cannot be read by index, or the classes differ.
    """
    if not isinstance(train_set, IndexedImages):
        raise InputError(
            f"{name} is a stream, whose images cannot be read by index: set --dataset to an "
            "indexed source such as folder, tar, torch/<name> or hfds/<name>"
        )
    if val_set is None:
        raise InputError(f"{name} has no validation images: set --val_path")
    return check_classes(train_set, val_set, num_classes)


def predict(
    train: LabeledFeatures,
    features: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
    shots: Sequence[int | None],
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Predict the labels (M,) of features (M, D) with each classifier, by the classifier's name.

    Args:
        ks, temperature: see `knn_predict`.
        shots: images per class for each logistic regression, None for all images.
        seed: for the choice of these images.
        device: for the search of neighbors.
    """
    num_train = len(train[1])
    if max(ks) > num_train:
        logger.warning("k-NN: k = %d reduced to %d, the number of images", max(ks), num_train)
    found = knn_predict(*train, features, ks=ks, temperature=temperature, device=device)
    results = {f"{k}-NN": guesses for k, guesses in found.items()}
    for number in shots:
        images = "all images" if number is None else f"{number} per class"
        with waiting(f"fitting a logistic regression to {images}", after=0):
            guesses = logistic_predict(*train, features, shots=number, seed=seed)
        results[f"logistic regression, {images}"] = guesses
    return results


def accuracy_table(results: dict[str, dict[str, float]]) -> list[str]:
    """Format a table with a column per network and a row per classifier, as lines."""
    rows = list(next(iter(results.values())))
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>13}" for name in results)]
    return lines + [
        f"{row:{width}}" + "".join(f"{column[row]:13.2f}" for column in results.values())
        for row in rows
    ]


def logistic_predict(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    *,
    shots: int | None,
    seed: int,
) -> Tensor:
    """Predict labels (M,) by a logistic regression on standardized features.

    Args:
        train_features, train_labels: (N, D) and (N,), with at least two classes.
        features: (M, D), of the images to label.
        shots: training images per class, see `draw_shots`; None: all.
        seed: for the choice of these images.
    """
    if shots is not None:
        chosen = draw_shots(train_labels, shots, seed=seed)
        train_features, train_labels = train_features[chosen], train_labels[chosen]
    regression = LogisticRegression(max_iter=MAX_ITER)
    pipeline = make_pipeline(StandardScaler(), regression)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # logged below
        pipeline.fit(train_features.numpy(), train_labels.numpy())
    if regression.n_iter_.max() >= MAX_ITER:
        logger.warning("logistic regression did not converge in %d iterations", MAX_ITER)
    return torch.from_numpy(pipeline.predict(features.numpy()))


def draw_shots(labels: Tensor, shots: int, *, seed: int) -> Tensor:
    """Draw this many images of every class, or all of a class that has fewer.

    With the same seed, fewer shots are a subset of more.

    Returns:
        Image indices, int64, grouped by class.
    """
    generator = generator_for("shots", seed)
    chosen, num_short = [], 0
    for label in labels.unique():
        ids = (labels == label).nonzero().flatten()
        chosen.append(ids[torch.randperm(len(ids), generator=generator)[:shots]])
        num_short += len(ids) < shots
    if num_short:
        logger.warning("%d-shot: %d of the classes have fewer images, all used", shots, num_short)
    return torch.cat(chosen)
