"""Features of whole datasets, and their accuracy with k nearest neighbors."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from util.compute.distributed import all_gather
from util.compute.precision import Precision
from util.data.batch import Batch
from util.data.broken_images import BrokenImages
from util.data.classes import check_classes
from util.data.images import IndexedImages
from util.data.loaders import Batches, build_eval_loader, show_progress
from util.data.streams import StreamedImages
from util.errors import InputError, counted

MAX_VAL_IMAGES = 10_000  # during training
EASY = 99.0  # percent, above which training cannot be expected to raise the accuracy
ROWS_AT_ONCE = 4096  # per process, when features are exchanged
SIMILARITIES_AT_ONCE = 2**26  # 256 MiB
NO_LABEL = -1  # of an image, between processes


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor],
    loader: Collection[Batch],
    *,
    device: torch.device,
    precision: Precision,
    broken: BrokenImages,
    what: str = "features",
) -> tuple[Tensor, Tensor | None]:
    """Compute the features of a whole dataset, distributed over the processes.

    Args:
        encode: images (B, C, H, W) -> features (B, D), in evaluation mode.
        loader: yields every image once; process r gets images r, r + world size, ...
        broken: counts unreadable images, which other images replace.
        what: names the progress that is shown.

    Returns:
        float32 features (N, D) and int64 labels (N,) on the CPU, in the order of the dataset, the
        same on every process; labels are None if an image has none.

    Raises:
        InputError: features are not finite, or too many images cannot be read.
    """
    features, labels = [torch.empty(0, 0)], [torch.empty(0, dtype=torch.int64)]
    for batch in show_progress(loader, what):
        broken.add(batch.broken)
        images, _ = batch.to(device)  # (B, C, H, W)
        with precision.autocast():
            features.append(encode(images).float().cpu())  # (B, D)
        missing = torch.full((batch.num_images,), NO_LABEL)
        labels.append(missing if batch.labels is None else batch.labels)
    broken.check()
    # A process without images does not know D and uses the empty first entry.
    features = _interleaved(torch.cat(features[1:] or features), device)  # (N, D)
    labels = _interleaved(torch.cat(labels).unsqueeze(1), device).squeeze(1)  # (N,)
    if not features.isfinite().all():
        raise InputError(
            f"features computed in {precision.amp} are not finite: use --amp fp32 or other weights"
        )
    return features, None if (labels == NO_LABEL).any() else labels


def _interleaved(rows: Tensor, device: torch.device) -> Tensor:
    """Interleave the rows (n, D) of all processes; the last processes may have one row fewer.

    Args:
        rows: on the CPU; D may be wrong where n = 0.
        device: for the exchange between processes.
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
    """Predict labels by a vote of the k training images with the most similar features.

    A vote weighs exp(cosine similarity / temperature). If votes are tied, the smallest label wins;
    if similarities are tied at the k-th neighbor, torch.topk chooses.

    Args:
        train_features: (N, D), float32.
        train_labels: (N,), int64.
        features: (M, D), float32, of the images to label.
        ks: numbers of neighbors; one above N counts as N.
        temperature: above 0; lower values give the nearest neighbors more weight.
        device: for the computation. It holds all training features, but only SIMILARITIES_AT_ONCE
            of the N x M similarities at a time.

    Returns:
        k -> labels (M,), int64, on the CPU.
    """
    num_train = len(train_features)
    largest_k = min(max(ks), num_train)
    classes, targets = train_labels.to(device).unique(return_inverse=True)  # (classes,), (N,)
    train_features = F.normalize(train_features.to(device, torch.float32), dim=1)
    predicted = {k: [] for k in ks}
    with _exact_matmul():
        for part in features.split(max(1, SIMILARITIES_AT_ONCE // num_train)):
            directions = F.normalize(part.to(device, torch.float32), dim=1)
            nearest = (directions @ train_features.T).topk(largest_k)
            # The largest similarity is subtracted to avoid overflow at low temperatures.
            weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
            for k in predicted:
                voters = targets[nearest.indices[:, :k]]  # (B, k)
                votes = weights.new_zeros(len(part), len(classes))
                votes.scatter_add_(1, voters, weights[:, :k])
                predicted[k].append(classes[votes.argmax(dim=1)].cpu())
    return {k: torch.cat(labels) for k, labels in predicted.items()}


@contextmanager
def _exact_matmul() -> Iterator[None]:
    """Context for float32 matrix products without TF32, which cannot rank close neighbors."""
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
    """Accuracy of `knn_predict` in percent, for each k."""
    predicted = knn_predict(
        train_features, train_labels, features, ks=ks, temperature=temperature, device=device
    )
    return {k: percent_equal(guess, labels) for k, guess in predicted.items()}


def percent_equal(guesses: Tensor, labels: Tensor) -> float:
    """Fraction of guesses (N,) that equal the labels (N,), in percent."""
    return 100 * (guesses == labels).double().mean().item()


def check_knn_images(
    train_set: IndexedImages | StreamedImages, val_set: IndexedImages | None
) -> None:
    """Raise InputError if k-NN accuracy cannot be measured on these images."""
    if val_set is None or not isinstance(train_set, IndexedImages):
        raise InputError(
            "k-NN accuracy needs validation images, and training images that can be read by index: "
            "set --val_path or --dataset, or use --knn_every 0"
        )
    if train_set.labeled and train_set.classes is None:
        raise InputError(
            "k-NN accuracy needs to know the classes of the training images: use --knn_every 0"
        )
    check_classes(train_set, val_set, None)


def build_knn_loaders(
    train_set: IndexedImages | StreamedImages,
    val_set: IndexedImages | None,
    *,
    every: int | None,
    num_images: int,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> tuple[Batches, Batches] | None:
    """Build loaders of training and validation images, not augmented, for `measure_knn`.

    Args:
        every: epochs between measurements; 0 for none, None for the default if the images allow
            it.
        num_images: of the training images, at most.
        batch_size: per process.

    Returns:
        None if k-NN accuracy is not measured.

    Raises:
        InputError: k-NN was requested, but the images do not allow it.
    """
    if every == 0:
        return None
    try:
        check_knn_images(train_set, val_set)
    except InputError as error:
        if every is None:
            return None
        raise InputError(f"--knn_every {every}: {error}") from error
    options = {"batch_size": batch_size, "num_workers": num_workers, "device": device}
    plain_train_set = train_set.with_transform(val_set.transform)
    return (
        build_eval_loader(plain_train_set, limit=num_images, **options),
        build_eval_loader(val_set, limit=MAX_VAL_IMAGES, **options),
    )


def measure_knn(
    encoder: nn.Module,
    train_loader: Batches,
    val_loader: Batches,
    *,
    device: torch.device,
    precision: Precision,
) -> dict[str, float]:
    """Measure the k-NN accuracy of an encoder's features on validation images.

    Args:
        encoder: has `features(images) -> (B, D)`.
        train_loader, val_loader: this process's images, labeled and not augmented.

    Returns:
        `knn10`, `knn20`, `knn100`: accuracy in percent with 10, 20 and 100 neighbors.

    Raises:
        InputError: an image has no label.
    """
    encoder.eval()
    sets = []
    for role, loader in (("training", train_loader), ("validation", val_loader)):
        broken = BrokenImages(len(loader.dataset), max_fraction=1.0)
        features, labels = extract_features(
            encoder.features,
            loader,
            device=device,
            precision=precision,
            broken=broken,
            what=f"k-NN, features of {role} images",
        )
        if labels is None:
            raise InputError(
                f"k-NN accuracy needs labels, but one of the {role} images has none: label it, or "
                "use --knn_every 0"
            )
        sets += [features, labels]
    accuracy = knn_accuracy(*sets, device=device)
    return {f"knn{k}": percent for k, percent in accuracy.items()}


def describe_knn(
    stats: Mapping[str, float], untrained: Mapping[str, float], *, at_start: str = "untrained"
) -> str:
    """Describe the results of `measure_knn` with 20 neighbors for the log.

    Args:
        untrained: the results before training; without any if they are not known.
        at_start: what the network before training is called.
    """
    before = f"{untrained['knn20']:.1f}% ({at_start}) -> " if "knn20" in untrained else ""
    return f"k-NN {before}{stats['knn20']:.1f}%"


def not_learning(
    stats: Mapping[str, float],
    untrained: Mapping[str, float],
    *,
    epoch: int,
    epochs: int,
    normalized: bool,
) -> str | None:
    """Return a warning if training has not raised the k-NN accuracy; None if it has.

    Args:
        stats, untrained: see `describe_knn`; both may lack results.
        epoch: epochs done.
        epochs: of the run.
        normalized: whether normalized pixels are predicted.
    """
    if not {"knn20"} <= stats.keys() & untrained.keys() or stats["knn20"] > untrained["knn20"]:
        return None
    if untrained["knn20"] > EASY:
        return None
    advice = "change --lr (or --blr)"
    if normalized:
        advice += ", or use --no-norm_pix_loss, which helps with drawings and other flat images"
    return (
        f"after {counted(epoch, 'epoch')} of {epochs}, k-NN is {stats['knn20']:.1f}%, not above "
        f"the {untrained['knn20']:.1f}% of the untrained network: if that stays so, {advice}"
    )
