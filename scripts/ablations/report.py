"""What the runs of a suite have shown so far: JSON, a Markdown table, a figure, and their logs."""

import logging
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from scripts.ablations.cost import training_flops
from scripts.ablations.jobs import Job, main_module, read_command
from scripts.ablations.statistics import Difference, bootstrap_images, judge, pair_runs
from scripts.ablations.suites import (
    FINE_TUNED,
    LOSS,
    NEIGHBORS,
    PRETRAIN,
    PROBE,
    PSNR,
    REGRESSION,
    SUITES,
    Claim,
    Suite,
)
from scripts.benchmark.tables import markdown
from util.errors import InputError, counted
from util.eval.plots import new_figure, save_figure
from util.json_text import parse_json
from util.runs.epoch_log import LOG_NAME, read_log
from util.runs.files import write_json
from util.runs.run import versions

LOGS = "logs"
UNTRAINED = "untrained"
ACCURACIES = (REGRESSION, NEIGHBORS, FINE_TUNED, PROBE)
LOG_KEYS = {LOSS: "val_loss", PSNR: "val_psnr"}
GOALS = {"not worse": "≥ −{}", "equal": "within ±{}", "higher": "> 0", "lower": "< 0"}

_logger = logging.getLogger(__name__)

Runs = dict[str, dict[int, dict]]  # of each setting, by seed


def write_report(name: str, jobs: Sequence[Job], output_dir: Path) -> None:
    """Write a suite's table as JSON and Markdown, its figure, and logs/, of the jobs that are done.

    Args:
        name: of the suite, which the files are named after.
        jobs: all of the suite's.

    Raises:
        InputError: runs that are compared have measured different images.
    """
    suite = SUITES[name]
    runs = collect(suite, jobs, output_dir)
    if not runs:
        _logger.info("nothing is done yet, so there are no results")
        return
    checked = (check(claim, suite, runs, output_dir) for claim in suite.claims)
    claims = [found for found in checked if found]
    content = {"versions": versions(), "about": suite.about, "runs": runs, "claims": claims}
    write_json(output_dir / f"{name}.json", content, keep_earlier=False)
    tables = [settings_table(suite, runs), *([claims_table(suite, claims)] if claims else [])]
    path = output_dir / f"{name}.md"
    path.write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    draw(suite, runs, output_dir / f"{name}.png")
    _logger.info("results of %s: %s", counted(sum(map(len, runs.values())), "run"), path)


def collect(suite: Suite, jobs: Sequence[Job], output_dir: Path) -> Runs:
    """What is known of every run whose pre-training is done; its log is copied to logs/."""
    runs: Runs = {}
    flops: dict[str, float] = {}  # of each setting
    for job in (job for job in jobs if job.is_done):
        own = runs.setdefault(job.setting, {})
        if job.step == PRETRAIN:
            if job.setting not in flops:
                args = main_module("pretrain").parse_args(job.all_flags)
                flops[job.setting] = training_flops(args)
            own[job.seed] = pretraining(job, output_dir, flops[job.setting])
        elif job.seed in own:
            add_measurement(own[job.seed], suite.steps[job.step].metric, job, output_dir)
    return {name: own for name, own in runs.items() if own}


def pretraining(job: Job, output_dir: Path, flops: float) -> dict:
    """Cost and losses of a pre-training, with room for what is measured later."""
    log = output_dir / LOGS / f"{job.run}.jsonl"
    log.parent.mkdir(exist_ok=True)
    shutil.copyfile(job.folder / LOG_NAME, log)
    lines = read_log(job.folder)
    last = lines[-1]
    return {
        "log": str(log.relative_to(output_dir)),
        "flags": job.flags,
        "gflops_per_image": flops / 1e9,
        "seconds": seconds_at(lines)[last["epoch"]],
        "cost": {PRETRAIN: cost_of_job(job)},
        "results": {by: last[key] for by, key in LOG_KEYS.items() if key in last},
    }


def add_measurement(run: dict, metric: str, job: Job, output_dir: Path) -> None:
    """Add what a job has measured to its run.

    Args:
        metric: name of the accuracy, if the job has trained a classifier.
    """
    run["cost"][job.step] = cost_of_job(job)
    if metric:
        run["results"][metric] = read_log(job.folder)[-1]["val_top1"]
        return
    found = parse_json(job.result.read_bytes())["results"]
    run["results"] |= found["pre-trained"]
    run[UNTRAINED] = run.get(UNTRAINED, {}) | found.get(UNTRAINED, {})
    run["predictions"] = str((job.folder / main_module("knn").PREDICTIONS).relative_to(output_dir))


def cost_of_job(job: Job) -> dict[str, float]:
    """Seconds and memory of a job; empty if they are not known."""
    return {key: value for key, value in (read_command(job) or {}).items() if key != "flags"}


def seconds_at(lines: Sequence[dict]) -> dict[int, float]:
    """Seconds of training until each epoch, by a log, whose own begin again after every stop."""
    found: dict[int, float] = {}
    total = before = 0.0
    for line in lines:
        total += line["seconds"] - (before if line["seconds"] > before else 0)
        before = line["seconds"]
        found[line["epoch"]] = total
    return found


def check(claim: Claim, suite: Suite, runs: Runs, output_dir: Path) -> dict[str, object] | None:
    """Check a claim with the seeds that both settings have; None without any."""
    first, second = (runs.get(name, {}) for name in (claim.first, claim.second))
    seeds = [
        seed
        for seed in sorted(first.keys() & second.keys())
        if all(claim.metric in own[seed]["results"] for own in (first, second))
    ]
    per_image = claim.metric in (REGRESSION, NEIGHBORS)
    if not seeds or (len(seeds) == 1 and not per_image):
        return None
    values = [[own[seed]["results"][claim.metric] for seed in seeds] for own in (first, second)]
    if per_image:
        paths = [output_dir / own[s]["predictions"] for own in (first, second) for s in seeds]
        labels, guesses = predicted(paths, claim.metric)
        difference = bootstrap_images(*np.split(guesses == labels, 2))
    else:
        difference = pair_runs(*values)
    scale = 100 / statistics.mean(values[1]) if claim.metric == PSNR else 1  # to percent
    difference = Difference(*(scale * value for value in difference))
    verdict = judge(difference, claim.relation, claim.margin)
    if len(seeds) < suite.seeds:
        verdict = f"unfinished: {len(seeds)} of {counted(suite.seeds, 'seed')}"
    return {
        **claim._asdict(),
        "values": values,
        "by_seed": [scale * (a - b) for a, b in zip(*values, strict=True)],
        "difference": difference._asdict(),
        "interval_over": "images" if per_image else "seeds",
        "verdict": verdict,
    }


def predicted(paths: Sequence[Path], by: str) -> tuple[np.ndarray, np.ndarray]:
    """Read labels (images,) and what each run predicts instead, (runs, images).

    Raises:
        InputError: the runs have other images.
    """
    rows, labels = [], None
    for path in paths:
        with np.load(path) as stored:
            if labels is not None and not np.array_equal(labels, stored["labels"]):
                raise InputError(
                    f"{path} is of other images than {paths[0]}: run one of them again"
                )
            labels = stored["labels"]
            rows.append(stored[f"pre-trained, {by}"])
    return labels, np.stack(rows)


def over_seeds(own: dict[int, dict], read: Callable[[dict], float | None]) -> list[float]:
    """Values of a setting's runs that have them."""
    return [value for run in own.values() if (value := read(run)) is not None]


def cpu_minutes(run: dict) -> float | None:
    """Processor time of a run's pre-training in minutes; None if it is not known."""
    seconds = run["cost"].get(PRETRAIN, {}).get("cpu_seconds")
    return None if seconds is None else seconds / 60


def minutes(run: dict) -> float:
    """Time of a run's pre-training by the clock, in minutes."""
    return run["seconds"] / 60


def cost_of(runs: Runs) -> tuple[str, Callable[[dict], float | None]]:
    """How the cost of these runs is named and read: processor time, if it is known of any."""
    if any(over_seeds(own, cpu_minutes) for own in runs.values()):
        return "processor minutes", cpu_minutes
    return "minutes", minutes


def settings_table(suite: Suite, runs: Runs) -> str:
    """Markdown: every setting's cost, and the mean, lowest and highest of each result."""
    measured = [
        by
        for by in (*ACCURACIES, *LOG_KEYS)
        if any(by in run["results"] for own in runs.values() for run in own.values())
    ]
    rows = []
    cost, cost_in = cost_of(runs)
    papers = [setting.paper for setting in suite.settings.values() if setting.paper]
    for name, own in runs.items():
        row = [suite.settings[name].label, *([suite.settings[name].paper] if papers else [])]
        row += [len(own), f"{next(iter(own.values()))['gflops_per_image']:.3g}"]
        row.append(spread(over_seeds(own, cost_in), 1))
        for by in measured:
            digits = 1 if by in ACCURACIES else 3 if by == LOSS else 2
            values = over_seeds(own, lambda run, by=by: run["results"].get(by))
            row.append(spread(values, digits))
        rows.append(row)
    before = [run[UNTRAINED] for own in runs.values() for run in own.values() if run.get(UNTRAINED)]
    if before:
        row = ["not pre-trained", *([""] if papers else []), len(before), "", ""]
        rows.append(row + [spread([v[by] for v in before if by in v], 1) for by in measured])
    titles = ["setting", *(["paper"] if papers else []), "seeds", "GFLOPs an image", cost]
    return markdown([*titles, *measured], rows)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean of values, and the lowest and highest of several."""
    if not values:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    ends = f" ({min(values):.{digits}f}–{max(values):.{digits}f})"
    return text + ends * (len(values) > 1)


def claims_table(suite: Suite, claims: Sequence[dict]) -> str:
    """Markdown: the paper's claims, what was seen, and the verdict."""
    rows = []
    for claim in claims:
        difference = claim["difference"]
        digits = 3 if claim["metric"] == LOSS else 2
        mean, low, high = (f"{difference[key]:+.{digits}f}" for key in ("mean", "low", "high"))
        unit = " %" if claim["metric"] == PSNR else ""
        rows.append(
            [
                f"{claim['text']} ({claim['source']})",
                claim["paper"],
                " against ".join(suite.settings[claim[key]].label for key in ("first", "second")),
                claim["metric"],
                f"{mean}{unit} [{low}, {high}], over {claim['interval_over']}",
                ", ".join(f"{value:+.{digits}f}" for value in claim["by_seed"]),
                GOALS[claim["relation"]].format(f"{claim['margin']:g}"),
                claim["verdict"],
            ]
        )
    titles = ["claim", "paper", "here", "by", "difference [95%]", "each seed"]
    return markdown([*titles, "shown if", "verdict"], rows)


def draw(suite: Suite, runs: Runs, path: Path) -> None:
    """Draw accuracies and cost of every setting: runs as points, their mean as a line."""
    names = [name for name in suite.settings if name in runs]
    panels = {
        f"{by}, %": [over_seeds(runs[n], lambda run, by=by: run["results"].get(by)) for n in names]
        for by in ACCURACIES
    }
    cost, cost_in = cost_of(runs)
    panels[f"pre-training, {cost}"] = [over_seeds(runs[n], cost_in) for n in names]
    panels = {title: rows for title, rows in panels.items() if any(rows)}
    figure = new_figure(2.2 + 2.4 * len(panels), 1.0 + 0.3 * len(names))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, rows) in zip(all_axes, panels.items(), strict=True):
        for row, values in enumerate(rows):
            axes.plot(values, [row] * len(values), "o", color="C0", ms=4, alpha=0.7)
            means = [statistics.mean(values)] if values else []
            axes.plot(means, [row] * len(means), "|", color="black", ms=13)
        axes.set_xlabel(title, fontsize=8)
        axes.grid(axis="y", alpha=0.3)
        axes.margins(x=0.1)
    all_axes[0].set_yticks(range(len(names)), [suite.settings[name].label for name in names])
    all_axes[0].invert_yaxis()
    save_figure(figure, path)
