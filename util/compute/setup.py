"""Settings and setup of a model's computation: precision, kernels, memory, and placement."""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from util.compute.precision import Precision
from util.compute.recompute import set_memory
from util.compute.sharding import shard
from util.settings.compute import ComputeSettings
from util.settings.optim import OptimSettings


def place_model(
    model: nn.Module,
    compute: ComputeSettings,
    device: torch.device,
    example: Callable[[int], tuple],
    optim: OptimSettings | None = None,
    forward: Callable[..., Tensor] | None = None,
) -> Precision:
    """Move or shard a model to its device, set its memory mode, and build its Precision.

    Args:
        model: has transformer `blocks`, and possibly a `mixer` of feature maps.
        example: number of images -> inputs of the model.
        optim: settings of the training, if any; the attention kernel is tried with its batch size
            unless that is "auto".
        forward: the part of the model that `example` is for; None is all of it.

    Raises:
        InputError: there is only one process to shard over, or the chosen attention kernel cannot
            run the model.
    """
    set_memory(model.blocks, getattr(model, "mixer", None), compute.memory)
    if compute.fsdp:
        shard(model, model.blocks, device)
    else:
        model.to(device)
    precision = Precision(
        compute.amp,
        device,
        clip_grad=optim and optim.clip_grad,
        attention_backend=compute.attention_backend,
    )
    batch_size = 1 if optim is None or optim.batch_size == "auto" else optim.batch_size
    precision.check_attention_backend(model, example, batch_size, forward)
    return precision
