"""Runs with a sharded model behave like any other run.

torchrun runs this file as a script.
"""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import main_finetune
import main_pretrain
import models
from tests.helpers.files import write_classes, write_images
from tests.helpers.models import crossmae_nano, use_nano_models
from tests.helpers.processes import ROOT, command, finish, start
from tests.helpers.runs import TINY, assert_identical, final_state, log_without_time, refusal
from util.compute.distributed import (
    gradient_sync,
    init_distributed,
    is_main_process,
    stop_processes,
)
from util.compute.sharding import gather_state, shard, unsharded
from util.compute.watchdog import stop_watchdog
from util.masking import count_tokens, random_split
from util.runs.checkpoint import list_checkpoints

pytestmark = pytest.mark.xdist_group("sharding")  # whose runs are made once

CPU = torch.device("cpu")
MAINS = {"pretrain": main_pretrain.main, "finetune": main_finetune.main}
# Name of a run -> its main, its options, and the run from whose first epoch it continues.
RUNS = {
    "whole": ("pretrain", ["--batch_size", "4"], None),
    "sharded": ("pretrain", ["--batch_size", "4", "--fsdp"], None),
    "sharded, low": ("pretrain", ["--batch_size", "4", "--fsdp", "--memory", "low"], None),
    "sharded, accumulating": ("pretrain", ["--effective_batch_size", "8", "--fsdp"], None),
    "sharded, then whole": ("pretrain", ["--batch_size", "4"], "sharded"),
    "whole, then sharded": ("pretrain", ["--batch_size", "4", "--fsdp"], "whole"),
    "sharded, then sharded": ("pretrain", ["--batch_size", "4", "--fsdp"], "sharded"),
    "tuned whole": ("finetune", ["--batch_size", "4"], None),
    "tuned sharded": ("finetune", ["--batch_size", "4", "--fsdp"], None),
}
OPTIONS = ["--num_workers", "0", "--amp", "fp32", "--lr", "1e-3", "--clip_grad", "1"]
OPTIONS += ["--log_every", "1", "--save_every", "1", "--epochs", "2", "--batch_size", "2"]
OF_MAIN = {
    "pretrain": [*TINY, "--decoder_depth", "2", "--eval_every", "1", "--knn_every", "1"],
    "finetune": ["--input_size", "16", "--model", "vit_tiny_patch4", "--smoothing", "0"],
}


def copy_first_epoch(source, target):
    target.mkdir()
    for name in ("checkpoint-e0001-s000000.pth", "log.jsonl"):
        (target / name).write_bytes((source / name).read_bytes())


def work(folder):
    """Run all runs in each process, and check the shards that it keeps."""
    init_distributed("cpu")
    use_nano_models(pytest.MonkeyPatch())
    for name, (main, options, before) in RUNS.items():
        if before and is_main_process():
            copy_first_epoch(folder / before, folder / name)
        dist.barrier()
        where = ["--data_path", str(folder / "images"), "--output_dir", str(folder / name)]
        MAINS[main]([*OF_MAIN[main], *OPTIONS, *where, *options])

    torch.manual_seed(0)
    whole, model = crossmae_nano(), crossmae_nano()
    whole.load_state_dict(model.state_dict())
    shard(model, model.blocks, CPU)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    kept = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert kept < 0.6 * sum(parameter.numel() for parameter in whole.parameters())
    state = gather_state({"models": [dict(model.state_dict())]})["models"][0]
    if is_main_process():
        assert_identical(state, dict(whole.state_dict()))
    else:
        assert set(state.values()) == {None}
    images = torch.rand(2, 3, 16, 16)
    with unsharded(model, crossmae_nano) as copy:
        if is_main_process():  # without the others
            assert_identical(copy.encoder(images), whole.encoder(images))
    assert all(parameter.is_meta for parameter in copy.parameters())

    # Gradients are reduced, and thus sharded, only in the last micro-step.
    split = random_split(torch.rand(2, 16), count_tokens(16, 0.75, 0.25))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for is_last in (False, False, True):
        with gradient_sync(model, enabled=is_last):
            model(images, split).backward()
        assert [parameter.grad is not None for parameter in trained] == [is_last] * len(trained)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of all runs, each with two processes."""
    folder = tmp_path_factory.mktemp("sharding")
    write_classes(folder / "images")
    code, out, err = finish(start(command(__file__, folder, processes=2), PYTHONPATH=str(ROOT)))
    assert code == 0, out + err
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sharded", "whole"),
        ("sharded, low", "whole"),
        ("sharded, accumulating", "whole"),
        ("sharded, then whole", "whole"),
        ("whole, then sharded", "whole"),
        ("tuned sharded", "tuned whole"),
    ],
)
def test_sharded_and_whole_runs_measure_the_same(folder, name, expected):
    lines, wanted = log_without_time(folder / name), log_without_time(folder / expected)
    first = 1 if "tuned" in name else 0  # k-NN measures the untrained encoder
    assert [line["epoch"] for line in lines] == [line["epoch"] for line in wanted]
    assert [line["epoch"] for line in lines] == list(range(first, 3))
    for line, other in zip(lines, wanted, strict=True):
        assert line == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_a_sharded_run_continues_bit_for_bit(folder):
    again, undisturbed = folder / "sharded, then sharded", folder / "sharded"
    assert log_without_time(again) == log_without_time(undisturbed)
    assert_identical(final_state(again), final_state(undisturbed))


def layout(content):
    """Names, shapes and types in nested dicts."""
    if isinstance(content, dict):
        return {name: layout(value) for name, value in content.items()}
    return (content.shape, content.dtype) if isinstance(content, torch.Tensor) else type(content)


@pytest.mark.slow
def test_a_sharded_run_writes_the_checkpoints_of_any_other(folder, monkeypatch):
    use_nano_models(monkeypatch)
    one, two = (
        [layout(content) for content in final_state(folder / name)] for name in ("whole", "sharded")
    )
    assert one == two
    path = list_checkpoints(folder / "sharded")[-1]
    assert models.load_model(path)[0].encoder.grid_size == (4, 4)


# Refused combinations


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--fsdp"], "start the run with torchrun"),
        (["--fsdp", "--compile"], "--compile cannot be combined with --fsdp"),
        (["--fsdp", "--amp", "fp16"], "--amp fp16 cannot be combined with --fsdp"),
        (
            ["--fsdp", "--batch_size", "auto", "--effective_batch_size", "8"],
            "--batch_size auto cannot be combined with --fsdp",
        ),
    ],
)
def test_options_that_sharding_excludes_are_refused(tmp_path, capsys, monkeypatch, options, reason):
    use_nano_models(monkeypatch)
    images = write_images(tmp_path / "images", 8)
    argv = [*TINY, "--data_path", images, "--output_dir", tmp_path / "run", *options]
    assert reason in refusal(capsys, *argv)
    assert not (tmp_path / "run").exists()


def test_a_moving_average_cannot_be_sharded(capsys):
    argv = ["--data_path", "images", "--fsdp", "--ema", "0.99"]
    assert "--ema cannot be combined with --fsdp" in refusal(capsys, *argv, main=main_finetune.main)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
    stop_watchdog()
    stop_processes()
