"""What a benchmark has measured, as Markdown and as a picture; rows come as plain values."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

MAX_NAME = 120  # characters; templates of kernels have up to a thousand
ROW_COLUMNS = {  # title -> key, of what a row measures
    "model": "model",
    "(ratio, blocks)": "label",
    "px": "input_size",
    "dtype": "dtype",
    "memory": "memory",
    "batch": "batch_size",
}
MAIN_COLUMNS = {
    **ROW_COLUMNS,
    "ms/image": "ms_per_image",
    "± %": "spread_percent",
    "images/s": "images_per_s",
    "peak MiB": "peak_memory_mb",
    "saved MiB/image": "saved_mb_per_image",
    "of one more image": "saved_slope_mb_per_image",
    "GFLOPs encoder": "encoder_gflops",
    "decoder": "decoder_gflops",
    "total": "total_gflops",
    "utilisation %": "utilisation_percent",
}
AGAINST_COLUMNS = {
    **ROW_COLUMNS,
    "their dtype": "their_dtype",
    "times faster": "time_ratio",
    "slowest": "time_ratio_min",
    "fastest": "time_ratio_max",
    "saved bytes": "saved_ratio",
    "of one more image": "saved_slope_ratio",
    "peak": "peak_ratio",
}


def markdown(titles: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table; numbers have four figures, and what is missing is n/a."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value) or 1)))}f}"
        return "n/a" if value is None else str(value)

    rows = [titles, ["---"] * len(titles), *([cell(value) for value in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def columns_table(columns: dict[str, str], rows: Iterable[dict]) -> str:
    """A table of rows by their keys."""
    return markdown([*columns], [[row[key] for key in columns.values()] for row in rows])


def main_table(results: Sequence[dict]) -> str:
    """Every row with what was measured."""
    failed = {"ms_per_image": "out of memory"}
    rows = [({**r, **failed} if r["out_of_memory"] else r) for r in results]
    return columns_table(MAIN_COLUMNS, rows)


def follow_flops(results: Sequence[dict]) -> list[dict[str, object]]:
    """Whether time follows FLOPs: rows of a model against the first with its dtype and memory."""
    first: dict[tuple, dict] = {}
    rows = []
    for result in results:
        if result["out_of_memory"]:
            continue
        names = {key: result[key] for key in ("model", "dtype", "memory")}
        base = first.setdefault(tuple(names.values()), result)
        time_ratio = result["ms_per_image"] / base["ms_per_image"]
        flop_ratio = result["total_gflops"] / base["total_gflops"]
        where = {"label": result["label"], "input_size": result["input_size"]}
        ratios = {"time": time_ratio, "flops": flop_ratio}
        rows.append({**names, **where, **ratios, "deviation": 100 * (time_ratio / flop_ratio - 1)})
    return rows


def flops_table(rows: Sequence[dict]) -> str:
    """Time against FLOPs, see `follow_flops`."""
    titles = ["model", "dtype", "memory", "(ratio, blocks)", "px", "time ratio", "FLOP ratio"]
    return markdown([*titles, "deviation %"], [list(row.values()) for row in rows])


def against_table(rows: Sequence[dict]) -> str:
    """Pairs of ours and another program's steps, see `scripts.benchmark.against.compare_pairs`."""
    return columns_table(AGAINST_COLUMNS, rows)


def kernels_text(title: str, kernels: Sequence[dict], *, num: int) -> str:
    """The longest kernels of a step as plain text, one a line."""
    total = sum(kernel["ms"] for kernel in kernels)
    lines = [title, f"{'ms a step':>10} {'share':>6} {'calls':>6}  name, of {total:.3f} ms in all"]
    lines += [
        f"{kernel['ms']:10.3f} {kernel['ms'] / total:6.1%} {kernel['calls']:6g}  "
        f"{kernel['name'][:MAX_NAME]}"
        for kernel in kernels[:num]
    ]
    return "\n".join(lines) + "\n"


def draw(results: Sequence[dict], path: Path) -> None:
    """Draw decoder FLOPs and time, as Fig. 7 does with accuracy: a point for each depth."""
    from matplotlib.figure import Figure  # optional

    axes = (figure := Figure(figsize=(8, 6), layout="constrained")).add_subplot()
    series: dict[str, list[dict]] = {}
    for result in results:
        if not result["out_of_memory"]:
            ratio = result["pred_ratio"] or result["mask_ratio"]
            name = "{model}, {input_size} px, {dtype}, {memory}".format_map(result)
            series.setdefault(f"{name}, pred_ratio {ratio:g}", []).append(result)
    for number, (name, points) in enumerate(series.items()):
        places = [(point["decoder_gflops"], point["ms_per_image"]) for point in points]
        (line,) = axes.plot(*zip(*places, strict=True), "o-", label=name)
        # Above one line and below the next, because points of several ratios lie close together.
        offset = (0, 7) if number % 2 else (0, -14)
        for point, place in zip(points, places, strict=True):
            axes.annotate(
                point["decoder_depth"],
                place,
                xytext=offset,
                textcoords="offset points",
                ha="center",
                color=line.get_color(),
            )
    axes.set(xlabel="decoder GFLOPs / image, forward", ylabel="ms / image, training step")
    axes.set_xlim(left=0)
    axes.legend(fontsize=8, title="numbers are decoder blocks")
    figure.savefig(path)
