#!/usr/bin/env bash
# Table 12, MAE: ImageNet-1K top-1 of a linear probe after 800 epochs of pre-training.
# Expected: ViT-S 49.7, ViT-B 65.1.
# Ours: not run. Written for 8 GPUs of 80 GB; memory and time: not measured.
#
#   DATA=/path/to/imagenet bash scripts/recipes/table12_mae.sh small|base \
#       [arguments of main_linprobe.py]
#
# Probes the model that table1_mae.sh has pre-trained in the same OUTPUT.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/recipes/common.sh

choose_size "${1:-}" "small|base"
checkpoint=${OUTPUT:-output}/table1_mae_$1/$(checkpoint_name 800)
need_checkpoint "$checkpoint" "run scripts/recipes/table1_mae.sh $1 first"

linprobe "$checkpoint" --epochs 90 "${@:2}"
