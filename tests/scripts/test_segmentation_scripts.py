"""The plot and the benchmark of segmentation; predictions are in test_main_segmentation.py."""

import json

import pytest
from PIL import Image

from scripts import benchmark_segmentation, plot_segmentation
from tests.helpers.runs import refusal, run


def write_scores(folder, iou, classes=("road", "sky")):
    folder.mkdir(parents=True)
    rows = [{"class": c, "iou": iou, "accuracy": iou, "pixels": 50.0} for c in classes]
    rows[-1]["iou"] = None
    (folder / "segmentation.json").write_text(json.dumps({"val_miou": iou, "classes": rows}))
    return folder


def test_runs_with_one_name_are_one_series(tmp_path):
    runs = [
        write_scores(tmp_path / name, iou) for name, iou in (("a-0", 1), ("a-1", 3), ("b-0", 5))
    ]
    series = plot_segmentation.group_runs(runs)
    assert {name: [r["mean"]["iou"] for r in found] for name, found in series.items()} == {
        "a": [1, 3],
        "b": [5],
    }
    run("--runs", *runs, "--output", tmp_path / "plot.png", main=plot_segmentation.main)
    assert Image.open(tmp_path / "plot.png").width > 500


def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys):
    a = write_scores(tmp_path / "a-0", 1)
    output = ["--output", tmp_path / "plot.png"]
    for other, reason in (
        (write_scores(tmp_path / "b-0", 1, ("road", "tree")), "different classes"),
        (tmp_path, "has no scores of main_segmentation.py"),
    ):
        assert reason in refusal(capsys, "--runs", a, other, *output, main=plot_segmentation.main)


@pytest.mark.slow
def test_steps_of_both_upernets_are_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark_segmentation, "HEAD_DIM", 8)
    path = tmp_path / "steps.json"
    argv = ["--size", "tiny_patch16", "--input_size", 32, "--rounds", 1, "--device", "cpu"]
    run(*argv, "--json", path, main=benchmark_segmentation.main)
    rows = json.loads(path.read_text())["rows"]
    assert [row["name"] for row in rows] == [
        "ours, UperNet",
        "transformers, UperNet",
        "ours, linear",
    ]
    assert all(len(row["round_step_s"]) == 1 for row in rows)
    assert "| ours, linear |" in capsys.readouterr().out
