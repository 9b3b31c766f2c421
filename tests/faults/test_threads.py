"""The last bits of a run: the number of threads, and what else changes them on resume."""

import json
import shutil

import pytest
import torch

from tests.helpers.files import write_coco, write_masked_images
from tests.helpers.models import use_nano_models
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
    state_of,
)
from util.runs.checkpoint import list_checkpoints

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("nano")]

TRAINING = ("pretrain", "finetune", "linprobe", "segmentation", "detection")
every_training = pytest.mark.parametrize("name", TRAINING)
NANO = ["--model", "vit_tiny_patch4", *QUICK[4:]]
SAYS = "not bit-identical", "not be bit-identical"
WRONG = ("0", "-1", "1001", "5000", str(10**12), "two", "1.5", "nan", "", "1 2")
THREADS = "--num_threads"


@pytest.fixture(autouse=True)
def threads():
    """Set the number of threads of this process; afterward it is 1 again."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def lines(images, pretrained, tmp_path_factory):
    """The command lines of short runs by main, without --output_dir."""
    folder = tmp_path_factory.mktemp("data")
    masked, coco = write_masked_images(folder / "masked"), write_coco(folder / "coco")
    classified = ["--finetune", pretrained, "--data_path", images, *QUICK, "--epochs", 1]
    steps = [*NANO, "--lr", 1e-3, "--batch_size", 2, "--max_iters", 4, "--eval_every", 4]
    small = ["--input_size", 32, "--window_size", 3, "--global_blocks", 1, "--fpn_dim", 16]
    return {
        "pretrain": [*TINY, "--data_path", images, "--epochs", 1, "--knn_every", 0],
        "finetune": classified,
        "linprobe": [*classified, "--lr", 1],
        "segmentation": [*steps, "--crop_size", 16, "--data_path", masked],
        "detection": [*steps, *small, "--box_convs", 1, "--roi_batch", 8, "--data_path", coco],
    }


@pytest.fixture(scope="module")
def undisturbed(lines, tmp_path_factory):
    """Folders of runs of one thread by main, each made when it is first asked for."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                use_nano_models(patch)
                place = [*EACH_STEP, "--output_dir", folders[name]]
                run(*lines[name], *place, main=MAINS[name].main)
        return folders[name]

    return folder_of


@pytest.fixture
def stopped(undisturbed, lines, tmp_path):
    """Return the folder of a run that was killed after two steps, and how it is continued."""

    def stop(name, change=lambda content: None):
        folder = tmp_path / "run"
        shutil.copytree(undisturbed(name), folder)
        _, last, *later = list_checkpoints(folder)
        for path in later:
            path.unlink()
        content = torch.load(last, weights_only=True)
        change(content)
        torch.save(content, last)
        line = [*lines[name], "--output_dir", folder]
        return folder, lambda *more: run(*line, *more, main=MAINS[name].main)

    return stop


def said(capsys):
    """What a run has said of its last bits."""
    return [line for line in capsys.readouterr().out.splitlines() if any(s in line for s in SAYS)]


# The number of threads


def test_another_number_of_threads_is_named_on_resume_with_the_flag_that_keeps_it(
    stopped, capsys, threads
):
    folder, resume = stopped("pretrain")
    threads(2)
    resume()
    (warning,) = said(capsys)
    assert "the number of threads was 1 and is now 2:" in warning
    assert "--num_threads 1 " in warning
    assert last_checkpoint(folder)["recipe"][THREADS] == 2


@every_training
@pytest.mark.parametrize("before", [2, 4, 64])
def test_fewer_threads_are_named_on_resume_by_every_main(stopped, capsys, name, before):
    folder, resume = stopped(name, lambda content: content["recipe"].update({THREADS: before}))
    resume()
    (warning,) = said(capsys)
    assert f"the number of threads was {before} and is now 1:" in warning
    assert f"--num_threads {before} " in warning
    assert last_checkpoint(folder, name)["recipe"][THREADS] == 1


@every_training
def test_the_flag_keeps_the_bits_whatever_the_environment_says(
    stopped, undisturbed, capsys, threads, name
):
    folder, resume = stopped(name)
    threads(2)
    resume("--num_threads", 1)
    assert said(capsys) == []
    assert_identical(state_of(folder, name), state_of(undisturbed(name), name))


@every_training
def test_the_same_number_of_threads_is_not_mentioned(stopped, undisturbed, capsys, name):
    folder, resume = stopped(name)
    resume()
    assert said(capsys) == []
    assert_identical(state_of(folder, name), state_of(undisturbed(name), name))


def test_the_start_says_how_many_threads_were_chosen(lines, tmp_path, capsys):
    run(*lines["pretrain"], "--num_threads", 2, "--output_dir", tmp_path)
    assert ", 2 threads, " in capsys.readouterr().out


@pytest.mark.parametrize("given", [[], ["--num_threads", 2]])
def test_checkpoints_of_older_versions_say_nothing_of_threads(stopped, capsys, given):
    def age(content):
        for name in ("--num_threads", "device"):
            content["recipe"].pop(name, None)
        content.pop("versions")
        content.pop("args")

    _, resume = stopped("pretrain", age)
    resume(*given)
    out = capsys.readouterr().out
    assert "continuing with a change" not in out
    assert not any(text in out for text in SAYS)


@every_training
@pytest.mark.parametrize("word", WRONG, ids=repr)
def test_a_number_of_threads_that_cannot_be_is_refused(tmp_path, capsys, lines, name, word):
    capsys.readouterr()
    folder = tmp_path / "run"
    sentence = refusal(
        capsys,
        *lines[name],
        *("--num_threads", word, "--output_dir", folder),
        main=MAINS[name].main,
    )
    assert "--num_threads" in sentence and "unknown flag" not in sentence
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [None, 2])
def test_a_run_moves_between_machines_of_other_cores_without_a_change(tmp_path, lines, processes):
    """Killed and continued under other variables, the flag keeps its bits."""
    folders = {"whole": tmp_path / "whole", "moved": tmp_path / "moved"}
    argv = [*lines["pretrain"], "--num_threads", 2, *EACH_STEP]
    argv += ["--batch_size", 4] if processes else []

    def go(folder, **variables):
        words = command(NANO_MAIN, "pretrain", *argv, "--output_dir", folder, processes=processes)
        code, out, err = finish(start(words, **variables))
        assert code == 0, err
        return out

    go(folders["whole"], OMP_NUM_THREADS="1")
    go(folders["moved"], OMP_NUM_THREADS="2", MKL_NUM_THREADS="1")
    for path in list_checkpoints(folders["moved"])[2:]:
        path.unlink()
    out = go(folders["moved"], OMP_NUM_THREADS="3")
    assert "after 0 epochs and 2 steps" in out
    assert not any(text in out for text in SAYS)
    assert_identical(state_of(folders["moved"]), state_of(folders["whole"]))


# Versions, kernels, device and batches

OTHER = {
    "torch": lambda content: content["versions"].update(torch="2.6.0"),
    "torchvision": lambda content: content["versions"].update(torchvision="0.21.0"),
    "timm": lambda content: content["versions"].update(timm="1.0.9"),
    "cpu_capability": lambda content: content["versions"].update(cpu_capability="NO AVX"),
    "cpu_linear": lambda content: content["versions"].update(cpu_linear="another"),
    "jpeg_decoder": lambda content: content["versions"].update(jpeg_decoder="torchcodec 0.1"),
    "device": lambda content: content["recipe"].update(device="NVIDIA H200"),
    "--batch_size": lambda content: content["args"].update(batch_size=4),
    "--attention_backend": lambda content: content["args"].update(attention_backend="math"),
    "--compile": lambda content: content["args"].update(compile="blocks"),
}


@pytest.mark.parametrize("what", OTHER)
def test_what_else_changes_the_last_bits_is_named_on_resume(stopped, capsys, what):
    _, resume = stopped("pretrain", OTHER[what])
    resume()
    (warning,) = said(capsys)
    assert f": {what} was " in warning and " and is now " in warning


def test_all_that_changes_the_last_bits_takes_two_lines(stopped, capsys, threads):
    def change_all(content):
        for change in OTHER.values():
            change(content)

    _, resume = stopped("pretrain", change_all)
    threads(2)
    resume()
    of_threads, of_others = said(capsys)
    assert "threads was 1 and is now 2" in of_threads
    assert all(f"{what} was " in of_others for what in OTHER)


@every_training
def test_other_versions_are_named_by_every_main(stopped, capsys, name):
    _, resume = stopped(name, OTHER["torch"])
    resume()
    (warning,) = said(capsys)
    assert "torch was '2.6.0' and is now " in warning


@pytest.mark.parametrize("name", ["commit", "python"])
def test_what_does_not_compute_is_not_mentioned(stopped, capsys, name):
    _, resume = stopped("pretrain", lambda content: content["versions"].update({name: "other"}))
    resume()
    assert said(capsys) == []


FLAGS = {
    "--batch_size": ["--batch_size", 4, "--accum_iter", 2],
    "--attention_backend": ["--attention_backend", "math"],
    "--memory medium": ["--memory", "medium"],
    "--memory low": ["--memory", "low"],
    "--num_workers": ["--num_workers", 2],
    "--log_every": ["--log_every", 3],
    "--knn_images": ["--knn_images", 8],
    "--max_broken": ["--max_broken", 0.3],
    "--save_every": ["--save_every", 7],
    "--timeout_minutes": ["--timeout_minutes", 3],
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_that_changes_the_bits_is_never_silent(stopped, undisturbed, capsys, flag):
    folder, resume = stopped("pretrain")
    resume(*FLAGS[flag])
    named = any(f"{flag} was " in line for line in said(capsys))
    keys = ("model", "optimizer")
    ends = [last_checkpoint(place) for place in (folder, undisturbed("pretrain"))]
    try:
        assert_identical(*({key: end[key] for key in keys} for end in ends))
    except AssertionError:
        assert named, f"{flag} changed the bits, and nothing said so"


def test_the_numbers_are_in_args_json_too(lines, tmp_path):
    run(*lines["pretrain"], "--num_threads", 2, "--output_dir", tmp_path)
    assert json.loads((tmp_path / "args.json").read_text())["args"]["num_threads"] == 2
