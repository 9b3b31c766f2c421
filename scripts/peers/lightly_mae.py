"""Pre-train an MAE with the building blocks of lightly, by its documentation's recipe.

    python scripts/peers/lightly_mae.py --data_path IMAGES --output_dir OUT --epochs 100
    python main_knn.py --checkpoint OUT/encoder-e0100.pth --data_path IMAGES

The recipe is that of https://docs.lightly.ai/self-supervised-learning/examples/mae.html. Only the
sizes are this project's: README.md beside this file lists what differs. It needs requirements.txt
beside this file.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.peers.recording import EpochRecorder, keep, parse_peer_args
from util.arguments import check_arguments


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    return parse_peer_args(
        argv, __doc__.splitlines()[0], batch_size=256, num_workers=8, lr="1.5e-4"
    )


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch
import torch.nn as nn
from lightly.data import LightlyDataset
from lightly.models import utils
from lightly.models.modules import (
    MaskedVisionTransformerDecoderTIMM,
    MaskedVisionTransformerTIMM,
)
from lightly.transforms import MAETransform
from timm.models.vision_transformer import vit_tiny_patch16_224
from torch import Tensor
from torch.utils.data import DataLoader

from util.errors import InputError, counted
from util.runs.run import run_main, start_logging

IMG_SIZE = 128  # px
MASK_RATIO = 0.75
DECODER_DIM = 128
LR = 1.5e-4


class MAE(nn.Module):
    """MAE of lightly's encoder and decoder; its targets are the patches' normal pixel values."""

    def __init__(self) -> None:
        super().__init__()
        vit = vit_tiny_patch16_224(img_size=IMG_SIZE, num_classes=0)
        self.patch_size = vit.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder_embed = nn.Linear(vit.embed_dim, DECODER_DIM)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            embed_dim=DECODER_DIM,
            depth=4,
            num_heads=4,
            num_prefix_tokens=vit.num_prefix_tokens,
        )
        self.prediction_head = nn.Linear(DECODER_DIM, self.patch_size**2 * 3)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Predict masked patches.

        Args:
            images: (B, C, H, W), normalized.

        Returns:
            Predictions and targets, both (B, P, p*p*C).
        """
        size = len(images), self.backbone.sequence_length
        ids_keep, ids_mask = utils.random_token_mask(size, mask_ratio=MASK_RATIO)
        visible = self.decoder_embed(self.backbone.encode(images, idx_keep=ids_keep))

        # The decoder replaces the zeros by its mask token.
        tokens = utils.set_at_index(visible.new_zeros(*size, DECODER_DIM), ids_keep, visible)
        decoded = self.decoder(tokens, idx_mask=ids_mask)
        predictions = self.prediction_head(utils.get_at_index(decoded, ids_mask))

        patches = utils.patchify(images, self.patch_size)
        targets = utils.get_at_index(patches, ids_mask - 1)  # patches have no class token
        return predictions, targets


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train."""
    args = parse_args(argv)
    start_logging()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(args.seed)

    images = LightlyDataset(
        str(args.data_path / "train"), transform=MAETransform(input_size=IMG_SIZE)
    )
    loader = DataLoader(
        images,
        batch_size=args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.num_workers,
    )
    if not len(loader):
        raise InputError(
            f"{counted(len(images), 'image')} fill no batch, and the recipe drops incomplete ones: "
            "lower --batch_size"
        )
    model = MAE()
    criterion = nn.MSELoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr or LR)
    recorder = EpochRecorder(args.output_dir, epochs=args.epochs, save_every=args.save_every)

    recorder.start()
    for epoch in range(1, args.epochs + 1):
        total_loss = torch.zeros(())
        for (batch,), _, _ in loader:  # one view of each image, its label and file name
            predictions, targets = model(batch)
            loss = criterion(predictions, targets)
            total_loss += loss.detach()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        path = recorder.end_epoch(
            step=epoch * len(loader),
            loss=total_loss.item() / len(loader),
            num_images=len(loader) * args.batch_size,
        )
        if path:
            keep(path.with_suffix(".pth"), partial(torch.save, model.backbone.vit.state_dict()))


if __name__ == "__main__":
    run_main(main)
