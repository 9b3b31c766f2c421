#!/usr/bin/env bash
# Table 17, semantic segmentation of ADE20K: mIoU of ViT-B with UperNet.
# Expected: 47.7 after MAE in the paper, 48.15 in other runs of MAE's weights with this recipe.
# Ours: not run. Written for 8 GPUs of 80 GB; memory and time: not measured.
#
#   DATA=/path/to/ADEChallengeData2016 bash scripts/recipes/table17_ade20k.sh CHECKPOINT \
#       [arguments of main_segmentation.py]
#
# The recipe is MAE's, the default of main_segmentation.py --head upernet: 160,000 steps of 16 crops
# of 512 px. MAE's layer scale, which starts at 1, is left out. For a quick comparison of encoders,
# add --head linear --max_iters 40000.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/recipes/common.sh

need_checkpoint "${1:-}" "give one from pre-training"
train 16 8 main_segmentation.py --finetune "$1" --dataset ade20k --head upernet \
    --output_dir "$folder/$(basename "$(dirname "$(realpath "$1")")")-$(basename "$1" .pth)" "${@:2}"
