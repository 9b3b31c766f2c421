"""Weights files: read without running code from them, and written atomically."""

import argparse
import pickle
import pickletools
import re
import tempfile
import zipfile
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from util.arguments import check_new
from util.errors import InputError, as_input_error, first_few
from util.weights.values import HARMLESS

VERSION = 1  # of this project's checkpoints
MAX_PICKLE = 2**23  # bytes of a file that are not tensors; a ViT-H's checkpoint has 2**19
MAX_TUPLES = 100_000  # a ViT-H's checkpoint has 13,000; deep nesting of many more crashes Python
MAX_SHARED = 4  # tensors may share bytes, but a small file must not fill the memory
SAVE_WEIGHTS = (
    "keep only its weights, with the program that wrote it: content = torch.load(FILE, "
    'weights_only=False); torch.save({"model": weights}, "weights.pth"), where weights is '
    'content["model"], content["state_dict"] or content.state_dict()'
)
KINDS = {
    "pretrain": "pre-training",
    "finetune": "fine-tuning",
    "linprobe": "linear-probing",
    "segmentation": "segmentation",
    "detection": "detection",
}


class WeightsNotFoundError(InputError):
    """A file of weights does not exist, or its address cannot be reached."""


def read_weights_file(path: str | Path) -> dict:
    """Load a weights file onto the CPU without running code from it.

    A file of `torch.save` may hold only plain values, tensors, the argparse.Namespace of released
    checkpoints, and harmless values, which are skipped (see `util.weights.values`). In the zip
    format, its checksums are verified first. The memory needed is proportional to the file size. A
    .safetensors file becomes {"model", "metadata"}.

    Raises:
        WeightsNotFoundError: the file is missing.
        InputError: it is damaged, not a weights file, would run code, or expands to far more than
            its size.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsNotFoundError(f"checkpoint not found: {path}")
    try:
        content = _load_checked(path)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        foreign = re.findall(r"GLOBAL (\S+) w", str(error))  # the first, in torch.load's message
        raise _refusal(path, foreign) from error
    except Exception as error:  # a damaged file can make a reader fail in any way
        raise InputError(
            f"{path} is truncated, damaged or not a weights file ({type(error).__name__}): copy it "
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
    with torch.serialization.safe_globals([argparse.Namespace, *HARMLESS]):
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # torch.load's own test
            if not is_zip:
                file.seek(0)
                _check_pickles(file, path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                _check_archive(archive, path)
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if foreign:
                raise _refusal(path, foreign)
        return torch.load(path, map_location="cpu", weights_only=True)


def _refusal(path: Path, foreign: Collection[str]) -> InputError:
    """Error for a pickle that names foreign types or functions, if it is known which."""
    if not foreign:
        return InputError(
            f"refusing to load {path}: it is not a weights file, or loading it would run code"
        )
    return InputError(
        f"refusing to load {path}: loading it would run code ({first_few(sorted(foreign))}); if "
        f"you trust it, {SAVE_WEIGHTS}"
    )


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse archives that torch.save would not write: compressed, or with overlapping records."""
    records = archive.infolist()
    plain = all(r.compress_type == zipfile.ZIP_STORED and not r.flag_bits & 1 for r in records)
    claimed = [r.file_size for r in records]
    if not plain or claimed != [r.compress_size for r in records]:
        raise InputError(
            f"refusing to load {path}: it is compressed or encrypted, which torch.save never does, "
            "and could expand to any size"
        )
    if sum(claimed) > path.stat().st_size:
        raise InputError(f"refusing to load {path}: its records claim more bytes than it has")
    damaged = archive.testzip()
    if damaged is not None:
        raise InputError(f"{path} is damaged ({damaged} fails its checksum): copy it again")
    for record in records:
        if record.filename.endswith(".pkl"):
            with archive.open(record) as file:
                _check_pickles(file, path, record.file_size)


def _check_pickles(file: BinaryIO, path: Path, size: int = 0) -> None:
    """Refuse pickles that are long, or that allocate bytearrays; torch.load checks the rest.

    Args:
        file: has at most the five consecutive pickles that torch.save writes.
        size: of the pickles in bytes, if known.
    """
    num_tuples = 0
    with suppress(ValueError):  # the end, or not a pickle
        for _ in range(5):
            for opcode, argument, position in pickletools.genops(file):
                if opcode.name == "PROTO" and argument > 3:
                    raise InputError(
                        f"refusing to load {path}: it has pickle protocol {argument} instead of "
                        f"torch.save's 2; if you trust it, {SAVE_WEIGHTS}"
                    )
                num_tuples += opcode.name.startswith("TUPLE")
                if max(position, size) > MAX_PICKLE or num_tuples > MAX_TUPLES:
                    raise InputError(
                        f"refusing to load {path}: it has more besides tensors than any checkpoint"
                    )
                if isinstance(argument, str) and argument.endswith(" bytearray"):
                    raise InputError(
                        f"refusing to load {path}: it has a bytearray, which weights never have"
                    )


def _check_content(content: dict, path: Path) -> None:
    """Refuse tensors that are not plain, and content that expands to far more than the file size.

    A few bytes can encode a tensor of any size, if its strides are 0, or any number of values, if
    lists hold the same lists several times.
    """
    num_bytes = path.stat().st_size
    num_values, num_tensor_bytes, todo = 0, 0, [content]
    while todo:
        value = todo.pop()
        num_values += 1
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                raise InputError(
                    f"refusing to load {path}: it has tensors other than dense ones on the CPU"
                )
            num_tensor_bytes += value.numel() * value.element_size()
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            todo += value
        elif isinstance(value, argparse.Namespace):
            todo.append(vars(value))
        if num_values > num_bytes or num_tensor_bytes > MAX_SHARED * num_bytes:
            raise InputError(
                f"refusing to load {path}: its {num_bytes} bytes would expand to many times that"
            )


def unknown_content(path: str | Path) -> AbstractContextManager:
    """Context for using a file's content: wrong types and names in it become InputError."""
    return as_input_error(
        lambda error: (
            f"{path} is damaged, or was written by an unknown program "
            f"({type(error).__name__}): use another file"
        ),
        *(ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError),
    )


def check_format(content: dict, path: str | Path, kind: str) -> dict:
    """Return the content of a file if it is a checkpoint that this code can read.

    Args:
        kind: one of KINDS.

    Raises:
        InputError: it is from another program or of a newer version.
    """
    if content.get("format") != f"crossmae-{kind}":
        raise InputError(f"{path} is not a {KINDS[kind]} checkpoint of this project")
    if not isinstance(content.get("version"), int):
        raise InputError(f"{path} lacks the version of its format: use another file")
    if content["version"] > VERSION:
        raise InputError(
            f"{path} has version {content['version']} of the checkpoint format, but this code "
            f"reads only up to {VERSION}: update the code"
        )
    return content


def save_safetensors(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors and metadata, with the permissions and errors of any other file."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def write_new(path: Path, write: Callable[[Path], None], *, flag: str = "--output") -> None:
    """Let `write` create a file or folder atomically.

    Args:
        path: what the user gave as `flag`.

    Raises:
        InputError: it already exists, or cannot be written.
    """
    check_new(path, flag=flag)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            unfinished = Path(folder) / path.name
            write(unfinished)
            unfinished.rename(path)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot write {flag} {path}: {reason}") from error
