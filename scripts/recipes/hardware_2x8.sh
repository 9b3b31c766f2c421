#!/usr/bin/env bash
# Two nodes of eight GPUs under SLURM: ViT-B, CrossMAE (25%), 800 epochs of ImageNet at the paper's
# effective batch of 4096.
# Time: not measured.
# Memory of each GPU: 2.0 GB for weights, gradients and Adam (computed: 16 bytes for each of 127.0
# million parameters). What a micro-step of 256 images adds is not measured.
#
#   DATA=/path/to/imagenet bash scripts/recipes/hardware_2x8.sh --partition P --time 1-00:00:00 \
#       [arguments of scripts/launch.py] [-- arguments of main_pretrain.py]
#
# A job that reaches its time limit before the run ends is requeued and continues from its last step.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/recipes/common.sh

split_arguments "$@"
launch_args=("${pretrain_args[@]}") main_args=("${finetune_args[@]}")

show_and_run "$python" scripts/launch.py --main pretrain --cluster slurm \
    --nodes 2 --gpus_per_node 8 "${launch_args[@]}" -- \
    --data_path "$DATA" --output_dir "$folder" \
    --model crossmae_vit_base_patch16 --mask_ratio 0.75 --pred_ratio 0.25 --epochs 800 \
    --effective_batch_size 4096 --batch_size 256 --memory high "${main_args[@]}"
