"""What the README tells one to type is there and works."""

import re
import shlex
from pathlib import Path

import pytest

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
import models
from main_pretrain import parse_args
from scripts import benchmark_loader, benchmark_pretrain, export_encoder, launch_slurm
from tests.helpers.files import write_images
from tests.helpers.processes import ROOT
from tests.helpers.runs import run
from util.runs.checkpoint import BEST_NAME, list_checkpoints

README = (ROOT / "README.md").read_text()
QUICKSTART = (ROOT / "scripts" / "quickstart.sh").read_text()


def blocks(language, text=README):
    """The code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The commands of a shell text as lists of words, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


IN_README = [words for block in blocks("bash") for words in commands(block)]
RUNS = [words for words in IN_README if "main_pretrain.py" in words]
OTHER_MAINS = {
    "main_finetune.py": main_finetune,
    "main_linprobe.py": main_linprobe,
    "main_knn.py": main_knn,
}
BENCHMARKS = {"steps": benchmark_pretrain, "loader": benchmark_loader}
OTHER_RUNS = [words for words in IN_README if OTHER_MAINS.keys() & set(words)]
EXPORTS = [words for words in IN_README if "scripts/export_encoder.py" in words]
LAUNCHES = [words for words in IN_README if "scripts/launch_slurm.py" in words]
SNIPPETS = blocks("python")


def arguments(words, main="main_pretrain.py", parse=parse_args):
    return parse(words[words.index(main) + 1 :])


def test_every_kind_of_command_is_found():
    programs = {words[0] for words in IN_README}
    assert {"bash", "python", "torchrun", "source"} <= programs
    assert len(RUNS) >= 5
    assert len(EXPORTS) == len(SNIPPETS) == 3
    assert LAUNCHES
    assert {main for main in OTHER_MAINS for words in OTHER_RUNS if main in words} == set(
        OTHER_MAINS
    )


@pytest.mark.parametrize("words", OTHER_RUNS, ids=" ".join)
def test_commands_of_the_other_mains_parse(words):
    (name,) = OTHER_MAINS.keys() & set(words)
    args = arguments(words, name, OTHER_MAINS[name].parse_args)
    folders = {arguments(other).output_dir for other in RUNS}
    folders |= {word.replace("output_dir ", "") for word in words if word.endswith("-finetuned")}
    assert any(args.finetune.startswith(folder) for folder in folders)
    if words[0] == "torchrun":
        effective = int(words[words.index("--nproc_per_node") + 1])
        effective *= args.batch_size * args.accum_iter
        assert effective == {"main_finetune.py": 1024, "main_linprobe.py": 16384}[name]


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_commands_of_pretraining_parse(words):
    args = arguments(words)
    assert args.output_dir.startswith("output/")
    if words[0] == "torchrun":  # at the effective batch size of Table 10
        processes = int(words[words.index("--nproc_per_node") + 1])
        effective = args.effective_batch_size or processes * args.batch_size * args.accum_iter
        assert effective == 4096
        assert args.epochs == 800
    if args.pred_ratio is not None:
        assert args.output_dir.endswith("g25") == (args.pred_ratio == 0.25)


@pytest.mark.parametrize("words", LAUNCHES, ids=" ".join)
def test_commands_of_the_launcher_parse(words):
    name = "scripts/launch_slurm.py"
    args, main_argv = arguments(words, name, launch_slurm.parse_args)
    assert args.main == "pretrain"
    main_args = parse_args(main_argv)
    assert main_args.effective_batch_size == 4096
    assert 4096 % (args.nodes * args.gpus_per_node * main_args.batch_size) == 0


@pytest.mark.parametrize("script", BENCHMARKS.values(), ids=BENCHMARKS)
def test_commands_of_the_benchmarks_parse(script):
    pages = README, (ROOT / "docs" / "performance.md").read_text()
    found = [c for page in pages for b in blocks("bash", page) for c in commands(b)]
    name = f"scripts/{script.__name__.rpartition('.')[2]}.py"
    runs = [words for words in found if name in words]
    assert len(runs) >= 2
    for words in runs:
        words = [__file__ if word == "PROGRAM.py" else word for word in words]
        arguments(words, name, script.parse_args)


def test_no_two_different_runs_share_an_output_folder():
    # The one-GPU and the eight-GPU command of a setting are two ways to the same run.
    folders = {}
    for words in RUNS:
        args = arguments(words)
        folders.setdefault(args.output_dir, set()).add((args.model, args.pred_ratio))
    assert all(len(settings) == 1 for settings in folders.values()), folders


TABLE = [line for line in README.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("options", re.findall(r"`(--.*?)`", "\n".join(TABLE)))
def test_ablations_of_the_paper_parse(options):
    parse_args(shlex.split(options))


def test_flags_that_are_named_exist():
    flags = set(re.findall(r"`--(\w+)", README))
    assert {"resume", "save_every_minutes", "max_broken"} <= flags
    mains = [main_pretrain, *OTHER_MAINS.values()]
    known = set().union(
        *(vars(main.parse_args(["--finetune", "x"] * (main != main_pretrain))) for main in mains)
    )
    launcher, _ = launch_slurm.parse_args(["--main", "pretrain", "--"])
    known |= vars(launcher).keys() | {"slurm_X"}
    assert flags <= known


def test_scripts_and_files_that_are_named_exist():
    named = {
        word for words in IN_README for word in words if re.fullmatch(r"[\w/]+\.(py|sh|txt)", word)
    }
    named |= set(re.findall(r"`((?:[\w]+/)*[\w]+\.(?:py|sh))`", README))
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_links_lead_somewhere():
    links = set(re.findall(r"\]\((?!https?:)([^)#]+)", README))
    assert [link for link in sorted(links) if not (ROOT / link).exists()] == []


def test_the_quickstart_parses():
    (words,) = (words for words in commands(QUICKSTART) if "main_pretrain.py" in words)
    args = arguments([word for word in words if word != "$@"])
    assert args.dataset == "digits"
    assert args.output_dir == "output/quickstart"
    (words,) = (words for words in commands(QUICKSTART) if "main_knn.py" in words)
    args = arguments(words, "main_knn.py", main_knn.parse_args)
    assert args.dataset == "digits"
    assert args.untrained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    images = write_images(folder / "images", 4)
    size = ["--model", "crossmae_vit_tiny_patch16", "--decoder_depth", 1]
    argv = [*size, "--data_path", images, "--batch_size", 4, "--epochs", 1, "--num_workers", 0]
    run(*argv, "--output_dir", folder)
    return list_checkpoints(folder)[-1]


@pytest.fixture(scope="module")
def places(checkpoint):
    """Where the files that the README names are: each export is run as shown."""
    found = {}
    for words in EXPORTS:
        words = [checkpoint if word.endswith(".pth") and "-e0" in word else word for word in words]
        named = words[words.index("--output") + 1]
        found[named] = checkpoint.parent / Path(named).name
        argv = [found.get(word, word) for word in words[2:]]
        run(*argv, main=export_encoder.main)
    return found


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["here", "timm", "hugging face"])
def test_the_encoder_is_used_as_shown(snippet, checkpoint, places):
    lines = [line for line in snippet.splitlines() if line]
    assert sum(not line.startswith(("import", "from")) for line in lines) <= 5
    for named, place in places.items():
        snippet = snippet.replace(f'"{named}"', f'"{place}"')
    snippet = re.sub(r'"output/[^"]*\.pth"', f'"{checkpoint}"', snippet)
    snippet = snippet.replace("vit_base", "vit_tiny")
    assert "output/" not in snippet.replace(str(checkpoint.parent), "")
    names = {}
    exec(snippet, names)
    shape = re.search(r"# \(([^)]*)\)", snippet)[1].replace("768", "192")  # of a tiny model
    assert names["features"].shape == eval(f"({shape})")


def test_the_names_of_checkpoints_are_as_shown(tmp_path):
    for name in set(re.findall(r"checkpoint-[\w-]+\.pth", README)) - {BEST_NAME}:
        (tmp_path / name).touch()
        assert list_checkpoints(tmp_path) == [tmp_path / name]


@pytest.mark.parametrize("model", ["crossmae_vit_base_patch16", "mae_vit_base_patch16"])
def test_the_models_of_the_commands_exist(model):
    assert model in models.MODELS
    assert any(model in words for words in RUNS)
