"""What lies beside weights, in a file or in their names, neither runs nor keeps them from use."""

import argparse
import builtins
import collections
import datetime
import decimal
import fractions
import functools
import importlib
import operator
import os
import pathlib
import pickle
import random
import runpy
import subprocess
import types
import uuid
from io import BytesIO

import numpy as np
import pytest
import timm
import torch

from models import load_model
from models_vit import build_vit
from tests.helpers.models import NANO, crossmae_nano
from tests.helpers.runs import assert_identical
from tests.helpers.weights import hf_nano, images, released, stored, timm_nano, vit_nano, without
from util.errors import InputError
from util.weights.encoder import load_encoder, read_encoder
from util.weights.files import read_weights_file
from util.weights.values import Skipped

formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def saved(path, content, *, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def refusal(path, read=read_weights_file):
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# Values


VALUES = {
    "scalar": np.float64(83.1),
    "flag": np.bool_(True),
    "text": np.str_("x"),
    "moment": np.datetime64("2020-01-01"),
    "array": np.arange(5),
    "array of objects": np.array(["a", None], dtype=object),
    "array of records": np.zeros(2, dtype=[("a", "f4")]),
    "dtype": np.dtype("float32"),
    "type": np.float32,
    "state": np.random.RandomState(3).get_state(),
    "legacy generator": np.random.RandomState(3),
    "generator": np.random.default_rng(3),
    "other generator": np.random.Generator(np.random.Philox(3)),
    "seeds": np.random.SeedSequence(3),
    "Python's state": random.getstate(),
    "Python's generator": random.Random(3),
    "path": pathlib.Path("a") / "b",
    "other system's path": pathlib.PureWindowsPath("a"),
    "time": datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc),
    "duration": datetime.timedelta(3),
    "decimal": decimal.Decimal("1.5"),
    "fraction": fractions.Fraction(1, 3),
    "id": uuid.UUID(int=3),
    "namespace": types.SimpleNamespace(a=1),
    "range": range(3),
    "frozen set": frozenset([1]),
    "version": torch.__version__,
    "arguments": argparse.Namespace(path=pathlib.Path("a"), accuracy=np.float32(1)),
}


@formats
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_harmless_values_do_not_keep_weights_from_being_read(tmp_path, zipped, value):
    state = vit_nano().state_dict()
    content = {"best": value, "model": state, "epoch": 3}
    path = saved(tmp_path / "w.pth", content, zipped=zipped)
    read = read_weights_file(path)
    assert_identical(dict(read["model"]), dict(state))
    assert read["epoch"] == 3


@formats
def test_numbers_of_numpy_1_are_those_of_numpy_2(tmp_path, zipped):
    buffer = BytesIO()
    content = {"model": {"w": torch.ones(2)}, "best": np.float64(1), "all": np.arange(3)}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    old, new = b"numpy.core.multiarray", b"numpy._core.multiarray"
    pickled = buffer.getvalue()
    assert new in pickled or old in pickled
    for ours, theirs in ((old, new), (new, old)):
        (tmp_path / "w.pth").write_bytes(pickled.replace(ours, theirs))
        assert torch.equal(read_weights_file(tmp_path / "w.pth")["model"]["w"], torch.ones(2))


@formats
def test_containers_keep_what_is_in_them(tmp_path, zipped):
    content = {
        "default": collections.defaultdict(list, {"a": [1]}),
        "nested": collections.defaultdict(dict, {0: collections.defaultdict(int, {"b": 2})}),
        "queue": collections.deque([1, 2], maxlen=3),
        "ordered": collections.OrderedDict(c=3),
        "arguments": argparse.Namespace(lr=0.1, seed=np.int64(3)),
    }
    read = read_weights_file(saved(tmp_path / "w.pth", content, zipped=zipped))
    assert read["default"] == {"a": [1]}
    assert read["nested"] == {0: {"b": 2}}
    assert read["queue"] == [1, 2]
    assert read["ordered"] == {"c": 3}
    assert read["arguments"].lr == 0.1
    assert isinstance(read["arguments"].seed, Skipped)


class Calls:
    """Calls a function when it is unpickled in the usual way."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


DANGEROUS = {
    "os.system": Calls(os.system, "true"),
    "builtins.eval": Calls(eval, "1"),
    "builtins.exec": Calls(exec, "1"),
    "builtins.open": Calls(open, os.devnull),
    "builtins.getattr": Calls(getattr, 1, "real"),
    "builtins.__import__": Calls(builtins.__import__, "os"),
    "importlib.import_module": Calls(importlib.import_module, "os"),
    "subprocess.run": Calls(subprocess.run, ["true"]),
    "runpy.run_path": Calls(runpy.run_path, os.devnull),
    "functools.partial": functools.partial(print),
    "operator.attrgetter": operator.attrgetter("a"),
    "numpy.load": Calls(np.load, os.devnull),
    "numpy.save": Calls(np.save, os.devnull, 1),
    "numpy.fromfile": Calls(np.fromfile, os.devnull),
    "torch.load": Calls(torch.load, os.devnull),
    "torch.hub.load": Calls(torch.hub.load, "a", "b"),
    "torch.nn.modules.linear.Linear": torch.nn.Linear(1, 1),
    "pickle.loads": Calls(pickle.loads, b"N."),
}


@pytest.mark.faults
@formats
@pytest.mark.parametrize("value", DANGEROUS.values(), ids=DANGEROUS)
def test_what_could_run_code_is_refused_with_its_name_and_the_remedy(tmp_path, zipped, value):
    path = saved(tmp_path / "w.pth", {"model": {"w": torch.ones(2)}, "x": value}, zipped=zipped)
    message = refusal(path)
    name = next(name for name, known in DANGEROUS.items() if known is value)
    assert name.rpartition(".")[2] in message
    assert "content = torch.load(FILE, weights_only=False)" in message
    assert 'torch.save({"model": weights}, "weights.pth")' in message


@pytest.mark.faults
@formats
def test_a_harmless_type_is_no_way_to_others(tmp_path, zipped):
    class Climbs:
        """Calls a method of a harmless value."""

        def __reduce__(self):
            return np.ndarray.tofile, (np.zeros(1), str(tmp_path / "it ran"))

    path = saved(tmp_path / "w.pth", {"x": Climbs()}, zipped=zipped)
    assert "would run code" in refusal(path)
    # A harmless type that is called does nothing, whatever its arguments are.
    path = saved(tmp_path / "w.pth", {"x": Calls(np.dtype, "O", {"a": 1})}, zipped=zipped)
    assert isinstance(read_weights_file(path)["x"], Skipped)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.faults
@formats
def test_another_pickle_protocol_is_named(tmp_path, zipped):
    path = tmp_path / "w.pth"
    torch.save({}, path, pickle_protocol=4, _use_new_zipfile_serialization=zipped)
    assert "pickle protocol 4" in refusal(path)


# Which weights of a file


def test_a_number_called_ema_is_no_moving_average(tmp_path):
    model = vit_nano()
    for ema in (0.9999, None, {"decay": 0.9}, {}):
        content = {"model": model.state_dict(), "ema": ema}
        assert_identical(
            dict(read_encoder(stored(tmp_path / "w.pth", content)).encoder),
            without(dict(model.state_dict()), "norm"),
        )


def test_a_table_of_counters_called_ema_is_no_moving_average(tmp_path):
    state = vit_nano().state_dict()
    content = {"model": state, "ema": {"decay": 0.99, "num_updates": torch.tensor(4)}}
    torch.save(content, tmp_path / "w.pth")
    assert torch.equal(read_encoder(tmp_path / "w.pth").encoder["cls_token"], state["cls_token"])


@pytest.mark.parametrize("key", ["ema", "state_dict_ema", "model_ema", "teacher"])
def test_a_moving_average_comes_first(tmp_path, key, caplog):
    caplog.set_level("INFO")
    raw, average = vit_nano().state_dict(), vit_nano().state_dict()
    content = {"model": raw, "student": raw, key: average}
    weights = read_encoder(stored(tmp_path / "w.pth", content))
    assert torch.equal(weights.encoder["cls_token"], average["cls_token"])
    assert "reading the moving average of the weights" in caplog.text


def test_weights_under_another_key_are_read_if_there_are_no_others(tmp_path, caplog):
    caplog.set_level("INFO")
    state = vit_nano().state_dict()
    read_encoder(stored(tmp_path / "w.pth", {"net": state, "epoch": torch.tensor(3)}))
    assert "reading the weights under 'net'" in caplog.text
    two = stored(tmp_path / "two.pth", {"net": state, "other_net": state})
    assert "holds only net, other_net" in refusal(two, read_encoder)


def test_tensors_beside_the_table_of_weights_are_not_taken_for_it(tmp_path):
    content = {"random": torch.get_rng_state(), "model": vit_nano().state_dict()}
    assert read_encoder(stored(tmp_path / "w.pth", content)).grid_size == (4, 4)


# Names


PREFIXES = ["model.", "backbone.", "module.", "teacher.", "student.", "encoder.", "_orig_mod."]
PREFIXES += ["module.backbone.", "model.encoder.", "module._orig_mod.model.", "net.trunk."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_common_prefix_is_stripped_and_said(tmp_path, prefix, caplog):
    caplog.set_level("INFO")
    oracle = timm_nano(num_classes=3)
    state = {prefix + name: tensor for name, tensor in oracle.state_dict().items()}
    weights = read_encoder(stored(tmp_path / "w.pth", {"state_dict": state}))
    model = build_vit(NANO, pool="cls", num_classes=3).eval()
    load_encoder(model, weights, head=True)
    x = images()
    torch.testing.assert_close(model(x), oracle(x), rtol=0, atol=1e-5)
    said = prefix.replace("_orig_mod.", "")
    assert f"have the prefix {said}, which is stripped" in caplog.text or not said


def test_hugging_faces_names_have_prefixes_too(tmp_path):
    state = hf_nano("ViTForImageClassification", id2label={0: "a", 1: "b"}).state_dict()
    plain = read_encoder(stored(tmp_path / "a.pth", state))
    renamed = {f"model.{name}": tensor for name, tensor in state.items()}
    assert read_encoder(stored(tmp_path / "b.pth", renamed)).hash() == plain.hash()


def test_weights_outside_the_prefix_are_left_out_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    state = {f"backbone.{name}": t for name, t in vit_nano().state_dict().items()}
    others = {"head.mlp.weight": torch.ones(3), "loss.center": torch.ones(3)}
    weights = read_encoder(stored(tmp_path / "w.pth", {"teacher": state | others}))
    assert set(weights.left_out) == others.keys()
    assert weights.num_classes is None
    assert "2 tensors of other parts are not needed: head, loss" in caplog.text


def test_of_student_and_teacher_the_teacher_counts(tmp_path):
    models = {"student": vit_nano(), "teacher": vit_nano()}
    state = {
        f"{role}.backbone.{name}": tensor
        for role, model in models.items()
        for name, tensor in model.state_dict().items()
    }
    weights = read_encoder(stored(tmp_path / "w.pth", state))
    assert torch.equal(weights.encoder["cls_token"], models["teacher"].cls_token)
    assert "student.backbone.cls_token" in weights.left_out


@pytest.mark.faults
def test_of_several_encoders_none_is_guessed(tmp_path):
    state = vit_nano().state_dict()
    both = {f"{side}.{name}": t for side in ("left", "right") for name, t in state.items()}
    message = refusal(stored(tmp_path / "w.pth", both), read_encoder)
    assert "several encoders (left., right.)" in message


@pytest.mark.faults
def test_weights_beyond_a_plain_vit_are_named_with_their_prefix(tmp_path):
    state = {f"model.{name}": t for name, t in vit_nano().state_dict().items()}
    path = stored(tmp_path / "w.pth", state | {"model.reg_token": torch.ones(1)})
    assert "has model.reg_token, which a plain ViT does not have" in refusal(path, read_encoder)


@pytest.mark.faults
def test_a_file_without_an_encoder_lists_what_it_has(tmp_path):
    state = {"conv1.weight": torch.ones(1), "bn1.weight": torch.ones(1), "bn1.bias": torch.ones(1)}
    message = refusal(stored(tmp_path / "w.pth", state | {"fc": torch.ones(1)}), read_encoder)
    assert "no encoder" in message
    assert "has conv1.weight, bn1.weight, bn1.bias, ...: use a ViT" in message
    message = refusal(stored(tmp_path / "w.pth", {"epoch": 3}), read_encoder)
    assert "holds only epoch" in message


# A linear patch embedding


def test_a_linear_patch_embedding_is_read_as_timm_reads_it(tmp_path, caplog):
    caplog.set_level("INFO")
    oracle = timm_nano(num_classes=3)
    state = oracle.state_dict()
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].flatten(1)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), oracle)
    weights = read_encoder(stored(tmp_path / "w.pth", state))
    assert torch.equal(
        weights.encoder["patch_embed.proj.weight"], filtered["patch_embed.proj.weight"]
    )
    assert "linear patch embedding is read as timm's" in caplog.text
    model = build_vit(NANO, pool="cls", num_classes=3).eval()
    load_encoder(model, weights, head=True)
    x = images()
    torch.testing.assert_close(model(x), oracle(x), rtol=0, atol=1e-5)


@pytest.mark.faults
@pytest.mark.parametrize("inputs", [47, 16, 64])
def test_a_linear_patch_embedding_that_is_not_of_square_patches_is_refused(tmp_path, inputs):
    state = vit_nano().state_dict() | {"patch_embed.proj.weight": torch.ones(32, inputs)}
    message = refusal(stored(tmp_path / "w.pth", state), read_encoder)
    assert f"linear patch embedding of {inputs} inputs" in message


# Released models


@pytest.mark.parametrize("told", [False, True])
def test_the_kind_of_pixels_is_said_where_a_released_file_does_not_tell_it(
    tmp_path, nano, told, caplog
):
    caplog.set_level("INFO")
    content = released(crossmae_nano())
    if not told:
        content.pop("args")
    model, _ = load_model(stored(tmp_path / "w.pth", content))
    assert ("mae_visualize_*.pth" in caplog.text) == (not told)
    assert model.norm_pix_loss
