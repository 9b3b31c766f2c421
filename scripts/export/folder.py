"""A model's folder: weights, settings and a model card."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from scripts.export.source import Source
from util.errors import InputError
from util.weights.files import save_safetensors

PAPERS = {
    "CrossMAE": "https://arxiv.org/abs/2401.14391",
    "MAE": "https://arxiv.org/abs/2111.06377",
}
FILE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".onnx", ".safetensors", ".npz")
MAX_LISTED = 50  # classes in a model card
TASKS = {
    "multilabel": "Several classes can apply to an image: scores are sigmoids of the outputs.",
    "regression": "The output is the predicted value.",
}


def check_folder_name(output: Path) -> None:
    """Raise InputError for the name of a file; other suffixes may be parts of a version."""
    if output.suffix.lower() in FILE_SUFFIXES:
        raise InputError(
            f"--output {output} would be a folder: leave {output.suffix} out (a file for timm ends "
            "in .pth or .safetensors)"
        )


def write_folder(
    state: Mapping[str, Tensor], settings: Mapping[str, dict], card: str, folder: Path
) -> None:
    """Write a new folder.

    Args:
        settings: name of a JSON file -> its content.
        card: text of README.md.
    """
    folder.mkdir()
    save_safetensors(state, folder / "model.safetensors", {"format": "pt"})
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "README.md").write_text(card)


def model_card(source: Source, *, library: str, usage: str, more: str = "") -> str:
    """Return the README.md of a folder.

    Args:
        library: name on the Hugging Face hub of the library that reads it.
        usage: Python code that loads the folder.
        more: text about the code.
    """
    weights, images = source.weights, source.images
    classifies = weights.num_classes and weights.task != "regression"
    tag = "image-classification" if classifies else "image-feature-extraction"
    size, _, patch_size = source.size.partition("_patch")
    kind = f"A ViT-{size} with patches of {patch_size} px"
    method = source.method
    if method:
        kind += f", pre-trained by [{method}]({PAPERS[method]})"
    elif "of this project" in weights.kind:
        kind += f", trained with code for [CrossMAE]({PAPERS['CrossMAE']})"
    if weights.num_classes:
        outputs = "1 output" if weights.num_classes == 1 else f"{weights.num_classes} outputs"
        kind += f", with a head of {outputs}"
    cover = " x ".join(map(str, images.cover_size))
    resized = f"resized to {cover} px" if images.squash else f"resized to cover {cover} px"
    height, width = images.img_size
    lines = [
        "---",
        f"library_name: {library}",
        f"pipeline_tag: {tag}",
        "---",
        "",
        f"# ViT-{size}, {height} x {width} px",
        "",
        f"{kind}. {TASKS.get(weights.task, '')}".strip(),
        "",
        f"- Input: {images.kind}, {resized} ({images.interpolation}), of which the central "
        f"{height} x {width} px are taken.",
        *(f"- {note.capitalize()}." for note in images.notes),
        f"- Mean {images.mean} and std {images.std}, on the [0, 1] scale.",
        "- License: unknown. State one before you publish this model.",
        "",
        "```python",
        usage,
        "```",
        "",
    ]
    if more:
        lines += [more, ""]
    if weights.classes:
        listed = weights.classes[:MAX_LISTED]
        rest = len(weights.classes) - len(listed)
        text = ", ".join(listed) + (f" and {rest} more (see config.json)" if rest else "")
        lines += [f"Classes: {text}.", ""]
    return "\n".join(lines)
