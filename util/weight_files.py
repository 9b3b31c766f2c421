"""Files of weights: read without running what is in them, written as a whole or not at all."""

import argparse
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from util.errors import InputError

VERSION = 1  # of this project's checkpoints
KINDS = {"pretrain": "pre-training", "finetune": "fine-tuning", "linprobe": "linear-probing"}


def read_weights_file(path: str | Path) -> dict:
    """Load a weights file, tensors on the CPU, without running code from it.

    Of a file written by `torch.save`, plain values, tensors and the argparse.Namespace of released
    checkpoints are read; one that refers to anything else is refused. Files in the zip format are
    checked against their checksums first. A .safetensors file becomes {"model", "metadata"}.

    Raises:
        InputError: the file is missing, damaged, no weights file, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file: check the path of the checkpoint")
    try:
        content = _load_checked(path)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is refused: it is no weights file, or loading it would run code"
        ) from error
    except Exception as error:  # a damaged file can make a reader fail in any way
        raise InputError(
            f"{path} is truncated, damaged or no weights file ({type(error).__name__}): copy it "
            "again, or use another checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not the weights of a model")
    return content


def _load_checked(path: Path) -> object:
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            # Copies, because the tensors of a mapped file change and vanish with it.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return {"model": state, "metadata": file.metadata() or {}}
    with torch.serialization.safe_globals([argparse.Namespace]):
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
        return torch.load(path, map_location="cpu", weights_only=True)


def check_format(content: dict, path: str | Path, kind: str) -> dict:
    """Return the content of a file if it is a checkpoint that this code can read.

    Args:
        content: of the file.
        path: for the message.
        kind: one of KINDS.

    Raises:
        InputError: it is of another program or of a newer version.
    """
    if content.get("format") != f"crossmae-{kind}":
        raise InputError(f"{path} is no {KINDS[kind]} checkpoint of this project")
    if content["version"] > VERSION:
        raise InputError(
            f"{path} has version {content['version']} of the checkpoint format and this code reads "
            f"up to {VERSION}: update the code"
        )
    return content


def save_safetensors(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors and strings; with the permissions and errors of any other file."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def write_new(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file or folder that appears as a whole or not at all.

    Raises:
        InputError: there is one already, or it cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise InputError(f"{path} exists: delete it first, or choose another --output")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            unfinished = Path(folder) / path.name
            write(unfinished)
            unfinished.rename(path)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot write --output {path}: {reason}") from error
