"""Encoders exported to timm give the same results there, and in transformers' TimmWrapper."""

import json

import pytest
import timm
import torch
import transformers

import models_vit
from models_crossmae import build_crossmae
from models_vit import make_probe
from tests.helpers.exports import (
    TINY_PATCH4,
    assert_same_pixels,
    called,
    export,
    photograph,
    tiny_vit,
)
from tests.helpers.files import files_in
from tests.helpers.models import crossmae_nano, mae_nano, use_nano_models
from tests.helpers.runs import assert_identical
from tests.helpers.weights import (
    finetuned,
    images,
    pretrained,
    randomized,
    timm_nano,
    vit_nano,
)
from util.data.transforms import eval_transform
from util.settings import model as model_settings
from util.weights.encoder import read_encoder

NANO_IN_TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 2}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]  # of the checkpoints in tests.helpers.weights


@pytest.fixture
def nano(monkeypatch):
    """Replace the tiny models by ones that are fast to write."""
    use_nano_models(monkeypatch)


def in_timm(log, **options):
    """Build the model of the line in the log, with other options."""
    call = called(log, "timm.create_model")
    return eval(f"{call}, **options)", {"timm": timm, "options": options}).eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def same_outputs(theirs, ours, x):
    """Compare two models in double precision, where rounding does not hide a difference."""
    actual = theirs.double()(x.double())
    actual = getattr(actual, "logits", actual)
    torch.testing.assert_close(actual, ours.double()(x.double()), rtol=1e-6, atol=1e-8)
    ours.float()


# Files


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("img_size", [(16, 16), (8, 32)])
@pytest.mark.parametrize("feature_maps", ["all", "last"])
def test_features_of_a_pretrained_encoder_are_the_same(tmp_path, suffix, img_size, feature_maps):
    model = randomized(crossmae_nano(feature_maps=feature_maps, img_size=img_size))
    _, log = export(tmp_path, pretrained(model), "timm", f"encoder{suffix}")
    oracle = in_timm(log, **NANO_IN_TIMM)
    norm = torch.nn.LayerNorm(32, eps=1e-6)
    if feature_maps == "last":
        norm = model.decoder.context_norm
    assert ("no final norm was trained" in log) == (feature_maps == "all")
    x = images(height=img_size[0], width=img_size[1])
    close(oracle.forward_features(x), norm(model.encoder(x)[-1]))


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("pool", model_settings.POOLS)
def test_logits_of_a_finetuned_model_are_the_same(tmp_path, suffix, pool):
    model = vit_nano(pool=pool, num_classes=3)
    _, log = export(tmp_path, finetuned(model), "timm", f"classifier{suffix}")
    x = images()
    close(in_timm(log, **NANO_IN_TIMM)(x), model(x))


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_logits_of_a_linear_probe_are_the_same(tmp_path, pool):
    model = vit_nano(pool=pool)
    make_probe(model, 3)
    model.train()(images(8))  # so that its normalization has an effect
    content = finetuned(model.eval(), kind="linprobe")
    _, log = export(tmp_path, content, "timm", "probe.pth")
    x = images()
    close(in_timm(log, **NANO_IN_TIMM)(x), model(x))


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_weights_of_timm_come_back_as_they_were(tmp_path, pool):
    state = timm_nano(global_pool=pool, num_classes=3).state_dict()
    path, log = export(tmp_path, dict(state), "timm", "again.pth")
    again = torch.load(path)
    assert_identical({name: again[name] for name in state}, dict(state))
    assert len(again) == len(state)
    assert "no mean and std, so ImageNet's are taken" in log


@pytest.mark.usefixtures("nano")
def test_a_file_is_read_back_bit_for_bit(tmp_path):
    content = pretrained(randomized(mae_nano()))
    path, _ = export(tmp_path, content, "timm", "out.safetensors")
    again = read_encoder(path)
    assert again.hash() == read_encoder(tmp_path / "checkpoint.pth").hash()
    assert (again.mean, again.std) == (MEAN, STD)


@pytest.mark.usefixtures("nano")
def test_an_mlp_of_another_width_survives_the_round_trip(tmp_path, monkeypatch):
    size = model_settings.SIZES["tiny_patch4"]._replace(mlp_dim=96)
    monkeypatch.setitem(model_settings.SIZES, "tiny_patch4", size)
    model = randomized(models_vit.build_vit(size, pool="cls", num_classes=0))
    _, log = export(tmp_path, dict(model.state_dict()), "timm", "vit.pth")
    theirs = in_timm(log, **NANO_IN_TIMM, mlp_ratio=3)
    assert_identical(dict(theirs.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize(
    ("size", "img_size"),
    [("tiny_patch4", 32), ("tiny_patch4", 96), ("tiny_patch4", (32, 64)), ("micro_patch4", 32)],
    ids=str,
)
def test_the_line_in_the_log_loads_a_real_size(tmp_path, size, img_size):
    shape = model_settings.SIZES[size]
    model = randomized(build_crossmae(shape, decoder_depth=1, img_size=img_size))
    content = pretrained(model, decoder_depth=1) | {"model_name": f"crossmae_vit_{size}"}
    _, log = export(tmp_path, content, "timm", "encoder.pth")
    height, width = model.encoder.img_size
    x = images(1, height=height, width=width)
    oracle = in_timm(log)
    widths = (shape.embed_dim,)
    expected = torch.nn.functional.layer_norm(model.encoder(x)[-1], widths, eps=1e-6)
    torch.testing.assert_close(oracle.forward_features(x), expected, rtol=1e-4, atol=1e-4)
    prepared = timm.data.resolve_model_data_config(oracle)
    assert prepared["input_size"] == (3, height, width)
    assert (prepared["mean"], prepared["std"]) == (tuple(MEAN), tuple(STD))


@pytest.mark.parametrize("name", ["classifier.pth", "classifier.safetensors", "folder"])
def test_the_line_in_the_log_takes_other_classes_and_sizes_and_features_only(tmp_path, name):
    model = tiny_vit(pool="avg")
    _, log = export(tmp_path, finetuned(model), "timm", name)
    other = in_timm(log, num_classes=10)
    assert other.head.weight.shape == (10, 192)
    assert_identical(dict(other.blocks.state_dict()), dict(model.blocks.state_dict()))
    assert_identical(dict(other.fc_norm.state_dict()), dict(model.fc_norm.state_dict()))

    assert in_timm(log, img_size=32)(images(height=32, width=32)).shape == (2, 3)

    x = images()
    maps = in_timm(log, features_only=True, out_indices=(3, 11))(x)
    expected = model.encode(x)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(maps[-1], expected, rtol=1e-4, atol=1e-4)
    assert [x.shape for x in maps] == [(2, 192, 4, 4)] * 2


# Folders


@pytest.mark.parametrize(
    ("pool", "img_size"), [("avg", 16), ("cls", (8, 32)), ("norm_avg", 16)], ids=str
)
def test_logits_and_classes_of_a_folder_are_the_same_in_timm_and_transformers(
    tmp_path, pool, img_size
):
    model, names = tiny_vit(pool=pool, img_size=img_size), ["ant", "bee", "cat"]
    folder, log = export(tmp_path, finetuned(model, classes=names), "timm")
    assert set(files_in(folder)) == {"README.md", "config.json", "model.safetensors"}
    x = images(height=model.img_size[0], width=model.img_size[1])
    theirs = in_timm(log)
    assert theirs.pretrained_cfg["label_names"] == names
    same_outputs(theirs, model, x)

    wrapped, info = transformers.AutoModelForImageClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert type(wrapped).__name__ == "TimmWrapperForImageClassification"
    assert not any(info.values()), info
    assert wrapped.config.id2label == dict(enumerate(names))
    same_outputs(wrapped.eval(), model, x)


def test_an_encoder_in_a_folder_is_the_same_in_timm_and_transformers(tmp_path):
    model = randomized(build_crossmae(TINY_PATCH4, decoder_depth=1, img_size=16))
    folder, log = export(tmp_path, pretrained(model, decoder_depth=1), "timm")
    x = images()
    expected = torch.nn.functional.layer_norm(model.encoder(x)[-1], (192,), eps=1e-6)
    theirs = in_timm(log)
    assert theirs.num_classes == 0
    torch.testing.assert_close(theirs.forward_features(x), expected, rtol=1e-4, atol=1e-4)
    wrapped = transformers.AutoModel.from_pretrained(folder).eval()
    tokens = wrapped(x).last_hidden_state
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("img_size", [(16, 16), (96, 96), (224, 224), (256, 256)])
@pytest.mark.parametrize(
    "header", [{}, {"crop_pct": 0.9, "interpolation": "bilinear", "squash": True}], ids=str
)
def test_a_folder_prepares_images_as_in_evaluation(tmp_path, img_size, header):
    model = vit_nano(num_classes=3, img_size=img_size)
    folder, _ = export(tmp_path, finetuned(model) | header, "timm")
    settings = {"crop_pct": 0.875 if img_size[0] <= 224 else 1, **header}
    transform = eval_transform(img_size, MEAN, STD, **settings)
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    prepared = timm.data.resolve_data_config(pretrained_cfg=config)
    theirs = timm.data.create_transform(**prepared)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    for height, width in [(300, 400), (343, 256), (97, 101)]:
        image = photograph(height, width)
        assert_same_pixels(theirs(image), transform, image)
        assert_same_pixels(processor(image)["pixel_values"][0], transform, image)


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("pool", model_settings.POOLS)
def test_a_folder_is_read_back_with_all_that_is_known(tmp_path, pool):
    model = vit_nano(pool=pool, num_classes=3)
    header = {"crop_pct": 0.9, "interpolation": "bilinear", "squash": True}
    content = finetuned(model, classes=["ant", "bee", "cat"]) | header
    folder, _ = export(tmp_path, content, "timm")
    original, again = read_encoder(tmp_path / "checkpoint.pth"), read_encoder(folder)
    assert again.hash() == original.hash()
    kept = ("img_size", "mean", "std", "classes", "pool", *header)
    assert [getattr(again, key) for key in kept] == [getattr(original, key) for key in kept]


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize("name", ["folder", "file.pth", "file.safetensors"])
def test_five_channels_are_kept_with_their_mean_and_range(tmp_path, name):
    model, colors = vit_nano(num_classes=3, in_chans=5), {"mean": [0.1] * 5, "std": [0.2] * 5}
    reading = {"channels": 5, "value_range": [0, 4095], "tile": 512}
    path, log = export(tmp_path, finetuned(model) | colors | reading, "timm", name)
    theirs = in_timm(log, **NANO_IN_TIMM)
    x = torch.randn(2, 5, 16, 16)
    close(theirs(x), model(x))
    prepared = timm.data.resolve_model_data_config(theirs)
    assert prepared["input_size"] == (5, 16, 16)
    assert (list(prepared["mean"]), list(prepared["std"])) == ([0.1] * 5, [0.2] * 5)
    note = "values are scaled so that 0 becomes 0 and 4095 becomes 1"
    assert "images of 5 channels, larger images are cropped to 512 px in their middle first" in log
    assert note in log
    if name == "file.pth":  # bare weights
        return
    again = read_encoder(path)
    assert (again.channels, again.value_range, again.tile) == (5, (0, 4095), 512)
    assert (again.mean, again.std) == ([0.1] * 5, [0.2] * 5)
    if name == "folder":
        card = (path / "README.md").read_text()
        assert note.capitalize() in card
        assert "create_transform" not in card


@pytest.mark.usefixtures("nano")
def test_encoder_only_leaves_out_the_head(tmp_path):
    model = vit_nano(pool="avg", num_classes=3)
    content = finetuned(model, classes=["ant", "bee", "cat"])
    folder, _ = export(tmp_path, content, "timm", "out", "--encoder_only")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == 0
    assert "label_names" not in config
    again = read_encoder(folder)
    assert again.head_state.keys() == {"fc_norm.weight", "fc_norm.bias"}


@pytest.mark.usefixtures("nano")
def test_the_outputs_of_a_regression_are_values(tmp_path):
    model = vit_nano(pool="avg", num_classes=1)
    content = finetuned(model)
    content["model_options"]["num_classes"] = 1
    content |= {"task": "regression", "target_scale": [40.0, 7.0]}
    _, log = export(tmp_path, content, "timm", "regressor.pth")
    x = images()
    close(in_timm(log, **NANO_IN_TIMM)(x), model(x) * 7 + 40)
    folder, _ = export(tmp_path, content, "timm")
    assert "The output is the predicted value." in (folder / "README.md").read_text()
    again = read_encoder(folder)
    assert (again.task, again.target_scale) == ("regression", (0.0, 1.0))


@pytest.mark.usefixtures("nano")
@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        (pretrained(crossmae_nano()), ["pre-trained by [CrossMAE](https://arxiv.org/abs/2401"]),
        (pretrained(mae_nano()), ["pre-trained by [MAE](https://arxiv.org/abs/2111"]),
        (
            finetuned(vit_nano(num_classes=3), classes=["ant", "bee", "cat"]),
            ["a head of 3 outputs", "Classes: ant, bee, cat.", "mean [0.1, 0.2, 0.3]"],
        ),
    ],
    ids=["crossmae", "mae", "classifier"],
)
def test_the_model_card_says_what_it_is_and_how_to_load_it(tmp_path, content, sentences):
    folder, _ = export(tmp_path, content, "timm")
    card = (folder / "README.md").read_text()
    for sentence in [*sentences, "License: unknown", "timm.create_model("]:
        assert sentence.lower() in card.lower()
