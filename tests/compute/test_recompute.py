"""Recomputation: the same results with far less memory."""

import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_model
from models_crossmae import build_crossmae
from models_mae import build_mae
from models_vit import build_vit
from tests.helpers.files import write_images
from tests.helpers.models import use_nano_models
from tests.helpers.runs import TINY, log_without_time, run
from tests.helpers.versions import aot_eager
from util import kernels
from util.compute import recompute
from util.compute.memory import saved_bytes
from util.kernels import use_fast_kernels
from util.masking import count_tokens, random_split
from util.settings.compute import MEMORY_MODES
from util.settings.model import ModelSize

SMALL = ModelSize(4, 32, 3, 2, img_size=32)
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
MODELS = {
    "CrossMAE": partial(build_crossmae, SMALL, **DECODER),
    "last map": partial(build_crossmae, SMALL, **DECODER, feature_maps="last"),
    "projection": partial(build_crossmae, SMALL, **DECODER, iba_projection=True),
    "self-attention": partial(build_crossmae, SMALL, **DECODER, decoder_self_attention=True),
    "MAE": partial(build_mae, SMALL, **DECODER),
    "MAE, all maps": partial(build_mae, SMALL, **DECODER, feature_maps="all"),
}
DTYPES = [torch.float32, torch.bfloat16]
# MiB per image that the released code saves with ViT-B and pred_ratio 0.25 in bfloat16, without
# weights: the growth from 8 to 16 images, the same as from 16 to 24 (docs/performance.md).
RELEASED_MIB = 30.41

less_memory = pytest.mark.parametrize("memory", ["medium", "low"])
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)


def set_memory(model, memory):
    recompute.set_memory(model.blocks, getattr(model, "mixer", None), memory)


def example(model, batch_size, pred_ratio=0.25):
    images = torch.randn(batch_size, 3, *model.encoder.img_size)
    counts = count_tokens(model.encoder.num_patches, 0.75, pred_ratio)
    return images, random_split(torch.rand(batch_size, counts.patches), counts)


def loss_and_gradients(model, dtype, *inputs):
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        loss = model(*inputs)
    loss.backward()
    return loss.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad
    }


def assert_equal(got, expected):
    assert torch.equal(got[0], expected[0])
    assert [n for n, gradient in got[1].items() if not torch.equal(gradient, expected[1][n])] == []


def kept_bytes(model, *inputs, dtype=torch.bfloat16):
    def forward():
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            return model(*inputs)

    return saved_bytes(forward, model.parameters())


@less_memory
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [8, 16])
@every_model
def test_loss_and_every_gradient_are_the_same_to_the_bit(build, batch_size, dtype, memory):
    model = build()
    inputs = example(model, batch_size)
    expected = loss_and_gradients(model, dtype, *inputs)
    set_memory(model, memory)
    assert_equal(loss_and_gradients(model, dtype, *inputs), expected)
    set_memory(model, "high")
    assert_equal(loss_and_gradients(model, dtype, *inputs), expected)


@pytest.fixture
def by_onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(kernels, "cpu_linear", lambda: "onednn")
    monkeypatch.setattr(kernels, "is_large", lambda *_: True)


def calls(operation, model, *inputs):
    """Count how often a step computes an operation."""
    counted = []

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counted.append(func is operation)
            return func(*args, **(kwargs or {}))

    with Counter():
        model(*inputs).backward()
    return sum(counted)


products = partial(calls, kernels.ONEDNN_LINEAR)


@every_model
def test_layers_by_onednn_are_kept_like_pytorchs(build, by_onednn):
    model = build()
    use_fast_kernels(model)
    inputs = example(model, 8)
    expected = loss_and_gradients(model, torch.float32, *inputs)
    layers = products(model, *inputs)
    kept = [kept_bytes(model, *inputs, dtype=torch.float32)]
    for memory, again in (("medium", 0), ("low", len(model.blocks))):
        set_memory(model, memory)
        assert_equal(loss_and_gradients(model, torch.float32, *inputs), expected)
        assert products(model, *inputs) == layers + again
        kept.append(kept_bytes(model, *inputs, dtype=torch.float32))
    assert kept[0] > 1.4 * kept[1] > 1.4 * 1.2 * kept[2]


def test_an_attention_kernel_whose_output_is_kept_computes_once():
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    model = MODELS["CrossMAE"]()
    inputs = example(model, 8)
    expected = loss_and_gradients(model, torch.float32, *inputs)
    counts = []
    for memory, attention in (("high", [kernel]), ("medium", [kernel]), ("medium", [])):
        recompute.set_memory(model.blocks, model.mixer, memory, attention=attention)
        assert_equal(loss_and_gradients(model, torch.float32, *inputs), expected)
        counts.append(calls(kernel, model, *inputs))
    assert counts == [len(model.blocks)] * 2 + [2 * len(model.blocks)]


@less_memory
def test_drop_path_draws_the_same_branches(memory):
    model = build_vit(SMALL, num_classes=5, pool="avg", drop_path=0.5).train()
    images = torch.randn(4, 3, 32, 32)
    gradients = []
    for mode in ("high", memory):
        set_memory(model, mode)
        torch.manual_seed(1)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append(parameters_to_vector(p.grad for p in model.parameters()))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_medium_does_not_recompute_products(drop_path, by_onednn):
    model = build_vit(SMALL, num_classes=5, pool="avg", drop_path=drop_path).train()
    use_fast_kernels(model.blocks)

    def count(memory):
        set_memory(model, memory)
        loss = nn.Sequential(model, nn.Flatten(0)).forward
        return products(lambda images: loss(images).sum(), torch.randn(4, 3, 32, 32))

    high, medium, low = map(count, MEMORY_MODES)
    assert high == medium == 4 * SMALL.depth
    assert low == high + SMALL.depth


@pytest.mark.parametrize(("memory", "share"), [("high", 1.02), ("medium", 0.53), ("low", 0.34)])
def test_an_image_keeps_a_fraction_of_the_released_codes_bytes(memory, share):
    model = build_model("crossmae_vit_base_patch16", {})
    set_memory(model, memory)
    two, four = (kept_bytes(model, *example(model, batch_size)) for batch_size in (2, 4))
    assert (four - two) / 2 / 2**20 <= share * RELEASED_MIB


@less_memory
def test_weights_are_not_kept_in_a_second_precision(memory):
    model = MODELS["CrossMAE"]()
    weights = sum(2 * p.numel() for p in model.parameters())  # bytes in bfloat16
    inputs = example(model, 1)
    kept = []
    for mode in ("high", memory):
        set_memory(model, mode)
        kept.append(kept_bytes(model, *inputs))
    assert kept[0] - kept[1] > 0.8 * weights


def test_nothing_is_recomputed_without_a_backward_pass(monkeypatch):
    model = MODELS["CrossMAE"]()
    set_memory(model, "low")
    monkeypatch.setattr(recompute, "checkpoint", None)
    with torch.no_grad():
        model(*example(model, 2))


@aot_eager
@less_memory
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_still_compiles_to_one_graph(dtype, memory):
    model = MODELS["CrossMAE"]()
    set_memory(model, memory)
    inputs = example(model, 2)
    expected = loss_and_gradients(model, dtype, *inputs)
    torch.compiler.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    got = loss_and_gradients(model, dtype, *inputs)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@less_memory
def test_a_copy_computes_with_its_own_weights(memory):
    model = MODELS["CrossMAE"]()
    inputs = example(model, 2)
    set_memory(model, memory)
    expected = loss_and_gradients(model, torch.float32, *inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_equal(loss_and_gradients(twin, torch.float32, *inputs), expected)
    assert loss_and_gradients(model, torch.float32, *inputs)[0] != expected[0]


@less_memory
def test_names_and_modules_stay_as_they_are(memory):
    model = MODELS["CrossMAE"]()
    before = [(n, type(m)) for n, m in model.named_modules()], list(model.state_dict())
    set_memory(model, memory)
    assert ([(n, type(m)) for n, m in model.named_modules()], list(model.state_dict())) == before


def test_hooks_and_parts_put_in_later_are_used():
    model = MODELS["CrossMAE"]()
    inputs = example(model, 2)
    set_memory(model, "low")
    block, calls = model.encoder.blocks[0], []
    block.mlp = nn.Linear(32, 32)
    block.mlp.register_forward_hook(lambda *_: calls.append("mlp"))
    block.register_forward_hook(lambda *_: calls.append("block"))
    got = loss_and_gradients(model, torch.float32, *inputs)
    assert calls[:2] == ["mlp", "block"]
    set_memory(model, "high")
    assert_equal(got, loss_and_gradients(model, torch.float32, *inputs))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="memory must be one of"):
        set_memory(MODELS["CrossMAE"](), "lowest")


@less_memory
def test_a_whole_run_is_the_same_to_the_bit(memory, tmp_path, monkeypatch):
    use_nano_models(monkeypatch)
    options = ["--data_path", write_images(tmp_path / "images", 24), *TINY]
    for mode in ("high", memory):
        run(*options, "--memory", mode, "--output_dir", tmp_path / mode)
    assert log_without_time(tmp_path / "high") == log_without_time(tmp_path / memory)
