"""Setting up `.venv`, with a stand-in for Python."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, finish, start, wait_until

# What each call of the stand-in does: `-c` is a check, `-m pip` an installation.
FAKE_PYTHON = """#!/bin/sh
echo "$@" >>calls
case "$1 $2" in
    "-c "*) {check} ;;
    "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python; {venv} ;;
    "-m pip") {pip} ;;
    "--version ") echo "Python 3.12.0" ;;
esac
"""


SCRIPT = f'set -euo pipefail; source "{ROOT}/scripts/setup.sh"; install_into_venv "$0"'


@pytest.fixture
def install(tmp_path):
    """Run install_into_venv in an empty folder; return the finished process and the calls."""
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "requirements-pinned.txt").write_text("torch==2\n")
    (tmp_path / "requirements-dev.txt").write_text("-r requirements.txt\npytest\n")

    def run(requirements="requirements.txt", **commands):
        python = write_python(tmp_path, **commands)
        (tmp_path / "calls").write_text("")
        done = subprocess.run(
            ["bash", "-c", SCRIPT, requirements],
            cwd=tmp_path,
            env={**os.environ, "PYTHON": str(python)},
            capture_output=True,
            text=True,
        )
        calls = (tmp_path / "calls").read_text().splitlines()
        return done, [call for call in calls if call.startswith(("-m pip", "-m venv"))]

    return run


def write_python(folder, check="exit 0", venv=":", pip="exit 0"):
    python = folder / "python3"
    python.write_text(FAKE_PYTHON.format(check=check, venv=venv, pip=pip))
    python.chmod(0o755)
    return python


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


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
# As in a terminal, even where these tests run in the background of a script.
IN_TERMINAL = ["env", "--default-signal=INT,TERM,HUP", "bash", "-c", SCRIPT, "requirements.txt"]
WAITS = "mkdir -p ${TMPDIR:-/tmp}/pip-download; echo $$ >number; exec sleep 1000"


def stop(folder, number, **commands):
    """Start an installation and send it a signal when its child waits."""
    (folder / "temporary").mkdir()
    python = write_python(folder, **commands)
    variables = {"PYTHON": str(python), "TMPDIR": str(folder / "temporary")}
    process = start(IN_TERMINAL, cwd=folder, **variables)
    file = folder / "number"
    pid = int(wait_until(lambda: file.exists() and file.read_text().strip(), "the child"))
    process.send_signal(number)
    process.wait(60)
    try:
        if number != signal.SIGKILL:  # which no shell can pass on
            wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the child's end", seconds=10)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert finish(process)[0] in (-number, 128 + number)
    assert list((folder / "temporary").iterdir()) == []


@pytest.mark.faults
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_environment_whose_making_was_stopped_is_made_again(install, tmp_path, number):
    half = tmp_path / ".venv" / "half"
    stop(tmp_path, number, venv=f"touch {half}; {WAITS}")
    done, calls = install()
    assert done.returncode == 0, done.stderr
    assert [call.split()[1] for call in calls] == ["venv", "pip"]
    assert not half.exists()
    assert install()[1] == []


@pytest.mark.faults
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_installation_that_was_stopped_is_repeated(install, tmp_path, number):
    assert install()[0].returncode == 0
    (tmp_path / "requirements.txt").write_text("timm\n")
    (tmp_path / ".venv" / "bin" / "python").unlink()  # the stand-in that does not wait
    stop(tmp_path, number, pip=WAITS)
    (tmp_path / "requirements.txt").write_text("torch\n")  # which was installed before
    shutil.copy(write_python(tmp_path), tmp_path / ".venv" / "bin" / "python")
    done, calls = install()
    assert done.returncode == 0, done.stderr
    assert [call.split()[1] for call in calls] == ["pip"]
    assert install()[1] == []
    assert sorted(path.name for path in (tmp_path / ".venv").iterdir()) == [
        *("bin", "checked-builds", "installed-requirements")
    ]


@pytest.mark.faults
@pytest.mark.parametrize("number", SIGNALS[:3], ids=lambda number: number.name)
@pytest.mark.parametrize("after", ["", "sleep 0.001; ", "sleep 0.003; ", "sleep 0.01; "])
def test_a_signal_just_after_the_start_of_an_installation_ends_it(tmp_path, number, after):
    for name in ("requirements.txt", "requirements-pinned.txt"):
        (tmp_path / name).write_text("torch\n")
    pip = f"echo $$ >number; {after}kill -{number.value} $PPID; exec sleep 1000"
    variables = {"PYTHON": str(write_python(tmp_path, pip=pip))}
    process = start(IN_TERMINAL, cwd=tmp_path, **variables)
    try:
        assert process.wait(30) in (-number, 128 + number)
        pid = int((tmp_path / "number").read_text())
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the child's end", seconds=10)
    finally:
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((tmp_path / "number").read_text()), signal.SIGKILL)


# Lists what it finds in the environment, and writes that it installs.
FAKE_PIP = """
import pathlib
site = pathlib.Path(__file__).parent
packages = sorted(path.name.partition("-")[0] for path in site.glob("*.dist-info"))
print(packages, list(site.glob("~*")))
if not (site / "goes_on").exists():
    raise SystemExit(1)
"""


@pytest.mark.faults
def test_packages_of_which_a_part_was_installed_are_installed_again(tmp_path):
    for name in ("requirements.txt", "requirements-pinned.txt"):
        (tmp_path / name).write_text("torch\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    (site,) = (tmp_path / ".venv").glob("lib/python*/site-packages")
    (site / "pip.py").write_text(FAKE_PIP)
    (site / "torchvision").mkdir()
    (site / "torchvision" / "__init__.py").touch()
    (site / "torchvision" / "ops.py").write_text("nms = 0")
    for name in ("whole", "lacks_a_file", "lacks_its_list", "unfinished"):
        info = site / f"{name}-1.dist-info"
        info.mkdir()
        (info / "RECORD").write_text(f"{name}.py,,\n{name}.pyc,,\n")
        (info / "INSTALLER").write_text("pip\n")
        (site / f"{name}.py").touch()
    (site / "lacks_a_file.py").unlink()
    (site / "lacks_its_list-1.dist-info" / "RECORD").unlink()
    (site / "unfinished-1.dist-info" / "INSTALLER").unlink()
    (site / "~orch").mkdir()

    def install():
        words = ["bash", "-c", SCRIPT, "requirements.txt"]
        return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)

    assert "unfinished" in install().stdout  # pip finds them, and fails
    (site / "goes_on").touch()
    done = install()
    assert done.returncode == 0, done.stderr
    assert "['whole'] []" in done.stdout
    assert install().stdout.splitlines() == ["requirements.txt is installed in .venv"]


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
