"""What the pre-training of a setting costs, by counting."""

import argparse
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from util.arguments import take
from util.masking import Masking
from util.settings.masking import MaskSettings
from util.settings.model import ModelSettings


def training_flops(args: argparse.Namespace) -> float:
    """FLOPs of the matrix products of one training image, forward and backward.

    Args:
        args: of main_pretrain.py.
    """
    network, masks = take(ModelSettings, args), take(MaskSettings, args)
    with torch.device("meta"):
        model = build_model(network.model, network.options(args.input_size)).to("meta")
    grid_size = model.encoder.grid_size
    masking = Masking.of(masks, grid_size, seed=0, all_masked=network.is_mae)
    split = masking.split(torch.empty(1, math.prod(grid_size), device="meta"))
    images = torch.zeros(1, 3, *model.encoder.img_size, device="meta")
    # On the meta device, attention always consists of plain matrix products.
    with FlopCounterMode(display=False) as counter:
        model(images, split).backward()
    return counter.get_total_flops()
