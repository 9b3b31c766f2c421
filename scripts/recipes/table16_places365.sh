#!/usr/bin/env bash
# Table 16, Places365: top-1 of ViT-B after 800 epochs of pre-training on ImageNet-1K.
# Expected: MAE 57.9, CrossMAE (25%) 57.9, CrossMAE (75%) 57.8.
# Ours: not run. Written for 8 GPUs of 80 GB; memory and time: not measured.
#
#   DATA=/path/to/places365 bash scripts/recipes/table16_places365.sh CHECKPOINT \
#       [arguments of main_finetune.py]
#
# The paper has no hyperparameters for this table; those of Table 11 are used.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/recipes/common.sh

finetune_row "${1:-}" --dataset torch/places365 "${@:2}"
