"""ONNX graphs give the same results in onnxruntime, which is not among the requirements."""

import json
from importlib import util

import pytest
import torch

from models_vit import build_vit
from scripts.export import to_onnx
from scripts.export.to_timm import model_args
from tests.helpers.exports import TINY_PATCH4, export
from tests.helpers.models import use_nano_models
from tests.helpers.weights import finetuned, randomized, vit_nano
from util.errors import InputError
from util.settings.model import SIZES


def test_missing_packages_are_named(tmp_path, monkeypatch):
    use_nano_models(monkeypatch)
    monkeypatch.setattr(to_onnx, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install onnx onnxscript"):
        export(tmp_path, finetuned(vit_nano(num_classes=3)), "onnx", "out.onnx")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)
@pytest.mark.parametrize("channels", [3, 5])
def test_logits_are_the_same_in_onnxruntime_for_any_batch_size(tmp_path, monkeypatch, channels):
    import onnxruntime

    shallow = TINY_PATCH4._replace(depth=2)  # so that it is fast
    monkeypatch.setitem(SIZES, "tiny_patch4", shallow)
    options = {"img_size": 16, "pool": "avg", "num_classes": 3, "in_chans": channels}
    model = randomized(build_vit(shallow, **options))
    monkeypatch.setattr(to_onnx, "model_args", lambda source: {**model_args(source), "depth": 2})
    mean = [0.1, 0.2, 0.3, 0.4, 0.5][:channels]
    content = finetuned(model) | {"mean": mean, "std": [0.2] * channels}
    if channels != 3:
        content |= {"channels": channels, "value_range": [0, 4095]}
    path, _ = export(tmp_path, content, "onnx", "out.onnx")
    session = onnxruntime.InferenceSession(path)
    for batch_size in (1, 2, 5):
        x = torch.randn(batch_size, channels, 16, 16)
        (logits,) = session.run(["logits"], {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=0, atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["mean"]) == mean
    assert json.loads(about["value_range"]) == [0, 255 if channels == 3 else 4095]
