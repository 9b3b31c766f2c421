"""Which checkpoint a run continues from, and the check that it is the same run."""

import platform
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import make_state, save_at, truncate
from tests.helpers.runs import assert_identical
from util.errors import InputError
from util.runs import run as runs
from util.runs.checkpoint import list_checkpoints, read_checkpoint
from util.runs.resume import (
    EFFECTIVE_BATCH,
    RunRecord,
    check_same_run,
    continue_run,
    newest_good_checkpoint,
    read_resume,
)


def find_resume(folder, resume):
    """Path of the checkpoint that a run continues from."""
    found = read_resume(folder, resume, "pretrain", list_checkpoints(folder))
    if found is None:
        return None
    path, content = found
    assert_identical(content, read_checkpoint(path, "pretrain"))
    return path


def flip(path):
    """Flip a bit of a weight."""
    weight = torch.load(path, weights_only=True)["model"]["weight"]
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes())] ^= 0x10
    path.write_bytes(content)


# Choice of the checkpoint


@pytest.mark.faults
@pytest.mark.parametrize("break_it", [truncate, flip, lambda path: path.write_bytes(b"")])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, break_it):
    _, good, broken = save_at(tmp_path, (1, 0), (2, 0), (2, 4))
    break_it(broken)
    assert newest_good_checkpoint(tmp_path, "pretrain") == good
    (warning,) = caplog.messages
    assert str(broken) in warning
    assert "trying the previous checkpoint" in warning


@pytest.mark.faults
def test_only_damaged_checkpoints_are_refused(tmp_path):
    for path in save_at(tmp_path, (1, 0), (2, 0)):
        truncate(path)
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read \(2 tried\)"):
        find_resume(tmp_path, "auto")


def test_auto_starts_from_scratch_without_checkpoints(tmp_path):
    assert find_resume(tmp_path, "auto") is None
    assert find_resume(tmp_path / "nowhere", "auto") is None
    save_at(tmp_path, (1, 0))
    (tmp_path / "checkpoint-e0002-s000000.pth.tmp").write_bytes(b"half of it")
    assert find_resume(tmp_path, "auto") == tmp_path / "checkpoint-e0001-s000000.pth"


def test_none_starts_from_scratch_but_overwrites_nothing(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert find_resume(tmp_path, "none") is None
    save_at(tmp_path, (1, 0))
    with pytest.raises(InputError, match="would overwrite"):
        find_resume(tmp_path, "none")


def test_a_path_elsewhere_is_where_a_run_starts_but_not_where_it_continues(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    path = save_at(other, (5, 0))[0]
    assert find_resume(own, str(path)) == path
    mine = save_at(own, (1, 0))[0]
    assert find_resume(own, str(path)) == mine


def test_a_path_inside_is_taken_unless_newer_ones_would_be_overwritten(tmp_path):
    first, second, third = save_at(tmp_path, (1, 0), (1, 7), (2, 0))
    assert find_resume(tmp_path, str(third)) == third
    with pytest.raises(InputError, match=r"newer than .*e0001-s000000.*\(.*e0001-s000007"):
        find_resume(tmp_path, str(first))
    second.unlink()
    third.unlink()
    assert find_resume(tmp_path, str(first)) == first


def test_a_path_inside_under_another_name_is_refused_where_newer_ones_would_be_overwritten(
    tmp_path,
):
    first, *_ = save_at(tmp_path, (1, 0), (2, 0))
    first.rename(tmp_path / "best.pth")
    with pytest.raises(InputError, match="newer"):
        find_resume(tmp_path, str(tmp_path / "best.pth"))


def test_a_path_that_is_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint not found: .*nowhere\.pth"):
        find_resume(tmp_path, str(tmp_path / "nowhere.pth"))


@pytest.mark.parametrize(
    ("kind", "flag"), [("pretrain", "--init_from"), ("linprobe", "--finetune")]
)
def test_weights_that_cannot_be_continued_are_refused_with_the_flag_that_starts_from_them(
    tmp_path, kind, flag
):
    other = tmp_path / "released.pth"
    torch.save({"model": {"w": torch.ones(2)}}, other)
    with pytest.raises(InputError, match=rf"start a new run from its weights with {flag}$"):
        read_resume(tmp_path / "run", str(other), kind, [])


def test_the_weights_of_the_best_epoch_alone_cannot_be_continued(tmp_path):
    path = save_at(tmp_path, (1, 0))[0]
    content = torch.load(path, weights_only=True)
    del content["optimizer"]
    record = RunRecord("pretrain", {}, {"--epochs": 3}, {}, {}, ())
    with pytest.raises(InputError, match=r"only the weights.*with --init_from$"):
        continue_run(make_state(), path, content, record)


@pytest.mark.parametrize("kind", ["segmentation", "detection"])
def test_no_flag_is_named_for_checkpoints_that_nothing_starts_from(tmp_path, kind):
    path = save_at(tmp_path, (1, 0), kind=kind)[0]
    with pytest.raises(InputError, match=r"not a pre-training checkpoint of this project$"):
        find_resume(tmp_path / "run", str(path))


def change(path, **changes):
    torch.save(torch.load(path, weights_only=True) | changes, path)


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    path = save_at(tmp_path, (1, 0))[0]
    change(path, version=2)
    with pytest.raises(InputError, match=r"version 2 .* update the code"):
        read_checkpoint(path, "pretrain")


def test_an_older_checkpoint_does_not_replace_one_of_a_newer_version(tmp_path):
    _, newer = save_at(tmp_path, (1, 0), (2, 0))
    change(newer, version=2)
    with pytest.raises(InputError, match=r"version 2 .* update the code"):
        find_resume(tmp_path, "auto")


def test_a_file_of_another_program_is_refused(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "released.pth")
    with pytest.raises(InputError, match="not a pre-training checkpoint"):
        read_checkpoint(tmp_path / "released.pth", "pretrain")


# Check that it is the same run

IDENTITY = {"--model": "m", "--mask_ratio": 0.75, "--pred_ratio": None, "--seed": 0}
RECIPE = {"--epochs": 10, "lr": 1e-3, "--amp": "bf16"}
CHECKPOINT = {"identity": IDENTITY, "recipe": RECIPE, "progress": {"epoch": 4}}
PATH = Path("c.pth")


def check(checkpoint, fixed, may_change, given=()):
    record = RunRecord("pretrain", fixed, may_change, {}, {}, given)
    check_same_run(checkpoint, record, PATH)


def test_the_same_run_continues_silently(caplog):
    check(CHECKPOINT, dict(IDENTITY), dict(RECIPE))
    assert caplog.messages == []


def test_another_run_is_refused_with_the_list_of_differences():
    other = IDENTITY | {"--mask_ratio": 0.5, "--pred_ratio": 0.25}
    with pytest.raises(InputError) as caught:
        check(CHECKPOINT, other, RECIPE)
    message = str(caught.value)
    assert "--mask_ratio was 0.75 and is now 0.5" in message
    assert "--pred_ratio was None and is now 0.25" in message
    assert "--seed" not in message
    assert "\n" not in message


def test_a_change_of_settings_is_logged(caplog):
    check(CHECKPOINT, IDENTITY, RECIPE | {"lr": 5e-4, "--amp": "fp32"})
    assert caplog.messages == [
        "continuing with a change: lr was 0.001 and is now 0.0005",
        "continuing with a change: --amp was 'bf16' and is now 'fp32'",
    ]


@pytest.mark.parametrize(
    ("epochs", "change"),
    [
        (12, "increased from 10 to 12: from epoch 5 on, the learning rate follows the longer"),
        (5, "decreased from 10 to 5: from epoch 5 on, the learning rate follows the shorter"),
    ],
)
def test_a_run_may_become_longer_or_shorter_with_a_warning(caplog, epochs, change):
    check(CHECKPOINT, IDENTITY, RECIPE | {"--epochs": epochs})
    (message,) = caplog.messages
    assert f"--epochs {change}" in message


@pytest.mark.parametrize("epochs", [4, 3])
def test_a_run_cannot_become_shorter_than_what_is_done(epochs):
    with pytest.raises(InputError, match=rf"--epochs {epochs} is below the 10 .* 4 are done"):
        check(CHECKPOINT, IDENTITY, RECIPE | {"--epochs": epochs})


def test_another_number_of_processes_is_logged(caplog):
    before = CHECKPOINT | {"recipe": RECIPE | {"processes": 8}}
    check(before, IDENTITY, RECIPE | {"processes": 4})
    (message,) = caplog.messages
    assert message.startswith("the number of processes was 8 and is now 4")
    check(CHECKPOINT, IDENTITY, RECIPE | {"processes": 4})  # of an older version
    assert len(caplog.messages) == 1


def test_another_batch_is_refused_with_advice_for_any_number_of_processes():
    before = CHECKPOINT | {"identity": IDENTITY | {EFFECTIVE_BATCH: 4096}}
    with pytest.raises(InputError, match="--effective_batch_size 4096 works with any number"):
        check(before, IDENTITY | {EFFECTIVE_BATCH: 2048}, RECIPE)


def test_an_option_of_a_newer_version_that_was_not_given_changes_nothing(caplog):
    fixed, may_change = IDENTITY | {"--new": 3}, RECIPE | {"--speed": "high"}
    check(CHECKPOINT, fixed, may_change, {"--epochs"})
    assert caplog.messages == []


def test_an_option_of_a_newer_version_that_was_given_is_a_difference(caplog):
    with pytest.raises(InputError, match="--new was None and is now 4"):
        check(CHECKPOINT, IDENTITY | {"--new": 4}, RECIPE, {"--new"})
    check(CHECKPOINT, IDENTITY, RECIPE | {"--speed": "low"}, {"--speed"})
    assert caplog.messages == ["continuing with a change: --speed was None and is now 'low'"]


# What changes the last bits; whole runs are in tests/faults/test_threads.py

H200 = {"--num_threads": None, "device": "NVIDIA H200"}


def test_threads_and_kernels_of_the_cpu_are_not_mentioned_on_a_gpu(caplog):
    versions = {"cpu_capability": "NO AVX", "cpu_linear": "another", "torch": torch.__version__}
    before = CHECKPOINT | {"recipe": RECIPE | H200, "versions": versions}
    check(before, IDENTITY, RECIPE | H200)
    assert caplog.messages == []


@pytest.mark.parametrize("number", [1, 8])
def test_a_gpu_instead_of_a_cpu_is_named_but_not_its_threads(caplog, number):
    cpu = {"--num_threads": number, "device": "AMD EPYC"}
    for before, now in [(cpu, H200), (H200, cpu)]:
        caplog.clear()
        check(CHECKPOINT | {"recipe": RECIPE | before}, IDENTITY, RECIPE | now)
        names = f"device was {before['device']!r} and is now {now['device']!r}"
        assert caplog.messages == [f"the result may not be bit-identical: {names}"]


def test_the_device_is_called_as_its_maker_does(tmp_path, monkeypatch):
    file, cpu = tmp_path / "cpuinfo", torch.device("cpu")
    monkeypatch.setattr(runs, "CPU_INFO", file)
    assert runs.device_name(cpu) == f"CPU ({platform.machine()})"  # no such file: macOS
    file.write_text("processor\t: 0\nCPU part\t: 0xd4f\n")  # ARM
    assert runs.device_name(cpu) == f"CPU ({platform.machine()})"
    file.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9B14\nmodel name\t: other\n")
    assert runs.device_name(cpu) == "AMD EPYC 9B14"
    assert runs.device_name(torch.device("mps")) == "mps"
