"""ONNX, by way of the timm model."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import timm
import torch

from scripts.export.source import Source, complete, linear_head
from scripts.export.to_timm import TIMM_NAMES, model_args
from util.errors import InputError
from util.weights.files import write_new

MAX_BYTES = 2**31  # of one ONNX file

_logger = logging.getLogger(__name__)


def write_onnx(source: Source, output: Path) -> None:
    """Write a graph from `images` (B, C, H, W), for any B, to `logits` or `features`.

    Raises:
        InputError: the suffix is not .onnx, a package is missing, the model is too large, or the
            file cannot be written.
    """
    if output.suffix != ".onnx":
        raise InputError(f"--output {output} must end in .onnx with --format onnx")
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        raise InputError("--format onnx needs two more packages: pip install onnx onnxscript")
    if sum(tensor.nbytes for tensor in source.weights.encoder.values()) > MAX_BYTES:
        raise InputError("an ONNX file holds up to 2 GiB, less than this model: use --format timm")
    for name in ("onnx_ir", "onnxscript"):  # they log every weight
        logging.getLogger(name).setLevel(logging.WARNING)
    source = source._replace(weights=linear_head(source.weights))
    num_classes = source.weights.num_classes or 0
    model = timm.create_model(
        TIMM_NAMES[source.size], num_classes=num_classes, **model_args(source)
    )
    model.load_state_dict(complete(source.weights, source.size).state_dict())
    images = torch.zeros(2, source.weights.in_chans, *source.images.img_size)
    program = torch.onnx.export(
        model.eval(),
        (images,),
        input_names=["images"],
        output_names=["logits" if num_classes else "features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    about = {key: getattr(source.images, key) for key in ("mean", "std")}
    about["value_range"] = [0, 255] if source.images.pixels.is_rgb8 else source.weights.value_range
    for key, value in about.items():
        program.model.metadata_props[key] = json.dumps(value)
    write_new(output, program.save)
    _logger.info("onnxruntime.InferenceSession(%r).run(None, {'images': images})", str(output))
