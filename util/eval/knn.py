"""How much frozen features tell about labels: k nearest neighbours and logistic regression."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from util.compute.distributed import all_gather
from util.compute.precision import Precision
from util.data.batch import Batch
from util.data.broken_images import BrokenImages
from util.data.classes import check_classes
from util.data.images import IndexedImages
from util.data.loaders import Batches, build_eval_loader
from util.data.streams import StreamedImages
from util.errors import InputError
from util.seeding import generator_for

Labelled = tuple[Tensor, Tensor]
"""Features (N, D) and labels (N,)."""

logger = logging.getLogger(__name__)

KNN_IMAGES = {"training": 50_000, "held-out": 10_000}  # at most, beside a run
ROWS_AT_ONCE = 4096  # of each process, when features are exchanged
SIMILARITIES_AT_ONCE = 2**26  # 256 MiB
MAX_ITER = 1000  # of logistic regression


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor],
    loader: Iterable[Batch],
    *,
    device: torch.device,
    precision: Precision,
    broken: BrokenImages,
) -> tuple[Tensor, Tensor]:
    """Compute the features of a whole data set, shared between the processes.

    Args:
        encode: images (B, C, H, W) -> features (B, D), in evaluation mode.
        loader: every image once; process r has the images r, r + world size, ...
        device: where the encoder is.
        precision: for autocast.
        broken: keeps the books on images that cannot be read; others take their places.

    Returns:
        float32 features (N, D) and int64 labels (N,) on the CPU, in the order of the data set,
        the same on every process.

    Raises:
        InputError: features are not finite, or too many images cannot be read.
    """
    features, labels = [torch.empty(0, 0)], [torch.empty(0, dtype=torch.int64)]
    for batch in loader:
        broken.add(batch.broken)
        images, _ = batch.to(device)  # (B, C, H, W)
        with precision.autocast():
            features.append(encode(images).float().cpu())  # (B, D)
        labels.append(batch.labels)
    broken.check()
    # A process without an image does not know D: the first entry stands for it alone.
    features = _interleaved(torch.cat(features[1:] or features), device)  # (N, D)
    labels = _interleaved(torch.cat(labels).unsqueeze(1), device).squeeze(1)  # (N,)
    if not features.isfinite().all():
        raise InputError(
            f"features computed in {precision.amp} are not finite: use --amp fp32, or other weights"
        )
    return features, labels


def _interleaved(rows: Tensor, device: torch.device) -> Tensor:
    """Row 0 of every process's (n, D), then row 1 of each, ...; the last processes may have fewer.

    Args:
        rows: on the CPU; D counts only where n > 0.
        device: over which processes exchange tensors.
    """
    shapes = all_gather(torch.tensor(rows.shape, device=device))  # (world size, 2)
    most_rows, dim = shapes.amax(dim=0).tolist()
    padded = rows.new_zeros(most_rows, dim)
    if len(rows):
        padded[: len(rows)] = rows
    parts = [
        all_gather(part.to(device)).transpose(0, 1).flatten(0, 1).cpu()
        for part in padded.split(ROWS_AT_ONCE)
    ]
    return torch.cat(parts)[: shapes[:, 0].sum()]


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    *,
    ks: Sequence[int],
    temperature: float,
    device: torch.device,
) -> dict[int, Tensor]:
    """Label images by a vote of the k training images whose features point most alike.

    A vote weighs exp(cosine similarity / temperature). Of labels with equal votes, the smallest
    wins. Of training images that are equally similar at the k-th place, torch.topk chooses.

    Args:
        train_features: (N, D), float32.
        train_labels: (N,), int64.
        features: (M, D), float32, to be labelled.
        ks: numbers of neighbours; one above N counts as N.
        temperature: above 0; the lower, the more the nearest decide.
        device: where to compute. All training features, but only SIMILARITIES_AT_ONCE of the
            N x M similarities, are there at a time.

    Returns:
        k -> labels (M,), int64, on the CPU.
    """
    num_train = len(train_features)
    largest_k = min(max(ks), num_train)
    if max(ks) > num_train:
        logger.warning("k-NN: %d neighbours are %d, the training images", max(ks), num_train)
    classes, targets = train_labels.to(device).unique(return_inverse=True)  # (classes,), (N,)
    train_features = F.normalize(train_features.to(device, torch.float32), dim=1)
    predicted = {k: [] for k in ks}
    with _exact_matmul():
        for part in features.split(max(1, SIMILARITIES_AT_ONCE // num_train)):
            directions = F.normalize(part.to(device, torch.float32), dim=1)
            nearest = (directions @ train_features.T).topk(largest_k)
            # Less the largest, so that no exponential overflows at low temperatures.
            weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
            for k in predicted:
                voters = targets[nearest.indices[:, :k]]  # (B, k)
                votes = weights.new_zeros(len(part), len(classes))
                votes.scatter_add_(1, voters, weights[:, :k])
                predicted[k].append(classes[votes.argmax(dim=1)].cpu())
    return {k: torch.cat(labels) for k, labels in predicted.items()}


@contextmanager
def _exact_matmul() -> Iterator[None]:
    """Multiply float32 matrices in float32, not in TF32, which cannot tell close neighbours."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    ks: Sequence[int] = (10, 20, 100),
    temperature: float = 0.07,
    device: torch.device,
) -> dict[int, float]:
    """Measure how often `knn_predict` finds the label, in percent, for each k."""
    predicted = knn_predict(
        train_features, train_labels, features, ks=ks, temperature=temperature, device=device
    )
    return {k: _percent_equal(guess, labels) for k, guess in predicted.items()}


def logistic_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    shots: int | None,
    seed: int,
) -> float:
    """Measure how often a logistic regression on standardised features finds the label.

    Args:
        train_features, train_labels: (N, D) and (N,), of at least two classes.
        features, labels: (M, D) and (M,), to be measured on.
        shots: training images of each class, see `draw_shots`; None takes all.
        seed: decides which.

    Returns:
        Accuracy in percent.
    """
    if shots is not None:
        chosen = draw_shots(train_labels, shots, seed=seed)
        train_features, train_labels = train_features[chosen], train_labels[chosen]
    regression = LogisticRegression(max_iter=MAX_ITER)
    pipeline = make_pipeline(StandardScaler(), regression)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said below, in the log
        pipeline.fit(train_features.numpy(), train_labels.numpy())
    if regression.n_iter_.max() >= MAX_ITER:
        logger.warning("logistic regression: not converged after %d iterations", MAX_ITER)
    return _percent_equal(torch.from_numpy(pipeline.predict(features.numpy())), labels)


def draw_shots(labels: Tensor, shots: int, *, seed: int) -> Tensor:
    """Draw so many images of every class, or all of a class that has fewer.

    With one seed, fewer shots are a subset of more.

    Returns:
        Their indices, int64, class by class.
    """
    generator = generator_for("shots", seed)
    chosen, num_short = [], 0
    for label in labels.unique():
        ids = (labels == label).nonzero().flatten()
        chosen.append(ids[torch.randperm(len(ids), generator=generator)[:shots]])
        num_short += len(ids) < shots
    if num_short:
        logger.warning("%d shots: %d classes have fewer images, all are taken", shots, num_short)
    return torch.cat(chosen)


def _percent_equal(guesses: Tensor, labels: Tensor) -> float:
    return 100 * (guesses == labels).double().mean().item()


def check_knn_images(
    train_set: IndexedImages | StreamedImages, val_set: IndexedImages | None
) -> None:
    """Refuse images that k-NN cannot be measured on."""
    if val_set is None or not isinstance(train_set, IndexedImages):
        raise InputError(
            "--knn_every needs training images that are no stream, and held-out ones: name some "
            "by --val_path, or leave it out"
        )
    check_classes(train_set, val_set, None)


def build_knn_loaders(
    train_set: IndexedImages | StreamedImages,
    val_set: IndexedImages | None,
    *,
    every: int | None,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> tuple[Batches, Batches] | None:
    """Loaders of labelled images, training and held-out, not augmented, for `measure_knn`.

    Args:
        train_set, val_set: the images; None where none are held out.
        every: epochs between measurements; 0 for none, None for as often as the images allow.
        batch_size: of a process.
        num_workers: loader processes.
        device: where the batches go.

    Returns:
        None for no k-NN.

    Raises:
        InputError: k-NN was asked for, and the images do not allow it.
    """
    if every == 0:
        return None
    try:
        check_knn_images(train_set, val_set)
    except InputError as error:
        if every is None:
            logger.info("k-NN accuracy is not measured: %s", error)
            return None
        raise
    options = {"batch_size": batch_size, "num_workers": num_workers, "device": device}
    plain_train_set = train_set.with_transform(val_set.transform)
    return (
        build_eval_loader(plain_train_set, limit=KNN_IMAGES["training"], **options),
        build_eval_loader(val_set, limit=KNN_IMAGES["held-out"], **options),
    )


def measure_knn(
    encoder: nn.Module,
    train_loader: Batches,
    val_loader: Batches,
    *,
    device: torch.device,
    precision: Precision,
) -> dict[str, float]:
    """Classify held-out images by their nearest training images in the encoder's features.

    Args:
        encoder: with `features(images) -> (B, D)`.
        train_loader: this process's share of labelled training images, not augmented.
        val_loader: the same of held-out images.
        device: where the encoder is.
        precision: for autocast.

    Returns:
        `knn10`, `knn20`, `knn100`: accuracy in percent with so many neighbours.
    """
    encoder.eval()
    sets = []
    for loader in (train_loader, val_loader):
        broken = BrokenImages(len(loader.dataset), max_share=1.0)
        sets += extract_features(
            encoder.features, loader, device=device, precision=precision, broken=broken
        )
    accuracy = knn_accuracy(*sets, device=device)
    return {f"knn{k}": percent for k, percent in accuracy.items()}


def describe_knn(stats: dict[str, float]) -> str:
    """What `measure_knn` measured, in words."""
    values = ", ".join(f"{name[3:]}-NN {stats[name]:.1f} %" for name in stats if "knn" in name)
    return f"accuracy on held-out images {values}"


def check_measurable(
    name: str,
    train_set: IndexedImages | StreamedImages,
    val_set: IndexedImages | None,
    num_classes: int | None,
) -> int:
    """The number of classes, once both sets can be read image by image and have the same classes.

    Raises:
        InputError: a set is missing, cannot be read by index, or has other classes.
    """
    if not isinstance(train_set, IndexedImages):
        raise InputError(
            f"{name} is a stream, in which images have no number: name an indexed source such as "
            "folder, tar, torch/<name> or hfds/<name> by --dataset"
        )
    if val_set is None:
        raise InputError(f"{name} has no held-out images to measure on: name some by --val_path")
    return check_classes(train_set, val_set, num_classes)


def accuracies(
    train: Labelled,
    val: Labelled,
    *,
    ks: Sequence[int],
    temperature: float,
    shots: Sequence[int | None],
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Accuracy on validation images in percent, by the name of what finds the labels.

    Args:
        train, val: features and labels.
        ks, temperature: of k-NN, see `knn_accuracy`.
        shots: one logistic regression for each: images of a class, None for all.
        seed: of the choice of those images.
        device: where neighbours are found.
    """
    sets = (*train, *val)
    found = knn_accuracy(*sets, ks=ks, temperature=temperature, device=device)
    results = {f"{k}-NN": percent for k, percent in found.items()}
    for number in shots:
        images = "all images" if number is None else f"{number} per class"
        percent = logistic_accuracy(*sets, shots=number, seed=seed)
        results[f"logistic regression, {images}"] = percent
    return results


def accuracy_table(results: dict[str, dict[str, float]]) -> list[str]:
    """Lines of a table: a column for each network, a row for each measure."""
    rows = list(next(iter(results.values())))
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>13}" for name in results)]
    return lines + [
        f"{row:{width}}" + "".join(f"{column[row]:13.2f}" for column in results.values())
        for row in rows
    ]
