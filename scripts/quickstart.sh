#!/usr/bin/env bash
# Sets up .venv, then pre-trains a tiny CrossMAE on scikit-learn's digits: about 2 minutes on 2 CPU
# cores. A second run installs nothing and shows the result of the first; arguments go to
# main_pretrain.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
install_into_venv requirements.txt

echo "pre-training a tiny CrossMAE on digits"
# Most patches of a digit are flat, so their pixels are predicted as they are, not normalised.
.venv/bin/python main_pretrain.py --dataset digits --output_dir output/quickstart \
    --model crossmae_vit_tiny_patch4 --input_size 32 --decoder_depth 4 --no-norm_pix_loss \
    --pred_ratio 0.25 --batch_size 64 --epochs 24 --lr 1e-3 --num_workers 0 --log_every 100 "$@"
