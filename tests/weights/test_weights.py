"""Weights files of other programs are read, renamed or refused, but their code never runs."""

import argparse
import json
import pickle
from io import BytesIO

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from models import MODELS
from models_vit import build_vit, make_probe
from tests.helpers.files import RunsCode
from tests.helpers.models import NANO, crossmae_nano, mae_nano
from tests.helpers.processes import ROOT
from tests.helpers.runs import assert_identical
from tests.helpers.weights import (
    RELEASED,
    finetuned,
    hf_nano,
    images,
    pretrained,
    randomized,
    released,
    stored,
    timm_nano,
    vit_nano,
    without,
)
from util.errors import InputError
from util.weights.encoder import input_format, load_encoder, read_encoder, save_encoder
from util.weights.files import read_weights_file, write_new
from util.weights.released import from_released, released_feature_maps

WEIGHTS = {"model": {"w": torch.arange(24.0).view(4, 6), "b": torch.ones(4)}, "epoch": 3}


def saved(content, **options):
    buffer = BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def same(a, b):
    if a.keys() != b.keys() or a["model"].keys() != b["model"].keys():
        return False
    equal = all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    return equal and a["epoch"] == b["epoch"]


def refusal(path):
    """Return the message that refuses a file: one sentence that names it."""
    with pytest.raises(InputError) as caught:
        read_weights_file(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


# Files that are read


@pytest.mark.parametrize("zipped", [True, False])
def test_released_like_checkpoint_is_read(tmp_path, zipped):
    path = tmp_path / "released.pth"
    args = argparse.Namespace(model="mae_vit_base_patch16", use_fm=[-1], blr=1.5e-4, resume=None)
    optimizer = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 1e-3}]}
    content = WEIGHTS | {"optimizer": optimizer, "scaler": {"scale": 65536.0}, "args": args}
    path.write_bytes(saved(content, _use_new_zipfile_serialization=zipped))

    read = read_weights_file(str(path))

    assert read["args"] == args
    assert read["optimizer"] == optimizer
    assert same({"model": read["model"], "epoch": read["epoch"]}, WEIGHTS)
    # The type was allowed only for this one file.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


# Files that are refused


def test_missing_file_and_directory_are_refused(tmp_path):
    assert "checkpoint not found" in refusal(tmp_path / "nowhere.pth")
    assert "checkpoint not found" in refusal(tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        b"<!DOCTYPE html><html><body>Not found</body></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n",
        b'{"model": {}}',
        b"hello\n",
        b"accuracy 83.5\n",
        b"epoch,loss\n0,1.0\n",
        b"tensor",
        b"PK\x03\x04",
        pickle.dumps(None, protocol=2),
        pickle.dumps({"model": 1}, protocol=2),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_files_that_are_not_weights_are_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    refusal(path)


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_archives_of_other_kinds_are_refused(tmp_path):
    np.savez(tmp_path / "arrays.npz", w=np.zeros(3))
    refusal(tmp_path / "arrays.npz")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    refusal(tmp_path / "script.pt")


@pytest.mark.parametrize("content", [[torch.ones(2)], torch.ones(2), None])
def test_anything_but_a_dictionary_is_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(saved(content))
    assert type(content).__name__ in refusal(path)


@pytest.mark.faults
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_are_refused(tmp_path, zipped):
    path = tmp_path / "weights.pth"
    whole = saved(WEIGHTS, _use_new_zipfile_serialization=zipped)
    for length in range(0, len(whole), 11):
        path.write_bytes(whole[:length])
        refusal(path)


@pytest.mark.faults
def test_no_flipped_bit_changes_the_weights_unnoticed(tmp_path):
    path = tmp_path / "weights.pth"
    whole = bytearray(saved(WEIGHTS))
    refused = 0
    for i in range(len(whole)):
        whole[i] ^= 0x08
        path.write_bytes(whole)
        whole[i] ^= 0x08
        try:
            assert same(read_weights_file(path), WEIGHTS), i
        except InputError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(whole) / 3  # the rest is padding, dates and the like


@pytest.mark.faults
def test_flipped_bit_of_a_tensor_fails_its_checksum(tmp_path):
    path = tmp_path / "weights.pth"
    whole = bytearray(saved(WEIGHTS))
    whole[whole.index(WEIGHTS["model"]["w"].numpy().tobytes())] ^= 0x01
    path.write_bytes(whole)
    assert "checksum" in refusal(path)


@pytest.mark.faults
@pytest.mark.parametrize(
    "write",
    [
        saved,
        lambda content: saved(content, _use_new_zipfile_serialization=False),
        lambda content: pickle.dumps(content, protocol=2),
        lambda content: pickle.dumps(content["args"], protocol=2),
    ],
    ids=["zip", "legacy", "bare pickle", "bare object"],
)
def test_code_in_a_file_never_runs(tmp_path, write):
    path, marker = tmp_path / "weights.pth", tmp_path / "it ran"
    path.write_bytes(write({"model": {}, "args": RunsCode(marker)}))
    assert "would run code" in refusal(path)
    assert not marker.exists()


def test_the_code_in_those_files_would_run(tmp_path):
    marker = tmp_path / "it ran"
    pickle.loads(pickle.dumps(RunsCode(marker)))
    assert marker.exists()


@pytest.mark.faults
def test_a_whole_module_is_refused_by_name(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(saved({"model": torch.nn.Linear(2, 2)}))
    assert "torch.nn.modules.linear.Linear" in refusal(path)


# Names of released checkpoints


@pytest.mark.parametrize(("kind", "num_tensors"), [("crossmae", 347), ("mae", 254)])
def test_names_of_released_vit_b_map_one_to_one_to_ours(kind, num_tensors):
    names = RELEASED[kind]
    assert len(set(names)) == num_tensors
    renamed = from_released({name: name for name in names})
    with torch.device("meta"):
        ours = MODELS[f"{kind}_vit_base_patch16"]().state_dict().keys()
    assert renamed.keys() == ours
    assert sorted(renamed.values()) == sorted(names)


def golden_states():
    cases = json.loads((ROOT / "tests" / "golden" / "golden.json").read_text())
    return [case["state"] for case in cases]


@pytest.mark.parametrize("state", golden_states())
def test_no_two_golden_names_become_one(state):
    renamed = from_released(state)
    assert sorted(map(str, renamed.values())) == sorted(map(str, state.values()))
    assert len(renamed) == len(state)


@pytest.mark.parametrize("name", ["head.weight", "module.cls_token", "fc_norm.bias", "encoder.x"])
def test_unknown_names_are_refused(name):
    with pytest.raises(InputError, match=name):
        from_released({"cls_token": torch.zeros(1), name: torch.zeros(1)})


@pytest.mark.parametrize(
    ("use_input", "use_fm", "expected"),
    [
        (True, None, [0, 1, 2, 3, 4]),
        (True, [-1], [0, 1, 2, 3, 4]),
        (False, [-1], [1, 2, 3, 4]),
        (True, [1, 3], [0, 2, 4]),
        (False, [3], [4]),
        (True, [0, -2], [0, 1, 3]),
    ],
)
def test_released_choice_of_feature_maps(use_input, use_fm, expected):
    options = {"use_input": use_input, "use_fm": use_fm}
    assert released_feature_maps(4, weight_fm=True, **options) == expected
    assert released_feature_maps(4, weight_fm=False, **options) == "last"


def test_released_feature_maps_come_shallow_to_deep_in_whatever_order_they_were_given():
    # The released encoder collects its maps block by block, which orders its mixing weights.
    options = {"weight_fm": True, "use_input": True}
    assert released_feature_maps(4, use_fm=[3, 1], **options) == [0, 2, 4]


def test_released_blocks_that_do_not_exist_are_refused():
    with pytest.raises((InputError, ValueError)):
        released_feature_maps(4, weight_fm=True, use_input=True, use_fm=[0, 4])


# Safetensors files


def test_safetensors_are_read_with_their_metadata(tmp_path):
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(WEIGHTS["model"], path, {"format": "pt"})
    content = read_weights_file(path)
    assert content["metadata"] == {"format": "pt"}
    assert same({"model": content["model"], "epoch": 3}, WEIGHTS)


@pytest.mark.faults
def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    whole = safetensors.torch.save(WEIGHTS["model"])
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        refusal(path)
    # A header longer than the file, tensors outside the file, and a file of another kind.
    path.write_bytes(b"\xff" * 7 + b"\x7f" + whole[8:])
    refusal(path)
    path.write_bytes(whole.replace(b"[0,", b"[9,").replace(b",16]", b",99]"))
    refusal(path)
    path.write_bytes(saved(WEIGHTS))
    refusal(path)
    path.write_bytes(pickle.dumps(RunsCode(tmp_path / "it ran")))
    refusal(path)
    assert not (tmp_path / "it ran").exists()


# Encoders of any file


def encoder_refusal(content, path):
    with pytest.raises(InputError) as caught:
        read_encoder(stored(path, content))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("factory", "feature_maps", "norm"),
    [
        (crossmae_nano, "all", None),
        (crossmae_nano, "last", "context_norm"),
        (mae_nano, "last", "context_norm"),
        (mae_nano, "all", None),
    ],
)
@pytest.mark.parametrize("style", [pretrained, released])
def test_pretrained_encoders_are_read_bit_for_bit(tmp_path, factory, feature_maps, norm, style):
    model = randomized(factory(feature_maps=feature_maps))
    weights = read_encoder(stored(tmp_path / "weights.pth", style(model)))
    assert_identical(weights.encoder, dict(model.encoder.state_dict()))
    # The norm of a mix of feature maps is not that of the last one.
    expected = getattr(model.decoder, norm).state_dict() if norm else {}
    assert_identical(weights.head_state, {f"norm.{kind}": t for kind, t in expected.items()})
    assert (weights.shape, weights.img_size, weights.grid_size) == ((4, 32, 2), (16, 16), (4, 4))
    assert weights.num_classes is weights.pool is weights.classes is None
    assert weights.mean == ([0.1, 0.2, 0.3] if style is pretrained else None)


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize("with_ema", [False, True])
def test_finetuned_classifiers_are_read_whole(tmp_path, pool, with_ema):
    model, average = (vit_nano(pool=pool, num_classes=3) for _ in range(2))
    content = finetuned(model, ema=average.state_dict() if with_ema else None, classes=list("abc"))
    weights = read_encoder(stored(tmp_path / "weights.pth", content))
    assert (weights.pool, weights.classes, weights.num_classes) == (pool, list("abc"), 3)

    loaded = build_vit(NANO, pool=pool, num_classes=3).eval()
    load_encoder(loaded, weights, head=True)
    counts = average if with_ema else model
    assert_identical(dict(loaded.state_dict()), dict(counts.state_dict()))


def test_linear_probes_are_read_with_their_normalization(tmp_path):
    model = vit_nano()
    make_probe(model, 3)
    weights = read_encoder(stored(tmp_path / "p.pth", finetuned(model.eval(), kind="linprobe")))
    assert weights.num_classes == 3
    loaded = build_vit(NANO, pool="cls", num_classes=3)
    make_probe(loaded, 3)
    load_encoder(loaded.eval(), weights, head=True)
    x = images()
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3, "arch": "vit"},
        lambda state: {"model": {f"module.{name}": t for name, t in state.items()}},
        lambda state: {"state_dict": {"x": 1}, "state_dict_ema": state},
    ],
    ids=["flat", "state_dict", "module", "ema"],
)
@pytest.mark.parametrize(("pool", "theirs"), [("avg", "avg"), ("cls", "token")])
def test_logits_of_timm_weights_are_timms(tmp_path, wrap, pool, theirs):
    oracle = timm_nano(global_pool=theirs, num_classes=3)
    weights = read_encoder(stored(tmp_path / "weights.pth", wrap(oracle.state_dict())))
    assert weights.pool == pool
    model = build_vit(NANO, pool=pool, num_classes=3).eval()
    load_encoder(model, weights, head=True)
    x = images()
    torch.testing.assert_close(model(x), oracle(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTMAEForPreTraining"])
@pytest.mark.parametrize("form", ["folder", "file", "bin", "module names"])
def test_features_of_hugging_face_weights_are_theirs(tmp_path, kind, form):
    oracle = hf_nano(kind)
    oracle.save_pretrained(tmp_path)
    path = tmp_path if form == "folder" else tmp_path / "model.safetensors"
    if form in ("bin", "module names"):
        names_on_disk = safetensors.torch.load_file(path)
        path.unlink()
        state = names_on_disk if form == "bin" else oracle.state_dict()
        assert ("q_proj" in "".join(state)) == (form == "module names")
        stored(tmp_path / "pytorch_model.bin", state)
        path = tmp_path
    weights = read_encoder(path)
    assert weights.num_heads == 2 and weights.img_size == (16, 16)
    assert ("head.weight" in weights.head_state) == (kind == "ViTForImageClassification")

    model = build_vit(NANO, pool="cls", num_classes=0).eval()
    load_encoder(model, weights, head=False)
    x = images()
    base = getattr(oracle, "vit", oracle)
    # An MAE's encoder masks: here nothing, in the order of the patches.
    extra = {}
    if "MAE" in kind:
        base.embeddings.config.mask_ratio = 0.0
        extra["noise"] = torch.arange(16.0).expand(2, -1)
    expected = base(x, **extra).last_hidden_state[:, 0]
    torch.testing.assert_close(model.features(x), expected, rtol=0, atol=1e-5)


def test_hugging_face_settings_are_read(tmp_path, caplog):
    hf_nano(
        "ViTForImageClassification",
        layer_norm_eps=1e-12,
        id2label={0: "cat", 1: "dog"},
        image_size=[8, 32],
    ).save_pretrained(tmp_path)
    processor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    weights = read_encoder(tmp_path)
    assert (weights.mean, weights.std) == ([0.5] * 3, [0.25] * 3)
    assert (weights.classes, weights.img_size, weights.pool) == (["cat", "dog"], (8, 32), "cls")
    load_encoder(build_vit(NANO, img_size=(8, 32), pool="cls", num_classes=0), weights, head=False)
    assert "layer_norm_eps 1e-12" in caplog.text


@pytest.mark.faults
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[1]", "list"),
        ("config.json", '{"hidden_act": "relu"}', "hidden_act relu"),
        ("config.json", '{"image_size": 20}', "16 patches"),
        ("config.json", '{"image_size": "large"}', "damaged"),
        ("config.json", "[" * 100_000, "nested too deeply"),
        ("preprocessor_config.json", '{"image_mean": ["a"]}', "damaged"),
    ],
)
def test_wrong_settings_beside_weights_are_refused(tmp_path, name, content, reason):
    hf_nano("ViTModel").save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=reason) as caught:
        read_encoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_number_of_heads_is_refused(tmp_path):
    hf_nano("ViTModel", num_attention_heads=4).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="4 attention heads, but the model has 2 attention heads"):
        load_encoder(vit_nano(), read_encoder(tmp_path), head=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    state = {name: t.to(dtype) for name, t in vit_nano().state_dict().items()}
    weights = read_encoder(stored(tmp_path / "half.pth", state))
    expected = {name: t.float() for name, t in state.items()}
    assert_identical(weights.encoder | weights.head_state, dict(expected))


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.ls1.gamma",
        "blocks.0.attn.q_norm.weight",
        "norm_pre.weight",
        "reg_token",
        "dist_token",
        "backbone.x",
    ],
)
def test_weights_beyond_a_plain_vit_are_refused_by_name(tmp_path, name):
    state = vit_nano().state_dict() | {name: torch.ones(32)}
    assert name in encoder_refusal(state, tmp_path / "weights.pth")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: {}, "no encoder"),
        (lambda s: {"epoch": 3}, "no encoder"),
        (lambda s: {"model": torch.ones(3)}, "no encoder"),
        (lambda s: {"model": {3: torch.ones(3)}}, "no encoder"),
        (lambda s: without(s, "cls_token"), "no encoder"),
        (lambda s: without(s, "blocks"), "lacks blocks.0.norm1.weight and 11 more"),
        (lambda s: without(s, "blocks.1.attn.qkv.bias"), "lacks blocks.1.attn.qkv.bias:"),
        (lambda s: without(s, "pos_embed"), "lacks pos_embed"),
        (lambda s: s | {"pos_embed": s["pos_embed"][:, 1:]}, "15 patches"),
        (lambda s: s | {"pos_embed": torch.ones(3)}, "damaged"),
        (lambda s: s | {"patch_embed.proj.weight": torch.ones(3)}, "damaged"),
        (lambda s: s | {"patch_embed.proj.weight": torch.ones(32, 3, 4, 8)}, "4 x 8 px"),
        (lambda s: s | {"patch_embed.proj.weight": torch.ones(32, 3, 0, 0)}, "damaged"),
        (lambda s: s | {"cls_token": 3}, "damaged"),
        (
            lambda s: s | {"cls_token": torch.full((1, 1, 32), torch.nan)},
            "values in cls_token",
        ),
        (lambda s: s | {"fc_norm.weight": torch.ones(32)}, "both norm and fc_norm"),
        (lambda s: s | {"_orig_mod.cls_token": s["cls_token"]}, "twice"),
        (lambda s: s | {"teacher.cls_token": s["cls_token"]}, "has teacher.cls_token, which"),
    ],
)
def test_files_without_a_whole_encoder_are_refused(tmp_path, change, reason):
    state = dict(vit_nano().state_dict())
    assert reason in encoder_refusal(change(state), tmp_path / "weights.pth")


def test_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"model.safetensors or pytorch_model.bin"):
        read_encoder(tmp_path)


def test_weights_outside_the_encoder_are_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    hf_nano("ViTModel").save_pretrained(tmp_path)
    weights = read_encoder(tmp_path)
    assert sorted(weights.left_out) == ["pooler.dense.bias", "pooler.dense.weight"]
    assert "2 tensors of other parts are not needed: pooler" in caplog.text


# Into a model


@pytest.mark.parametrize(
    ("before", "after"), [((16, 16), (32, 32)), ((16, 16), (8, 24)), ((32, 32), (16, 12))]
)
def test_positions_are_resampled_as_in_mae_and_nothing_else_changes(
    tmp_path, before, after, caplog
):
    caplog.set_level("INFO")
    source = vit_nano(img_size=before, num_classes=3)
    weights = read_encoder(stored(tmp_path / "weights.pth", finetuned(source)))
    model = build_vit(NANO, img_size=after, pool="cls", num_classes=3)
    load_encoder(model, weights, head=True)

    grids = [(height // 4, width // 4) for height, width in (before, after)]
    assert "from {} x {} patches to {} x {}".format(*grids[0], *grids[1]) in caplog.text
    state, expected = model.state_dict(), source.state_dict()
    cls_position, table = expected["pos_embed"].double().split([1, grids[0][0] * grids[0][1]], 1)
    maps = table.unflatten(1, grids[0]).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    maps = F.interpolate(maps, grids[1], mode="bicubic", align_corners=False, antialias=False)
    positions = torch.cat([cls_position, maps.flatten(2).mT], dim=1)
    torch.testing.assert_close(state["pos_embed"].double(), positions, rtol=0, atol=1e-6)
    expected["pos_embed"] = state["pos_embed"]
    assert state["pos_embed"].dtype == torch.float32
    assert_identical(dict(state), dict(expected))


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_a_fresh_norm_and_head_are_named_as_new(tmp_path, pool, caplog):
    caplog.set_level("INFO")
    weights = read_encoder(stored(tmp_path / "w.pth", pretrained(randomized(crossmae_nano()))))
    model = build_vit(NANO, pool=pool, num_classes=3)
    norm = "fc_norm" if pool == "avg" else "norm"
    load_encoder(model, weights, head=False)
    assert f"new for this task: {norm}.weight, {norm}.bias, head.weight, head.bias" in caplog.text
    assert f"loaded {len(weights.encoder)} tensors" in caplog.text
    assert (getattr(model, norm).weight == 1).all() and (getattr(model, norm).bias == 0).all()


def test_a_norm_or_head_that_goes_unused_is_named(tmp_path, caplog):
    caplog.set_level("INFO")
    weights = read_encoder(stored(tmp_path / "w.pth", finetuned(vit_nano(num_classes=3))))
    load_encoder(build_vit(NANO, pool="avg", num_classes=5), weights, head=False)
    assert "not needed here: norm.weight, norm.bias, head.weight, head.bias" in caplog.text


@pytest.mark.parametrize(
    ("options", "size", "reason"),
    [
        ({"num_classes": 5}, {}, "head.weight is 3 x 32 in the .* but is 5 x 32 in the model"),
        ({"num_classes": 0}, {}, "head.weight is 3 x 32 in the .* but is missing from the model"),
        ({"pool": "avg"}, {}, "lacks fc_norm.weight, fc_norm.bias, which --pool avg needs"),
        ({"in_chans": 1}, {}, "3 channels, but the model has 1 channels"),
        ({}, {"patch_size": 8}, "patches of 4 px, but the model has patches of 8 px"),
        ({}, {"embed_dim": 64}, "a width of 32, but the model has a width of 64"),
        ({}, {"depth": 3}, "2 blocks, but the model has 3 blocks"),
        ({}, {"mlp_dim": 96}, "an MLP 128 wide, but the model has an MLP 96 wide"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path, options, size, reason):
    weights = read_encoder(stored(tmp_path / "w.pth", finetuned(vit_nano(num_classes=3))))
    options = {"pool": "cls", "num_classes": 3, **options}
    model = build_vit(NANO._replace(**size), **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=reason):
        load_encoder(model, weights, head=True)
    assert_identical(dict(model.state_dict()), before)


def test_a_headless_file_has_no_head_to_load(tmp_path):
    weights = read_encoder(stored(tmp_path / "w.pth", vit_nano().state_dict()))
    with pytest.raises(InputError, match=r"lacks head.weight, head.bias"):
        load_encoder(vit_nano(num_classes=3), weights, head=True)


def test_the_user_comes_before_the_file_and_the_file_before_the_defaults(tmp_path):
    content = pretrained(randomized(crossmae_nano(img_size=(8, 32))))
    weights = read_encoder(stored(tmp_path / "w.pth", content))
    unsaid = {"img_size": None, "mean": None, "std": None, "default_size": 32}
    assert input_format(weights, **unsaid) == ((8, 32), [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    said = {"img_size": [64], "mean": [0.0] * 3, "std": [1.0] * 3, "default_size": 32}
    assert input_format(weights, **said) == ((64, 64), [0.0] * 3, [1.0] * 3)
    size, mean, _ = input_format(None, **unsaid)
    assert (size, mean) == ((32, 32), [0.485, 0.456, 0.406])


def test_hashes_are_of_the_weights_and_not_of_the_file(tmp_path):
    model = vit_nano()
    one = read_encoder(stored(tmp_path / "a.pth", model.state_dict()))
    same = read_encoder(stored(tmp_path / "b.pth", {"state_dict": model.state_dict()}))
    with torch.no_grad():
        model.blocks[1].mlp.fc2.bias[3] += 1e-3
    other = read_encoder(stored(tmp_path / "c.pth", model.state_dict()))
    assert one.hash() == same.hash() != other.hash()


# Encoder-only files


@pytest.mark.parametrize("img_size", [(16, 16), (8, 32)])
def test_encoder_files_come_back_bit_for_bit(tmp_path, img_size):
    model = vit_nano(num_classes=3, img_size=img_size)
    content = finetuned(model, classes=["a", "b", "ç"])
    weights = read_encoder(stored(tmp_path / "weights.pth", content))
    save_encoder(weights, tmp_path / "encoder.safetensors")
    again = read_encoder(tmp_path / "encoder.safetensors")
    for key in ("encoder", "head_state"):
        pair = (dict(sorted(getattr(w, key).items())) for w in (again, weights))
        assert_identical(*pair)
    metadata = ("img_size", "kind", "mean", "std", "classes", "pool", "num_heads", "norm_eps")
    assert [getattr(again, key) for key in metadata] == [getattr(weights, key) for key in metadata]


def test_the_crop_of_earlier_versions_files_is_read(tmp_path):
    content = finetuned(vit_nano(num_classes=3)) | {"crop_share": 0.875}
    content.pop("crop_pct", None)
    weights = read_encoder(stored(tmp_path / "weights.pth", content))
    assert weights.crop_pct == 0.875
    save_encoder(weights, tmp_path / "new.safetensors")
    content = read_weights_file(tmp_path / "new.safetensors")
    metadata = content.pop("metadata")
    metadata["crop_share"] = metadata.pop("crop_pct")
    safetensors.torch.save_file(content["model"], tmp_path / "old.safetensors", metadata)
    assert read_encoder(tmp_path / "old.safetensors").crop_pct == 0.875


@pytest.mark.faults
@pytest.mark.parametrize(
    ("key", "value"),
    [("img_size", "[16"), ("img_size", '"large"'), ("img_size", "[20, 16]"), ("mean", '["a"]')],
)
def test_wrong_metadata_is_refused(tmp_path, key, value):
    path = tmp_path / "encoder.safetensors"
    metadata = {"format": "crossmae-encoder", key: value}
    safetensors.torch.save_file(vit_nano().state_dict(), path, metadata)
    with pytest.raises(InputError, match=str(path)):
        read_encoder(path)


@pytest.mark.faults
def test_a_failed_write_leaves_nothing_and_a_new_one_overwrites_nothing(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError("disk\nfull")

    with pytest.raises(InputError, match=r"cannot write --output .*: disk$"):
        write_new(tmp_path / "out", fail)
    assert list(tmp_path.iterdir()) == []
    write_new(tmp_path / "out", lambda path: path.write_text("whole"))
    with pytest.raises(InputError, match="exists"):
        write_new(tmp_path / "out", lambda path: path.write_text("other"))
    assert (tmp_path / "out").read_text() == "whole"
    with pytest.raises(InputError, match="cannot write --output"):
        write_new(tmp_path / "nowhere" / "out", lambda path: path.write_text("whole"))
