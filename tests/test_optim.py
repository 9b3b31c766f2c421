"""The optimizer: which parameters decay, and how it steps."""

import pytest
import torch
from runs import crossmae_nano, mae_nano

from util.optim import build_adamw, set_lr

MODELS = {
    "crossmae": crossmae_nano,
    "crossmae without inter-block attention": lambda: crossmae_nano(feature_maps="last"),
    "crossmae with every option": lambda: crossmae_nano(
        iba_projection=True, iba_softmax=True, decoder_self_attention=True
    ),
    "mae": mae_nano,
    "mae with inter-block attention": lambda: mae_nano(feature_maps="all"),
}


def decay_of(model, weight_decay=0.05):
    """Each trained parameter's weight decay, by name; every one is in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_adamw(model, weight_decay=weight_decay, betas=(0.9, 0.95))
    members = [
        (names[id(p)], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]
    ]
    assert len(members) == len(dict(members))
    return dict(members)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
def test_groups_follow_maes_rule(build):
    model = build()
    maes_rule = {
        name: 0.0 if len(parameter.shape) == 1 or name.endswith(".bias") else 0.05
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert decay_of(model) == maes_rule


def test_tokens_and_mixing_weights_decay_and_position_tables_are_in_no_group():
    decay = decay_of(crossmae_nano())
    for name in ("encoder.cls_token", "decoder.mask_token", "decoder.inter_block_attention.weight"):
        assert decay[name] == 0.05
    for name in ("encoder.blocks.0.norm1.weight", "encoder.patch_embed.proj.bias"):
        assert decay[name] == 0.0
    assert not any("pos_embed" in name for name in decay)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_steps_equal_adamw_written_out(weight_decay):
    betas, eps, rates = (0.9, 0.95), 1e-8, [1e-2, 0.0, 3e-3, 1e-3, 1e-1]
    model = torch.nn.Linear(5, 3).double()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    optimizer = build_adamw(model, weight_decay=weight_decay, betas=betas)
    for step, lr in enumerate(rates, start=1):
        set_lr(optimizer, lr)
        optimizer.zero_grad()
        (model(torch.randn(7, 5).double()) ** 2).mean().backward()
        optimizer.step()
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            first[name] = betas[0] * first[name] + (1 - betas[0]) * grad
            second[name] = betas[1] * second[name] + (1 - betas[1]) * grad**2
            mean, square = (
                first[name] / (1 - betas[0] ** step),
                second[name] / (1 - betas[1] ** step),
            )
            decay = weight_decay if name == "weight" else 0.0
            weights[name] *= 1 - lr * decay
            weights[name] -= lr * mean / (square.sqrt() + eps)
            torch.testing.assert_close(parameter.detach(), weights[name], rtol=1e-12, atol=1e-14)


def test_rate_is_set_in_every_group():
    optimizer = build_adamw(crossmae_nano(), weight_decay=0.05, betas=(0.9, 0.95))
    assert len(optimizer.param_groups) == 2
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}
    set_lr(optimizer, 2e-4)
    assert {group["lr"] for group in optimizer.param_groups} == {2e-4}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}
