"""Measure where masked tokens attend in a decoder (Fig. 1b, Table 6, App. A.1 and A.2).

    python scripts/analyse_attention.py --checkpoint C --data_path D --output_dir O

O/attention.json and O/attention.png have the attention to the class token, visible and masked
tokens, and among these to the token itself, in every block and head; O/attention_maps.png shows
where single masked patches attend in a few images. It needs matplotlib.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.analysis.flags import ImageSettings, analysis_parser
from util.arguments import check_arguments, natural_int, take
from util.errors import InputError, counted


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = analysis_parser(__doc__)
    parser.add_argument(
        "--patches",
        type=natural_int,
        nargs="+",
        help="masked patches whose attention is drawn, from 0 at the top left, row by row (the "
        "one nearest to the center)",
    )
    args = parser.parse_args(argv)
    take(ImageSettings, args)
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import numpy as np
import torch
from torch import Tensor

from scripts.analysis.inputs import MEMORY_ADVICE, Subject, open_images, start_analysis
from scripts.analysis.outputs import log_table, open_output, write_report
from util.data.batch import denormalize
from util.eval.attention import (
    KEYS,
    READINGS,
    LayerAttention,
    attention_maps,
    compare_keys,
    measure_attention,
)
from util.eval.display import Display
from util.eval.figures import GRAY
from util.eval.plots import SEQUENTIAL, new_figure, picture_grid, show_picture
from util.masking import TokenSplit, is_masked
from util.runs.run import run_main

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "visible 1.42, masked 0.39, ratio 3.64"  # Fig. 1b
MAX_PATCHES = 8  # in each image
COLORS = {"class": "#E69F00", "visible": "#0072B2", "masked": "#999999", "itself": "#555555"}

_logger = logging.getLogger(__name__)


def as_json(layer: LayerAttention) -> dict[str, object]:
    """A layer's numbers as plain values, for the mean of its heads and each head."""
    heads = [_numbers(layer, [head]) for head in range(len(layer.mass))]
    return {
        "block": layer.block,
        "attention": layer.kind,
        "num_keys": dict(zip(KEYS, layer.num_keys, strict=True)),
        **_numbers(layer, list(range(len(heads)))),
        "heads": [{"head": number, **own} for number, own in enumerate(heads, start=1)],
    }


def _numbers(layer: LayerAttention, heads: list[int]) -> dict[str, object]:
    """Mean of some heads: the sums by kind of key, and every reading; None without keys."""

    def by_kind(values: Tensor) -> dict[str, float | None]:
        means = values[heads].mean(dim=0).tolist()
        return {kind: None if m != m else m for kind, m in zip(KEYS, means, strict=True)}

    return by_kind(layer.mass) | {name: by_kind(getattr(layer, name)) for name in READINGS}


def log_results(layers: Sequence[LayerAttention]) -> dict[str, object]:
    """Log the table of blocks and the paper's comparison; return the comparison."""
    tables = {"mass": "sum of a masked token's attention to all keys of a kind", **READINGS}
    for name, title in tables.items():
        _logger.info("%s:", title)
        values = [getattr(layer, name).mean(dim=0).tolist() for layer in layers]
        names = [f"{layer.block} {layer.kind}" for layer in layers]
        log_table(["block", *KEYS], [[n, *v] for n, v in zip(names, values, strict=True)])
    result: dict[str, object] = {}
    joint = [layer for layer in layers if layer.num_keys[1] and layer.num_keys[2]]
    if not joint:
        _logger.info("no layer attends to both visible and masked tokens: nothing to compare")
        return result
    for name, means in compare_keys(joint).items():
        result[name] = {**means._asdict(), "ratio": means.ratio}
        ratio = "" if means.ratio is None else f", ratio {means.ratio:.2f}"
        values = (READINGS[name], means.visible, means.masked, ratio)
        _logger.info("%s: visible %.3f, masked %.3f%s", *values)
    _logger.info("the paper's MAE, ViT-B: %s", PAPER)
    per_key = torch.stack([layer.per_key.mean(dim=0) for layer in joint])  # (J, 4)
    more = int((per_key[:, 1] > per_key[:, 2]).sum())
    result["blocks_with_more_on_visible"] = more
    result["slope_of_masked"] = None
    if len(joint) > 1:
        slope = float(np.polyfit(range(len(joint)), per_key[:, 2].numpy(), 1)[0])
        result["slope_of_masked"] = slope
        _logger.info(
            "a visible key gets more than a masked one in %d of %s; attention to a masked key, "
            "relative to uniform, changes by %+.4f from block to block",
            *(more, counted(len(joint), "block"), slope),
        )
    return result


def plot(layers: Sequence[LayerAttention]) -> "Figure":
    """Bars of the sums in every layer, and attention per key with a dot for each head."""
    figure = new_figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    places = range(len(layers))
    bottom = np.zeros(len(layers))
    mean = torch.stack([layer.mass.mean(dim=0) for layer in layers]).numpy()  # (layers, 4)
    mean[:, 2] -= mean[:, 3]
    labels = ("class token", "visible tokens", "other masked tokens", "itself")
    for number, (name, label) in enumerate(zip(KEYS, labels, strict=True)):
        left.bar(places, mean[:, number], 0.8, bottom=bottom, color=COLORS[name], label=label)
        bottom += mean[:, number]
    left.set(ylabel="sum of a masked token's attention", ylim=(0, 1.25))
    left.legend(fontsize=7, ncols=2, loc="upper center")
    for number, name in enumerate(KEYS[1:3], start=1):
        per_key = [layer.per_key[:, number].numpy() for layer in layers]
        right.plot(places, [own.mean() for own in per_key], "o-", color=COLORS[name], label=name)
        for place, own in zip(places, per_key, strict=True):
            right.plot([place] * len(own), own, ".", color=COLORS[name], markersize=3, alpha=0.6)
    right.axhline(1, color="black", linewidth=0.8, linestyle=":", label="uniform")
    right.set_ylabel("attention per key, relative to uniform")
    right.set_ylim(0, 1.05 * right.get_ylim()[1])
    right.legend(fontsize=7)
    both_kinds = len({layer.kind for layer in layers}) > 1
    names = [f"{x.block}\n{x.kind}" if both_kinds else x.block for x in layers]
    for axes in (left, right):
        axes.set_xticks(places, names, fontsize=7)
        axes.set_xlabel("decoder block")
    return figure


def central_patch(split: TokenSplit, grid_size: tuple[int, int]) -> list[int]:
    """Masked patch of each image that is nearest to the center."""
    down, across = grid_size
    rows, columns = split.predicted // across, split.predicted % across
    distance = torch.hypot(rows - (down - 1) / 2, columns - (across - 1) / 2)
    return split.predicted.gather(1, distance.argmin(dim=1, keepdim=True)).flatten().tolist()


def draw_maps(
    subject: Subject,
    images: Tensor,
    split: TokenSplit,
    chosen: list[list[int]],
    display: Display | None = None,
) -> "Figure":
    """Draw where masked patches attend: a row for each, with columns as in Fig. 1.

    Args:
        chosen: masked patches of each image.
        display: None for 8-bit RGB.
    """
    display = display or Display()
    grid_size = subject.model.encoder.grid_size
    maps = attention_maps(subject.model, images, split).cpu()  # (B, P, 1+L)
    hidden = is_masked(split, maps.shape[2] - 1).cpu()  # (B, L)
    originals = denormalize(images, *subject.colors)
    pictures = display.of(originals).images(originals).clamp(0, 1)
    pictures = pictures.permute(0, 2, 3, 1).cpu().numpy()
    size = pictures.shape[1:3]
    rows = [(image, patch) for image, patches in enumerate(chosen) for patch in patches]
    own = [maps[i, split.predicted[i].tolist().index(patch), 1:] for i, patch in rows]  # of (L,)
    sees_masked = any(x[hidden[i]].sum() > 0 for x, (i, _) in zip(own, rows, strict=True))
    titles = ["image", "visible patches", "attention to visible", "to masked patches"]
    titles = titles if sees_masked else titles[:3]
    room = {"right": 0.9, "bottom": 0.3 if display.note else 0}
    figure, all_axes = picture_grid(len(rows), len(titles), size, side=1.7, **room)
    limits = {"vmin": 0, "vmax": max(x.max().item() for x in own)}
    for (image, patch), attention, axes in zip(rows, own, all_axes, strict=True):
        picture, masked = pictures[image], hidden[image].view(grid_size).numpy()
        blocks = np.kron(masked, np.ones((size[0] // grid_size[0], size[1] // grid_size[1])))
        show_picture(axes[0], picture)
        show_picture(axes[1], np.where(blocks[..., None], GRAY, picture))
        for axis, left_out in zip(axes[2:], (masked, ~masked), strict=False):
            show_picture(axis, picture.mean(axis=2), cmap="gray", vmin=-1, vmax=1)  # pale
            values = np.ma.masked_where(left_out, attention.view(grid_size).numpy())
            style = {"cmap": SEQUENTIAL, "alpha": 0.85, "extent": (0, size[1], size[0], 0)}
            drawn = axis.imshow(values, **style, **limits)
        row, column = divmod(patch, grid_size[1])
        place = (column + 0.5) * size[1] / grid_size[1], (row + 0.5) * size[0] / grid_size[0]
        for axis in axes:
            axis.plot(*place, "*", color="red", markersize=9, markeredgecolor="white")
    for axis, title in zip(all_axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    label = "attention of the starred patch, mean of heads and layers"
    figure.colorbar(drawn, ax=all_axes[:3, -1], label=label, pad=0.02)
    if display.note:
        figure.supxlabel(display.note, fontsize=8)
    return figure


def choose_patches(
    patches: Sequence[int] | None, split: TokenSplit, grid_size: tuple[int, int]
) -> list[list[int]]:
    """Patches to draw in each image: the given ones, or the masked one nearest to the center.

    Raises:
        InputError: a patch is visible.
    """
    if patches is None:
        return [[patch] for patch in central_patch(split, grid_size)]
    for patch in patches:
        if not (split.predicted == patch).any(dim=1).all():
            raise InputError(f"--patches {patch} is visible with this masking: choose another")
    return [list(patches)] * len(split.predicted)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and draw attention."""
    args = parse_args(argv)
    settings = take(ImageSettings, args)
    device = start_analysis(args)

    subject = Subject.load(
        args.checkpoint, device=device, seed=args.seed, mask_ratio=args.mask_ratio
    )
    counts, grid_size = subject.masking.counts, subject.model.encoder.grid_size
    for patch in (p for p in args.patches or () if p >= counts.patches):
        raise InputError(f"--patches {patch} does not exist: the last one is {counts.patches - 1}")
    limit = min(MAX_PATCHES, counts.masked)
    if len(args.patches or ()) > limit:
        raise InputError(f"--patches can name at most {limit} patches: name fewer")
    images = open_images(settings, subject.transform, seed=args.seed, device=device)
    shown, split = subject.shown(images, masked=args.patches or ())
    chosen = choose_patches(args.patches, split, grid_size)
    output = open_output(args.output_dir)

    display = subject.display(images.shown, settings.show_channels)
    maps = draw_maps(subject, shown, split, chosen, display)
    _logger.info("measuring %s", counted(images.num_measured, "image"))
    layers = measure_attention(subject.model, subject.batches(images))
    comparison = log_results(layers)
    report = {
        "num_images": images.num_measured,
        "blocks": list(map(as_json, layers)),
        "comparison": comparison,
    }
    write_report(output, "attention", vars(args), report, plot=plot(layers), maps=maps)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
