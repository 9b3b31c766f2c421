"""The two scripts for a GPU, tried without one."""

import json
import os
import re
import subprocess
import sys
import tarfile

import pytest
import torch
from PIL import Image

import main_pretrain
from scripts import benchmark_pretrain
from scripts.gpu import images
from tests.helpers.files import write_images
from tests.helpers.processes import ROOT

pytestmark = pytest.mark.slow

FAILING = "raise SystemExit(1)"
LINES = """
source scripts/gpu/common.sh
start unused
part good 5 echo "fine"
part bad 5 sh -c 'echo "not fine"; exit 3'
part endless 1 sleep 30
skip other "nobody requested it"
finish env micro
"""


def bash(*words, out, **variables):
    """Run bash in the repository, with one thread and results in `out`."""
    env = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "OUT": str(out), **variables}
    unset = {"QUICK", "AGAINST", "DATA", "TESTS", "COMPILE"}
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        ["bash", *words],
        cwd=ROOT,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=400,
    )


def results(out):
    """Check that there are few result files; return the content of every JSON file."""
    names = [path.name for path in out.iterdir()]
    assert len(names) <= 8 and {"log.txt", "summary.md"} < set(names)
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def photos_tar(tmp_path):
    """A tar of five JPEGs."""
    folder = write_images(tmp_path / "photos", 5, size=40)
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for path in folder.iterdir():
            Image.open(path).save(path.with_suffix(".JPEG"))
            tar.add(path.with_suffix(".JPEG"))
            tar.add(path)
    return tmp_path / "photos.tar"


def test_the_first_run_measures_everything_and_names_a_part_that_fails(tmp_path):
    program, out = tmp_path / "theirs.py", tmp_path / "out"
    program.write_text(FAILING)
    done = bash("scripts/gpu/a.sh", out=out, QUICK="1", AGAINST=str(program))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "failed: against: exit code 2"
    found = results(out)
    assert set(found) == {"env", "micro", "eager", "blocks", "whole"}
    assert found["env"]["matmul_tflops"] > 0 and found["env"]["machine"]["commit"]
    groups = [row["group"] for row in found["micro"]["rows"]]
    assert {name: groups.count(name) for name in groups} == {"attention": 35, "mix": 8, "layer": 18}
    refused = {row["variant"] for row in found["micro"]["rows"] if "refused" in row}
    assert refused == {"efficient", "cudnn"}
    assert [len(found[name]["rows"]) for name in ("eager", "blocks", "whole")] == [2, 1, 1]
    for name in ("eager", "blocks", "whole"):
        for row in found[name]["rows"]:
            assert len(row["round_step_s"]) == 3
            assert row["images_per_s"] > 0 and row["first_step_s"] > 0 and len(row["kernels"]) == 25
    summary = (out / "summary.md").read_text()
    assert summary in done.stdout
    assert "| against | not measured |" in summary and "| whole: crossmae_vit_tiny" in summary
    log = (out / "log.txt").read_text()
    assert "exited with code 1" in log and "aten::addmm" in log and "== tests: done" in log


def test_the_second_run_measures_everything(tmp_path):
    out = tmp_path / "out"
    variables = {"DATA": str(photos_tar(tmp_path)), "TESTS": "-k attention", "COMPILE": "blocks"}
    done = bash("scripts/gpu/b.sh", out=out, QUICK="1", **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(out)
    assert set(found) == {"table4", "memory", "large", "high_resolution", "main"}
    steps = [len(found[name]["rows"]) for name in ("table4", "memory", "large", "high_resolution")]
    assert steps == [3, 2, 1, 1]
    for name in ("raw", "repeated_aug"):
        run = found["main"][name]
        assert run["steps"] > 0 and run["images_per_s"] > 0 and 0 <= run["data_wait"] < 1
        assert "--compile blocks" in " ".join(run["flags"])
    assert "| main_pretrain.py, raw | " in (out / "summary.md").read_text()
    assert "32 files, 5 of them distinct" in done.stdout
    assert "auto: skipped" in done.stdout


STAND_IN = """#!/usr/bin/env python3
import json, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.mark.parametrize(("script", "seconds"), [("a", 380), ("b", 420)])
@pytest.mark.parametrize("compile_mode", ["", "whole"])
def test_the_commands_of_a_real_run_parse(tmp_path, script, seconds, compile_mode):
    python, calls, out = tmp_path / "python", tmp_path / "calls", tmp_path / "out"
    python.write_text(STAND_IN.format(calls=str(calls)))
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "COMPILE": compile_mode, "TESTS": "-k attention"}
    variables |= {"AGAINST": __file__, "DATA": "images.tar"}
    done = bash(f"scripts/gpu/{script}.sh", out=out, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    limits = re.findall(r"== (\w+) \(limit (\d+) s\)", done.stdout)
    assert sum(int(limit) for name, limit in limits if name != "blocks") <= seconds
    assert ": skipped" not in done.stdout
    mains = 0
    for name, *argv in map(json.loads, calls.read_text().splitlines()):
        argv = [word.replace(str(out), str(tmp_path)) for word in argv]
        if name == "scripts/benchmark_pretrain.py":
            args = benchmark_pretrain.parse_args(argv)
            configs = benchmark_pretrain.list_configs(args, torch.device("cpu"))
            assert len(configs) <= benchmark_pretrain.MAX_COMPILED
        elif name == "scripts/gpu/pretrain.py":
            args = main_pretrain.parse_args(argv[3:])
            assert args.compile == (compile_mode or None) or args.batch_size == "auto"
            mains += 1
    assert mains == (3 if script == "b" else 0)


def test_parts_that_fail_or_take_too_long_are_named(tmp_path):
    done = bash("-euo", "pipefail", "-c", LINES, out=tmp_path / "out", QUICK="1")
    assert done.returncode == 1
    assert "fine\n== good: done" in done.stdout and "other: skipped, nobody" in done.stdout
    failed = ["failed: bad: exit code 3", "failed: endless: stopped after 4 s"]
    assert done.stdout.splitlines()[-2:] == failed
    assert "| env | not measured |" in done.stdout


def refused(done):
    """Return the error of a script that did not start."""
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("script", ["a", "b"])
def test_a_machine_without_a_gpu_is_refused(tmp_path, script):
    done = bash(f"scripts/gpu/{script}.sh", out=tmp_path / "out")
    assert "PyTorch does not find a GPU" in refused(done)
    assert not (tmp_path / "out").exists()


def test_a_python_without_torch_is_refused(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = bash("scripts/gpu/a.sh", out=tmp_path / "out", QUICK="1", PYTHON=str(python))
    assert f"{python} cannot import torch" in refused(done)


def test_earlier_results_are_kept(tmp_path):
    (tmp_path / "log.txt").touch()
    done = bash("scripts/gpu/a.sh", out=tmp_path, QUICK="1")
    assert f"{tmp_path} already contains results" in refused(done)


def test_skipped_tests_count_as_failed_where_a_gpu_is_required(tmp_path):
    words = [sys.executable, "scripts/gpu/run_tests.py", "-k", "same_bits"]
    for quick, code in {"1": 0, "": 1}.items():
        env = {**os.environ, "QUICK": quick}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stdout
        assert ("tests skipped: 1;" in done.stdout) == bool(code)


def test_a_folder_is_filled_with_jpegs_only(tmp_path, monkeypatch):
    photos_tar(tmp_path)
    folder = tmp_path / "filled"
    folder.mkdir()
    words = ["images.py", str(tmp_path / "photos"), str(folder), "12"]
    monkeypatch.setattr(sys, "argv", words)
    images.main()
    files = sorted(folder.iterdir())
    assert len(files) == 12 and {path.suffix for path in files} == {".jpg"}
    assert len({path.stat().st_ino for path in files}) == 5


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_data_without_jpegs_is_refused(tmp_path, monkeypatch, what):
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["images.py", str(tmp_path / what), str(tmp_path), "12"])
    with pytest.raises(SystemExit, match=r"error: .*set DATA to a tar or folder"):
        images.main()
