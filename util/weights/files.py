"""Files of weights: read without running what is in them, written as a whole or not at all."""

import argparse
import pickle
import pickletools
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from util.errors import InputError, as_input_error

VERSION = 1  # of this project's checkpoints
MAX_PICKLE = 2**23  # bytes of a file that are not tensors; a ViT-H's checkpoint has 2**19
MAX_TUPLES = 100_000  # a ViT-H's has 13,000; Python crashes where many more lie in each other
MAX_SHARED = 4  # tensors may share their bytes, but not so often that a small file fills the memory
KINDS = {"pretrain": "pre-training", "finetune": "fine-tuning", "linprobe": "linear-probing"}


def read_weights_file(path: str | Path) -> dict:
    """Load a weights file, tensors on the CPU, without running code from it.

    Of a file written by `torch.save`, plain values, tensors and the argparse.Namespace of released
    checkpoints are read; one that refers to anything else is refused. Files in the zip format are
    checked against their checksums first. What is read takes memory in proportion to the file. A
    .safetensors file becomes {"model", "metadata"}.

    Raises:
        InputError: the file is missing, damaged, no weights file, would run code, or unfolds to
            more than it has bytes.
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
    _check_content(content, path)
    return content


def _load_checked(path: Path) -> object:
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            # Copies, because the tensors of a mapped file change and vanish with it.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return {"model": state, "metadata": file.metadata() or {}}
    with torch.serialization.safe_globals([argparse.Namespace]):
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # which is how torch.load tells
            if not is_zip:
                file.seek(0)
                _check_pickles(file, path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                _check_archive(archive, path)
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if foreign:
                raise InputError(
                    f"{path} is refused: loading it would run code ({', '.join(foreign)})"
                )
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse what torch.save does not write: it neither compresses nor lets records overlap."""
    records = archive.infolist()
    plain = all(r.compress_type == zipfile.ZIP_STORED and not r.flag_bits & 1 for r in records)
    claimed = [r.file_size for r in records]
    if not plain or claimed != [r.compress_size for r in records]:
        raise InputError(
            f"{path} is refused: it is compressed or encrypted, which torch.save never does, so "
            "that it could unfold to any size"
        )
    if sum(claimed) > path.stat().st_size:
        raise InputError(f"{path} is refused: its records claim more bytes than the file has")
    damaged = archive.testzip()
    if damaged is not None:
        raise InputError(f"{path} is damaged: {damaged} fails its checksum")
    for record in records:
        if record.filename.endswith(".pkl"):
            with archive.open(record) as file:
                _check_pickles(file, path, record.file_size)


def _check_pickles(file: BinaryIO, path: Path, size: int = 0) -> None:
    """Refuse pickles that are long, or that make bytes out of a number; torch.load sees the rest.

    Args:
        file: holds the pickles one after another, at most as many as torch.save writes into one.
        path: for the message.
        size: of the pickles in bytes, as far as it is known.
    """
    num_tuples = 0
    with suppress(ValueError):  # the end, or no pickle
        for _ in range(5):
            for opcode, argument, position in pickletools.genops(file):
                num_tuples += opcode.name.startswith("TUPLE")
                if max(position, size) > MAX_PICKLE or num_tuples > MAX_TUPLES:
                    raise InputError(
                        f"{path} is refused: it has more beside its tensors than a checkpoint has"
                    )
                if isinstance(argument, str) and argument.endswith(" bytearray"):
                    raise InputError(f"{path} is refused: it holds a bytearray, as no weights do")


def _check_content(content: dict, path: Path) -> None:
    """Refuse tensors other than plain ones, and what unfolds to far more than the file has bytes.

    A few bytes can stand for a tensor of any size, if its strides are 0, and for any number of
    values, if lists hold the same lists several times.
    """
    num_bytes = path.stat().st_size
    num_values, num_tensor_bytes, todo = 0, 0, [content]
    while todo:
        value = todo.pop()
        num_values += 1
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise InputError(f"{path} is refused: it holds tensors that are no plain numbers")
            num_tensor_bytes += value.numel() * value.element_size()
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            todo += value
        elif isinstance(value, argparse.Namespace):
            todo.append(vars(value))
        if num_values > num_bytes or num_tensor_bytes > MAX_SHARED * num_bytes:
            raise InputError(
                f"{path} is refused: its {num_bytes} bytes would unfold to many times as many"
            )


def unknown_content(path: str | Path) -> AbstractContextManager:
    """Context in which a file's content is used: odd types and names in it are wrong input."""
    return as_input_error(
        lambda error: (
            f"{path} is damaged, or written by a program that this one does not know "
            f"({type(error).__name__}): use another file"
        ),
        *(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    )


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
    if not isinstance(content.get("version"), int):
        raise InputError(f"{path} does not tell the version of its format: use another file")
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
