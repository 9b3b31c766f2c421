"""What the runs of a suite have shown so far: JSON, a Markdown table, a figure, and their logs."""

import logging
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from scripts.ablations.cost import training_flops
from scripts.ablations.jobs import KNN_REPORT, PREDICTIONS, Job, main_module, read_command
from scripts.ablations.statistics import Difference, bootstrap_images, judge, pair_runs
from scripts.ablations.suites import (
    FINE_TUNED,
    LOSS,
    NEIGHBORS,
    PRETRAIN,
    PROBE,
    PSNR,
    REGRESSION,
    Claim,
    Suite,
)
from scripts.benchmark.tables import markdown
from util.errors import counted
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


def write_report(suite: Suite, jobs: Sequence[Job], output_dir: Path) -> None:
    """Write results.json, results.md, results.png and logs/ for the jobs that are done."""
    runs = collect(suite, jobs, output_dir)
    if not runs:
        _logger.info("nothing is done yet, so there are no results")
        return
    claims = [found for claim in suite.claims if (found := check(claim, runs, output_dir))]
    content = {"versions": versions(), "about": suite.about, "runs": runs, "claims": claims}
    write_json(output_dir / "results.json", content, keep_earlier=False)
    text = f"{settings_table(suite, runs)}\n\n{claims_table(suite, claims)}\n"
    (output_dir / "results.md").write_text(text, encoding="utf-8")
    draw(suite, runs, output_dir / "results.png")
    _logger.info("results of %s: %s", counted(sum(map(len, runs.values())), "run"), output_dir)


def collect(suite: Suite, jobs: Sequence[Job], output_dir: Path) -> Runs:
    """What is known of every run whose pre-training is done; its log is copied to logs/."""
    runs: Runs = {}
    flops: dict[str, float] = {}
    for job in (job for job in jobs if job.is_done):
        name, _, seed = job.run.rpartition("-")
        if job.step == PRETRAIN:
            (output_dir / LOGS).mkdir(exist_ok=True)
            log = output_dir / LOGS / f"{job.run}.jsonl"
            shutil.copyfile(job.folder / LOG_NAME, log)
            if name not in flops:
                flops[name] = training_flops(main_module("pretrain").parse_args(job.all_flags))
            run = {"log": f"{LOGS}/{log.name}", "flags": job.flags}
            run |= {"gflops_per_image": flops[name] / 1e9, "cost": {}, "results": {}}
            last = read_log(job.folder)[-1]
            run["results"] |= {by: last[key] for by, key in LOG_KEYS.items() if key in last}
            runs.setdefault(name, {})[int(seed)] = run
        elif int(seed) not in runs.get(name, {}):
            continue
        run = runs[name][int(seed)]
        run["cost"][job.step] = {
            key: value for key, value in (read_command(job) or {}).items() if key != "flags"
        }
        if job.program == "main_knn.py":
            found = parse_json((job.folder / KNN_REPORT).read_bytes())["results"]
            run["results"] |= found["pre-trained"]
            run[UNTRAINED] = found.get(UNTRAINED)
            run["predictions"] = str((job.folder / PREDICTIONS).relative_to(output_dir))
        elif metric := suite.steps[job.step].metric if job.step != PRETRAIN else "":
            run["results"][metric] = read_log(job.folder)[-1]["val_top1"]
    return runs


def check(claim: Claim, runs: Runs, output_dir: Path) -> dict[str, object] | None:
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
        difference = bootstrap_images(
            *(correct(own, seeds, claim.metric, output_dir) for own in (first, second))
        )
    else:
        difference = pair_runs(*values)
    if claim.metric == PSNR:  # in percent of the second
        scale = 100 / statistics.mean(values[1])
        difference = Difference(*(scale * value for value in difference))
    return {
        **claim._asdict(),
        "values": values,
        "difference": difference._asdict(),
        "verdict": judge(difference, claim.relation, claim.margin),
    }


def correct(own: dict[int, dict], seeds: Sequence[int], by: str, output_dir: Path) -> np.ndarray:
    """Whether each validation image was classified correctly, bool (seeds, images)."""
    rows = []
    for seed in seeds:
        with np.load(output_dir / own[seed]["predictions"]) as stored:
            rows.append(stored[f"pre-trained, {by}"] == stored["labels"])
    return np.stack(rows)


def over_seeds(own: dict[int, dict], read: Callable[[dict], float | None]) -> list[float]:
    """Values of a setting's runs that have them."""
    return [value for run in own.values() if (value := read(run)) is not None]


def cpu_minutes(run: dict) -> float | None:
    """Processor time of a run's pre-training in minutes; None if it is not known."""
    seconds = run["cost"].get(PRETRAIN, {}).get("cpu_seconds")
    return None if seconds is None else seconds / 60


def settings_table(suite: Suite, runs: Runs) -> str:
    """Markdown: every setting's cost, and the mean, lowest and highest of each result."""
    measured = [
        by
        for by in (*ACCURACIES, *LOG_KEYS)
        if any(by in run["results"] for own in runs.values() for run in own.values())
    ]
    rows = []
    for name, own in runs.items():
        minutes = over_seeds(own, cpu_minutes)
        row = [suite.settings[name].label, len(own)]
        row.append(f"{next(iter(own.values()))['gflops_per_image']:.3g}")
        row.append(f"{statistics.mean(minutes):.1f}" if minutes else "")
        for by in measured:
            digits = 1 if by in ACCURACIES else 3 if by == LOSS else 2
            values = over_seeds(own, lambda run, by=by: run["results"].get(by))
            row.append(spread(values, digits))
        rows.append(row)
    titles = ["setting", "seeds", "GFLOPs an image", "processor minutes", *measured]
    return markdown(titles, rows)


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
                f"{mean}{unit} [{low}, {high}]",
                GOALS[claim["relation"]].format(f"{claim['margin']:g}"),
                claim["verdict"],
            ]
        )
    titles = ["claim", "paper", "here", "by", "difference [95%]", "shown if", "verdict"]
    return markdown(titles, rows)


def draw(suite: Suite, runs: Runs, path: Path) -> None:
    """Draw accuracies and cost of every setting: runs as points, their mean as a line."""
    names = [name for name in suite.settings if name in runs]
    panels = {
        f"{by}, %": [over_seeds(runs[n], lambda run, by=by: run["results"].get(by)) for n in names]
        for by in ACCURACIES
    }
    panels["pre-training, processor minutes"] = [over_seeds(runs[n], cpu_minutes) for n in names]
    panels = {title: rows for title, rows in panels.items() if all(rows)}
    figure = new_figure(2.2 + 2.4 * len(panels), 1.0 + 0.3 * len(names))
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, rows) in zip(all_axes, panels.items(), strict=True):
        for row, values in enumerate(rows):
            axes.plot(values, [row] * len(values), "o", color="C0", ms=4, alpha=0.7)
            axes.plot([statistics.mean(values)], [row], "|", color="black", ms=13)
        axes.set_xlabel(title, fontsize=8)
        axes.grid(axis="y", alpha=0.3)
        axes.margins(x=0.1)
    all_axes[0].set_yticks(range(len(names)), [suite.settings[name].label for name in names])
    all_axes[0].invert_yaxis()
    save_figure(figure, path)
