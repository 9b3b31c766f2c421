"""What only a GPU can show. `bash scripts/gpu/a.sh` runs these, or:

CUDA_VISIBLE_DEVICES=0 bash scripts/test.sh -m gpu
"""

import gc
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image
from torch.nn.utils import parameters_to_vector

from engine_pretrain import step_noise
from engine_segmentation import segmentation_loss
from models_crossmae import build_crossmae
from models_mae import build_mae
from models_upernet import SegmentationViT
from models_vitdet import DetectionViT
from tests.helpers.files import write_images
from tests.helpers.runs import TINY, log_without_time, run, run_until
from util.compute.batch_size import find_batch_size
from util.compute.compiling import compile_model
from util.compute.precision import Precision
from util.compute.recompute import set_memory
from util.data.batch import Batch, Normalization, Sample, collate
from util.data.transforms import RandomCrops
from util.errors import InputError
from util.kernels import grid_attention
from util.masking import Masking, count_tokens, random_split
from util.optim import build_adamw, set_lr
from util.runs.meters import EpochMeters
from util.settings.compute import ATTENTION_BACKENDS, MEMORY_MODES
from util.settings.model import HEADS, ModelSize
from util.settings.views import ViewSettings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CUDA = torch.device("cuda")
# Heads of 64 in the encoder and 32 in the decoder, 50 visible tokens: ViT-B's, but fewer blocks.
SIZE = ModelSize(16, 768, 2, 12)
COUNTS = count_tokens(196, 0.75, 0.25)
MODELS = {
    "CrossMAE": (partial(build_crossmae, SIZE, decoder_depth=2), COUNTS),
    "MAE": (partial(build_mae, SIZE, decoder_depth=2), count_tokens(196, 0.75, None)),
}
every_model = pytest.mark.parametrize(("build", "counts"), MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def _clean_device():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in a run
    yield
    gc.collect()
    torch.cuda.empty_cache()


def example(counts=COUNTS, batch_size=8, device=CUDA):
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    return images, random_split(torch.rand(batch_size, counts.patches, device=device), counts)


def loss_and_gradients(model, precision, images, split):
    model.zero_grad()
    with precision.autocast():
        loss = model(images, split)
    scale = precision.scaler.get_scale()
    precision.backward(loss)
    gradients = parameters_to_vector([p.grad for p in model.parameters() if p.requires_grad])
    return loss.detach().cpu(), gradients.detach().cpu() / scale


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


@every_model
def test_a_gpu_computes_what_a_cpu_does(build, counts):
    model, inputs = build(), example(counts, device="cpu")
    expected = loss_and_gradients(model, Precision("fp32", torch.device("cpu")), *inputs)
    on_gpu = inputs[0].to(CUDA), type(inputs[1])(*(ids.to(CUDA) for ids in inputs[1]))
    got = loss_and_gradients(model.to(CUDA), Precision("fp32", CUDA), *on_gpu)
    assert relative_error(got[0], expected[0]) < 1e-5
    assert relative_error(got[1], expected[1]) < 1e-4


@pytest.mark.parametrize("head", HEADS)
def test_a_gpu_segments_as_a_cpu_does(head):
    shape = SIZE._replace(depth=4, img_size=64)._asdict()
    upernet = {"head_dim": 32, "dropout": 0.0, "out_indices": (0, 1, 2, 3)}
    options = upernet if head == "upernet" else {}
    model = SegmentationViT(**shape, num_classes=5, head=head, rel_pos_bias=True, **options)
    model.double()  # UperNet's batch norms of two values magnify rounding
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    labels = torch.randint(-1, 5, (2, 64, 64))
    results = []
    for device in (torch.device("cpu"), CUDA):
        model.to(device).zero_grad()
        loss = segmentation_loss(model(images.to(device)), labels.to(device), 0.4)
        loss.backward()
        gradients = parameters_to_vector([p.grad for p in model.parameters()])
        results.append((loss.detach().cpu(), gradients.cpu()))
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < 1e-3


def detector():
    shape = SIZE._replace(depth=4, img_size=64)._asdict()
    sizes = {"input_size": 128, "window_size": 3, "fpn_dim": 32, "box_convs": 1, "roi_batch": 16}
    model = DetectionViT(**shape, num_classes=3, **sizes)
    for name, parameter in model.named_parameters():
        if ".rel_pos_" in name:  # zero at first
            nn.init.normal_(parameter, std=0.1)
    return model


def test_a_gpu_makes_the_pyramid_that_a_cpu_makes(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default
    model, images = detector(), torch.randn(2, 3, 128, 128)
    results = []
    for device in (torch.device("cpu"), CUDA):
        model.to(device).zero_grad()
        maps = model.pyramid(model.feature_map(images.to(device)))
        loss = sum(x.square().mean() for x in maps.values())
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((loss.detach().cpu(), parameters_to_vector(gradients).cpu()))
    for value, expected in zip(*results, strict=True):
        assert relative_error(value, expected) < 1e-3


def test_a_bias_in_further_dimensions_is_the_bias():
    q, k, v = (torch.randn(2, 3, 196, 64, device=CUDA, dtype=torch.bfloat16) for _ in range(3))
    by_row, by_column = (torch.randn(2, 3, 196, 14, device=CUDA).to(q.dtype) for _ in range(2))
    found = grid_attention(q, k, v, by_row, by_column)
    expected = grid_attention(*(x.float() for x in (q, k, v, by_row, by_column)))
    assert relative_error(found.float(), expected) < 1e-2


def test_a_detector_trains_and_detects_on_a_gpu():
    model, precision = detector().to(CUDA), Precision("bf16", CUDA)
    images, sizes = torch.randn(2, 3, 128, 128, device=CUDA), [(128, 128), (100, 128)]
    masks = torch.zeros(1, 128, 128, dtype=torch.uint8)
    masks[:, 20:60, 30:90] = 1
    target = {"boxes": torch.tensor([[30.0, 20, 90, 60]]), "labels": torch.tensor([2])}
    target = {name: value.to(CUDA) for name, value in {**target, "masks": masks}.items()}
    empty = {name: value[:0] for name, value in target.items()}
    with precision.autocast():
        losses = model(images, sizes, [target, empty])
    precision.backward(sum(losses.values()))
    assert all(loss.isfinite() for loss in losses.values())
    trained = {name: p for name, p in model.named_parameters() if name != "cls_token"}
    assert [name for name, p in trained.items() if p.grad is None] == []
    with torch.no_grad(), precision.autocast():
        found = model.eval()(images, sizes)
    assert [len(own["boxes"]) for own in found] == [len(own["masks"]) for own in found]
    assert found[0]["boxes"].dtype is torch.float32


@every_model
@pytest.mark.parametrize("memory", ["medium", "low"])
def test_memory_modes_change_gradients_by_rounding_only(build, counts, memory):
    model, inputs = build().to(CUDA), example(counts)
    precision = Precision("bf16", CUDA)
    expected = loss_and_gradients(model, precision, *inputs)
    set_memory(model.blocks, model.mixer, memory)
    got = loss_and_gradients(model, precision, *inputs)
    assert relative_error(got[0], expected[0]) < 1e-3
    assert relative_error(got[1], expected[1]) < 1e-2


def test_memory_modes_lower_the_peak():
    model, inputs = MODELS["CrossMAE"][0]().to(CUDA), example(batch_size=256)
    precision, peaks = Precision("bf16", CUDA), []
    for memory in MEMORY_MODES:
        set_memory(model.blocks, model.mixer, memory)
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with precision.autocast():
            loss = model(*inputs)
        precision.backward(loss)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] > 1.2 * peaks[1] > 1.2 * peaks[2]


@every_model
@pytest.mark.parametrize("backend", ATTENTION_BACKENDS)
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_an_attention_kernel_agrees_with_the_others_or_is_refused(build, counts, backend, amp):
    model, inputs = build().to(CUDA), example(counts)
    forced = Precision(amp, CUDA, attention_backend=backend)
    try:
        forced.check_attention_backend(model, lambda _: inputs)
    except InputError as error:
        assert backend != "flash", "PyTorch has it for both formats on every GPU we train on"
        assert f"--attention_backend {backend} cannot run this model" in str(error)
        return
    expected = loss_and_gradients(model, Precision(amp, CUDA), *inputs)
    got = loss_and_gradients(model, forced, *inputs)
    assert relative_error(got[0], expected[0]) < 1e-3
    assert relative_error(got[1], expected[1]) < 2e-2


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("amp", ["bf16", "fp16", "fp32"])
def test_the_host_never_waits_for_the_device_within_a_step(amp, memory):
    model = MODELS["CrossMAE"][0]().to(CUDA)
    set_memory(model.blocks, model.mixer, memory)
    optimizer = build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95))
    precision, meters = Precision(amp, CUDA, clip_grad=1.0), EpochMeters(CUDA)
    pixels = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8).pin_memory()
    flips = torch.tensor([True, False] * 4).pin_memory()
    labels = torch.zeros(8, dtype=torch.long).pin_memory()
    batch = Batch(pixels, labels, [], flips, Normalization((0.5,) * 3, (0.5,) * 3))

    masking = Masking((14, 14), COUNTS, "random", seed=0)

    def step(number):
        set_lr(optimizer, 1e-4)
        split = masking.split(step_noise(masking, number, 8, 1, CUDA))
        images = batch.raw(CUDA)
        with precision.autocast():
            loss = model(images, split)
        precision.backward(loss)
        norm = precision.clip(optimizer, model)
        meters.update(loss=loss.detach(), grad_norm=norm, num_images=8, step=number)
        precision.update(optimizer, skip=meters.found_bad)
        optimizer.zero_grad(set_to_none=True)

    for number in range(2):  # the first steps allocate, and fill caches
        step(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 5):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meters.read()["loss"] > 0


def test_batches_copied_beside_the_computing_arrive_whole():
    batches = [
        Batch(
            torch.full((64, 3, 224, 224), number, dtype=torch.uint8).pin_memory(),
            torch.full((64,), number).pin_memory(),
            [],
            torch.tensor([True, False] * 32).pin_memory(),
            Normalization((0.0,) * 3, (1.0,) * 3),
        )
        for number in range(20)
    ]
    found = []
    a = torch.randn(4096, 4096, device=CUDA)
    for batch in batches:  # the device is far behind the host, and memory is used again
        images, labels = batch.to(CUDA)
        a = a @ a / a.norm()
        found.append(((images * 255).mean() + labels.float().mean()) / 2)
    assert torch.stack(found).tolist() == pytest.approx(range(20), abs=1e-3)


def test_compiled_training_agrees_with_eager():
    model, inputs = MODELS["CrossMAE"][0]().to(CUDA), example()
    precision = Precision("bf16", CUDA)
    expected = loss_and_gradients(model, precision, *inputs)
    compile_model(model, "whole", device=CUDA)
    got = loss_and_gradients(model, precision, *inputs)
    assert relative_error(got[0], expected[0]) < 1e-3
    assert relative_error(got[1], expected[1]) < 2e-2


def test_a_stopped_run_continues_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    images = write_images(tmp_path / "images", 37)
    options = ["--data_path", images, *TINY, "--device", "cuda", "--log_every", 1]
    options += ["--save_every_minutes", 0]
    torch.use_deterministic_algorithms(True)
    try:
        run(*options, "--output_dir", tmp_path / "undisturbed")
        run_until(7, monkeypatch, *options, "--output_dir", tmp_path / "stopped")
        run(*options, "--output_dir", tmp_path / "stopped")
    finally:
        torch.use_deterministic_algorithms(False)
    assert log_without_time(tmp_path / "stopped") == log_without_time(tmp_path / "undisturbed")


def test_the_largest_batch_that_fits_is_found():
    model = MODELS["CrossMAE"][0]().to(CUDA)

    def train_on(num_images):
        images, split = example(batch_size=num_images)
        with Precision("bf16", CUDA).autocast():
            loss = model(images, split)
        loss.backward()

    find = partial(find_batch_size, train_on, 4096, model=model, device=CUDA)
    reserved = torch.cuda.memory_reserved()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (reserved + 2 * 2**30) / total))
    try:
        size = find()
        assert 1 < size < 4096
        train_on(size)  # the sizes above ran out of memory, this one does not
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert find() >= size


def test_decoding_on_the_gpu_gives_nearly_the_same_pixels(tmp_path):
    ramp = np.linspace(0, 255, 320)[None, :, None] + np.linspace(0, 60, 240)[:, None, None]
    pixels = (ramp * np.array([1.0, 0.7, 0.4])).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.jpg", quality=95)
    normalization = Normalization((0.0,) * 3, (1.0,) * 3)
    images = []
    for decode in ("cpu", "gpu"):
        transform = RandomCrops(
            (224, 224), normalization, ViewSettings(), num_crops=2, decode=decode
        )
        with (tmp_path / "image.jpg").open("rb") as file:
            record = transform.read(file)
        batch = collate([Sample(transform(record, "test", 0), 0, [])])
        images.append(batch.to(CUDA)[0] * 255)
    assert (images[0] - images[1]).abs().mean() < 2
