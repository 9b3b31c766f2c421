# What a.sh and b.sh share. They source it in the root of the repository.
export PYTHONUNBUFFERED=1
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
PYTHON=${PYTHON:-.venv/bin/python}
failed=()

if [ -n "${QUICK:-}" ]; then
    export TORCH_COMPILE_DISABLE=1 # compiling takes minutes on a CPU
    model=crossmae_vit_tiny_patch4 mae=mae_vit_tiny_patch4 few=2 many=4
else
    model=crossmae_vit_base_patch16 mae=mae_vit_base_patch16 few=256 many=1024
fi

fail() {
    echo "error: $*" >&2
    exit 2
}

# start FOLDER: refuses what cannot work, and makes the folder of results.
start() {
    local code=0
    OUT=${OUT:-$1}
    [ -z "$(ls -A "$OUT" 2>/dev/null)" ] ||
        fail "$OUT already holds results: name another folder with OUT=FOLDER"
    "$PYTHON" -c 'import pytest, sys, timm, torch; sys.exit(3 * (not torch.cuda.is_available()))' \
        2>/dev/null || code=$?
    case "$code${QUICK:+ quick}" in
        0* | "3 quick") ;;
        3) fail "PyTorch finds no GPU: run this on a machine with one, or with QUICK=1 on a CPU" ;;
        127*) fail "$PYTHON not found: name a Python that imports torch, timm and pytest with PYTHON=FILE" ;;
        *) fail "$PYTHON cannot import torch, timm and pytest: name one that can with PYTHON=FILE" ;;
    esac
    mkdir -p "$OUT"
}

say() {
    echo "$*" | tee -a "$OUT/log.txt"
}

# part NAME SECONDS COMMAND...: runs a command, for SECONDS at most. The others run if it fails.
part() {
    local name=$1 seconds=$2 began=$SECONDS code=0
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

left_out() {
    say "== $1: left out, $2"
}

# step NAME SECONDS FLAGS...: a part that measures training steps and writes NAME.json.
step() {
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" "$PYTHON" scripts/benchmark_pretrain.py ${QUICK:+--quick} \
        --rounds 3 --json "$OUT/$name.json" "$@"
}

# finish: prints the table of numbers; the exit code is 1 if a part failed.
finish() {
    "$PYTHON" scripts/gpu/summary.py "$OUT" "$@" 2>&1 | tee -a "$OUT/log.txt" ||
        failed+=("summary")
    [ ${#failed[@]} -eq 0 ] && return
    printf 'failed: %s\n' "${failed[@]}" | tee -a "$OUT/log.txt"
    exit 1
}
