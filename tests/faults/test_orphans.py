"""A run whose launcher is killed notices, saves and ends, and continues to the same bits."""

import os
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

if __name__ == "__main__":  # a run of the tests below, which is slow where one is to be killed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import main_pretrain
from tests.helpers.files import write_classes
from tests.helpers.models import use_nano_models
from tests.helpers.processes import (
    ROOT,
    command,
    descendants_of,
    finish,
    free_port,
    start,
    tasks_of,
    wait_for_line,
    wait_until,
)
from tests.helpers.runs import TINY, assert_identical, log_without_time, run
from util.runs import training
from util.runs.checkpoint import list_checkpoints, read_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.slow]

EPOCHS = 3
SECONDS = 90  # until a trial counts as a hang; runs end on their own after about half of it
LAUNCHER = ROOT / "scripts" / "launch.py"
HERE = [ROOT / "scripts" / "local_job.py", "-"]
STOPPED = re.compile(r"stopped by the death of (torchrun|the launcher) \(process (\d+)\)(.*)")


def slowed(function, moment, seconds, number=1):
    """A function that announces its n-th call and takes its time from then on."""
    calls = []

    def call(*arguments, **options):
        calls.append(moment)
        if len(calls) == number:
            print("reached", moment, flush=True)
        if len(calls) >= number:
            time.sleep(seconds)
        return function(*arguments, **options)

    return call


def slow_down(moment):
    """Make a run slow at a moment, so that its launcher is killed there."""
    import torch

    if moment == "start":
        main_pretrain.build_model = slowed(main_pretrain.build_model, moment, 20)
    elif moment == "first step":
        training.StepLoader.images_in_step = slowed(
            training.StepLoader.images_in_step, moment, 3, number=1
        )
    elif moment == "step":
        training.Step.backward = slowed(training.Step.backward, moment, 2, number=2)
    elif moment == "save":
        torch.save = slowed(torch.save, moment, 12)
    elif moment == "validation":
        main_pretrain.measure = slowed(main_pretrain.measure, moment, 6, number=2)


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """Arguments of a run with several steps per epoch, none but the last of which is logged."""
    images = write_classes(tmp_path_factory.mktemp("images"))
    often = ["--save_every", 1, "--eval_every", 1, "--log_every", 1000]
    return [*TINY, "--data_path", images, "--batch_size", 2, *often, "--epochs", EPOCHS]


@pytest.fixture(scope="module")
def undisturbed(argv, tmp_path_factory):
    """Folders of runs that nothing disturbs, by their number of processes."""
    folders = {number: tmp_path_factory.mktemp(f"undisturbed {number}") for number in (1, 2)}
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        run(*argv, "--output_dir", folders[1])
    code, _, err = finish(start(main_words(argv, folders[2], processes=2)))
    assert code == 0, err
    return folders


def main_words(argv, folder, **options):
    return command(__file__, *argv, "--output_dir", folder, **options)


def launched(launcher, argv, folder, moment):
    """Start a run by a launcher; return it when it reaches a moment."""
    name, number = launcher.split()
    words = main_words(argv, folder, processes=int(number))
    if name == "local_job.py":
        words = command(*HERE, number, *main_words(argv, folder))
    process = start(words, MOMENT=moment)
    if moment == "imports":
        wait_until(lambda: len(descendants_of(process.pid)) == int(number), "processes")
    else:
        wait_for_line(process, f"reached {moment}")
    return process


def outputs(launchers, folder, seconds=SECONDS):
    """Wait until nothing of a run in a folder is left; return what it said."""
    try:  # until the pipes' last writer has ended
        return "".join("".join(process.communicate(timeout=seconds)) for process in launchers)
    finally:
        for pid in processes_of(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes_of(folder):
    """Processes with this output folder in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(folder) in (path / "cmdline").read_text().split("\0"):
                found.append(int(path.name))
    return found


def the_sentence(text, process):
    """The rest of the only sentence with which a run ended."""
    assert "Traceback" not in text and "error:" not in text, text
    ((name, pid, rest),) = STOPPED.findall(text)
    assert name in ("torchrun", "the launcher") and int(pid) == process.pid
    return rest


def assert_same_end(folder, expected):
    states = [read_checkpoint(list_checkpoints(f)[-1], "pretrain") for f in (folder, expected)]
    for key in ("model", "optimizer", "progress"):
        assert_identical(*(state[key] for state in states), key)
    assert log_without_time(folder) == log_without_time(expected)


LAUNCHERS = ["torchrun 1", "torchrun 2", "local_job.py 2"]


@pytest.mark.parametrize(
    ("launcher", "moment"),
    [*((launcher, "start") for launcher in LAUNCHERS), *((n, "imports") for n in LAUNCHERS[1:])],
)
def test_a_run_ends_before_its_first_step_when_its_launcher_is_killed(
    argv, tmp_path, launcher, moment
):
    process = launched(launcher, argv, tmp_path / "run", moment)
    process.kill()
    text = outputs([process], tmp_path / "run")
    if moment == "start":
        assert the_sentence(text, process) in ("", " while waiting for process 1")
    else:  # the process of torchrun may be unknown by now
        assert len(re.findall("stopped by the death of", text)) == 1, text
    assert not list_checkpoints(tmp_path / "run")


@pytest.mark.parametrize(
    ("launcher", "moment", "is_continued"),
    [
        ("torchrun 1", "first step", True),
        ("torchrun 1", "step", True),
        ("torchrun 1", "validation", True),
        ("torchrun 2", "step", True),
        ("torchrun 2", "save", True),
        ("local_job.py 2", "step", False),  # as those of torchrun
        ("local_job.py 2", "save", False),
    ],
)
def test_a_run_saves_when_its_launcher_is_killed_and_continues_to_the_same_bits(
    argv, undisturbed, tmp_path, monkeypatch, launcher, moment, is_continued
):
    folder, number = tmp_path / "run", int(launcher.split()[1])
    process = launched(launcher, argv, folder, moment)
    process.kill()
    text = outputs([process], tmp_path / "run")
    rest = the_sentence(text, process)
    assert rest.endswith(": start the same command again to continue")
    saved = list_checkpoints(folder)[-1]
    epochs, steps = map(int, re.search(r"after (\d+) epochs? and (\d+) steps?", rest).groups())
    assert saved.name == f"checkpoint-e{epochs:04d}-s{steps:06d}.pth"
    assert epochs < EPOCHS
    if not is_continued:
        return
    if number == 1:
        use_nano_models(monkeypatch)
        run(*argv, "--output_dir", folder)
    else:
        code, out, err = finish(start(main_words(argv, folder, processes=2)))
        assert code == 0, err
        assert f"continuing from {saved}" in out
    assert_same_end(folder, undisturbed[number])


def test_a_job_in_the_background_saves_and_ends_when_its_launcher_is_killed(argv, tmp_path):
    main_flags = [*argv, "--epochs", 10_000, "--output_dir", tmp_path / "run"]
    two = ["--cluster", "local", "--tasks_per_node", 2]
    code, out, err = finish(start(command(LAUNCHER, "--main", "pretrain", *two, "--", *main_flags)))
    assert code == 0, err
    number = int(re.search(r"^job (\d+):", out, re.M)[1])
    log = Path(re.search("^log of task 0: (.*)", out, re.M)[1])
    try:
        wait_until(lambda: log.exists() and "epoch     1/" in log.read_text(), "an epoch")
        os.kill(number, signal.SIGKILL)
        wait_until(lambda: not tasks_of(tmp_path / "run"), "the end of its tasks", SECONDS)
    finally:
        for pid in tasks_of(tmp_path / "run"):
            os.kill(pid, signal.SIGKILL)
    texts = "".join(path.read_text() for path in log.parent.iterdir())
    ((name, pid, _),) = STOPPED.findall(texts)
    assert (name, int(pid)) == ("the launcher", number)
    assert list_checkpoints(tmp_path / "run")


@pytest.mark.parametrize("number", [0, 1])
def test_a_run_of_two_nodes_saves_and_ends_when_one_of_the_launchers_is_killed(
    argv, tmp_path, number
):
    words = main_words([*argv, "--epochs", 10_000], tmp_path / "run", processes=1)
    place = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint localhost:{free_port()}".split()
    words[words.index("--standalone") : words.index("--standalone") + 1] = place
    agents = [start(words, MOMENT="step") for _ in range(2)]
    wait_until(lambda: list_checkpoints(tmp_path / "run"), "a save")
    agents[number].kill()
    text = outputs(agents, tmp_path / "run")
    # The other launcher may have noticed first, and sent a SIGTERM.
    cause = rf"SIGTERM|the death of torchrun \(process {agents[number].pid}\)"
    sentences = re.findall(rf"stopped by (?:{cause}) after \d", text)
    assert len(sentences) == 1, text


@pytest.mark.parametrize("processes", [None, 2])
def test_a_run_outlives_the_shell_that_started_it(argv, tmp_path, processes):
    words = main_words(argv, tmp_path / "run", processes=processes)
    (tmp_path / "command").write_text("\n".join(words))
    shell = f"nohup xargs -d '\\n' -a {tmp_path}/command env & wait"
    process = start(["bash", "-c", shell], MOMENT="step")
    wait_for_line(process, "reached step")
    process.kill()
    assert "stopped" not in outputs([process], tmp_path / "run", seconds=2 * SECONDS)
    assert list_checkpoints(tmp_path / "run")[-1].name == f"checkpoint-e{EPOCHS:04d}-s000000.pth"


if __name__ == "__main__":
    from util.runs.run import run_main

    sys.argv[0] = "main_pretrain.py"
    use_nano_models(pytest.MonkeyPatch())
    slow_down(os.environ.get("MOMENT", ""))
    run_main(main_pretrain.main)
