"""The comparison with other libraries' MAE: what is run when, and what the results say."""

import json

import pytest

from scripts import run_peers
from scripts.peers.recording import EpochRecorder, parse_peer_args
from tests.helpers.files import write_classes
from tests.helpers.processes import command, finish, start
from tests.helpers.runs import refusal, run
from util.errors import InputError
from util.runs.epoch_log import read_log

SECONDS = {name: 10.0 + number for number, name in enumerate(run_peers.CONTENDERS)}


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(1, [1]), (3, [1, 2, 3]), (7, [2, 4, 7]), (11, [3, 6, 9, 11]), (22, [6, 12, 18, 22])],
)
def test_runs_are_measured_at_about_every_quarter_and_the_end(epochs, expected):
    assert run_peers.stages(epochs) == expected


@pytest.fixture
def done(monkeypatch):
    """The commands in the order in which they would run; each leaves what the real one would."""
    order = []

    def pretend(jobs, *_, **__):
        for job in (job for job in jobs if not job.is_done):
            order.append(job)
            assert job.is_ready, job
            job.folder.mkdir(parents=True, exist_ok=True)
            if job.program == "main_knn.py":
                found = {run_peers.NEIGHBORS: 40.0, run_peers.REGRESSION: 50.0}
                job.result.write_text(json.dumps({"results": {"pre-trained": found}}))
                continue
            epochs = int(job.flags[job.flags.index("--epochs") + 1])
            each = int(job.flags[job.flags.index("--save_every") + 1])
            name = job.setting
            with (job.folder / "log.jsonl").open("w") as file:
                for epoch in range(1, epochs + 1):
                    line = {"epoch": epoch, "step": epoch, "loss": 1 / epoch}
                    file.write(json.dumps({**line, "seconds": epoch * SECONDS[name]}) + "\n")
            for epoch in {*range(each, epochs, each), epochs}:
                run_peers.encoder_of(name, job.folder, epoch).touch()

    monkeypatch.setattr(run_peers, "run_jobs", pretend)
    return order


def test_every_contender_gets_the_epochs_that_fit_into_the_minutes(tmp_path, done):
    images, output = write_classes(tmp_path / "images"), tmp_path / "out"
    argv = ["--data_path", images, "--minutes", 2, "--seeds", 2, "--output_dir", output]
    run(*argv, main=run_peers.main)
    number = len(run_peers.CONTENDERS)
    steps = [job.step for job in done]
    assert steps[:number] == ["timing"] * number
    assert set(steps[number : 3 * number - 2]) == {"pretrain"}  # two contenders have one seed
    assert all(step.startswith("features-e") for step in steps[3 * number - 2 :])
    content = json.loads((output / "peers.json").read_text())["runs"]
    for name, own in content.items():
        assert [found["seed"] for found in own] == ([0] if name.endswith("_ours") else [0, 1])
        for found in own:
            assert found["epochs"] == int(120 / SECONDS[name])
            assert found["seconds"] == found["epochs"] * SECONDS[name] <= 120
            assert found["images_per_second"] == pytest.approx(37 / SECONDS[name])
            assert found["curve"][-1]["seconds"] == found["seconds"]
            assert len(found["curve"]) in (3, 4)
            log = output / found["log"]
            assert log.read_text() == (output / log.stem / "pretrain" / "log.jsonl").read_text()
    assert "| lightly | 2 | 8 |" in (output / "peers.md").read_text()
    assert (output / "peers.png").exists()

    done.clear()
    run(*argv, main=run_peers.main)
    assert done == []


def test_images_without_a_split_are_refused(tmp_path, capsys):
    argv = ["--data_path", tmp_path, "--output_dir", tmp_path / "out"]
    assert "has no folder train" in refusal(capsys, *argv, main=run_peers.main)


def test_a_peer_that_starts_again_keeps_its_earlier_log(tmp_path):
    for loss in (2.0, 1.0):
        recorder = EpochRecorder(tmp_path / "run", epochs=2, save_every=2)
        recorder.start()
        assert recorder.end_epoch(step=1, loss=loss, num_images=8) is None
    assert [line["loss"] for line in read_log(tmp_path / "run")] == [1.0]
    assert len(list((tmp_path / "run").glob("log-*.jsonl"))) == 1
    assert recorder.end_epoch(step=2, loss=loss, num_images=8).name == "encoder-e0002"


def test_a_peer_needs_training_images(tmp_path):
    argv = ["--data_path", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--epochs", "1"]
    with pytest.raises(InputError, match="has no folder train: correct --data_path"):
        parse_peer_args(argv, "a peer", batch_size=8, num_workers=0, lr="1")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformers", "lightly"])
def test_k_nn_reads_what_a_peer_has_trained(tmp_path, name):
    """With scripts/peers/requirements.txt only."""
    for module in {"transformers": ("datasets", "accelerate"), "lightly": ("lightly",)}[name]:
        pytest.importorskip(module)
    images, folder = write_classes(tmp_path / "images"), tmp_path / "out" / "run"
    _, program, flags, _ = run_peers.CONTENDERS[name]
    argv = [*flags.split(), "--epochs", 2, "--batch_size", 8, "--data_path", images]
    code, _, err = finish(start(command(program, *argv, "--output_dir", folder)))
    assert code == 0, err
    lines = read_log(folder)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[1]["loss"] < lines[0]["loss"]
    argv = ["--checkpoint", run_peers.encoder_of(name, folder, 2), "--data_path", images]
    argv += ["--k", 3, "--output_dir", tmp_path / "knn"]
    code, _, err = finish(start(command("main_knn.py", *argv)))
    assert code == 0, err
