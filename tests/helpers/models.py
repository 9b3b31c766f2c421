"""Tiny models whose training steps take milliseconds."""

from functools import partial

import torch

import models
from models_crossmae import build_crossmae
from models_mae import build_mae
from util.settings import model as model_settings
from util.settings.model import ModelSize

NANO = ModelSize(4, 32, 2, 2, img_size=16)
NANO_DECODER = {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}
crossmae_nano = partial(build_crossmae, NANO, **NANO_DECODER)
mae_nano = partial(build_mae, NANO, **NANO_DECODER)
AUTOENCODERS = {
    "crossmae": crossmae_nano,
    "last": partial(crossmae_nano, feature_maps="last"),
    "softmax": partial(crossmae_nano, iba_softmax=True),
    "projection": partial(crossmae_nano, iba_projection=True),
    "self_attention": partial(crossmae_nano, decoder_self_attention=True),
    "mae": mae_nano,
    "mae_mix": partial(mae_nano, feature_maps="all"),
}


@torch.no_grad()
def noisy(name, dtype=torch.float64, **options):
    """A model of AUTOENCODERS with noise on every norm, bias and weight."""
    model = AUTOENCODERS[name](**options).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def use_nano_models(monkeypatch):
    """Replace the tiny models by even smaller ones under the same names."""
    monkeypatch.setitem(models.MODELS, "crossmae_vit_tiny_patch4", crossmae_nano)
    monkeypatch.setitem(models.MODELS, "mae_vit_tiny_patch4", mae_nano)
    monkeypatch.setitem(model_settings.SIZES, "tiny_patch4", NANO)
