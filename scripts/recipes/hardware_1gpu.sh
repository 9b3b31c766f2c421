#!/usr/bin/env bash
# One GPU: ViT-B, CrossMAE (25%), 800 epochs of ImageNet at the paper's effective batch of 4096.
# Time: not measured.
# Memory: 2.0 GB for weights, gradients and Adam (computed: 16 bytes for each of 127.0 million
# parameters). What a micro-step adds is not measured; the batch size is the largest that fits.
#
#   DATA=/path/to/imagenet bash scripts/recipes/hardware_1gpu.sh [arguments of main_pretrain.py]
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/recipes/common.sh

# A larger micro-batch speeds up a small GPU more than --memory medium's recomputation slows it down.
show_and_run "$python" main_pretrain.py --data_path "$DATA" --output_dir "$folder" \
    --model crossmae_vit_base_patch16 --mask_ratio 0.75 --pred_ratio 0.25 --epochs 800 \
    --effective_batch_size 4096 --batch_size auto --memory medium "$@"
