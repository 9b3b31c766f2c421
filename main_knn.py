"""Evaluate frozen features by k-NN and logistic regression, without training.

python main_knn.py --checkpoint PRETRAINED --data_path IMAGES
python main_knn.py --checkpoint PRETRAINED --data_path IMAGES --untrained --shots 1 5 10
torchrun --standalone --nproc_per_node 8 main_knn.py --checkpoint PRETRAINED --data_path IMAGES
"""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from util.arguments import Parser, check_arguments, positive_float, positive_int, seed_number, take
from util.errors import counted
from util.settings.compute import ComputeSettings, add_precision_args
from util.settings.data import DataSettings, add_data_args
from util.settings.model import POOLS, add_checkpoint_arg, add_layer_arg

REPORT, PREDICTIONS = "knn.json", "predictions.npz"
FIRST_FLAGS = ("--checkpoint", "--data_path", "--val_path", "--output_dir", "--untrained")
FIRST_FLAGS += ("--k", "--shots", "--logistic", "--layer", "--device")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(
        prog="main_knn.py",
        usage="main_knn.py --checkpoint WEIGHTS --data_path IMAGES [flags]",
        first=FIRST_FLAGS,
        description="Evaluate frozen features by k-NN and logistic regression.",
    )
    group = parser.add_argument_group("run")
    group.add_argument(
        "--output_dir", default="output/knn", help=f"folder for {REPORT} (%(default)s)"
    )
    group.add_argument("--device", help="cuda, cuda:N or cpu (cuda if available)")
    group.add_argument(
        "--seed",
        type=seed_number,
        default=0,
        help="seed of the untrained network and of the shots (%(default)s)",
    )
    group.add_argument(
        "--batch_size", type=positive_int, default=256, help="images per process (%(default)s)"
    )
    add_data_args(parser, input_size=None)
    group = parser.add_argument_group("encoder")
    add_checkpoint_arg(
        group,
        "weights: a checkpoint of this project or of the released CrossMAE or MAE code, or a timm "
        "or Hugging Face ViT",
    )
    group.add_argument(
        "--untrained",
        action="store_true",
        help="also evaluate the same network before any training (off)",
    )
    group.add_argument(
        "--pool",
        choices=POOLS,
        default="avg",
        help="mean of the patch tokens (avg), class token (cls), or mean of normalized patch "
        "tokens (norm_avg) (%(default)s)",
    )
    add_layer_arg(group)
    add_precision_args(parser)

    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--k",
        type=positive_int,
        nargs="+",
        default=[10, 20, 100],
        help="numbers of neighbors that vote (10 20 100)",
    )
    group.add_argument(
        "--temperature",
        type=positive_float,
        default=0.07,
        help="votes are weighted by exp(cosine similarity / temperature) (%(default)s)",
    )
    group.add_argument(
        "--logistic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fit a logistic regression on all training images, slow for large datasets (on)",
    )
    group.add_argument(
        "--shots",
        type=positive_int,
        nargs="+",
        default=[],
        metavar="N",
        help="also fit a logistic regression on N training images per class (none)",
    )
    group.add_argument(
        "--num_classes",
        type=positive_int,
        help="number of classes, if the data do not give it (from the data)",
    )
    group.add_argument(
        "--save_predictions",
        action="store_true",
        help="also write the labels of the validation images and those that each classifier "
        f"predicts to {PREDICTIONS}, in the order of the images (off)",
    )
    args = parser.parse_args(argv)
    for group in (DataSettings, ComputeSettings):
        take(group, args)
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import numpy as np

from models import build_classifier, starting_point
from util.compute.compiling import compile_model
from util.compute.distributed import is_main_process
from util.compute.precision import blank_images
from util.compute.setup import place_model
from util.data.broken_images import BrokenImages
from util.data.classes import check_labels
from util.data.colors import choose_colors, compare_colors
from util.data.datasets import open_train_val
from util.data.images import IndexedImages
from util.data.loaders import build_eval_loader
from util.data.report import report_images
from util.data.transforms import default_crop_pct, eval_transform
from util.eval.frozen_features import (
    LabeledFeatures,
    accuracy_table,
    check_measurable,
    predict,
)
from util.eval.knn import extract_features, percent_equal
from util.runs.files import replace_file, write_json
from util.runs.run import run_main, start_run, write_args
from util.runs.start import describe_device, describe_encoder, log_block
from util.weights.encoder import load_encoder

MEMORY_ADVICE = "lower --batch_size"

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate the features of one file of weights."""
    args = parse_args(argv)
    data, compute = take(DataSettings, args), take(ComputeSettings, args)
    device = start_run(device=args.device, seed=args.seed)
    output_dir = Path(args.output_dir)

    start = starting_point(args.checkpoint, **data.input_form)
    data = data.read_as(start.pixels)
    train_set, val_set = open_train_val(data, seed=args.seed, batch_size=args.batch_size)
    found = report_images(train_set, val_set)
    num_classes = check_measurable(data.name, train_set, val_set, args.num_classes)
    reading = {"pixels": start.pixels, "tile": data.tile}
    mean, std = choose_colors(train_set, *start.told_colors, **reading)
    start = start._replace(mean=mean, std=std)
    crop_pct = data.crop_pct or default_crop_pct(start.img_size)
    compare_colors(val_set, mean, std, **reading)
    train_set.transform = val_set.transform = eval_transform(
        *start.input_format, crop_pct, **reading
    )

    options = {"img_size": start.img_size, **start.pixels.model_options}
    options |= {"pool": args.pool, "layers": args.layer}
    model = build_classifier(start.size, num_classes=0, **options)
    example = blank_images(start.img_size, device, in_chans=start.pixels.num_channels)
    precision = place_model(model.eval(), compute, device, example)
    compile_model(model, compute.compile, device=device)
    encoder = describe_encoder(start, args.checkpoint, model)
    log_block({"device": describe_device(precision), "model": encoder})
    versions = write_args(output_dir, vars(args), found)

    def features_of(images: IndexedImages) -> LabeledFeatures:
        _logger.info("computing the features of %s", counted(len(images), "image"))
        sizes = {"batch_size": args.batch_size, "num_workers": data.num_workers}
        loader = build_eval_loader(images, **sizes, device=device)
        broken = BrokenImages(len(images), data.max_broken)
        features, labels = extract_features(
            model, loader, device=device, precision=precision, broken=broken
        )
        check_labels(labels, num_classes)
        return features, labels

    # The model has its random initialization until the weights are loaded.
    untrained = (features_of(train_set), features_of(val_set)) if args.untrained else None
    load_encoder(model, start.weights, head=False)
    features = {"pre-trained": (features_of(train_set), features_of(val_set))}
    if untrained:
        features["untrained"] = untrained
    if not is_main_process():
        return

    options = {"ks": args.k, "temperature": args.temperature, "seed": args.seed}
    shots = [None] * args.logistic + args.shots
    labels = features["pre-trained"][1][1]
    predicted = {
        name: predict(train, val_features, shots=shots, device=device, **options)
        for name, (train, (val_features, _)) in features.items()
    }
    results = {
        name: {by: percent_equal(guesses, labels) for by, guesses in column.items()}
        for name, column in predicted.items()
    }
    _logger.info(
        "accuracy in %% on %s of %s, with %s: vit_%s, %s pooling",
        *(counted(len(val_set), "validation image"), data.name),
        *(counted(len(train_set), "labeled training image"), start.size, args.pool),
    )
    for line in accuracy_table(results):
        _logger.info("%s", line)
    report = {
        "args": vars(args),
        "versions": versions,
        "weights": args.checkpoint,
        "model": f"vit_{start.size}",
        "pool": args.pool,
        "layers": model.layers,
        "input_size": list(start.img_size),
        **start.pixels.header,
        "mean": mean,
        "std": std,
        "tile": data.tile,
        "crop_pct": crop_pct,
        "num_images": {"training": len(train_set), "validation": len(val_set)},
        "num_classes": num_classes,
        "results": results,
    }
    output_dir.mkdir(parents=True, exist_ok=True)  # again, if it was deleted meanwhile
    write_json(output_dir / REPORT, report)
    if args.save_predictions:
        arrays = {"labels": labels.numpy()}
        for name, column in predicted.items():
            arrays |= {f"{name}, {by}": guesses.numpy() for by, guesses in column.items()}
        replace_file(output_dir / PREDICTIONS, partial(np.savez_compressed, **arrays))
    _logger.info("report: %s", output_dir / REPORT)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
