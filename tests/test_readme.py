"""What the README tells one to type is there and works."""

import re
import shlex

import pytest
from runs import ROOT, run, write_images

import main_pretrain
from main_pretrain import parse_args
from util.checkpoint import list_checkpoints

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


def arguments(words):
    return parse_args(words[words.index("main_pretrain.py") + 1 :])


def test_every_kind_of_command_is_found():
    programs = {words[0] for words in IN_README}
    assert {"bash", "python", "torchrun", "source"} <= programs
    assert len(RUNS) >= 5


@pytest.mark.parametrize("words", RUNS, ids=" ".join)
def test_commands_of_pretraining_parse(words):
    args = arguments(words)
    assert args.output_dir.startswith("output/")
    if words[0] == "torchrun":  # at the effective batch size of Table 10
        processes = int(words[words.index("--nproc_per_node") + 1])
        assert processes * args.batch_size * args.accum_iter == 4096
        assert args.epochs == 800
    if args.pred_ratio is not None:
        assert args.output_dir.endswith("g25") == (args.pred_ratio == 0.25)


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
    assert flags <= vars(parse_args([])).keys()


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


def test_the_encoder_is_used_as_shown(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", 4)
    size = ["--model", "crossmae_vit_tiny_patch16", "--decoder_depth", 1]
    argv = [*size, "--data_path", images, "--batch_size", 4, "--epochs", 1, "--num_workers", 0]
    run(*argv, "--output_dir", tmp_path)
    (snippet,) = blocks("python")
    snippet, num_replaced = re.subn(r'"output/[^"]*\.pth"', "path", snippet)
    assert num_replaced == 1
    names = {"path": list_checkpoints(tmp_path)[-1]}
    exec(snippet, names)
    assert names["features"].shape == (2, 1 + 196, 192)
    assert "(2, 1 + 196, 768)" in snippet  # of a base model
    assert {"mean", "std"} <= names["training"].keys()


def test_the_names_of_checkpoints_are_as_shown(tmp_path):
    for name in re.findall(r"checkpoint-[\w-]+\.pth", README):
        (tmp_path / name).touch()
        assert list_checkpoints(tmp_path) == [tmp_path / name]


@pytest.mark.parametrize("model", ["crossmae_vit_base_patch16", "mae_vit_base_patch16"])
def test_the_models_of_the_commands_exist(model):
    assert model in main_pretrain.MODELS
    assert any(model in words for words in RUNS)
