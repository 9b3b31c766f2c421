"""Curves of runs over their steps."""

import json

from PIL import Image

from scripts import plot_runs
from tests.helpers.runs import refusal, run


def write_log(folder, *values):
    folder.mkdir(parents=True)
    lines = [{"epoch": n, "step": 10 * n, "val_ap": v} for n, v in enumerate(values, start=1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_with_one_name_are_one_series(tmp_path):
    a, b = (write_log(tmp_path / f"a-{seed}", 1.0, 2.0 + seed) for seed in (0, 1))
    c = write_log(tmp_path / "c-0", 3.0)
    assert plot_runs.series_of([a, b, c]) == {"a": [a, b], "c": [c]}
    assert plot_runs.read_curve(b, "val_ap") == {10: 1.0, 20: 3.0}
    assert plot_runs.read_curve(b, "val_ap", "epoch") == {1: 1.0, 2: 3.0}
    output = tmp_path / "plot.png"
    argv = ["--runs", a, b, c, "--metrics", "val_ap", "--x", "epoch", "--y_range", 0, 2]
    run(*argv, "--output", output, main=plot_runs.main)
    assert Image.open(output).width > 300


def test_a_metric_that_a_log_lacks_is_refused(tmp_path, capsys):
    folder = write_log(tmp_path / "a-0", 1.0)
    argv = ["--runs", folder, "--metrics", "val_map", "--output", tmp_path / "plot.png"]
    assert "has no val_map" in refusal(capsys, *argv, main=plot_runs.main)
    argv[1] = tmp_path / "b"
    assert str(tmp_path / "b") in refusal(capsys, *argv, main=plot_runs.main)
