"""Run main_pretrain.py for a few seconds and record its speed.

    python scripts/gpu/pretrain.py output/main.json NAME SECONDS FLAGS...

After SECONDS the run is sent SIGTERM; it saves and ends with code 143. Images per second and the
fraction of time spent waiting for data are taken from its log, without the first log point, which
includes compilation and the start of the loader.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmark.step import describe_machine
from util.runs.files import write_json
from util.runs.run import versions
from util.runs.run_log import SPEED

ROOT = Path(__file__).resolve().parents[2]
STOPPED, KILLED, SECONDS_TO_SAVE = 143, -9, "18"
ALWAYS = ["--epochs", "1000", "--save_every", "1000", "--visualize_every", "1000"]


def read_speed(log_dir: Path) -> dict[str, float | int]:
    """Read images per second and the fraction of waiting, over steps after the first log point."""
    log = EventAccumulator(str(log_dir)).Reload()
    names = [f"{SPEED}/{name}_by_step" for name in ("images_per_s", "data_wait")]
    if names[0] not in log.Tags()["scalars"]:
        return {"steps": 0}
    speeds, fractions = map(log.Scalars, names)
    seconds = waited = steps = 0.0
    for before, speed, fraction in zip(speeds, speeds[1:], fractions[1:], strict=False):
        taken = (speed.step - before.step) / speed.value  # divided by the batch size
        seconds, waited = seconds + taken, waited + taken * fraction.value
        steps += speed.step - before.step
    if not steps:
        return {"steps": 0}
    return {"steps": int(steps), "images_per_s": steps / seconds, "data_wait": waited / seconds}


def record(path: Path, name: str, found: dict) -> None:
    """Write the results of a run to the file, which other runs share."""
    content = json.loads(path.read_text()) if path.exists() else {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    content["machine"] = {**describe_machine(device), **versions()}
    write_json(path, {**content, name: found}, keep_earlier=False)


def main() -> int:
    """Run, write the results under the run's name, and return the exit code."""
    path, name, seconds, *flags = sys.argv[1:]
    found: dict[str, object] = {"flags": flags}
    with tempfile.TemporaryDirectory() as folder:
        words = ["timeout", "--preserve-status", "-s", "TERM", "-k", SECONDS_TO_SAVE, seconds]
        words += [sys.executable, str(ROOT / "main_pretrain.py"), *ALWAYS, *flags]
        words += ["--output_dir", folder]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(words, **pipes) as process:
            for line in process.stdout:
                print(line, end="")
                if match := re.search(r"--batch_size auto: (\d+) image", line):
                    found["largest_batch"] = int(match[1])
                    record(Path(path), name, found)
        if process.returncode in (0, STOPPED, KILLED):
            found |= read_speed(Path(folder))
            record(Path(path), name, found)
    if process.returncode not in (0, STOPPED, KILLED):
        print(f"main_pretrain.py exited with code {process.returncode}")
        return 1
    if not (found["steps"] or "largest_batch" in found):
        print(f"main_pretrain.py did not reach its second log point in {seconds} s")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
