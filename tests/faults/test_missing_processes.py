"""Starts that wait for a process that never comes end at one deadline, in one sentence."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import pytest
import torch.distributed as dist

from tests.helpers.processes import ROOT, command, finish, free_port, start, wait_until
from util.compute import distributed
from util.runs.run import run_main, start_run

pytestmark = [pytest.mark.faults]

MINUTES = 0.05  # --timeout_minutes
LIMIT = 30  # seconds until a trial counts as a hang; joining once took a minute more
LAUNCHED = re.compile("RANK|WORLD_SIZE|MASTER_|TORCHELASTIC_|SLURM_|OMPI_|PMI_|MPI_")


def play(output, variables, before=None):
    """Join the other processes as a main does, with output to a file."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in [name for name in os.environ if LAUNCHED.search(name)]:
        del os.environ[name]
    os.environ.update({name: str(value) for name, value in variables.items()})
    sys.argv = ["program.py"]
    if before is not None:
        before()

    def main():
        start_run(device="cpu", seed=0, timeout_minutes=MINUTES)
        print("joined", flush=True)

    run_main(main)


@pytest.fixture(scope="module")
def context():
    """Processes forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["util.runs.run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, sys.path)))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.Process(target=int).start()
    return context


@pytest.fixture
def processes(context, tmp_path):
    """Starts processes of a run by their ranks; returns what they did."""
    started = []

    def start_all(ranks, count=2, *, port, before=None, **variables):
        place = {"WORLD_SIZE": count, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for number in ranks:
            output = tmp_path / f"{number}.txt"
            own = {**place, **variables, "RANK": number}
            process = context.Process(target=play, args=(output, own, (before or {}).get(number)))
            process.start()
            started.append((process, output))
        return started

    yield start_all
    for process, _ in started:
        process.kill()
        process.join()


def ends_of(started, limit=LIMIT):
    """Wait until processes have ended; return their exit codes and all their sentences."""
    end = time.monotonic() + limit
    for process, _ in started:
        process.join(max(0.0, end - time.monotonic()))
    texts = [output.read_text() for _, output in started]
    assert all(process.exitcode is not None for process, _ in started), f"hangs: {texts}"
    sentences = [line for text in texts for line in text.splitlines() if "program.py" in line]
    assert not any("Traceback" in text for text in texts), texts
    return [process.exitcode for process, _ in started], sentences


@pytest.mark.parametrize(
    ("ranks", "count", "missing"),
    [
        ([0], 2, "process 1 of 2 did not come within 0.05 minutes"),
        ([1], 2, "process 0 of 2 did not come within 0.05 minutes"),
        ([0, 2], 3, "process 1 of 3 did not come"),
        ([0], 4, "processes 1, 2 and 3 of 4 did not come"),
        ([0], 40, r"39 processes \(1, 2, 3, 4, 5, 6, 7, 8, \.\.\.\) of 40 did not come"),
    ],
)
def test_a_process_that_never_comes_is_named_at_the_deadline(processes, ranks, count, missing):
    codes, sentences = ends_of(processes(ranks, count, port=free_port()))
    assert codes == [1] * len(ranks)
    assert len(sentences) == 1, sentences
    assert re.match(rf"program\.py: error: {missing}", sentences[0])
    assert "--timeout_minutes" in sentences[0] and "check that" in sentences[0]


@contextmanager
def listening(answer):
    """A port on which another service answers each connection."""
    with socket.create_server(("localhost", 0)) as server:
        kept = []

        def serve():
            with suppress(OSError):  # at the end of the test
                while True:
                    kept.append(server.accept()[0])
                    answer(kept[-1])

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def answer_in_http(connection):
    connection.recv(100)
    connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")


SERVICES = {
    "silent": lambda connection: None,
    "closes": lambda connection: connection.close(),
    "ssh": lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.0\r\n"),
    "http": answer_in_http,
}


@pytest.mark.parametrize("service", SERVICES)
def test_a_port_of_another_service_ends_the_start(processes, service):
    with listening(SERVICES[service]) as port:
        codes, sentences = ends_of(processes([1], port=port))
    assert codes == [1]
    (sentence,) = sentences
    assert str(port) in sentence


def test_a_name_of_a_host_that_does_not_exist_ends_the_start(processes):
    started = processes([1], port=free_port(), MASTER_ADDR="no-such-host.invalid")
    codes, (sentence,) = ends_of(started)
    assert codes == [1]
    assert "no-such-host.invalid" in sentence


@pytest.mark.parametrize("port_set", [None, "a dead process's"])
def test_torchruns_store_without_process_0_ends_the_start(processes, port_set):
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    if port_set:
        store.set("port", str(free_port()))
    codes, (sentence,) = ends_of(
        processes([1], port=store.port, TORCHELASTIC_USE_AGENT_STORE="True")
    )
    assert codes == [1]
    assert "process 0 of 2 did not come" in sentence


def test_the_other_processes_of_torchruns_store_do_not_come(processes):
    store = dist.TCPStore(
        "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5)
    )
    codes, (sentence,) = ends_of(
        processes([0], port=store.port, TORCHELASTIC_USE_AGENT_STORE="True")
    )
    assert codes == [1]
    assert "process 1 of 2 did not come" in sentence


def wait_for_thread():
    """Send signals only once the program handles them."""
    while not any(thread.name == "signals" for thread in threading.enumerate()):
        time.sleep(0.05)
    time.sleep(1)


def signal_itself(number):
    def send():
        wait_for_thread()
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_a_process_that_waits_for_another(processes, monkeypatch, rank, number):
    started = processes([rank], port=free_port(), before={rank: partial(signal_itself, number)})
    codes, (sentence,) = ends_of(started)
    assert codes == [128 + number]
    assert sentence.endswith(f" while waiting for process {1 - rank}")


def end_itself_before_the_group():
    dist.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)


def stop_itself_before_the_group():
    dist.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("fault", [end_itself_before_the_group, stop_itself_before_the_group])
def test_a_process_lost_between_its_coming_and_the_group_ends_the_other(processes, killed, fault):
    started = processes([0, 1], port=free_port(), before={killed: fault})
    (codes, sentences) = ends_of([started[1 - killed]])
    assert codes == [1]
    assert len(sentences) == 1


def test_all_that_come_late_but_in_time_join(processes):
    port = free_port()
    before = {0: partial(time.sleep, 1)}
    codes, sentences = ends_of(processes([0, 1, 2], 3, port=port, before=before))
    assert (codes, sentences) == ([0, 0, 0], [])


# A process that is killed during its imports, by separate programs

KILLED = """
import os, pathlib, signal, sys, time
_, killed, is_late, others = sys.argv
others = pathlib.Path(others)
if os.environ["RANK"] == killed:
    while is_late == "True" and not others.exists():
        time.sleep(0.1)
    time.sleep(2 * (is_late == "True"))
    os.kill(os.getpid(), signal.SIGKILL)
if is_late == "False":  # as if its own imports took long
    time.sleep(100)
sys.argv = ["program.py"]
sys.path.insert(0, ".")
from util.compute.distributed import Meeting
from util.runs.run import run_main, start_run

wait = Meeting._wait_for

def touch_and_wait(meeting, condition):
    others.touch()
    return wait(meeting, condition)

Meeting._wait_for = touch_and_wait
run_main(lambda: start_run(device="cpu", seed=0, timeout_minutes=30))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("killed", "is_late"), [(0, True), (1, True), (1, False)])
@pytest.mark.parametrize("launcher", ["torchrun", "local_job.py"])
def test_a_process_killed_during_its_imports_ends_the_other_at_once(
    tmp_path, launcher, killed, is_late
):
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    argv = [program, killed, is_late, tmp_path / "others"]
    words = command(*argv, processes=2)
    if launcher != "torchrun":
        words = command(ROOT / "scripts" / "local_job.py", "-", 2, *command(*argv))
    process = start(words)
    wait_until(lambda: process.poll() is not None, "the end of the other", 100)
    code, _, err = finish(process)
    assert code != 0
    sentences = [line for line in err.splitlines() if line.startswith(("program", "local_job"))]
    if is_late:
        assert sentences == [f"program.py: stopped by SIGTERM while waiting for process {killed}"]
    elif launcher != "torchrun":  # which has a table of its own
        assert sentences == [f"local_job.py: error: SIGKILL ended process {killed} of the job"]


def test_a_job_ends_with_the_code_of_the_task_that_failed_first():
    fails = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit(2); time.sleep(300)"
    python = command()[0]
    words = [*command(ROOT / "scripts" / "local_job.py", "-", 2), python, "-c", fails]
    assert finish(start(words))[0] == 2


def test_a_process_that_comes_after_the_deadline_says_so(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    meeting = distributed.Meeting(distributed.Place(1, 2), 0.1)
    meeting.store = dist.HashStore()
    for number in range(2):
        meeting.store.set(meeting._key(number), "")
    assert str(meeting._too_late()).startswith("process 1 came when others had stopped waiting")
