"""Print one table of the results of a.sh or b.sh, and write it to their folder.

python scripts/gpu/summary.py output/gpu-a env micro eager blocks whole against
"""

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmark.tables import markdown

Row = tuple[str, float | None, str]  # what, number, unit


def env_rows(_: str, content: dict) -> Iterable[Row]:
    """Yield the machine's rates."""
    yield "large matrix product, bf16", content["matmul_tflops"], "TFLOP/s"
    yield "host to device", content["host_to_device_gb_per_s"], "GB/s"
    yield "copy within the device", content["device_to_device_gb_per_s"], "GB/s"
    yield "free shared memory", content["shm_gib"], "GiB"


def micro_rows(_: str, content: dict) -> Iterable[Row]:
    """Yield the fastest attention for each shape, the mix's products, and the layers' extremes."""
    groups: dict[str, list[dict]] = {"attention": [], "mix": [], "layer": []}
    for row in content["rows"]:
        groups[row["group"]].append(row)
    attention: dict[str, list[dict]] = {}
    for row in groups["attention"]:
        attention.setdefault(row["what"], []).append(row)
    for what, rows in attention.items():
        ran = [row for row in rows if row["ms"] is not None]
        best = min(ran, key=lambda row: row["ms"], default={"ms": None, "variant": "none"})
        yield f"attention, {what}: {best['variant']} is fastest", best["ms"], "ms"
    for row in groups["mix"]:
        yield f"mix, {row['what']}, {row['variant']}", row["ms"], "ms"
    rates = [row["tflops"] for row in groups["layer"] if row["ms"] is not None]
    yield "linear layers, slowest product", min(rates, default=None), "TFLOP/s"
    yield "linear layers, fastest product", max(rates, default=None), "TFLOP/s"


def step_rows(name: str, content: dict) -> Iterable[Row]:
    """Yield speed and memory of training steps."""
    for row in content["rows"]:
        what = "{model} {label}, {input_size} px, {batch_size} images, {dtype}, {memory}"
        what = what.format_map(row)
        if row["out_of_memory"]:
            yield f"{name}: {what}", None, "images/s (out of memory)"
            continue
        peak = row["peak_memory_mb"]
        yield f"{name}: {what}", row["images_per_s"], "images/s"
        yield f"{name}: {what}, first step", row["first_step_s"], "s"
        yield f"{name}: {what}, peak memory", peak and peak / 1024, "GiB"


def against_rows(_: str, content: dict) -> Iterable[Row]:
    """Yield the comparison with a reference program."""
    for row in content["against"]:
        what = "against: {model} in {dtype}, theirs in {their_dtype}".format_map(row)
        yield what, row["time_ratio"], "times faster"
        yield f"{what}, peak memory", row["peak_ratio"], "of theirs"


def main_rows(_: str, content: dict) -> Iterable[Row]:
    """Yield the results of runs of main_pretrain.py."""
    runs = {name: content.get(name, {}) for name in ("auto", "raw", "repeated_aug")}
    yield "--batch_size auto", runs.pop("auto").get("largest_batch"), "images"
    for name, run in runs.items():
        waiting = run.get("data_wait")
        yield f"main_pretrain.py, {name}", run.get("images_per_s"), "images/s"
        yield f"main_pretrain.py, {name}, waiting for data", waiting and 100 * waiting, "%"


READERS: dict[str, Callable[[str, dict], Iterable[Row]]] = {
    "env": env_rows,
    "micro": micro_rows,
    "against": against_rows,
    "main": main_rows,
}


def main() -> None:
    """Read the results, and print and write the table."""
    folder, *names = sys.argv[1:]
    lines = []
    for name in names:
        path = Path(folder) / f"{name}.json"
        if not path.exists():
            lines.append([name, "not measured", "", ""])
            continue
        content = json.loads(path.read_text())
        device = content["machine"]["gpu"] or content["machine"]["cpu"]
        for what, number, unit in READERS.get(name, step_rows)(name, content):
            shown = "not measured" if number is None else float(number)
            lines.append([what, shown, unit, device])
    table = markdown(["what", "number", "unit", "device"], lines)
    (Path(folder) / "summary.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
