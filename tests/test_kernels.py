import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from util import kernels
from util.kernels import attention, linear

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


@pytest.fixture
def on_amd(monkeypatch):
    monkeypatch.setattr(kernels, "is_amd", lambda: True)
    monkeypatch.setattr(kernels, "is_large", lambda *_: True)


@needs_onednn
@pytest.mark.parametrize("tokens", [(3, 7), (5,), (2, 3, 4), (1, 1)])
def test_onednn_gives_the_output_and_gradients_of_a_linear_layer(on_amd, tokens):
    inputs, grad = layer(tokens=tokens)
    got = output_and_gradients(linear, inputs, grad)
    exact = output_and_gradients(
        F.linear, [t.detach().double().requires_grad_() for t in inputs], grad.double()
    )
    for value, expected in zip(got, exact, strict=True):
        assert value.shape == expected.shape
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@needs_onednn
def test_onednn_takes_transposed_inputs_and_gradients(on_amd):
    inputs, grad = layer()
    views = [inputs[0].detach().mT.contiguous().mT.requires_grad_(), *inputs[1:]]
    got = output_and_gradients(linear, views, grad.mT.contiguous().mT)
    expected = output_and_gradients(F.linear, inputs, grad)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1)])
def test_onednn_takes_frozen_inputs(on_amd, frozen):
    inputs, grad = layer()
    for i in frozen:
        inputs[i].requires_grad_(False)
    linear(*inputs).backward(grad)
    assert [t.grad is None for t in inputs] == [not t.requires_grad for t in inputs]


def test_linear_is_pytorchs_elsewhere(monkeypatch):
    def check(amd, dtype):
        monkeypatch.setattr(kernels, "is_amd", lambda: amd)
        inputs, _ = layer(dtype, tokens=(8, 50))
        assert torch.equal(linear(*inputs), F.linear(*inputs))

    monkeypatch.setattr(kernels, "is_large", lambda *_: True)
    check(amd=False, dtype=torch.float32)
    check(amd=True, dtype=torch.float64)
    check(amd=True, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(amd=True, dtype=torch.float32)
    monkeypatch.undo()
    check(amd=True, dtype=torch.float32)  # a small layer


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
    got = output_and_gradients(attention, inputs, grad)
    pytorchs = output_and_gradients(F.scaled_dot_product_attention, inputs, grad)
    for ours, theirs, expected in zip(got, pytorchs, exact, strict=True):
        assert ours.dtype is dtype
        errors = [(value.double() - expected).norm() for value in (ours, theirs)]
        assert errors[0] < 2 * errors[1] + 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_attention_in_full_precision_is_pytorchs(dtype):
    (q, k, v), _ = heads(dtype)
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
def test_a_forced_attention_kernel_is_used(backend):
    (q, k, v), _ = heads(torch.bfloat16)
    with sdpa_kernel(backend):
        got = attention(q, k, v)
        assert torch.equal(got, F.scaled_dot_product_attention(q, k, v))
    assert not torch.equal(attention(q, k, v), got)
