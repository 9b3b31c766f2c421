#!/usr/bin/env bash
# Sets up .venv, then runs every test: about 20 minutes on 2 CPU cores. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
install_into_venv requirements-dev.txt

echo "running the tests"
.venv/bin/python -m pytest "$@"
