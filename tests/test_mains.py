"""What every main promises: to continue exactly, to refuse in one sentence, and to leave no trace.

What only one of them does is in its own file.
"""

import json
import re

import pytest

from tests.helpers.files import copied, files_in, write_images
from tests.helpers.processes import NANO_MAIN, command, finish, start
from tests.helpers.runs import (
    EACH_STEP,
    MAINS,
    QUICK,
    TINY,
    assert_identical,
    last_checkpoint,
    refusal,
    run,
    run_until,
    state_of,
)
from util.runs.checkpoint import BEST_NAME, list_checkpoints
from util.runs.epoch_log import read_log

TRAINING = ("pretrain", "finetune", "linprobe")
MAINS = {
    name: MAINS[name] for name in (*TRAINING, "knn")
}  # test_main_segmentation.py has the other
every_main = pytest.mark.parametrize("name", MAINS)
every_training = pytest.mark.parametrize("name", TRAINING)

pytestmark = pytest.mark.usefixtures("nano")


@pytest.fixture
def argv_of(images, pretrained):
    """Makes the command line with which a main works, without --output_dir."""
    data = ["--data_path", images]
    lines = {
        "pretrain": [*TINY, *data, "--knn_every", 0],
        "finetune": [*QUICK, "--finetune", pretrained, *data],
        "linprobe": [*QUICK, "--finetune", pretrained, *data],
        "knn": [*QUICK[4:], "--finetune", pretrained, *data],
    }
    return lines.__getitem__


@pytest.fixture(scope="session")
def finished_runs():
    return {}


@pytest.fixture
def finished(name, argv_of, finished_runs, tmp_path_factory):
    """The output folder of a main's finished run of two epochs, and its command line."""
    if name not in finished_runs:
        finished_runs[name] = tmp_path_factory.mktemp(f"finished_{name}")
        run(*argv_of(name), "--output_dir", finished_runs[name], main=MAINS[name].main)
    return finished_runs[name], argv_of(name)


# Runs that continue

STOPS = {
    "pretrain": [
        *(([step], ["--amp", amp]) for amp in ("fp32", "bf16", "fp16") for step in (2, 5, 6)),
        *(([3, 4, 9], ["--amp", amp]) for amp in ("fp32", "bf16", "fp16")),
    ],
    "finetune": [
        ([2], ["--ema", "0.9"]),
        ([5, 6], ["--drop_path", "0.5"]),
        ([3, 4, 9], ["--ema", "0.5", "--drop_path", "0.5", "--amp", "bf16"]),
        ([2], ["--accum_iter", "2", "--mixup_mode", "elem"]),
    ],
    "linprobe": [([2], []), ([5, 6], []), ([3, 4, 9], [])],
}
LR = {"pretrain": 1e-3, "finetune": 1e-3, "linprobe": 1}


@pytest.mark.parametrize(
    ("name", "stops", "options"),
    [(name, *case) for name, cases in STOPS.items() for case in cases],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
def test_a_stopped_run_continues_bit_for_bit(tmp_path, monkeypatch, argv_of, name, stops, options):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    argv = [*argv_of(name), "--lr", LR[name], *options]
    argv += ["--eval_every", 1] if name == "pretrain" else []
    run(*argv, "--output_dir", whole, main=MAINS[name].main)
    for step in stops:
        place = ["--output_dir", resumed]
        run_until(step, monkeypatch, *argv, *EACH_STEP, *place, main=MAINS[name].main)
        assert last_checkpoint(resumed, name)["progress"]["step"] == step - 1
    run(*argv, "--output_dir", resumed, main=MAINS[name].main)
    assert_identical(state_of(resumed, name), state_of(whole, name))
    if name == "pretrain":
        figures = [(folder / "reconstructions.png").read_bytes() for folder in (resumed, whole)]
        assert figures[0] == figures[1]


def kill_after_saving(num_times, words):
    """Start a command, and kill it right after it says that it saved so often."""
    with start(words) as process:
        for line in process.stdout:
            num_times -= "saved" in line
            if num_times == 0:
                process.kill()
                return
    pytest.fail(f"it ended by itself: {process.returncode}")


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "options", "kills"),
    [
        ("pretrain", ["--eval_every", 1], [3, 4]),
        ("pretrain", ["--eval_every", 1, "--amp", "bf16"], [2]),
        ("finetune", ["--ema", 0.9], [3]),
        ("linprobe", [], [3]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)),
)
def test_a_killed_run_continues_bit_for_bit(tmp_path, argv_of, name, options, kills):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    argv = [*argv_of(name), "--lr", LR[name], *options]
    words = command(NANO_MAIN, name, *argv, *EACH_STEP, "--output_dir", resumed)
    for num_saved in kills:
        kill_after_saving(num_saved, words)
    assert sum(kills) <= last_checkpoint(resumed, name)["progress"]["step"] < 10
    run(*argv, "--num_workers", 2, "--output_dir", resumed, main=MAINS[name].main)
    run(*argv, "--output_dir", whole, main=MAINS[name].main)
    assert_identical(state_of(resumed, name), state_of(whole, name))


@every_training
def test_a_finished_run_started_again_changes_nothing(tmp_path, finished, capsys, name):
    before, argv = finished
    folder = copied(before, tmp_path / "again")
    run(*argv, "--output_dir", folder, main=MAINS[name].main)
    out = capsys.readouterr().out
    assert "nothing is left to train" in out
    assert f"checkpoint: {folder}/checkpoint-e0002-s000000.pth\n" in out
    same = [path for path in files_in(before) if path.endswith((".pth", ".jsonl", ".png"))]
    assert {n: files_in(folder)[n] for n in same} == {n: files_in(before)[n] for n in same}


@every_training
def test_a_longer_run_continues_with_a_warning(tmp_path, finished, capsys, name):
    before, argv = finished
    folder = copied(before, tmp_path / "longer")
    run(*argv, "--epochs", 3, "--output_dir", folder, main=MAINS[name].main)
    assert "--epochs increased from 2 to 3: from epoch 3 on" in capsys.readouterr().out
    assert [line["epoch"] for line in read_log(folder)] == [1, 2, 3]
    assert read_log(folder)[:2] == read_log(before)


@every_training
def test_data_may_move(tmp_path, images, finished, capsys, name):
    before, argv = finished
    folder = copied(before, tmp_path / "moved")
    moved = copied(images, tmp_path / "images")
    run(*argv, "--data_path", moved, "--output_dir", folder, main=MAINS[name].main)
    assert "continuing with a change: --data_path" in capsys.readouterr().out


@every_training
def test_renamed_classes_are_not_continued(tmp_path, images, finished, capsys, name):
    before, argv = finished
    folder = copied(before, tmp_path / "run")
    renamed = copied(images, tmp_path / "images")
    for split in ("train", "val"):
        (renamed / split / "bear").rename(renamed / split / "bull")
    argv = [*argv, "--data_path", renamed, "--output_dir", folder]
    message = refusal(capsys, *argv, main=MAINS[name].main)
    assert "hash of the names of classes was" in message


@every_training
def test_other_images_of_the_same_names_are_told(tmp_path, images, finished, capsys, name):
    before, argv = finished
    folder = copied(before, tmp_path / "run")
    swapped = copied(images, tmp_path / "images")
    write_images(swapped / "train" / "bear", 12, size=24)  # as if class folders had been swapped
    run(*argv, "--data_path", swapped, "--output_dir", folder, main=MAINS[name].main)
    assert "continuing with a change: hash of the content of 100" in capsys.readouterr().out


@pytest.mark.parametrize("name", MAINS)
def test_the_images_are_described_in_the_log_and_in_args_json(
    tmp_path, images, finished, capsys, name
):
    _, argv = finished
    run(*argv, "--output_dir", tmp_path, main=MAINS[name].main)
    out = capsys.readouterr().out
    assert f"37 training images from {images}/train: apple 12, bear 12, cup 13" in out
    assert f"12 validation images from {images}/val: apple 3, bear 4, cup 5" in out
    data = json.loads((tmp_path / "args.json").read_text())["data"]
    assert data["training"]["classes"]["largest"] == {"name": "cup", "images": 13}
    assert data["validation"]["from"] == str(images / "val")


@every_training
def test_workers_and_log_points_change_nothing(tmp_path, finished, name):
    before, argv = finished
    run(*argv, "--num_workers", 2, *EACH_STEP, "--output_dir", tmp_path, main=MAINS[name].main)
    assert_identical(state_of(tmp_path, name), state_of(before, name))


# Options that contradict a checkpoint -> what the refusal says.
DIFFERENCES = {
    "--seed 1": ": --seed was 0 and is now 1. ",  # and nothing else
    "--batch_size 4": "effective batch size was 8 and is now 4",
    "--accum_iter 2": "effective batch size was 8 and is now 16",
    "--weight_decay 0.2": "--weight_decay was ",
    "--input_size 24": "--input_size was [16, 16] and is now [24, 24]",
    "--std 1 1 1": "--std was",
    "--data_path FEWER": "number of training images was 37 and is now 36",
    "--data_path OTHERS": "hash of their names was",
    "--epochs 1": "--epochs 1 is below the 2",
    "--resume none": "would overwrite",
}


@every_training
@pytest.mark.parametrize(("options", "difference"), DIFFERENCES.items(), ids=DIFFERENCES.keys())
def test_arguments_that_contradict_the_checkpoint_are_refused_with_the_difference(
    tmp_path, images, finished, capsys, name, options, difference
):
    before, argv = finished
    folder = copied(before, tmp_path / "same")
    for word in ("FEWER", "OTHERS"):
        if word in options:
            images = copied(images, tmp_path / word)
            path = images / "train" / "cup" / "000.png"
            path.unlink() if word == "FEWER" else path.rename(path.with_name("other.png"))
            options = options.replace(word, str(images))
    argv = [*argv, *options.split(), "--output_dir", folder]
    assert difference in refusal(capsys, *argv, main=MAINS[name].main)
    assert files_in(folder) == files_in(before)


@every_training
def test_checkpoints_of_another_kind_are_not_continued(tmp_path, argv_of, weights, capsys, name):
    other = weights["mae"].parent
    if name == "pretrain":
        other = tmp_path / "probe"
        run(*argv_of("linprobe"), "--output_dir", other, main=MAINS["linprobe"].main)
    folder = copied(other, tmp_path / "other")
    kinds = {"pretrain": "pre-training", "finetune": "fine-tuning", "linprobe": "linear-probing"}
    for place in (
        ["--output_dir", folder],
        ["--resume", list_checkpoints(other)[-1], "--output_dir", tmp_path / "run"],
    ):
        sentence = refusal(capsys, *argv_of(name), *place, main=MAINS[name].main)
        assert re.search(rf"is not a {kinds[name]} checkpoint of this project", sentence)
    assert files_in(folder) == files_in(other)
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
@every_training
def test_a_diverging_run_saves_nothing_that_is_not_finite(tmp_path, argv_of, capsys, name):
    argv = [*argv_of(name), "--lr", 1e35, "--output_dir", tmp_path]
    sentence = refusal(capsys, *argv, main=MAINS[name].main, code=1)
    assert re.search(r"step \d+ of the run is not finite: the (first module|weight) ", sentence)
    assert list_checkpoints(tmp_path) == []
    assert not (tmp_path / BEST_NAME).exists()
    assert read_log(tmp_path) == []


@pytest.mark.parametrize("name", TRAINING[1:])
def test_without_validation_images_a_run_says_so_and_trains(
    tmp_path, images, argv_of, capsys, name
):
    argv = [*argv_of(name), "--data_path", images / "train", "--epochs", 1]
    run(*argv, "--output_dir", tmp_path, main=MAINS[name].main)
    out = capsys.readouterr().out
    assert "no validation images" in out
    assert "top-1" not in out
    assert "val_top1" not in read_log(tmp_path)[-1]
    assert not (tmp_path / BEST_NAME).exists()


# What is refused

# Options -> what the one sentence says, whatever the main.
REFUSED = {
    "--data_path nowhere": "nowhere does not exist",
    "--data_path EMPTY": "EMPTY",
    "--dataset imagenet": "unknown --dataset imagenet",
    "--num_samples 10": "--num_samples is for streams",
    "--input_size 18": "a patch size of 4 does not divide 18 x 18 px",
    "--input_size 16 16 16": "--input_size takes one side, or a height and a width",
    "--std 0 1 1": "--std must be above 0",
    "--std nan 1 1": "--std",
    "--mean nan 0 0": "--mean",
    "--mean 0.5": "--mean has 1 number, but the images have 3 channels",
    "--std 1 1": "--std has 2 numbers, but the images have 3 channels",
    "--mean auto 0.5": "--mean takes auto alone, or a number for each channel",
    "--mean auto": "--mean and --std are measured together",
    "--channels 0": "--channels",
    "--channels 2 --mean 0 0 0": "--mean has 3 numbers, but the images have 2 channels",
    "--value_range 1 1": "--value_range takes the value that becomes 0 and then",
    "--axes CWH": "--axes",
    "--tile 0": "--tile",
    "--amp int8": "invalid choice: 'int8'",
    "--attention_backend cudnn": "--attention_backend cudnn cannot run this model",
    "--device abacus": "unknown --device abacus",
    "--device meta": "--device meta",
    "--output_dir FILE": "--output_dir",
    "--mask_ratios 0.75": "--mask_ratios",
}
REFUSED_IN_TRAINING = {
    "--resume nowhere.pth": "checkpoint not found: nowhere.pth",
    "--resume EMPTY": "EMPTY",
    "--warmup_epochs 2": "--warmup_epochs 2 must be below --epochs 2",
    "--model vit": "invalid choice: 'vit'",
    "--log_dir FILE": "--log_dir",
}
REFUSED_WITH_LABELS = {
    "--finetune nowhere.pth": "checkpoint not found: nowhere.pth",
    "--finetune README.md": "README.md",
    "--data_path UNSORTED --val_path UNSORTED": "no labels",
    "--val_path OTHER": "1 missing (bear) and 1 new (dog)",
    "--val_path UNSORTED": "no labels",
    "--pool max": "invalid choice: 'max'",
    "--num_classes 2": "2 classes",
}
CASES = [(name, *case) for name in MAINS for case in REFUSED.items()]
CASES += [(name, *case) for name in TRAINING for case in REFUSED_IN_TRAINING.items()]
CASES += [(name, *case) for name in [*MAINS][1:] for case in REFUSED_WITH_LABELS.items()]


@pytest.mark.parametrize(("name", "options", "reason"), CASES, ids=lambda text: text)
def test_wrong_input_is_refused_in_one_sentence_and_nothing_is_written(
    tmp_path, argv_of, capsys, name, options, reason
):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FILE").write_text("mine")
    if "OTHER" in options:
        for folder in ("apple", "cup", "dog"):
            write_images(tmp_path / "OTHER" / folder, 2)
    if "UNSORTED" in options:
        write_images(tmp_path / "UNSORTED", 3)
    for word in ("EMPTY", "FILE", "OTHER", "UNSORTED"):
        options = options.replace(word, str(tmp_path / word))
    argv = [*argv_of(name), "--output_dir", tmp_path / "run", *options.split()]
    before = files_in(tmp_path)
    assert reason in refusal(capsys, *argv, main=MAINS[name].main)
    assert files_in(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@every_main
def test_a_refusal_ends_the_program_with_one_sentence_and_code_2(tmp_path, argv_of, name):
    argv = [*argv_of(name), "--output_dir", tmp_path / "run", "--std", 0, 1, 1]
    code, out, err = finish(start(command(f"main_{name}.py", *argv)))
    assert code == 2
    assert re.fullmatch(rf"main_{name}\.py: error: --std must be above 0.*\n", err)
    assert "Traceback" not in out
