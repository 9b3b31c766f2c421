"""The quick tests at both ends of requirements.txt, with a stand-in for Python."""

import os
import subprocess

import pytest

from tests.helpers.processes import ROOT

FAKE_PYTHON = """#!/bin/sh
echo "$@" >>{folder}/calls
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") [ "$3" != list ] || echo "torch 2.{name}" ;;
    "-m pytest") exit {code} ;;
    "--version ") echo "Python 3.{name}" ;;
esac
"""


@pytest.fixture
def run_ends(tmp_path):
    """Run the script; return the finished process and the calls of the stand-in."""

    def run(*argv, code=0):
        python = {"folder": tmp_path, "code": code}
        for end in ("lower", "upper"):
            (tmp_path / end).write_text(FAKE_PYTHON.format(name=end, **python))
            (tmp_path / end).chmod(0o755)
        env = {f"PYTHON_{end.upper()}": str(tmp_path / end) for end in ("lower", "upper")}
        script = ROOT / "scripts" / "test_versions.sh"
        done = subprocess.run(
            ["bash", script, *argv], env={**os.environ, **env}, capture_output=True, text=True
        )
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_both_ends_are_installed_and_tested(run_ends, tmp_path):
    envs = tmp_path / "envs"
    done, calls = run_ends(envs)
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in calls]
    assert [w[1] for w in words if w[:1] == ["-m"] and "list" not in w] == 2 * [
        *("venv", "pip", "pytest")
    ]
    requirements = (ROOT / "requirements.txt").read_text()
    lines = (envs / "lower.txt").read_text().split()
    lower = dict(line.split("==") for line in lines if "<" not in line)
    readers = {"tifffile", "imagecodecs"}  # without an upper end
    assert lower.keys() == {"torch", "torchvision", "timm", "numpy", *readers}
    for package, version in lower.items():
        upper = "\n" if package in readers else ",<"
        assert f"\n{package}>={version.removesuffix('.*')}{upper}" in requirements
    assert (envs / "upper.txt").read_text() == ""
    assert "torch 2.lower" in done.stdout and "torch 2.upper" in done.stdout


def test_the_upper_end_is_tested_where_the_lower_one_failed(run_ends, tmp_path):
    done, calls = run_ends(tmp_path / "envs", code=1)
    assert done.returncode == 1
    assert sum(call.startswith("-m pytest") for call in calls) == 2


def test_environments_stay_outside_the_repository(run_ends):
    done, calls = run_ends(ROOT / "envs")
    assert done.returncode == 1
    assert "name a folder outside the repository" in done.stderr
    assert calls == [] and not (ROOT / "envs").exists()
