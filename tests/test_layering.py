"""Imports go one way: scripts > mains > engines, models.py > models_* > the ground of util.

A file's place is its layer: `util/x.py` is the ground, which models may import; `util/data/x.py` is
in the room `data`.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Which rooms of util each may import, besides itself and the ground. A new room is a decision.
ROOMS = {
    "settings": set(),
    "compute": {"settings"},
    "weights": {"settings"},
    "data": {"settings", "compute"},
    "eval": {"settings", "compute", "data"},
    "runs": {"settings", "compute", "weights", "data"},
}
# Which layers each may import, besides what Python and other projects offer.
MAY_IMPORT = {
    "script": {"script", "engine", "models.py", "model", "ground", *ROOMS},
    "main": {"engine", "models.py", "model", "ground", *ROOMS},
    "engine": {"ground", *ROOMS},
    "models.py": {"model", "ground", "settings", "weights"},
    "model": {"model", "ground", "settings"},
    **{room: {room, "ground", *others} for room, others in ROOMS.items()},
    "ground": {"ground", "settings"},
}
# All that the settings import: nothing that imports PyTorch.
LIGHT = {"util.arguments", "util.errors", "util.machine", "util.normalization", "util.terminal"}
# Each may import those before it; a model that is not named here may import all of them.
MODEL_ORDER = ["models_vit", "models_crossmae", "models_mae"]
SAY_NOTHING = {"misc", "utils", "helpers", "common"}
# Asks each main's parse_args, so that a mistyped flag fails before the queue.
LAUNCHER = "scripts.launch"


def layer_of(module):
    """The layer of one of the project's modules; None for anything else."""
    first, *rest = module.split(".")
    if first == "util":
        return rest[0] if len(rest) > 1 or ROOMS.keys() & set(rest) else "ground"
    if first == "scripts":
        return "script"
    if first == "models":
        return "models.py"
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
    """One line for each import that goes upwards, sideways or in a circle, and for each bad name.

    Args:
        sources: module name -> source text, of the whole project; of a package, its `__init__`.
    """
    project = set(sources)
    packages = {name.rpartition(".")[0] for name in project}
    imports = {module: imports_of(source, module, project) for module, source in sources.items()}
    found = []
    for module, imported in imports.items():
        layer = layer_of(module)
        if layer not in MAY_IMPORT:
            found.append(f"{module} is in no layer")
            continue
        if module.rpartition(".")[2] in SAY_NOTHING:
            found.append(f"{module} has a name that says nothing")
        if module in packages and imported:
            found.append(f"the package {module} imports {', '.join(imported)}")
        for name in sorted(imported):
            if layer_of(name) not in MAY_IMPORT[layer]:
                if (module, layer_of(name)) != (LAUNCHER, "main"):
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
    assert {"models_crossmae", "util", "util.masking", "util.runs"} <= sources.keys()

    assert faults(sources) == []


def test_settings_import_little():
    sources = project_sources()
    light = [name for name in sources if layer_of(name) == "settings" or name in LIGHT]
    imports = {name: imports_of(sources[name], name, set(sources)) for name in light}

    assert {name for found in imports.values() for name in found} <= {*light}


def test_the_rooms_are_those_of_the_table():
    assert {path.parent.name for path in ROOT.glob("util/*/__init__.py")} == ROOMS.keys()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("util.masking", "import util.runs.checkpoint"),
        ("util.masking", "from util.runs import checkpoint"),
        ("util.masking", "from .runs import checkpoint"),
        ("util.masking", "from .runs.checkpoint import save"),
        ("util.masking", "def late():\n    from util.runs.checkpoint import save"),
        ("util.masking", "from util.compute.distributed import rank"),
        ("util.compute.sharding", "from util.data.batch import Batch"),
        ("util.data.loaders", "import util.weights.encoder"),
        ("util.data.loaders", "from util.runs import checkpoint"),
        ("util.weights.encoder", "from util.data import loaders"),
        ("util.runs.checkpoint", "from util.eval.knn import knn_accuracy"),
        ("util.runs.checkpoint", "from models_vit import Block"),
        ("util.runs.checkpoint", "from engine_pretrain import train_one_epoch"),
        ("util.runs", "from util.runs.checkpoint import save"),
        ("util.detection.boxes", "import torch"),
        ("util.misc", "import torch"),
        ("util.data.utils", "import torch"),
        ("models_vit", "from models_crossmae import ViTEncoder"),
        ("models_crossmae", "import models_mae"),
        ("models_crossmae", "from models import build_model"),
        ("models_vit", "from models_vitdet import ViTDet"),
        ("models_mae", "from util.runs.checkpoint import save"),
        ("models_mae", "from util.compute.recompute import set_memory"),
        ("models_vitdet", "import models_upernet"),
        ("models_mae", "import main_pretrain"),
        ("models", "from util.data.datasets import open_train_val"),
        ("engine_pretrain", "from models_vit import Block"),
        ("engine_pretrain", "from models import build_model"),
        ("engine_pretrain", "from engine_finetune import evaluate"),
        ("engine_pretrain", "import main_pretrain"),
        ("main_finetune", "from main_pretrain import main"),
        ("main_pretrain", "from scripts.launch import submit"),
        ("scripts.analyse_mixes", "from main_pretrain import build_model"),
        ("util.arguments", "if TYPE_CHECKING:\n    import main_pretrain"),
        ("somewhere", "import torch"),
    ],
)
def test_a_planted_fault_is_found(module, source):
    known = ("util", "util.masking", "util.runs", "util.runs.checkpoint", "main_pretrain")
    assert len(faults(dict.fromkeys(known, "") | {module: source})) == 1


def test_a_circle_is_found():
    sources = {
        "util.runs.run": "import util.runs.run_log",
        "util.runs.run_log": "from util.runs.run import start_run",
    }
    assert faults(sources) == [
        "util.runs.run imports itself in the end",
        "util.runs.run_log imports itself in the end",
    ]


def test_downward_imports_are_allowed():
    sources = {
        "scripts.analyse_mixes": "import models\nfrom models_mae import build_mae",
        "scripts.launch": "import main_pretrain",
        "main_pretrain": "import engine_pretrain, models\nfrom util.runs import checkpoint",
        "engine_pretrain": "from util.runs.checkpoint import save\nimport torch",
        "models": "import models_mae\nfrom util.weights.files import read_weights_file",
        "models_vitdet": "from models_vit import Block\nfrom util.patches import patchify",
        "models_mae": "from models_crossmae import ViTEncoder\nimport models_vit",
        "models_crossmae": "import models_vit",
        "models_vit": "",
        "util.eval.knn": "from util.data.loaders import Batches",
        "util.runs": "",
        "util.runs.checkpoint": "from util.errors import InputError\nimport util.weights.files",
        "util.data.loaders": "from util.compute.distributed import rank",
        "util.seeding": "from util.errors import InputError",
        "util.errors": "",
    }
    assert faults(sources) == []
