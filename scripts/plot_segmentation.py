"""Plot IoU of every class for runs of main_segmentation.py.

    python scripts/plot_segmentation.py --output figure.png --runs output/camvid-*

Runs whose folders differ only in what follows the last hyphen, such as a seed, are one series: a
dot for each run, a bar for their mean. Classes are in the order of their pixels. It needs
matplotlib.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments, check_output_folders
from util.errors import InputError
from util.json_text import parse_json


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of runs")
    parser.add_argument("--output", type=Path, required=True, help="such as figure.png")
    args = parser.parse_args(argv)
    check_output_folders(args.output)
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

from scripts.plot_runs import series_of
from util.eval.plots import new_figure, save_figure
from util.runs.run import run_main, start_logging

MEAN = "mean"


def read_scores(folder: Path) -> dict[str, dict]:
    """Read a run's latest scores: class -> iou and pixels in percent, and their mean.

    Raises:
        InputError: the run has none.
    """
    path = folder / "segmentation.json"
    try:
        content = parse_json(path.read_bytes())
        rows = {row["class"]: row for row in content["classes"]}
        return {**rows, MEAN: {"iou": content["val_miou"], "pixels": None}}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} has no scores of main_segmentation.py ({error})") from error


def group_runs(folders: Sequence[Path]) -> dict[str, list[dict[str, dict]]]:
    """Scores of runs by what their names have in common.

    Raises:
        InputError: the runs have different classes.
    """
    series = {name: list(map(read_scores, own)) for name, own in series_of(folders).items()}
    classes = {tuple(scores) for runs in series.values() for scores in runs}
    if len(classes) > 1:
        raise InputError("the runs have different classes: plot them separately")
    return series


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the plot."""
    args = parse_args(argv)
    start_logging()
    figure = new_figure(9, 3.6)

    series = group_runs(args.runs)
    first = next(iter(series.values()))[0]
    classes = sorted((n for n in first if n != MEAN), key=lambda n: -(first[n]["pixels"] or 0))
    axes = figure.subplots()
    width = 0.8 / len(series)
    for number, (name, runs) in enumerate(series.items()):
        for place, class_name in enumerate([MEAN, *classes]):
            found = [r[class_name]["iou"] for r in runs if r[class_name]["iou"] is not None]
            if found:
                x = place + (number - (len(series) - 1) / 2) * width
                label = f"{name} ({len(runs)})" if place == 0 else None
                mean = statistics.mean(found)
                axes.bar(x, mean, width * 0.9, color=f"C{number}", alpha=0.6, label=label)
                axes.plot([x] * len(found), found, ".", color="black", markersize=3)
    shares = {name: first[name]["pixels"] for name in classes}
    labels = [f"{name}\n{shares[name] or 0:.1f}%" for name in classes]
    axes.set_xticks(range(len(classes) + 1), [MEAN, *labels], fontsize=7)
    axes.set_ylabel("IoU in percent")
    axes.legend(fontsize=7)
    save_figure(figure, args.output)


if __name__ == "__main__":
    run_main(main)
