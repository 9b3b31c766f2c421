"""Programs answer --help and mistakes in flags without importing PyTorch, which takes seconds."""

import json
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT

# A launcher hands flags that it does not know on to the program that it starts.
PASSING_ON = {"scripts/launch.py", "scripts/launch_slurm.py"}
PROGRAMS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("main_*.py", "scripts/*.py")
    for path in ROOT.glob(pattern)
    if "def parse_args" in path.read_text()
)
PROGRAMS = [name for name in PROGRAMS if name not in PASSING_ON]
# One process starts them all, because starting Python takes longer than they do.
RUN_ALL = """
import contextlib, io, json, runpy, sys

def answer(name, *words):
    text, sys.argv = io.StringIO(), [name, *words]
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            runpy.run_path(name, run_name="__main__")
        except SystemExit as error:
            code = error.code
    heavy = sorted({"numpy", "torch"}.intersection(sys.modules))
    return {"code": code, "text": text.getvalue(), "heavy": heavy}

found = {}
for name in sys.argv[1:]:
    usage = answer(name, "--help")
    flag = next(word.strip("[],") for word in usage["text"].split() if word.startswith("--"))
    found[name] = {
        "help": usage,
        "unknown": answer(name, "--no_flag_has_this_name"),
        "misspelt": {"flag": flag, **answer(name, flag[:-1])},
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers():
    argv = [sys.executable, "-c", RUN_ALL, *PROGRAMS]
    result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_the_programs_are_found():
    assert len(PROGRAMS) >= 20
    assert {"main_pretrain.py", "scripts/predict.py"} < set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_and_mistakes_need_no_pytorch(answers, name):
    own = answers[name]
    assert [own[kind]["heavy"] for kind in ("help", "unknown", "misspelt")] == [[], [], []]
    assert (own["help"]["code"], own["unknown"]["code"], own["misspelt"]["code"]) == (0, 2, 2)
    assert own["help"]["text"].startswith("usage: ")
    assert "unknown flag --no_flag_has_this_name" in own["unknown"]["text"]
    flag = own["misspelt"]["flag"]
    assert f"unknown flag {flag[:-1]}: did you mean {flag}?" in own["misspelt"]["text"]
