"""Decoding of JPEG files by the first library that can: torchcodec, torchvision or Pillow.

All three use libjpeg-turbo, and their pixels are equal. torchvision's decoder is deprecated from
its version 0.29 on, and torchcodec's, from 0.16 on, succeeds it.
"""

import importlib.metadata
import io
import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, JpegImagePlugin
from torch import Tensor

from util.errors import InputError

JPEG_DECODER = "CROSSMAE_JPEG_DECODER"  # environment variable that overrides the choice
CPU = torch.device("cpu")


def decode_jpeg(file: Tensor) -> Tensor:
    """Decode an RGB or gray JPEG, uint8 (bytes,), to RGB pixels on the CPU.

    Metadata that turn the image are heeded by some libraries only: the file must have none.

    Returns:
        uint8 (3, h, w), channels last in memory.

    Raises:
        RuntimeError: the file is damaged.
    """
    return decoder_on(CPU).decode(file, device=CPU)


def decode_jpegs_on(device: torch.device, files: list[Tensor]) -> list[Tensor]:
    """Decode JPEGs as `decode_jpeg` does, but on a CUDA device, with slightly different pixels.

    Raises:
        RuntimeError: a file is damaged, or of a kind that the device does not decode.
    """
    return decoder_on(device).decode(files, device=device)


class Decoder(NamedTuple):
    """A library's decoder to RGB pixels."""

    name: str  # the library's, with its version
    decode: Callable[..., Tensor | list[Tensor]]
    """(file or list of files, device=) -> pixels of each."""


@cache
def decoder_on(device: torch.device) -> Decoder:
    """Return the decoder of the first library that works on a device, or of the user's choice.

    Raises:
        InputError: the user's choice is unknown or does not work; no library decodes on this GPU.
    """
    chosen = os.environ.get(JPEG_DECODER)
    if chosen is not None and chosen not in LIBRARIES:
        raise InputError(f"{JPEG_DECODER} must be one of {', '.join(LIBRARIES)}, not {chosen!r}")
    found = (open_decoder(name, device) for name in ([chosen] if chosen else LIBRARIES))
    decoder = next(filter(None, found), None)
    if decoder is None and chosen:
        raise InputError(
            f"{JPEG_DECODER} is {chosen}, which decodes no JPEG on {device} here: install a "
            f"version that does, or unset {JPEG_DECODER}"
        )
    if decoder is None:
        raise InputError(
            f"no installed library decodes JPEGs on {device}: install torchcodec, or use "
            "--decode cpu"
        )
    return decoder


def open_decoder(library: str, device: torch.device) -> Decoder | None:
    """Return a library's decoder, of LIBRARIES; None if it does not decode a JPEG on the device."""
    try:
        decode = LIBRARIES[library]()
        decode(_small_jpeg(), device=device)
    except Exception:  # not installed, too old, or built without JPEG or for another PyTorch
        return None
    return Decoder(f"{library} {importlib.metadata.version(library)}", decode)


def _torchcodec() -> Callable[..., Tensor | list[Tensor]]:
    from torchcodec.decoders import decode_jpeg

    return partial(decode_jpeg, mode="RGB")


def _torchvision() -> Callable[..., Tensor | list[Tensor]]:
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(files: Tensor | list[Tensor], *, device: torch.device) -> Tensor | list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its successor was looked for
            return decode_jpeg(files, mode=ImageReadMode.RGB, device=device)

    return decode


def _pillow() -> Callable[..., Tensor]:
    return _decode_by_pillow


LIBRARIES = {"torchcodec": _torchcodec, "torchvision": _torchvision, "pillow": _pillow}
"""Functions that import a decoder, by the library's name in the package index; the best first."""


def _decode_by_pillow(file: Tensor, *, device: torch.device) -> Tensor:
    if device.type != "cpu":
        raise RuntimeError("Pillow decodes on the CPU only")
    try:
        with JpegImagePlugin.JpegImageFile(io.BytesIO(file.numpy().tobytes())) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:  # broken files raise anything
        raise RuntimeError(str(error)) from error


def _small_jpeg() -> Tensor:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
