"""The launcher without a cluster; tests/slurm/test_slurm.py uses a real one."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from scripts import launch
from scripts.launch import parse_args, start_task
from scripts.local_job import job_port
from tests.helpers.files import write_images
from tests.helpers.processes import (
    ROOT,
    command,
    finish,
    interrupt,
    start,
    tasks_of,
    wait_for_line,
    wait_until,
)
from tests.helpers.runs import assert_same_run, refusal, run_two_processes, six_epochs
from util.runs.checkpoint import list_checkpoints

LAUNCHER = ROOT / "scripts" / "launch.py"


def launch_job(*flags, main_flags, cwd=ROOT):
    """Start pre-training; return the job's number and the log of task 0."""
    words = command(LAUNCHER, "--main", "pretrain", *flags, "--", *main_flags)
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    number = re.search(r"^job (\d+):", done.stdout, re.M)[1]
    log = Path(re.search("^log of task 0: (.*)", done.stdout, re.M)[1])
    return int(number), log, done.stdout


def wait_for_end(number):
    """Wait until a job's processes on this machine have ended."""
    wait_until(lambda: not Path(f"/proc/{number}").exists(), f"the end of job {number}")


# Command line


@pytest.fixture
def bin_folder(tmp_path, monkeypatch):
    """The only folder in PATH, with an sbatch that prints a job's number."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", ""), ("sbatch", "echo Submitted batch job 7")):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder


def batch_file(tmp_path, *flags, main_flags=()):
    """Batch file that sbatch receives."""
    main_flags = [*main_flags, "--output_dir", str(tmp_path / "run")]
    words = ["--main", "pretrain", "--cluster", "slurm", *flags, "--", *main_flags]
    launch.main([str(word) for word in words])
    return (tmp_path / "run" / "jobs" / "7_submission.sh").read_text()


def given(text):
    """Flags in a batch file: name -> value."""
    words = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name[2:]: value for name, _, value in (word.partition("=") for word in words)}


def test_sbatch_gets_the_requested_flags(bin_folder, tmp_path):
    text = batch_file(
        tmp_path,
        *("--nodes", 2, "--gpus_per_node", 8, "--partition", "P", "--time", "3-00:00:00"),
        *("--account", "A", "--qos", "Q", "--constraint", "a100|h100", "--mem", "500G"),
        *("--cpus_per_task", 12, "--slurm_exclude=n1,n2", "--slurm_mail-type=FAIL"),
        *("--slurm_exclusive", "--signal_seconds", 300),
    )
    log = str(tmp_path / "run" / "jobs" / "%j_0_log.out")
    assert given(text) == {
        "job-name": "pretrain",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "partition": "P",
        "time": "3-00:00:00",
        "account": "A",
        "qos": "Q",
        "constraint": "a100|h100",
        "mem": "500G",
        "cpus-per-task": "12",
        "exclude": "n1,n2",
        "mail-type": "FAIL",
        "exclusive": "",
        "signal": "USR1@300",
        "requeue": "",
        "open-mode": "append",
        "output": log,
    }
    (srun,) = [line for line in text.splitlines() if line.startswith("srun")]
    assert "--kill-on-bad-exit=1 --cpus-per-task=12" in srun
    assert "CUDA_VISIBLE_DEVICES" not in text


@pytest.mark.parametrize(
    ("flags", "tasks", "gpus"),
    [
        ([], "1", "1"),
        (["--gpus_per_node", 4], "4", "4"),
        (["--gpus_per_node", 0], "1", None),
        (["--gpus_per_node", 0, "--tasks_per_node", 3], "3", None),
        (["--tasks_per_node", 3], "3", None),
    ],
)
def test_every_gpu_has_one_task(bin_folder, tmp_path, flags, tasks, gpus):
    text = batch_file(tmp_path, *flags)
    found = given(text)
    assert (found["ntasks-per-node"], found.get("gpus-per-node")) == (tasks, gpus)
    assert ("export CUDA_VISIBLE_DEVICES=\n" in text) == (gpus is None)
    assert "time" not in found  # the partition decides


@pytest.mark.parametrize("code", [0, 1, 2, 137, 138, 143])
def test_only_a_job_that_ended_by_sigusr1_is_requeued(bin_folder, tmp_path, code):
    text = batch_file(tmp_path)
    (bin_folder / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    (bin_folder / "scontrol").write_text('#!/bin/sh\necho "$@"\n')
    (bin_folder / "scontrol").chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-c", text],
        env={"SLURM_JOB_ID": "7", "PATH": str(bin_folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stdout == ("requeue 7\n" if code == 128 + signal.SIGUSR1 else "")


def test_the_folder_of_jobs_may_have_the_number_in_it(bin_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = ["--job_dir", "not/there yet/%j"]
    launch.main(["--main", "knn", "--cluster", "slurm", *folder, "--", "--finetune", "w"])
    log = tmp_path / "not" / "there yet" / "7" / "7_0_log.out"
    out = capsys.readouterr().out
    assert f"log of task 0: {log}\n" in out
    assert f"tail -F '{log}'\n" in out
    assert "scancel --signal=USR1 7\n" in out and "scancel 7\n" in out and "squeue -j 7" in out
    assert log.with_name("7_submission.sh").exists()


def test_no_job_listens_on_a_port_that_an_outgoing_connection_may_have():
    ports = [job_port(number) for number in range(1, 10_001)]
    assert len(set(ports)) == len(ports)
    assert min(ports) > 1024 and max(ports) < 32768  # Linux's net.ipv4.ip_local_port_range


def test_a_task_has_the_port_of_its_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    environment = Mock(master_port=51342)  # what submitit chose
    monkeypatch.setattr(launch, "TorchDistributedEnvironment", lambda: environment)
    monkeypatch.setattr(os, "execv", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    start_task(["main"])
    assert environment.master_port == job_port(4711)
    environment.export.assert_called_once()


def test_auto_is_the_cluster_where_there_is_one(bin_folder):
    assert parse_args(["--main", "knn", "--"])[0].cluster == "slurm"
    (bin_folder / "sbatch").unlink()
    assert parse_args(["--main", "knn", "--"])[0].cluster == "local"


NOTHING = ["--main", "pretrain", "--"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--main", "pretrain"], "-- not found: put the flags of main_pretrain.py after it"),
        (["--main", "pretrain", "--epochs", "3"], "--epochs: give sbatch's flags as --slurm_NAME"),
        (["--node", "2", "--main", "pretrain", "--"], "--node: did you mean --nodes?"),
        (["--main", "pretrain", "--slurm_x", "y", "--"], "y is not a flag of the launcher"),
        (["--main", "train", "--"], "invalid choice: 'train'"),
        (["--nodes", "0", *NOTHING], "argument --nodes: must be at least 1, not 0"),
        (
            ["--gpus_per_node", "2", "--tasks_per_node", "3", *NOTHING],
            "every GPU has one process, so leave it out",
        ),
        ([*NOTHING, "--batch", "4"], "unknown flag --batch: did you mean --batch_size?"),
        ([*NOTHING, "--pred_ratio", "0.9"], "--pred_ratio 0.9 is above --mask_ratio 0.75"),
        (["--cluster", "local", "--nodes", "2", *NOTHING], "--nodes 2 needs --cluster slurm"),
        (
            ["--cluster", "local", "--gpus_per_node", "64", *NOTHING],
            "64 is above the number of GPUs, 0",
        ),
        (["--cluster", "local", "--job_dir", "/proc/no", *NOTHING], "choose another --job_dir"),
    ],
)
def test_mistakes_are_reported_before_anything_starts(
    capsys, tmp_path, monkeypatch, words, sentence
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert sentence in refusal(capsys, *words, main=launch.main)


def test_a_missing_cluster_is_refused(capsys, tmp_path, monkeypatch, bin_folder):
    words = ["--cluster", "slurm", *NOTHING, "--output_dir", tmp_path / "run"]
    (bin_folder / "sbatch").write_text("#!/bin/sh\necho sbatch: error: no such >&2\nexit 1\n")
    sentence = refusal(capsys, *words, main=launch.main)
    assert sentence == "sbatch rejected the job: no such"
    (bin_folder / "srun").unlink()
    assert "--cluster slurm needs srun" in refusal(capsys, *words, main=launch.main)


# Runs on this machine


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 96)


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
    return run_two_processes(images, tmp_path_factory.mktemp("undisturbed"))


TWO = ["--cluster", "local", "--tasks_per_node", 2]


@pytest.mark.slow
def test_two_local_tasks_equal_two_of_torchrun(images, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = six_epochs(images.relative_to(tmp_path.parent), "here")
    folder = tmp_path.parent / "here"
    flags = ["--partition", "P", "--slurm_x=y"]
    number, log, out = launch_job(*TWO, *flags, main_flags=argv, cwd=tmp_path.parent)
    assert "ignored without SLURM: --partition, --slurm_x\n" in out
    wait_for_end(number)
    assert log == folder / "jobs" / f"{number}_0_log.out"
    assert log.with_name(f"{number}_1_log.out").exists()
    assert_same_run(folder, undisturbed)


@pytest.mark.slow
def test_a_local_job_restarts_after_sigusr1(images, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    number, log, out = launch_job(*TWO, main_flags=six_epochs(images, tmp_path))
    again, end = re.findall(r"(kill.*)$", out, re.M)
    assert (again, end) == (f"kill -USR1 {number}", f"kill {number}")
    interrupt(
        log,
        "epoch 1/6  loss",
        tmp_path,
        number=signal.SIGUSR1,
        send=lambda: subprocess.run(shlex.split(again), check=True),
    )
    wait_for_end(number)
    assert "stopped by SIGUSR1 after 1 epoch" in log.read_text()
    assert log.read_text().count("continuing ") == 1
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_local_job_saves_and_ends_after_sigterm(images, tmp_path):
    number, log, out = launch_job(*TWO, main_flags=six_epochs(images, tmp_path))
    end = out.splitlines()[-1].partition(": ")[2]
    interrupt(
        log,
        "epoch 1/6  loss",
        tmp_path,
        number=signal.SIGTERM,
        send=lambda: subprocess.run(shlex.split(end), check=True),
    )
    wait_for_end(number)
    assert not tasks_of(tmp_path)
    assert "stopped by SIGTERM after 1 epoch" in log.read_text()
    assert list_checkpoints(tmp_path)[-1].name.startswith("checkpoint-e0001-s")


@pytest.mark.slow
def test_debug_runs_the_main_itself(images, tmp_path):
    argv = [*six_epochs(images, tmp_path), "--lr", 1e30]
    words = command(LAUNCHER, "--main", "pretrain", "--cluster", "debug", "--", *argv)
    code, out, err = finish(start(words))
    assert (code, err.count("main_pretrain.py: error: ")) == (1, 1)
    assert "6 epochs of 11 steps" in out
    assert not (tmp_path / "jobs").exists()


# The launcher prints nothing after a run's last line.
IN_FOREGROUND = ["--main", "pretrain", "--cluster", "foreground", "--tasks_per_node", 2, "--"]


@pytest.mark.slow
def test_ctrl_c_in_the_foreground_ends_with_the_run_s_own_sentence(images, tmp_path):
    words = command(LAUNCHER, *IN_FOREGROUND, *six_epochs(images, tmp_path))
    process = start(words)
    wait_for_line(process, "epoch 1/6")
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, err) == (128 + signal.SIGINT, "")
    assert "stopped by Ctrl-C after 1 epoch" in out.splitlines()[-1]
    assert not tasks_of(tmp_path)


@pytest.mark.slow
def test_a_mistake_in_the_foreground_is_one_sentence(tmp_path):
    missing = tmp_path / "missing"
    words = command(LAUNCHER, *IN_FOREGROUND, *six_epochs(missing, tmp_path / "run"))
    sentence = f"main_pretrain.py: error: {missing} does not exist: correct the path\n"
    assert finish(start(words)) == (2, "", sentence)


def test_the_earlier_name_starts_the_same_program():
    code, out, _ = finish(start(command(LAUNCHER.with_name("launch_slurm.py"), "--help")))
    assert code == 0
    assert "--cluster {auto,slurm,local,foreground,debug}" in out


# scripts/local_job.py with one-line programs


def local_job(tmp_path, num_tasks, program, **variables):
    log = tmp_path / "%j" / "%t"
    words = [ROOT / "scripts" / "local_job.py", log, num_tasks, sys.executable, "-uc", program]
    return start(command(*words), **variables)


def test_a_local_job_has_torchrun_s_variables(tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    program = f"import os; print({{name: os.environ[name] for name in {names}}})"
    process = local_job(tmp_path, 2, program)
    assert finish(process) == (0, "", "")
    for rank in range(2):
        assert eval((tmp_path / str(process.pid) / str(rank)).read_text()) == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(job_port(process.pid)),
        }


@pytest.mark.parametrize(("exit_with", "code"), [("sys.exit(2 * rank)", 2), ("os._exit(0)", 0)])
def test_a_local_job_ends_with_the_code_of_its_tasks(tmp_path, exit_with, code):
    program = f"import os, sys; rank = int(os.environ['RANK']); {exit_with}"
    assert finish(local_job(tmp_path, 2, program))[0] == code


@pytest.mark.faults
def test_a_local_task_that_dies_ends_the_others(tmp_path):
    program = "import os, time; os.environ['RANK'] == '0' or os.abort(); time.sleep(1000)"
    shortened = "import sys; sys.path.insert(0, 'scripts'); import local_job; "
    shortened += "local_job.SECONDS_TO_END = 0.5; sys.exit(local_job.main(*sys.argv[1:]))"
    words = [*command()[:1], "-c", shortened, str(tmp_path / "%t"), "2", sys.executable, "-c"]
    assert finish(start([*words, program]))[0] == 128 + signal.SIGABRT  # that of the first to end


def test_a_signal_while_a_local_task_starts_does_not_lose_the_job(tmp_path):
    # A task without a handler is ended by SIGUSR1 and restarted.
    program = f"import pathlib, time; path = pathlib.Path({str(tmp_path / 'started')!r}); "
    program += "again = path.exists(); path.touch(); again or time.sleep(1000); print('done')"
    process = local_job(tmp_path, 1, program)
    wait_until((tmp_path / "started").exists, "the task")
    process.send_signal(signal.SIGUSR1)
    assert finish(process) == (0, "", "")
    assert (tmp_path / str(process.pid) / "0").read_text() == "done\n"


def test_tasks_in_the_foreground_receive_each_ctrl_c_of_a_terminal_once():
    program = """if True:
        import signal, time
        def note(number, _):
            print("received", signal.Signals(number).name, flush=True)
        signal.signal(signal.SIGINT, note)
        print("ready", flush=True)
        for _ in range(20):
            time.sleep(0.1)
        raise SystemExit(5)
    """
    words = ["setsid", *command(ROOT / "scripts" / "local_job.py", "-", 1, sys.executable)]
    process = start([*words, "-c", program])
    wait_for_line(process, "ready")
    os.killpg(process.pid, signal.SIGINT)
    code, out, _ = finish(process)
    assert (code, out) == (5, "received SIGINT\n")
