"""The released implementation's numbers, from its own weights' names (float64 and float32)."""

import json
import zlib

import numpy as np
import pytest
import torch

from models_crossmae import CrossMAEDecoder, MaskedAutoencoder, ViTEncoder
from models_mae import MAEDecoder
from tests.helpers.processes import ROOT
from util.masking import TokenSplit
from util.weights.released import from_released, released_feature_maps

CASES = json.loads((ROOT / "tests" / "golden" / "golden.json").read_text())
IDS = [f"{case['kind']}-gamma{case['pred_ratio']}" for case in CASES]


def build(config, kind):
    encoder = ViTEncoder(
        img_size=config["img_size"],
        patch_size=config["patch_size"],
        in_chans=3,
        embed_dim=config["embed_dim"],
        depth=config["depth"],
        num_heads=config["num_heads"],
    )
    shape = {
        "embed_dim": config["decoder_embed_dim"],
        "depth": config["decoder_depth"],
        "num_heads": config["decoder_num_heads"],
    }
    if kind == "mae":
        decoder = MAEDecoder(encoder, **shape)
    else:
        decoder = CrossMAEDecoder(
            encoder,
            **shape,
            feature_maps=released_feature_maps(
                config["depth"],
                weight_fm=config["weight_fm"],
                use_input=config["use_input"],
                use_fm=config.get("use_fm"),
            ),
            self_attention=config.get("self_attn", False),
        )
    return MaskedAutoencoder(encoder, decoder, norm_pix_loss=config["norm_pix_loss"])


def released_state(case, model):
    own = {"pos_embed": model.encoder.pos_embed, "decoder_pos_embed": model.decoder.pos_embed}
    state = {}
    for name, shape in case["state"].items():
        if name in own:
            assert list(own[name].shape) == shape
            state[name] = own[name]
            continue
        values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape) * 0.05
        if "norm" in name and name.endswith("weight"):
            values += 1.0
        state[name] = torch.from_numpy(values)
    return state


def inputs(case):
    size = case["config"]["img_size"]
    images = np.random.RandomState(case["seed"]).standard_normal((case["batch"], 3, size, size))
    split = TokenSplit(
        torch.tensor(case["visible_patches"]), torch.tensor(case["predicted_patches"])
    )
    return torch.from_numpy(images), split


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-7), (torch.float32, 1e-4)])
def test_released_weights_give_the_released_numbers(case, dtype, rtol):
    # The position tables are made in float32; the other numbers of a case are float64.
    model = build(case["config"], case["kind"]).to(dtype)
    model.load_state_dict(from_released(released_state(case, model)), strict=True)
    images, split = inputs(case)
    images = images.to(dtype)

    pred = model.predict(images, split).detach()
    loss = model(images, split)
    loss.backward()

    close = {"rtol": rtol, "atol": rtol}
    np.testing.assert_allclose(loss.item(), case["loss"], rtol=rtol)
    np.testing.assert_allclose(pred.mean().item(), case["pred_mean"], **close)
    np.testing.assert_allclose(pred.std().item(), case["pred_std"], **close)
    np.testing.assert_allclose(pred[0, 0, :4], case["pred_first"], **close)
    np.testing.assert_allclose(pred[-1, -1, -4:], case["pred_last"], **close)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, expected in case["grad_norms"].items():
        ours = next(iter(from_released({name: torch.zeros(())})))
        np.testing.assert_allclose(grads[ours].norm().item(), expected, rtol=rtol, err_msg=name)
