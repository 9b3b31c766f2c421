#!/usr/bin/env bash
# The second of two runs on a GPU, 420 s at most: the numbers for the documentation.
#   [TESTS="-k attention"] [COMPILE=blocks] [DATA=images.tar] bash scripts/gpu/b.sh
# TESTS are pytest arguments that select GPU tests to run again. COMPILE (blocks, whole or empty)
# sets the flag of the runs; use whole if it compiled within seconds in a.sh. DATA is a tar or folder
# of JPEGs for main_pretrain.py, repeated by links to fill an epoch. Everything else is as in a.sh;
# OUT defaults to output/gpu-b.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/gpu/common.sh
start output/gpu-b

COMPILE=${COMPILE-blocks}
flags=(${COMPILE:+--compile "$COMPILE"})
if [ -n "${QUICK:-}" ]; then
    large=(--models crossmae_vit_tiny_patch16 --input_sizes 32)
    high_resolution=(--models $model --input_sizes 32)
    train=(--model $model --input_size 16 --decoder_depth 1 --batch_size 8 --log_every 2)
    num_images=32 seconds=25
else
    large=(--models crossmae_vit_large_patch16 --batch_size 512)
    high_resolution=(--models $model --batch_size 256 --input_sizes 448)
    train=(--model $model --batch_size 1024 --log_every 11)
    # No epoch ends: the first batches of the next would come late.
    num_images=$((200 * 1024)) seconds=50
fi
images=$(mktemp -d)
trap 'rm -rf "$images"' EXIT
pretrain=("$PYTHON" scripts/gpu/pretrain.py "$OUT/main.json")
train+=(--data_path "$images" --pred_ratio 0.25 "${flags[@]}")
auto=(--dataset digits --knn_every 0 --batch_size auto --effective_batch_size 4096 --epochs 1)

if [ -n "${TESTS:-}" ]; then
    part tests 30 "$PYTHON" scripts/gpu/run_tests.py $TESTS
else
    skip tests "TESTS is not set"
fi

step table4 50 --table 4 "${flags[@]}"
step memory 30 --models $model --memory medium low "${flags[@]}"
step large 40 "${large[@]}" "${flags[@]}"
step high_resolution 40 "${high_resolution[@]}" "${flags[@]}"
if [ -n "${QUICK:-}" ]; then
    skip auto "it needs a GPU"
else
    part auto 40 "${pretrain[@]}" auto 32 "${auto[@]}"
fi

if [ -n "${DATA:-}" ]; then
    part images 10 "$PYTHON" scripts/gpu/images.py "$DATA" "$images" $num_images
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi dmon -s um -d 5 >>"$OUT/log.txt" 2>&1 &
        monitor=$!
        trap 'kill $monitor 2>/dev/null || true; rm -rf "$images"' EXIT
    fi
    part raw 75 "${pretrain[@]}" raw $seconds "${train[@]}"
    part repeated_aug 75 "${pretrain[@]}" repeated_aug $seconds "${train[@]}" --repeated_aug 2
else
    skip "raw and repeated_aug" "DATA is not set"
fi

part resume 30 "$PYTHON" scripts/gpu/run_tests.py -k a_stopped_run_continues_to_the_same_bits

finish table4 memory large high_resolution main
