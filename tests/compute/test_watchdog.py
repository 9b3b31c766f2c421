"""A process that dies or hangs soon ends the others, with one sentence that names it."""

import os
import re
import signal
import time

import pytest

from tests.helpers.files import write_images
from tests.helpers.processes import children_of, command, finish, start, wait_for_line
from tests.helpers.runs import TINY, assert_identical, final_state
from util.runs.checkpoint import list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.faults]
ERROR = re.compile(r"^main_pretrain\.py.*error: (.*)$", re.MULTILINE)


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", 96)


def two_processes(images, folder, *, epochs=3, timeout_minutes=1):
    """Command of a run with two processes and six steps per epoch."""
    argv = ["--data_path", images, *TINY, "--epochs", epochs, "--save_every", 1, "--log_every", 1]
    argv += ["--timeout_minutes", timeout_minutes, "--output_dir", folder]
    return command("main_pretrain.py", *argv, processes=2)


def started(words):
    """A run in its second epoch, and the ids of its processes."""
    process = start(words)
    wait_for_line(process, "  loss ")  # the row of the first epoch
    return process, children_of(process.pid)


def the_sentence(errors):
    (sentence,) = ERROR.findall(errors)
    assert 'main_pretrain.py", line' not in errors
    assert sentence.endswith("the same command again to continue from the last checkpoint")
    return sentence


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_ends_the_other(images, tmp_path, number):
    process, children = started(two_processes(images, tmp_path / "run", epochs=200))
    os.kill(children[number], signal.SIGKILL)
    code, _, err = finish(process)
    assert code != 0
    sentence = the_sentence(err)
    assert re.match(
        rf"process {number} .*{children[number]} on .* died or stopped responding at step \d",
        sentence,
    )


def test_a_process_that_is_frozen_ends_both(images, tmp_path):
    process, children = started(
        two_processes(images, tmp_path / "run", epochs=200, timeout_minutes=0.1)
    )
    os.kill(children[1], signal.SIGSTOP)
    first = process.stderr.readline()
    os.kill(children[1], signal.SIGKILL)  # torchrun would do so in half a minute
    code, _, err = finish(process)
    assert code != 0
    assert re.match(
        rf"process 1 .*{children[1]} on .* died or stopped responding", the_sentence(first + err)
    )


def test_processes_that_were_suspended_together_go_on(images, tmp_path):
    words = two_processes(images, tmp_path / "run", epochs=10, timeout_minutes=0.1)
    process, children = started(words)
    for child in children:
        os.kill(child, signal.SIGSTOP)
    time.sleep(8)  # longer than the timeout
    for child in children:
        os.kill(child, signal.SIGCONT)
        time.sleep(0.5)  # one of them wakes up first
    code, _, err = finish(process)
    assert code == 0, err


def test_a_process_that_waits_forever_for_an_image_ends_both(images, tmp_path):
    process, _ = started(two_processes(images, tmp_path / "run", epochs=200, timeout_minutes=0.1))
    (images / "005.png").unlink()
    os.mkfifo(images / "005.png")  # opening it blocks until there is a writer
    code, _, err = finish(process)
    assert code != 0
    assert re.match(r"process [01] .* has been waiting for images for \d+ s", the_sentence(err))


def test_torchrun_restarts_a_run_and_the_result_is_the_same(images, tmp_path):
    words = two_processes(images, tmp_path / "undisturbed")
    code, _, err = finish(start(words))
    assert code == 0, err
    words = two_processes(images, tmp_path / "run")
    words.insert(words.index("--standalone"), "--max-restarts=1")
    process, children = started(words)
    os.kill(children[1], signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    the_sentence(err)
    assert re.search(r"continuing .*checkpoint-e0001-s000000.pth", out)
    assert_identical(final_state(tmp_path / "run"), final_state(tmp_path / "undisturbed"))
    assert len(list_checkpoints(tmp_path / "run")) == 3
