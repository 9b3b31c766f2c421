"""Compare this project with what a user would pick instead, after equal seconds on a CPU.

    pip install -r scripts/peers/requirements.txt -c requirements-pinned.txt
    python scripts/run_peers.py --data_path data/photos --minutes 20 --output_dir output/peers

Every contender trains the same ViT on the same images by its own recipe (scripts/peers/README.md).
One epoch of each is timed first; then each trains for as many epochs as fit into the minutes.
k-NN and logistic regression measure four encoders of every run. Started again, the command goes on
where it was stopped. It writes results.json, results.md, results.png, and logs/.
"""

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments, positive_float, positive_int
from util.errors import InputError

STAGES = 4  # encoders of a run that are measured
OURS = (
    "--input_size 128 --decoder_depth 4 --batch_size 32 --lr 1e-3 --num_workers 0 --amp fp32 "
    "--knn_every 0 --eval_every 1000 --visualize_every 1000 --keep_last 100"
)
TINY = "--model crossmae_vit_tiny_patch16"
CONTENDERS = {  # label, program, flags
    "gamma_25": ("CrossMAE, γ = .25", "main_pretrain.py", f"{OURS} {TINY} --pred_ratio 0.25"),
    "gamma_75": ("CrossMAE, γ = .75", "main_pretrain.py", f"{OURS} {TINY} --pred_ratio 0.75"),
    "mae": ("MAE", "main_pretrain.py", f"{OURS} --model mae_vit_tiny_patch16"),
    "transformers": ("transformers", "scripts/peers/transformers_mae.py", ""),
    "lightly": ("lightly", "scripts/peers/lightly_mae.py", "--num_workers 0"),
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
    parser.add_argument("--seeds", type=positive_int, default=3, help="(%(default)s)")
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

from scripts.ablations.jobs import KNN_REPORT, Job, read_command, run_jobs
from scripts.ablations.report import spread
from scripts.ablations.suites import NEIGHBORS, REGRESSION
from scripts.benchmark.tables import markdown
from util.data.layout import images_below
from util.eval.plots import new_figure, save_figure
from util.json_text import parse_json
from util.runs.epoch_log import LOG_NAME, read_log
from util.runs.files import write_json
from util.runs.run import run_main, start_logging, versions


def training(
    name: str, seed: int, data_path: Path, output_dir: Path, *, epochs: int, step: str = "pretrain"
) -> Job:
    """The training of a contender.

    Args:
        step: name of its folder.
    """
    _, program, flags = CONTENDERS[name]
    each = max(epochs // STAGES, 1)
    words = f"{flags} --epochs {epochs} --save_every {each} --seed {seed} --num_threads 1".split()
    folder = output_dir / f"{name}-{seed}" / step
    result = encoder_of(name, folder, epochs)
    data = ["--data_path", str(data_path)]
    return Job(folder.parent.name, step, program, words, data, folder, result, None)


def encoder_of(name: str, folder: Path, epoch: int) -> Path:
    """Where a contender keeps its encoder after an epoch."""
    if CONTENDERS[name][1] == "main_pretrain.py":
        return folder / f"checkpoint-e{epoch:04d}-s000000.pth"
    return folder / f"encoder-e{epoch:04d}{'.pth' if name == 'lightly' else ''}"


def measurement(job: Job, name: str, epoch: int) -> Job:
    """The measurement of an encoder of a training."""
    step = f"features-e{epoch:04d}"
    folder = job.folder.parent / step
    flags = ["--crop_pct", "1", "--k", "20", "--num_workers", "0", "--amp", "fp32"]
    return Job(
        job.run,
        step,
        "main_knn.py",
        flags,
        job.data,
        folder,
        folder / KNN_REPORT,
        encoder_of(name, job.folder, epoch),
    )


def stages(epochs: int) -> list[int]:
    """Epochs after which a contender is measured: about every quarter, and the end."""
    each = max(epochs // STAGES, 1)
    return [*range(each, epochs - each + 1, each), epochs]


def main(argv: Sequence[str] | None = None) -> None:
    """Time an epoch of each contender, train all of them, measure, and report."""
    args = parse_args(argv)
    start_logging()
    new_figure(1, 1)  # without matplotlib, it fails now rather than after hours
    how = {"at_once": args.at_once or os.cpu_count() or 1, "num_threads": 1}
    place = args.data_path, args.output_dir
    timed = {name: training(name, 0, *place, epochs=1, step="timing") for name in CONTENDERS}
    run_jobs(list(timed.values()), args.output_dir, **how)
    epochs = {}
    for name, job in timed.items():
        seconds = read_log(job.folder)[-1]["seconds"]
        epochs[name] = max(int(60 * args.minutes / seconds), 1)

    jobs, measured = [], []
    for seed in range(args.seeds):
        for name in CONTENDERS:
            job = training(name, seed, *place, epochs=epochs[name])
            jobs.append(job)
            own = [measurement(job, name, epoch) for epoch in stages(epochs[name])]
            measured.append((name, seed, job, dict(zip(stages(epochs[name]), own, strict=True))))
            jobs += own
    try:
        run_jobs(jobs, args.output_dir, **how)
    finally:
        report(measured, args.output_dir, len(images_below(args.data_path / "train")))


Measured = tuple[str, int, Job, dict[int, Job]]  # contender, seed, training, measurements by epoch


def report(measured: Sequence[Measured], output_dir: Path, num_images: int) -> None:
    """Write the results of the runs that are done.

    Args:
        num_images: of an epoch.
    """
    runs: dict[str, list[dict]] = {}
    (output_dir / "logs").mkdir(exist_ok=True)
    for name, seed, job, own in measured:
        if not job.is_done:
            continue
        log = f"logs/{job.run}.jsonl"
        shutil.copyfile(job.folder / LOG_NAME, output_dir / log)
        seconds = {line["epoch"]: line["seconds"] for line in read_log(job.folder)}
        curve = [
            {"epoch": epoch, "seconds": seconds[epoch], **accuracies(measurement)}
            for epoch, measurement in own.items()
            if measurement.is_done
        ]
        run = {"seed": seed, "log": log, "flags": job.flags, "epochs": max(seconds)}
        run |= {"loss": read_log(job.folder)[-1]["loss"], "seconds": max(seconds.values())}
        run["images_per_second"] = max(seconds) * num_images / max(seconds.values())
        runs.setdefault(name, []).append(run | {"curve": curve, "cost": read_command(job)})
    if not runs:
        return
    write_json(output_dir / "results.json", {"versions": versions(), "runs": runs})
    (output_dir / "results.md").write_text(table(runs) + "\n", encoding="utf-8")
    draw(runs, output_dir / "results.png")


def accuracies(measurement: Job) -> dict[str, float]:
    """k-NN's and the regression's accuracy in percent."""
    return parse_json(measurement.result.read_bytes())["results"]["pre-trained"]


def table(runs: dict[str, list[dict]]) -> str:
    """Markdown: every contender's speed and results, over its seeds."""
    rows = []
    for name, own in runs.items():
        row = [CONTENDERS[name][0], len(own), own[0]["epochs"]]
        row.append(spread([run["seconds"] / 60 for run in own], 1))
        row.append(spread([run["images_per_second"] for run in own], 0))
        row.append(spread([run["loss"] for run in own], 3))
        final = [run["curve"][-1] for run in own if run["curve"][-1:]]
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
            axes.plot(minutes, means, "-", color=color, label=CONTENDERS[name][0])
            for curve in curves:
                places = [point["seconds"] / 60 for point in curve]
                axes.plot(places, [point[by] for point in curve], ".", color=color, ms=5)
        axes.set(xlabel="minutes of training, one core", ylabel=f"{by}, %")
    axes.legend(fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    run_main(main)
