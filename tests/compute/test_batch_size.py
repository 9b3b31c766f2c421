import pytest
import torch

from main_pretrain import MEMORY_ADVICE
from models_crossmae import MaskedAutoencoder
from tests.helpers.files import write_images
from tests.helpers.models import use_nano_models
from tests.helpers.runs import TINY, log_without_time, refusal, run
from util.compute import batch_size, memory
from util.compute.batch_size import candidates, largest_that_fits, micro_steps
from util.compute.out_of_memory import is_out_of_memory
from util.errors import InputError


@pytest.fixture(params=[1, 4])
def processes(request, monkeypatch):
    monkeypatch.setattr(batch_size, "world_size", lambda: request.param)
    return request.param


def test_micro_batches_times_steps_times_processes_are_the_effective_batch(processes):
    for size in candidates(4096, 1):
        assert size * micro_steps(size, 1, 4096) * processes == 4096
    assert candidates(4096, 1)[-1] * processes == 4096


def test_crops_of_an_image_stay_together(processes):
    assert all(size % 3 == 0 for size in candidates(4 * 3 * 10, 3))
    with pytest.raises(InputError, match="--effective_batch_size 4096 must be a multiple of"):
        candidates(4096, 3)


def test_a_batch_that_cannot_be_reached_is_refused(processes):
    with pytest.raises(InputError, match=rf"--batch_size 100 x {processes} \(processes\)"):
        micro_steps(100, 1, 4096)


@pytest.mark.parametrize("limit", range(1, 65))
def test_bisection_finds_the_largest_size_that_fits(limit):
    sizes, tried = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48], []

    def fits(size):
        tried.append(size)
        return size <= limit

    assert largest_that_fits(sizes, fits) == max(size for size in sizes if size <= limit)
    assert len(tried) <= 5


def test_a_model_that_does_not_fit_with_one_image_is_refused():
    with pytest.raises(InputError, match="not even a batch of 1 fits in"):
        largest_that_fits([1, 2], lambda size: False)


NO_ROOM = {
    "PyTorch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 ..."),
    "CUDA": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasGemmEx(`"),
    "cuBLAS's handle": RuntimeError(
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"
    ),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "NCCL": RuntimeError("NCCL error: unhandled cuda error\nCuda failure 2 'out of memory'"),
    "CPU": RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."
    ),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("error", NO_ROOM.values(), ids=NO_ROOM)
def test_every_out_of_memory_error_is_recognized(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        ValueError("out of memory"),
        RuntimeError("unable to mmap 4096 bytes from file </torch_1>: Cannot allocate memory (12)"),
        MemoryError("Caught MemoryError in DataLoader worker process 0."),
    ],
)
def test_other_errors_are_not_mistaken_for_out_of_memory(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("name", ["PyTorch", "cuBLAS", "cuDNN"])
def test_a_size_for_which_a_library_runs_out_of_memory_does_not_fit(name, monkeypatch):
    for function in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, function, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**40, 2**40))

    def train_on(num_images):
        raise NO_ROOM[name]

    model = torch.nn.Linear(2, 2)
    assert not batch_size.step_fits(train_on, 8, model=model, device=torch.device("cuda"))


# Command line


@pytest.mark.parametrize(
    ("name", "size"),
    [("PyTorch", "(tried to allocate 2.50 GiB)"), ("cuBLAS", "memory: use a lower")],
)
def test_a_batch_that_the_device_cannot_hold_ends_in_advice(
    name, size, options, tmp_path, monkeypatch, capsys
):
    def forward(*_):
        raise NO_ROOM[name]

    monkeypatch.setattr(MaskedAutoencoder, "forward", forward)
    sentence = refusal(capsys, *options, "--output_dir", tmp_path / "run", advice=MEMORY_ADVICE)
    assert sentence.startswith("the device ran out of memory") and size in sentence
    assert "--batch_size, or auto" in sentence and "--memory medium" in sentence


@pytest.fixture
def options(tmp_path, monkeypatch):
    use_nano_models(monkeypatch)
    return ["--data_path", write_images(tmp_path / "images", 24), *TINY, "--epochs", 1]


def test_the_effective_batch_size_sets_the_micro_steps(options, tmp_path):
    run(*options, "--accum_iter", 3, "--output_dir", tmp_path / "a")
    run(*options, "--effective_batch_size", 24, "--output_dir", tmp_path / "b")
    assert log_without_time(tmp_path / "a") == log_without_time(tmp_path / "b")


def test_a_batch_size_is_chosen_on_a_cpu(options, tmp_path, caplog):
    run(*options, "--effective_batch_size", 24, "--output_dir", tmp_path / "a")
    flags = ["--batch_size", "auto", "--effective_batch_size", 24]
    run(*options, *flags, "--output_dir", tmp_path / "b")
    losses = [log_without_time(tmp_path / name)[-1]["loss"] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    arguments = (tmp_path / "b" / "args.json").read_text()
    assert '"batch_size": "auto"' in arguments


def test_a_step_that_cannot_fit_is_refused_before_it_starts(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available_memory", lambda: 2**10)
    sentence = refusal(capsys, *options, "--output_dir", tmp_path / "run")
    assert sentence.startswith("a step of 8 images needs about ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch_size", "auto"], "needs --effective_batch_size"),
        (["--effective_batch_size", 20], "--effective_batch_size 20 must be a multiple"),
        (["--effective_batch_size", 16, "--accum_iter", 2], "give only one of them"),
        (["--batch_size", "many"], "--batch_size"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, flags, sentence, tmp_path, capsys):
    assert sentence in refusal(capsys, *options, *flags, "--output_dir", tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()
