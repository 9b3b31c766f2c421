"""The row that the log shows for each epoch: a few of its metrics, in columns."""

from collections.abc import Mapping
from typing import NamedTuple


class Column(NamedTuple):
    """How a metric is shown: label, value, unit, and another metric beside it in parentheses."""

    label: str
    form: str
    """For `str.format`, with a width that keeps columns aligned."""
    unit: str = ""
    beside: tuple[str, str] | None = None
    """Word and metric."""


UNTRAINED = "untrained"  # network before the first step
LOSS = "{:.4f}"
PERCENT = "{:5.1f}"
# Metrics that are not named here are only in log.jsonl and TensorBoard.
COLUMNS = {
    "loss": Column("loss", LOSS),
    "val_loss": Column("val", LOSS, beside=("blind", "blind_loss")),
    "val_psnr": Column("PSNR", "{:4.1f}", " dB", beside=("blind", "blind_psnr")),
    "val_top1": Column("top-1", PERCENT, "%"),
    "val_balanced": Column("balanced", PERCENT, "%"),
    "val_map": Column("mAP", PERCENT, "%"),
    "val_mae": Column("mean absolute error", "{:.5g}"),
    "val_r2": Column("R2", "{:.3f}"),
    "val_miou": Column("mIoU", PERCENT, "%"),
    "val_box_ap": Column("box AP", PERCENT),
    "val_mask_ap": Column("mask AP", PERCENT),
    "knn20": Column("k-NN", PERCENT, "%", beside=(UNTRAINED, "untrained_knn20")),
}


def cells(
    values: Mapping[str, float],
    notes: Mapping[str, str] | None = None,
    *,
    at_start: str = UNTRAINED,
) -> list[str]:
    """Return the text of each metric of an epoch that has a column, in the order of COLUMNS.

    Args:
        notes: metric -> what to know about its values, shown with each.
        at_start: what the network before the first step is called.
    """
    found = []
    for name, column in COLUMNS.items():
        if name not in values:
            continue
        text = f"{column.label} {column.form.format(values[name])}{column.unit}"
        remarks = [notes[name]] if notes and name in notes else []
        if column.beside is not None and column.beside[1] in values:
            word, other = column.beside
            word = at_start if word == UNTRAINED else word
            remarks.append(f"{word} {column.form.format(values[other]).strip()}")
        found.append(f"{text} ({'; '.join(remarks)})" if remarks else text)
    return found
