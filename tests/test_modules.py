"""Models are modules like any other: for hooks, adapters, torch.func and quantization.

Each holds on every processor, whichever library its linear layers use.
"""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, grad, vmap

import models
from tests.helpers.models import AUTOENCODERS, noisy, use_nano_models
from tests.helpers.weights import randomized
from util import kernels
from util.compute.recompute import set_memory
from util.kernels import use_fast_kernels
from util.masking import TokenCounts, TokenSplit, random_split

NO_LAYER = {"blocks", "projections", "context_norms"}  # lists, whose members are called


@pytest.fixture(params=["onednn", "pytorch"], autouse=True)
def _library(request, monkeypatch):
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    use_nano_models(monkeypatch)
    monkeypatch.setattr(kernels, "cpu_linear", lambda: request.param)
    monkeypatch.setattr(kernels, "is_large", lambda *_: True)


def classifier():
    return randomized(models.build_classifier("tiny_patch4", num_classes=5, pool="avg"))


def autoencoder(name):
    model = noisy(name, torch.float32)
    use_fast_kernels(model)
    set_memory(model.blocks, model.mixer, "high")
    return model


def images(batch_size=3):
    return torch.randn(batch_size, 3, 16, 16)


def some_split(batch_size=3):
    return random_split(torch.rand(batch_size, 16), TokenCounts(16, 4, 5))


def silent(model, *inputs):
    """Names of the modules that no forward hook sees."""
    names = {name for name, _ in model.named_modules() if name.rpartition(".")[2] not in NO_LAYER}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: names.discard(name))
    model(*inputs)
    return names


def test_hooks_see_every_module_of_a_classifier():
    assert not silent(classifier(), images())


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_hooks_see_every_module_of_an_autoencoder(name):
    assert not silent(autoencoder(name), images(), some_split())


class Adapter(nn.Module):
    """A layer with a trained correction of low rank, as in LoRA; at first it changes nothing."""

    def __init__(self, layer, dim):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(dim, 2, bias=False)
        self.up = nn.Linear(2, dim, bias=False)

    def forward(self, x):
        y = self.layer(x)
        return y + F.pad(self.up(self.down(x)), (0, y.shape[-1] - x.shape[-1]))


@pytest.mark.parametrize("part", ["attn.qkv", "mlp", "mlp.fc1", "attn"])
def test_an_adapter_around_a_part_is_all_that_is_trained(part):
    model, x = classifier(), images()
    expected = model(x)
    model.requires_grad_(False)
    for block in model.blocks:
        adapter = Adapter(block.get_submodule(part), model.embed_dim)
        nn.init.zeros_(adapter.up.weight)
        block.set_submodule(part, adapter)
    torch.testing.assert_close(model(x), expected)
    model(x).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {
        f"blocks.{i}.{part}.{name}.weight"
        for i in range(len(model.blocks))
        for name in ("down", "up")
    }
    nn.init.normal_(adapter.up.weight)
    assert not torch.allclose(model(x), expected)


def trained_parameters(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assert_gradients(model, per_image, loss_of):
    """Compare gradients of every image, as torch.func gives them, with those of a loop."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for index in range(3):
        expected = torch.autograd.grad(loss_of(index), list(parameters.values()))
        got = [per_image[name][index] for name in parameters]
        torch.testing.assert_close(got, list(expected), rtol=1e-3, atol=1e-5)


def test_gradients_of_single_images_are_those_of_a_loop():
    model, x, labels = classifier(), images(), torch.tensor([0, 4, 2])

    def loss(parameters, image, label):
        logits = functional_call(model, parameters, (image.unsqueeze(0),))
        return F.cross_entropy(logits, label.unsqueeze(0))

    per_image = vmap(grad(loss), in_dims=(None, 0, 0))(trained_parameters(model), x, labels)
    assert_gradients(
        model, per_image, lambda i: F.cross_entropy(model(x[i : i + 1]), labels[i : i + 1])
    )


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_gradients_of_single_images_with_their_masks_are_those_of_a_loop(name):
    model, x, split = autoencoder(name), images(), some_split()

    def loss(parameters, image, *ids):
        one = TokenSplit(*(own.unsqueeze(0) for own in ids))
        return functional_call(model, parameters, (image.unsqueeze(0), one))

    per_image = vmap(grad(loss), in_dims=(None, 0, 0, 0))(trained_parameters(model), x, *split)
    assert_gradients(
        model,
        per_image,
        lambda i: model(x[i : i + 1], TokenSplit(*(own[i : i + 1] for own in split))),
    )


def test_dynamic_quantization_finds_every_linear_layer():
    quantization = pytest.importorskip("torch.ao.quantization")
    if not set(torch.backends.quantized.supported_engines) - {"none"}:
        pytest.skip("this PyTorch has no kernels for quantized layers")
    model, x = classifier(), images()
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantized = quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    dynamic = torch.ao.nn.quantized.dynamic.Linear
    assert linear == {name for name, m in quantized.named_modules() if isinstance(m, dynamic)}
    expected = model(x)
    assert (quantized(x) - expected).abs().max() < 0.1 * expected.abs().max()
