"""The notebook's cells run in order, and what its text says is so."""

import json
import warnings

import matplotlib.pyplot as plt
import pytest

from tests.helpers.processes import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "tour.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
FEWER = {  # what makes the cells quick
    "epochs, batch_size = 16, 32": "epochs, batch_size = 1, 32",
    'images, labels = read("train")': 'images, labels = (part[:160] for part in read("train"))',
}


def run_cells(monkeypatch, changes):
    """Execute the code cells; return their names."""
    monkeypatch.chdir(ROOT / "docs")
    plt.switch_backend("Agg")
    names = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
        for cell in CODE:
            text = "".join(cell["source"])
            for old, new in changes.items():
                text = text.replace(old, new)
            exec(text, names)
            plt.close("all")
    return names


def test_the_cells_run(monkeypatch):
    names = run_cells(monkeypatch, FEWER)
    assert len(names["losses"]) == 5
    assert names["difference"] < 1e-6
    assert names["maps"].shape == (6, 8, 8)


@pytest.mark.slow
def test_the_features_learn_what_the_text_says(monkeypatch):
    names = run_cells(monkeypatch, {})
    assert sum(names["losses"][-20:]) < 0.5 * sum(names["losses"][100:120])
    assert names["accuracy"] > names["untrained_accuracy"] + 8


def test_outputs_are_kept_and_small():
    kinds = [output["output_type"] for cell in CODE for output in cell["outputs"]]
    assert kinds.count("display_data") == 5
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert "Traceback" not in json.dumps(NOTEBOOK) and "/tmp" not in json.dumps(NOTEBOOK)
    assert (ROOT / "docs" / "tour.ipynb").stat().st_size < 300_000
