"""Operation counts from PyTorch."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from util.flops import ForwardFlops
from util.masking import random_split

BATCH = 2


def counted(model, counts, *, backward=False):
    """Operations per image as PyTorch counts them: total, encoder and decoder.

    On the meta device, attention always consists of plain matrix products.
    """
    model = model.to("meta")
    images = torch.empty(BATCH, 3, *model.encoder.img_size, device="meta")
    split = random_split(torch.empty(BATCH, counts.patches, device="meta"), counts)
    with FlopCounterMode(display=False) as counter:
        loss = model(images, split)
        if backward:
            loss.backward()
    flops = {name: sum(ops.values()) / BATCH for name, ops in counter.get_flop_counts().items()}
    parts = (flops[f"MaskedAutoencoder.{part}"] for part in ("encoder", "decoder"))
    return flops["Global"], ForwardFlops(*parts)
