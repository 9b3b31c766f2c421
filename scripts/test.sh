#!/usr/bin/env bash
# Sets up .venv and runs the quick tests: 5 to 15 minutes on 2 CPU cores. With --all it runs every
# test, the slow ones, the faults and SLURM's too: 20 to 50 minutes. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
install_into_venv requirements-dev.txt

selection=(-m "not slow and not faults and not slurm")
if [ "${1:-}" = --all ]; then
    selection=()
    shift
fi

# Every process that a test starts inherits this folder's name, which is how those are found that
# still run when the tests have been stopped.
TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/crossmae-tests.XXXXXX")
export TMPDIR OMP_NUM_THREADS=1
clean_up() {
    local environ pid
    trap '' HUP INT TERM # a second signal does not interrupt this
    for environ in $(grep -slz "^TMPDIR=$TMPDIR\$" /proc/[0-9]*/environ || true); do
        pid=${environ#/proc/}
        kill -KILL "${pid%/environ}" 2>/dev/null || true
    done
    rm -rf "$TMPDIR"
}
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

echo "running the tests"
# In the background, because bash answers a signal only between two commands or in `wait`. What a
# script starts there ignores Ctrl-C unless its trap is reset, and so would all that the tests start.
(
    trap - INT
    exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadgroup --durations=10 \
        "${selection[@]}" "$@"
) &
wait $!
