"""Show what the features of every encoder block know: k-NN accuracy, colors, class token.

    python scripts/analyse_features.py --checkpoint C --data_path D --output_dir O

O/features.json and O/features.png have the k-NN accuracy of the features of every block, measured
as main_knn.py does for the last one, but without the norm of a fine-tuned encoder and in float32.
O/features_pictures.png has, for a few images and every block, the first three principal components
of the patches' features as colors, after the mean of each place is subtracted, and where the class
token attends. It needs matplotlib.
"""

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.analysis.flags import MAX_SHOWN, add_device_args, add_loader_args
from util.arguments import Parser, check_arguments, positive_int, take
from util.errors import InputError, counted
from util.settings.data import (
    DataSettings,
    add_crop_pct_arg,
    add_table_args,
    add_val_fraction_arg,
)
from util.settings.evaluation import add_show_channels_arg, check_show_channels
from util.settings.model import add_checkpoint_arg

NUM_IMAGES = 10_000  # the features of all blocks are kept, 40 kB an image for ViT-B


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_checkpoint_arg(
        parser,
        "any file that main_knn.py reads: a checkpoint of this project or of the released CrossMAE "
        "or MAE code, or a timm or Hugging Face ViT",
    )
    parser.add_argument("--output_dir", required=True, help="folder for results")
    add_device_args(parser)
    group = parser.add_argument_group("images")
    group.add_argument("--data_path", help="folder of labeled images, with train/ and val/")
    group.add_argument("--dataset", help="kind of --data_path, see main_pretrain.py (folder)")
    group.add_argument("--val_path", help="folder of validation images (val/ in --data_path)")
    add_table_args(group)
    add_val_fraction_arg(group)
    group.add_argument(
        "--images",
        nargs="+",
        help=f"files or folders of images to draw, at most {MAX_SHOWN} (some of val/)",
    )
    group.add_argument(
        "--num_images",
        type=positive_int,
        default=NUM_IMAGES,
        help="limit on the training images that vote, and on validation images, evenly spaced "
        "(%(default)s)",
    )
    add_show_channels_arg(group)
    add_crop_pct_arg(group)
    add_loader_args(group)
    args = parser.parse_args(argv)
    check_show_channels(args.show_channels)
    data = take(DataSettings, args)
    if not (data.data_path or data.dataset or data.data_csv):
        raise InputError("k-NN accuracy needs labeled images: give --data_path or --data_csv")
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from models import build_classifier, starting_point
from scripts.analysis.inputs import (
    MEMORY_ADVICE,
    list_images,
    read_images,
    sample_images,
    start_analysis,
)
from scripts.analysis.outputs import log_table, open_output, write_report
from util.compute.precision import Precision
from util.data.batch import Batch, denormalize
from util.data.broken_images import BrokenImages
from util.data.classes import check_labels
from util.data.colors import choose_colors
from util.data.datasets import open_train_val
from util.data.images import IndexedImages
from util.data.loaders import build_eval_loader
from util.data.transforms import CenterCrop, default_crop_pct, eval_transform
from util.eval.block_features import (
    block_features,
    class_attention,
    feature_maps,
    mean_maps,
    principal_colors,
)
from util.eval.display import choose_display, is_deep
from util.eval.frozen_features import check_measurable
from util.eval.knn import extract_features, knn_accuracy
from util.eval.plots import SEQUENTIAL, new_figure, picture_grid, show_picture
from util.runs.run import run_main
from util.weights.encoder import load_encoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEIGHBORS = (10, 20, 100)
NUM_FOR_MEAN = 500

_logger = logging.getLogger(__name__)


def block_accuracies(
    train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], num_maps: int, device: torch.device
) -> list[dict[int, float]]:
    """k-NN accuracy in percent of every feature map, by k.

    Args:
        train, val: features (N, K*D) and labels (N,).
    """
    pairs = zip(train[0].chunk(num_maps, dim=1), val[0].chunk(num_maps, dim=1), strict=True)
    return [
        knn_accuracy(own, train[1], other, val[1], ks=NEIGHBORS, device=device)
        for own, other in pairs
    ]


def plot(results: list[dict[int, float]]) -> "Figure":
    """Accuracy over the blocks, a line for each k."""
    figure = new_figure(4.5, 3.2)
    axes = figure.subplots()
    for k, color, style in zip(NEIGHBORS, ("#0072B2", "#D55E00", "#009E73"), "os^", strict=True):
        values = [result[k] for result in results]
        axes.plot(values, f"{style}-", color=color, label=f"{k}-NN", markersize=4)
    axes.set(xlabel="encoder block (0: its input)", ylabel="accuracy in percent")
    axes.legend(fontsize=8)
    return figure


def draw_blocks(
    model: nn.Module, images: Tensor, pictures: Tensor, means: list[Tensor], note: str = ""
) -> "Figure":
    """Draw two rows for each image, with a column for each block: colors, attention.

    Args:
        images: (B, C, H, W), normalized.
        pictures: the same as they are shown, (B, 3, H, W) in [0, 1].
        means: see `mean_maps`; most of a feature is its place, which is the same in all images.
        note: on the colors of the pictures.
    """
    grid_size = model.grid_size
    maps = [x - mean for x, mean in zip(feature_maps(model, images), means, strict=True)]
    colors = [principal_colors(x[:, 1:].cpu()).view(-1, *grid_size, 3).numpy() for x in maps]
    attention = class_attention(model, images).view(-1, len(images), *grid_size).cpu().numpy()
    figure, all_axes = picture_grid(2 * len(images), 1 + len(maps), images.shape[2:])
    for image, (upper, lower) in enumerate(zip(all_axes[::2], all_axes[1::2], strict=True)):
        show_picture(upper[0], pictures[image].permute(1, 2, 0).cpu().numpy())
        for block, own in enumerate(colors):
            show_picture(upper[1 + block], own[image])
        for axes in lower[:2]:
            axes.set_axis_off()
        for block, own in enumerate(attention):
            show_picture(lower[2 + block], own[image], cmap=SEQUENTIAL, vmin=0)
    titles = ["image", "input", *(f"block {number}" for number in range(1, len(maps)))]
    for axes, title in zip(all_axes[0], titles, strict=True):
        axes.set_title(title, fontsize=8)
    notes = [
        "Upper rows: principal components of features minus their mean over images in each place.",
        "Lower rows: attention of the class token in the block, each on a scale of its own.",
    ]
    notes += [f"Images {note}."] * bool(note)
    figure.supxlabel("\n".join(notes), fontsize=8)
    return figure


def some_images(
    images: IndexedImages, limit: int, settings: dict[str, int], device: torch.device
) -> Iterator[Tensor]:
    """Yield batches of normalized images, at most this many, evenly spaced."""
    loader = build_eval_loader(images, limit=limit, device=device, **settings)
    for batch in tqdm(loader, unit="batch", disable=None, leave=False):
        yield batch.to(device)[0]


def shown_images(paths: list[str] | None, val_set: IndexedImages, transform: CenterCrop) -> Batch:
    """Images to draw: from these files and folders, or some validation images."""
    if paths:
        files = list_images(paths, MAX_SHOWN, arrays=not transform.pixels.is_rgb8)
        return read_images(files, transform)
    return sample_images(val_set, MAX_SHOWN // 2)  # two rows for each


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and draw the features of every block."""
    args = parse_args(argv)
    data = take(DataSettings, args)
    device = start_analysis(args)

    start = starting_point(args.checkpoint, **data.input_form)
    data = data.read_as(start.pixels)
    train_set, val_set = open_train_val(data, seed=args.seed)
    num_classes = check_measurable(data.name, train_set, val_set, None)
    mean, std = choose_colors(train_set, *start.told_colors, pixels=start.pixels)
    crop = args.crop_pct or default_crop_pct(start.img_size)
    transform = eval_transform(start.img_size, mean, std, crop, pixels=start.pixels)
    train_set.transform = val_set.transform = transform
    shown = shown_images(args.images, val_set, transform)
    channels = start.pixels.num_channels
    display = choose_display(channels, args.show_channels, stretch=is_deep(shown))
    options = {"img_size": start.img_size, **start.pixels.model_options}
    model = build_classifier(start.size, num_classes=0, pool="avg", **options)
    load_encoder(model, start.weights, head=False)
    model.eval().to(device)
    output = open_output(args.output_dir)

    loading = {"batch_size": args.batch_size, "num_workers": args.num_workers}

    def features_of(images: IndexedImages) -> tuple[Tensor, Tensor]:
        loader = build_eval_loader(images, limit=args.num_images, device=device, **loading)
        broken = BrokenImages(min(len(images), args.num_images), data.max_broken)
        features, labels = extract_features(
            partial(block_features, model),
            tqdm(loader, unit="batch", disable=None, leave=False),
            device=device,
            precision=Precision("fp32", device),
            broken=broken,
        )
        check_labels(labels, num_classes)
        return features, labels

    images, _ = shown.to(device)
    originals = denormalize(images, mean, std)
    pictures = display.of(originals).images(originals).clamp(0, 1)
    few = some_images(val_set, min(NUM_FOR_MEAN, args.num_images), loading, device)
    means = mean_maps(model, few)
    drawn = draw_blocks(model, images, pictures, means, display.note)
    train, val = features_of(train_set), features_of(val_set)
    num_maps = 1 + len(model.blocks)
    results = block_accuracies(train, val, num_maps, device)
    _logger.info(
        "accuracy in %% on %s, with %s",
        counted(len(val[1]), "validation image"),
        counted(len(train[1]), "labeled training image"),
    )
    header = ["block", *(f"{k}-NN" for k in NEIGHBORS)]
    log_table(header, [[str(block), *own.values()] for block, own in enumerate(results)])
    report = {
        "num_images": {"training": len(train[1]), "validation": len(val[1])},
        "crop_pct": crop,
        "blocks": [
            {"block": block, **{f"knn{k}": percent for k, percent in own.items()}}
            for block, own in enumerate(results)
        ],
    }
    write_report(output, "features", vars(args), report, plot=plot(results), pictures=drawn)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
