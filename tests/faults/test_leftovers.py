"""Tests leave nothing behind, however they end: by themselves, stopped, or killed."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, finish, start, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.slow]

# Starts a thing of every kind; what it starts is written to FOUND, one a line.
SUITE = r"""
import os, shutil, subprocess, tempfile, time
from contextlib import suppress
from multiprocessing import get_context, shared_memory
from pathlib import Path

import pytest

FOUND = Path(os.environ["FOUND"])
SLEEP = ["sleep", "1000"]


def note(kind, what):
    with FOUND.open("a") as file:
        file.write(f"{kind}\t{what}\n")


def popen(*words, **more):
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    return subprocess.Popen(words, **quiet, **more).pid


def shell(kind, script, **more):
    "A shell that writes the number of a process."
    popen("sh", "-c", script.replace("NOTE", f'printf "{kind}\\t%s\\n" $! >>"{FOUND}"'), **more)


def test_starts_a_thing_of_every_kind(tmp_path):
    (tmp_path / "file").write_text("x")
    note("process", popen(*SLEEP))
    note("session", popen(*SLEEP, start_new_session=True))
    note("other TMPDIR", popen(*SLEEP, env={**os.environ, "TMPDIR": "/"}))
    note("deaf", popen("sh", "-c", "trap '' HUP INT TERM; while :; do sleep 1; done"))
    note("no variables", popen("sleep", "1000", env={}, start_new_session=True))
    shell("daemon", "(setsid sleep 1000 & NOTE); exit")
    shell("daemon without variables", "sleep 1000 & NOTE; sleep 2", env={}, start_new_session=True)
    log = Path(tempfile.mkdtemp()) / "log"
    shell("daemon with a log", f"(setsid sleep 1000 >{log} & NOTE); exit", env={})
    if not (copy := os.fork()):  # as the processes of a loader
        os.setsid()
        while True:
            time.sleep(1)
    note("copy of the tests", copy)
    for method in ("fork", "spawn", "forkserver"):
        process = get_context(method).Process(target=time.sleep, args=(1000,), daemon=True)
        with suppress(OSError):  # the name of the temporary folder is too long for a socket
            process.start()
            note(method, process.pid)
    memory = shared_memory.SharedMemory(create=True, size=4096)
    note("shared memory", memory.name)

    note("file", tempfile.mkdtemp())
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "library"
    cache.mkdir(parents=True)
    note("file", cache)
    closed = tmp_path / "closed" / "below"
    closed.mkdir(parents=True)
    closed.chmod(0)
    closed.parent.chmod(0)
    fixed = tmp_path / "fixed"
    fixed.touch()
    if shutil.which("chattr"):
        subprocess.run(["chattr", "+i", fixed], capture_output=True)
    disk = Path(tempfile.gettempdir()) / "a disk"
    disk.mkdir()
    if not subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True).returncode:
        (disk / "file").write_text("x")
        note("mount", disk)
    time.sleep(3)
    note("end", 0)
    time.sleep(float(os.environ["SECONDS"]))
    assert os.environ["END"] == "passes"


@pytest.mark.skipif("FIGURES" not in os.environ, reason="takes long")
def test_libraries_with_caches(tmp_path):
    import matplotlib.pyplot as plt
    import torch

    plt.figure().savefig(tmp_path / "figure.png")
    if os.environ["FIGURES"] == "compile":
        torch.compile(torch.nn.Linear(3, 3))(torch.zeros(2, 3))
    onnxruntime = pytest.importorskip("onnxruntime")
    onnxruntime.InferenceSession
"""

# `.venv/bin/python` of the copy: it installs nothing.
PYTHON = f"""#!/bin/sh
[ "$1 $2" != "-m pytest" ] || exec {shlex.quote(sys.executable)} "$@"
"""

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
WAYS = {
    "pytest -n 0": [*PYTEST, "-n", "0"],
    "pytest -n 2": [*PYTEST, "-n", "2"],
    "test.sh": ["bash", "scripts/test.sh", "-p", "no:cacheprovider"],
}


class Trial:
    """A run of the stand-in tests in a copy of the repository, with a home of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.found = folder / "found"
        self.copy = folder / "copy"
        (self.copy / "tests").mkdir(parents=True)
        for path in ROOT.iterdir():
            if path.name not in (".git", ".venv", "tests", "output", "data"):
                (self.copy / path.name).symlink_to(path)
        shutil.copy(ROOT / "tests" / "conftest.py", self.copy / "tests")
        shutil.copytree(ROOT / "tests" / "helpers", self.copy / "tests" / "helpers")
        (self.copy / "tests" / "test_stand_in.py").write_text(SUITE)
        python = self.copy / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON)
        python.chmod(0o755)
        self.temporary = folder / "t"
        self.home = folder / "home"
        for path in (self.temporary, self.home):
            path.mkdir()

    def start(self, words, *flags, seconds=600, ends="passes", **variables):
        variables |= {"FOUND": self.found, "TMPDIR": self.temporary, "HOME": self.home}
        variables |= {"SECONDS": seconds, "END": ends}
        env = {name: str(value) for name, value in variables.items()}
        # As a program of its own, without what these tests have set; a group for `killpg`.
        unset = [f"--unset={n}" for n in os.environ if re.match("XDG|PYTEST|MPL|HF_", n)]
        first = ["setsid", "env", "--default-signal=INT,TERM,HUP", *unset]
        output = self.folder / "output.txt"
        script = f'exec "$@" >{shlex.quote(str(output))} 2>&1'
        return start([*first, "bash", "-c", script, "-", *words, *flags], cwd=self.copy, **env)

    def listed(self):
        lines = self.found.read_text().splitlines() if self.found.exists() else []
        return [line.split("\t") for line in lines]

    def is_ready(self):
        return ["end", "0"] in self.listed()

    def left(self):
        """What a run has left, one word or path for each."""
        left = [kind for kind, what in self.listed() if what.isdigit() and is_running(what)]
        left += [k for k, what in self.listed() if k == "shared memory" and has_memory(what)]
        left += [k for k, what in self.listed() if k == "mount" and f" {octal(what)} " in mounts()]
        for folder in (self.temporary, self.home):
            left += sorted(path.name for path in folder.iterdir())
        return left

    def clean_up(self):
        for kind, what in self.listed():
            with suppress(OSError):
                if what.isdigit() and is_running(what):
                    os.kill(int(what), signal.SIGKILL)
                elif kind == "shared memory":
                    memory = shared_memory.SharedMemory(what)
                    memory.close()
                    memory.unlink()
                elif kind == "mount":
                    subprocess.run(["umount", "-l", what], capture_output=True)
        for path in (self.temporary, self.folder / "kept"):
            if shutil.which("chattr"):
                subprocess.run(["chattr", "-R", "-f", "-i", path], capture_output=True)
            subprocess.run(["chmod", "-R", "u+rwx", path], capture_output=True)


def is_running(number):
    try:
        stat = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def has_memory(name):
    return (Path("/dev/shm") / name.removeprefix("/")).exists()


def octal(path):
    return path.replace(" ", "\\040")


def mounts():
    return Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def trial():
    if not Path("/proc/self/task").exists() or not shutil.which("setsid"):
        pytest.skip("needs Linux")
    # A short name, since those of sockets are limited.
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        trial = Trial(Path(folder))
        yield trial
        trial.clean_up()


def assert_nothing_is_left(trial, seconds=20):
    end = time.monotonic() + seconds
    while (left := trial.left()) and time.monotonic() < end:
        time.sleep(0.2)
    assert left == []


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL]
STOPS = [(way, number, False) for way in WAYS for number in SIGNALS]
STOPS += [("test.sh", number, True) for number in SIGNALS]


@pytest.mark.parametrize(("way", "number", "group"), STOPS)
def test_stopped_tests_leave_nothing(trial, way, number, group):
    process = trial.start(WAYS[way])
    wait_until(lambda: trial.is_ready() or process.poll() is not None, "the stand-in tests")
    assert process.poll() is None, (trial.folder / "output.txt").read_text()
    (os.killpg if group else os.kill)(process.pid, number)
    code = finish(process)[0]
    assert code in (-number, 128 + number, 2)  # pytest's for Ctrl-C
    assert_nothing_is_left(trial)


@pytest.mark.parametrize(("way", "ends"), [*zip(WAYS, ["passes", "fails", "fails"], strict=True)])
def test_tests_that_end_leave_nothing(trial, way, ends):
    code = finish(trial.start(WAYS[way], seconds=0, ends=ends))[0]
    text = (trial.folder / "output.txt").read_text()
    assert code == (ends == "fails"), text
    assert_nothing_is_left(trial, seconds=0)
    assert ("--basetemp FOLDER keeps" in text) == (ends == "fails")


def test_libraries_keep_their_caches_in_the_tests_folder(trial):
    code = finish(trial.start(WAYS["pytest -n 0"], "-k", "libraries", FIGURES="compile"))[0]
    assert code == 0, (trial.folder / "output.txt").read_text()
    assert_nothing_is_left(trial, seconds=0)


def test_folders_of_failed_tests_can_be_kept(trial):
    kept = trial.folder / "kept"
    words = [*WAYS["pytest -n 0"], "--basetemp", kept]
    assert finish(trial.start(map(str, words), seconds=0, ends="fails"))[0] == 1
    assert_nothing_is_left(trial, seconds=0)
    assert list(kept.glob("*/file"))
