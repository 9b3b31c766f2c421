"""What is said beside weights is taken over: by timm, Hugging Face and this project."""

import json
import logging

import pytest
import safetensors.torch
import timm
import torch
import transformers
from PIL import Image

from models import load_classifier, starting_point
from models_vit import build_vit
from tests.helpers.models import NANO
from tests.helpers.weights import (
    finetuned,
    hf_nano,
    images,
    stored,
    timm_nano,
    vit_nano,
)
from util.data.transforms import eval_transform
from util.errors import InputError
from util.settings.data import DataSettings
from util.settings.segmentation import SegmentationSettings
from util.weights.encoder import input_format, load_encoder, read_encoder, save_encoder

NAMES = ["ant", "bee", "cow"]


def timm_folder(folder, config, **options):
    """Write a nano ViT as on timm's hub; return the model."""
    model = timm_nano(num_classes=3, **options)
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", **config}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def refusal(path):
    with pytest.raises(InputError) as caught:
        read_encoder(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_logits(path, oracle):
    weights = read_encoder(path)
    model = build_vit(NANO, pool=weights.pool, num_classes=3).eval()
    load_encoder(model, weights, head=True)
    x = images()
    torch.testing.assert_close(model(x), oracle(x), rtol=0, atol=1e-5)
    return weights


# timm


PREPARATION = {
    "input_size": [3, 16, 16],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "crop_pct": 0.9,
    "interpolation": "bilinear",
    "crop_mode": "squash",
}


@pytest.mark.parametrize("mean", [[0.4], [0.5, 0.5, 0.5], [0.1, 0.2]], ids=str)
def test_a_mean_beside_weights_of_two_channels_is_theirs_or_left_out(tmp_path, caplog, mean):
    caplog.set_level(logging.INFO)
    timm_folder(tmp_path, {"pretrained_cfg": {"mean": mean, "std": mean}}, in_chans=2)
    weights = read_encoder(tmp_path)
    assert weights.mean == {1: mean * 2, 2: mean, 3: None}[len(mean)]
    assert (weights.channels, weights.std) == (2, weights.mean)
    left_out = "config.json has a mean and std of RGB, not of 2 channels: leaving them out"
    assert (left_out in caplog.text) == (len(mean) == 3)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_the_preparation_beside_timms_weights_is_read(tmp_path, flat, given):
    labels = {"labels": NAMES} if flat else {"label_names": NAMES, "label_descriptions": {}}
    config = {**PREPARATION, **labels} if flat else {"pretrained_cfg": PREPARATION, **labels}
    oracle = timm_folder(tmp_path, config)
    path = tmp_path if given == "folder" else tmp_path / "model.safetensors"
    weights = assert_same_logits(path, oracle)
    assert (weights.mean, weights.std) == ([0.5] * 3, [0.25] * 3)
    assert (weights.crop_pct, weights.interpolation, weights.squash) == (0.9, "bilinear", True)
    assert (weights.classes, weights.pool, weights.img_size) == (NAMES, "cls", (16, 16))


def test_what_timms_config_leaves_out_is_timms_default(tmp_path):
    timm_folder(tmp_path, {"pretrained_cfg": {}})
    weights = read_encoder(tmp_path)
    assert weights.mean == list(timm.data.IMAGENET_DEFAULT_MEAN)
    assert weights.std == list(timm.data.IMAGENET_DEFAULT_STD)
    assert (weights.crop_pct, weights.interpolation, weights.squash) == (0.875, "bicubic", False)
    assert weights.classes is None


@pytest.mark.parametrize(
    ("options", "pool"),
    [
        ({"global_pool": "token"}, "cls"),
        ({"global_pool": "avg"}, "avg"),
        ({"global_pool": "avg", "fc_norm": False}, "norm_avg"),
    ],
)
def test_folders_that_timm_writes_are_read_as_timm_reads_them(tmp_path, options, pool):
    oracle = timm_nano(num_classes=3, **options)
    config = {"label_names": NAMES, "pretrained_cfg": {"mean": (0.5, 0.5, 0.5)}}
    timm.models.save_for_hf(oracle, tmp_path, model_config=config, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    weights = assert_same_logits(tmp_path, again)
    assert (weights.pool, weights.mean, weights.classes) == (pool, [0.5] * 3, NAMES)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
def test_pixels_are_prepared_as_timm_prepares_them(tmp_path, crop_mode):
    preparation = {**PREPARATION, "crop_mode": crop_mode, "crop_pct": 0.8}
    timm_folder(tmp_path, {"pretrained_cfg": preparation})
    weights = read_encoder(tmp_path)
    how = {"interpolation": weights.interpolation, "squash": weights.squash}
    ours = eval_transform(weights.img_size, weights.mean, weights.std, weights.crop_pct, **how)
    theirs = timm.data.create_transform(**{**preparation, "input_size": (3, 16, 16)})
    image = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(30, 40, 3)
    crops = ours(pixels.movedim(2, 0))
    inputs = crops.normalization(crops.pixels[0][None])[0]
    difference = 255 * 0.25 * (inputs - theirs(image))
    assert difference.abs().max() <= 2  # Pillow rounds differently


@pytest.mark.parametrize(
    ("input_size", "expected"), [([3, 8, 32], (8, 32)), ([3, 16, 16], (16, 16))]
)
def test_the_input_size_beside_weights_gives_the_shape_of_their_grid(
    tmp_path, input_size, expected, caplog
):
    timm_folder(tmp_path, {"pretrained_cfg": {"input_size": input_size}}, img_size=expected)
    assert read_encoder(tmp_path).img_size == expected
    assert not caplog.text


def test_positions_come_before_the_input_size_beside_weights(tmp_path, caplog):
    timm_folder(tmp_path, {"pretrained_cfg": {"input_size": [3, 32, 32]}})
    assert read_encoder(tmp_path).img_size == (16, 16)
    assert "positions for 16 patches, which images of 32 x 32 beside it do not have" in caplog.text


def test_arguments_of_timms_model_come_before_the_rest(tmp_path):
    args = {"global_pool": "avg", "fc_norm": False, "img_size": [8, 32], "patch_size": 4}
    args |= {"act_layer": "gelu", "init_values": None, "reg_tokens": 0, "drop_path_rate": 0.1}
    config = {"global_pool": "token", "model_args": args, "pretrained_cfg": PREPARATION}
    timm_folder(tmp_path, config, img_size=(8, 32))
    weights = read_encoder(tmp_path)
    assert (weights.pool, weights.img_size) == ("norm_avg", (8, 32))


@pytest.mark.parametrize(
    "args",
    [
        {"act_layer": "relu"},
        {"class_token": False},
        {"pre_norm": True},
        {"reg_tokens": 4},
        {"qk_norm": True},
        {"init_values": 1e-5},
        {"final_norm": False},
        {"pool_include_prefix": True},
        {"block_fn": "ResPostBlock"},
    ],
    ids=str,
)
def test_another_network_than_ours_is_refused_by_its_arguments(tmp_path, args):
    timm_folder(tmp_path, {"model_args": args, "pretrained_cfg": {}})
    (name, value), *_ = args.items()
    assert f"{name} {value}" in refusal(tmp_path)


@pytest.mark.parametrize("pool", ["map", "max", "avgmax"])
def test_another_pooling_than_ours_is_refused(tmp_path, pool):
    timm_folder(tmp_path, {"global_pool": pool, "pretrained_cfg": {}})
    assert f"global_pool '{pool}'" in refusal(tmp_path)


def test_without_a_head_nothing_is_pooled(tmp_path):
    oracle = timm_nano(num_classes=0, global_pool="avg", fc_norm=False)
    timm.models.save_for_hf(oracle, tmp_path, safe_serialization=True)
    weights = read_encoder(tmp_path)
    assert weights.pool is weights.classes is None


def test_names_that_are_not_those_of_the_outputs_are_left_out(tmp_path, caplog):
    timm_folder(tmp_path, {"label_names": [*NAMES, "dog"], "pretrained_cfg": {}})
    assert read_encoder(tmp_path).classes is None
    assert "names 4 classes but has 3 outputs" in caplog.text


def test_numbered_names_are_in_the_order_of_the_outputs(tmp_path):
    labels = {"10": "k", **{str(i): "abcdefghij"[i] for i in range(10)}}
    model = timm_nano(num_classes=11)
    timm_folder(tmp_path, {"pretrained_cfg": {"label_names": labels}})
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert read_encoder(tmp_path).classes == list("abcdefghijk")


def test_the_config_of_another_network_beside_weights_changes_nothing(tmp_path, caplog):
    preparation = {"mean": [0.4] * 3, "std": [0.2] * 3}
    config = {"architecture": "resnet50", "global_pool": "avg", "pretrained_cfg": preparation}
    timm_folder(tmp_path, config)
    found = read_encoder(tmp_path)
    assert (found.mean, found.pool) == (None, "cls")
    assert "config.json is that of a resnet50, not of a ViT" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"mean": 0.5}, {"mean": None}, {"crop_pct": 1.2}, {"std": [0, 0, 0]}, None], ids=str
)
def test_wrong_settings_name_the_file_that_has_them(tmp_path, wrong):
    timm_folder(tmp_path, {"pretrained_cfg": wrong})
    with pytest.raises(InputError, match=r"config\.json has invalid settings: correct it, or move"):
        read_encoder(tmp_path)


def test_an_encoder_that_timm_saves_without_pooling_is_read(tmp_path):
    model = timm_nano(num_classes=0)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "global_pool": "", "num_classes": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_encoder(tmp_path).pool is None


def test_an_unrelated_config_beside_weights_changes_nothing(tmp_path):
    stored(tmp_path / "w.pth", vit_nano(num_classes=3).state_dict())
    alone = read_encoder(tmp_path / "w.pth")
    (tmp_path / "config.json").write_text('{"mean": [1, 2, 3], "architectures": ["x"]}')
    beside = read_encoder(tmp_path / "w.pth")
    assert (beside.mean, beside.pool, beside.crop_pct) == (None, alone.pool, None)


def test_a_files_own_metadata_comes_before_what_is_beside_it(tmp_path):
    timm_folder(tmp_path, {"pretrained_cfg": PREPARATION})
    stored(tmp_path / "w.pth", finetuned(vit_nano(num_classes=3), classes=NAMES))
    weights = read_encoder(tmp_path / "w.pth")
    assert (weights.mean, weights.crop_pct) == ([0.1, 0.2, 0.3], None)


def test_what_our_transform_lacks_is_said(tmp_path, caplog):
    preparation = {**PREPARATION, "interpolation": "lanczos", "crop_mode": "border"}
    timm_folder(tmp_path, {"pretrained_cfg": preparation})
    weights = read_encoder(tmp_path)
    assert (weights.interpolation, weights.squash) == (None, False)
    assert "interpolation lanczos is not supported" in caplog.text
    assert "crop_mode border is not supported" in caplog.text


# Hugging Face


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        ({"size": {"height": 16, "width": 16}}, (True, 1.0)),
        ({"size": 16}, (True, 1.0)),
        ({"size": {"shortest_edge": 16}}, (False, 1.0)),
        (
            {"size": {"shortest_edge": 20}, "do_center_crop": True, "crop_size": 16},
            (False, 0.8),
        ),
        (
            {
                "size": {"height": 20, "width": 20},
                "do_center_crop": True,
                "crop_size": {"height": 16, "width": 16},
            },
            (True, 0.8),
        ),
        ({"size": 20, "do_center_crop": True, "crop_size": 16}, (False, 0.8)),
        ({"size": {"shortest_edge": 16}, "crop_pct": 0.875}, (False, 0.875)),
        ({"do_resize": False, "size": 16}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_the_crop_of_hugging_faces_processors_is_read(tmp_path, processor, expected):
    hf_nano("ViTModel").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    weights = read_encoder(tmp_path)
    assert (weights.squash, weights.crop_pct) == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ],
)
@pytest.mark.parametrize("resample", [2, 3])
def test_pixels_are_prepared_as_hugging_faces_processor_prepares_them(tmp_path, options, resample):
    hf_nano("ViTModel").save_pretrained(tmp_path)
    size = {"height": 16, "width": 16}
    theirs = transformers.ViTImageProcessor(size=size, resample=resample, **options)
    theirs.save_pretrained(tmp_path)
    weights = read_encoder(tmp_path)
    assert weights.interpolation == {2: "bilinear", 3: "bicubic"}[resample]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (weights.mean, weights.std))
    image = Image.radial_gradient("L").resize((16, 16)).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(16, 16, 3)
    ours = (pixels.movedim(2, 0) / 255 - mean) / std
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("problem_type", "task", "target_scale"),
    [
        (None, None, None),
        ("single_label_classification", "classification", None),
        ("multi_label_classification", "multilabel", None),
        ("regression", "regression", (0.0, 1.0)),
    ],
)
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_problem_type_is_the_task(tmp_path, library, problem_type, task, target_scale):
    if library == "timm":
        timm_folder(tmp_path, {"problem_type": problem_type, "label_names": NAMES})
    else:
        labels = {"id2label": dict(enumerate(NAMES)), "problem_type": problem_type}
        hf_nano("ViTForImageClassification", **labels).save_pretrained(tmp_path)
    weights = read_encoder(tmp_path)
    assert (weights.task, weights.target_scale) == (task, target_scale)
    assert weights.classes == (None if task == "regression" else NAMES)


# This project


def test_metadata_of_a_head_comes_back(tmp_path, nano):
    header = {"task": "regression", "target_scale": [3.5, 0.25]}
    header |= {"crop_pct": 0.9, "interpolation": "bilinear", "squash": True}
    model = vit_nano(num_classes=1, pool="norm_avg")
    content = finetuned(model) | header
    weights = read_encoder(stored(tmp_path / "weights.pth", content))
    save_encoder(weights, tmp_path / "encoder.safetensors")
    for found in (weights, read_encoder(tmp_path / "encoder.safetensors")):
        assert (found.task, found.target_scale) == ("regression", (3.5, 0.25))
        assert (found.crop_pct, found.interpolation, found.squash) == (0.9, "bilinear", True)
        assert found.pool == "norm_avg"
    loaded, start = load_classifier(tmp_path / "encoder.safetensors")
    assert start.weights.target_scale == (3.5, 0.25)
    x = images()
    assert torch.equal(loaded(x), model(x))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task", '"ranking"'),
        ("interpolation", '"lanczos"'),
        ("squash", '"yes"'),
        ("pool", '"max"'),
        ("crop_pct", "0"),
        ("target_scale", "[1.0]"),
        ("target_scale", "[1.0, 0.0]"),
        ("target_scale", "3"),
    ],
)
def test_wrong_metadata_of_a_head_is_refused(tmp_path, key, value):
    path = tmp_path / "encoder.safetensors"
    metadata = {"format": "crossmae-encoder", key: value}
    safetensors.torch.save_file(vit_nano().state_dict(), path, metadata)
    with pytest.raises(InputError, match="damaged"):
        read_encoder(path)


# Mean and std


def test_imagenets_mean_and_std_are_said_where_nobody_tells_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    plain = stored(tmp_path / "plain.pth", vit_nano(num_classes=3).state_dict())
    own = stored(tmp_path / "own.pth", finetuned(vit_nano(num_classes=3)))
    unsaid = {"img_size": None, "mean": None, "std": None}

    def said(path, **given):
        caplog.clear()
        weights = read_encoder(path)
        caplog.clear()
        start_format = {**unsaid, "default_size": 16, **given}
        input_format(weights if path else None, **start_format)
        return caplog.text

    assert "tell the mean and std of its training: taking ImageNet's" in said(plain)
    assert "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5" in said(plain)
    assert "tell the std of" in said(plain, mean=[0.5] * 3)
    assert not said(plain, mean=[0.5] * 3, std=[0.5] * 3)
    assert not said(own)
    starting_point(None, **unsaid)
    assert not caplog.text


PIXELS = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}


@pytest.mark.parametrize("settings", [DataSettings, SegmentationSettings])
def test_mean_and_std_of_pixels_up_to_255_are_refused_with_the_numbers_to_give(settings):
    with pytest.raises(InputError) as caught:
        settings(**PIXELS)
    message = str(caught.value)
    assert "--mean 123.675 116.28 103.53 and --std 58.395 57.12 57.375" in message
    assert "use --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225" in message
    with pytest.raises(InputError, match=r"use --mean 0\.485 0\.456 0\.406$"):
        settings(mean=PIXELS["mean"])
    settings(mean=[0.0] * 3, std=[1.0] * 3)  # no scaling
    settings(mean=[-1.0, 0.0, 1.0], std=[2.0, 0.001, 0.5])


def test_mean_and_std_of_pixels_up_to_255_in_a_file_are_refused(tmp_path):
    timm_folder(tmp_path, {"pretrained_cfg": PIXELS})
    message = refusal(tmp_path)
    assert f"{tmp_path}/config.json has mean 123.675" in message
    assert "write there mean 0.485 0.456 0.406 std 0.229 0.224 0.225" in message
    stored(tmp_path / "w.pth", finetuned(vit_nano(num_classes=3)) | PIXELS)
    assert "w.pth has mean 123.675" in refusal(tmp_path / "w.pth")
