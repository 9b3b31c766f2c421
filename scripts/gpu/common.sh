# Shared functions of a.sh and b.sh, which source this file in the root of the repository.
export PYTHONUNBUFFERED=1
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
PYTHON=${PYTHON:-.venv/bin/python}
failed=()
slower=1

if [ -n "${QUICK:-}" ]; then
    export TORCH_COMPILE_DISABLE=1 # compiling takes minutes on a CPU
    slower=4 # limits, since a CPU may be busy
    model=crossmae_vit_tiny_patch4 mae=mae_vit_tiny_patch4 few= many=4
else
    model=crossmae_vit_base_patch16 mae=mae_vit_base_patch16 few=256 many=1024
fi

fail() {
    echo "error: $*" >&2
    exit 2
}

# start FOLDER: checks the environment and creates the results folder, OUT or else FOLDER.
start() {
    local code=0
    OUT=${OUT:-$1}
    [ -z "$(ls -A "$OUT" 2>/dev/null)" ] ||
        fail "$OUT already contains results: choose another folder with OUT=FOLDER"
    "$PYTHON" -c 'import pytest, sys, timm, torch; sys.exit(3 * (not torch.cuda.is_available()))' \
        2>/dev/null || code=$?
    case "$code${QUICK:+ quick}" in
        0* | "3 quick") ;;
        3) fail "PyTorch does not find a GPU: use a machine with one, or QUICK=1 on a CPU" ;;
        127*) fail "$PYTHON not found: set PYTHON=FILE to a Python with torch, timm and pytest" ;;
        *) fail "$PYTHON cannot import torch, timm and pytest: set PYTHON=FILE to one that can" ;;
    esac
    mkdir -p "$OUT"
}

say() {
    echo "$*" | tee -a "$OUT/log.txt"
}

# part NAME SECONDS COMMAND...: runs a command for SECONDS x $slower at most; a failure does not stop
# the script.
part() {
    local name=$1 seconds=$(($2 * slower)) began=$SECONDS code=0
    shift 2
    say "== $name (limit $seconds s)"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$OUT/log.txt" || code=$?
    case $code in
        0)
            say "== $name: done in $((SECONDS - began)) s"
            return
            ;;
        124 | 137) failed+=("$name: stopped after $seconds s") ;;
        *) failed+=("$name: exit code $code") ;;
    esac
    say "== $name: failed"
}

# skip NAME REASON
skip() {
    say "== $1: skipped, $2"
}

# step NAME SECONDS FLAGS...: a part that measures training steps and writes NAME.json.
step() {
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" "$PYTHON" scripts/benchmark_pretrain.py ${QUICK:+--quick} \
        --rounds 3 --json "$OUT/$name.json" "$@"
}

# finish NAME...: prints the table of results; the exit code is 1 if a part failed.
finish() {
    "$PYTHON" scripts/gpu/summary.py "$OUT" "$@" 2>&1 | tee -a "$OUT/log.txt" ||
        failed+=("summary")
    [ ${#failed[@]} -eq 0 ] && return
    printf 'failed: %s\n' "${failed[@]}" | tee -a "$OUT/log.txt"
    exit 1
}
