"""The earlier name of launch.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("launch.py")), run_name="__main__")
