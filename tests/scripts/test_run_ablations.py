"""Comparisons of settings: what is run, in which order, what is kept, and what the numbers say."""

import json
import signal
import sys
from subprocess import CompletedProcess

import numpy as np
import pytest
from scipy import stats

import main_pretrain
from scripts import run_ablations
from scripts.ablations import cost, jobs, report, submit, suites
from scripts.ablations.images import data_flags
from scripts.ablations.jobs import plan_jobs
from scripts.ablations.statistics import (
    CONTRADICTED,
    OPEN,
    SHOWN,
    Difference,
    bootstrap_images,
    judge,
    pair_runs,
)
from scripts.ablations.suites import SUITES, Claim, Setting, Step, Suite
from tests.helpers.files import write_classes, write_images
from tests.helpers.processes import ROOT, finish, start, tasks_of, wait_for_line, wait_until
from tests.helpers.runs import refusal
from util.errors import InputError, RunError
from util.flops import crossmae_decoder_flops, encoder_flops
from util.runs.epoch_log import read_log

MICRO = "--model crossmae_vit_micro_patch4"
TINY = Suite(
    about="for tests",
    pretrain="--input_size 16 --decoder_depth 1 --epochs 2 --batch_size 8 --num_workers 0 "
    "--amp fp32 --knn_every 0 --eval_every 2",
    settings={
        "gamma_75": Setting("γ = .75", f"{MICRO} --pred_ratio 0.75"),
        "gamma_25": Setting("γ = .25", f"{MICRO} --pred_ratio 0.25"),
    },
    steps={
        "features": Step("knn", "--k 20 --crop_pct 1 --num_workers 0 --save_predictions"),
        "probe": Step(
            "linprobe",
            "--probe attentive --batch_size 8 --epochs 1 --num_workers 0",
            suites.PROBE,
            ("gamma_25",),
        ),
    },
    claims=(
        Claim("A third is enough", "Table 3c", "gamma_25", "not worse", "gamma_75", "83.2, 83.3"),
        Claim("It costs no loss", "none", "gamma_25", "lower", "gamma_75", metric=suites.LOSS),
        Claim("A probe", "none", "gamma_25", "higher", "gamma_75", metric=suites.PROBE),
    ),
    seeds=2,
)


def planned(suite, folder, *, seeds=None):
    return plan_jobs(suite, folder, ["--data_path", "images"], seeds=seeds)


# What is run


def test_first_seeds_come_first_and_rare_measurements_last(tmp_path):
    found = [str(job) for job in planned(TINY, tmp_path)]
    runs = ["gamma_75-0", "gamma_25-0", "gamma_75-1", "gamma_25-1"]
    expected = [f"{name}, {step}" for name in runs for step in ("pretrain", "features")]
    assert found == [*expected, "gamma_25-0, probe", "gamma_25-1, probe"]


def test_a_setting_replaces_flags_of_its_suite(tmp_path):
    job, *_ = planned(TINY._replace(pretrain=f"{TINY.pretrain} --pred_ratio 0.5"), tmp_path)
    args = main_pretrain.parse_args(job.all_flags)
    assert (args.pred_ratio, args.seed, args.data_path) == (0.75, 0, "images")
    assert args.output_dir == str(tmp_path / "gamma_75-0" / "pretrain")


@pytest.mark.parametrize("name", SUITES)
def test_every_command_of_every_suite_is_one_that_its_main_accepts(tmp_path, name):
    suite = SUITES[name]
    found = planned(suite, tmp_path)  # parses all
    assert {job.run.rpartition("-")[0] for job in found} == {*suite.settings}
    assert all(job.needs is None or job.needs.name.startswith("checkpoint-e") for job in found)
    named = {setting for claim in suite.claims for setting in (claim.first, claim.second)}
    named |= {setting for step in suite.steps.values() for setting in step.settings}
    assert named <= {*suite.settings}


def test_the_paper_suite_has_all_rows_of_its_tables():
    paper = SUITES["paper"]
    assert len(suites.TABLE_1) == 12 and len(paper.settings) == 30
    assert [*jobs.seeds_of(paper, paper.settings["gamma_25"])] == [0, 1, 2, 3]  # Table 14
    assert [*jobs.seeds_of(paper, paper.settings["grid"])] == [0]


def test_images_of_a_class_are_evenly_spaced(tmp_path):
    for name, number in (("ant", 6), ("bee", 4)):
        write_images(tmp_path / "train" / name, number)
    output = tmp_path / "out"
    flags = data_flags(tmp_path / "train", tmp_path / "val", per_class=2, output_dir=output)
    assert flags[:2] == ["--data_csv", str(output / "images.csv")]
    lines = (output / "images.csv").read_text().splitlines()
    images = ["ant/000.png,ant", "ant/003.png,ant", "bee/000.png,bee", "bee/002.png,bee"]
    assert lines == ["path,label", *images]
    assert data_flags(tmp_path, None, per_class=None, output_dir=output) == [
        "--data_path",
        str(tmp_path),
    ]
    with pytest.raises(InputError, match="lists other images: choose another --output_dir"):
        data_flags(tmp_path / "train", None, per_class=1, output_dir=output)
    with pytest.raises(InputError, match="has 4 images of bee, the suite needs 5 of each class"):
        data_flags(tmp_path / "train", None, per_class=5, output_dir=output)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--settings", "gama"], "--settings gama is not one of mae, gamma_75"),
        (["--data_path", "nowhere"], "nowhere does not exist: correct --data_path or --val_path"),
        (["--", "--partition", "x"], "flags after -- are for --submit"),
        (["--submit", "--report"], "--report cannot be combined with --submit"),
        (["--submit", "--at_once", 2], "--at_once cannot be combined with --submit"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_wrong_input_is_refused_in_one_sentence(tmp_path, capsys, argv, reason):
    words = ["--suite", "cpu", "--data_path", tmp_path, "--output_dir", tmp_path / "out", *argv]
    assert reason in refusal(capsys, *words, main=run_ablations.main)
    assert not (tmp_path / "out").exists()


# What the numbers say


@pytest.mark.parametrize(
    ("low", "high", "relation", "margin", "verdict"),
    [
        (-1.9, 0.5, "not worse", 2, SHOWN),
        (-2.1, 0.5, "not worse", 2, OPEN),
        (-4.0, -2.1, "not worse", 2, CONTRADICTED),
        (-1.9, 1.9, "equal", 2, SHOWN),
        (-1.9, 2.1, "equal", 2, OPEN),
        (2.1, 3.0, "equal", 2, CONTRADICTED),
        (-3.0, -2.1, "equal", 2, CONTRADICTED),
        (0.1, 3.0, "higher", 2, SHOWN),
        (-0.1, 3.0, "higher", 2, OPEN),
        (-3.0, -0.1, "higher", 2, CONTRADICTED),
        (-0.3, -0.1, "lower", 2, SHOWN),
        (-0.3, 0.1, "lower", 2, OPEN),
        (0.1, 0.3, "lower", 2, CONTRADICTED),
    ],
)
def test_a_verdict_needs_the_whole_interval(low, high, relation, margin, verdict):
    assert judge(Difference((low + high) / 2, low, high), relation, margin) == verdict


def test_the_bootstrap_is_that_of_drawing_images_one_by_one():
    rng = np.random.default_rng(0)
    first, second = rng.random((3, 400)) < 0.6, rng.random((3, 400)) < 0.5
    found = bootstrap_images(first, second)
    each = 100 * (first.mean(axis=0) - second.mean(axis=0))
    means = each[rng.integers(400, size=(10_000, 400))].mean(axis=1)
    assert found.mean == pytest.approx(each.mean())
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.2)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.2)


def test_equal_predictions_differ_by_nothing():
    correct = np.array([[True, False, True]])
    assert bootstrap_images(correct, correct) == (0, 0, 0)


def test_runs_are_compared_as_in_a_paired_t_test():
    first, second = [1.0, 2.5, 2.0], [0.5, 1.0, 1.9]
    found = pair_runs(first, second)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_seconds_of_a_stopped_run_are_those_of_its_attempts():
    seconds = [10.0, 20.0, 8.0, 18.0]  # stopped after two epochs
    lines = [{"epoch": n, "seconds": value} for n, value in enumerate(seconds, start=1)]
    assert report.seconds_at(lines) == {1: 10, 2: 20, 3: 28, 4: 38}


def test_runs_on_other_images_are_not_compared(tmp_path):
    for number, labels in enumerate(([0, 1], [1, 0])):
        guesses = {f"pre-trained, {suites.NEIGHBORS}": [0, 1]}
        np.savez(tmp_path / f"{number}.npz", labels=labels, **guesses)
    paths = [tmp_path / "0.npz", tmp_path / "1.npz"]
    labels, guesses = report.predicted(paths[:1] * 2, suites.NEIGHBORS)
    assert (labels.tolist(), guesses.tolist()) == ([0, 1], [[0, 1]] * 2)
    with pytest.raises(InputError, match=r"1\.npz is of other images than .*0\.npz"):
        report.predicted(paths, suites.NEIGHBORS)


def test_the_cost_is_that_of_the_formulas():
    flags = f"{MICRO} --input_size 32 --pred_ratio 0.25 --decoder_depth 4 --decoder_embed_dim 96"
    counted = cost.training_flops(main_pretrain.parse_args(f"{flags} --data_path x".split()))
    encoder = encoder_flops(16, dim=128, depth=6, patch_dim=48)
    widths = {"encoder_dim": 128, "dim": 96, "patch_dim": 48}
    decoder = crossmae_decoder_flops(16, 16, depth=4, maps=7, **widths)
    saved = 2 * 16 * 48 * 128  # the images need no gradient
    assert counted == 3 * (encoder + decoder) - saved


# Submission


# The launcher and squeue are replaced; tests/slurm submits to a real cluster.


@pytest.fixture
def submitted(monkeypatch):
    """Command lines of the launcher, in order."""
    found = []

    def fake(words, **_):
        if words[0] == "squeue":
            if words[-1] == "3":
                return CompletedProcess(words, 1, "", "squeue: error: Invalid job id specified")
            is_queued = words[-1] != "2"  # one has failed meanwhile
            return CompletedProcess(words, 0, "job" * is_queued, "")
        found.append(words)
        return CompletedProcess(words, 0, f"job {len(found)}: main_x.py", "")

    monkeypatch.setattr(submit.subprocess, "run", fake)
    monkeypatch.setattr(submit.shutil, "which", str)
    return found


def test_every_command_is_submitted_once_after_the_one_that_it_needs(tmp_path, submitted):
    found = [job for job in planned(TINY, tmp_path) if job.run == "gamma_25-0"]
    submit.submit_jobs(found, ["--partition", "p"])
    after = "--slurm_dependency=afterok:1"
    assert [words[3] for words in submitted] == ["pretrain", "knn", "linprobe"]
    assert [after in words for words in submitted] == [False, True, True]
    assert all(words[words.index("--partition") + 1] == "p" for words in submitted)
    assert submitted[1][submitted[1].index("--") + 1 :] == found[1].all_flags

    submit.submit_jobs(found, ["--partition", "p"])
    assert [words[3] for words in submitted[3:]] == ["knn", "linprobe"]
    assert all(after in words for words in submitted[3:])
    changed = [job._replace(flags=[*job.flags, "--amp", "bf16"]) for job in found]
    with pytest.raises(InputError, match="was made with other flags"):
        jobs.check_earlier(changed)


def test_a_queue_that_cannot_be_read_submits_nothing_again(tmp_path, submitted, monkeypatch):
    found = planned(TINY, tmp_path)[:1]
    submit.submit_jobs(found, [])
    error = "slurm_load_jobs error: Unable to contact slurm controller"
    unknown = CompletedProcess([], 1, "", f"{error}\n")
    monkeypatch.setattr(submit.subprocess, "run", lambda *_, **__: unknown)
    with pytest.raises(InputError, match=f"squeue failed: {error}$"):
        submit.submit_jobs(found, [])
    monkeypatch.setattr(submit.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match="--submit needs SLURM"):
        submit.submit_jobs(found, [])
    assert len(submitted) == 1


def test_a_refusal_of_the_launcher_is_passed_on(tmp_path, monkeypatch, capsys):
    write_classes(tmp_path / "images")
    monkeypatch.setitem(SUITES, "cpu", TINY)
    monkeypatch.setattr(submit.shutil, "which", str)
    argv = ["--suite", "cpu", "--data_path", tmp_path / "images", "--output_dir", tmp_path / "out"]
    sentence = refusal(capsys, *argv, "--submit", "--", "--nodes", "no", main=run_ablations.main)
    assert sentence.startswith("gamma_75-0, pretrain was not submitted: launch.py: error: ")
    assert "--nodes" in sentence


# Whole runs

PROGRAM = """
import sys
from subprocess import CompletedProcess
from tests.scripts.test_run_ablations import TINY
from scripts import run_ablations
from util.runs.run import run_main
run_ablations.SUITES["cpu"] = TINY
run_main(run_ablations.main)
"""


@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_comparison_goes_on_and_repeats_nothing(tmp_path, capsys):
    write_classes(tmp_path / "images")
    output = tmp_path / "out"
    argv = ["--suite", "cpu", "--data_path", tmp_path / "images", "--output_dir", output]
    words = [sys.executable, "-c", PROGRAM, *map(str, argv)]
    first = output / "gamma_75-0"
    for number in (signal.SIGKILL, signal.SIGTERM, None):
        process = start([*words, "--at_once", "2"], PYTHONPATH=str(ROOT))
        if number is not None:
            step = "pretrain" if number == signal.SIGKILL else "features"
            wait_until(lambda step=step: (first / step / "args.json").exists(), step)
            process.send_signal(number)
        code, out, err = finish(process)
        if number == signal.SIGKILL:
            wait_until(lambda: not tasks_of(first / "pretrain"), "the end of its commands")
        elif number == signal.SIGTERM:
            assert (code, err) == (143, "-c: stopped by SIGTERM\n")
        else:
            assert (code, err) == (0, ""), err
    assert "10 of 10 commands" in out

    # Each folder has one pre-training of two epochs, whatever it was stopped by.
    for name in ("gamma_75-0", "gamma_75-1", "gamma_25-0", "gamma_25-1"):
        assert [line["epoch"] for line in read_log(output / name / "pretrain")] == [1, 2]
        log = (output / "logs" / f"{name}.jsonl").read_text()
        assert log == (output / name / "pretrain" / "log.jsonl").read_text()
    content = json.loads((output / "cpu.json").read_text())
    assert {name: [*runs] for name, runs in content["runs"].items()} == {
        "gamma_75": ["0", "1"],
        "gamma_25": ["0", "1"],
    }
    assert [claim["metric"] for claim in content["claims"]] == [suites.REGRESSION, suites.LOSS]
    knn = json.loads((output / "gamma_25-1" / "features" / "knn.json").read_text())
    results, rest = (content["runs"][n]["1"]["results"] for n in ("gamma_25", "gamma_75"))
    assert knn["results"]["pre-trained"].items() <= results.items()
    assert (suites.PROBE in results, suites.PROBE in rest) == (True, False)
    assert "| γ = .25 | 2 |" in (output / "cpu.md").read_text()

    before = {path: path.stat().st_mtime_ns for path in output.glob("*-*/*/*")}
    code, out, _ = finish(start(words, PYTHONPATH=str(ROOT)))
    assert code == 0 and "10 of 10 commands are done" in out and "started" not in out
    assert before == {path: path.stat().st_mtime_ns for path in output.glob("*-*/*/*")}


def test_a_failed_command_is_named_with_its_output(tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "images", 3)  # no classes, so k-NN cannot be measured
    failing = TINY._replace(
        settings={"a": Setting("a", f"{MICRO} --resume nowhere")}, steps={}, claims=(), seeds=1
    )
    monkeypatch.setitem(SUITES, "cpu", failing)
    output = tmp_path / "out"
    argv = ["--suite", "cpu", "--data_path", tmp_path / "images", "--output_dir", output]
    sentence = refusal(capsys, *argv, main=run_ablations.main, code=1)
    log = output / "a-0" / "pretrain" / "output.txt"
    assert sentence.startswith(f"a-0, pretrain failed with code 2, see {log}: ")
    assert "nowhere" in log.read_text()


def test_two_comparisons_cannot_share_a_folder(tmp_path, monkeypatch, capsys):
    images, output = write_classes(tmp_path / "images"), tmp_path / "out"
    monkeypatch.setitem(SUITES, "cpu", TINY)
    argv = ["--suite", "cpu", "--data_path", images, "--output_dir", output]
    code = "import sys, time; from pathlib import Path; from util.runs.lock import FolderLock\n"
    code += "lock = FolderLock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    other = start([sys.executable, "-c", code, str(output)], PYTHONPATH=str(ROOT))
    wait_for_line(other, "locked")
    sentence = refusal(capsys, *argv, main=run_ablations.main)
    assert f"is writing to {output}: wait until it ends" in sentence
    other.kill()
    other.communicate()
    assert not (output / "gamma_75-0").exists()


def test_a_job_that_needs_what_nobody_makes_is_named(tmp_path):
    job, *_ = planned(TINY, tmp_path)
    with pytest.raises(RunError, match=r"pretrain needs .*nowhere, which does not exist"):
        jobs.run_jobs(
            [job._replace(needs=tmp_path / "nowhere")], tmp_path, at_once=1, num_threads=1
        )


def test_results_of_other_flags_are_not_mixed_in(tmp_path, monkeypatch, capsys):
    write_classes(tmp_path / "images")
    folder = tmp_path / "out" / "gamma_75-0" / "pretrain"
    folder.mkdir(parents=True)
    (folder / "command.json").write_text(json.dumps({"flags": ["--epochs", "3"]}))
    monkeypatch.setitem(SUITES, "cpu", TINY)
    argv = ["--suite", "cpu", "--data_path", tmp_path / "images"]
    sentence = refusal(capsys, *argv, "--output_dir", tmp_path / "out", main=run_ablations.main)
    assert sentence == (
        f"{folder} was made with other flags, --epochs 3: choose another --output_dir"
    )
