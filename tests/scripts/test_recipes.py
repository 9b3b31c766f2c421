"""The recipes match the paper's Tables 1, 11, 12, 14, 16 and 17; nothing is trained."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
import torch

import main_detection
import main_finetune
import main_pretrain
from main_finetune import Recipe
from scripts import launch
from tests.helpers import runs
from tests.helpers.processes import ROOT
from util.compute.precision import Precision
from util.data.broken_images import BrokenImages
from util.runs.checkpoint import CheckpointWriter, Progress, TrainState

RECIPES = ROOT / "scripts" / "recipes"
EXPECTED = {  # in the paper, in percent
    "table1_mae": [78.9, 83.3, 85.4, 85.8],
    "table1_crossmae_25": [79.2, 83.5, 85.4, 86.3],
    "table1_crossmae_75": [79.3, 83.7, 85.4, 86.4],
    "table11_finetune": [83.7],
    "table12_mae": [49.7, 65.1],
    "table12_crossmae": [51.5, 65.4],
    "table14_seeds": [83.20, 83.29, 83.24, 83.21, 83.24, 0.018],
    "table16_inat2019": [79.8, 79.4, 80.1],
    "table16_places365": [57.9, 57.9, 57.8],
    "table17_ade20k": [47.7, 48.15],
    "table2_coco": [51.2, 45.5, 52.1, 46.3, 54.6, 48.6, 54.9, 48.8],
}
TABLE1 = {  # kind of model and pred_ratio, which MAE does not have
    "table1_mae": ("mae", None),
    "table1_crossmae_25": ("crossmae", 0.25),
    "table1_crossmae_75": ("crossmae", 0.75),
}
# Table 11 has one drop path and the epochs of B and L; the rest is from the authors' commands.
FINE_TUNING = {
    "small": ("small_patch16", Recipe(epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.1)),
    "base": ("base_patch16", Recipe(epochs=100, blr=5e-4, layer_decay=0.65, drop_path=0.1)),
    "large": ("large_patch16", Recipe(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.2)),
    "huge": ("huge_patch14", Recipe(epochs=50, blr=1e-3, layer_decay=0.75, drop_path=0.3)),
}
EFFECTIVE = {
    "main_pretrain": 4096,
    "main_finetune": 1024,
    "main_linprobe": 16384,
    "main_segmentation": 16,
    "main_detection": 64,
}
MAINS = {main.__name__: main for main in runs.MAINS.values()}
PRETRAINED = "weights/vit.pth"
PROBES = {"table12_mae": "table1_mae", "table12_crossmae": "table1_crossmae_75"}
TRANSFERS = {"table16_inat2019": "inat2019", "table16_places365": "torch/places365"}
ROWS = [
    *((script, size) for script in TABLE1 for size in FINE_TUNING),
    *((script, size) for script in PROBES for size in ("small", "base")),
    *(("table14_seeds", str(seed)) for seed in (1, 2, 3, 4)),
    *(
        (script, PRETRAINED)
        for script in ("table11_finetune", *TRANSFERS, "table17_ade20k", "table2_coco")
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with images, a checkpoint, and Table 1's checkpoints for Table 12."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "data").mkdir()
    files = [f"output/{name}_{size}/{written(800)}" for name in TABLE1 for size in FINE_TUNING]
    for file in (PRETRAINED, *files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


@pytest.fixture
def start(place):
    """Start a recipe; return the finished process."""

    def start(script, *words, root=ROOT, **variables):
        words = [str(place / word) if word == PRETRAINED else word for word in words]
        env = {
            "PATH": os.environ["PATH"],
            "DATA": str(place / "data"),
            "OUTPUT": str(place / "output"),
            "DRY_RUN": "1",
            **variables,
        }
        path = root / "scripts" / "recipes" / f"{script}.sh"
        return subprocess.run(["bash", path, *words], env=env, capture_output=True, text=True)

    return start


@pytest.fixture
def commands(start, place):
    """Commands of a recipe, each as (processes, the main's name, its arguments)."""

    def commands(script, *words, **variables):
        done = start(script, *words, **variables)
        assert (done.returncode, done.stderr) == (0, "")
        found = []
        for line in done.stdout.splitlines():
            launch, main, arguments = re.fullmatch(r"(.*) (\w+)\.py (.*)", line).groups()
            assert "-m torch.distributed.run --standalone --nproc_per_node" in launch
            args = MAINS[main].parse_args(shlex.split(arguments))
            assert args.data_path == str(place / "data")
            found.append((int(launch.split()[-1]), main, args))
        return found

    return commands


def written(epochs):
    """Name of a run's final checkpoint."""
    return f"checkpoint-e{epochs:04d}-s000000.pth"


def test_every_row_has_a_script_and_every_script_a_row():
    assert {path.stem for path in RECIPES.glob("table*.sh")} == EXPECTED.keys()
    assert {script for script, _ in ROWS} == EXPECTED.keys()
    named = re.findall(r"`(table\w+)\.sh`", (RECIPES / "README.md").read_text())
    assert sorted(named) == sorted(EXPECTED)


@pytest.mark.parametrize("script", EXPECTED)
def test_a_script_begins_with_the_expected_result(script):
    path = RECIPES / f"{script}.sh"
    shebang, title, expected, ours, *_ = path.read_text().splitlines()
    assert shebang == "#!/usr/bin/env bash"
    assert os.access(path, os.X_OK)
    assert title.startswith(f"# Table {re.search('[0-9]+', script)[0]}, ")
    assert expected.startswith("# Expected: ")
    assert [float(number) for number in re.findall(r"\d+\.\d+", expected)] == EXPECTED[script]
    assert ours == ("# Ours: not run. Written for 8 GPUs of 80 GB; memory and time: not measured.")


@pytest.mark.parametrize(("script", "word"), ROWS)
def test_the_effective_batch_is_the_paper_s_on_any_number_of_gpus(commands, script, word):
    for variables in ({}, {"GPUS": "1"}, {"GPUS": "4"}, {"GPUS": "8", "BATCH_SIZE": "16"}):
        for processes, main, args in commands(script, word, **variables):
            assert processes == int(variables.get("GPUS", 8))
            assert processes * args.batch_size * args.accum_iter == EFFECTIVE[main]
            assert args.batch_size <= int(variables.get("BATCH_SIZE", 512))


@pytest.mark.parametrize("size", FINE_TUNING)
@pytest.mark.parametrize("script", TABLE1)
def test_table_1_pretrains_and_finetunes(commands, script, size):
    (_, first, pretrain), (_, second, finetune) = commands(script, size)
    assert (first, second) == ("main_pretrain", "main_finetune")
    kind, pred_ratio = TABLE1[script]
    name, recipe = FINE_TUNING[size]
    assert pretrain.model == f"{kind}_vit_{name}"
    assert (pretrain.epochs, pretrain.mask_ratio, pretrain.pred_ratio) == (800, 0.75, pred_ratio)
    assert finetune.finetune == f"{pretrain.output_dir}/{written(800)}"
    assert main_finetune.resolve_recipe(finetune, name) == recipe


@pytest.mark.parametrize("seed", [1, 4])
def test_table_14_pretrains_and_finetunes_with_its_seed(commands, seed):
    (_, first, pretrain), (_, second, finetune) = commands("table14_seeds", str(seed))
    assert (first, second) == ("main_pretrain", "main_finetune")
    assert pretrain.model == "crossmae_vit_base_patch16"
    assert (pretrain.epochs, pretrain.mask_ratio, pretrain.pred_ratio) == (400, 0.75, 0.25)
    assert finetune.finetune == f"{pretrain.output_dir}/{written(400)}"
    assert pretrain.seed == finetune.seed == seed


@pytest.mark.parametrize("script", ["table11_finetune", *TRANSFERS])
def test_tables_11_and_16_finetune_a_checkpoint(commands, place, script):
    ((_, main, args),) = commands(script, PRETRAINED)
    assert main == "main_finetune"
    assert args.finetune == str(place / PRETRAINED)
    assert args.dataset == TRANSFERS.get(script)
    assert args.auto_augment.startswith("rand-m9-mstd0.5")
    assert (args.smoothing, args.mixup, args.cutmix, args.weight_decay) == (0.1, 0.8, 1.0, 0.05)


def test_table_17_segments_with_upernet(commands, place):
    ((_, main, args),) = commands("table17_ade20k", PRETRAINED)
    assert main == "main_segmentation"
    assert args.finetune == str(place / PRETRAINED)
    assert (args.dataset, args.head, args.max_iters) == ("ade20k", "upernet", 160_000)
    assert (args.lr, args.layer_decay, args.drop_path, args.crop_size) == (1e-4, 0.65, 0.1, (512,))


def test_table_2_detects_with_vitdet(commands, place):
    ((_, main, args),) = commands("table2_coco", PRETRAINED)
    assert main == "main_detection"
    assert args.finetune == str(place / PRETRAINED)
    assert (args.input_size, args.window_size, args.rel_pos, args.fpn_dim) == (1024, 14, True, 256)
    assert (args.lr, args.weight_decay, args.lsj_scale) == (1e-4, 0.1, (0.1, 2.0))
    assert main_detection.SMALL_RECIPE == (100, 0.7, 0.1)  # epochs, layer decay, drop path
    assert main_detection.RECIPES["large_patch16"] == (100, 0.8, 0.4)


@pytest.mark.parametrize("size", ["small", "base"])
@pytest.mark.parametrize("script", PROBES)
def test_table_12_probes_what_table_1_pretrains(commands, script, size):
    ((_, main, probe),) = commands(script, size)
    (_, _, pretrain), _ = commands(PROBES[script], size)
    assert (main, probe.epochs) == ("main_linprobe", 90)
    assert probe.finetune == f"{pretrain.output_dir}/{written(800)}"


def test_every_run_has_its_own_output_folder(commands):
    runs = [args.output_dir for row in ROWS for _, _, args in commands(*row)]
    runs.append(commands("table11_finetune", str(RECIPES / "README.md"))[0][2].output_dir)
    assert len(set(runs)) == len(runs)


@pytest.mark.parametrize("epochs", [400, 800])
def test_a_run_that_ends_writes_the_checkpoint_that_is_finetuned(tmp_path, epochs):
    device = torch.device("cpu")
    model = torch.nn.Linear(1, 1)
    state = TrainState(
        model=model,
        optimizer=torch.optim.SGD(model.parameters()),
        precision=Precision("fp32", device),
        progress=Progress(epoch=epochs),
        broken=BrokenImages(1, 0.0),
    )
    options = {"kind": "pretrain", "every_minutes": None, "keep_last": 3}
    assert CheckpointWriter(tmp_path, state, {}, **options).save().name == written(epochs)


def test_further_arguments_go_to_their_main(commands):
    words = ["--save_every", "7", "--", "--ema", "0.5", "--save_every", "9"]
    for row in (("table1_mae", "base"), ("table14_seeds", "1")):
        (_, _, pretrain), (_, _, finetune) = commands(*row, *words)
        assert (pretrain.save_every, finetune.save_every, finetune.ema) == (7, 9, 0.5)
    for row in (("table11_finetune", PRETRAINED), ("table12_mae", "base")):
        ((_, _, args),) = commands(*row, "--save_every", "7")
        assert args.save_every == 7


@pytest.mark.parametrize("script", EXPECTED)
def test_a_script_without_its_argument_is_refused(start, script):
    done = start(script)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"{script}\.sh: error: (the size|the seed|checkpoint) .*\n", done.stderr)


@pytest.mark.parametrize(
    ("words", "variables", "sentence"),
    [
        (["table1_mae", "base"], {"DATA": ""}, "set DATA to the folder of the images"),
        (["table1_mae", "base"], {"DATA": "no/such"}, "DATA not found: 'no/such'"),
        (
            ["table1_mae", "tiny"],
            {},
            "the size must be one of small, base, large, huge, not 'tiny'",
        ),
        (["table12_mae", "large"], {}, "the size must be one of small, base, not 'large'"),
        (["table12_mae", "base"], {"OUTPUT": "none"}, "run scripts/recipes/table1_mae.sh base"),
        (["table11_finetune", "no.pth"], {}, "checkpoint not found: 'no.pth'"),
        (["table14_seeds", "-1"], {}, "the seed must be an integer of at least 1, not '-1'"),
        (
            ["table1_mae", "base"],
            {"GPUS": "two"},
            "GPUS must be an integer of at least 1, not 'two'",
        ),
        (["table1_mae", "base"], {"GPUS": "0"}, "GPUS must be an integer of at least 1, not '0'"),
        (
            ["table1_mae", "base"],
            {"BATCH_SIZE": "1.5"},
            "BATCH_SIZE must be an integer of at least 1",
        ),
        (["table1_mae", "base"], {"GPUS": "3"}, "set GPUS and BATCH_SIZE to powers of two"),
        (["table1_mae", "base"], {"GPUS": "8192"}, "cannot form a batch of 4096"),
        (["table1_mae", "base"], {"BATCH_SIZE": "300"}, "up to 300 images each cannot form"),
    ],
)
def test_mistakes_are_reported_in_one_sentence(start, words, variables, sentence):
    done = start(*words, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr


HARDWARE = {"hardware_1gpu": 1, "hardware_4xa100": 4, "hardware_2x8": 16, "hardware_cpu": 1}


@pytest.mark.parametrize(("script", "processes"), HARDWARE.items())
def test_hardware_recipes_parse_and_begin_with_time_and_memory(start, place, script, processes):
    text = (RECIPES / f"{script}.sh").read_text()
    assert os.access(RECIPES / f"{script}.sh", os.X_OK)
    opening = text[: text.index("set -euo")]
    assert re.search(r"^# Time: ", opening, re.M) and re.search(r"^# Memory.*: ", opening, re.M)
    assert ("not measured" in opening) == (script != "hardware_cpu")
    done = start(script, *(["--"] if script == "hardware_2x8" else []), "--save_every", "7")
    assert (done.returncode, done.stderr) == (0, "")
    words = shlex.split(done.stdout)
    if script == "hardware_2x8":
        launched, main_argv = launch.parse_args(words[words.index("--main") :])
        assert (launched.main, launched.cluster) == ("pretrain", "slurm")
        assert launched.nodes * launched.gpus_per_node == processes
    else:
        main_argv = words[words.index("main_pretrain.py") + 1 :]
    args = main_pretrain.parse_args(main_argv)
    assert (args.data_path, args.save_every) == (str(place / "data"), 7)
    assert args.output_dir == str(place / "output" / script)
    assert (args.mask_ratio, args.pred_ratio) == (0.75, 0.25)
    if script != "hardware_cpu":
        assert (args.model, args.epochs) == ("crossmae_vit_base_patch16", 800)
        assert args.effective_batch_size == 4096
        assert args.batch_size == "auto" or 4096 % (processes * args.batch_size) == 0


def test_without_data_the_cpu_recipe_uses_the_digits(start):
    assert "--dataset digits" in start("hardware_cpu", DATA="").stdout


@pytest.mark.parametrize("code", [0, 1])
def test_commands_run_as_shown_until_one_fails(start, tmp_path, code):
    shutil.copytree(RECIPES, tmp_path / "scripts" / "recipes")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nprintf "%s|" "$0" "$@" >>calls\necho >>calls\nexit {code}\n')
    python.chmod(0o755)
    done = start("table1_mae", "base", "--model", "a b", root=tmp_path, DRY_RUN="")
    assert done.returncode == code
    shown = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(shown) == (2 if code == 0 else 1)
    called = (tmp_path / "calls").read_text().splitlines()
    assert [line.split("|")[:-1] for line in called] == shown
    assert shown[0][-2:] == ["--model", "a b"]
