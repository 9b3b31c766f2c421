#!/usr/bin/env bash
# What one GPU can show, in under nine minutes: the GPU tests, a training step, and the loader.
#   [DATA=images.tar] [AGAINST=program.py] bash scripts/gpu_suite.sh [OUTPUT.json]
# writes one JSON file (output/gpu_suite.json) with every number, the machine, versions and commit;
# tables go to the terminal. DATA is a folder or tar of JPEGs for the loader, AGAINST a program to
# compare a step with (protocol: util/yardstick.py); both parts are left out without them. A part that
# fails, or takes too long, is named in the file, and the others go on. QUICK, with any value, runs
# tiny models for a moment, on a CPU too.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
install_into_venv requirements-dev.txt

output=${1:-output/gpu_suite.json}
[ ! -e "$output" ] || fail "$output exists already: name another file"
mkdir -p "$(dirname "$output")"
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
python=.venv/bin/python
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
failed=()

# part NAME SECONDS COMMAND...: runs it, and leaves its exit code and what it printed.
part() {
    local name=$1 seconds=$2 code=0
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$parts/$name.txt" || code=$?
    echo "$code" >"$parts/$name.code"
    [ "$code" -eq 0 ] || failed+=("$name")
}

# step NAME SECONDS FLAGS...: a part that measures training steps.
step() {
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" $python scripts/benchmark_pretrain.py ${QUICK:+--quick} \
        --json "$parts/$name.json" "$@"
}

base=() large=(--models crossmae_vit_large_patch16 --batch_size 512)
high_resolution=(--input_sizes 448 --batch_size 256)
if [ -n "${QUICK:-}" ]; then
    base=(--models crossmae_vit_tiny_patch16 --input_sizes 64) large=() high_resolution=()
fi

part tests 120 $python -m pytest -q -m gpu tests/test_gpu.py
step table4 70 --table 4 --memory high medium low
step figure7 60 --figure 7 --rounds 3
step compiled 60 --compile
step large 45 "${large[@]}"
step high_resolution 45 "${high_resolution[@]}"
[ -z "${AGAINST:-}" ] || step against 60 "${base[@]}" --rounds 3 --memory high --against "$AGAINST"
[ -z "${DATA:-}" ] || part loader 60 $python scripts/benchmark_loader.py --data_path "$DATA" \
    --repeats 3 --json "$parts/loader.json"

# One file of all parts: what each measured, else what it printed last.
$python - "$parts" "$output" <<'END'
import json
import sys
from pathlib import Path

folder, output = map(Path, sys.argv[1:])
content = {}
for code in sorted(folder.glob("*.code")):
    measured, printed = code.with_suffix(".json"), code.with_suffix(".txt").read_text()
    content[code.stem] = {
        "exit_code": int(code.read_text()),
        "last_line": (printed.strip().splitlines() or [""])[-1],
        **(json.loads(measured.read_text()) if measured.exists() else {}),
    }
output.write_text(json.dumps(content, indent=2) + "\n")
END
echo "wrote $output"
[ ${#failed[@]} -eq 0 ] || fail "failed: ${failed[*]}"
