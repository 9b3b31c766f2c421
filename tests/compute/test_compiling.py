"""torch.compile: graphs without breaks, one per shape, in every training mode."""

from functools import partial

import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounterWithBackend

from models_crossmae import build_crossmae
from models_mae import build_mae
from models_vit import build_vit
from tests.helpers.files import write_images
from tests.helpers.models import use_nano_models
from tests.helpers.runs import TINY, run
from tests.helpers.versions import aot_eager
from util.compute.compiling import compile_model
from util.compute.distributed import data_parallel, stop_processes
from util.compute.recompute import set_memory
from util.errors import InputError
from util.masking import count_tokens, random_split
from util.patches import RawImages
from util.settings.compute import MEMORY_MODES
from util.settings.model import ModelSize

CPU = torch.device("cpu")
SMALL = ModelSize(4, 32, 3, 2, img_size=32)
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 3, "decoder_num_heads": 2}
PRETRAINED = {
    "CrossMAE": partial(build_crossmae, SMALL, **DECODER),
    "last map": partial(build_crossmae, SMALL, **DECODER, feature_maps="last"),
    "MAE": partial(build_mae, SMALL, **DECODER),
}


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def masked_loss(model, batch_size):
    pixels = torch.randint(0, 256, (batch_size, 3, 32, 32), dtype=torch.uint8)
    images = RawImages(pixels, mean=torch.rand(3), std=torch.rand(3))
    split = random_split(torch.rand(batch_size, 64), count_tokens(64, 0.75, 0.25))
    return model(images, split)


def classifier_loss(model, batch_size):
    return model(torch.randn(batch_size, 3, 32, 32)).square().mean()


CASES = {
    **{name: (build, masked_loss) for name, build in PRETRAINED.items()},
    "fine-tuning": (
        partial(build_vit, SMALL, num_classes=5, pool="avg", drop_path=0.2),
        classifier_loss,
    ),
}


@pytest.mark.slow  # test_models_crossmae.py compiles the model as it is
@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize(
    ("build", "loss_of"),
    [
        pytest.param(*case, marks=[] if name == "fine-tuning" else aot_eager, id=name)
        for name, case in CASES.items()
    ],
)
def test_a_model_is_one_graph(build, loss_of, memory):
    model = build().train()
    set_memory(model.blocks, getattr(model, "mixer", None), memory)
    backend = CompileCounterWithBackend("aot_eager")
    model.compile(fullgraph=True, dynamic=False, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model, 2).backward()
    assert backend.frame_count == 1
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# Blocks of the encoder and the decoder, which also compute the figure at the end.
@pytest.mark.parametrize(("mode", "num_graphs"), [("whole", 2), ("blocks", 6)])
def test_a_run_compiles_once_for_full_batches_and_once_for_an_epochs_tail(
    mode, num_graphs, tmp_path, monkeypatch
):
    use_nano_models(monkeypatch)
    backend = CompileCounterWithBackend("eager")
    compile_module = nn.Module.compile
    monkeypatch.setattr("util.compute.compiling.check_compiler", lambda device: None)
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **how: compile_module(self, backend=backend, **how)
    )
    images = write_images(tmp_path / "images", 21)  # batches of 8, 8 and 5
    argv = ["--data_path", images, "--val_fraction", 0, *TINY, "--compile", mode]
    run(*argv, "--output_dir", tmp_path / "run")  # two epochs
    assert backend.frame_count == num_graphs


@aot_eager
def test_compiled_processes_recompute_and_average_gradients(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = PRETRAINED["CrossMAE"]()
        set_memory(model.blocks, model.mixer, "low")
        parallel = data_parallel(model, CPU)
        gradients = []
        for _ in range(2):
            torch.manual_seed(1)
            model.zero_grad()
            masked_loss(parallel, 4).backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
            model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    finally:
        stop_processes()
    assert all(map(torch.equal, *gradients))


def test_a_compiler_that_fails_is_refused_in_one_sentence(monkeypatch):
    def broken_compile(function):
        raise OSError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", broken_compile)
    with pytest.raises(InputError, match="--compile does not work") as caught:
        compile_model(nn.Linear(1, 1), "whole", device=CPU)
    assert "\n" not in str(caught.value)


def test_a_model_stays_as_it_is_without_a_mode(monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    compile_model(nn.Linear(1, 1), None, device=CPU)
