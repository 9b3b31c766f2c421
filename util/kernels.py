"""Matrix products and attention with the fastest kernel that PyTorch has for the device.

docs/performance.md lists each rule and the processors on which it was measured.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.attention import SDPBackend, sdpa_kernel

from util.errors import InputError

CPU_LINEAR = "CROSSMAE_CPU_LINEAR"  # environment variable that overrides the choice
CPU_LINEARS = ("onednn", "pytorch")
ALIGNED = 8  # a GPU multiplies 16-bit matrices with rows of other lengths at a quarter of its speed
SHORT = 64  # tokens


@cache
def cpu_linear() -> str:
    """Library for large float32 linear layers on this CPU, one of CPU_LINEARS.

    oneDNN on any processor with AVX-512: MKL, PyTorch's choice, does not use AVX-512 on some of
    them and then takes twice the time. On processors with AVX2 only, MKL is faster.

    Raises:
        InputError: the environment variable has an unknown value.
    """
    chosen = os.environ.get(CPU_LINEAR)
    if chosen is not None:
        if chosen not in CPU_LINEARS:
            raise InputError(f"{CPU_LINEAR} must be {' or '.join(CPU_LINEARS)}, not {chosen!r}")
        return chosen
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if has_avx512 and torch.backends.mkldnn.is_available() else "pytorch"


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether a linear layer is large enough to be worth oneDNN's overhead of 0.1 ms."""
    rows = x.numel() // x.shape[-1]
    return rows >= 32 and rows * weight.numel() >= 2**23


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear`, x (..., in) with weight (out, in) and bias (out,) -> (..., out).

    On a CPU, the library for large float32 layers depends on the processor, see `cpu_linear`.
    """
    if (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and cpu_linear() == "onednn"
        and is_large(x, weight)
    ):
        try:
            proxy = OneDNNGradients.apply(x, weight, bias)
        except RuntimeError:  # within a transform of torch.func, such as vmap or grad
            return F.linear(x, weight, bias)
        return onednn_linear(proxy, x.detach(), weight.detach(), bias.detach())
    return F.linear(x, weight, bias)


class OneDNNGradients(torch.autograd.Function):
    """Gradients of a linear layer by oneDNN; `onednn_linear` computes the output itself.

    PyTorch's own gradient through `to_mkldnn` would save the output as well. The product is kept
    out of this function because a function's inputs are saved only after it returns: when a block
    is recomputed (`util.compute.recompute`), recomputation stops at the last saved tensor, and the
    block's last product would be computed for nothing.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(..., in), (out, in), (out,) -> a proxy of the output (..., out), an expanded scalar."""
        ctx.save_for_backward(x, weight)
        return x.new_empty(()).expand(*x.shape[:-1], len(bias))

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the three inputs, where needed."""
        x, weight = ctx.saved_tensors
        grad = grad.to_mkldnn()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.mkldnn_linear_backward_input(x.shape, grad, weight).to_dense()
        if any(ctx.needs_input_grad[1:]):
            grads = torch.ops.aten.mkldnn_linear_backward_weights(grad, x.to_mkldnn(), weight, True)
            grad_weight, grad_bias = (g.to_dense() for g in grads)
        return grad_x, grad_weight, grad_bias


@torch.library.custom_op("crossmae::linear", mutates_args=())
def onednn_linear(proxy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer by oneDNN, whose gradient goes only to the proxy.

    Registered as an operation so that the memory policy recognizes it.
    """
    return F.linear(x.to_mkldnn(), weight, bias).to_dense()


onednn_linear.register_fake(lambda proxy, x, weight, bias: x.new_empty(proxy.shape))
onednn_linear.register_autograd(lambda ctx, grad: (grad, None, None, None))
ONEDNN_LINEAR = torch.ops.crossmae.linear.default  # the operation as dispatch modes see it


def use_fast_kernels(model: nn.Module) -> None:
    """Make a model's linear layers use `linear`, unless that is always PyTorch's on this CPU."""
    if cpu_linear() == "pytorch":
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is not None:
            # Set on the object, so that it stays an nn.Linear for whatever looks for these.
            module.forward = partial(fast_forward, module)


def fast_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """Compute a linear layer, (..., in_features) -> (..., out_features), by `linear`."""
    return linear(x, layer.weight, layer.bias)


def linear_combinations(weight: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Combine K tensors of one shape (...) with J rows of weights (J, K) -> (J, ...)."""
    device, shape = tensors[0].device.type, tensors[0].shape
    if device != "meta" and torch.is_autocast_enabled(device):  # which refuses "meta"
        # Autocast would stack in float32 and cast the result: the same bits, but more memory.
        dtype = torch.get_autocast_dtype(device)
        tensors = [t.to(dtype) if t.dtype is torch.float32 else t for t in tensors]
    if device == "cuda" and (missing := -len(tensors) % ALIGNED):
        tensors = [*tensors, *[tensors[0].new_zeros(()).expand(shape)] * missing]
        weight = F.pad(weight, (0, missing))
    # Stacked along the first axis, so that each combination is contiguous.
    return (weight @ torch.stack(tensors).flatten(1)).unflatten(1, shape)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Attention with q (B, h, N, d) and k, v (B, h, M, d) -> (B, h, N, d).

    Unless the caller forces a kernel by `sdpa_kernel`, PyTorch chooses: FlashAttention-2 on a GPU
    (App. A.7). There are two exceptions. With few keys on a GPU, the memory-efficient kernel, whose
    tiles are smaller, takes a third to two thirds of FlashAttention's time. On a CPU in reduced
    precision, PyTorch's flash kernel takes six times as long as plain matrix products.

    Args:
        bias: (1 or B, h, N, M), added to the scores. FlashAttention cannot add one.
    """
    if is_forced():
        return F.scaled_dot_product_attention(q, k, v, bias)
    if q.device.type == "cuda" and k.shape[-2] <= SHORT:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, bias)
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, h, N, M)
        scores = scores if bias is None else scores + bias
        return scores.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, bias)


def grid_attention(q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Attention on a grid of N = rows * columns tokens, with a bias for the key's row and column.

    A GPU in reduced precision gets the bias as further dimensions of queries and keys, in which a
    key is 1 for its row and its column: no (N, N) tensor is made, and FlashAttention can be used.

    Args:
        q, k, v: (B, h, N, d).
        by_row: (B, h, N, rows), added to a query's scores of the keys in each row.
        by_column: (B, h, N, columns).

    Returns:
        (B, h, N, d).
    """
    if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
        q, k, wide_v = with_bias_dimensions(q, k, v, by_row, by_column)
        kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        with nullcontext() if is_forced() else sdpa_kernel(kernels):
            x = F.scaled_dot_product_attention(q, k, wide_v, scale=1.0)
        return x[..., : v.shape[-1]]
    bias = by_row.unsqueeze(-1) + by_column.unsqueeze(-2)  # (B, h, N, rows, columns)
    return scaled_dot_product_attention(q, k, v, bias.flatten(3).to(q.dtype))


def with_bias_dimensions(
    q: Tensor, k: Tensor, v: Tensor, by_row: Tensor, by_column: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled queries and keys whose products contain a bias, and values as wide, with zeros.

    Args:
        q, k, v, by_row, by_column: see `grid_attention`.

    Returns:
        Three of (B, h, N, D), D being d + rows + columns or a little more.
    """
    rows, columns = by_row.shape[-1], by_column.shape[-1]
    one_hot = {"dtype": q.dtype, "device": q.device}
    row = torch.eye(rows, **one_hot).repeat_interleave(columns, dim=0)  # (N, rows)
    column = torch.eye(columns, **one_hot).repeat(rows, 1)  # (N, columns)
    place = torch.cat((row, column), dim=1).expand(*k.shape[:2], -1, -1)
    q = torch.cat((q * q.shape[-1] ** -0.5, by_row.to(q.dtype), by_column.to(q.dtype)), dim=-1)
    k = torch.cat((k, place), dim=-1)
    missing = -q.shape[-1] % ALIGNED
    q, k = (F.pad(x, (0, missing)) for x in (q, k))
    return q, k, F.pad(v, (0, q.shape[-1] - v.shape[-1]))


def full_precision(x: Tensor) -> AbstractContextManager:
    """Context without autocast on a tensor's device, for what needs float32."""
    return torch.autocast(x.device.type, enabled=False)


@torch.compiler.assume_constant_result
def is_forced() -> bool:
    """Whether the caller restricts the attention kernels."""
    backends = torch.backends.cuda  # despite the name, the switches of every device
    return not (backends.flash_sdp_enabled() and backends.math_sdp_enabled())
