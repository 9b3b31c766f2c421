"""The optimizer: which parameters decay, and how it steps."""

import pytest
import torch

from models_vit import build_vit, make_probe
from tests.helpers.models import crossmae_nano, mae_nano
from util.optim import build_adamw, build_lars, build_layer_decay_adamw, set_lr
from util.settings.model import ModelSize

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


# Layers further from the head learn slower

DEPTH = 12  # so that block numbers have one digit or two
LAYER_DECAY = 0.65


def classifier(pool):
    size = ModelSize(4, 8, DEPTH, 2, img_size=8)
    return build_vit(size, num_classes=3, pool=pool)


def maes_layer(name):
    """MAE's number of a layer, counted from the images."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return DEPTH + 1


def maes_scale_and_decay(name, parameter, weight_decay):
    exempt = parameter.ndim == 1 or name in ("cls_token", "pos_embed")
    return LAYER_DECAY ** (DEPTH + 1 - maes_layer(name)), 0.0 if exempt else weight_decay


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_layer_decay_follows_maes_rule(pool):
    model = classifier(pool)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = build_layer_decay_adamw(
        model, weight_decay=0.05, layer_decay=LAYER_DECAY, betas=(0.9, 0.999)
    )
    members = [
        (names[id(parameter)], (group["lr_scale"], group["weight_decay"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(members) == len(dict(members))
    expected = {
        name: (pytest.approx(scale, rel=1e-12), decay)
        for name, parameter in model.named_parameters()
        for scale, decay in [maes_scale_and_decay(name, parameter, 0.05)]
    }
    assert dict(members) == expected


def test_every_layer_takes_its_share_of_the_rate():
    optimizer = build_layer_decay_adamw(
        classifier("avg"), weight_decay=0.05, layer_decay=0.5, betas=(0.9, 0.999)
    )
    for lr in (1e-3, 0.0, 2e-4):  # set anew, not multiplied again
        set_lr(optimizer, lr)
        rates = {group["lr"] for group in optimizer.param_groups}
        assert sorted(rates) == sorted({lr * 0.5**i for i in range(DEPTH + 2)})


def changing_rate(step):
    return 0.1 * (step % 7) / 7


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_steps_with_layer_decay_equal_adamw_written_out(pool):
    betas, eps = (0.9, 0.999), 1e-8
    model = classifier(pool).double()
    optimizer = build_layer_decay_adamw(
        model, weight_decay=0.05, layer_decay=LAYER_DECAY, betas=betas
    )
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(1, 21):
        set_lr(optimizer, changing_rate(step))
        for name, parameter in model.named_parameters():
            grad = parameter.grad = torch.randn_like(parameter)
            scale, decay = maes_scale_and_decay(name, parameter, 0.05)
            lr = scale * changing_rate(step)
            first[name] = betas[0] * first[name] + (1 - betas[0]) * grad
            second[name] = betas[1] * second[name] + (1 - betas[1]) * grad**2
            mean = first[name] / (1 - betas[0] ** step)
            square = second[name] / (1 - betas[1] ** step)
            weights[name] = (1 - lr * decay) * weights[name] - lr * mean / (square.sqrt() + eps)
        optimizer.step()
    got = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(got, weights, rtol=1e-10, atol=1e-12)


# LARS


@pytest.mark.parametrize("foreach", [None, True, False])
def test_steps_of_lars_equal_maes_written_out(foreach):
    matrix, vector, zeros, frozen = (
        torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64))
        for shape in ((5, 3), (5,), (4, 2), (3, 3))
    )
    torch.nn.init.zeros_(zeros)  # has no norm to compare the gradient's with
    frozen.requires_grad_(False)
    parameters = torch.nn.ParameterList((matrix, vector, zeros, frozen))
    optimizer = build_lars(parameters, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["foreach"] = foreach
    trained = (matrix, vector, zeros)
    weights = [parameter.detach().clone() for parameter in trained]
    momenta = [torch.zeros_like(weight) for weight in weights]
    before = frozen.clone()
    for step in range(20):
        lr = 10 * changing_rate(step)
        set_lr(optimizer, lr)
        for parameter, weight, momentum in zip(trained, weights, momenta, strict=True):
            # In some steps there is no gradient: no norm to divide by.
            grad = parameter.grad = torch.randn_like(parameter) * (step % 6 != 0)
            ratio = 1.0
            if weight.ndim > 1 and weight.norm() > 0 and grad.norm() > 0:
                ratio = 0.001 * weight.norm() / grad.norm()
            momentum.mul_(0.9).add_(ratio * grad)
            weight.sub_(lr * momentum)
        optimizer.step()
    for parameter, weight in zip(trained, weights, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=1e-14)
    assert torch.equal(frozen, before)


def test_lars_has_the_parameters_that_are_trained_and_no_other():
    model = classifier("cls")
    make_probe(model, num_classes=3)
    optimizer = build_lars(model, weight_decay=0.0)
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert members == [id(model.head[1].weight), id(model.head[1].bias)]
    set_lr(optimizer, 0.3)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]
