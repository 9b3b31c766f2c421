"""Reading weight files without running what is in them, and the names other projects use."""

import argparse
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from util.errors import InputError

# Prefixes of the released CrossMAE and MAE checkpoints, and ours. The rest of a name is equal.
RELEASED_PREFIXES = {
    "cls_token": "encoder.cls_token",
    "pos_embed": "encoder.pos_embed",
    "patch_embed.": "encoder.patch_embed.",
    "blocks.": "encoder.blocks.",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.pos_embed",
    "wfm.linear.weight": "decoder.inter_block_attention.weight",
    "dec_norms.": "decoder.context_norms.",
    "norm.": "decoder.context_norm.",
    "decoder_embed.": "decoder.embed.",
    "decoder_blocks.": "decoder.blocks.",
    "decoder_norm.": "decoder.norm.",
    "decoder_pred.": "decoder.pred.",
}


def read_weights_file(path: str | Path) -> dict:
    """Load a file written by `torch.save`, tensors on the CPU, without running code from it.

    Plain values, tensors and the argparse.Namespace of released checkpoints are read; a file that
    refers to anything else is refused. Files in the zip format are checked against their
    checksums first.

    Raises:
        InputError: the file is missing, damaged, no weights file, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file: check the path of the checkpoint")
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()
                if damaged is not None:
                    raise InputError(f"{path} is damaged: {damaged} fails its checksum")
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
                if foreign:
                    raise InputError(
                        f"{path} is refused: loading it would run code ({', '.join(foreign)})"
                    )
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{path} is refused: it is no weights file, or loading it would run code"
            ) from error
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise InputError(f"{path} is truncated or no weights file: {reason}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not the weights of a model")
    return content


def from_released(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of a released CrossMAE or MAE checkpoint to ours.

    Raises:
        InputError: a name is none of theirs.
    """
    renamed = {}
    for name, tensor in state.items():
        prefix = next((p for p in RELEASED_PREFIXES if name.startswith(p)), None)
        if prefix is None:
            raise InputError(f"{name} is no weight of a released CrossMAE or MAE checkpoint")
        renamed[RELEASED_PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    return renamed


def released_feature_maps(
    depth: int, *, weight_fm: bool, use_input: bool, use_fm: list[int] | None
) -> str | list[int]:
    """Turn the released code's choice of maps into ours.

    Args:
        depth: number of encoder blocks.
        weight_fm: inter-block attention is on.
        use_input: the encoder's input is feature map 0.
        use_fm: the blocks that take part, counted from 0; None or [-1] is all of them.
    """
    if not weight_fm:
        return "last"
    blocks = range(depth) if use_fm in (None, [-1]) else use_fm
    return [0] * use_input + [block % depth + 1 for block in blocks]
