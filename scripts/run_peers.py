"""Compare this project with what a user would pick instead, after equal seconds on a CPU.

    pip install -r scripts/peers/requirements.txt -c requirements-pinned.txt
    python scripts/run_peers.py --data_path data/photos --minutes 20 --output_dir output/peers

Every contender trains the same ViT on the same images by its own recipe (scripts/peers/README.md).
The first of two epochs of each is timed; then each trains for as many epochs as fit into the
minutes. k-NN and logistic regression measure up to four encoders of every run. If the command is
stopped, run it again: it continues. It writes peers.json, peers.md, peers.png, and logs/.
"""

import argparse
import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments, positive_float, positive_int
from util.errors import InputError

STAGES = 4  # encoders of a run that are measured, at most
OURS = (
    "--input_size 128 --decoder_depth 4 --batch_size 32 --lr 1e-3 --num_workers 0 --amp fp32 "
    "--val_fraction 0 --knn_every 0 --visualize_every 100000 --keep_last 100"
)
TINY = "--model crossmae_vit_tiny_patch16"
TRANSFORMERS, LIGHTLY = "scripts/peers/transformers_mae.py", "scripts/peers/lightly_mae.py"


class Contender(NamedTuple):
    """What trains an encoder."""

    label: str
    program: str
    flags: str
    seeds: int | None = None
    """Number of runs, if it is another one than the user's."""


CONTENDERS = {
    "gamma_25": Contender(
        "CrossMAE, γ = .25", "main_pretrain.py", f"{OURS} {TINY} --pred_ratio 0.25"
    ),
    "gamma_75": Contender(
        "CrossMAE, γ = .75", "main_pretrain.py", f"{OURS} {TINY} --pred_ratio 0.75"
    ),
    "mae": Contender("MAE", "main_pretrain.py", f"{OURS} --model mae_vit_tiny_patch16"),
    "transformers": Contender("transformers", TRANSFORMERS, ""),
    "lightly": Contender("lightly", LIGHTLY, "--num_workers 0"),
    # With this project's batch and learning rate, since those of the recipes are for larger runs.
    "transformers_ours": Contender(
        "transformers, our rate", TRANSFORMERS, "--batch_size 32 --lr 1e-3", seeds=1
    ),
    "lightly_ours": Contender(
        "lightly, our rate", LIGHTLY, "--num_workers 0 --batch_size 32 --lr 1e-3", seeds=1
    ),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data_path", type=Path, required=True, help="images, with train/ and val/"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="for runs and results")
    parser.add_argument(
        "--minutes", type=positive_float, default=20.0, help="training of each run (%(default)s)"
    )
    parser.add_argument(
        "--seeds", type=positive_int, default=3, help="runs of each contender (%(default)s)"
    )
    parser.add_argument(
        "--at_once", type=positive_int, help="runs side by side (as many as there are cores)"
    )
    args = parser.parse_args(argv)
    for name in ("train", "val"):
        if not (args.data_path / name).is_dir():
            raise InputError(f"{args.data_path} has no folder {name}: correct --data_path")
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

from scripts.ablations.jobs import Job, check_earlier, main_module, read_command, run_jobs
from scripts.ablations.report import seconds_at, spread
from scripts.ablations.suites import NEIGHBORS, REGRESSION
from scripts.benchmark.tables import markdown
from util.data.layout import images_below
from util.eval.plots import new_figure, save_figure
from util.json_text import parse_json
from util.machine import available_cores
from util.runs.checkpoint import checkpoint_name
from util.runs.epoch_log import LOG_NAME, read_log
from util.runs.files import write_json
from util.runs.run import run_main, start_logging, versions


def training(name: str, seed: int, args: argparse.Namespace, *, epochs: int, step: str) -> Job:
    """The training of a contender.

    Args:
        step: name of its folder.
    """
    _, program, flags, _ = CONTENDERS[name]
    each = math.ceil(epochs / STAGES)
    words = f"{flags} --epochs {epochs} --save_every {each} --seed {seed} --num_threads 1".split()
    folder = args.output_dir / f"{name}-{seed}" / step
    # The mains look for validation images beside train/, the others need the folder above it.
    data_path = args.data_path / "train" if program.startswith("main_") else args.data_path
    data = ["--data_path", str(data_path)]
    result = encoder_of(name, folder, epochs)
    return Job(folder.parent.name, step, program, words, data, folder, result, None)


def encoder_of(name: str, folder: Path, epoch: int) -> Path:
    """Where a contender keeps its encoder after an epoch."""
    program = CONTENDERS[name].program
    if program == "main_pretrain.py":
        return folder / checkpoint_name(epoch, 0)
    return folder / f"encoder-e{epoch:04d}{'.pth' if program == LIGHTLY else ''}"


def measurement(job: Job, args: argparse.Namespace, epoch: int) -> Job:
    """The measurement of an encoder of a training."""
    step = f"features-e{epoch:04d}"
    folder = job.folder.parent / step
    flags = ["--crop_pct", "1", "--k", "20", "--num_workers", "0", "--amp", "fp32"]
    data, encoder = ["--data_path", str(args.data_path)], encoder_of(job.setting, job.folder, epoch)
    result = folder / main_module("knn").REPORT
    return Job(job.run, step, "main_knn.py", flags, data, folder, result, encoder)


def stages(epochs: int) -> list[int]:
    """Epochs after which a contender is measured: about every quarter, and the end."""
    each = math.ceil(epochs / STAGES)
    return [*range(each, epochs - each // 2, each), epochs]


def main(argv: Sequence[str] | None = None) -> None:
    """Time an epoch of each contender, train all of them, measure, and report."""
    args = parse_args(argv)
    start_logging()
    new_figure(1, 1)  # without matplotlib, it fails now rather than after hours
    how = {"at_once": args.at_once or available_cores(), "num_threads": 1}
    timed = [training(name, 0, args, epochs=2, step="timing") for name in CONTENDERS]
    check_earlier(timed)
    run_jobs(timed, args.output_dir, **how)
    epochs = {}
    for job in timed:
        seconds = read_log(job.folder)[0]["seconds"]  # of the first, which ends with nothing else
        epochs[job.setting] = max(int(60 * args.minutes / seconds), 1)

    trainings = [
        training(name, seed, args, epochs=epochs[name], step="pretrain")
        for seed in range(args.seeds)
        for name, contender in CONTENDERS.items()
        if seed < (contender.seeds or args.seeds)
    ]
    measurements = {
        job.run: {e: measurement(job, args, e) for e in stages(epochs[job.setting])}
        for job in trainings
    }
    after = [job for own in measurements.values() for job in own.values()]
    check_earlier([*trainings, *after])
    try:
        run_jobs(trainings, args.output_dir, **how)
        run_jobs(after, args.output_dir, **how)
    finally:
        num_images = len(images_below(args.data_path / "train"))
        report(trainings, measurements, args.output_dir, num_images)


def report(
    trainings: Sequence[Job],
    measurements: dict[str, dict[int, Job]],
    output_dir: Path,
    num_images: int,
) -> None:
    """Write the results of the runs that are done.

    Args:
        measurements: by run and epoch.
        num_images: of an epoch of this project's.
    """
    runs: dict[str, list[dict]] = {}
    for job in (job for job in trainings if job.is_done):
        (output_dir / "logs").mkdir(exist_ok=True)
        log = f"logs/{job.run}.jsonl"
        shutil.copyfile(job.folder / LOG_NAME, output_dir / log)
        lines = read_log(job.folder)
        seconds = seconds_at(lines)
        curve = [
            {"epoch": epoch, "seconds": seconds[epoch], **accuracies(measured)}
            for epoch, measured in measurements[job.run].items()
            if measured.is_done
        ]
        total, images = max(seconds.values()), sum(line.get("images", num_images) for line in lines)
        run = {"seed": job.seed, "log": log, "flags": job.flags, "epochs": len(lines)}
        run |= {"seconds": total, "images_per_second": images / total, "loss": lines[-1]["loss"]}
        runs.setdefault(job.setting, []).append(run | {"curve": curve, "cost": read_command(job)})
    if not runs:
        return
    write_json(
        output_dir / "peers.json", {"versions": versions(), "runs": runs}, keep_earlier=False
    )
    (output_dir / "peers.md").write_text(table(runs) + "\n", encoding="utf-8")
    draw(runs, output_dir / "peers.png")


def accuracies(measurement: Job) -> dict[str, float]:
    """k-NN's and the regression's accuracy in percent."""
    return parse_json(measurement.result.read_bytes())["results"]["pre-trained"]


def table(runs: dict[str, list[dict]]) -> str:
    """Markdown: every contender's speed and results, over its seeds."""
    rows = []
    for name, own in runs.items():
        row = [CONTENDERS[name].label, len(own), own[0]["epochs"]]
        row.append(spread([run["seconds"] / 60 for run in own], 1))
        row.append(spread([run["images_per_second"] for run in own], 0))
        row.append(spread([run["loss"] for run in own], 3))
        final = [point for run in own for point in run["curve"] if point["epoch"] == run["epochs"]]
        row += [spread([values[by] for values in final], 1) for by in (NEIGHBORS, REGRESSION)]
        memory = [m for run in own if (m := (run["cost"] or {}).get("peak_memory_mib"))]
        rows.append([*row, spread(memory, 0)])
    titles = ["", "seeds", "epochs", "minutes", "images/s", "loss", "20-NN, %"]
    return markdown([*titles, "regression, %", "memory, MiB"], rows)


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """Draw accuracies over seconds of training: a line through the means, the seeds as points."""
    figure = new_figure(9, 3.6)
    for axes, by in zip(figure.subplots(1, 2), (REGRESSION, NEIGHBORS), strict=True):
        for number, (name, own) in enumerate(runs.items()):
            curves = [run["curve"] for run in own]
            points_of = list(zip(*curves, strict=False))  # by stage
            minutes = [statistics.mean(p["seconds"] / 60 for p in points) for points in points_of]
            means = [statistics.mean(p[by] for p in points) for points in points_of]
            color = f"C{number}"
            axes.plot(minutes, means, "-", color=color, label=CONTENDERS[name].label)
            for curve in curves:
                places = [point["seconds"] / 60 for point in curve]
                axes.plot(places, [point[by] for point in curve], ".", color=color, ms=5)
        axes.set(xlabel="minutes of training, one core", ylabel=f"{by}, %")
    axes.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    run_main(main)
