"""Setting up `.venv`, with a stand-in for Python."""

import os
import subprocess

import pytest

from tests.helpers.processes import ROOT

# What each call of the stand-in does: `-c` is a check, `-m pip` an installation.
FAKE_PYTHON = """#!/bin/sh
echo "$@" >>calls
case "$1 $2" in
    "-c "*) {check} ;;
    "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip") {pip} ;;
    "--version ") echo "Python 3.12.0" ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    """Run install_into_venv in an empty folder; return the finished process and the calls."""
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "requirements-pinned.txt").write_text("torch==2\n")
    (tmp_path / "requirements-dev.txt").write_text("-r requirements.txt\npytest\n")

    def run(requirements="requirements.txt", check="exit 0", pip="exit 0"):
        python = tmp_path / "python3"
        python.write_text(FAKE_PYTHON.format(check=check, pip=pip))
        python.chmod(0o755)
        (tmp_path / "calls").write_text("")
        script = f'set -euo pipefail; source "{ROOT}/scripts/setup.sh"; install_into_venv "$0"'
        done = subprocess.run(
            ["bash", "-c", script, requirements],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": str(python)},
            capture_output=True,
            text=True,
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        return done, [call for call in calls if call.startswith(("-m pip", "-m venv"))]

    return run


def test_a_second_run_installs_nothing(install):
    first, calls = install()
    assert first.returncode == 0
    assert [call.split()[1] for call in calls] == ["venv", "pip"]
    second, calls = install()
    assert second.returncode == 0
    assert calls == []
    assert "requirements.txt is installed" in second.stdout


def test_the_tests_install_what_they_need_beside(install):
    install()
    done, calls = install("requirements-dev.txt")
    assert done.returncode == 0
    assert len(calls) == 1 and calls[0].endswith("-r requirements-dev.txt")


def test_pinned_versions_are_installed(install):
    assert install()[1][-1].endswith("-c requirements-pinned.txt -r requirements.txt")


@pytest.mark.parametrize("changed", ["requirements.txt", "requirements-pinned.txt"])
def test_changed_requirements_are_installed(install, tmp_path, changed):
    install()
    (tmp_path / changed).write_text("torch==3\ntimm\n")
    assert len(install()[1]) == 1
    assert install()[1] == []


def test_a_failed_installation_is_tried_again(install, tmp_path):
    done, _ = install(pip="exit 1")
    assert done.returncode == 1
    assert "pip could not install requirements.txt" in done.stderr
    (tmp_path / ".venv" / "bin" / "python").unlink()  # the stand-in that fails
    done, calls = install()
    assert done.returncode == 0
    assert calls[-1].endswith("-r requirements.txt")


MISMATCH = """case "$2" in
    *torchvision*) echo "RuntimeError: operator torchvision::nms does not exist" >&2; exit 1 ;;
esac"""


def test_torch_and_torchvision_of_different_builds_are_found(install):
    done, _ = install(check=MISMATCH)
    assert done.returncode == 1
    assert "operator torchvision::nms does not exist" in done.stderr
    assert "torch and torchvision in .venv do not match: remove .venv" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_build_that_was_installed_later_is_found(install, tmp_path):
    install()
    (tmp_path / ".venv" / "lib/python3.12/site-packages/torch-3.dist-info").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").unlink()  # the stand-in that passes every check
    done, _ = install(check=MISMATCH)
    assert done.returncode == 1
    assert "torch and torchvision in .venv do not match: remove .venv" in done.stderr


def test_an_old_python_is_refused(install, tmp_path):
    done, calls = install(check="exit 1")
    assert done.returncode == 1
    assert "Python 3.10 or newer is needed" in done.stderr
    assert calls == []
    assert not (tmp_path / ".venv").exists()


def test_shell_scripts_keep_their_line_ends_on_every_system():
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    listed = git("ls-files")
    if listed.returncode:
        pytest.skip("this is no git repository")
    files = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    scripts = [name for name in files if (ROOT / name).read_bytes().startswith(b"#!")]
    assert "scripts/setup.sh" in files and scripts
    attributes = git("check-attr", "eol", "--", *scripts, "scripts/setup.sh").stdout.splitlines()
    assert [line for line in attributes if not line.endswith(": eol: lf")] == []
