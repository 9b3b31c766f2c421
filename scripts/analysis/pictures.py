"""Paths of pictures to write; imports no PyTorch, so that mistakes are answered at once."""

from pathlib import Path

from PIL import Image

from util.arguments import check_output_folders
from util.errors import InputError


def check_picture_path(path: Path) -> None:
    """Raise InputError unless a picture can be written to this path."""
    check_output_folders(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise InputError(f"--output {path} is not a picture: call it figure.png, say")
