"""Pre-train an MAE with Hugging Face's ViTMAEForPreTraining and Trainer, by their example's recipe.

    python scripts/peers/transformers_mae.py --data_path IMAGES --output_dir OUT --epochs 100
    python main_knn.py --checkpoint OUT/encoder-e0100 --data_path IMAGES

The recipe is that of the command in examples/pytorch/image-pretraining/README.md of transformers.
Only the sizes are this project's: README.md beside this file lists what differs. It needs
requirements.txt beside this file.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.peers.recording import EpochRecorder, keep, parse_peer_args
from util.arguments import check_arguments

BASE_LR = 1.5e-4  # per 256 images


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    return parse_peer_args(
        argv,
        __doc__.splitlines()[0],
        batch_size=8,
        num_workers=0,
        lr="1.5e-4 x images per step / 256",
    )


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch
import torch.nn as nn
from datasets import Dataset, load_dataset
from torch import Tensor
from torchvision.transforms import (
    Compose,
    InterpolationMode,
    Lambda,
    Normalize,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ToTensor,
)
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    set_seed,
)

from util.runs.run import run_main, start_logging

IMG_SIZE = 128  # px
SIZES = {  # of the encoder, then of the decoder
    "image_size": IMG_SIZE,
    "patch_size": 16,
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 4 * 192,
    "decoder_hidden_size": 128,
    "decoder_num_hidden_layers": 4,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 4 * 128,
}


class EpochCallback(TrainerCallback):
    """Records epochs, and saves encoders with the processor that prepared their images.

    Args:
        num_images: per epoch.
    """

    def __init__(
        self, recorder: EpochRecorder, processor: ViTImageProcessor, num_images: int
    ) -> None:
        self.recorder, self.processor, self.num_images = recorder, processor, num_images

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Start the clock."""
        self.recorder.start()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        model: ViTMAEForPreTraining,
        **_: object,
    ) -> None:
        """Record an epoch, after which Trainer logs its mean loss."""
        if "loss" not in logs:  # the summary of the run
            return
        values = {"step": state.global_step, "loss": logs["loss"], "num_images": self.num_images}
        if path := self.recorder.end_epoch(**values):
            keep(path, partial(self.save, model))

    def save(self, model: ViTMAEForPreTraining, path: Path) -> None:
        """Write the encoder and the processor to a folder."""
        model.vit.save_pretrained(path)
        self.processor.save_pretrained(path)


def read_images(folder: Path, cache: Path, processor: ViTImageProcessor) -> Dataset:
    """List the images below a folder, which are decoded and transformed when they are read.

    Args:
        cache: folder for the list.
    """
    transform = Compose(
        [
            Lambda(lambda image: image.convert("RGB") if image.mode != "RGB" else image),
            RandomResizedCrop(IMG_SIZE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
            RandomHorizontalFlip(),
            ToTensor(),
            Normalize(processor.image_mean, processor.image_std),
        ]
    )
    # Without data_files, it would sort images into splits by words in their names, such as "val".
    files = {"train": str(folder / "**")}
    images = load_dataset("imagefolder", data_files=files, split="train", cache_dir=str(cache))
    images.set_transform(
        lambda batch: {"pixel_values": [transform(image) for image in batch["image"]]}
    )
    return images


def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack images (C, H, W) into a batch."""
    return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}


def build_model() -> ViTMAEForPreTraining:
    """Build a new model, and run the parts of its initialization that transformers 5.24 skips.

    The constructor leaves the class token, the mask token and all position embeddings at zero, and
    positions are not trained: all masked patches of an image would get the same prediction.
    """
    model = ViTMAEForPreTraining(ViTMAEConfig(**SIZES, mask_ratio=0.75, norm_pix_loss=True))
    embeddings = type(model.vit.embeddings)(model.config)
    embeddings.initialize_weights()
    nn.init.zeros_(embeddings.patch_embeddings.projection.bias)
    model.vit.embeddings = embeddings
    model.decoder.initialize_weights(embeddings.patch_embeddings.num_patches)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Pre-train."""
    args = parse_args(argv)
    start_logging()
    torch.set_num_threads(args.num_threads)
    set_seed(args.seed)
    recorder = EpochRecorder(args.output_dir, epochs=args.epochs, save_every=args.save_every)

    processor = ViTImageProcessor(size={"height": IMG_SIZE, "width": IMG_SIZE})
    images = read_images(args.data_path / "train", args.output_dir / "cache", processor)
    model = build_model()
    settings = TrainingArguments(
        output_dir=str(args.output_dir),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr or BASE_LR * args.batch_size / 256,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,  # of all steps
        weight_decay=0.05,
        remove_unused_columns=False,
        dataloader_num_workers=args.num_workers,
        logging_strategy="epoch",
        save_strategy="no",  # the callback saves
        disable_tqdm=True,
        use_cpu=True,
        seed=args.seed,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=images,
        processing_class=processor,
        data_collator=collate,
        callbacks=[EpochCallback(recorder, processor, len(images))],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


if __name__ == "__main__":
    run_main(main)
