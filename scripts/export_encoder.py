"""Export a trained encoder to timm, to Hugging Face, or to an encoder-only file.

    python scripts/export_encoder.py --checkpoint C --format {timm,hf,safetensors} --output O

timm: a .pth or .safetensors file for `timm.create_model`; the log has the line that loads it. hf: a
folder for transformers' `from_pretrained`. safetensors: the trained weights, under timm's names,
for this project. C is any file that `util.weights.encoder.read_encoder` reads.
"""

import json
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from models import find_size, load_model
from models_crossmae import MaskedAutoencoder
from models_vit import NORM_EPS, SIZES, VisionTransformer, build_vit
from util.arguments import Parser
from util.errors import InputError
from util.runs.run import run_main, start_run
from util.weights.encoder import (
    EncoderWeights,
    fit_encoder,
    load_encoder,
    read_encoder,
    save_encoder,
)
from util.weights.files import save_safetensors, write_new
from util.weights.names import DECODER_NAMES, ENCODER_NAMES, hugging_face_names

# timm lacks a tiny ViT with patches of 4 px, but takes the patch size as an argument.
TIMM_NAMES = {size: f"vit_{size}_224" for size in SIZES} | {"tiny_patch4": "vit_tiny_patch16_224"}
# Weights that only an MAE's decoder has, in our checkpoints and in released ones.
MAE_DECODERS = {"decoder.embed.weight", "decoder_embed.weight"}

_logger = logging.getLogger(__name__)


def fold_probe(head_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold a linear probe's head, a normalization and a linear layer, into one linear layer."""
    if "head.0.running_var" not in head_state:
        return head_state
    scale = (head_state["head.0.running_var"] + NORM_EPS).rsqrt()
    weight = head_state["head.1.weight"] * scale
    bias = head_state["head.1.bias"] - weight @ head_state["head.0.running_mean"]
    rest = {name: tensor for name, tensor in head_state.items() if not name.startswith("head.")}
    return {**rest, "head.weight": weight, "head.bias": bias}


def build(weights: EncoderWeights, size: str, *, head: bool) -> VisionTransformer:
    """Build a new model that fits the weights, with their head or without one."""
    return build_vit(
        SIZES[size],
        img_size=weights.img_size,
        in_chans=weights.in_chans,
        num_classes=(weights.num_classes or 0) if head else 0,
        pool="avg" if "fc_norm.weight" in weights.head_state else "cls",
    )


def complete(weights: EncoderWeights, size: str, *, head: bool) -> VisionTransformer:
    """Build a model and load the weights; a norm that they lack has scale 1 and shift 0.

    Raises:
        InputError: the weights do not fit a ViT of that size.
    """
    model = build(weights, size, head=head)
    load_encoder(model, weights, head=head and weights.num_classes is not None)
    return model.eval()


def write_timm(weights: EncoderWeights, size: str, output: Path) -> None:
    """Write a file that `timm.create_model` loads strictly, and log the call.

    Raises:
        InputError: the suffix is neither .pth nor .safetensors, or the file cannot be written.
    """
    if output.suffix not in (".pth", ".safetensors"):
        raise InputError(f"--output {output} must end in .pth or .safetensors with --format timm")
    weights = weights._replace(head_state=fold_probe(weights.head_state))
    model = complete(weights, size, head=True)
    norms = [name for name in weights.head_state if name in ("norm.weight", "fc_norm.weight")]
    if not norms:
        _logger.info("no final norm was trained: writing one with scale 1 and shift 0")
    state = model.state_dict()
    if output.suffix == ".pth":
        write_new(output, partial(torch.save, state))
    else:
        head_state = {name: state[name] for name in state if name not in weights.encoder}
        write_new(output, partial(save_encoder, weights._replace(head_state=head_state)))

    name = TIMM_NAMES[size]
    options = {"num_classes": weights.num_classes or 0, "img_size": model.img_size}
    if model.img_size[0] == model.img_size[1]:
        options["img_size"] = model.img_size[0]
    if f"patch{model.patch_size}_" not in name:
        options["patch_size"] = model.patch_size
    if model.in_chans != 3:
        options["in_chans"] = model.in_chans
    if model.pool == "avg":
        options["global_pool"] = "avg"
    words = [repr(name), *(f"{key}={value!r}" for key, value in options.items())]
    words.append(f"checkpoint_path={str(output)!r}")
    _logger.info("timm.create_model(%s)", ", ".join(words))


def vit_config(weights: EncoderWeights, size: str) -> dict:
    """Return the config.json of a ViTModel."""
    height, width = weights.img_size
    patch_size, embed_dim, depth = weights.shape
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": embed_dim,
        "num_hidden_layers": depth,
        "num_attention_heads": SIZES[size].num_heads,
        "intermediate_size": weights.mlp_dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": NORM_EPS,
        "image_size": height if height == width else [height, width],
        "patch_size": patch_size,
        "num_channels": weights.in_chans,
        "qkv_bias": True,
        "torch_dtype": "float32",
    }


def mae_config(model: MaskedAutoencoder, mask_ratio: float) -> dict:
    """Return how the config.json of a ViTMAEForPreTraining differs from that of a ViTModel."""
    block = model.decoder.blocks[0]
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "decoder_hidden_size": block.norm1.weight.shape[0],
        "decoder_num_hidden_layers": len(model.decoder.blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": mask_ratio,
        "norm_pix_loss": model.norm_pix_loss,
    }


def processor_config(weights: EncoderWeights) -> dict:
    """Return the preprocessor_config.json, which resizes and normalizes images as in training."""
    if weights.mean is None or weights.std is None:
        _logger.info("the checkpoint has no mean and std: writing ImageNet's")
    height, width = weights.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": weights.mean or list(IMAGENET_DEFAULT_MEAN),
        "image_std": weights.std or list(IMAGENET_DEFAULT_STD),
    }


def write_folder(state: dict[str, Tensor], config: dict, processor: dict, folder: Path) -> None:
    """Write the three files of a Hugging Face model."""
    folder.mkdir()
    save_safetensors(state, folder / "model.safetensors", {"format": "pt"})
    files = {"config.json": config, "preprocessor_config.json": processor}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def read_mae(checkpoint: Path, weights: EncoderWeights) -> tuple[MaskedAutoencoder, dict] | None:
    """Load a whole model if ViTMAEForPreTraining can represent it; otherwise, log why not."""
    if not MAE_DECODERS & set(weights.left_out):
        reason = "the checkpoint has no MAE decoder that this project can read"
    else:
        model, training = load_model(checkpoint)
        if model.decoder.inter_block_attention is not None:
            reason = "ViTMAE has no inter-block attention"
        elif model.encoder.img_size[0] != model.encoder.img_size[1]:
            reason = "ViTMAE takes square images only"
        else:
            return model, training
    _logger.info("exporting only the encoder, as ViTModel: %s", reason)
    return None


def write_hugging_face(checkpoint: Path, weights: EncoderWeights, size: str, output: Path) -> None:
    """Write a folder for `from_pretrained` with a whole MAE, or otherwise only the encoder.

    Raises:
        InputError: the folder cannot be written.
    """
    # ViTModel's layernorm acts on every token, unlike fc_norm.
    head_state = {name: t for name, t in weights.head_state.items() if name.startswith("norm.")}
    lost = [name for name in weights.head_state if name not in head_state]
    if lost:
        _logger.info("left out, because ViTModel lacks it: %s", ", ".join(lost))
    model = complete(weights._replace(head_state=head_state), size, head=False)
    mae = read_mae(checkpoint, weights)
    config, prefix, decoder = vit_config(weights, size), "", {}
    if mae is not None:
        whole, training = mae
        config |= mae_config(whole, training["mask_ratio"])
        prefix = "vit."
        theirs = whole.decoder.state_dict().items()
        parts = {name: t for name, t in theirs if not name.startswith("context_norm.")}
        decoder = hugging_face_names(parts, DECODER_NAMES, layers="decoder.decoder_layers")
    elif not head_state:
        _logger.info("no final norm was trained: writing one with scale 1 and shift 0")
    encoder = hugging_face_names(model.state_dict(), ENCODER_NAMES, layers="encoder.layer")
    state = {**{prefix + name: tensor for name, tensor in encoder.items()}, **decoder}
    write_new(output, partial(write_folder, state, config, processor_config(weights)))
    option = "" if mae else ", add_pooling_layer=False"
    architecture = config["architectures"][0]
    _logger.info("transformers.%s.from_pretrained(%r%s)", architecture, str(output), option)


def main(argv: Sequence[str] | None = None) -> None:
    """Export one checkpoint."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="checkpoint of this project, released or timm weights, or a Hugging Face folder",
    )
    parser.add_argument(
        "--format", required=True, choices=("timm", "hf", "safetensors"), help="kind of output"
    )
    parser.add_argument("--output", required=True, help="new file, or new folder with --format hf")
    args = parser.parse_args(argv)
    start_run(device="cpu", seed=0)
    checkpoint, output = Path(args.checkpoint), Path(args.output)

    weights = read_encoder(checkpoint)
    try:
        size = find_size(*weights.shape)
    except ValueError as error:
        raise InputError(f"{checkpoint} cannot be exported: {error}") from error
    if args.format == "timm":
        write_timm(weights, size, output)
    elif args.format == "hf":
        write_hugging_face(checkpoint, weights, size, output)
    else:
        if output.suffix != ".safetensors":
            raise InputError(
                f"--output {output} must end in .safetensors with --format safetensors"
            )
        fit_encoder(
            build(weights, size, head=False), weights, head=False
        )  # raises if they do not fit
        write_new(output, partial(save_encoder, weights))
    _logger.info("wrote %s", output)


if __name__ == "__main__":
    run_main(main)
