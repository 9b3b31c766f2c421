"""Imports go downwards only: scripts > mains > engines, models > util with effects > pure util."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PURE_UTIL = {"masking", "patches", "pos_embed", "schedule", "seeding", "flops", "errors"}
PURE_UTIL |= {"kernels", "recompute"}
# Each may import those before it; a model that is not named here may import all of them.
MODEL_ORDER = ["models_vit", "models_crossmae", "models_mae"]
# Which layers each layer may import, besides what Python and other projects offer.
MAY_IMPORT = {
    "script": {"script", "main", "engine", "model", "util", "pure util"},
    "main": {"engine", "model", "util", "pure util"},
    "engine": {"util", "pure util"},
    "model": {"model", "pure util"},
    "util": {"util", "pure util"},
    "pure util": {"pure util"},
}


def layer_of(module):
    """The layer of one of the project's modules; None for anything else."""
    first, *rest = module.split(".")
    if first == "util":
        return "pure util" if not rest or rest[0] in PURE_UTIL else "util"
    if first == "scripts":
        return "script"
    return {"main": "main", "engine": "engine", "models": "model"}.get(first.split("_")[0])


def imports_of(source, module, project):
    """Every module of the project that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            submodules = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
            found.update(submodules & project or {base})
    return {name for name in found if name in project or layer_of(name)}


def faults(sources):
    """One line for each import that goes upwards, sideways or in a circle.

    Args:
        sources: module name -> source text, of the whole project.
    """
    project = set(sources)
    imports = {module: imports_of(source, module, project) for module, source in sources.items()}
    found = []
    for module, imported in imports.items():
        layer = layer_of(module)
        if layer is None:
            found.append(f"{module} is in no layer")
            continue
        for name in sorted(imported):
            if layer_of(name) not in MAY_IMPORT[layer]:
                found.append(f"{module} ({layer}) imports {name} ({layer_of(name)})")
            elif layer == layer_of(name) == "model":
                order = [*MODEL_ORDER, module]  # the first place counts
                if name not in order[: order.index(module)]:
                    found.append(f"{module} imports {name}, which is not below it")
    return found + [f"{module} imports itself in the end" for module in circular(imports)]


def circular(imports):
    """Modules that reach themselves by following imports."""

    def reached(module):
        seen, todo = set(), [module]
        while todo:
            new = imports.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    return sorted(module for module in imports if module in reached(module))


def project_sources():
    files = [*ROOT.glob("*.py"), *ROOT.glob("util/**/*.py"), *ROOT.glob("scripts/**/*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {name.removesuffix(".__init__"): path.read_text() for path, name in names.items()}


def test_imports_go_downwards_only():
    sources = project_sources()
    assert {"models_crossmae", "util", "util.masking"} <= sources.keys()
    assert faults(sources) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("util.masking", "import util.checkpoint"),
        ("util.masking", "from util import checkpoint"),
        ("util.masking", "from . import checkpoint"),
        ("util.masking", "from .checkpoint import save"),
        ("util.masking", "def late():\n    from util.checkpoint import save"),
        ("util.checkpoint", "from models_vit import Block"),
        ("util.checkpoint", "from engine_pretrain import train_one_epoch"),
        ("models_vit", "from models_crossmae import ViTEncoder"),
        ("models_crossmae", "import models_mae"),
        ("models_vit", "from models_vitdet import ViTDet"),
        ("models_mae", "from util.checkpoint import save"),
        ("models_vitdet", "import models_upernet"),
        ("models_mae", "import main_pretrain"),
        ("engine_pretrain", "from models_vit import Block"),
        ("engine_pretrain", "from engine_finetune import evaluate"),
        ("engine_pretrain", "import main_pretrain"),
        ("main_finetune", "from main_pretrain import main"),
        ("main_pretrain", "from scripts.launch_slurm import submit"),
        ("util.arguments", "if TYPE_CHECKING:\n    import main_pretrain"),
        ("helpers", "import torch"),
    ],
)
def test_a_planted_upward_import_is_found(module, source):
    sources = dict.fromkeys(("util", "util.masking", "util.checkpoint", "main_pretrain"), "")
    assert len(faults(sources | {module: source})) == 1


def test_a_circle_is_found():
    sources = {"util.run": "import util.metrics", "util.metrics": "from util.run import start_run"}
    assert faults(sources) == [
        "util.metrics imports itself in the end",
        "util.run imports itself in the end",
    ]


def test_downward_imports_are_allowed():
    sources = {
        "scripts.analyse_mixes": "import main_pretrain\nfrom models_mae import build_mae",
        "main_pretrain": "import engine_pretrain, models_crossmae\nfrom util import checkpoint",
        "engine_pretrain": "from util.checkpoint import save\nimport torch",
        "models_vitdet": "from models_vit import Block\nfrom util.patches import patchify",
        "models_mae": "from models_crossmae import ViTEncoder\nimport models_vit",
        "models_crossmae": "import models_vit",
        "models_vit": "",
        "util.checkpoint": "from util.errors import InputError\nimport util.seeding",
        "util.seeding": "from util.errors import InputError",
        "util.errors": "",
    }
    assert faults(sources) == []
