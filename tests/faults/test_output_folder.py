"""What else is in a run's folder, what is done to it meanwhile, and where it is."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

import main_finetune
import main_linprobe
from scripts import plot_runs
from tests.helpers.files import copied, write_classes
from tests.helpers.models import use_nano_models
from tests.helpers.processes import NANO_MAIN, command, finish, start
from tests.helpers.runs import (
    MAINS,
    QUICK,
    TINY,
    assert_identical,
    last_checkpoint,
    refusal,
    run,
    run_until,
    state_of,
)
from util.runs.checkpoint import list_checkpoints
from util.runs.run_log import RunLog

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("nano")]

SECONDS = 60  # after which a run counts as hanging
EPOCHS, STEPS = 3, 5


@contextmanager
def no_hang():
    """Interrupt what waits, such as for the other end of a pipe."""

    def interrupt(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)  # again if a second attempt waits, too
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _no_hang():
    with no_hang():
        yield


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """Arguments of a run that saves after each of its epochs."""
    images = write_classes(tmp_path_factory.mktemp("images"))
    measured = ["--lr", 1e-3, "--eval_every", 1, "--visualize_every", 1]
    saves = ["--save_every", 1, "--keep_last", 0]
    return [*TINY, "--data_path", images, *measured, *saves, "--epochs", EPOCHS]


@pytest.fixture(scope="module")
def undisturbed(argv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        run(*argv, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def stopped(argv, tmp_path_factory):
    """Folder of the run after two of its epochs."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        run_until(15, patch, *argv, "--output_dir", folder)
    return folder


def assert_same_end(folder, undisturbed):
    assert_identical(state_of(folder), state_of(undisturbed))


def at_step(monkeypatch, step, act):
    """Do something before a step of a run is logged."""
    log_step = RunLog.log_step

    def act_and_log(log, done, **values):
        if done == step:
            act()
        log_step(log, done, **values)

    monkeypatch.setattr(RunLog, "log_step", act_and_log)


# Files that cannot be deleted


def make_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()
    (path / "note.txt").write_text("mine")


def make_immutable(path):
    path.write_bytes(path.read_bytes() if path.exists() else b"half of it")
    if not shutil.which("chattr") or change_attribute("+i", path):
        pytest.skip("files cannot be made immutable here")


def change_attribute(attribute, path):
    words = ["chattr", attribute, str(path)]
    return subprocess.run(words, check=False, capture_output=True).returncode


@pytest.fixture
def stays(request):
    """Makes a path one that cannot be deleted."""
    made = []

    def make(path):
        made.append(path)
        request.param(path)

    yield make
    for path in made:
        if shutil.which("chattr"):
            change_attribute("-i", path)


@pytest.mark.parametrize("stays", [make_folder, make_immutable], indirect=True)
@pytest.mark.parametrize("name", ["checkpoint-e0001-s000000.pth", "checkpoint-e0000-s000003.pth"])
def test_a_run_goes_on_when_an_old_checkpoint_cannot_be_deleted(
    tmp_path, argv, undisturbed, stopped, stays, capsys, name
):
    folder = copied(stopped, tmp_path / "run")
    stays(folder / name)
    for _ in range(2):  # the second finds nothing to do
        run(*argv, "--keep_last", 1, "--output_dir", folder)
    out = capsys.readouterr().out
    assert len(re.findall(rf"could not delete \S+{name} \(.*\): it stays", out)) == 1
    assert_same_end(folder, undisturbed)
    assert (folder / name).exists()


@pytest.mark.parametrize("stays", [make_folder, make_immutable], indirect=True)
def test_a_run_goes_on_when_an_unfinished_checkpoint_cannot_be_deleted(
    tmp_path, argv, undisturbed, stopped, stays, capsys
):
    folder = copied(stopped, tmp_path / "run")
    name = "checkpoint-e0001-s000004.pth.tmp"
    stays(folder / name)
    run(*argv, "--output_dir", folder)
    assert len(re.findall(rf"could not delete \S+{name} ", capsys.readouterr().out)) == 1
    assert_same_end(folder, undisturbed)


def test_a_run_goes_on_when_an_old_checkpoint_is_gone_already(
    tmp_path, argv, undisturbed, stopped, monkeypatch
):
    folder, unlink = copied(stopped, tmp_path / "run"), Path.unlink

    def unlink_too_late(path, **options):
        if path.suffix == ".pth":
            with suppress(FileNotFoundError):
                unlink(path)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink_too_late)
    run(*argv, "--keep_last", 1, "--output_dir", folder)
    assert_same_end(folder, undisturbed)


# log.jsonl

GOOD = b'{"epoch": 1, "step": 5, "loss": 0.5}\n'
DAMAGED_LINES = {
    "not UTF-8": b'{"epoch": 1, "step": 5, "loss": 0.5, "\xff\xfe": 1}\n',
    "Latin 1": '{"epoch": 1, "step": 5, "größe": 1}\n'.encode("latin-1"),
    "zeros": bytes(300) + b"\n",
    "no epoch": b'{"step": 5, "loss": 0.5}\n',
    "an epoch in words": b'{"epoch": "one", "step": 5}\n',
    "an epoch as text": b'{"epoch": "1", "step": 5}\n',
    "half an epoch": b'{"epoch": 1.5, "step": 5}\n',
    "an epoch that is true": b'{"epoch": true, "step": 5}\n',
    "an epoch that is null": b'{"epoch": null, "step": 5}\n',
    "an epoch that is a list": b'{"epoch": [1], "step": 5}\n',
    "a negative epoch": b'{"epoch": -1, "step": 5}\n',
    "an infinite epoch": b'{"epoch": 1e999, "step": 5}\n',
    "an epoch of 5,000 digits": b'{"epoch": ' + b"7" * 5000 + b', "step": 5}\n',
    "an epoch of 400 digits": b'{"epoch": ' + b"7" * 400 + b', "step": 5}\n',
    "a loss of 5,000 digits": b'{"epoch": 0, "step": 0, "loss": ' + b"7" * 5000 + b"}\n",
    "a loss of 400 digits": b'{"epoch": 0, "step": 0, "loss": ' + b"7" * 400 + b"}\n",
    "a loss in words": b'{"epoch": 0, "step": 0, "loss": "low"}\n',
    "a loss that is null": b'{"epoch": 0, "step": 0, "val_loss": null}\n',
    "a step in words": b'{"epoch": 0, "step": "zero", "loss": 1}\n',
    "a list": b"[1, 2, 3]\n",
    "a number": b"17\n",
    "text": b'"epoch"\n',
    "deep nesting": b"[" * 100_000 + b"\n",
    "nested objects": b'{"epoch":' * 50_000 + b"\n",
    "half a line in the middle": b'{"epoch": 1, "st\n',
    "two in one line": GOOD.strip() + GOOD,
    "merge conflict": b"<<<<<<< HEAD\n",
}


@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=DAMAGED_LINES)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_damaged_line_of_the_log_is_left_out_and_counted(
    tmp_path, argv, undisturbed, stopped, capsys, line, place
):
    folder = copied(stopped, tmp_path / "run")
    path = folder / "log.jsonl"
    content = path.read_bytes()
    damaged = line + content if place == "first" else content + line
    path.write_bytes(damaged)
    run(*argv, "--output_dir", folder)
    assert re.search(r"log\.jsonl: left out 1 damaged line \(line \d", capsys.readouterr().out)
    assert_same_end(folder, undisturbed)
    assert damaged in [kept.read_bytes() for kept in folder.glob("log-*.jsonl")]


@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=DAMAGED_LINES)
def test_a_plot_leaves_damaged_lines_out(tmp_path, capsys, line):
    (tmp_path / "log.jsonl").write_bytes(line + GOOD)
    argv = ["--runs", tmp_path, "--metrics", "loss", "--output", tmp_path / "plot.png"]
    run(*argv, main=plot_runs.main)
    assert "left out 1 damaged line" in capsys.readouterr().out
    assert (tmp_path / "log.jsonl").read_bytes() == line + GOOD


HARMLESS = {
    "a byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "line ends of Windows": lambda content: content.replace(b"\n", b"\r\n"),
    "empty lines": lambda content: b"\n\n" + content.replace(b"\n", b"\n\n"),
    "no line end": lambda content: content[:-1],
    "half a line at the end": lambda content: content + b'{"epoch": 3, "lo',
    "the first bytes of a line": lambda content: content + b'{"epoch": 3, "\xc3',
    "twice": lambda content: content + content,
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_a_log_that_an_editor_has_saved_is_read(tmp_path, argv, undisturbed, stopped, change):
    folder = copied(stopped, tmp_path / "run")
    path = folder / "log.jsonl"
    path.write_bytes(change(path.read_bytes()))
    run(*argv, "--output_dir", folder)
    assert_same_end(folder, undisturbed)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_a_log_in_another_encoding_is_kept_beside_a_new_one(
    tmp_path, argv, stopped, capsys, encoding
):
    folder = copied(stopped, tmp_path / "run")
    path = folder / "log.jsonl"
    damaged = path.read_text().encode(encoding)
    path.write_bytes(damaged)
    run(*argv, "--output_dir", folder)
    assert "damaged line" in capsys.readouterr().out
    assert damaged in [kept.read_bytes() for kept in folder.glob("log-*.jsonl")]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content.decode().encode("utf-16"),
        lambda content: content + b"{}\n",
        lambda content: content[: content.rstrip().rindex(b"\n") + 9],
        None,
    ],
    ids=["empty", "UTF-16", "one line more", "half of the last line", "deleted"],
)
@pytest.mark.parametrize("main", ["pretrain", "finetune"])
def test_a_finished_run_that_lost_its_log_names_its_last_checkpoint(
    tmp_path, argv, undisturbed, capsys, main, change
):
    folder = tmp_path / "run"
    words = [*argv, "--output_dir", folder]
    if main == "finetune":
        words = [*QUICK, "--epochs", EPOCHS, "--model", "vit_tiny_patch4", "--input_size", 16]
        words += ["--data_path", argv[argv.index("--data_path") + 1], "--output_dir", folder]
        run(*words, main=MAINS[main].main)
    else:
        copied(undisturbed, folder)
    path = folder / "log.jsonl"
    content = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(content))
    run(*words, main=MAINS[main].main)
    assert f"checkpoint: {folder / name_of(EPOCHS)}" in capsys.readouterr().out


# Other things under the names of a run's files


def make_link(path, outside):
    path.symlink_to(outside / "precious.txt")


def make_dangling_link(path, outside):
    path.symlink_to(outside / "nothing.txt")


def make_link_to_a_folder(path, outside):
    path.symlink_to(outside)


def make_pipe(path, _):
    os.mkfifo(path)


def make_full_folder(path, _):
    path.mkdir()
    (path / "precious.txt").write_text("mine")


def make_socket(path, _):
    here = Path.cwd()
    os.chdir(path.parent)  # whose name may be too long for a socket
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


NAMES = ["lock", "args.json", "args.tmp", "args.json.tmp", "log.jsonl", "log.tmp", "log.txt"]
NAMES += ["log.jsonl.tmp", "reconstructions.png", "reconstructions.tmp", "reconstructions.png.tmp"]
NAMES += ["checkpoint-e0003-s000000.pth", "checkpoint-e0003-s000000.pth.tmp"]
KINDS = [make_link, make_dangling_link, make_link_to_a_folder, make_pipe, make_full_folder]
KINDS += [make_socket]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__.removeprefix("make_"))
@pytest.mark.parametrize("name", NAMES)
def test_nothing_with_the_name_of_a_runs_file_is_followed_or_waited_for(
    tmp_path, argv, undisturbed, stopped, capsys, name, make
):
    folder, outside = copied(stopped, tmp_path / "run"), tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("precious")
    with suppress(FileNotFoundError):
        (folder / name).unlink()
    make(folder / name, outside)
    words = [*argv, "--output_dir", folder]
    try:
        run(*words)
    except BaseException:
        sentence = refusal(capsys, *words, code=1 if "e0003" in name else 2)
        assert name.removesuffix(".tmp") in sentence or "last checkpoint could not be" in sentence
    else:
        states = [last_checkpoint(f) for f in (folder, undisturbed)]
        for key in ("model", "optimizer", "progress"):
            assert_identical(*(state[key] for state in states), key)
    assert sorted(path.name for path in outside.iterdir()) == ["precious.txt"]
    assert (outside / "precious.txt").read_text() == "precious"
    if make is make_full_folder:
        kept = list(folder.glob("**/precious.txt"))
        assert [path.read_text() for path in kept] == ["mine"]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__.removeprefix("make_"))
@pytest.mark.parametrize("name", ["checkpoint-best.pth", "checkpoint-best.pth.tmp", "classes.json"])
def test_nothing_with_the_name_of_a_classifiers_file_is_followed_or_waited_for(
    tmp_path, images, name, make
):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    for path in (folder, outside):
        path.mkdir()
    (outside / "precious.txt").write_text("precious")
    make(folder / name, outside)
    words = [*QUICK, "--model", "vit_tiny_patch4", "--input_size", 16, "--data_path", images]
    run(*words, "--output_dir", folder, main=main_finetune.main)
    assert last_checkpoint(folder, "finetune")["progress"]["epoch"] == 2
    assert sorted(path.name for path in outside.iterdir()) == ["precious.txt"]
    assert (outside / "precious.txt").read_text() == "precious"


# Checkpoints under other names


def name_of(epoch, step=0):
    return f"checkpoint-e{epoch:04d}-s{step:06d}.pth"


@pytest.mark.parametrize("later", [(2, 3), (3, 0), (9, 0), (9999, 999_999)])
@pytest.mark.parametrize("act", [shutil.copy, os.rename])
def test_a_checkpoint_under_a_later_name_counts_as_what_it_is(
    tmp_path, argv, undisturbed, stopped, capsys, later, act
):
    folder = copied(stopped, tmp_path / "run")
    act(folder / name_of(1), folder / name_of(*later))
    run(*argv, "--output_dir", folder)
    out = capsys.readouterr().out
    assert f"continuing from {folder / name_of(2)} after 2 epochs" in out
    assert re.search(rf"{name_of(*later)} is from after 1 epoch and 0 steps", out)
    assert f"checkpoint: {folder / name_of(3)}" in out
    ends = [torch.load(f / name_of(3), weights_only=True) for f in (folder, undisturbed)]
    for key in ("model", "optimizer", "progress"):
        assert_identical(*(end[key] for end in ends), key)


def test_what_was_trained_after_a_renamed_checkpoint_is_not_lost_at_the_next_start(
    tmp_path, argv, stopped, monkeypatch, capsys
):
    folder = copied(stopped, tmp_path / "run")
    (folder / name_of(2)).unlink()
    (folder / name_of(1)).rename(folder / name_of(9))
    run_until(15, monkeypatch, *argv, "--output_dir", folder)  # saves the second epoch
    capsys.readouterr()
    run(*argv, "--output_dir", folder)
    assert f"continuing from {folder / name_of(2)} after 2 epochs" in capsys.readouterr().out


def test_a_renamed_checkpoint_that_is_given_does_not_overwrite_newer_ones(
    tmp_path, argv, stopped, capsys
):
    folder = copied(stopped, tmp_path / "run")
    shutil.copy(folder / name_of(1), folder / name_of(9))
    sentence = refusal(capsys, *argv, "--resume", folder / name_of(9), "--output_dir", folder)
    assert f"newer than {name_of(9)}" in sentence and name_of(2) in sentence


# The folder's lock

HOLD = """
import sys, time
from pathlib import Path
from util.runs.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(300)
"""


def hold(folder):
    """Let another process lock a folder."""
    process = start([*command()[:1], "-c", HOLD, str(folder)], PYTHONPATH=".")
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("replacement", [None, b"", b'{"process": 1}'])
def test_a_run_whose_lock_file_was_deleted_locks_its_folder_again(
    tmp_path, argv, undisturbed, capsys, monkeypatch, replacement
):
    folder, refused = tmp_path / "run", []

    def delete():
        (folder / "lock").unlink()
        if replacement is not None:
            (folder / "lock").write_bytes(replacement)

    def start_another():
        words = [*command()[:1], "-c", HOLD.replace("300", "0"), str(folder)]
        refused.append(finish(start(words, PYTHONPATH=".")))

    at_step(monkeypatch, 3, delete)
    at_step(monkeypatch, 8, start_another)
    run(*argv, "--log_every", 1, "--output_dir", folder)
    assert capsys.readouterr().out.count("lock was deleted while this run had it") == 1
    assert "another run, process" in refused[0][2]
    assert_same_end(folder, undisturbed)


def test_a_lock_that_cannot_be_taken_again_is_named_once(
    tmp_path, argv, undisturbed, capsys, monkeypatch
):
    folder = tmp_path / "run"

    def replace():
        (folder / "lock").unlink()
        (folder / "lock").mkdir()

    at_step(monkeypatch, 3, replace)
    run(*argv, "--log_every", 1, "--output_dir", folder)
    assert capsys.readouterr().out.count(f"cannot lock {folder} again") == 1
    assert "epoch 3/3" in (folder / "log.txt").read_text()
    assert_same_end(folder, undisturbed)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"7" * 5000, b"\xff", b"null", b"{}"])
def test_a_second_start_is_refused_whatever_the_lock_file_says(tmp_path, argv, capsys, content):
    process = hold(tmp_path)
    (tmp_path / "lock").write_bytes(content)
    sentence = refusal(capsys, *argv, "--output_dir", tmp_path)
    assert "another run, whose lock file does not identify it, is writing to" in sentence
    process.kill()


@pytest.mark.parametrize("how", ["deleted", "renamed", "moved"])
def test_a_run_whose_folder_another_run_has_taken_ends_before_its_next_write(
    tmp_path, argv, capsys, monkeypatch, how
):
    folder, others = tmp_path / "run", []

    def take():
        if how == "deleted":
            (folder / "lock").unlink()
        elif how == "renamed":
            (folder / "lock").rename(folder / "lock.old")
        else:
            folder.rename(tmp_path / "elsewhere")
        others.append(hold(folder))
        (folder / "log.jsonl").write_text("the other's")
        (folder / "log.txt").write_text("the other's")

    at_step(monkeypatch, 3, take)
    sentence = refusal(capsys, *argv, "--log_every", 1, "--output_dir", folder, code=1)
    assert f"another run, process {others[0].pid} on " in sentence
    assert (folder / "log.jsonl").read_text() == "the other's"
    assert (folder / "log.txt").read_text() == "the other's"
    assert list_checkpoints(folder) == []
    assert json.loads((folder / "lock").read_bytes())["process"] == others[0].pid


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_a_run_whose_folder_is_gone_ends_with_one_sentence(
    tmp_path, argv, capsys, monkeypatch, how
):
    folder = tmp_path / "run"

    def remove():
        shutil.rmtree(folder) if how == "deleted" else folder.rename(tmp_path / "elsewhere")

    at_step(monkeypatch, 3, remove)
    sentence = refusal(capsys, *argv, "--log_every", 1, "--output_dir", folder, code=1)
    assert f"{folder} has been deleted or moved" in sentence
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("log_dir", [False, True])
def test_a_deleted_folder_is_the_only_thing_that_a_run_says_in_the_end(tmp_path, argv, log_dir):
    folder = tmp_path / "run"
    words = [NANO_MAIN, "pretrain", *argv, "--epochs", 2000, "--output_dir", folder]
    words += ["--log_dir", folder / "board"] if log_dir else []
    process = start(command(*words))
    for line in process.stdout:
        if "epoch    2/2000" in line:
            break
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    code, out, err = finish(process)
    assert code == 1, out + err
    assert re.fullmatch(rf"\S+: error: {folder} has been deleted or moved [^\n]*\n", err), err


@pytest.mark.parametrize("number", [2, 3, 5])
def test_every_start_within_a_second_keeps_its_record(tmp_path, argv, stopped, number):
    folder = copied(stopped, tmp_path / "run")
    for count in range(number):
        for path in folder.glob("args*.json"):
            os.utime(path, (1e9, 1e9))
        run(*argv, "--log_every", 1 + count, "--output_dir", folder)
    records = [json.loads(path.read_text()) for path in folder.glob("args*.json")]
    assert len(records) == 1 + number
    assert {record["args"]["log_every"] for record in records} >= set(range(1, 1 + number))


# Names of folders

NAMES_OF_FOLDERS = {
    "not UTF-8": b"r\xff\xfe",
    "Latin 1": "größe".encode("latin-1"),
    "half a character": b"\xe2\x82",
    "a line break": b"a\nb",
    "an escape": b"\x1b[31mred",
    "a blank and quotes": b" a 'b\"",
    "right to left": "\u202eabc".encode(),
    "percent": b"%s %d %",
    "braces": b"{0} {x}",
    "a star": b"*[a]?",
}


@pytest.mark.parametrize("name", NAMES_OF_FOLDERS.values(), ids=NAMES_OF_FOLDERS)
def test_an_output_path_may_have_any_name(tmp_path, argv, undisturbed, monkeypatch, capsys, name):
    folder = tmp_path / os.fsdecode(name) / "run"
    run_until(10, monkeypatch, *argv, "--output_dir", folder)
    run(*argv, "--output_dir", folder)
    assert_same_end(folder, undisturbed)
    assert all("\n" not in line for line in capsys.readouterr().out.splitlines())
    argv = [*QUICK, "--data_path", argv[argv.index("--data_path") + 1]]
    argv += ["--finetune", list_checkpoints(folder)[-1], "--output_dir"]
    run(*argv, folder.with_name("finetune"), main=main_finetune.main)
    run(*argv, folder.with_name("probe"), "--batch_size", 8, main=main_linprobe.main)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["not UTF-8", "a line break", "an escape", "right to left"])
def test_a_program_with_an_output_path_of_any_name_prints_whole_lines(tmp_path, argv, case):
    folder = tmp_path / os.fsdecode(NAMES_OF_FOLDERS[case])
    code, _, err = finish(start(command(NANO_MAIN, "pretrain", *argv, "--output_dir", folder)))
    assert code == 0, err
    assert list_checkpoints(folder)
    assert "Traceback" not in err
