#!/usr/bin/env bash
# Sets up .venv and runs the quick tests: 5 to 15 minutes on 2 CPU cores. With --all it runs every
# test, the slow ones, the faults and SLURM's too: 20 to 50 minutes. Other arguments go to pytest.
# However the tests end, nothing of them is left but .venv, caches in the repository and what
# --basetemp FOLDER keeps: the folders of failed tests (tests/helpers/leftovers.py).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
install_into_venv requirements-dev.txt

selection=(-m "not slow and not faults and not slurm")
if [ "${1:-}" = --all ]; then
    selection=()
    shift
fi

echo "running the tests"
export OMP_NUM_THREADS=1
# In this process: whatever stops it stops pytest.
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadgroup --durations=10 \
    "${selection[@]}" "$@"
