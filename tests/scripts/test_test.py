"""scripts/test.sh, with a stand-in for Python."""

import shutil
import signal

import pytest

from tests.helpers.processes import ROOT, finish, start, wait_until

# As pytest it writes what it is called with, and waits.
FAKE_PYTHON = r"""#!/bin/bash
[ "$1 $2" = "-m pytest" ] || exit 0
echo "$@" >"$CALLS"
[ -z "$WAITS" ] || exec sleep 1000
exit 3
"""


@pytest.fixture
def script(tmp_path):
    """Starts a copy of scripts/test.sh; returns the process."""
    (tmp_path / "scripts").mkdir()
    for name in ("test.sh", "setup.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    for name in ROOT.glob("requirements*.txt"):
        shutil.copy(name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    variables = {"CALLS": str(tmp_path / "calls")}

    # Signals as in a terminal, even where these tests run in the background of a script.
    words = ["env", "--default-signal=INT,TERM,HUP", "bash", str(tmp_path / "scripts" / "test.sh")]

    def start_script(*argv, **more):
        return start([*words, *argv], **variables, **more)

    return start_script


@pytest.mark.parametrize(
    ("argv", "selects", "passed_on"), [(["-k", "x"], True, "-k x"), (["--all", "-x"], False, "-x")]
)
def test_quick_tests_by_default_and_every_test_with_all(script, tmp_path, argv, selects, passed_on):
    process = script(*argv, WAITS="")
    finish(process)
    call = (tmp_path / "calls").read_text().strip()
    assert call.endswith(passed_on)
    assert ("not slow and not faults and not slurm" in call) == selects
    assert process.returncode == 3  # pytest's


# tests/faults/test_leftovers.py tries that they leave nothing then.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_stops_the_tests(script, tmp_path, number):
    process = script(WAITS="yes")
    wait_until((tmp_path / "calls").exists, "the tests")
    process.send_signal(number)
    finish(process)
    assert process.returncode == -number


@pytest.mark.xdist_group("together")
def test_the_tests_of_a_group_run_in_one_worker(request):
    # pytest-xdist finds the groups by this suffix; without it, each worker makes a group's
    # expensive fixtures, and two SLURM clusters run at once.
    if not request.config.getoption("loadgroup", default=False):
        pytest.skip("--dist is not loadgroup")
    assert request.node.nodeid.endswith("@together")
