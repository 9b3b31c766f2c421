#!/usr/bin/env bash
# Table 16, iNaturalist 2019: top-1 of ViT-B after 800 epochs of pre-training on ImageNet-1K.
# Expected: MAE 79.8, CrossMAE (25%) 79.4, CrossMAE (75%) 80.1.
# Ours: not run. Written for 8 GPUs of 80 GB; memory and time: not measured.
#
#   DATA=/path/to/inat2019 bash scripts/recipes/table16_inat2019.sh CHECKPOINT \
#       [arguments of main_finetune.py]
#
# The paper has no hyperparameters for this table; those of Table 11 are used.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/recipes/common.sh

finetune_row "${1:-}" --dataset inat2019 "${@:2}"
