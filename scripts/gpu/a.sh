#!/usr/bin/env bash
# The first of two runs on a GPU, 380 s at most: does everything work, and what is slow?
#   [PYTHON=python3] [OUT=output/gpu-a] [AGAINST=program.py] bash scripts/gpu/a.sh
# PYTHON must have torch, timm and pytest; nothing is installed. AGAINST is a reference program to
# compare a step with (protocol: scripts/benchmark/against.py). COMMIT is recorded if there is no git
# repository. QUICK=1 tries the script with tiny models, even on a CPU. Results are written to OUT as
# they come, tables of kernels to OUT/log.txt. If a part fails, the others still run, and it is
# listed at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/gpu/common.sh
start output/gpu-a

part device 15 "$PYTHON" scripts/gpu/device.py "$OUT/env.json"
part tests 90 "$PYTHON" scripts/gpu/run_tests.py --durations=5
part micro 35 "$PYTHON" scripts/gpu/micro.py "$OUT/micro.json"

profile=(--profile "$OUT/log.txt")
step eager 50 --models $model $mae --batch_size $few $many "${profile[@]}"
flags=(--models $model --batch_size $many)
step blocks 40 --compile blocks "${flags[@]}" "${profile[@]}"
step whole 90 --compile whole "${flags[@]}" "${profile[@]}"

if [ -n "${QUICK:-}" ]; then
    flags=(--models crossmae_vit_tiny_patch16 --input_sizes 64)
fi
if [ -n "${AGAINST:-}" ]; then
    step against 60 "${flags[@]}" --rounds 1 --memory high --dtypes bf16 --against_dtype fp16 \
        --against "$AGAINST"
else
    skip against "AGAINST is not set"
fi

finish env micro eager blocks whole against
