"""Mixed precision, gradient scaling and clipping, and the attention kernel."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from util.compute.out_of_memory import is_out_of_memory
from util.compute.sharding import full_tensor
from util.errors import InputError
from util.settings.compute import AMP_DTYPES, ATTENTION_BACKENDS


def has_bf16(device: torch.device) -> bool:
    """Whether the device supports bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        if not hasattr(torch.cpu, "get_capabilities"):  # before PyTorch 2.11
            return False
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def blank_images(
    img_size: Sequence[int], device: torch.device, *, in_chans: int = 3
) -> Callable[[int], tuple[Tensor, ...]]:
    """Return the `example` of a classifier for `Precision.check_attention_backend`."""
    return lambda count: (torch.zeros(count, in_chans, *img_size, device=device),)


def blank_pairs(
    img_size: Sequence[int], device: torch.device, *, in_chans: int = 3
) -> Callable[[int], tuple[Tensor, ...]]:
    """Return `blank_images` of at least two images, which batch norm needs."""
    blank = blank_images(img_size, device, in_chans=in_chans)
    return lambda count: blank(max(2, count))


class Precision:
    """Automatic mixed precision, loss scaling, gradient clipping and the attention kernel.

    Args:
        amp: "bf16", "fp16" (with loss scaling) or "fp32"; None: bf16 if the device supports it.
        clip_grad: maximum gradient norm, None for no clipping.
        attention_backend: one of ATTENTION_BACKENDS, or "auto" for PyTorch's choice.
    """

    def __init__(
        self,
        amp: str | None,
        device: torch.device,
        *,
        clip_grad: float | None = None,
        attention_backend: str = "auto",
    ) -> None:
        self.amp = amp or ("bf16" if has_bf16(device) else "fp32")
        self.dtype = getattr(torch, AMP_DTYPES[self.amp])
        self.device = device
        self.clip_grad = clip_grad
        self.attention_backend = attention_backend
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")

    def attention_kernel(self) -> AbstractContextManager:
        """Context in which attention uses the chosen kernel."""
        if self.attention_backend == "auto":
            return nullcontext()
        return sdpa_kernel(getattr(SDPBackend, ATTENTION_BACKENDS[self.attention_backend]))

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Context for a forward pass."""
        autocast = torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32
        )
        with self.attention_kernel(), autocast:
            yield

    def check_attention_backend(
        self,
        model: nn.Module,
        example: Callable[[int], tuple],
        batch_size: int = 1,
        forward: Callable[..., Tensor] | None = None,
    ) -> None:
        """Try the forced attention kernel on a model, forward and backward.

        Args:
            model: returns a tensor, or a list of them.
            example: number of images -> inputs of the model.
            batch_size: images per micro-step in training; a GPU is tried with as many, because
                cuDNN plans each batch size separately.
            forward: the part of the model to try; None is all of it.

        Raises:
            InputError: the kernel cannot run.
        """
        if self.attention_backend == "auto":
            return
        try:
            with self.autocast():
                inputs = example(batch_size if self.device.type == "cuda" else 1)
                output = (forward or model)(*inputs)
            outputs = output if isinstance(output, list) else [output]
            self.backward(sum(tensor.sum() for tensor in outputs))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise InputError(
                f"--attention_backend {self.attention_backend} cannot run this model on "
                f"{self.device.type} in {self.amp}: choose another, or auto"
            ) from error
        model.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate a loss, scaled in fp16."""
        with self.attention_kernel():  # attention may be recomputed, see util.compute.recompute
            self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, model: nn.Module) -> Tensor:
        """Update the parameters; return the gradient norm before clipping, on the device."""
        norm = self.clip(optimizer, model)
        self.update(optimizer)
        return norm

    def clip(self, optimizer: Optimizer, model: nn.Module) -> Tensor:
        """Clip the gradients; return their norm before that, on the device."""
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), self.clip_grad, norm)
        return full_tensor(norm)

    def update(self, optimizer: Optimizer, *, skip: Tensor | None = None) -> None:
        """Update the parameters by the clipped gradients.

        Args:
            skip: () on the device, 1 to leave weights and state as they are, else 0. Only fused
                optimizers on CPUs and GPUs can do that without waiting for the device; the others
                ignore it, as does fp16, whose loss scaling skips steps by itself.
        """
        can_skip = optimizer.defaults.get("fused") and self.device.type in ("cpu", "cuda")
        if skip is None or not can_skip or self.scaler.is_enabled():
            self.scaler.step(optimizer)
        else:
            optimizer.found_inf = skip  # the way in which GradScaler tells fused optimizers
            optimizer.step()
            del optimizer.found_inf
        self.scaler.update()
