"""Markdown tables and a plot of a benchmark's results, which are dicts of plain values."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

MAX_NAME = 120  # characters; names of kernel templates have up to a thousand
ROW_COLUMNS = {  # title -> key
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
    "utilization %": "utilization_percent",
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
    """Format a table, with numbers to four significant digits and n/a for None."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value) or 1)))}f}"
        return "n/a" if value is None else str(value)

    rows = [titles, ["---"] * len(titles), *([cell(value) for value in line] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def columns_table(columns: dict[str, str], rows: Iterable[dict]) -> str:
    """Format a table with the given columns, title -> key."""
    return markdown([*columns], [[row[key] for key in columns.values()] for row in rows])


def main_table(results: Sequence[dict]) -> str:
    """Format the table of all measured rows."""
    failed = {"ms_per_image": "out of memory"}
    rows = [({**r, **failed} if r["out_of_memory"] else r) for r in results]
    return columns_table(MAIN_COLUMNS, rows)


def follow_flops(results: Sequence[dict]) -> list[dict[str, object]]:
    """Compare time with FLOPs, relative to the model's first row with the same dtype and memory."""
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
    """Format the table of time against FLOPs, see `follow_flops`."""
    titles = ["model", "dtype", "memory", "(ratio, blocks)", "px", "time ratio", "FLOP ratio"]
    return markdown([*titles, "deviation %"], [list(row.values()) for row in rows])


def against_table(rows: Sequence[dict]) -> str:
    """Format the comparison with a reference program, see `against.compare_pairs`."""
    return columns_table(AGAINST_COLUMNS, rows)


def kernels_text(title: str, kernels: Sequence[dict], *, num: int) -> str:
    """List the longest kernels of a step as plain text, one per line."""
    total = sum(kernel["ms"] for kernel in kernels)
    lines = [title, f"{'ms/step':>10} {'%':>6} {'calls':>6}  name (total {total:.3f} ms)"]
    lines += [
        f"{kernel['ms']:10.3f} {kernel['ms'] / total:6.1%} {kernel['calls']:6g}  "
        f"{kernel['name'][:MAX_NAME]}"
        for kernel in kernels[:num]
    ]
    return "\n".join(lines) + "\n"


def draw(results: Sequence[dict], path: Path) -> None:
    """Plot time against decoder FLOPs like Fig. 7, with a point for each decoder depth."""
    from matplotlib.figure import Figure  # optional

    axes = (figure := Figure(figsize=(8, 6), layout="constrained")).add_subplot()
    series: dict[str, list[dict]] = {}
    for result in results:
        if not result["out_of_memory"]:
            ratio = result["pred_ratio"] or result["mask_ratio"]
            name = "{model}, {input_size} px, {dtype}, {memory}".format_map(result)
            series.setdefault(f"{name}, pred_ratio {ratio:g}", []).append(result)
    for number, (name, points) in enumerate(series.items()):
        positions = [(point["decoder_gflops"], point["ms_per_image"]) for point in points]
        (line,) = axes.plot(*zip(*positions, strict=True), "o-", label=name)
        # Alternately above and below, because points of several ratios are close together.
        offset = (0, 7) if number % 2 else (0, -14)
        for point, position in zip(points, positions, strict=True):
            axes.annotate(
                point["decoder_depth"],
                position,
                xytext=offset,
                textcoords="offset points",
                ha="center",
                color=line.get_color(),
            )
    axes.set(xlabel="decoder GFLOPs / image, forward", ylabel="ms / image, training step")
    axes.set_xlim(left=0)
    axes.legend(fontsize=8, title="numbers are decoder blocks")
    figure.savefig(path)
