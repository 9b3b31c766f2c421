"""Encoders, classifiers and MAEs exported to Hugging Face give the same results there."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from models import load_model
from models_mae import build_mae
from models_vit import build_vit, make_probe
from tests.helpers.exports import assert_same_pixels, export, photograph
from tests.helpers.files import files_in
from tests.helpers.models import NANO, crossmae_nano, mae_nano, use_nano_models
from tests.helpers.runs import assert_identical
from tests.helpers.weights import (
    finetuned,
    hf_nano,
    images,
    pretrained,
    randomized,
    released,
    stored,
    vit_nano,
)
from util.data.transforms import eval_transform
from util.errors import InputError
from util.masking import TokenSplit
from util.normalization import PixelFormat
from util.settings.model import SIZES
from util.weights.encoder import load_encoder, read_encoder

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]  # of the checkpoints in tests.helpers.weights


@pytest.fixture(autouse=True)
def _nano(monkeypatch):
    """Replace the tiny models by ones that are fast to write."""
    use_nano_models(monkeypatch)


def from_pretrained(name, folder, **options):
    """Load a transformers model, whose weights must be exactly those in the folder."""
    model, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# Encoders


@pytest.mark.parametrize("img_size", [(16, 16), (8, 32)])
@pytest.mark.parametrize(
    ("factory", "feature_maps", "reason"),
    [
        (crossmae_nano, "all", "no decoder with cross-attention"),
        (crossmae_nano, "last", "no decoder with cross-attention"),
        (mae_nano, "all", "no inter-block attention"),
    ],
)
def test_tokens_of_an_encoder_are_the_same(tmp_path, img_size, factory, feature_maps, reason):
    model = randomized(factory(feature_maps=feature_maps, img_size=img_size))
    folder, log = export(tmp_path, pretrained(model, feature_maps=feature_maps), "hf")
    assert "exporting only the encoder, as ViTModel: " in log and reason in log
    assert ("no final norm was trained" in log) == (feature_maps == "all")
    assert set(files_in(folder)) == {
        "README.md",
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


def test_weights_of_hugging_face_come_back_as_they_were(tmp_path):
    hf_nano("ViTModel").save_pretrained(tmp_path / "theirs")
    folder, _ = export(tmp_path, tmp_path / "theirs", "hf")
    theirs = safetensors.torch.load_file(tmp_path / "theirs" / "model.safetensors")
    again = safetensors.torch.load_file(folder / "model.safetensors")
    assert_identical(again, {name: theirs[name] for name in again})
    assert set(theirs) - set(again) == {"pooler.dense.weight", "pooler.dense.bias"}


def test_an_mlp_of_another_width_survives_the_round_trip(tmp_path, monkeypatch):
    size = NANO._replace(mlp_dim=96)
    monkeypatch.setitem(SIZES, "tiny_patch4", size)
    model = randomized(build_vit(size, pool="cls", num_classes=0))
    folder, _ = export(tmp_path, dict(model.state_dict()), "hf")
    x = images()
    tokens = from_pretrained("ViTModel", folder, add_pooling_layer=False)(x).last_hidden_state
    close(tokens[:, 0], model.features(x))
    again = build_vit(size, pool="cls", num_classes=0)
    load_encoder(again, read_encoder(folder), head=False)
    assert_identical(dict(again.state_dict()), dict(model.state_dict()))


def test_a_folder_is_read_back_bit_for_bit(tmp_path):
    folder, _ = export(tmp_path, pretrained(randomized(mae_nano())), "hf")
    again = read_encoder(folder)
    assert again.hash() == read_encoder(tmp_path / "checkpoint.pth").hash()
    assert (again.mean, again.std) == (MEAN, STD)


# Whole MAEs


@pytest.mark.parametrize("style", [pretrained, released])
def test_loss_and_predictions_of_an_mae_are_the_same(tmp_path, style):
    model = randomized(mae_nano())
    folder, log = export(tmp_path, style(model), "hf")
    assert "transformers.ViTMAEForPreTraining.from_pretrained" in log
    oracle = from_pretrained("ViTMAEForPreTraining", folder)
    x, noise = images(), torch.rand(2, 16)
    ids = noise.argsort(dim=1)
    split = TokenSplit(visible=ids[:, :4], predicted=ids[:, 4:])
    out = oracle(x, noise=noise)
    predicted = out.logits.gather(1, split.predicted.unsqueeze(-1).expand(-1, -1, 48))
    close(model.predict(x, split), predicted)
    close(model(x, split), out.loss)


def test_an_mae_is_the_model_that_was_loaded(tmp_path):
    folder, _ = export(tmp_path, pretrained(randomized(mae_nano())), "hf")
    config = json.loads((folder / "config.json").read_text())
    model, training = load_model(tmp_path / "checkpoint.pth")
    assert config["mask_ratio"] == training["mask_ratio"]
    assert config["norm_pix_loss"] == model.norm_pix_loss


@pytest.mark.parametrize(
    ("img_size", "flags"), [((8, 32), ()), ((16, 16), ("--encoder_only",))], ids=str
)
def test_the_encoder_of_an_mae_is_exported_alone_by_flag_or_if_it_is_not_square(
    tmp_path, img_size, flags
):
    model = randomized(mae_nano(img_size=img_size))
    folder, log = export(tmp_path, pretrained(model), "hf", "out", *flags)
    assert ("ViTMAE takes square images only" in log) == (not flags)
    oracle = from_pretrained("ViTModel", folder, add_pooling_layer=False)
    x = images(height=img_size[0], width=img_size[1])
    close(oracle(x).last_hidden_state, model.decoder.context_norm(model.encoder(x)[-1]))


# Classifiers


@pytest.mark.parametrize("kind", ["finetune", "linprobe"])
@pytest.mark.parametrize("names", [["ant", "bee", "cat"], None])
def test_logits_and_classes_are_the_same(tmp_path, kind, names):
    model = vit_nano(num_classes=3)
    if kind == "linprobe":
        make_probe(model, 3)
        model.train()(images(8))  # so that its normalization has an effect
    content = finetuned(model.eval(), kind=kind, classes=names)
    folder, log = export(tmp_path, content, "hf")
    assert "transformers.ViTForImageClassification.from_pretrained" in log
    oracle = from_pretrained("ViTForImageClassification", folder)
    x = images()
    close(oracle(x).logits, model(x))
    labels = dict(enumerate(names or ["LABEL_0", "LABEL_1", "LABEL_2"]))
    assert oracle.config.id2label == labels
    assert oracle.config.label2id == {name: i for i, name in labels.items()}
    assert oracle.config.problem_type == "single_label_classification"
    again = read_encoder(folder)
    assert (again.classes, again.pool, again.num_classes) == (names, "cls", 3)


@pytest.mark.parametrize(
    ("header", "problem_type"),
    [
        ({"task": "multilabel"}, "multi_label_classification"),
        ({"task": "regression", "target_scale": [40.0, 7.0]}, "regression"),
    ],
    ids=str,
)
def test_another_task_has_its_problem_type_and_outputs(tmp_path, header, problem_type):
    model = vit_nano(num_classes=3)
    folder, _ = export(tmp_path, finetuned(model) | header, "hf")
    oracle = from_pretrained("ViTForImageClassification", folder)
    assert oracle.config.problem_type == problem_type
    mean, std = header.get("target_scale", (0, 1))
    x = images()
    close(oracle(x).logits, model(x) * std + mean)


@pytest.mark.parametrize("pool", ["avg", "norm_avg"])
def test_a_head_on_the_mean_of_the_tokens_is_refused_or_left_out(tmp_path, pool):
    content = finetuned(vit_nano(pool=pool, num_classes=3))
    with pytest.raises(InputError, match="--format timm, which transformers reads, too, or --enc"):
        export(tmp_path, content, "hf")
    folder, log = export(tmp_path, content, "hf", "out", "--encoder_only")
    lost = "left out, because ViTModel lacks it: fc_norm.weight, fc_norm.bias"
    assert (lost in log) == (pool == "avg")
    from_pretrained("ViTModel", folder, add_pooling_layer=False)


# Images


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("img_size", [16, 96, 224, 256])
@pytest.mark.parametrize(
    "header", [{}, {"crop_pct": 0.9, "interpolation": "bilinear", "squash": True}], ids=str
)
def test_images_are_prepared_as_in_evaluation(tmp_path, backend, img_size, header):
    content = finetuned(vit_nano(num_classes=3, img_size=img_size)) | header
    folder, _ = export(tmp_path, content, "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend=backend)
    settings = {"crop_pct": 0.875 if img_size <= 224 else 1, **header}
    transform = eval_transform((img_size, img_size), MEAN, STD, **settings)
    # Where an odd number of pixels is cropped, transformers may begin a pixel earlier.
    for height, width in [(300, 300), (300, 400), (40, 30)]:
        image = photograph(height, width)
        prepared = processor(image, return_tensors="pt")["pixel_values"][0]
        assert_same_pixels(prepared, transform, image)
    again = read_encoder(folder)
    assert again.squash == settings.get("squash", False)
    assert again.interpolation == settings.get("interpolation", "bicubic")


@pytest.mark.parametrize("value_range", [(0, 4095), (-1000, 1000), None], ids=str)
def test_arrays_are_prepared_as_in_evaluation(tmp_path, value_range):
    pixels = PixelFormat(5, value_range)
    mean, std = [0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.3, 0.4, 0.5, 0.6]
    content = finetuned(vit_nano(num_classes=3, in_chans=5)) | {"mean": mean, "std": std}
    folder, _ = export(tmp_path, content | pixels.header, "hf")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    low, high = value_range or (0, 1)
    array = np.random.default_rng(0).uniform(low, high, (40, 30, 5)).astype(np.float32)
    prepared = processor(array, input_data_format="channels_last", return_tensors="pt")
    transform = eval_transform((16, 16), mean, std, 0.875, pixels=pixels)
    crops = transform(torch.from_numpy(array).permute(2, 0, 1))
    expected = crops.normalization(crops.pixels[0].unsqueeze(0))
    close(prepared["pixel_values"], expected)
    card = (folder / "README.md").read_text()
    assert "Input: images of 5 channels" in card
    scaled = f"scaled so that {low} becomes 0 and {high} becomes 1"
    assert (scaled in card, "It does not scale them" in card) == (
        bool(value_range),
        not value_range,
    )
    again = read_encoder(folder)
    assert again.pixels == pixels
    assert again.mean == pytest.approx(mean) and again.std == pytest.approx(std)


def test_a_rectangle_is_squeezed_because_it_cannot_be_cropped(tmp_path):
    model = randomized(crossmae_nano(img_size=(8, 32)))
    folder, log = export(tmp_path, pretrained(model), "hf")
    sentence = "The processor squeezes the whole image to the input's size instead"
    assert sentence in log
    assert sentence in (folder / "README.md").read_text()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = photograph(64, 64)
    prepared = processor(image, return_tensors="pt")["pixel_values"][0]
    assert_same_pixels(prepared, eval_transform((8, 32), MEAN, STD, squash=True), image)


def test_the_model_card_has_the_code_that_loads_the_folder(tmp_path):
    content = finetuned(vit_nano(num_classes=3), classes=["ant", "bee", "cat"])
    folder, _ = export(tmp_path, content, "hf")
    card = (folder / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("FOLDER", str(folder))
    names = {}
    exec(code, names)
    inputs = names["processor"](photograph(40, 50), return_tensors="pt")
    assert names["model"](**inputs).logits.shape == (1, 3)


def test_an_mlp_that_the_size_does_not_have_is_refused(tmp_path):
    content = released(build_mae(NANO._replace(mlp_dim=96), decoder_depth=2))
    with pytest.raises(InputError, match="has an MLP 96 wide, but the model has an MLP 128 wide"):
        export(tmp_path, content, "hf")
    with pytest.raises(InputError, match="claims to be a mae_vit_tiny_patch4"):
        load_model(stored(tmp_path / "mae.pth", content))
