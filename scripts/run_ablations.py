"""Compare settings of CrossMAE and MAE: pre-train each with several seeds, and measure them.

    python scripts/run_ablations.py --suite cpu --data_path data/cifar10/train \\
        --val_path data/cifar10/test --output_dir output/cpu
    python scripts/run_ablations.py --suite paper --data_path IMAGENET --output_dir output/paper \\
        --submit -- --gpus_per_node 8 --partition P --time 3-00:00:00

scripts/ablations/suites.py lists what is compared. If the command is stopped, even by a crash, run
it again: it continues and repeats nothing. It writes SUITE.json, SUITE.md and SUITE.png for what is
done, and logs/ with the log of every pre-training.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.ablations.suites import SUITES
from util.arguments import Parser, check_arguments, positive_int
from util.errors import InputError


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read and check the command line; return the flags after `--` separately.

    Raises:
        InputError: flags contradict each other, or a setting is unknown.
    """
    parser = Parser(description=__doc__.splitlines()[0])
    suites = "; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items())
    parser.add_argument("--suite", choices=SUITES, required=True, help=suites)
    parser.add_argument("--data_path", type=Path, required=True, help="training images")
    parser.add_argument("--val_path", type=Path, help="validation images (val/ in --data_path)")
    parser.add_argument("--output_dir", type=Path, required=True, help="for runs and results")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="settings to run (all)")
    parser.add_argument(
        "--seeds", type=positive_int, help="runs of each setting (as the suite says)"
    )
    parser.add_argument(
        "--at_once",
        type=positive_int,
        help="commands side by side, all on one GPU (1; without a GPU, one for each core)",
    )
    parser.add_argument("--num_threads", type=positive_int, help="CPU threads of each (1)")
    parser.add_argument(
        "--submit",
        action="store_true",
        help="submit everything to SLURM instead; flags after -- are those of scripts/launch.py",
    )
    parser.add_argument("--report", action="store_true", help="only write the results again (off)")
    own, launcher = list(argv), []
    if "--" in own:
        split = own.index("--")
        own, launcher = own[:split], own[split + 1 :]
    args = parser.parse_args(own)
    if launcher and not args.submit:
        raise InputError("flags after -- are for --submit: add it, or leave them out")
    for name in ("at_once", "num_threads", "report"):
        if args.submit and getattr(args, name):
            raise InputError(f"--{name} cannot be combined with --submit: leave one of them out")
    settings = SUITES[args.suite].settings
    for name in args.settings or []:
        if name not in settings:
            raise InputError(f"--settings {name} is not one of {', '.join(settings)}")
    for path in filter(None, (args.data_path, args.val_path)):
        if not path.exists():
            raise InputError(f"{path} does not exist: correct --data_path or --val_path")
    return args, launcher


if __name__ == "__main__":
    check_arguments(lambda: parse_args(sys.argv[1:]))  # before imports that take seconds

import torch

from scripts.ablations.images import data_flags
from scripts.ablations.jobs import plan_jobs, run_jobs
from scripts.ablations.report import write_report
from scripts.ablations.submit import submit_jobs
from util.eval.plots import new_figure
from util.machine import available_cores
from util.runs.run import run_main, start_logging

_logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and report what there is."""
    args, launcher = parse_args(sys.argv[1:] if argv is None else argv)
    start_logging()
    new_figure(1, 1)  # without matplotlib, it fails now rather than after hours
    suite, output_dir = SUITES[args.suite], args.output_dir
    data = data_flags(
        args.data_path, args.val_path, per_class=suite.per_class, output_dir=output_dir
    )
    jobs = plan_jobs(suite, output_dir, data, seeds=args.seeds)
    chosen = [job for job in jobs if not args.settings or job.setting in args.settings]
    chosen = [job for job in chosen if args.seeds is None or job.seed < args.seeds]
    num_threads = args.num_threads or 1
    cores = 1 if torch.cuda.is_available() else available_cores()
    at_once = args.at_once or max(cores // num_threads, 1)
    try:
        if args.submit:
            submit_jobs(chosen, launcher)
        elif not args.report:
            run_jobs(chosen, output_dir, at_once=at_once, num_threads=num_threads)
    finally:
        write_report(args.suite, jobs, output_dir)


if __name__ == "__main__":
    run_main(main)
