"""Memory that grows with steps or epochs: objects, tensors, files, threads and bytes of a run."""

import gc
import os
import re
import threading
import tracemalloc
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import shared_cache

from tests.helpers.files import write_classes, write_coco, write_images, write_masked_images
from tests.helpers.runs import EACH_STEP, MAINS, QUICK, TINY, run
from util.runs.meters import EpochMeters
from util.runs.run_log import RunLog

# Measured at the ends of these epochs, between which every kind of work is done many times.
FIRST, LAST = 4, 16
AROUND = 4  # epochs: the C library gives tens of MiB back and takes them again at any of them
MORE = {
    "objects": 10,  # that wait for TensorBoard's thread
    "files": 8,  # likewise, and of batches that a loader's thread has just received
    "bytes": 100_000,  # of Python's objects: its own stores fill slowly, by 3,000 an epoch at most
    "MiB": 40,  # of a process: what libraries keep to use again
    "MiB of loaders": 40,
}
MORE_IN_DETECTION = MORE | {"objects": 1000}  # what its last evaluation has found

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("nano")]


def anonymous_mib(pid):
    """Memory of a process that belongs to no file, in MiB."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():  # not Linux
        return 0.0
    found = re.search(r"RssAnon:\s*(\d+) kB", status.read_text())
    return int(found[1]) / 1024 if found else 0.0  # a process that has just ended has none


def measured():
    """What a run holds now, of what came after `gc.freeze`."""
    shared_cache.free_dead_references()  # of batches from loaders: at most 128 would wait for it
    gc.collect()
    objects = gc.get_objects()
    files = Path("/proc/self/fd")
    return {
        "objects": len(objects),
        "tensors": sum(isinstance(thing, torch.Tensor) for thing in objects),
        "files": len(list(files.iterdir())) if files.exists() else 0,
        "threads": threading.active_count(),
        "processes": len(active_children()),
        "bytes": tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0,
    }


def of_processes():
    """Memory of this process and of its loaders, in MiB."""
    loaders = sum(anonymous_mib(child.pid) for child in active_children())
    return {"MiB": anonymous_mib("self"), "MiB of loaders": loaders}


@pytest.fixture
def grown(monkeypatch):
    """Run a main; return what it holds after epoch LAST beyond what it held after FIRST.

    Of the processes' memory: the least of the last epochs beyond the most of the first.
    """
    end_epoch, found, memory = RunLog.end_epoch, {}, []

    def end_and_measure(log, values, **place):
        end_epoch(log, values, **place)
        memory.append(of_processes())
        if len(memory) == FIRST - 1:  # what exists by now is not looked at again
            gc.collect()
            gc.freeze()
        if len(memory) in (FIRST, LAST):
            found[len(memory)] = measured()

    def go(name, *argv):
        monkeypatch.setattr(RunLog, "end_epoch", end_and_measure)
        run(*argv, main=MAINS[name].main)
        first, last = memory[FIRST - 1 :][:AROUND], memory[:LAST][-AROUND:]
        growth = {what: found[LAST][what] - before for what, before in found[FIRST].items()}
        for what in memory[0]:
            growth[what] = min(at[what] for at in last) - max(at[what] for at in first)
        return growth

    yield go
    gc.unfreeze()
    tracemalloc.stop()


def assert_same(growth, more=MORE):
    """Assert that no kind has grown by more than it may, by default not at all."""
    assert {what: by for what, by in growth.items() if by > more.get(what, 0)} == {}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("few"), 16)


@pytest.fixture(scope="module")
def lines(images, few, pretrained, tmp_path_factory):
    """Command lines by main, evaluated and saved after every epoch, without --output_dir."""
    folder = tmp_path_factory.mktemp("data")
    often = ["--save_every", 1, "--log_every", 1]
    epochs = [*QUICK, "--epochs", LAST + 1, *often]  # a picture of the last epoch takes memory
    classified = ["--finetune", pretrained, "--data_path", images, *epochs]
    steps = ["--model", "vit_tiny_patch4", *QUICK[4:], *often, "--lr", 1e-3, "--batch_size", 2]
    steps += ["--max_iters", 2 * LAST + 2, "--eval_every", 2]
    small = ["--input_size", 32, "--window_size", 3, "--global_blocks", 1, "--fpn_dim", 16]
    small += ["--box_convs", 1, "--roi_batch", 8]
    return {
        "pretrain": [*TINY, *epochs, "--data_path", few, "--val_fraction", 0.25],
        "finetune": [*classified, "--ema", 0.9],
        "linprobe": [*classified, "--lr", 1],
        "segmentation": [
            *(*steps, "--crop_size", 16, "--data_path"),
            write_masked_images(folder / "masked"),
        ],
        "detection": [*steps, *small, "--data_path", write_coco(folder / "coco", 4, 2)],
    }


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["pretrain", "finetune", "linprobe", "segmentation", "detection"])
def test_a_run_of_four_times_the_length_holds_no_more(tmp_path, lines, grown, name, workers):
    growth = grown(name, *lines[name], "--num_workers", workers, "--output_dir", tmp_path)
    assert_same(growth, MORE_IN_DETECTION if name == "detection" else MORE)


def test_nothing_is_kept_of_a_step_an_evaluation_or_a_save(tmp_path, lines, grown):
    tracemalloc.start()
    argv = [*lines["pretrain"], "--eval_every", 1, *EACH_STEP, "--keep_last", 2]
    assert_same(grown("pretrain", *argv, "--output_dir", tmp_path))


def test_nothing_is_kept_of_knn_and_of_pictures(tmp_path, grown):
    tracemalloc.start()
    data = write_classes(tmp_path / "classes")
    argv = [*TINY, "--data_path", data, "--epochs", LAST + 1]
    argv += ["--knn_every", 1, "--eval_every", 4, "--visualize_every", 3]
    assert_same(grown("pretrain", *argv, "--output_dir", tmp_path / "run"))


def test_broken_images_are_kept_once(tmp_path, grown):
    folder = write_images(tmp_path / "images", 16)
    for path in sorted(folder.iterdir())[:3]:
        path.write_bytes(b"")
    tracemalloc.start()
    argv = [*TINY, "--data_path", folder, "--epochs", LAST + 1, "--max_broken", 0.5]
    assert_same(grown("pretrain", *argv, "--output_dir", tmp_path / "run"))


@pytest.mark.parametrize("kept", ["graph", "text", "file"])
def test_what_a_step_keeps_would_be_seen(tmp_path, few, grown, monkeypatch, kept):
    """Measure runs that do keep something, so that the tests above are not empty."""
    update, held = EpochMeters.update, []

    def update_and_keep(meters, *, loss, **values):
        update(meters, loss=loss, **values)
        things = {"graph": loss * 1, "text": "x" * 8192 + str(len(held)), "file": None}
        held.append(Path(os.devnull).open() if kept == "file" else things[kept])  # noqa: SIM115

    monkeypatch.setattr(EpochMeters, "update", update_and_keep)
    tracemalloc.start()
    argv = [*TINY, "--data_path", few, "--epochs", LAST + 1, "--output_dir", tmp_path]
    growth = grown("pretrain", *argv)
    for file in held if kept == "file" else ():
        file.close()
    what = {"graph": "tensors", "text": "bytes", "file": "files"}[kept]
    assert growth[what] > MORE.get(what, 0), growth
