"""Weight files from elsewhere: read, renamed or refused, and never run."""

import argparse
import json
import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import RunsCode

from models_crossmae import crossmae_vit_base_patch16
from models_mae import mae_vit_base_patch16
from util.errors import InputError
from util.weights import from_released, read_weights_file, released_feature_maps

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
    """The message with which a file is refused: one sentence that names it."""
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
    # The allowance was for this one file.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


# Files that are refused


def test_missing_file_and_directory_are_refused(tmp_path):
    assert "is no file" in refusal(tmp_path / "nowhere.pth")
    assert "is no file" in refusal(tmp_path)


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
def test_files_that_are_no_weights_are_refused(tmp_path, content):
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


def parameters(prefix, modules):
    return [f"{prefix}{module}.{kind}" for module in modules for kind in ("weight", "bias")]


ATTENTION = ["attn.qkv", "attn.proj"]
CROSS_ATTENTION = ["cross_attn.q", "cross_attn.kv", "cross_attn.proj"]
REST = ["norm1", "norm2", "mlp.fc1", "mlp.fc2"]
ENCODER = ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed"]
ENCODER += parameters("", ["patch_embed.proj", "decoder_norm", "decoder_pred"])
ENCODER += [name for i in range(12) for name in parameters(f"blocks.{i}.", ATTENTION + REST)]
RELEASED = {
    "crossmae": [
        *ENCODER,
        "wfm.linear.weight",
        *parameters("dec_norms.", range(12)),
        *(
            name
            for j in range(12)
            for name in parameters(f"decoder_blocks.{j}.", CROSS_ATTENTION + REST)
        ),
    ],
    "mae": [
        *ENCODER,
        *parameters("", ["norm", "decoder_embed"]),
        *(name for j in range(8) for name in parameters(f"decoder_blocks.{j}.", ATTENTION + REST)),
    ],
}


@pytest.mark.parametrize(
    ("kind", "factory", "num_tensors"),
    [("crossmae", crossmae_vit_base_patch16, 347), ("mae", mae_vit_base_patch16, 254)],
)
def test_names_of_released_vit_b_map_one_to_one_to_ours(kind, factory, num_tensors):
    names = RELEASED[kind]
    assert len(set(names)) == num_tensors
    renamed = from_released({name: name for name in names})
    with torch.device("meta"):
        ours = factory().state_dict().keys()
    assert renamed.keys() == ours
    assert sorted(renamed.values()) == sorted(names)


def golden_states():
    cases = json.loads((Path(__file__).parent / "data" / "golden.json").read_text())
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
    # The released encoder collects its maps block by block, so that is the order of its weights.
    options = {"weight_fm": True, "use_input": True}
    assert released_feature_maps(4, use_fm=[3, 1], **options) == [0, 2, 4]


def test_released_blocks_that_do_not_exist_are_refused():
    with pytest.raises((InputError, ValueError)):
        released_feature_maps(4, weight_fm=True, use_input=True, use_fm=[0, 4])
