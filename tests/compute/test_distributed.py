"""Several processes compute what one does, and end together.

torchrun runs this file as a script, which runs main_pretrain.py for every line of a file.
"""

import json
import os
import re
import shutil
import socket
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import main_pretrain
from tests.helpers.files import write_images
from tests.helpers.models import use_nano_models
from tests.helpers.processes import NANO_MAIN, ROOT, command, finish, free_port, start
from tests.helpers.runs import TINY, run
from util import machine
from util.compute import distributed
from util.compute.distributed import (
    all_gather,
    broadcast_object,
    data_parallel,
    gradient_sync,
    init_distributed,
    is_main_process,
    rank,
    stop_processes,
    world_size,
)
from util.compute.watchdog import stop_watchdog
from util.data.sampler import StepSampler
from util.errors import InputError, RunError
from util.machine import cores_per_process, default_workers
from util.runs.checkpoint import list_checkpoints, read_checkpoint
from util.runs.epoch_log import read_log

pytestmark = pytest.mark.xdist_group("distributed")  # whose runs are made once

CPU = torch.device("cpu")


def run_lines(path):
    """Run main_pretrain.py for every line, in the same processes."""
    use_nano_models(pytest.MonkeyPatch())
    for line in Path(path).read_text().splitlines():
        main_pretrain.main(json.loads(line))


# Two processes

# With 41 images the last step has one, fewer than processes; with 43 it has three.
# The second accumulates: 2 processes x 2 micro-steps x 2 images.
CASES = {
    "one image left": (41, ["--batch_size", "4"]),
    "three images left": (43, ["--batch_size", "2", "--accum_iter", "2"]),
    "three images left, one at a time": (43, ["--batch_size", "1", "--accum_iter", "4"]),
    "two crops of an image": (41, ["--batch_size", "4", "--repeated_aug", "2"]),
    "mae": (41, ["--batch_size", "4", "--model", "mae_vit_tiny_patch4"]),
}
MODEL = [*TINY, "--lr", "1e-3", "--eval_every", "1", "--max_broken", "0.5"]
MODEL += ["--log_every", "1", "--save_every_minutes", "0", "--keep_last", "0"]


def read_by(process, num_images, batch_size, world_size=2):
    """Images that one process reads in the first epoch."""
    share = {"batch_size": batch_size, "accum_iter": 1, "seed": 0}
    sampler = StepSampler(num_images, rank=process, world_size=world_size, **share)
    return [index for batch in sampler for _, index in batch]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Output folders of runs with one and with two processes, by case."""
    root = tmp_path_factory.mktemp("runs")
    lines = []
    for name, (num_images, options) in CASES.items():
        images = root / f"images of {name}"
        write_images(images / "train", num_images)
        write_images(images / "val", 5)
        broken = read_by(1, num_images, 4)[0]
        (images / "train" / f"{broken:03d}.png").write_bytes(b"")
        argv = [*MODEL, "--data_path", str(images)]
        one_process = [*argv, *options, "--batch_size", "8", "--accum_iter", "1"]
        with pytest.MonkeyPatch.context() as patch:
            use_nano_models(patch)
            run(*one_process, "--output_dir", root / f"one, {name}")
        lines.append(json.dumps([*argv, *options, "--output_dir", str(root / f"two, {name}")]))
    (root / "lines").write_text("\n".join(lines))
    script = command(__file__, root / "lines", processes=2)
    code, out, err = finish(start(script, PYTHONPATH=str(ROOT)))
    assert code == 0, out + err
    return {name: (root / f"one, {name}", root / f"two, {name}") for name in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_with_the_same_effective_batch(folders, case):
    logs = [read_log(folder) for folder in folders[case]]
    assert len(logs[0]) == 2
    for line, expected in zip(*reversed(logs), strict=True):
        for key in ("step", "val_images"):
            assert line[key] == expected[key]
        for key in ("loss", "grad_norm", "lr", "val_loss", "val_psnr"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), key
    one, two = (
        read_checkpoint(list_checkpoints(folder)[-1], "pretrain") for folder in folders[case]
    )
    assert one["progress"] == two["progress"]
    # Adam's step for a gradient near zero may have either sign, so weights agree on average.
    differences = [(two["model"][name] - w).abs().mean() for name, w in one["model"].items()]
    assert max(differences) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 7])
@pytest.mark.parametrize("case", ["one image left", "two crops of an image"])
def test_a_run_continues_with_fewer_processes(folders, tmp_path, capsys, nano, case, step):
    one, two = folders[case]
    for path in list_checkpoints(two):
        if read_checkpoint(path, "pretrain")["progress"]["step"] <= step:
            shutil.copy(path, tmp_path)
    shutil.copy(two / "log.jsonl", tmp_path)
    _, options = CASES[case]
    argv = [*MODEL, *options, "--data_path", two.parent / f"images of {case}"]
    run(*argv, "--effective_batch_size", "8", "--output_dir", tmp_path)
    out = capsys.readouterr().out
    assert "the number of processes was 2 and is now 1" in out
    assert "the result is not bit-identical" in out
    for line, expected in zip(read_log(tmp_path), read_log(one), strict=True):
        for key in ("step", "loss", "grad_norm", "val_loss"):
            assert line[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_broken_images_of_all_processes_are_counted(folders, case):
    one, two = ([line["broken_images"] for line in read_log(folder)] for folder in folders[case])
    assert two == one
    books = [
        read_checkpoint(list_checkpoints(folder)[-1], "pretrain")["broken"]
        for folder in folders[case]
    ]
    assert books[1] == books[0]


@pytest.mark.slow
def test_only_one_process_writes(folders):
    for one, two in folders.values():
        names = [
            {re.sub(r"tfevents.*", "tfevents", p.name): None for p in sorted(f.rglob("*"))}
            for f in (one, two)
        ]
        assert names[0] == names[1]
        assert len(list(two.glob("events.out.tfevents.*"))) == 1


@pytest.mark.slow
@pytest.mark.faults
def test_an_error_in_one_process_ends_all_with_its_message(tmp_path):
    # A hundred broken images in a row exceed the limit; only one process starts with the first.
    images = write_images(tmp_path / "images", 210)
    first = read_by(1, 210, 4)[0]
    for index in range(first, first + 100):
        (images / f"{index % 210:03d}.png").write_bytes(b"")
    argv = [*TINY, "--data_path", images, "--batch_size", 4, "--max_broken", 1]
    argv += ["--val_fraction", 0, "--output_dir", tmp_path / "run"]
    code, _, err = finish(start(command(ROOT / "main_pretrain.py", *argv, processes=2)))
    assert code != 0
    sentences = [line for line in err.splitlines() if re.match(r"main_pretrain\.py.*error: ", line)]
    assert len(sentences) == 1, err
    assert "100 images in a row cannot be read" in sentences[0]


@pytest.mark.slow
@pytest.mark.faults
def test_an_error_in_all_processes_is_reported_once(tmp_path):
    argv = [*TINY, "--dataset", "digits", "--feature_maps", "0,6", "--output_dir", tmp_path / "run"]
    code, _, err = finish(start(command(ROOT / "main_pretrain.py", *argv, processes=2)))
    assert code != 0
    assert err.count("main_pretrain.py: error: --feature_maps without 12") == 1
    assert len(re.findall(r"^main_pretrain\.py.*error: ", err, re.MULTILINE)) == 1
    assert not (tmp_path / "run").exists()


# One process


IN_A_JOB = {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 8, "SLURM_PROCID": 0, "SLURM_LOCALID": 0}
TWO = {"WORLD_SIZE": 2, "RANK": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly the given variables of those that launchers set."""
    launchers = ("SLURM_", "OMPI_", "PMI_", "MPI_")
    for name in os.environ:
        if name.startswith(launchers):
            monkeypatch.delenv(name)
    for name in (*TWO, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def set_all(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_all


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": " "},
        {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0},
        IN_A_JOB,  # a script of sbatch, or a shell of salloc
        {**IN_A_JOB, "SLURM_STEP_NUM_TASKS": 1, "WORLD_SIZE": ""},
        {**IN_A_JOB, "SLURM_STEP_NUM_TASKS": 8, "SLURM_PTY_PORT": 35000},  # srun --pty bash
        {**IN_A_JOB, "SLURM_STEP_NUM_TASKS": 8, "WORLD_SIZE": 1},
        {"OMPI_COMM_WORLD_SIZE": 1, "OMPI_COMM_WORLD_LOCAL_RANK": 0},
        {"PMI_SIZE": 8},  # srun's, too
    ],
)
def test_alone_there_is_one_process(environment, variables):
    environment(**variables)
    assert init_distributed("cpu") == CPU
    assert (rank(), world_size(), is_main_process()) == (0, 1, True)
    assert not dist.is_initialized()
    assert broadcast_object({"a": 1}) == {"a": 1}
    values = torch.arange(3.0)
    assert torch.equal(all_gather(values), values.unsqueeze(0))
    model = torch.nn.Linear(2, 2)
    assert data_parallel(model, CPU) is model
    with gradient_sync(model, enabled=False):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None


# Launchers


@pytest.mark.slow
def test_processes_join_without_a_local_rank(tmp_path):
    # As in Kubernetes, where each is the only one of its pod.
    images = write_images(tmp_path / "images", 16)
    port = free_port()
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    folders = [tmp_path / "0", tmp_path / "1"]
    started = []
    for number, folder in enumerate(folders):
        argv = [NANO_MAIN, "pretrain", *TINY, "--data_path", images, "--output_dir", folder]
        started.append(start(command(*argv), RANK=str(number), **variables))
    ends = [finish(process) for process in started]
    assert [code for code, *_ in ends] == [0, 0], ends
    assert "x 2 (processes)" in ends[0][1]
    assert folders[0].exists() and not folders[1].exists()


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({**IN_A_JOB, "SLURM_STEP_NUM_TASKS": 2}, "srun"),
        ({**IN_A_JOB, "SLURM_STEP_NUM_TASKS": 2, "WORLD_SIZE": ""}, "srun"),
        ({"OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_RANK": 1}, "mpirun"),
        ({"PMI_SIZE": 2, "MPI_LOCALRANKID": 0}, "mpirun"),
    ],
)
def test_processes_that_would_each_be_alone_are_refused(environment, variables, launcher):
    environment(**variables)
    message = f"{launcher} has started 2 processes that .* torchrun or scripts/launch.py"
    with pytest.raises(InputError, match=message):
        init_distributed("cpu")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, not 'two'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE must be a whole number, not '-2'"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE must be a whole number"),
        ({**TWO, "RANK": "first"}, "RANK must be a whole number, not 'first'"),
        ({**TWO, "LOCAL_RANK": "-1"}, "LOCAL_RANK must be a whole number, not '-1'"),
        ({**TWO, "RANK": 5}, "RANK is 5, but WORLD_SIZE is 2: "),
        ({"WORLD_SIZE": 0}, "RANK is 0, but WORLD_SIZE is 0: "),
        ({"WORLD_SIZE": 1, "RANK": 1}, "RANK is 1, but WORLD_SIZE is 1: "),
        ({"RANK": 1}, "RANK is 1, but WORLD_SIZE is not set: "),
        ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT must be a whole number"),
        ({**TWO, "MASTER_PORT": 99999}, "MASTER_PORT must be between 1 and 65535, not 99999"),
        ({**TWO, "MASTER_ADDR": "", "MASTER_PORT": ""}, "need MASTER_ADDR and MASTER_PORT: "),
        ({"WORLD_SIZE": 4}, "need RANK, MASTER_ADDR and MASTER_PORT: .*, or unset WORLD_SIZE"),
    ],
)
def test_wrong_or_incomplete_variables_are_refused(environment, variables, message):
    environment(**variables)
    with pytest.raises(InputError, match=message) as caught:
        init_distributed("cpu")
    assert "\n" not in str(caught.value)


def test_a_number_of_processes_that_is_no_number_is_refused(environment):
    environment(LOCAL_WORLD_SIZE="all")
    with pytest.raises(InputError, match="LOCAL_WORLD_SIZE must be a whole number, not 'all'"):
        cores_per_process()


def test_a_port_in_use_is_named(environment):
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        environment(**{**TWO, "RANK": 0, "MASTER_PORT": port})
        with pytest.raises(RunError, match=f"port {port} of localhost, .*, is already in use"):
            init_distributed("cpu")


@pytest.fixture
def join(monkeypatch):
    """Joins processes in name only on this many GPUs; returns the device and NCCL's options."""

    def join(num_gpus, device="cuda", error=None):
        options = {}

        def init_process_group(*_, **given):
            options.update(given)
            if error is not None:
                raise error

        zeros = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(*size))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(distributed.Meeting, "gather", lambda _: None)
        monkeypatch.setattr(dist, "init_process_group", init_process_group)
        return init_distributed(device), options

    return join


SRUN = {"SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": 1}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": 2, "OMPI_COMM_WORLD_LOCAL_RANK": 1}


@pytest.mark.parametrize(
    ("variables", "num_gpus", "device", "index"),
    [
        ({"LOCAL_RANK": 1}, 2, "cuda", 1),
        ({"LOCAL_RANK": 1}, 2, "cuda:0", 1),  # several processes do not share the named GPU
        ({}, 1, "cuda", 0),  # a pod's only one
        ({}, 4, "cuda:3", 3),
        (SRUN, 2, "cuda", 1),
        (SRUN, 1, "cuda", 0),  # srun shows each process its own
        (MPIRUN, 2, "cuda:0", 1),
        ({**SRUN, "LOCAL_RANK": 0}, 2, "cuda", 0),
    ],
)
def test_nccl_is_given_the_gpu_of_its_process(
    environment, join, variables, num_gpus, device, index
):
    environment(**TWO, **variables)
    chosen, options = join(num_gpus, device)
    assert chosen == options["device_id"] == torch.device("cuda", index)


@pytest.mark.parametrize("variables", [{}, {"SLURM_STEP_NUM_TASKS": 4, "SLURM_LOCALID": 0}])
def test_a_gpu_is_not_guessed(environment, join, variables):
    # The tasks of srun are not the processes: there are twice as many.
    environment(**TWO, **variables)
    with pytest.raises(InputError, match=r"process 1 .* which of the 2 GPUs .*: set LOCAL_RANK"):
        join(2)


def test_two_processes_on_one_gpu_are_told(environment, join):
    environment(**TWO)
    error = dist.DistBackendError("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device")
    with pytest.raises(RunError, match="process 1 has the same GPU as another: set LOCAL_RANK"):
        join(1, error=error)


# Cores and devices


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, 1, 1), (2, 1, 1), (4, 1, 3), (16, 1, 14), (128, 8, 14), (2, 4, 1), (256, 1, 32)],
)
def test_workers_leave_cores_for_their_process(cores, processes, workers, monkeypatch):
    monkeypatch.setattr(machine, "available_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers() == workers


@pytest.mark.parametrize(
    ("tasks", "cpus_per_task", "cores"),
    [
        ("8(x2)", "16", 16),  # srun has started each process
        ("8", "16", 16),
        ("4,8(x2)", "16", 16),
        ("8", None, 1),
        ("1(x2)", "128", 16),  # srun has started torchrun
        (None, None, 16),  # torchrun without SLURM
    ],
)
def test_a_slurm_task_has_its_own_cores(tasks, cpus_per_task, cores, monkeypatch):
    monkeypatch.setattr(machine, "available_cores", lambda: 128)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    variables = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_CPUS_PER_TASK": cpus_per_task}
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert cores_per_process() == cores


@pytest.mark.parametrize("device", ["abacus", "meta", "cuda:x"])
def test_devices_that_cannot_compute_are_refused(device):
    with pytest.raises(InputError, match=f"--device {device}") as caught:
        init_distributed(device)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("device", "local_rank", "num_processes", "num_gpus", "wanted"),
    [
        ("cuda", 0, 1, 0, "cuda:0"),
        ("cuda:3", 0, 1, 2, "cuda:3"),
        ("cuda", 2, 3, 2, "cuda:2"),
        ("cuda:0", 2, 3, 2, "cuda:2"),  # several processes do not share the named GPU
    ],
)
def test_missing_gpus_are_refused(
    environment, monkeypatch, device, local_rank, num_processes, num_gpus, wanted
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    places = {"LOCAL_RANK": local_rank, "RANK": local_rank, "WORLD_SIZE": num_processes}
    environment(**{**TWO, **places})
    with pytest.raises(InputError, match=f"{wanted} not found .*: {num_gpus}"):
        init_distributed(device)


if __name__ == "__main__":
    run_lines(sys.argv[1])
    stop_watchdog()
    # With the thread alive, Python would sometimes abort at exit.
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    stop_processes()
