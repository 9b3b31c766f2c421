"""README and the pages of docs: commands parse, quick ones run, and links lead somewhere."""

import itertools
import os
import re
import shlex
import subprocess
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

import pytest

import main_finetune
import main_linprobe
import models
from main_pretrain import parse_args
from scripts import export_encoder, launch, visualize_reconstruction
from tests.helpers import runs
from tests.helpers.files import write_classes, write_images
from tests.helpers.processes import ROOT
from tests.helpers.runs import run
from util.arguments import Parser
from util.runs.checkpoint import BEST_NAME, list_checkpoints

NAMES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
NAMES.append("scripts/recipes/README.md")
PAGES = {name: (ROOT / name).read_text() for name in NAMES}
README = PAGES["README.md"]
QUICKSTART = (ROOT / "scripts" / "quickstart.sh").read_text()
EXTENDING = "docs/extending.md"  # its commands need its code: tests/test_extending.py


def blocks(language, text=README):
    """The code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The commands of a shell text as lists of words, continued lines joined."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def all_commands(page):
    """The commands in a page's code blocks, and the whole ones between single backticks."""
    inline = re.findall(r"`((?:python|torchrun|bash|\w+=\S+ bash) [^`\n]+)`", page)
    texts = [*blocks("bash", page), *(text for text in inline if "..." not in text)]
    return [words for text in texts for words in commands(text) if "--help" not in words]


COMMANDS = [
    (name, words)
    for name, page in PAGES.items()
    if name != EXTENDING
    for words in all_commands(page)
]
MAINS = {f"{main.__name__}.py": main for main in runs.MAINS.values()}
EFFECTIVE = {
    "main_pretrain.py": 4096,
    "main_finetune.py": 1024,
    "main_linprobe.py": 16384,
    "main_segmentation.py": 16,
    "main_detection.py": 64,
}


def program(words):
    """The Python program of a command, if it has one."""
    found = [word for word in words if re.fullmatch(r"(main_\w+|scripts/\w+)\.py", word)]
    return found[0] if found else None


def after(words, name):
    return words[words.index(name) + 1 :]


def with_program(name, pages=PAGES):
    return [words for page, words in COMMANDS if page in pages and program(words) == name]


MEASURED = ("docs/results.md", "docs/performance.md", "docs/analyses.md")  # small runs

ids = {"ids": lambda value: " ".join(value) if isinstance(value, list) else str(value)}
PYTHON = [(name, words) for name, words in COMMANDS if program(words)]
RECIPES = [words for _, words in COMMANDS if any("scripts/recipes/" in word for word in words)]
SNIPPETS = [
    text for page in (README, PAGES["docs/downstream.md"]) for text in blocks("python", page)
]
EXPORTS = with_program("scripts/export_encoder.py", ["docs/downstream.md"])


def test_every_kind_of_command_is_found():
    assert {words[0] for _, words in COMMANDS} >= {"bash", "python", "torchrun", "pip"}
    assert {program(words) for words in (words for _, words in PYTHON)} >= {
        *MAINS,
        "scripts/export_encoder.py",
        "scripts/launch.py",
        "scripts/prepare_dataset.py",
        "scripts/visualize_reconstruction.py",
        "scripts/benchmark_pretrain.py",
        "scripts/benchmark_loader.py",
    }
    with_commands = {name for name, _ in COMMANDS}
    pages = ("pretraining", "clusters", "downstream", "faq", "performance", "results")
    assert {"README.md", *(f"docs/{page}.md" for page in pages)} <= with_commands
    assert len(EXPORTS) == 6
    assert len(SNIPPETS) == 3
    assert len(RECIPES) >= 3


class ParsedError(Exception):
    """A command line has been parsed, and nothing else was done."""


def parse(name, argv, monkeypatch):
    """Parse a command line by its program; return the namespace where that is all it does."""
    if name in MAINS:
        return MAINS[name].parse_args(argv)
    if name == "scripts/launch.py":
        args, main_argv = launch.parse_args(argv)
        MAINS[f"main_{args.main}.py"].parse_args(main_argv)
        return args
    parse_args = Parser.parse_args

    def parse_only(parser, *args):
        raise ParsedError(parse_args(parser, *args))

    monkeypatch.setattr(Parser, "parse_args", parse_only)
    with pytest.raises(ParsedError) as parsed:
        import_module(name.removesuffix(".py").replace("/", ".")).main(argv)
    return parsed.value.args[0]


@pytest.mark.parametrize(("page", "words"), PYTHON, **ids)
def test_commands_parse(page, words, monkeypatch):
    name = program(words)
    argv = [__file__ if word == "PROGRAM.py" else word for word in after(words, name)]
    args = parse(name, argv, monkeypatch)
    assert "torchrun" not in words or name in MAINS
    if page in MEASURED or name not in MAINS:
        return
    if words[0] == "torchrun":
        assert words[1] == "--standalone" or "--nnodes" in words
        processes = int(words[words.index("--nproc_per_node") + 1])
        nodes = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
        given = getattr(args, "effective_batch_size", None)
        assert EFFECTIVE[name] == (given or nodes * processes * args.batch_size * args.accum_iter)
        if name == "main_pretrain.py":
            assert args.epochs == 800
    if name == "main_pretrain.py" and args.pred_ratio is not None and "--output_dir" in words:
        assert args.output_dir.endswith("g25") == (args.pred_ratio == 0.25)


@pytest.mark.parametrize("words", with_program("scripts/launch.py"), ids=" ".join)
def test_jobs_have_the_paper_s_batch(words):
    args, main_argv = launch.parse_args(after(words, "scripts/launch.py"))
    main_args = parse_args(main_argv)
    if main_args.effective_batch_size is not None:
        assert main_args.effective_batch_size == 4096
        assert 4096 % (args.nodes * args.gpus_per_node * main_args.batch_size) == 0


@pytest.mark.parametrize("words", RECIPES, ids=" ".join)
def test_commands_with_recipes_show_what_they_would_run(words, tmp_path):
    variables = dict(word.split("=") for word in words[: words.index("bash")])
    assert variables["DATA"] == "/path/to/imagenet"
    variables |= {"DATA": str(tmp_path), "DRY_RUN": "1", "PATH": os.environ["PATH"]}
    words = words[words.index("bash") :]
    done = subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "main_pretrain.py" in done.stdout


def test_checkpoints_that_are_read_have_been_written():
    folders = {parse_args(after(w, "main_pretrain.py")).output_dir for w in PRETRAININGS}
    for main in list(MAINS)[1:]:
        for words in with_program(main, ["README.md", "docs/downstream.md"]):
            flag = "--checkpoint" if "--checkpoint" in words else "--finetune"
            path = words[words.index(flag) + 1]
            if path.startswith("output/") and not path.endswith(BEST_NAME):
                assert str(Path(path).parent) in folders


PRETRAININGS = with_program("main_pretrain.py", ["README.md", "docs/pretraining.md"])


def test_no_two_different_runs_share_an_output_folder():
    # The one-GPU and the eight-GPU command of a setting are two ways to the same run.
    folders = {}
    for words in PRETRAININGS:
        args = parse_args(after(words, "main_pretrain.py"))
        folders.setdefault(args.output_dir, set()).add((args.model, args.pred_ratio))
    assert all(len(settings) == 1 for settings in folders.values()), folders


ABLATIONS = PAGES["docs/pretraining.md"].partition("ablations\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("options", re.findall(r"`(--.*?)`", ABLATIONS))
def test_ablations_of_the_paper_parse(options):
    parse_args(shlex.split(options))


def known_flags():
    """The flags of all programs here."""
    parsed = [main.parse_args(["--finetune", "x"]) for main in list(MAINS.values())[1:]]
    parsed += [parse_args([]), launch.parse_args(["--main", "pretrain", "--"])[0]]
    folders = ("util", "scripts")
    sources = [*ROOT.glob("*.py"), *(p for f in folders for p in (ROOT / f).rglob("*.py"))]
    written = (re.findall(r'"--([a-z]\w*)"', path.read_text()) for path in sources)
    return set().union(*map(vars, parsed), *written) | {"help", "no", "slurm_X"}


OTHER_FLAGS = {  # of torchrun, scancel, pytest and scripts/test.sh; of MAE; of an example
    "docs/clusters.md": {"standalone"},
    "docs/reliability.md": {"signal", "nnodes", "max", "basetemp"},
    "docs/experiments.md": {"max"},
    "docs/pretraining.md": set(
        re.findall(r"--(\w+)", PAGES["docs/pretraining.md"].partition("| MAE | here |")[2])
    ),
    EXTENDING: {"loss"},
}


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_are_named_exist(page):
    flags = set(re.findall(r"`(?:[\w.]+ )*--(\w+)", PAGES[page]))
    assert flags - known_flags() - OTHER_FLAGS.get(page, set()) <= {"logdir"}  # TensorBoard's


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    """Files, and headings within them."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, heading = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in headings}
            assert heading in slugs, link


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    names = re.findall(r"`((?:[\w.]+/)+[\w.]+\.(?:py|sh|md|json|png|svg|ipynb))`", PAGES[page])
    names += [
        w for p, words in COMMANDS if p == page for w in words if re.fullmatch(r"[\w/]+\.sh", w)
    ]
    assert [name for name in sorted(set(names)) if not (ROOT / name).exists()] == []


def test_the_map_names_every_module():
    text = README.partition("## The code, in reading order")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)(?:\.py)?`", text))
    modules = {path.stem for path in (ROOT / "util").rglob("*.py")} - {"__init__"}
    assert modules <= named, modules - named
    assert {p.stem for p in ROOT.glob("*.py")} <= named


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 240


def test_the_quickstart_parses():
    words, next_ones = (w for w in commands(QUICKSTART) if "main_pretrain.py" in w)
    args = parse_args([word for word in after(words, "main_pretrain.py") if word != "$@"])
    assert args.dataset == "digits"
    assert args.output_dir == "output/quickstart"
    probing = next(w for w in commands(QUICKSTART) if "main_linprobe.py" in w)
    probed = main_linprobe.parse_args(after(probing, "main_linprobe.py")).finetune
    assert probed == f"{args.output_dir}/checkpoint-e{args.epochs:04d}-s000000.pth"
    assert parse_args(after(next_ones, "main_pretrain.py")).data_path == "/path/to/images"


@pytest.mark.parametrize("model", ["crossmae_vit_base_patch16", "mae_vit_base_patch16"])
def test_the_models_of_the_commands_exist(model):
    assert model in models.MODELS
    assert any(model in words for words in PRETRAININGS)


def test_the_names_of_checkpoints_are_as_shown(tmp_path):
    named = set(re.findall(r"checkpoint-[\w-]+\.pth", "".join(PAGES.values()))) - {BEST_NAME}
    assert named
    for name in named:
        (tmp_path / name).touch()
        assert [path.name for path in list_checkpoints(tmp_path)] == [name]
        (tmp_path / name).unlink()


# Commands that run, on a tiny model

TINY = ["--model", "crossmae_vit_tiny_patch16", "--decoder_depth", 1, "--input_size", 224]
SMALL = [*TINY[:4], "--input_size", 32]
QUICK = ["--epochs", 1, "--batch_size", 8, "--num_workers", 0]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def logged(tmp_path_factory, images):
    """What the quickstart's program logs, on other images."""
    folder = tmp_path_factory.mktemp("logged")
    where = ["--data_path", images, "--output_dir", folder, "--num_workers", 0]
    with redirect_stdout(StringIO()) as log:
        run(*SMALL, *QUICK, *where, "--no-norm_pix_loss")
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in log.getvalue().splitlines()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    images = write_images(folder / "images", 4)
    run(*TINY, *QUICK, "--data_path", images, "--output_dir", folder)
    return list_checkpoints(folder)[-1]


def shape(line):
    """A line without its numbers, paths and widths."""
    line = re.sub(r"(output|/)[\w/.-]+", "PATH", line)
    return re.sub(r"\s+", " ", re.sub(r"[\d.]+(e-?\d+)?", "#", line)).strip()


def test_the_quickstart_s_output_is_as_shown(logged):
    (shown,) = blocks("text")
    logged = [shape(line) for line in logged]
    for line in shown.splitlines():
        beginning = shape(line.removesuffix(", ..."))
        assert any(entry.startswith(beginning) for entry in logged), (line, logged)


@pytest.mark.parametrize(
    "words",
    [words for words in PRETRAININGS if words[0] == "python" and "--repeated_aug" not in words],
    ids=" ".join,
)
def test_commands_of_pretraining_run(words, images, checkpoint, tmp_path):
    argv = after(words, "main_pretrain.py")
    if "--effective_batch_size" in argv:
        argv += ["--effective_batch_size", 8]
    if "--init_from" in argv:
        argv += ["--init_from", checkpoint]
    run(*argv, *SMALL, *QUICK, "--data_path", images, "--output_dir", tmp_path)
    assert list_checkpoints(tmp_path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, images, checkpoint):
    """Where fine-tuning as README shows it has written its best epoch."""
    folder = tmp_path_factory.mktemp("finetuned")
    words = next(w for w in with_program("main_finetune.py", ["README.md"]) if w[0] == "torchrun")
    argv = [*after(words, "main_finetune.py"), *QUICK, "--data_path", images, "--input_size", 32]
    run(*argv, "--finetune", checkpoint, "--output_dir", folder, main=main_finetune.main)
    return folder / BEST_NAME


ON_ENCODERS = {  # one of those that differ in nothing but paths
    (name, *sorted(word for word in words if word.startswith("--"))): words
    for name in ("main_finetune.py", "main_linprobe.py", "main_knn.py")
    for words in with_program(name, ["README.md", "docs/downstream.md"])
}


@pytest.mark.parametrize("words", ON_ENCODERS.values(), ids=" ".join)
def test_commands_on_an_encoder_run(words, images, checkpoint, classifier, tmp_path):
    name = program(words)
    evaluates = "--eval" in words
    argv = [*after(words, name), "--data_path", images, "--output_dir", tmp_path]
    argv += ["--finetune", classifier if evaluates else checkpoint, "--num_workers", 0]
    argv += ["--input_size", 32]
    if "--accum_iter" in words:
        argv += ["--accum_iter", 1]
    if "--data_csv" in words:  # the lengths of names are classes, and numbers
        files = sorted(images.glob("train/*/*.png"))
        splits = itertools.cycle(("train", "val"))
        rows = [f"{p},{len(p.parent.name)},{s}" for p, s in zip(files, splits, strict=False)]
        (tmp_path / "labels.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
        argv += ["--data_csv", tmp_path / "labels.csv"]
    if name == "main_knn.py":
        argv += ["--k", 3]
        if "--shots" in words:
            argv += ["--shots", 1]
    elif not evaluates:
        argv += QUICK
    run(*argv, main=MAINS[name].main)
    assert evaluates or any(tmp_path.iterdir())


@pytest.mark.parametrize("words", with_program("scripts/visualize_reconstruction.py"), ids=" ".join)
def test_reconstructions_are_drawn_as_shown(words, checkpoint, tmp_path):
    argv = [*words[2:], "--checkpoint", checkpoint, "--output", tmp_path / "figure.png"]
    run(*argv, "--images", write_images(tmp_path / "in", 2), main=visualize_reconstruction.main)
    assert (tmp_path / "figure.png").exists()


@pytest.fixture(scope="module")
def places(checkpoint):
    """Where the files that the pages name are: each export is run as shown."""
    found = {}
    for words in EXPORTS:
        if "onnx" in words:  # needs packages that are not among the requirements
            continue
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
        snippet = re.sub(rf'"(local-dir:)?{named}"', rf'"\g<1>{place}"', snippet)
    snippet = re.sub(r'"output/[^"]*\.pth"', f'"{checkpoint}"', snippet)
    snippet = snippet.replace("vit_base", "vit_tiny")
    assert "output/" not in snippet.replace(str(checkpoint.parent), "")
    names = {}
    exec(snippet, names)
    shown = re.search(r"# \(([^)]*)\)", snippet)[1].replace("768", "192")  # of a tiny model
    assert names["features"].shape == eval(f"({shown})")
