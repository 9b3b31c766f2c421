"""Operations and bytes of a step on a GPU, counted without a GPU, do not exceed today's."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from scripts.benchmark_pretrain import Config
from scripts.count_operations import (
    ATTENTION,
    GB,
    GIB,
    LINEAR,
    MIX,
    REST,
    TFLOP,
    OperationCounter,
    count_step,
    main,
)
from tests.helpers.runs import refusal, run
from util.settings.compute import MEMORY_MODES

VIT_BASE = "crossmae_vit_base_patch16"


# The counter


def counted(function, *known):
    with OperationCounter(known) as counter:
        function(*known)
    return counter


def test_a_product_reads_two_matrices_and_writes_one():
    with FakeTensorMode():
        a, b = torch.empty(100, 70), torch.empty(70, 90)
        counter = counted(torch.mm, a, b)
    counts = counter.classes[LINEAR]
    assert (counts.operations, counts.flops) == (1, 2 * 100 * 70 * 90)
    assert counts.bytes == 4 * (100 * 70 + 70 * 90 + 100 * 90)
    assert counter.peak == 4 * 100 * 90  # earlier tensors are not counted


def test_views_do_not_move_bytes():
    with FakeTensorMode():
        counter = counted(lambda x: x.view(4, 25).mT[2:].unsqueeze(0), torch.empty(100))
    assert counter.classes == {} and counter.peak == 0


def test_freed_memory_does_not_count_at_the_peak():
    def chain(x):
        for _ in range(5):
            x = x + 1

    with FakeTensorMode():
        assert counted(chain, torch.empty(100)).peak == 2 * 400


def test_an_update_in_place_reads_and_writes():
    with FakeTensorMode():
        counter = counted(lambda x: x.mul_(2), torch.empty(100))
    assert counter.classes[REST].bytes == 800


# ViT-B at 1024 images of 224 px


@pytest.fixture(scope="module")
def steps():
    return {memory: count_step(VIT_BASE, batch_size=1024, memory=memory) for memory in MEMORY_MODES}


def total(counter, key, *, without=()):
    return sum(getattr(c, key) for name, c in counter.classes.items() if name not in without)


# GB that a step reads and writes without its large products; operations; peak GiB without
# weights and optimizer state.
CEILINGS = {"high": (225, 1900, 32.0), "medium": (282, 2320, 18.5), "low": (291, 2370, 11.3)}


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_a_step_does_not_move_more_bytes_than_before(memory, steps):
    gigabytes, operations, gibibytes = CEILINGS[memory]
    assert total(steps[memory], "bytes", without=[LINEAR]) / GB < gigabytes
    assert total(steps[memory], "operations") < operations
    assert steps[memory].peak / GIB < gibibytes


def test_less_memory_lowers_the_peak(steps):
    high, medium, low = (steps[memory].peak for memory in MEMORY_MODES)
    assert high > 1.6 * medium > 1.6 * 1.5 * low


def test_flops_are_those_of_the_formula(steps):
    config = Config(VIT_BASE, 0.25, 12, 224, "bf16", "high", 1024, 0.75)
    formula = 1024 * config.count_flops().training
    counts = steps["high"].classes
    # Images need no gradient, and attention's backward pass recomputes its scores.
    first_layer = 1024 * 2 * 49 * 768 * 768
    again = counts[ATTENTION].flops / 7
    assert total(steps["high"], "flops") == pytest.approx(formula - first_layer + again, rel=1e-3)
    assert counts[MIX].operations == 3


def test_only_low_recomputes_products(steps):
    high, medium, low = (steps[m].classes[LINEAR].flops / TFLOP for m in MEMORY_MODES)
    assert high == medium < low


# The script


def test_from_end_to_end(tmp_path, capsys):
    path = tmp_path / "counts.json"
    models = ["--models", "crossmae_vit_tiny_patch16", "mae_vit_tiny_patch16"]
    run(*models, "--batch_size", 4, "--memory", "low", "--json", path, main=main)
    out = capsys.readouterr().out
    numbers = json.loads(path.read_text())
    assert {"commit", "torch", "command", "date"} <= set(numbers["about"])
    for step, model in zip(numbers["steps"], models[1:], strict=True):
        assert (step["model"], step["memory"]) == (model, "low")
        assert f"{model}, --memory low, 4 images: peak" in out
        *rows, last = step["rows"]
        assert last["class"] == "sum" and last["tflop"] > 0 and step["peak_gib"] > 0
        assert last["gb"] == pytest.approx(sum(row["gb"] for row in rows))
    assert out.count("| linear layers |") == 2


def test_a_folder_that_does_not_exist_is_refused_before_anything_is_counted(capsys):
    sentence = refusal(capsys, "--json", "/does/not/exist/a.json", main=main)
    assert "/does/not/exist does not exist: create it" in sentence
