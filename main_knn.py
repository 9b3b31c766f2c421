"""Measure what frozen features tell about labels: k-NN and logistic regression, no training.

python main_knn.py --finetune PRETRAINED --data_path IMAGES
python main_knn.py --finetune PRETRAINED --data_path IMAGES --untrained --shots 1 5 10
torchrun --nproc_per_node 8 main_knn.py --finetune PRETRAINED --data_path IMAGES --no-logistic
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from models import build_classifier, find_size
from models_vit import POOLS, SIZES
from util.arguments import (
    Parser,
    add_data_args,
    add_precision_args,
    check_data_args,
    positive_float,
    positive_int,
    seed_number,
)
from util.compute.compiling import compile_model
from util.compute.distributed import is_main_process
from util.compute.precision import Precision, blank_images
from util.data.broken_images import BrokenImages
from util.data.classes import check_classes, check_labels
from util.data.datasets import default_dataset, open_pair
from util.data.images import IndexedImages
from util.data.loaders import build_own_eval_loader
from util.data.streams import StreamedImages
from util.data.transforms import default_crop_share, eval_transform
from util.errors import InputError, value_errors_are_input_errors
from util.eval.knn import extract_features, knn_accuracy, logistic_accuracy
from util.runs.run import run_main, start_run, write_args, write_json
from util.weights.encoder import input_format, load_encoder, read_encoder

REPORT = "knn.json"
MEMORY_ADVICE = "lower --batch_size"

_logger = logging.getLogger(__name__)

Labelled = tuple[Tensor, Tensor]
"""Features (N, D) and labels (N,)."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(
        prog="main_knn.py",
        description="Measure frozen features by k-NN and logistic regression.",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir", default="output/knn", help=f"folder of {REPORT} (%(default)s)"
    )
    group.add_argument("--device", help="such as cuda, cuda:1 or cpu (cuda where there is one)")
    group.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="of the untrained network and the shots (%(default)s)",
    )
    group.add_argument(
        "--batch_size", type=positive_int, default=256, help="images of a process (%(default)s)"
    )
    add_data_args(parser, input_size=None)
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--finetune",
        required=True,
        metavar="PATH",
        help="weights: a checkpoint of this project, of the released CrossMAE or MAE, or a file of "
        "timm's or Hugging Face's",
    )
    group.add_argument(
        "--untrained",
        action="store_true",
        help="also measure the same network at its random start (off)",
    )
    group.add_argument(
        "--pool",
        choices=POOLS,
        default="avg",
        help="features are the mean of the patch tokens, or the class token (%(default)s)",
    )
    add_precision_args(parser)

    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--k",
        type=positive_int,
        nargs="+",
        default=[10, 20, 100],
        help="neighbours that vote (10 20 100)",
    )
    group.add_argument(
        "--temperature",
        type=positive_float,
        default=0.07,
        help="votes weigh exp(cosine similarity / temperature) (%(default)s)",
    )
    group.add_argument(
        "--logistic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="logistic regression on all images, which takes long on many (on)",
    )
    group.add_argument(
        "--shots",
        type=positive_int,
        nargs="+",
        default=[],
        metavar="N",
        help="logistic regression on N images of each class, too (none)",
    )
    group.add_argument(
        "--num_classes", type=positive_int, help="where the data do not tell (what they tell)"
    )
    args = parser.parse_args(argv)
    check_data_args(args)
    return args


def check_datasets(
    name: str,
    train_set: IndexedImages | StreamedImages,
    val_set: IndexedImages | None,
    num_classes: int | None,
) -> int:
    """The number of classes, once both sets can be read image by image and have the same classes.

    Raises:
        InputError: they cannot, or have not.
    """
    if not isinstance(train_set, IndexedImages):
        raise InputError(
            f"{name} is a stream, in which images have no number: name an indexed source such as "
            "folder, tar, torch/<name> or hfds/<name> by --dataset"
        )
    if val_set is None:
        raise InputError(f"{name} has no held-out images to measure on: name some by --val_path")
    return check_classes(train_set, val_set, num_classes)


def measure(
    args: argparse.Namespace, train: Labelled, held_out: Labelled, device: torch.device
) -> dict[str, float]:
    """Accuracy on the held-out images in percent, by the name of what finds the labels."""
    sets = (*train, *held_out)
    accuracy = knn_accuracy(*sets, ks=args.k, temperature=args.temperature, device=device)
    results = {f"{k}-NN": percent for k, percent in accuracy.items()}
    for shots in [None] * args.logistic + args.shots:
        images = "all images" if shots is None else f"{shots} per class"
        results[f"logistic regression, {images}"] = logistic_accuracy(
            *sets, shots=shots, seed=args.seed
        )
    return results


def table(results: dict[str, dict[str, float]]) -> list[str]:
    """Lines of a table: a column for each network, a row for each measure."""
    rows = list(next(iter(results.values())))
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{name:>13}" for name in results)]
    return lines + [
        f"{row:{width}}" + "".join(f"{column[row]:13.2f}" for column in results.values())
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the features of one file of weights."""
    args = parse_args(argv)
    device = start_run(device=args.device, seed=args.seed)
    output_dir = Path(args.output_dir)

    weights = read_encoder(args.finetune)
    with value_errors_are_input_errors(f"{args.finetune} cannot be loaded"):
        size = find_size(*weights.shape)
    img_size, mean, std = input_format(
        weights,
        img_size=args.input_size,
        mean=args.mean,
        std=args.std,
        default_size=SIZES[size].img_size,
    )
    crop_share = args.crop_share or default_crop_share(img_size)
    transform = eval_transform(img_size, mean, std, crop_share)

    dataset = default_dataset(args.dataset, args.data_path, args.val_path)
    train_set, val_set = open_pair(
        dataset,
        args.data_path,
        val_path=args.val_path,
        transforms=(transform, transform),
        seed=args.seed,
        num_samples=args.num_samples,
        batch_size=args.batch_size,
    )
    num_classes = check_datasets(dataset, train_set, val_set, args.num_classes)

    model = build_classifier(size, img_size=img_size, num_classes=0, pool=args.pool)
    model = model.to(device).eval()
    precision = Precision(args.amp, device, attention_backend=args.attention_backend)
    precision.check_attention_backend(model, blank_images(img_size, device))
    compile_model(model, args.compile, device=device)
    versions = write_args(output_dir, vars(args))

    def features_of(images: IndexedImages) -> Labelled:
        _logger.info("computing the features of %d images", len(images))
        loader = build_own_eval_loader(
            images,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            device=device,
        )
        broken = BrokenImages(len(images), args.max_broken)
        features, labels = extract_features(
            model, loader, device=device, precision=precision, broken=broken
        )
        check_labels(labels, num_classes)
        return features, labels

    # The model is at its random start until the weights are loaded.
    untrained = (features_of(train_set), features_of(val_set)) if args.untrained else None
    load_encoder(model, weights, head=False)
    features = {"pre-trained": (features_of(train_set), features_of(val_set))}
    if untrained:
        features["untrained"] = untrained
    if not is_main_process():
        return

    results = {name: measure(args, *sets, device) for name, sets in features.items()}
    _logger.info(
        "accuracy in %% on %d images of %s after %d labelled ones, vit_%s, %s pool",
        *(len(val_set), dataset, len(train_set), size, args.pool),
    )
    for line in table(results):
        _logger.info("%s", line)
    report = {
        "args": vars(args),
        "versions": versions,
        "weights": args.finetune,
        "model": f"vit_{size}",
        "pool": args.pool,
        "input_size": list(img_size),
        "mean": list(mean),
        "std": list(std),
        "crop_share": crop_share,
        "num_images": {"training": len(train_set), "held-out": len(val_set)},
        "num_classes": num_classes,
        "results": results,
    }
    write_json(output_dir / REPORT, report)
    _logger.info("report: %s", output_dir / REPORT)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
