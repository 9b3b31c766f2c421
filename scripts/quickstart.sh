#!/usr/bin/env bash
# Sets up .venv and pre-trains a tiny CrossMAE on scikit-learn's digits: 2 minutes on 2 CPU cores. A
# second run only shows the results again, without installing or training. Arguments go to
# main_pretrain.py.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
install_into_venv requirements.txt

echo "pre-training a tiny CrossMAE on digits"
# Most patches of a digit are flat, so raw pixels are predicted instead of normalized ones.
.venv/bin/python main_pretrain.py --dataset digits --output_dir output/quickstart \
    --model crossmae_vit_micro_patch4 --input_size 32 --decoder_depth 4 --no-norm_pix_loss \
    --pred_ratio 0.25 --hflip 0 --batch_size 32 --epochs 14 --lr 1e-3 --num_workers 0 \
    --eval_every 1 --knn_every 7 --log_every 100 "$@"

cat <<'NEXT'

What to do next:
  look at output/quickstart/reconstructions.png: original, masked, result
  see the curves:    .venv/bin/tensorboard --logdir output
  probe features:    .venv/bin/python main_linprobe.py --probe attentive --dataset digits \
                         --finetune output/quickstart/checkpoint-e0014-s000000.pth --crop_pct 1 \
                         --crop_area 0.8 1 --hflip 0 --batch_size 32 --epochs 10 --lr 10 --num_workers 0
  use your images:   .venv/bin/python main_pretrain.py --data_path /path/to/images \
                         --model crossmae_vit_tiny_patch16 --input_size 128 --decoder_depth 4 \
                         --no-norm_pix_loss --pred_ratio 0.25 --batch_size 32 --epochs 21 --lr 1e-3
  classify with it:  README.md, "Fine-tune and probe"
NEXT
