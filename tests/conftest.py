"""What every test starts from: one thread and the same random state, whatever ran before it."""

import os
import signal

from tests.helpers import leftovers

# Before anything that asks for the temporary or the home folder. Parallel workers inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    leftovers.begin()

# Tests compare bits, which holds on a CPU. Name a GPU in this variable to run them on it.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

# JPEGs are decoded as with requirements.txt alone; tests/data/test_jpeg.py tries the others.
os.environ.setdefault("CROSSMAE_JPEG_DECODER", "torchvision")

# A shell starts what it runs in the background with SIGINT ignored, which children inherit. Those
# that tests start must heed Ctrl-C wherever the tests run.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

from tests.helpers.files import write_classes
from tests.helpers.models import use_nano_models
from tests.helpers.processes import end_processes
from tests.helpers.runs import TINY, run
from util.runs.checkpoint import list_checkpoints


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed") and not terminalreporter.config.option.basetemp:
        terminalreporter.line("--basetemp FOLDER keeps the temporary folders of failed tests")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_left():
    """End what a test started and, failing, did not wait for."""
    yield
    end_processes()


@pytest.fixture
def offline(monkeypatch):
    """No test waits for the network; the environment variable would come too late."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def nano(monkeypatch):
    """Tiny models under the names that the command lines of tests use."""
    use_nano_models(monkeypatch)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Class folders of 37 training images, in five steps of 8 an epoch, and 12 validation images.

    Tests change copies of it only.
    """
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def weights(images, tmp_path_factory):
    """Pre-training checkpoints by method, with a mean of their own; only MAE's has a final norm."""
    paths = {}
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        for method in ("crossmae", "mae"):
            folder = tmp_path_factory.mktemp(method)
            argv = [*TINY, "--model", f"{method}_vit_tiny_patch4", "--data_path", images]
            argv += ["--epochs", 1, "--lr", 1e-2, "--mean", 0.4, 0.5, 0.6]
            run(*argv, "--output_dir", folder)
            paths[method] = list_checkpoints(folder)[-1]
    return paths


@pytest.fixture(scope="session")
def pretrained(weights):
    """CrossMAE's of `weights`."""
    return weights["crossmae"]
