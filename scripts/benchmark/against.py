"""Comparison with a reference program that measures the same training step.

Protocol: the reference program takes the flags --model --img_size --batch_size --decoder_depth
--mask_ratio --pred_ratio --device --dtype --steps --warmup, and prints one line of JSON with KEYS.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from tqdm import tqdm

from util.errors import InputError

KEYS = (
    "median_step_s",
    "median_step_cpu_s",
    "images_per_s",
    "saved_activation_mb_per_image",
    "peak_memory_mb",
)
ROW = ("model", "label", "input_size", "dtype", "memory", "batch_size")  # identify a row of ours


def flag_words(flags: dict[str, object]) -> list[str]:
    """Turn flags by name into command-line words."""
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def is_measurement(found: object) -> bool:
    """Whether a line of JSON follows the protocol; only `peak_memory_mb` may be null, on a CPU."""
    return isinstance(found, dict) and all(
        isinstance(found.get(key), int | float) or (key == "peak_memory_mb" and key in found)
        for key in KEYS
    )


def run_python(words: Sequence[str], *, threads: int) -> str:
    """Run a Python program in a separate process; return its output.

    Raises:
        InputError: it fails.
    """
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    result = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env={**os.environ, **limits}
    )
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no error message"])[-1]
        raise InputError(f"{words[0]} exited with code {result.returncode}: {last}")
    return result.stdout


def run_program(program: str, flags: dict[str, object], threads: int) -> dict:
    """Run a reference program and read its JSON line.

    Args:
        program: path.
        flags: the protocol's flags, by name.

    Raises:
        InputError: it fails, or does not print such a line.
    """
    words = flag_words(flags)
    for line in reversed(run_python([program, *words], threads=threads).splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if is_measurement(found):
            return found
    raise InputError(
        f"{program} did not print a line of JSON with {', '.join(KEYS)}, so it cannot be compared "
        "with: see scripts/benchmark/against.py"
    )


def saved_by_twice(program: str, flags: dict[str, object], threads: int) -> float | None:
    """Saved MiB per image at twice the batch size; None if the program fails there."""
    twice = {**flags, "batch_size": 2 * flags["batch_size"], "steps": 1, "warmup": 0}
    try:
        return run_program(program, twice, threads)["saved_activation_mb_per_image"]
    except InputError:
        return None


def compare_pairs(
    pairs: Sequence[tuple[dict, dict]], *, seconds: str, saved_twice: float | None
) -> dict[str, object]:
    """Summarize pairs of measurements, ours and theirs; None for ratios that either side lacks.

    Args:
        pairs: a row of ours, with ROW and `MeasuredStep.results`, and KEYS of theirs.
        seconds: the key of their time that is measured in the same way as ours.
        saved_twice: see `saved_by_twice`.

    Returns:
        ROW, and medians over the pairs: of time, theirs / ours, with extremes; of bytes, ours /
        theirs, for this batch, for one more image, and at the peak.
    """

    def ratios(ours: str, theirs: str) -> list[float]:
        return [a[ours] / b[theirs] for a, b in pairs if a[ours] and b[theirs]]

    def median(values: Sequence[float]) -> float | None:
        return statistics.median(values) if values else None

    times = [1 / ratio for ratio in ratios("median_step_s", seconds)]
    saved = "saved_activation_mb_per_image"
    ours, theirs = pairs[-1]
    our_slope = ours["saved_slope_mb_per_image"]
    their_slope = None if saved_twice is None else 2 * saved_twice - theirs[saved]
    return {
        **{name: ours[name] for name in ROW},
        "time_ratio": median(times),
        "time_ratio_min": min(times, default=None),
        "time_ratio_max": max(times, default=None),
        "saved_ratio": median(ratios("saved_mb_per_image", saved)),
        "saved_slope_ratio": our_slope / their_slope if our_slope and their_slope else None,
        "peak_ratio": median(ratios("peak_memory_mb", "peak_memory_mb")),
        "pairs": [{"ours": a, "theirs": b} for a, b in pairs],
    }


def compare_interleaved(
    program: str,
    matches: Sequence[tuple[Callable[[], list[dict]], dict[str, object]]],
    *,
    rounds: int,
    threads: int,
    seconds: str,
) -> Iterator[list[dict[str, object]]]:
    """Run ours and a reference program alternately, round by round.

    Args:
        program: path.
        matches: functions that run ours and return its rows, with the program's matching flags.
        seconds: see `compare_pairs`.

    Yields:
        The rows so far, see `compare_pairs`: after every round, and at the end with the bytes of
        one more image.

    Raises:
        InputError: one of the two fails.
    """
    pairs: list[list[tuple[list[dict], dict]]] = [[] for _ in matches]

    def rows(saved_twice: Sequence[float | None]) -> list[dict[str, object]]:
        return [
            compare_pairs(
                [(ours[index], theirs) for ours, theirs in found],
                seconds=seconds,
                saved_twice=twice,
            )
            for found, twice in zip(pairs, saved_twice, strict=True)
            for index in range(len(found[0][0]))
        ]

    for _ in tqdm(range(rounds), disable=None, unit="round", leave=False):
        for (run_ours, flags), found in zip(matches, pairs, strict=True):
            ours = run_ours()
            found.append((ours, run_program(program, flags, threads)))
        yield rows([None] * len(matches))
    yield rows([saved_by_twice(program, flags, threads) for _, flags in matches])
