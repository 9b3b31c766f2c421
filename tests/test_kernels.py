import copy
import json
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import models
from tests.helpers.files import write_images
from tests.helpers.models import crossmae_nano, use_nano_models
from tests.helpers.runs import TINY, assert_identical, refusal, run
from util import kernels
from util.kernels import (
    fast_forward,
    grid_attention,
    linear,
    linear_combinations,
    scaled_dot_product_attention,
    use_fast_kernels,
    with_bias_dimensions,
)
from util.masking import TokenCounts, random_split

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


def layer(dtype=torch.float32, tokens=(3, 7)):
    """An input (B, N, in), a weight (out, in), a bias (out,) and an output's gradient."""
    x, weight, bias = torch.randn(*tokens, 24), torch.randn(40, 24), torch.randn(40)
    leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    return leaves, torch.randn(*tokens, 40, dtype=dtype)


def output_and_gradients(function, inputs, grad):
    output = function(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, grad)


# Linear layers


def is_fast(module):
    return getattr(module.forward, "func", None) is fast_forward


@pytest.fixture
def by_onednn(monkeypatch):
    monkeypatch.setattr(kernels, "cpu_linear", lambda: "onednn")
    monkeypatch.setattr(kernels, "is_large", lambda *_: True)


@needs_onednn
@pytest.mark.parametrize("tokens", [(3, 7), (5,), (2, 3, 4), (1, 1)])
def test_onednn_gives_the_output_and_gradients_of_a_linear_layer(by_onednn, tokens):
    inputs, grad = layer(tokens=tokens)
    got = output_and_gradients(linear, inputs, grad)
    exact = output_and_gradients(
        F.linear, [t.detach().double().requires_grad_() for t in inputs], grad.double()
    )
    for value, expected in zip(got, exact, strict=True):
        assert value.shape == expected.shape
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_onednn_takes_transposed_inputs_and_gradients(by_onednn):
    inputs, grad = layer()
    views = [inputs[0].detach().mT.contiguous().mT.requires_grad_(), *inputs[1:]]
    got = output_and_gradients(linear, views, grad.mT.contiguous().mT)
    expected = output_and_gradients(F.linear, inputs, grad)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1)])
def test_onednn_takes_frozen_inputs(by_onednn, frozen):
    inputs, grad = layer()
    for i in frozen:
        inputs[i].requires_grad_(False)
    linear(*inputs).backward(grad)
    assert [t.grad is None for t in inputs] == [not t.requires_grad for t in inputs]


@needs_onednn
@pytest.mark.parametrize("requires_grad", [True, False])
def test_the_operation_is_one_that_pytorch_can_trust(requires_grad):
    (x, weight, bias), _ = layer()
    proxy = torch.empty(3, 7, 40, requires_grad=requires_grad)
    torch.library.opcheck(kernels.ONEDNN_LINEAR, (proxy, *map(torch.detach, (x, weight, bias))))


@needs_onednn
def test_layers_become_fast_without_another_name_start_or_result(by_onednn, monkeypatch):
    use_nano_models(monkeypatch)
    torch.manual_seed(0)
    plain = crossmae_nano()
    torch.manual_seed(0)
    fast = models.build_model("crossmae_vit_tiny_patch4", {})
    assert_identical(dict(fast.state_dict()), dict(plain.state_dict()))
    layers = [m for m in fast.modules() if isinstance(m, nn.Linear)]
    assert layers and all(is_fast(m) for m in layers)
    assert repr(fast) == repr(plain)
    images = torch.randn(2, 3, 16, 16)
    split = random_split(torch.rand(2, 16), TokenCounts(16, 4, 4))
    torch.testing.assert_close(fast(images, split), plain(images, split))


def test_layers_stay_pytorchs_where_that_is_the_fastest(monkeypatch):
    monkeypatch.setattr(kernels, "cpu_linear", lambda: "pytorch")
    model = nn.Sequential(nn.Linear(2, 3))
    use_fast_kernels(model)
    assert not is_fast(model[0])


def test_other_kinds_of_layers_stay_as_they_are(by_onednn):
    class OtherLinear(nn.Linear):
        pass

    model = nn.Sequential(OtherLinear(2, 3), nn.Linear(3, 2, bias=False))
    use_fast_kernels(model)
    assert not any(map(is_fast, model))


def test_a_copy_of_a_fast_layer_has_its_own_weights(by_onednn):
    layer = nn.Linear(2, 3)
    use_fast_kernels(layer)
    copied, x = copy.deepcopy(layer), torch.randn(4, 2)
    expected = layer(x)
    nn.init.zeros_(copied.weight)
    assert torch.equal(copied(x), copied.bias.expand(4, 3))
    assert torch.equal(layer(x), expected)


def test_linear_is_pytorchs_elsewhere(monkeypatch):
    def check(kernel, dtype):
        monkeypatch.setattr(kernels, "cpu_linear", lambda: kernel)
        inputs, _ = layer(dtype, tokens=(8, 50))
        assert torch.equal(linear(*inputs), F.linear(*inputs))

    monkeypatch.setattr(kernels, "is_large", lambda *_: True)
    check("pytorch", dtype=torch.float32)
    check("onednn", dtype=torch.float64)
    check("onednn", dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check("onednn", dtype=torch.float32)
    monkeypatch.undo()
    check("onednn", dtype=torch.float32)  # a small layer


@pytest.fixture
def processor(monkeypatch):
    """A function that makes the processor one with these vectors."""
    kernels.cpu_linear.cache_clear()
    monkeypatch.delenv(kernels.CPU_LINEAR, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    yield lambda name: monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)
    kernels.cpu_linear.cache_clear()


@pytest.mark.parametrize(
    ("capability", "kernel"),
    [("AVX512", "onednn"), ("AVX2", "pytorch"), ("DEFAULT", "pytorch"), ("SVE256", "pytorch")],
)
def test_what_a_processor_can_do_decides_not_who_made_it(capability, kernel, processor):
    processor(capability)
    assert kernels.cpu_linear() == kernel


@pytest.mark.parametrize("kernel", kernels.CPU_LINEARS)
@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_the_environment_overrides_the_choice(kernel, capability, processor, monkeypatch):
    processor(capability)
    monkeypatch.setenv(kernels.CPU_LINEAR, kernel)
    assert kernels.cpu_linear() == kernel


def test_a_pytorch_without_onednn_computes_by_itself(processor, monkeypatch):
    processor("AVX512")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert kernels.cpu_linear() == "pytorch"


def test_a_run_says_and_keeps_what_computes_it(processor, tmp_path, monkeypatch, capsys):
    processor("AVX2")
    use_nano_models(monkeypatch)
    images = write_images(tmp_path / "images", 8)
    run("--data_path", images, *TINY, "--device", "cpu", "--output_dir", tmp_path / "run")
    (device,) = re.findall(r" device   (.*)", capsys.readouterr().out)
    assert "CPU (AVX2, " in device and "float32 layers by pytorch" in device
    versions = json.loads((tmp_path / "run" / "args.json").read_text())["versions"]
    assert (versions["cpu_capability"], versions["cpu_linear"]) == ("AVX2", "pytorch")


def test_an_unknown_kernel_is_refused_in_one_sentence(processor, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(kernels.CPU_LINEAR, "mkl")
    sentence = refusal(capsys, "--output_dir", tmp_path / "run")
    assert "CROSSMAE_CPU_LINEAR must be onednn or pytorch, not 'mkl'" in sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.bfloat16)])
def test_maps_cast_before_they_are_stacked_give_the_same_bits(dtypes):
    maps = [torch.randn(2, 5, 8).to(dtype).requires_grad_() for dtype in dtypes]
    weight, grad = torch.randn(4, len(maps)), torch.randn(4, 80, dtype=torch.bfloat16)
    results = []
    for combine in (
        lambda weight, maps: weight @ torch.stack(maps).flatten(1),
        linear_combinations,
    ):
        with torch.autocast("cpu", torch.bfloat16):
            output = combine(weight, maps).flatten(1)
        results.append([output, *torch.autograd.grad(output, maps, grad)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_combinations_keep_the_number_format_without_autocast(dtype):
    weight, *maps = (torch.randn(2, 3, dtype=dtype) for _ in range(4))
    expected = torch.einsum("jk,kbn->jbn", weight, torch.stack(maps))
    got = linear_combinations(weight, maps)
    assert got.dtype is dtype
    torch.testing.assert_close(got, expected)


# Attention


def heads(dtype, queries=49, keys=50, dim=32):
    """Queries (B, h, N, d), keys and values (B, h, M, d), and an output's gradient."""
    q, grad = torch.randn(2, 2, 4, queries, dim).to(dtype)
    k, v = torch.randn(2, 2, 4, keys, dim).to(dtype)
    return [t.requires_grad_() for t in (q, k, v)], grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(49, 50, 32), (50, 50, 64), (1, 3, 16)])
def test_cpu_attention_in_reduced_precision_rounds_no_worse_than_pytorchs_kernel(dtype, shape):
    inputs, grad = heads(dtype, *shape)
    exact = output_and_gradients(
        F.scaled_dot_product_attention,
        [t.detach().double().requires_grad_() for t in inputs],
        grad.double(),
    )
    got = output_and_gradients(scaled_dot_product_attention, inputs, grad)
    pytorchs = output_and_gradients(F.scaled_dot_product_attention, inputs, grad)
    for ours, theirs, expected in zip(got, pytorchs, exact, strict=True):
        assert ours.dtype is dtype
        errors = [(value.double() - expected).norm() for value in (ours, theirs)]
        assert errors[0] < 2 * errors[1] + 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_attention_in_full_precision_is_pytorchs(dtype):
    (q, k, v), _ = heads(dtype)
    assert torch.equal(
        scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
    )


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_a_forced_attention_kernel_is_used(backend):
    (q, k, v), _ = heads(torch.bfloat16)
    with sdpa_kernel(backend):
        got = scaled_dot_product_attention(q, k, v)
        assert torch.equal(got, F.scaled_dot_product_attention(q, k, v))
    assert not torch.equal(scaled_dot_product_attention(q, k, v), got)


# Attention on a grid


@pytest.mark.parametrize("size", [(3, 4), (7, 7), (1, 5)])
def test_a_bias_as_dimensions_of_queries_and_keys_gives_the_same(size):
    rows, columns = size
    q, k, v = (torch.randn(2, 3, rows * columns, 20, dtype=torch.float64) for _ in range(3))
    biases = [torch.randn(2, 3, rows * columns, own, dtype=torch.float64) for own in size]
    expected = grid_attention(q, k, v, *biases)
    wide_q, wide_k, wide_v = with_bias_dimensions(q, k, v, *biases)
    assert wide_q.shape[-1] == wide_v.shape[-1] and wide_q.shape[-1] % 8 == 0  # for FlashAttention
    found = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, scale=1.0)
    torch.testing.assert_close(found[..., :20], expected)
    assert not found[..., 20:].any()
