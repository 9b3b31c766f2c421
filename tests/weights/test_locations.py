"""Weights are found at paths and at addresses, and are downloaded once."""

import json
import threading
from contextlib import ExitStack

import huggingface_hub
import pytest
import safetensors.torch
import torch

from models import load_model, load_segmenter
from tests.helpers.models import crossmae_nano
from tests.helpers.runs import assert_identical
from tests.helpers.servers import served
from tests.helpers.weights import pretrained, randomized, stored, vit_nano
from util.errors import InputError
from util.weights.encoder import read_encoder
from util.weights.files import WeightsNotFoundError
from util.weights.locations import local_path

CONFIG = {
    "architecture": "vit_tiny_patch16_224",
    "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3},
}


@pytest.fixture
def caches(monkeypatch, tmp_path):
    """Empty caches of the hub and of torch."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def hub(monkeypatch, caches):
    """Return a function that serves files at the hub's address and returns the requests."""

    def serve(files, **options):
        addresses = {f"/{path}": content for path, content in files.items()}
        address, requests = stack.enter_context(served(addresses, **options))
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return requests

    with ExitStack() as stack:
        yield serve


def not_found(name):
    """Return the sentence that says why weights are not found; it names what the user gave."""
    with pytest.raises(WeightsNotFoundError) as caught:
        read_encoder(name)
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    return message


def repository(name="lab/vit", revision="main", **files):
    """Return a timm repository's files by their paths on the hub."""
    content = {
        "model.safetensors": safetensors.torch.save(vit_nano(num_classes=3).state_dict()),
        "config.json": json.dumps(CONFIG).encode(),
        **files,
    }
    return {f"{name}/resolve/{revision}/{file}": data for file, data in content.items()}


def test_paths_and_local_folders_are_themselves(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("a/b.pth") == local_path("local-dir:a/b.pth")
    for name in ("~/w.pth", "local-dir:~/w.pth", f"local-dir:{tmp_path}/w.pth"):
        assert local_path(name) == tmp_path / "w.pth"
    stored(tmp_path / "w.pth", vit_nano().state_dict())
    assert read_encoder("local-dir:~/w.pth").grid_size == (4, 4)
    assert "nowhere" in not_found(f"{tmp_path}/nowhere.pth")


@pytest.mark.parametrize("scheme", ["hf-hub:", "hf_hub:"])
def test_a_repository_gives_its_weights_and_what_is_beside_them(hub, scheme):
    requests = hub(repository())
    weights = read_encoder(f"{scheme}lab/vit")
    assert (weights.mean, weights.std, weights.num_classes) == ([0.5] * 3, [0.25] * 3, 3)
    downloads = [line for line in requests if line.startswith("GET /lab")]
    read_encoder(f"{scheme}lab/vit@main")
    assert [line for line in requests if line.startswith("GET /lab")] == downloads
    assert len(downloads) == 2


def test_a_revision_is_one(hub):
    hub(repository(revision="v2"))
    assert read_encoder("hf-hub:lab/vit@v2").mean == [0.5] * 3
    assert "lab/vit" in not_found("hf-hub:lab/vit")


def test_a_repository_without_safetensors_gives_its_other_file(hub, tmp_path):
    files = repository()
    files.pop("lab/vit/resolve/main/model.safetensors")
    path = stored(tmp_path / "w.bin", vit_nano().state_dict())
    files["lab/vit/resolve/main/pytorch_model.bin"] = path.read_bytes()
    hub(files)
    assert read_encoder("hf-hub:lab/vit").mean == [0.5] * 3


def test_cached_repositories_need_no_connection(hub, monkeypatch):
    hub(repository())
    online = read_encoder("hf-hub:lab/vit")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = read_encoder("hf-hub:lab/vit")
    assert offline.hash() == online.hash()
    assert offline.mean == online.mean


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "error", "reason"),
    [
        ("hf-hub:lab/vit", (401, "RepoNotFound"), "does not exist, or is private"),
        ("hf-hub:lab/vit", (403, "GatedRepo"), "open only to those who asked"),
        ("hf-hub:lab/vit@v3", (404, "RevisionNotFound"), "a branch, tag or commit"),
        ("hf-hub:lab/vit", (404, "EntryNotFound"), "has no model.safetensors or pytorch_model.bin"),
        ("hf-hub:a b/c/d", None, "Repo id"),
        ("hf-hub:", None, "Repo id"),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(hub, name, error, reason):
    hub({}, errors={"/lab": error} if error else {})
    assert reason in not_found(name)


@pytest.mark.faults
def test_without_a_connection_addresses_are_one_sentence(caches, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "check the address and the connection" in not_found("hf-hub:lab/vit")
    with served({}) as (address, _):
        pass  # nobody listens there anymore
    assert "Connection refused" in not_found(f"{address}/w.pth")
    assert "no host given" in not_found("https://")


def test_files_on_the_web_are_downloaded_once(caches, tmp_path):
    model = vit_nano()
    path = stored(tmp_path / "w.pth", model.state_dict())
    with served({"/a/w.pth": path.read_bytes()}) as (address, requests):
        names = [f"{address}/a/w.pth", f"{address}/a/w.pth", f"{address}/a/w.pth?download=true"]
        for name in names:
            assert_identical(read_encoder(name).encoder, read_encoder(path).encoder)
        assert requests == ["GET /a/w.pth"] * 2  # one for each address


def test_files_of_the_same_name_are_not_confused(caches, tmp_path):
    paths = [stored(tmp_path / f"{i}.pth", vit_nano().state_dict()) for i in range(2)]
    files = {f"/{i}/w.pth": path.read_bytes() for i, path in enumerate(paths)}
    with served(files) as (address, _):
        hashes = [read_encoder(f"{address}/{i}/w.pth").hash() for i in range(2)]
    assert hashes == [read_encoder(path).hash() for path in paths]


def test_only_one_of_several_downloads(caches, tmp_path):
    path = stored(tmp_path / "w.pth", vit_nano().state_dict())
    with served({"/w.pth": path.read_bytes()}) as (address, requests):
        threads = [threading.Thread(target=local_path, args=[f"{address}/w.pth"]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert requests == ["GET /w.pth"]


@pytest.mark.faults
def test_a_broken_download_is_not_taken_for_the_file(caches, tmp_path):
    content = stored(tmp_path / "w.pth", vit_nano().state_dict()).read_bytes()
    with served({"/w.pth": content}, sent=1000) as (address, _):
        assert f"1000 of {len(content)} bytes" in not_found(f"{address}/w.pth")
    assert not list((tmp_path / "torch").rglob("w.pth"))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("error", "reason"), [((404, ""), "does not exist"), ((403, ""), "HTTP Error 403")]
)
def test_refused_files_are_one_sentence(caches, error, reason):
    with served({}, errors={"/": error}) as (address, _):
        assert reason in not_found(f"{address}/w.pth")


def test_whole_models_have_addresses_too(caches, nano, tmp_path):
    model = randomized(crossmae_nano())
    path = stored(tmp_path / "w.pth", pretrained(model))
    with served({"/w.pth": path.read_bytes()}) as (address, _):
        loaded, _ = load_model(f"{address}/w.pth")
        assert torch.equal(loaded.encoder.cls_token, model.encoder.cls_token)
        with pytest.raises(InputError, match="not a segmentation checkpoint"):
            load_segmenter(f"{address}/w.pth")
        with pytest.raises(WeightsNotFoundError, match="does not exist"):
            load_segmenter(f"{address}/other.pth")


@pytest.mark.faults
def test_weights_split_into_several_files_name_the_remedy(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="max_shard_size"):
        read_encoder(tmp_path)
