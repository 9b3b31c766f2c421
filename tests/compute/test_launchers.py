"""A process knows the launcher that started it, and whether that is alive."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.processes import free_port, wait_until
from util.compute import launchers
from util.compute.launchers import LAUNCHER_PID, OF_TORCHRUN, find_starter
from util.errors import InputError


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly the given variables of launchers."""
    for name in (LAUNCHER_PID, OF_TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)

    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_all


def ended_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_shell_is_no_launcher(environment):
    environment()
    assert find_starter() is None


def test_a_job_is_known_by_its_number(environment, monkeypatch):
    environment(**{LAUNCHER_PID: os.getppid()})
    starter = find_starter()
    assert str(starter) == f"the launcher (process {os.getppid()})"
    assert not starter.has_died()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert starter.has_died()


def test_a_job_that_ended_during_the_imports_has_died(environment):
    environment(**{LAUNCHER_PID: ended_process()})
    assert find_starter().has_died()


@pytest.mark.parametrize("is_alive", [True, False])
def test_torchrun_is_alive_while_its_store_answers(environment, is_alive):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment(
        **{OF_TORCHRUN: "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost"},
        MASTER_PORT=store.port if is_alive else free_port(),
    )
    starter = find_starter()
    assert starter.has_died() != is_alive
    assert str(starter) == (f"torchrun (process {os.getppid()})" if is_alive else "torchrun")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", [LAUNCHER_PID, OF_TORCHRUN])
def test_a_script_of_a_launcher_is_no_launcher(environment, monkeypatch, name):
    environment(**{name: "1"})
    assert find_starter() is not None
    with subprocess.Popen(["sleep", "100"]) as script:  # which has the variable, too
        monkeypatch.setattr(os, "getppid", lambda: script.pid)
        environ = Path(f"/proc/{script.pid}/environ")  # empty at first
        wait_until(lambda: name.encode() in environ.read_bytes(), "the variable", 30)
        starter = find_starter()
        script.kill()
    assert starter is None


@pytest.mark.parametrize("name", [LAUNCHER_PID, "MASTER_PORT"])
def test_a_number_that_is_none_is_refused(environment, name):
    environment(**{OF_TORCHRUN: "none", "TORCHELASTIC_USE_AGENT_STORE": "True", name: "x"})
    with pytest.raises(InputError, match=f"{name} must be a whole number"):
        find_starter()


def test_nothing_is_dead_without_a_launcher(environment, monkeypatch):
    monkeypatch.setattr(launchers, "_starter", None)
    assert launchers.dead_launcher() is None
