"""The launcher on a real SLURM cluster of one node that exists only during these tests."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.files import write_classes, write_images
from tests.helpers.processes import ROOT, command, finish, interrupt, start, tasks_of, wait_until
from tests.helpers.runs import assert_same_run, run_two_processes, six_epochs
from tests.scripts.test_run_ablations import PROGRAM
from util.runs.checkpoint import list_checkpoints

# One cluster for all of them: with parallel workers, one has this whole file.
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.xdist_group("slurm")]

FOLDER = Path(__file__).parent
DAEMONS = ("munged", "slurmctld", "slurmd")


def free_ports(count):
    listeners = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def said(*words):
    """Run a program; return its stdout."""
    return subprocess.run(words, capture_output=True, text=True).stdout.strip()


def start_daemons(folder):
    """Start a cluster with all files in one folder; skip the tests if that fails."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    munged = ["munged", "--force", "--key-file", key, "--socket", folder / "munge.socket"]
    for name in ("pid", "log", "seed"):
        munged += [f"--{name}-file", folder / f"munged.{name}"]
    for words in (munged, ["slurmctld"], ["slurmd"]):
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{words[0]} does not start: {done.stderr.strip()}")
    end = time.monotonic() + 20
    while (state := said("sinfo", "--noheader", "--format=%T")) != "idle":
        if time.monotonic() > end:
            log = (folder / "slurmctld.log").read_text().strip().splitlines()
            pytest.skip(f"the node is {state!r}, not idle: {log[-1]}")
        time.sleep(0.2)


def end_daemons(folder):
    """End the jobs, then the daemons by their pid files."""
    said("scancel", "--full", "--signal=KILL", "--user=root")
    for name in reversed(DAEMONS):
        with suppress(OSError, ValueError):
            pid = int((folder / f"{name}.pid").read_text())
            os.kill(pid, signal.SIGTERM)
            for _ in range(100):
                os.kill(pid, 0)  # until the process is gone
                time.sleep(0.1)
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    missing = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: bash tests/slurm/install.sh installs them")
    if os.geteuid() != 0:
        pytest.skip("only root starts SLURM's daemons")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    controller_port, node_port = free_ports(2)
    text = (FOLDER / "slurm.conf").read_text()
    for name, value in {
        "DIR": folder,
        "HOST": socket.gethostname().split(".")[0],
        "CONTROLLER_PORT": controller_port,
        "NODE_PORT": node_port,
        "FIRST_JOB": 16 * controller_port,
    }.items():
        text = text.replace(f"@{name}@", str(value))
    (folder / "slurm.conf").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            start_daemons(folder)
            yield
        finally:
            end_daemons(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 96)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    return run_two_processes(images, tmp_path_factory.mktemp("undisturbed"))


def submit(*flags, main_flags):
    """Submit pre-training on two processes; return the job's number and the log of task 0."""
    words = ["scripts/launch.py", "--main", "pretrain", "--cluster", "slurm"]
    words += ["--tasks_per_node", 2, *flags, "--", *main_flags]
    code, out, err = finish(start(command(*words)))
    assert code == 0, err
    return re.search(r"^job (\d+):", out)[1], Path(re.search("^log of task 0: (.*)", out, re.M)[1])


def job(number):
    """SLURM's description of a job."""
    return dict(re.findall(r"(\w+)=(\S*)", said("scontrol", "show", "job", number)))


def state_at_end(number):
    """Wait for a job's end; return its state, exit code and number of requeues."""

    def ended():
        found = job(number)
        if found["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SIGNALING"):
            return found["JobState"], found["ExitCode"], int(found["Restarts"])
        return None

    return wait_until(ended, f"the end of job {number}")


def test_a_job_sent_sigusr1_continues_after_its_requeue(images, undisturbed, tmp_path):
    number, log = submit(main_flags=six_epochs(images, tmp_path))
    again = ["scancel", "--signal=USR1", number]
    interrupt(log, "epoch 1/6  loss", tmp_path, number=signal.SIGUSR1, send=lambda: said(*again))
    assert state_at_end(number) == ("COMPLETED", "0:0", 1), log.read_text()
    assert "stopped by SIGUSR1 after 1 epoch" in log.read_text()
    assert log.read_text().count("continuing ") == 1
    assert_same_run(tmp_path, undisturbed)


def test_a_job_whose_time_ends_continues_after_its_requeue(images, undisturbed, tmp_path):
    # SLURM checks twice a minute and may send the signal half a minute early.
    limit = ["--time", "00:01:00", "--signal_seconds", 15]
    number, log = submit(*limit, main_flags=six_epochs(images, tmp_path))
    interrupt(log, "epoch 1/6  loss", tmp_path, number=signal.SIGUSR1)
    state, code, restarts = state_at_end(number)
    assert (state, code) == ("COMPLETED", "0:0"), log.read_text()
    assert restarts >= 1
    assert "stopped by SIGUSR1" in log.read_text()
    assert_same_run(tmp_path, undisturbed)


def test_a_signal_before_the_run_begins_does_not_lose_it(images, undisturbed, tmp_path):
    number, log = submit(main_flags=six_epochs(images, tmp_path))
    wait_until(lambda: log.exists() and "submitit INFO" in log.read_text(), "the first process")
    said("scancel", "--signal=USR1", number)
    assert state_at_end(number) == ("COMPLETED", "0:0", 1), log.read_text()
    assert "continuing " not in log.read_text()
    assert_same_run(tmp_path, undisturbed)


def test_a_job_that_is_canceled_saves_and_ends(images, tmp_path):
    number, log = submit(main_flags=six_epochs(images, tmp_path))
    cancel = ["scancel", number]
    interrupt(log, "epoch 1/6  loss", tmp_path, number=signal.SIGTERM, send=lambda: said(*cancel))
    state, _, restarts = state_at_end(number)
    assert (state, restarts) == ("CANCELLED", 0)
    wait_until(lambda: "stopped by SIGTERM after 1 epoch" in log.read_text(), "the save")
    assert list_checkpoints(tmp_path)[-1].name.startswith("checkpoint-e0001-s")


@pytest.mark.faults
def test_a_job_that_fails_is_failed_with_the_exit_code_of_the_main(images, tmp_path):
    wrong = six_epochs(tmp_path / "nowhere", tmp_path / "wrong")
    diverges = [*six_epochs(images, tmp_path / "diverges"), "--lr", 1e30]
    jobs = [submit(main_flags=flags) for flags in (wrong, diverges)]
    for (number, log), code in zip(jobs, ("2:0", "1:0"), strict=True):
        assert state_at_end(number) == ("FAILED", code, 0), log.read_text()
        assert log.read_text().count("main_pretrain.py: error: ") == 1


@pytest.mark.faults
def test_a_task_that_dies_ends_the_others(images, tmp_path):
    number, log = submit(main_flags=six_epochs(images, tmp_path))
    first, second = wait_until(lambda: len(t := tasks_of(tmp_path)) == 2 and t, "two processes")
    os.kill(second, signal.SIGKILL)
    os.kill(first, signal.SIGSTOP)  # as if it were waiting for the other one
    assert state_at_end(number)[::2] == ("FAILED", 0), log.read_text()


@pytest.mark.faults
def test_odd_names_reach_slurm_as_they_are(tmp_path):
    odd = """it's "a" #1 --nice=77 $HOME `id`"""
    folders = [tmp_path / name for name in (odd, "$(id) %j;*")]
    wrong = six_epochs(tmp_path / "nowhere", tmp_path / "run")
    comment = f"--slurm_comment={odd}"
    jobs = [submit("--job_dir", folder, comment, main_flags=wrong) for folder in folders]
    for number, log in jobs:
        assert state_at_end(number) == ("FAILED", "2:0", 0)
        assert log.read_text().count("main_pretrain.py: error: ") == 1
        assert f"Comment={odd}" in said("scontrol", "show", "job", number)
        assert job(number)["Nice"] == "0"


@pytest.mark.faults
def test_a_rejection_by_sbatch_is_reported_in_one_sentence(images, tmp_path):
    words = ["scripts/launch.py", "--main", "pretrain", "--cluster", "slurm"]
    words += ["--tasks_per_node", 2, "--slurm_partition=none", "--", *six_epochs(images, tmp_path)]
    code, out, err = finish(start(command(*words)))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "launch.py: error: sbatch rejected the job: " in err
    assert "invalid partition" in err


@pytest.mark.faults
def test_tasks_of_a_plain_srun_are_refused_with_the_launcher_s_name(images, tmp_path):
    argv = command("main_pretrain.py", *six_epochs(images, tmp_path / "run"))
    code, _, err = finish(start(["srun", "-n", "2", *argv]))
    assert code == 2
    assert err.count("error: srun has started 2 processes that do not know each other: ") == 2
    assert "scripts/launch.py" in err
    assert not (tmp_path / "run").exists()


def test_a_comparison_is_submitted_once_and_in_order(tmp_path):
    images, output = write_classes(tmp_path / "images"), tmp_path / "out"
    argv = ["--suite", "cpu", "--data_path", images, "--settings", "gamma_25", "--seeds", 1]
    words = [sys.executable, "-c", PROGRAM, *argv, "--output_dir", output, "--submit"]
    words = [str(word) for word in (*words, "--", "--tasks_per_node", 1)]
    code, out, err = finish(start(words, PYTHONPATH=str(ROOT)))
    assert code == 0, err
    numbers = re.findall(r"submitted as job (\d+)", out)
    assert len(numbers) == 3
    code, out, err = finish(start(words, PYTHONPATH=str(ROOT)))
    assert (code, "submitted as" in out) == (0, False), err

    assert [state_at_end(number)[0] for number in numbers] == ["COMPLETED"] * 3
    first, *others = map(job, numbers)
    assert all(first["EndTime"] <= other["StartTime"] for other in others)
    run = output / "gamma_25-0"
    assert (run / "features" / "knn.json").exists() and list_checkpoints(run / "probe")
    code, _, err = finish(start(words, PYTHONPATH=str(ROOT)))
    assert code == 0, err
    assert "| γ = .25 | 1 |" in (output / "cpu.md").read_text()
