"""Checkpoints: complete or absent, found on resume, and refused by other runs."""

import errno
import logging
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import make_state, names, save_at, train, truncate, writer
from tests.helpers.runs import assert_identical
from util.errors import RunError
from util.runs import checkpoint as checkpoint_module
from util.runs.checkpoint import (
    CheckpointWriter,
    Progress,
    list_checkpoints,
    read_checkpoint,
)
from util.runs.files import replace_file
from util.runs.resume import newest_good_checkpoint

# Content


@pytest.mark.parametrize("amp", ["fp32", "fp16"])
def test_a_state_continues_bit_for_bit(tmp_path, amp):
    state = make_state(amp)
    train(state, num_steps=3)
    path = writer(tmp_path, state).save()
    other = make_state(amp)
    other.load_state_dict(read_checkpoint(path, "pretrain"))
    assert_identical(other.state_dict(), state.state_dict())
    assert other.progress == Progress(epoch=0, step_in_epoch=3, step=3)
    for each in (state, other):
        torch.manual_seed(1)
        train(each, num_steps=2)
    assert_identical(other.state_dict(), state.state_dict())


def test_it_holds_tensors_and_plain_values_and_loads_with_weights_only(tmp_path):
    state = make_state("fp16")
    train(state)
    header = {"model_name": "m", "mean": [0.5], "args": {"lr": None, "input_size": [16]}}
    path = CheckpointWriter(
        tmp_path, state, header, kind="pretrain", every_minutes=None, keep_last=0
    ).save()
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    content = torch.load(path, weights_only=True)
    assert content["format"] == "crossmae-pretrain"
    assert content["version"] == 1
    assert content["args"] == header["args"]
    assert content["progress"] == {"epoch": 0, "step_in_epoch": 1, "step": 1, "best": None}


def test_a_run_may_change_its_precision(tmp_path):
    fp16, fp32 = make_state("fp16"), make_state("fp32")
    train(fp16)
    train(fp32)
    from_fp32, from_fp16 = make_state("fp16"), make_state("fp32")
    from_fp32.load_state_dict(read_checkpoint(writer(tmp_path, fp32).save(), "pretrain"))
    from_fp16.load_state_dict(read_checkpoint(writer(tmp_path, fp16).save(), "pretrain"))
    assert torch.equal(from_fp16.model.weight, fp16.model.weight)
    assert torch.equal(from_fp32.model.weight, fp32.model.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, bad):
    state = make_state()
    good = save_at(tmp_path, (1, 0), state=state)
    state.model.weight.data[2, 3] = bad
    state.progress = Progress(epoch=2, step=20)
    with pytest.raises(RunError, match="weight is not finite after step 20") as caught:
        writer(tmp_path, state).save()
    assert "\n" not in str(caught.value)
    assert list_checkpoints(tmp_path) == good


def test_a_stream_returns_to_the_start_of_its_epoch(caplog):
    state = make_state()
    train(state, num_steps=3)
    state.progress = Progress(epoch=2, step_in_epoch=3, step=13)
    state.rewind_epoch()
    assert state.progress == Progress(epoch=2, step_in_epoch=0, step=10)
    assert state.meters.num_images == 0
    assert "epoch 3" in caplog.text
    caplog.clear()
    state.rewind_epoch()
    assert caplog.messages == []  # already at the start


# Writing


@pytest.mark.faults
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("zip")])
def test_a_write_that_fails_leaves_the_older_file_and_the_run_continues(
    tmp_path, caplog, monkeypatch, error
):
    state = make_state()
    path = save_at(tmp_path, (1, 0), state=state)[0]
    before = path.read_bytes()
    train(state)
    state.progress = Progress(epoch=1)

    def fails_midway(content, file):
        file.write(b"half of it")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails_midway)
        assert writer(tmp_path, state, keep_last=1).save() is None
    assert f"could not save {path}" in caplog.text
    assert names(tmp_path) == [path.name]
    assert path.read_bytes() == before
    assert writer(tmp_path, state).save() == path
    assert path.read_bytes() != before


@contextmanager
def files_no_larger_than(size):
    """Make writes beyond a size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_weights(path, number):
    content = {"w": torch.ones(number)}
    replace_file(path, lambda file: torch.save(content, file), durable=True)


@pytest.mark.faults
def test_half_written_files_are_removed_on_a_full_disk(tmp_path):
    path = tmp_path / "checkpoint-e0001-s000000.pth"
    write_weights(path, 10)
    before = path.read_bytes()
    with files_no_larger_than(100_000), pytest.raises((OSError, RuntimeError)):
        write_weights(path, 300_000)
    assert names(tmp_path) == [path.name]
    assert path.read_bytes() == before


@pytest.mark.faults
def test_unfinished_files_of_a_killed_run_are_deleted_at_the_next_start(tmp_path, caplog):
    unfinished = tmp_path / "checkpoint-e0002-s000000.pth.tmp"
    unfinished.write_bytes(b"half of it")
    (tmp_path / "notes.tmp").write_bytes(b"someone else's")
    with caplog.at_level(logging.INFO):
        writer(tmp_path, None)
    assert names(tmp_path) == ["notes.tmp"]
    assert str(unfinished) in caplog.text


@pytest.mark.faults
def test_an_interrupted_write_does_not_leave_a_half_written_file(tmp_path, monkeypatch):
    def interrupted(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_at(tmp_path, (1, 0))
    assert names(tmp_path) == []


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("fsync"), fsync(file)))
    monkeypatch.setattr(
        Path, "replace", lambda path, new: (events.append("replace"), replace(path, new))
    )
    save_at(tmp_path, (1, 0))
    assert events == ["fsync", "replace", "fsync"]  # content, name, folder


def test_only_the_last_ones_are_kept_and_deletions_are_logged(tmp_path, caplog):
    places = [(1, 0), (1, 3), (2, 0), (10, 0)]
    with caplog.at_level(logging.INFO):
        paths = save_at(tmp_path, *places, keep_last=2)
    assert list_checkpoints(tmp_path) == paths[2:]
    assert [m for m in caplog.messages if m.startswith("deleted")] == [
        f"deleted {path} (--keep_last 2)" for path in paths[:2]
    ]


def test_all_are_kept_on_request_and_other_files_always(tmp_path):
    (tmp_path / "checkpoint-best.pth").write_bytes(b"mine")
    paths = save_at(tmp_path, *[(epoch, 0) for epoch in range(1, 6)], keep_last=0)
    assert list_checkpoints(tmp_path) == paths
    save_at(tmp_path, (6, 0), keep_last=1)
    assert names(tmp_path) == ["checkpoint-best.pth", "checkpoint-e0006-s000000.pth"]


@pytest.mark.faults
def test_the_newest_save_is_kept_even_if_a_damaged_file_has_a_later_name(tmp_path):
    old, broken = save_at(tmp_path, (1, 0), (2, 9))
    truncate(broken)
    assert newest_good_checkpoint(tmp_path, "pretrain") == old
    new = save_at(tmp_path, (2, 5), keep_last=1)[0]
    assert newest_good_checkpoint(tmp_path, "pretrain") == new


def test_checkpoints_are_in_the_order_of_the_run(tmp_path):
    paths = save_at(tmp_path, (9, 0), (10, 0), (10, 2), (9999, 0), (10000, 999_999), (10001, 0))
    assert list_checkpoints(tmp_path) == paths


@pytest.mark.parametrize(
    ("every_minutes", "minutes", "saves"),
    [(None, 1e9, False), (10, 9.9, False), (10, 10, True), (0, 0, True)],
)
def test_a_checkpoint_is_due_after_the_given_minutes(
    tmp_path, monkeypatch, every_minutes, minutes, saves
):
    now = 1000.0
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now)
    checkpoints = writer(tmp_path, make_state(), every_minutes=every_minutes)
    now += 60 * minutes
    checkpoints.save_if_due()
    assert bool(list_checkpoints(tmp_path)) == saves
    if saves and minutes:
        list_checkpoints(tmp_path)[0].unlink()
        checkpoints.save_if_due()  # not due again immediately
        assert list_checkpoints(tmp_path) == []


def test_processes_but_the_main_one_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "is_main_process", lambda: False)
    assert writer(tmp_path, make_state()).save() is None
    assert names(tmp_path) == []


@pytest.mark.parametrize("lines", [{"x": 1}, [{"loss": 1.0}], [3], [{"epoch": "1"}]])
def test_unwritten_log_lines_without_an_epoch_are_refused(lines):
    content = make_state().state_dict() | {"unwritten": lines}
    with pytest.raises(ValueError, match="without an epoch"):
        make_state().load_state_dict(content)
