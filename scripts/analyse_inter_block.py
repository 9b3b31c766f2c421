"""Show which encoder blocks each decoder block reads by inter-block attention (Fig. 5c).

    python scripts/analyse_inter_block.py --checkpoint C --output_dir O
    python scripts/analyse_inter_block.py --checkpoint C --data_path D --output_dir O

O/inter_block.json and O/inter_block.png have the weights, their shares in each mix, and whether
later decoder blocks read earlier feature maps, with the probability of that trend in a random
start. With images, the shares are also those of weights times the size of their maps. It needs
matplotlib.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.analysis.flags import ImageSettings, analysis_parser
from util.arguments import check_arguments, take
from util.errors import InputError, counted


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    return analysis_parser(__doc__, draws=False).parse_args(argv)


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import numpy as np
from torch import Tensor

from scripts.analysis.inputs import MEMORY_ADVICE, Subject, open_images, start_analysis
from scripts.analysis.outputs import log_table, open_output, write_report
from util.eval.inter_block import (
    Trend,
    centers,
    depth_trend,
    map_sizes,
    mixing_weights,
    scaled_rows,
    shares,
)
from util.eval.plots import DIVERGING, SEQUENTIAL, heat_map, new_figure
from util.runs.run import run_main

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {"weight": "|weight|", "weight_times_size": "|weight| x size of the map"}

_logger = logging.getLogger(__name__)


class Reading(NamedTuple):
    """Weights (J, K), and the trend of their rows' centers."""

    weights: Tensor
    trend: Trend | None

    @classmethod
    def of(cls, weights: Tensor, map_ids: Sequence[int], seed: int) -> "Reading":
        """Compute the trend."""
        return cls(weights, depth_trend(weights, map_ids, seed=seed))

    def as_json(self, map_ids: Sequence[int]) -> dict[str, object]:
        """Plain values."""
        return {
            "weights": self.weights.tolist(),
            "shares": shares(self.weights).tolist(),
            "centers": centers(self.weights, map_ids).tolist(),
            "trend": self.trend and self.trend._asdict(),
        }


def log_reading(name: str, reading: Reading, map_ids: Sequence[int]) -> None:
    """Log the table of shares and the trend."""
    own, middle = shares(reading.weights), centers(reading.weights, map_ids)
    _logger.info(
        "mix of each decoder block: share of every feature map by %s, and the center of mass",
        LABELS[name],
    )
    rows = enumerate(zip(own.tolist(), middle.tolist(), strict=True), start=1)
    log_table(["block", *map(str, map_ids), "center"], [[str(j), *row, c] for j, (row, c) in rows])
    if reading.trend is None:
        _logger.info("no trend: this needs at least two decoder blocks with a mix of their own")
        return
    _logger.info(
        "rank correlation of decoder block and center %.3f, p = %.4g for a random start",
        *reading.trend,
    )


def plot(readings: dict[str, Reading], map_ids: Sequence[int]) -> "Figure":
    """Heat maps of the weights with their signs, and of the shares of each reading."""
    weights = next(iter(readings.values())).weights
    rows, num_panels = range(1, 1 + len(weights)), 1 + len(readings)
    figure = new_figure(3.2 * num_panels, 0.2 * len(rows) + 1.5)
    signed, *others = figure.subplots(1, num_panels)
    limits = {"cmap": DIVERGING, "vmin": -1, "vmax": 1}
    image = heat_map(signed, scaled_rows(weights).numpy(), map_ids, rows, **limits)
    figure.colorbar(image, ax=signed)
    signed.set_title("weight / largest of its row", fontsize=9)
    signed.set_ylabel("decoder block")
    for axes, (name, reading) in zip(others, readings.items(), strict=True):
        own = shares(reading.weights).numpy()
        image = heat_map(axes, own, map_ids, rows, cmap=SEQUENTIAL, vmin=0)
        figure.colorbar(image, ax=axes)
        middle = centers(reading.weights, map_ids)
        places = np.interp(middle, np.sort(map_ids), np.argsort(map_ids))
        axes.plot(places, range(len(own)), "o-", color="white", markersize=3, linewidth=1)
        trend = reading.trend
        found = f"\nrank correlation {trend.rho:.2f}, p = {trend.p_value:.2g}" if trend else ""
        axes.set_title(f"share of {LABELS[name]}{found}", fontsize=9)
    figure.supxlabel("feature map (0: the encoder's input); white: center of the row", fontsize=9)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Draw and test the weights of inter-block attention."""
    args = parse_args(argv)
    device = start_analysis(args)

    subject = Subject.load(
        args.checkpoint, device=device, seed=args.seed, mask_ratio=args.mask_ratio
    )
    mixer = subject.model.mixer
    if mixer is None:
        raise InputError(
            f"the decoder in {args.checkpoint} has no inter-block attention (--feature_maps last): "
            "use another checkpoint"
        )
    weights, map_ids = mixing_weights(mixer), list(mixer.map_ids)
    output = open_output(args.output_dir)
    readings = {"weight": Reading.of(weights, map_ids, args.seed)}
    report = {"map_ids": map_ids, "num_images": 0}
    if args.data_path or args.dataset or args.images:
        settings = take(ImageSettings, args)
        images = open_images(settings, subject.transform, seed=args.seed, device=device)
        report["num_images"] = images.num_measured
        _logger.info("measuring the feature maps of %s", counted(images.num_measured, "image"))
        sizes = map_sizes(subject.model, subject.batches(images))
        report["map_sizes"] = sizes.tolist()
        readings["weight_times_size"] = Reading.of(weights * sizes, map_ids, args.seed)
    for name, reading in readings.items():
        log_reading(name, reading, map_ids)
    report["readings"] = {name: own.as_json(map_ids) for name, own in readings.items()}
    figure = plot(readings, map_ids)
    write_report(output, "inter_block", vars(args), report, plot=figure)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
