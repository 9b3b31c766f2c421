"""Runs a main with tiny models, for tests that need it in processes of its own.

python tests/helpers/nano_main.py finetune --data_path IMAGES
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest

from tests.helpers.models import use_nano_models
from tests.helpers.runs import MAINS
from util.runs.run import run_main

if __name__ == "__main__":
    _, name, *argv = sys.argv
    use_nano_models(pytest.MonkeyPatch())
    run_main(lambda: MAINS[name].main(argv))
