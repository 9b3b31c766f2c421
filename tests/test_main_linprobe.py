"""Linear probing from the command line: what is frozen, trained, measured and refused."""

import re

import pytest
import torch
import torch.nn.functional as F

import main_finetune
import main_linprobe
from main_linprobe import parse_args
from models_vit import build_vit, make_probe
from tests.helpers import runs
from tests.helpers.files import copied, files_in, write_images
from tests.helpers.models import NANO, use_nano_models
from tests.helpers.processes import NANO_MAIN, command, finish, start
from tests.helpers.runs import (
    EACH_STEP,
    QUICK,
    assert_identical,
    refusal,
    run,
    run_until,
    state_of,
)
from util.data.batch import collate
from util.data.datasets import build_dataset
from util.data.transforms import eval_transform
from util.runs.checkpoint import list_checkpoints
from util.runs.epoch_log import read_log
from util.weights.encoder import read_encoder

HEAD = [f"head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]
HEAD += ["head.1.weight", "head.1.bias"]


@pytest.fixture(scope="module")
def finished(images, weights, tmp_path_factory):
    """The output folder of a finished probe of two epochs, and its arguments."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        argv = [*QUICK, "--finetune", weights["crossmae"], "--data_path", images]
        run(*argv, "--output_dir", folder, main=main_linprobe.main)
    return folder, argv


def probe(*argv):
    run(*argv, main=main_linprobe.main)


pytestmark = pytest.mark.usefixtures("nano")


def last_checkpoint(folder):
    return runs.last_checkpoint(folder, "linprobe")


def refused(capsys, *argv):
    return refusal(capsys, *argv, main=main_linprobe.main)


# What is frozen, and what is classified


@pytest.mark.parametrize("kind", ["crossmae", "mae"])
@pytest.mark.parametrize("pool", ["cls", "avg", None])
def test_the_backbone_stays_bit_for_bit_that_of_the_file(
    tmp_path, images, weights, capsys, kind, pool
):
    argv = [*QUICK, "--finetune", weights[kind], "--data_path", images, "--lr", 10]
    argv += ["--weight_decay", 0.1, *(["--pool", pool] if pool else [])]
    probe(*argv, "--output_dir", tmp_path)
    out = capsys.readouterr().out
    checkpoint, content = last_checkpoint(tmp_path), read_encoder(weights[kind])
    model = checkpoint["model"]
    assert_identical({name: model[name] for name in content.encoder}, content.encoder)

    norm = "fc_norm" if pool == "avg" else "norm"
    assert set(model) - set(content.encoder) == {f"{norm}.weight", f"{norm}.bias", *HEAD}
    if kind == "mae" and norm == "norm":
        assert_identical({name: model[name] for name in content.head_state}, content.head_state)
        assert not torch.equal(model["norm.bias"], torch.zeros(32))  # pre-training moved it
        assert "new for this task: head.weight, head.bias" in out
    else:
        assert torch.equal(model[f"{norm}.weight"], torch.ones(32))
        assert torch.equal(model[f"{norm}.bias"], torch.zeros(32))
        assert f"new for this task: {norm}.weight, {norm}.bias, head.weight, head.bias" in out
    assert ("not needed here: norm.weight, norm.bias" in out) == (kind == "mae" and pool == "avg")
    assert model["head.1.bias"].abs().min() > 0
    assert model["head.0.num_batches_tracked"] == 10
    # Matrix and bias of the head have a momentum, and nothing else.
    assert len(checkpoint["optimizer"]["state"]) == 2

    assert checkpoint["model_options"]["pool"] == (pool or "cls")
    assert f", pool {pool or 'cls'}, " in out
    assert f"linear probe, pool {pool or 'cls'}, last epoch (2): top-1" in out


@pytest.mark.parametrize("options", [["--num_queries", 4], ["--num_queries", 4, "--layer", 1]])
def test_an_attentive_probe_leaves_the_backbone_bit_for_bit(
    tmp_path, images, weights, capsys, options
):
    argv = [*QUICK, "--finetune", weights["mae"], "--data_path", images, "--lr", 10]
    probe(*argv, "--probe", "attentive", *options, "--output_dir", tmp_path / "probe")
    checkpoint, content = last_checkpoint(tmp_path / "probe"), read_encoder(weights["mae"])
    model = checkpoint["model"]
    frozen = content.encoder | content.head_state  # with the final norm
    assert_identical({name: model[name] for name in frozen}, frozen)
    pooling = ["attn_pool.queries", "attn_pool.value.weight", "attn_pool.value.bias"]
    assert set(model) - set(frozen) == {*pooling, *HEAD}
    assert len(checkpoint["optimizer"]["state"]) == 5
    assert model["attn_pool.queries"].shape == (4, 32)
    assert "attentive probe, pool attention, last epoch (2): top-1" in capsys.readouterr().out

    # Other programs read it as it is.
    last = list_checkpoints(tmp_path / "probe")[-1]
    argv = ["--eval", "--finetune", last, "--data_path", images, *QUICK[4:]]
    run(*argv, main=main_finetune.main)
    line = read_log(tmp_path / "probe")[-1]
    found = f"top-1 {line['val_top1']:.2f}%, top-5 100.00%, balanced [0-9.]+%, loss (.*) over"
    loss = re.search(found, capsys.readouterr().out)[1]
    assert float(loss) == pytest.approx(line["val_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--probe", "attentive", "--pool", "avg"], "leave --pool out"),
        (["--num_queries", 4], "--num_queries is for --probe attentive"),
        (["--probe", "attentive", "--num_queries", 5], "not divisible by 5 queries"),
        (["--layer", 3], "layers are numbered from 0, the input, to 2, not 3"),
        (["--layer", 0, 2], "the class token of layer 0 is the same for all images"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_probe_that_cannot_be_is_refused(tmp_path, images, weights, capsys, options, reason):
    argv = ["--finetune", weights["mae"], "--data_path", images, "--output_dir", tmp_path / "new"]
    assert reason in refused(capsys, *QUICK, *argv, *options)
    assert not (tmp_path / "new").exists()


def test_the_checkpoint_measures_as_logged(finished, images):
    checkpoint, line = last_checkpoint(finished[0]), read_log(finished[0])[-1]
    options = checkpoint["model_options"]
    model = build_vit(NANO, **options)
    make_probe(model, options["num_classes"])
    model.load_state_dict(checkpoint["model"])
    size = tuple(options["img_size"])
    transform = eval_transform(size, checkpoint["mean"], checkpoint["std"], 224 / 256)
    samples = build_dataset("folder", images, split="validation", transform=transform, seed=0)
    batch = collate([samples[0, i] for i in range(len(samples))])
    pixels, labels = batch.to(torch.device("cpu"))
    logits = model.eval()(pixels)
    assert F.cross_entropy(logits, labels).item() == pytest.approx(line["val_loss"], rel=1e-5)
    top1 = (logits.argmax(dim=1) == labels).double().mean().item()
    assert 100 * top1 == pytest.approx(line["val_top1"])


def test_defaults_are_maes():
    args = parse_args([])
    assert (args.epochs, args.blr, args.weight_decay, args.min_lr) == (90, 0.1, 0.0, 0.0)
    assert (args.pool, args.warmup_epochs, args.clip_grad) == (None, None, None)


@pytest.mark.parametrize(
    ("options", "epochs", "lr", "warmup_epochs"),
    [
        ([], 90, 0.1 / 32, 10),
        (["--accum_iter", "2"], 90, 0.1 / 16, 10),
        (["--epochs", "9", "--blr", "1"], 9, 1 / 32, 1),
        (["--epochs", "9", "--lr", "1", "--warmup_epochs", "0"], 9, 1, 0),
    ],
)
def test_a_probe_says_its_recipe(
    tmp_path, images, weights, capsys, monkeypatch, options, epochs, lr, warmup_epochs
):
    argv = ["--batch_size", 8, "--num_workers", 0, "--data_path", images, *options]
    argv += ["--finetune", weights["mae"], "--output_dir", tmp_path, "--log_every", 1]
    run_until(1, monkeypatch, *argv, main=main_linprobe.main)
    pattern = r" run      (\S+) epochs of .*; lr (\S+) .*, warm-up (\S+) epoch"
    said = re.search(pattern, capsys.readouterr().out).groups()
    assert [float(number) for number in said] == pytest.approx([epochs, lr, warmup_epochs])


# A run from start to end


def test_digits_are_learned_better_than_by_chance(tmp_path, capsys):
    argv = [*QUICK, "--model", "vit_tiny_patch4", "--input_size", 16, "--dataset", "digits"]
    argv += ["--pool", "avg", "--batch_size", 16, "--lr", 100]
    probe(*argv, "--output_dir", tmp_path)
    last = read_log(tmp_path)[-1]
    assert last["val_images"] == 360
    assert last["val_top1"] > 20  # 10 by chance
    assert last["val_top1"] < last["val_top5"]
    assert "linear probe, pool avg, last epoch (2): top-1" in capsys.readouterr().out


def test_one_image_left_over_is_trained_on(tmp_path, images, weights):
    # 37 images: a step of 36 and one of 1.
    argv = [*QUICK, "--finetune", weights["crossmae"], "--data_path", images]
    probe(*argv, "--batch_size", 36, "--output_dir", tmp_path)
    assert last_checkpoint(tmp_path)["progress"]["step"] == 4
    assert last_checkpoint(tmp_path)["model"]["head.0.num_batches_tracked"] == 2
    assert all(tensor.isfinite().all() for tensor in last_checkpoint(tmp_path)["model"].values())


@pytest.mark.parametrize(
    "options",
    [
        ["--amp", "bf16", "--accum_iter", "2"],
        ["--input_size", "24", "20", "--crop_share", "1", "--num_workers", "1"],
        ["--attention_backend", "math", "--clip_grad", "0.1", "--nb_classes", "3"],
    ],
    ids=" ".join,
)
def test_options_train_an_epoch(tmp_path, images, weights, options):
    argv = [*QUICK, "--finetune", weights["mae"], "--data_path", images, "--epochs", 1]
    probe(*argv, *options, "--output_dir", tmp_path)
    assert read_log(tmp_path)[-1]["val_images"] == 12


# Starting again


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        (["--finetune", "MAE"], "hash of the weights it starts from was '"),
        (["--pool", "avg"], "--pool was 'cls' and is now 'avg'"),
        (["--probe", "attentive"], "--probe was 'linear' and is now 'attentive'"),
        (["--layer", "1"], "--layer was None and is now [1]"),
        (["--dataset", "digits"], "number of classes was 3 and is now 10"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_contradict_the_checkpoint_are_refused_with_the_difference(
    tmp_path, weights, finished, capsys, options, difference
):
    before, argv = finished
    folder = copied(before, tmp_path / "same")
    options = [weights["mae"] if word == "MAE" else word for word in options]
    assert difference in refused(capsys, *argv, *options, "--output_dir", folder)
    assert files_in(folder) == files_in(before)


def test_a_probe_continues_without_the_weights_that_it_started_from(
    tmp_path, images, weights, monkeypatch, capsys
):
    encoder, whole, resumed = (tmp_path / name for name in ("encoder.pth", "whole", "resumed"))
    encoder.write_bytes(weights["crossmae"].read_bytes())
    argv = [*QUICK, "--finetune", encoder, "--data_path", images, "--pool", "avg"]
    probe(*argv, "--output_dir", whole)
    run_until(7, monkeypatch, *argv, *EACH_STEP, "--output_dir", resumed, main=main_linprobe.main)
    encoder.unlink()
    probe(*argv, "--output_dir", resumed)
    assert f"checkpoint not found: {encoder}; that is not needed" in capsys.readouterr().out
    assert_identical(state_of(resumed, "linprobe"), state_of(whole, "linprobe"))


@pytest.mark.parametrize("flag", ["--finetune", "--resume"])
def test_a_probe_is_evaluated_as_other_classifiers_are(tmp_path, images, finished, capsys, flag):
    place = ["--data_path", images, "--output_dir", tmp_path / "run"]
    argv = [*QUICK, "--eval", flag, list_checkpoints(finished[0])[-1], *place]
    run(*argv, main=main_finetune.main)
    last = read_log(finished[0])[-1]
    assert f"top-1 {last['val_top1']:.2f}%" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


# Several processes


@pytest.mark.slow
def test_two_processes_leave_one_whole_checkpoint(tmp_path, images, weights):
    argv = [*QUICK, "--finetune", weights["mae"], "--data_path", images, "--batch_size", 4]
    words = command(NANO_MAIN, "linprobe", *argv, "--output_dir", tmp_path, processes=2)
    code, out, err = finish(start(words))
    assert code == 0, out + err
    assert [line["val_images"] for line in read_log(tmp_path)] == [12, 12]
    content, model = read_encoder(weights["mae"]), last_checkpoint(tmp_path)["model"]
    assert_identical({name: model[name] for name in content.encoder}, content.encoder)
    assert out.count("linear probe, pool cls, last epoch") == 1


# What is refused


REFUSED = {
    "--model vit_tiny_patch16": "patches of 4 px, but the model has patches of 16 px",
    "--num_classes 4": "a head of 4 classes does not match the 3 of the training images",
    "--data_path OTHER/cup": "no labels",
    "--crop_pct 2": "must be between 0.1 and 1, not 2",
    "--mixup 0.8": "--mixup",
    "--eval": "--eval",
}


@pytest.mark.parametrize(("options", "reason"), REFUSED.items(), ids=REFUSED.keys())
def test_wrong_input_is_refused_in_one_sentence_and_nothing_is_written(
    tmp_path, images, weights, capsys, options, reason
):
    for name in ("apple", "cup", "dog"):
        write_images(tmp_path / "other" / name, 2)
    (tmp_path / "file").write_text("mine")
    places = {"OTHER": tmp_path / "other", "FILE": tmp_path / "file", "MAE": weights["mae"]}
    for word, place in places.items():
        options = options.replace(word, str(place))
    argv = [*QUICK, "--finetune", weights["mae"], "--data_path", images]
    argv += ["--output_dir", tmp_path / "run", *options.split()]
    before = files_in(tmp_path)
    assert reason in refused(capsys, *argv)
    assert files_in(tmp_path) == before
    assert not (tmp_path / "run").exists()
