"""Training on labels, accuracy over processes, and the checkpoint of the best epoch."""

import copy
import json
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, log_loss, top_k_accuracy_score
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

import engine_finetune
from engine_finetune import evaluate, train_one_epoch
from models_vit import build_vit, make_probe
from tests.helpers.models import NANO
from tests.helpers.runs import assert_identical
from tests.helpers.training import CPU, HostReads, PreparedLoader, Recorder
from util.compute.distributed import stop_processes
from util.compute.precision import Precision
from util.data.batch import Batch, collate
from util.data.broken_images import BrokenImages
from util.data.images import IndexedImages
from util.data.mixing import mix_images
from util.data.sources import Digits
from util.data.transforms import eval_transform
from util.errors import InputError, RunError
from util.eval import tasks
from util.eval.tasks import Classification, Multilabel, describe
from util.optim import build_lars, build_layer_decay_adamw
from util.runs.checkpoint import (
    BEST_NAME,
    Best,
    CheckpointWriter,
    Progress,
    TrainState,
    list_checkpoints,
    read_checkpoint,
)
from util.runs.epoch_log import LOG_NAME
from util.runs.meters import EpochMeters
from util.runs.report import report
from util.runs.resume import RunRecord, continue_run, newest_good_checkpoint
from util.seeding import seed_everything

NUM_CLASSES = 10
TOP1 = Best("val_top1")
SHAPE = (3, 16, 16)  # of the nano model's images
vit_nano = partial(build_vit, NANO, num_classes=NUM_CLASSES, pool="avg")
timms_mixup = partial(
    Mixup, mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=NUM_CLASSES
)


def sharp_vit(**options):
    """With a head that tells images apart from the start."""
    model = vit_nano(**options)
    torch.nn.init.normal_(model.head.weight)
    return model


def make_state(model, optimizer=None, *, ema=None):
    if optimizer is None:
        optimizer = build_layer_decay_adamw(
            model, weight_decay=0.05, layer_decay=0.65, betas=(0.9, 0.999)
        )
    return TrainState(
        model=model,
        optimizer=optimizer,
        precision=Precision("fp32", CPU),
        broken=BrokenImages(100, 0.0),
        ema=None if ema is None else ModelEmaV3(model, decay=ema),
    )


class FreshLoader(PreparedLoader):
    """Hands out copies, as mixup changes its images."""

    def steps(self, epoch, first_step=0):
        return iter(copy.deepcopy(self.prepared[first_step:]))


def some_images(num_images):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(num_images, *SHAPE, generator=generator)


def make_loader(*steps):
    """Images in micro-batches of these sizes; the same images in the same order for any split."""
    num_images = sum(map(sum, steps))
    labels = torch.arange(num_images) % NUM_CLASSES
    pairs = iter(zip(some_images(num_images), labels, strict=True))

    def batch(size):
        images, labels = zip(*(next(pairs) for _ in range(size)), strict=True)
        return Batch(torch.stack(images), torch.stack(labels), [])

    return FreshLoader([[batch(size) for size in sizes] for sizes in steps])


def train(loader, state, *, mixup=None, smoothing=0.0, seed=0, lr=1e-3, recorder=None, **options):
    """One epoch, or what is left of it."""
    recorder = recorder or Recorder()
    usual = {"log_every": 100, "run_log": recorder, "checkpoints": recorder}
    return train_one_epoch(
        state.model,
        loader,
        state,
        mixup=mixup,
        task=Classification(NUM_CLASSES, smoothing),
        seed=seed,
        device=CPU,
        lr_at=lambda _: lr,
        **usual | options,
    )


def measure(model, batches, broken=None, num_classes=NUM_CLASSES):
    scores = evaluate(
        model,
        batches,
        task=Classification(num_classes),
        precision=Precision("fp32", CPU),
        broken=broken or BrokenImages(100, 0.0),
    )
    return scores.stats()


def test_a_wrong_label_ends_training_before_the_step():
    loader, state = make_loader((4,), (4,)), make_state(vit_nano())
    loader.prepared[1][0].labels[2] = NUM_CLASSES
    with pytest.raises(InputError, match=f"label {NUM_CLASSES}"):
        train(loader, state)
    assert state.progress.step == 1


# Mixing


MIXUPS = {
    "mixup": {"cutmix_alpha": 0.0},
    "cutmix": {"mixup_alpha": 0.0},
    "both": {},
    "now and then": {"prob": 0.5},
    "of every image": {"mode": "elem"},
    "of every pair": {"mode": "pair"},
}
mixups = pytest.mark.parametrize("options", MIXUPS.values(), ids=MIXUPS.keys())


def mixed(num_images, mixup, seed=0):
    """What `mix_images` makes of some images and labels, which come last."""
    images, labels = some_images(num_images), torch.arange(num_images) * 3 % NUM_CLASSES
    seed_everything("mix", seed)
    return *mix_images(mixup, images.clone(), labels, NUM_CLASSES), images, labels


@mixups
@pytest.mark.parametrize("seed", range(3))
def test_an_even_number_is_mixed_as_timm_does(options, seed):
    mixup = timms_mixup(**options)
    images, targets, originals, labels = mixed(6, mixup, seed)
    seed_everything("mix", seed)
    expected_images, expected_targets = mixup(originals.clone(), labels)
    assert torch.equal(images, expected_images)
    assert torch.equal(targets, expected_targets)


@mixups
@pytest.mark.parametrize("num_images", [1, 5, 6])
def test_targets_share_out_one_label(options, num_images):
    _, targets, _, _ = mixed(num_images, timms_mixup(**options))
    assert targets.shape == (num_images, NUM_CLASSES)
    assert targets.min() >= 0
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(num_images))


@mixups
@pytest.mark.parametrize("num_images", [1, 5])
def test_the_last_of_an_odd_number_stays_and_the_others_are_mixed(options, num_images):
    mixup = timms_mixup(**options)
    images, targets, originals, labels = mixed(num_images, mixup)
    assert torch.equal(images[-1], originals[-1])
    assert torch.equal(targets[-1], F.one_hot(labels[-1], NUM_CLASSES).float())
    if num_images > 1:
        seed_everything("mix", 0)
        expected_images, expected_targets = mixup(originals[:-1].clone(), labels[:-1])
        assert torch.equal(images[:-1], expected_images)
        assert torch.equal(targets[:-1], expected_targets)


def loss_of_first_step(model, loader, **options):
    recorder = Recorder()
    train(loader, make_state(model), lr=0.0, recorder=recorder, **options)
    return recorder.stats[0]["loss"]


@mixups
def test_the_loss_of_mixed_images_equals_timms(options):
    model, loader = sharp_vit(), make_loader((6,))
    (batch,) = next(loader.steps(0))
    seed_everything("train", 3, 0, 0)  # seed, step, process
    smoothed = timms_mixup(**{**options, "label_smoothing": 0.1})
    images, targets = smoothed(batch.images, batch.labels)
    expected = SoftTargetCrossEntropy()(model(images), targets)
    loss = loss_of_first_step(model, loader, mixup=timms_mixup(**options), smoothing=0.1, seed=3)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_whole_images_equals_timms(smoothing):
    model, loader = sharp_vit(), make_loader((5,))
    (batch,) = next(loader.steps(0))
    expected = LabelSmoothingCrossEntropy(smoothing)(model(batch.images), batch.labels)
    loss = loss_of_first_step(model, loader, smoothing=smoothing)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


# Training


@pytest.mark.parametrize("steps", [((4, 4), (4, 4), (2, 1)), ((3, 3, 2), (5, 3), (1, 1, 1))])
def test_accumulation_equals_the_large_batch(steps):
    # SGD, for without Adam's division rounding stays rounding.
    def epoch(steps):
        torch.manual_seed(0)
        model = sharp_vit()
        state = make_state(model, torch.optim.SGD(model.parameters(), lr=0))
        return train(make_loader(*steps), state, smoothing=0.1, lr=0.1), model.state_dict()

    stats, weights = epoch(steps)
    expected_stats, expected = epoch([(sum(sizes),) for sizes in steps])
    assert stats == pytest.approx(expected_stats, rel=1e-5)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=2e-6)


RANDOM = {"mixup": timms_mixup(), "smoothing": 0.1}
STEPS = ((4, 4), (4, 4), (4, 4), (4, 3), (4, 4), (3,))


def random_state(first_step=0):
    """Of a run with everything that draws numbers."""
    torch.manual_seed(0)
    state = make_state(sharp_vit(drop_path=0.5), ema=0.9)
    state.progress.step = first_step
    return state


def draw_globally():
    torch.rand(3), np.random.rand(3)  # noqa: NPY002


def test_training_repeats_bit_for_bit():
    contents = []
    for _ in range(2):
        state = random_state()
        draw_globally()
        train(make_loader(*STEPS), state, **RANDOM)
        contents.append(state.state_dict())
    assert_identical(*contents)


@pytest.mark.parametrize("only", ["mixup", "drop path"])
def test_each_seed_step_and_process_draws_its_own_numbers(monkeypatch, only):
    def loss(seed, first_step, rank):
        monkeypatch.setattr(engine_finetune, "rank", lambda: rank)
        state = random_state(first_step)
        if only == "mixup":
            state.model.eval()
            state.model.train = lambda: None  # leaves nothing out
        options = RANDOM if only == "mixup" else {}
        return train(make_loader((8,)), state, seed=seed, lr=0.0, **options)["loss"]

    losses = [loss(*place) for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))]
    assert losses[0] == losses[4]
    assert len(set(losses)) == 4


def test_a_run_continues_within_an_epoch_bit_for_bit():
    loader, saved = make_loader(*STEPS), []
    undisturbed = random_state()
    undisturbed.progress = Progress(epoch=1, step=6)

    def save():
        saved.append(copy.deepcopy(undisturbed.state_dict()))

    stats = train(loader, undisturbed, log_every=2, recorder=Recorder(save), **RANDOM)
    assert [content["progress"]["step_in_epoch"] for content in saved] == [2, 4]
    for content in saved:
        state = make_state(sharp_vit(drop_path=0.5), ema=0.9)
        state.load_state_dict(content)
        draw_globally()
        assert train(loader, state, log_every=2, **RANDOM) == stats
        assert state.progress == Progress(epoch=2, step=12)
        assert_identical(state.state_dict(), undisturbed.state_dict())


def test_a_linear_probe_leaves_the_encoder_bit_for_bit():
    model = vit_nano(pool="cls")
    make_probe(model, NUM_CLASSES)
    before = copy.deepcopy(model.state_dict())
    train(make_loader(*STEPS, (1,)), make_state(model, build_lars(model, weight_decay=0.0)), lr=1.0)
    changed = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    head = {"0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight", "1.bias"}
    assert changed == {f"head.{name}" for name in head}


def test_a_label_that_is_no_class_ends_training():
    loader = make_loader((4,))
    loader.prepared[0][0].labels[1] = 10
    for options in ({}, RANDOM):
        with pytest.raises(InputError, match="label 10 is not one of the 10 classes"):
            train(loader, make_state(vit_nano()), **options)


@pytest.mark.parametrize("mixup", [None, timms_mixup(), timms_mixup(mode="elem")])
def test_the_host_waits_for_the_device_at_log_points_only(monkeypatch, mixup):
    checked = []
    # Labels are checked before they go to the device, which costs no waiting.
    monkeypatch.setattr(tasks, "check_labels", lambda labels, _: checked.append(labels))
    # On a CPU, unlike on a GPU, this looks for labels that are no class.
    monkeypatch.setattr(F, "one_hot", lambda labels, n: torch.eye(n, dtype=torch.int64)[labels])
    monkeypatch.setattr(EpochMeters, "read", lambda _: {})
    loader = make_loader(*[(4, 4)] * 3)
    loader.steps = lambda *_: iter(loader.prepared)
    state = make_state(vit_nano(drop_path=0.2), ema=0.9)  # since PyTorch 2.14 trunc_normal_ reads
    with monkeypatch.context() as patch, HostReads(patch) as reads:
        train(loader, state, mixup=mixup, smoothing=0.1)
    assert reads.found == []
    assert [id(labels) for labels in checked] == [id(b.labels) for s in loader.prepared for b in s]


def test_a_handful_of_digits_can_be_learned_by_heart():
    transform = eval_transform(SHAPE[1:], (0.5,) * 3, (0.5,) * 3)
    dataset = IndexedImages(Digits("train"), transform, seed=0)
    images, labels = collate([dataset[0, index] for index in range(64)]).to(CPU)
    batches = [Batch(images[i::2], labels[i::2], []) for i in range(2)]
    model = vit_nano()
    train(PreparedLoader([[batch] for batch in batches] * 60), make_state(model), lr=1e-2)
    assert measure(model, batches)["val_top1"] >= 95


# Measuring


def logits_in_batches(num_images, num_classes, batch_size=4):
    """Images that are their own logits, for a model that only flattens them."""
    generator = torch.Generator().manual_seed(num_images)
    logits = torch.randn(num_images, num_classes, generator=generator)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    labels[:num_classes] = torch.arange(num_classes)[:num_images]  # scikit-learn wants them all
    images = logits[:, :, None, None]
    pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return [Batch(*pair, []) for pair in pairs], logits, labels


@pytest.mark.parametrize("num_classes", [10, 6, 5, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_evaluation_equals_scikit_learns(num_classes, batch_size):
    batches, logits, labels = logits_in_batches(41, num_classes, batch_size)
    scores = logits.double().softmax(dim=1).numpy()
    top = {k: top_k_accuracy_score(labels, scores, k=k) if k < num_classes else 1 for k in (1, 5)}
    assert measure(torch.nn.Flatten(), batches, num_classes=num_classes) == {
        "val_loss": pytest.approx(log_loss(labels, scores), rel=1e-5),
        "val_top1": pytest.approx(100 * top[1]),
        "val_top5": pytest.approx(100 * top[5]),
        "val_balanced": pytest.approx(100 * balanced_accuracy_score(labels, scores.argmax(axis=1))),
        "val_images": 41,
    }


def test_two_classes_are_enough():
    batches, logits, labels = logits_in_batches(9, 2)
    stats = measure(torch.nn.Flatten(), batches, num_classes=2)
    assert stats["val_top1"] == pytest.approx(100 * (logits.argmax(dim=1) == labels).sum() / 9)
    assert stats["val_top5"] == 100


def test_evaluation_leaves_the_model_and_the_random_state_as_they_were():
    model, batches = sharp_vit(drop_path=0.9), make_loader((4, 3)).prepared[0]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert measure(model, batches) == measure(model.train(), batches)
    assert torch.equal(torch.get_rng_state(), random)
    assert_identical(model.state_dict(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_too_many_broken_images_end_the_evaluation():
    batches, _, _ = logits_in_batches(8, 3)
    batches[1].broken.append(("a.png", "empty"))
    measure(torch.nn.Flatten(), batches, BrokenImages(8, 0.2), num_classes=3)
    with pytest.raises(InputError, match=r"a\.png"):
        measure(torch.nn.Flatten(), batches, BrokenImages(8, 0.1), num_classes=3)


# Images of two processes, as `build_eval_loader` shares them out, and otherwise.
SHARES = {
    "seven and six": (13, (slice(0, None, 2), slice(1, None, 2))),
    "ten and three": (13, (slice(3, None), slice(0, 3))),
    "one and none": (1, (slice(0, 1), slice(1, None))),
}


def measure_labels(batches):
    """Scores of the same logits for several labels an image, and the matrix of one label."""
    precision = Precision("fp32", CPU)
    options = {"precision": precision, "broken": BrokenImages(100, 0.0)}
    several = [b._replace(labels=F.one_hot(b.labels, NUM_CLASSES).float()) for b in batches]
    scores = evaluate(torch.nn.Flatten(), several, task=Multilabel(NUM_CLASSES), **options)
    of_classes = evaluate(torch.nn.Flatten(), batches, task=Classification(NUM_CLASSES), **options)
    return {**scores.stats(), "wrong": of_classes.confusion.triu(1).sum().item()}


def measure_on_two_processes(rank, folder):
    """What each of two processes runs."""
    store = dist.FileStore(str(folder / "store"), 2)
    minute = timedelta(minutes=1)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=minute)
    found = {}
    for name, (num_images, slices) in SHARES.items():
        batches, _, _ = logits_in_batches(num_images, 10, batch_size=1)
        found[name] = measure(torch.nn.Flatten(), batches[slices[rank]])
        found[f"{name}, several labels"] = measure_labels(batches[slices[rank]])
    (folder / f"{rank}.json").write_text(json.dumps(found))
    stop_processes()


def test_two_processes_measure_what_one_does(tmp_path):
    # Forked, for fresh ones would spend seconds on imports.
    torch.multiprocessing.start_processes(
        measure_on_two_processes, (tmp_path,), nprocs=2, start_method="fork"
    )
    both = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1]
    for name, (num_images, _) in SHARES.items():
        batches, _, _ = logits_in_batches(num_images, 10, 1)
        expected = measure(torch.nn.Flatten(), batches)
        of_labels = both[0].pop(f"{name}, several labels")
        assert of_labels == pytest.approx(measure_labels(batches), rel=1e-5)
        assert both[0][name].pop("val_loss") == pytest.approx(expected.pop("val_loss"), rel=1e-6)
        assert both[0][name] == expected, name


# The best epoch


def make_writer(folder, state, keep_last=0):
    return CheckpointWriter(
        folder, state, {}, kind="finetune", every_minutes=None, keep_last=keep_last
    )


def after_epochs(writer, *top1s):
    """End epochs with these accuracies as a main does; return the weights after each."""
    state = writer.state
    for top1 in top1s:
        torch.nn.init.normal_(state.model.head.weight)
        state.ema.update(state.model)
        state.progress.epoch += 1
        writer.save_if_best({"val_top1": top1, "loss": 2.0}, by=TOP1)
        writer.save()
        yield copy.deepcopy(state.model.state_dict())


def test_the_best_epoch_is_kept_and_of_equals_the_first(tmp_path):
    writer = make_writer(tmp_path, make_state(vit_nano(), ema=0.9), keep_last=1)
    epochs = after_epochs(writer, 50.0, 70.0, 70.0, 60.0, 69.9)
    next(epochs)
    next(epochs)
    averaged = copy.deepcopy(writer.state.ema.module.state_dict())
    written = (tmp_path / BEST_NAME).read_bytes()
    assert len(list(epochs)) == 3
    assert (tmp_path / BEST_NAME).read_bytes() == written
    assert len(list_checkpoints(tmp_path)) == 1  # of which it is none

    content = read_checkpoint(tmp_path / BEST_NAME, "finetune")
    assert set(content) == {"format", "version", "model", "progress"}
    assert_identical(dict(content["model"]), dict(averaged))  # which were measured
    assert content["progress"]["best"] == {"epoch": 2, "val_top1": 70.0, "loss": 2.0}
    assert content["progress"]["epoch"] == 2


@pytest.mark.parametrize(("top1", "is_better"), [(69.0, False), (70.0, False), (70.1, True)])
def test_a_resumed_run_knows_the_best_so_far(tmp_path, top1, is_better):
    list(after_epochs(make_writer(tmp_path, make_state(vit_nano(), ema=0.9)), 70.0, 60.0))
    written = (tmp_path / BEST_NAME).read_bytes()
    resumed = make_state(vit_nano(), ema=0.9)
    path = newest_good_checkpoint(tmp_path, "finetune")
    resumed.load_state_dict(read_checkpoint(path, "finetune"))
    assert resumed.progress.best == {"epoch": 1, "val_top1": 70.0, "loss": 2.0}
    list(after_epochs(make_writer(tmp_path, resumed), top1))
    assert ((tmp_path / BEST_NAME).read_bytes() != written) == is_better
    assert resumed.progress.best["epoch"] == (3 if is_better else 1)


@pytest.mark.parametrize(
    ("by", "stats", "best"),
    [
        (TOP1, [(70.0, 0.5), (70.0, 0.4), (60.0, 0.1), (70.0, 0.4)], 2),
        (Best("val_loss", lowest=True), [(70.0, 0.5), (60.0, 0.1), (80.0, 0.2)], 2),
    ],
)
def test_ties_go_to_the_lower_loss_and_a_loss_may_decide(tmp_path, by, stats, best):
    state = make_state(vit_nano())
    writer = make_writer(tmp_path, state)
    for top1, loss in stats:
        state.progress.epoch += 1
        writer.save_if_best({"val_top1": top1, "val_loss": loss}, by=by)
    assert state.progress.best["epoch"] == best


def test_a_run_may_change_what_its_best_epoch_is_chosen_by(tmp_path):
    state = make_state(vit_nano())
    writer = make_writer(tmp_path, state)
    writer.save_if_best({"val_top1": 70.0}, by=TOP1)
    state.progress.epoch = 1
    writer.save_if_best({"val_balanced": 50.0, "val_top1": 60.0}, by=Best("val_balanced"))
    assert state.progress.best["epoch"] == 1


def test_without_validation_images_no_epoch_is_the_best(tmp_path):
    state = make_state(vit_nano())
    make_writer(tmp_path, state).save_if_best({"loss": 1.0}, by=TOP1)
    assert state.progress.best is None
    assert list(tmp_path.iterdir()) == []


def test_the_best_epoch_is_not_saved_with_weights_that_are_not_finite(tmp_path):
    state = make_state(vit_nano())
    state.model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(RunError, match=r"model\.head\.weight is not finite"):
        make_writer(tmp_path, state).save_if_best({"val_top1": 1.0}, by=TOP1)
    assert list(tmp_path.iterdir()) == []


def write_run(folder, *top1s):
    """The log of a run and the name of its last checkpoint."""
    others = {"val_loss": 0.5, "val_images": 8}
    lines = [
        {"epoch": epoch, "step": 5 * epoch, "loss": 0.5}
        | ({} if top1 is None else {"val_top1": top1, "val_top5": 99.0} | others)
        for epoch, top1 in enumerate(top1s, start=1)
    ]
    (folder / LOG_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / f"checkpoint-e{len(top1s):04d}-s000000.pth").touch()
    return lines


def test_a_finished_run_says_what_it_reached(tmp_path, caplog):
    lines = write_run(tmp_path, 50.0, 70.0, 70.0, 60.0)
    with caplog.at_level("INFO"):
        report(
            tmp_path,
            "fine-tuning",
            Progress(epoch=4, best={"epoch": 2}),
            by="val_top1",
            describe=describe,
        )
    assert [record.getMessage() for record in caplog.records] == [
        f"fine-tuning, last epoch (4): {describe(lines[3])}",
        f"fine-tuning, best epoch (2): {describe(lines[1])}",
        f"checkpoint of the best epoch: {tmp_path / BEST_NAME}",
        f"checkpoint: {tmp_path / 'checkpoint-e0004-s000000.pth'}",
    ]
    assert describe(lines[1]) == "top-1 70.00%, top-5 99.00%, loss 0.5000 over 8 images"


def test_a_finished_run_without_validation_images_names_its_checkpoint_alone(tmp_path, caplog):
    write_run(tmp_path, None, None)
    with caplog.at_level("INFO"):
        report(tmp_path, "fine-tuning", Progress(epoch=2), by="val_top1", describe=describe)
    (record,) = caplog.records
    assert record.getMessage() == f"checkpoint: {tmp_path / 'checkpoint-e0002-s000000.pth'}"


def test_a_finished_run_without_its_last_checkpoint_fails(tmp_path):
    write_run(tmp_path, 50.0, 60.0)
    (tmp_path / "checkpoint-e0002-s000000.pth").rename(tmp_path / "checkpoint-e0001-s000000.pth")
    with pytest.raises(RunError, match="the last checkpoint could not be written"):
        report(tmp_path, "fine-tuning", Progress(epoch=2), by="val_top1", describe=describe)


def test_a_best_epoch_that_could_not_be_written_is_not_taken_for_kept(tmp_path, monkeypatch):
    def full(*_, **options):
        raise OSError("disk full")

    writer = make_writer(tmp_path, make_state(vit_nano(), ema=0.9))
    with monkeypatch.context() as patch:
        patch.setattr("util.runs.checkpoint.replace_file", full)
        writer.save_if_best({"val_top1": 70.0}, by=TOP1)
    writer.save_if_best({"val_top1": 60.0}, by=TOP1)
    assert (tmp_path / BEST_NAME).exists()


def test_resuming_from_the_best_epoch_is_refused(tmp_path):
    best = tmp_path
    writer = make_writer(best, make_state(vit_nano(), ema=0.9))
    writer.save_if_best({"val_top1": 70.0}, by=TOP1)
    state, path = make_state(vit_nano(), ema=0.9), best / BEST_NAME
    record = RunRecord("finetune", {}, {"--epochs": 3}, {}, {}, ())
    with pytest.raises(InputError, match="--finetune"):
        continue_run(state, path, read_checkpoint(path, "finetune"), record)


@pytest.mark.parametrize(
    ("labels", "words"), [(torch.tensor([3, 0, 1]), "label 3"), (None, "an image has no label")]
)
def test_a_val_label_that_is_no_class_is_refused(labels, words):
    batches, _, _ = logits_in_batches(8, 3)
    batches[1] = batches[1]._replace(labels=labels)
    with pytest.raises(InputError, match=words):
        measure(torch.nn.Flatten(), batches, num_classes=3)
