"""Mixed precision, loss scaling, clipping and the choice of the attention kernel."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn

from tests.helpers.models import crossmae_nano, mae_nano
from tests.helpers.runs import logging_restored
from util.compute.precision import Precision
from util.compute.recompute import set_memory
from util.errors import InputError
from util.masking import count_tokens, random_split
from util.runs.run import start_run
from util.settings.compute import ATTENTION_BACKENDS

CPU = torch.device("cpu")
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SPLIT = random_split(torch.rand(2, 16), count_tokens(16, 0.75, 0.25))


# Precision


@pytest.mark.parametrize(
    ("capabilities", "amp"),
    [
        ({"avx2": True, "avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"bf16": True}, "bf16"),
        ({"avx2": True, "avx512_bf16": False}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_default_on_a_cpu_is_bf16_where_it_has_instructions_for_it(monkeypatch, capabilities, amp):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert Precision(None, CPU).amp == amp
    assert Precision("fp32", CPU).amp == "fp32"


def test_default_on_a_cpu_is_fp32_where_pytorch_does_not_name_its_instructions(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert Precision(None, CPU).amp == "fp32"
    assert Precision("bf16", CPU).amp == "bf16"


@pytest.mark.parametrize(("supported", "amp"), [(True, "bf16"), (False, "fp32")])
def test_default_on_a_gpu_is_bf16_where_it_is_not_emulated(monkeypatch, supported, amp):
    def is_bf16_supported(including_emulation=True):
        return including_emulation or supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert Precision(None, torch.device("cuda")).amp == amp


def test_default_elsewhere_is_fp32():
    assert Precision(None, torch.device("mps")).amp == "fp32"


@pytest.mark.parametrize("build", [crossmae_nano, mae_nano])
@pytest.mark.parametrize(
    ("amp", "dtype"),
    [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)],
)
def test_layers_compute_in_the_format_and_the_loss_in_fp32(build, amp, dtype):
    model = build()
    with Precision(amp, CPU).autocast():
        assert model.predict(IMAGES, SPLIT).dtype == dtype
        loss = model(IMAGES, SPLIT)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(IMAGES, SPLIT), rtol=0.02, atol=0)
    # Only the prediction is rounded: the mean of the squares is computed in float32.
    with Precision(amp, CPU).autocast():
        pred = model.predict(IMAGES, SPLIT)
    assert torch.equal(loss, (pred.float() - model.target(IMAGES, SPLIT)).square().mean())


def test_scaler_is_on_only_for_fp16():
    enabled = {amp: Precision(amp, CPU).scaler.is_enabled() for amp in ("bf16", "fp16", "fp32")}
    assert enabled == {"bf16": False, "fp16": True, "fp32": False}


def test_fp16_step_with_infinite_gradients_is_skipped_and_the_next_one_is_not():
    model = nn.Linear(4, 1)
    precision = Precision("fp16", CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before, scale = model.weight.detach().clone(), precision.scaler.get_scale()

    precision.backward(model(torch.full((1, 4), 1e38)).sum())  # infinite after scaling
    assert not precision.step(optimizer, model).isfinite()
    assert torch.equal(model.weight, before)
    assert precision.scaler.get_scale() == scale / 2

    optimizer.zero_grad()
    precision.backward(model(torch.ones(1, 4)).sum())
    norm = precision.step(optimizer, model)
    assert norm == pytest.approx(5**0.5)  # of the unscaled gradients
    # AdamW's first step changes every weight by lr: the skipped one had no effect.
    torch.testing.assert_close(before - model.weight, torch.full((1, 4), 0.1), rtol=0.02, atol=0)


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_a_step_that_is_skipped_changes_neither_weights_nor_state(amp):
    model, precision = nn.Linear(4, 1), Precision(amp, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    kept = []
    for skip in (0.0, 1.0, 0.0):
        precision.backward(model(torch.full((1, 4), 1.0 if skip == 0 else math.nan)).sum())
        precision.clip(optimizer, model)
        precision.update(optimizer, skip=torch.tensor(skip))
        optimizer.zero_grad()
        kept.append(copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]]))
    torch.testing.assert_close(kept[1], kept[0], rtol=0, atol=0)
    assert not torch.equal(kept[2][0]["weight"], kept[1][0]["weight"])


# Clipping


@pytest.mark.parametrize("amp", ["fp32", "fp16"])
@pytest.mark.parametrize(("clip_grad", "length"), [(None, 10.0), (2.5, 2.5), (40.0, 10.0)])
def test_clipping_shortens_the_step_and_reports_the_norm_before_it(amp, clip_grad, length):
    model = nn.Linear(4, 1, bias=False)
    other = nn.Linear(4, 1, bias=False)  # the norm is over all parameters together
    both = nn.ModuleList([model, other])
    before = torch.cat([p.detach().clone() for p in both.parameters()])
    precision = Precision(amp, CPU, clip_grad=clip_grad)
    loss = model(torch.tensor([6.0, 0, 0, 0])) + other(torch.tensor([0, 0, 8.0, 0]))
    precision.backward(loss.sum())
    norm = precision.step(torch.optim.SGD(both.parameters(), lr=1.0), both)
    moved = torch.cat([p.detach() for p in both.parameters()]) - before
    assert norm.item() == pytest.approx(10.0)
    assert moved.norm().item() == pytest.approx(length, rel=1e-5)


# The attention kernel


@pytest.mark.parametrize("amp", ["fp32", "bf16"])
def test_a_kernel_that_cannot_run_is_refused_in_one_sentence(amp):
    precision = Precision(amp, CPU, attention_backend="cudnn")
    with pytest.raises(InputError, match="--attention_backend cudnn cannot run") as caught:
        precision.check_attention_backend(crossmae_nano(), lambda _: (IMAGES, SPLIT))
    assert amp in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_kernel_that_runs_passes_and_leaves_no_gradients():
    model = crossmae_nano()
    precision = Precision("fp32", CPU, attention_backend="math")
    precision.check_attention_backend(model, lambda _: (IMAGES, SPLIT))
    assert all(parameter.grad is None for parameter in model.parameters())
    with precision.autocast():
        forced = model(IMAGES, SPLIT)
    torch.testing.assert_close(forced, model(IMAGES, SPLIT))


def enabled_backends():
    flags = torch.backends.cuda
    return {
        "flash": flags.flash_sdp_enabled(),
        "efficient": flags.mem_efficient_sdp_enabled(),
        "cudnn": flags.cudnn_sdp_enabled(),
        "math": flags.math_sdp_enabled(),
    }


@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
def test_only_the_forced_kernel_is_allowed(backend):
    before = enabled_backends()
    with Precision("fp32", CPU, attention_backend=backend).autocast():
        assert enabled_backends() == {name: name == backend for name in ATTENTION_BACKENDS}
    assert enabled_backends() == before


def test_cudnn_is_never_pytorchs_choice_in_a_run_on_a_gpu(monkeypatch):
    monkeypatch.setattr(
        "util.runs.run.init_distributed", lambda *_, **options: torch.device("cuda")
    )
    before, matmul = enabled_backends(), torch.get_float32_matmul_precision()
    try:
        with logging_restored():
            start_run(device="cuda", seed=0)
        assert enabled_backends() == before | {"cudnn": False}
        with Precision("bf16", CPU, attention_backend="cudnn").attention_kernel():
            assert enabled_backends()["cudnn"]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before["cudnn"])
        torch.set_float32_matmul_precision(matmul)


@pytest.mark.parametrize("memory", ["medium", "low"])
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_a_forced_kernel_is_also_used_for_recomputation(backend, memory):
    model, precision = crossmae_nano(), Precision("bf16", CPU, attention_backend=backend)
    gradients = []
    for mode in ("high", memory):
        set_memory(model.blocks, model.mixer, mode)
        model.zero_grad()
        with precision.autocast():
            loss = model(IMAGES, SPLIT)
        precision.backward(loss)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(map(torch.equal, *gradients))


def test_a_gpu_tries_a_forced_kernel_with_the_batch_it_will_get(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **options: nullcontext())
    precision, tried = Precision("bf16", torch.device("cuda"), attention_backend="math"), []
    precision.check_attention_backend(
        nn.Linear(4, 1), lambda count: (tried.append(count) or torch.ones(count, 4),), 8
    )
    assert tried == [8]


def test_a_lack_of_memory_is_not_blamed_on_the_kernel():
    def example(_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        Precision("fp32", CPU, attention_backend="math").check_attention_backend(
            nn.Linear(4, 1), example
        )


def test_the_choice_of_pytorch_needs_no_trial():
    def fails(*inputs):
        raise AssertionError("called")

    Precision("fp32", CPU).check_attention_backend(nn.Linear(1, 1), fails)
