#!/usr/bin/env bash
# Four A100s: ViT-B, CrossMAE (25%), 800 epochs of ImageNet at the paper's effective batch of 4096.
# Time: not measured.
# Memory of each GPU: 2.0 GB for weights, gradients and Adam (computed: 16 bytes for each of 127.0
# million parameters). What a micro-step adds is not measured; 40 GB may need --batch_size 256.
#
#   DATA=/path/to/imagenet bash scripts/recipes/hardware_4xa100.sh [arguments of main_pretrain.py]
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/recipes/common.sh

show_and_run "$python" -m torch.distributed.run --standalone --nproc_per_node 4 main_pretrain.py \
    --data_path "$DATA" --output_dir "$folder" \
    --model crossmae_vit_base_patch16 --mask_ratio 0.75 --pred_ratio 0.25 --epochs 800 \
    --effective_batch_size 4096 --batch_size 512 --memory high "$@"
