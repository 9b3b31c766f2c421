#!/usr/bin/env bash
# Table 1, CrossMAE (75%): ImageNet-1K top-1, 800 epochs of pre-training, then fine-tuning.
# Expected: ViT-S 79.3, ViT-B 83.7, ViT-L 85.4, ViT-H 86.4.
# Ours: not run. Written for 8 GPUs of 80 GB; memory and time: not measured.
#
#   DATA=/path/to/imagenet bash scripts/recipes/table1_crossmae_75.sh small|base|large|huge \
#       [arguments of main_pretrain.py] [-- arguments of main_finetune.py]
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/recipes/common.sh

choose_size "${1:-}" "small|base|large|huge"
split_arguments "${@:2}"

pretrain 800 --model "crossmae_$vit" --mask_ratio 0.75 --pred_ratio 0.75 "${pretrain_args[@]}"
finetune "$checkpoint" "${folder}_finetune" "${finetune_args[@]}"
