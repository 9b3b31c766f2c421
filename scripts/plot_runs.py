"""Plot metrics of runs over their steps or epochs.

    python scripts/plot_runs.py --metrics val_box_ap val_mask_ap --output figure.png \
        --runs output/balloon-*

Metrics are those of log.jsonl. Runs whose folders differ only in what follows the last hyphen, such
as a seed, are one series: a line through their mean, and an area from the lowest to the highest. It
needs matplotlib.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments, check_output_folders, finite_float
from util.errors import InputError


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of runs")
    parser.add_argument("--metrics", nargs="+", required=True, help="such as val_box_ap")
    parser.add_argument("--x", choices=("step", "epoch"), default="step", help="(%(default)s)")
    parser.add_argument(
        "--y_range", type=finite_float, nargs=2, metavar=("LO", "HI"), help="(all values, and 0)"
    )
    parser.add_argument("--output", type=Path, required=True, help="such as figure.png")
    args = parser.parse_args(argv)
    check_output_folders(args.output)
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

from util.eval.plots import new_figure, save_figure
from util.runs.epoch_log import read_log
from util.runs.run import run_main, start_logging


def read_curve(folder: Path, metric: str, x: str = "step") -> dict[int, float]:
    """Read a metric from a run's log: step or epoch -> value.

    Raises:
        InputError: the log does not have it.
    """
    curve = {line[x]: line[metric] for line in read_log(folder) if metric in line}
    if not curve:
        raise InputError(f"the log in {folder} has no {metric}: correct --metrics or --runs")
    return curve


def series_of(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Group folders by what their names have in common."""
    series: dict[str, list[Path]] = {}
    for folder in folders:
        series.setdefault(folder.name.rpartition("-")[0] or folder.name, []).append(folder)
    return series


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the plot."""
    args = parse_args(argv)
    start_logging()

    figure = new_figure(4.5 * len(args.metrics), 3.2)
    all_axes = figure.subplots(1, len(args.metrics), squeeze=False)
    for metric, axes in zip(args.metrics, all_axes[0], strict=True):
        for name, folders in series_of(args.runs).items():
            curves = [read_curve(folder, metric, args.x) for folder in folders]
            places = sorted(set.intersection(*map(set, curves)))
            values = [[curve[place] for curve in curves] for place in places]
            label = name if len(curves) == 1 else f"{name} ({len(curves)} runs)"
            (line,) = axes.plot(places, list(map(statistics.mean, values)), ".-", label=label)
            low, high = ([choose(own) for own in values] for choose in (min, max))
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel=args.x, title=metric)
        axes.xaxis.get_major_locator().set_params(integer=True)
        low, high = axes.get_ylim()
        room = 0.25 * (high - min(0, low))  # for the legend, above the curves
        axes.set_ylim(args.y_range or (min(0, low), high + room))
        axes.legend(fontsize=8)
    save_figure(figure, args.output)


if __name__ == "__main__":
    run_main(main)
