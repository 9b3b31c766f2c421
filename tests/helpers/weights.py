"""Tiny models and checkpoints of this project, timm, transformers and the released code."""

import argparse

import timm
import torch
import transformers

from models_vit import build_vit, make_probe
from tests.helpers.models import NANO
from util.weights.released import RELEASED_PREFIXES


def parameters(prefix, modules):
    return [f"{prefix}{module}.{kind}" for module in modules for kind in ("weight", "bias")]


ATTENTION = ["attn.qkv", "attn.proj"]
CROSS_ATTENTION = ["cross_attn.q", "cross_attn.kv", "cross_attn.proj"]
REST = ["norm1", "norm2", "mlp.fc1", "mlp.fc2"]
ENCODER = ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed"]
ENCODER += parameters("", ["patch_embed.proj", "decoder_norm", "decoder_pred"])
ENCODER += [name for i in range(12) for name in parameters(f"blocks.{i}.", ATTENTION + REST)]
RELEASED = {
    "crossmae": [
        *ENCODER,
        "wfm.linear.weight",
        *parameters("dec_norms.", range(12)),
        *(
            name
            for j in range(12)
            for name in parameters(f"decoder_blocks.{j}.", CROSS_ATTENTION + REST)
        ),
    ],
    "mae": [
        *ENCODER,
        *parameters("", ["norm", "decoder_embed"]),
        *(name for j in range(8) for name in parameters(f"decoder_blocks.{j}.", ATTENTION + REST)),
    ],
}

HF_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-6,
}


def randomized(model):
    """Set weights unlike any initialization, so that no missing one goes unnoticed."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in name))
    return model.eval()


def vit_nano(*, pool="cls", num_classes=0, **options):
    return randomized(build_vit(NANO, pool=pool, num_classes=num_classes, **options))


def timm_nano(**options):
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 16}
    return randomized(timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}))


def hf_nano(kind, **options):
    config = transformers.ViTMAEConfig if "MAE" in kind else transformers.ViTConfig
    return randomized(getattr(transformers, kind)(config(**{**HF_SIZES, **options})))


def pretrained(model, **options):
    """Return the content of a pre-training checkpoint."""
    name = "mae" if hasattr(model.decoder, "embed") else "crossmae"
    options = {"img_size": list(model.encoder.img_size), "decoder_depth": 2, **options}
    return {
        "format": "crossmae-pretrain",
        "version": 1,
        "model_name": f"{name}_vit_tiny_patch4",
        "model_options": options,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "mask_ratio": 0.75,
        "mask_sampling": "random",
        "model": model.state_dict(),
        "ema": None,
    }


def finetuned(model, *, kind="finetune", ema=None, classes=None):
    """Return the content of a fine-tuning or linear-probing checkpoint."""
    options = {"img_size": list(model.img_size), "num_classes": 3, "pool": model.pool}
    return {
        "format": f"crossmae-{kind}",
        "version": 1,
        "model_name": "vit_tiny_patch4",
        "model_options": options,
        "model": model.state_dict(),
        "ema": ema,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "classes": classes,
    }


def attentive_probe(**options):
    """Return the content of a checkpoint of an attentive probe of 4 queries."""
    options |= {"pool": "attention", "num_queries": 4}
    model = vit_nano(**options)
    make_probe(model, 3)
    content = finetuned(randomized(model), kind="linprobe", classes=["a", "b", "c"])
    content["model_options"] |= options
    return content


def released(model):
    """Return the content of a released pre-training checkpoint."""
    theirs = {ours: name for name, ours in RELEASED_PREFIXES.items()}
    state = {}
    for name, tensor in model.state_dict().items():
        prefix = max(filter(name.startswith, theirs), key=len)
        state[theirs[prefix] + name.removeprefix(prefix)] = tensor
    return {"model": state, "optimizer": {}, "args": argparse.Namespace(norm_pix_loss=True)}


def stored(path, content):
    torch.save(content, path)
    return path


def without(state, *prefixes):
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def images(batch_size=2, height=16, width=16):
    return torch.randn(batch_size, 3, height, width)
