"""Exported encoders give the same results in timm and Hugging Face as here."""

import json

import pytest
import safetensors.torch
import timm
import torch
import transformers

import models_vit
from models import load_model
from models_crossmae import build_crossmae
from models_mae import build_mae
from models_vit import make_linear_probe
from scripts.export_encoder import main
from tests.helpers.files import files_in
from tests.helpers.models import NANO, crossmae_nano, mae_nano, use_nano_models
from tests.helpers.processes import command, finish, start
from tests.helpers.runs import assert_identical, refusal
from tests.helpers.weights import (
    finetuned,
    hf_nano,
    images,
    pretrained,
    randomized,
    released,
    stored,
    timm_nano,
    vit_nano,
)
from util.errors import InputError
from util.masking import TokenSplit
from util.weights.encoder import load_encoder, read_encoder

TINY_PATCH4 = models_vit.SIZES["tiny_patch4"]
NANO_IN_TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(autouse=True)
def _nano(monkeypatch):
    """Replace the tiny models by ones that are fast to write."""
    monkeypatch.setitem(models_vit.SIZES, "tiny_patch4", NANO)
    use_nano_models(monkeypatch)


@pytest.fixture
def export(tmp_path, caplog):
    """Function that exports a checkpoint's content and returns the path and the log."""
    caplog.set_level("INFO")

    def call(content, form, name="out"):
        path = content
        if isinstance(content, dict):
            path = stored(tmp_path / "checkpoint.pth", content)
        caplog.clear()
        words = ["--checkpoint", path, "--format", form, "--output", tmp_path / name]
        # A run's logging would replace the handler of caplog.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("util.runs.run.start_logging", lambda: None)
            main([str(word) for word in words])
        return tmp_path / name, caplog.text

    return call


def in_timm(log, **options):
    """Build the model of the line in the log, at nano size."""
    line = next(line for line in log.splitlines() if "timm.create_model(" in line)
    line = "timm.create_model(" + line.partition("timm.create_model(")[2]
    return eval(line[:-1] + ", **options)", {"timm": timm, "options": options}).eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# timm


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("img_size", [(16, 16), (8, 32)])
@pytest.mark.parametrize("feature_maps", ["all", "last"])
def test_features_of_a_pretrained_encoder_are_the_same_in_timm(
    export, suffix, img_size, feature_maps
):
    model = randomized(crossmae_nano(feature_maps=feature_maps, img_size=img_size))
    _, log = export(pretrained(model), "timm", f"encoder{suffix}")
    oracle = in_timm(log, **NANO_IN_TIMM)
    norm = torch.nn.LayerNorm(32, eps=1e-6)
    if feature_maps == "last":
        norm = model.decoder.context_norm
    assert ("no final norm was trained" in log) == (feature_maps == "all")
    x = images(height=img_size[0], width=img_size[1])
    close(oracle.forward_features(x), norm(model.encoder(x)[-1]))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_logits_of_a_finetuned_model_are_the_same_in_timm(export, suffix, pool):
    model = vit_nano(pool=pool, num_classes=3)
    _, log = export(finetuned(model), "timm", f"classifier{suffix}")
    x = images()
    close(in_timm(log, **NANO_IN_TIMM)(x), model(x))


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_logits_of_a_linear_probe_are_the_same_in_timm(export, pool):
    model = vit_nano(pool=pool)
    make_linear_probe(model, 3)
    model.train()(images(8))  # so that its normalization has an effect
    _, log = export(finetuned(model.eval(), kind="linprobe"), "timm", "probe.pth")
    x = images()
    close(in_timm(log, **NANO_IN_TIMM)(x), model(x))


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_weights_of_timm_come_back_as_they_were(export, pool):
    state = timm_nano(global_pool=pool, num_classes=3).state_dict()
    path, _ = export(state, "timm", "again.pth")
    again = torch.load(path)
    assert_identical({name: again[name] for name in state}, dict(state))
    assert len(again) == len(state)


def test_the_line_in_the_log_loads_a_real_size(export, monkeypatch):
    monkeypatch.setitem(models_vit.SIZES, "tiny_patch4", TINY_PATCH4)
    model = randomized(build_crossmae(TINY_PATCH4, decoder_depth=1))
    _, log = export(pretrained(model), "timm", "encoder.pth")
    x = images(height=32, width=32)
    expected = torch.nn.functional.layer_norm(model.encoder(x)[-1], (192,), eps=1e-6)
    torch.testing.assert_close(in_timm(log).forward_features(x), expected, rtol=1e-4, atol=1e-4)


# Hugging Face


def from_pretrained(name, folder, **options):
    """Load a transformers model, whose weights must be exactly those in the folder."""
    model, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("img_size", [(16, 16), (8, 32)])
@pytest.mark.parametrize(
    ("factory", "feature_maps", "reason"),
    [
        (crossmae_nano, "all", "no MAE decoder"),
        (crossmae_nano, "last", "no MAE decoder"),
        (mae_nano, "all", "no inter-block attention"),
    ],
)
def test_tokens_of_an_encoder_are_the_same_in_hugging_face(
    export, img_size, factory, feature_maps, reason
):
    model = randomized(factory(feature_maps=feature_maps, img_size=img_size))
    folder, log = export(pretrained(model, feature_maps=feature_maps), "hf")
    assert "exporting only the encoder, as ViTModel: " in log and reason in log
    assert ("no final norm was trained" in log) == (feature_maps == "all")
    assert set(files_in(folder)) == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    oracle = from_pretrained("ViTModel", folder, add_pooling_layer=False)
    norm = torch.nn.LayerNorm(32, eps=1e-6)
    if feature_maps == "last":
        norm = model.decoder.context_norm
    x = images(height=img_size[0], width=img_size[1])
    close(oracle(x).last_hidden_state, norm(model.encoder(x)[-1]))


@pytest.mark.parametrize("style", [pretrained, released])
def test_loss_and_predictions_of_an_mae_are_the_same_in_hugging_face(export, style):
    model = randomized(mae_nano())
    folder, log = export(style(model), "hf")
    assert "transformers.ViTMAEForPreTraining.from_pretrained" in log
    oracle = from_pretrained("ViTMAEForPreTraining", folder)
    x, noise = images(), torch.rand(2, 16)
    ids = noise.argsort(dim=1)
    split = TokenSplit(visible=ids[:, :4], predicted=ids[:, 4:])
    out = oracle(x, noise=noise)
    predicted = out.logits.gather(1, split.predicted.unsqueeze(-1).expand(-1, -1, 48))
    close(model.predict(x, split), predicted)
    close(model(x, split), out.loss)


def test_an_mae_of_images_that_are_not_square_is_exported_without_its_decoder(export):
    model = randomized(mae_nano(img_size=(8, 32)))
    folder, log = export(pretrained(model), "hf")
    assert "ViTMAE takes square images only" in log
    oracle = from_pretrained("ViTModel", folder, add_pooling_layer=False)
    x = images(height=8, width=32)
    close(oracle(x).last_hidden_state, model.decoder.context_norm(model.encoder(x)[-1]))


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_weights_that_hugging_face_lacks_are_named(export, pool):
    model = vit_nano(pool=pool, num_classes=3)
    folder, log = export(finetuned(model), "hf")
    lost = "fc_norm.weight, fc_norm.bias, head.weight" if pool == "avg" else "it: head.weight"
    assert lost in log
    from_pretrained("ViTModel", folder, add_pooling_layer=False)


def test_hugging_face_prepares_images_as_in_training(export):
    folder, _ = export(pretrained(randomized(crossmae_nano(img_size=(8, 32)))), "hf")
    processor = transformers.ViTImageProcessor.from_pretrained(folder)
    pixels = torch.randint(256, (3, 8, 32), dtype=torch.uint8)
    prepared = processor(pixels, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    close(prepared, (pixels / 255 - mean) / std)


def test_weights_of_hugging_face_come_back_as_they_were(export, tmp_path):
    hf_nano("ViTModel").save_pretrained(tmp_path / "theirs")
    folder, _ = export(tmp_path / "theirs", "hf")
    theirs = safetensors.torch.load_file(tmp_path / "theirs" / "model.safetensors")
    again = safetensors.torch.load_file(folder / "model.safetensors")
    assert_identical(again, {name: theirs[name] for name in again})
    assert set(theirs) - set(again) == {"pooler.dense.weight", "pooler.dense.bias"}


# Encoder-only files


@pytest.mark.parametrize("content", [pretrained(crossmae_nano()), finetuned(vit_nano())])
def test_our_own_files_hold_what_was_trained(export, tmp_path, content):
    path, _ = export(content, "safetensors", "encoder.safetensors")
    original, again = read_encoder(tmp_path / "checkpoint.pth"), read_encoder(path)
    assert again.hash() == original.hash()
    assert again.head_state.keys() == original.head_state.keys()
    assert (again.mean, again.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


@pytest.mark.parametrize("form", ["timm", "hf"])
def test_an_mlp_of_another_width_survives_the_round_trip(export, monkeypatch, form):
    size = NANO._replace(mlp_dim=96)
    monkeypatch.setitem(models_vit.SIZES, "tiny_patch4", size)
    model = randomized(models_vit.build_vit(size, pool="cls", num_classes=0))
    path, log = export(model.state_dict(), form, "vit.pth" if form == "timm" else "vit")
    x = images()
    if form == "timm":
        theirs = in_timm(log, **NANO_IN_TIMM, mlp_ratio=3)
        assert_identical(dict(theirs.state_dict()), dict(model.state_dict()))
        features = theirs.forward_features(x)
    else:
        theirs = from_pretrained("ViTModel", path, add_pooling_layer=False)
        features = theirs(x).last_hidden_state
    close(features[:, 0], model.features(x))
    again = models_vit.build_vit(size, pool="cls", num_classes=0)
    load_encoder(again, read_encoder(path), head=False)
    assert_identical(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("form", ["timm", "hf"])
def test_an_export_is_read_back_bit_for_bit(export, tmp_path, form):
    content = pretrained(randomized(mae_nano()))
    path, _ = export(content, form, "out.safetensors" if form == "timm" else "out")
    again = read_encoder(path)
    assert again.hash() == read_encoder(tmp_path / "checkpoint.pth").hash()
    assert (again.mean, again.std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_a_mae_exported_to_hugging_face_is_the_model_that_was_loaded(export, tmp_path):
    folder, _ = export(pretrained(randomized(mae_nano())), "hf")
    config = json.loads((folder / "config.json").read_text())
    model, training = load_model(tmp_path / "checkpoint.pth")
    assert config["mask_ratio"] == training["mask_ratio"]
    assert config["norm_pix_loss"] == model.norm_pix_loss


# Wrong input


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"--checkpoint": "nowhere.pth"}, "checkpoint not found: nowhere.pth"),
        ({"--output": "encoder.bin", "--format": "timm"}, "must end in .pth or .safetensors"),
        ({"--output": "encoder.pth", "--format": "safetensors"}, "must end in .safetensors"),
        ({"--output": "nowhere/encoder.pth"}, "cannot write --output nowhere/encoder.pth"),
        ({"--format": "onnx"}, "invalid choice: 'onnx'"),
        ({"--sort": "x"}, "--sort"),
    ],
    ids=str,
)
def test_wrong_input_is_refused_in_one_sentence(tmp_path, capsys, changes, reason):
    checkpoint = stored(tmp_path / "checkpoint.pth", finetuned(vit_nano()))
    argv = {"--checkpoint": checkpoint, "--format": "timm", "--output": tmp_path / "out.pth"}
    words = [word for pair in (argv | changes).items() for word in pair]
    assert reason in refusal(capsys, *words, main=main)
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_another_size_is_refused(tmp_path, capsys):
    model = models_vit.build_vit(NANO._replace(depth=3), pool="cls", num_classes=0)
    path = stored(tmp_path / "checkpoint.pth", model.state_dict())
    words = ["--checkpoint", path, "--format", "timm", "--output", tmp_path / "out.pth"]
    assert "a ViT of depth 3 and width 32" in refusal(capsys, *words, main=main)


def test_an_mlp_that_the_size_does_not_have_is_refused(tmp_path, capsys):
    model = build_mae(NANO._replace(mlp_dim=96), decoder_depth=2)
    path = stored(tmp_path / "checkpoint.pth", released(model))
    words = ["--checkpoint", path, "--format", "hf", "--output", tmp_path / "out"]
    sentence = "has an MLP 96 wide, but the model has an MLP 128 wide"
    assert sentence in refusal(capsys, *words, main=main)
    with pytest.raises(InputError, match="claims to be a mae_vit_tiny_patch4"):
        load_model(path)


@pytest.mark.parametrize(
    ("form", "name"), [("timm", "a.pth"), ("hf", "a"), ("safetensors", "a.safetensors")]
)
def test_nothing_is_overwritten(tmp_path, capsys, form, name):
    checkpoint = stored(tmp_path / "checkpoint.pth", finetuned(vit_nano()))
    place = tmp_path / name
    place.mkdir() if form == "hf" else place.write_text("precious")
    before = files_in(tmp_path)
    words = ["--checkpoint", checkpoint, "--format", form, "--output", place]
    assert f"{place} already exists" in refusal(capsys, *words, main=main)
    assert files_in(tmp_path) == before


def test_it_runs_as_a_script(tmp_path):
    model = build_crossmae(TINY_PATCH4, decoder_depth=1)
    checkpoint = stored(tmp_path / "checkpoint.pth", pretrained(model, decoder_depth=1))
    output = tmp_path / "encoder.safetensors"
    words = ["--checkpoint", checkpoint, "--format", "safetensors", "--output", output]
    code, out, err = finish(start(command("scripts/export_encoder.py", *words)))
    assert (code, err) == (0, "")
    assert f"wrote {output}" in out
    assert read_encoder(output).shape == (4, 192, 12)
