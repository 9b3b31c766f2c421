"""Files in the layout of the released MAE and CrossMAE, and who loads them."""

import pytest
import torch

from models import load_model
from models_vit import make_probe
from tests.helpers.exports import export
from tests.helpers.models import AUTOENCODERS, crossmae_nano, mae_nano, use_nano_models
from tests.helpers.runs import assert_identical
from tests.helpers.weights import (
    finetuned,
    images,
    pretrained,
    randomized,
    released,
    timm_nano,
    vit_nano,
)
from util.errors import InputError
from util.weights.encoder import read_encoder

OPTIONS = {  # of the checkpoints' models, besides those of tests.helpers.models
    "last": {"feature_maps": "last"},
    "self_attention": {"decoder_self_attention": True},
    "some": {"feature_maps": [0, 2]},
    "pixels": {"norm_pix_loss": False},
    "softmax": {"iba_softmax": True},
    "projection": {"iba_projection": True},
    "mae_mix": {"feature_maps": "all"},
    "order": {"feature_maps": [2, 0]},
    "heads": {"decoder_num_heads": 1},
}
FACTORIES = AUTOENCODERS | dict.fromkeys(("some", "pixels", "order", "heads"), crossmae_nano)


@pytest.fixture(autouse=True)
def _nano(monkeypatch):
    """Replace the tiny models by ones that are fast to write."""
    use_nano_models(monkeypatch)


def checkpoint(name):
    """The model and the content of a checkpoint."""
    options = OPTIONS.get(name, {})
    model = randomized(FACTORIES[name](**options))
    return model, pretrained(model, **options)


@pytest.mark.parametrize("name", ["crossmae", "last", "self_attention", "some", "pixels", "mae"])
def test_a_whole_model_is_read_back_bit_for_bit(tmp_path, name):
    model, content = checkpoint(name)
    path, _ = export(tmp_path, content, "mae", "out.pth")
    again, _ = load_model(path)
    assert_identical(dict(again.state_dict()), dict(model.state_dict()))
    assert again.norm_pix_loss == model.norm_pix_loss
    assert (again.mixer and again.mixer.map_ids) == (model.mixer and model.mixer.map_ids)
    assert read_encoder(path).hash() == read_encoder(tmp_path / "checkpoint.pth").hash()


def test_a_model_of_five_channels_is_read_back_bit_for_bit(tmp_path):
    model = randomized(mae_nano(in_chans=5))
    colors = {"mean": [0.1] * 5, "std": [0.2] * 5}
    content = pretrained(model, in_chans=5) | colors | {"channels": 5, "value_range": [0, 4095]}
    path, log = export(tmp_path, content, "mae", "out.pth")
    assert "values are scaled so that 0 becomes 0 and 4095 becomes 1" in log
    again, training = load_model(path)
    assert_identical(dict(again.state_dict()), dict(model.state_dict()))
    assert training["pixels"].num_channels == len(training["mean"]) == len(training["std"]) == 5


@pytest.mark.parametrize("factory", [crossmae_nano, mae_nano])
def test_a_released_file_comes_back_as_it_was(tmp_path, factory):
    content = released(randomized(factory()))
    path, _ = export(tmp_path, content, "mae", "out.pth")
    again = torch.load(path)  # without any other objects
    assert again.keys() == {"model"}
    assert_identical(again["model"], content["model"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("softmax", "no option for its inter-block attention"),
        ("mae_mix", "no option for its inter-block attention"),
        ("order", "no option for its inter-block attention"),
        ("heads", "no option for its attention heads"),
        ("projection", "have no decoder.inter_block_attention.projections.0.weight"),
    ],
)
def test_a_decoder_that_the_layout_cannot_hold_is_left_out(tmp_path, name, reason):
    _, content = checkpoint(name)
    path, log = export(tmp_path, content, "mae", "out.pth")
    assert "leaving out the decoder: " in log and reason in log
    names = torch.load(path)["model"].keys()
    assert names == timm_nano(num_classes=0).state_dict().keys()


@pytest.mark.parametrize("name", ["crossmae", "mae"])
@pytest.mark.parametrize("flags", [(), ("--encoder_only",)], ids=str)
def test_fine_tuning_of_mae_finds_all_but_the_head(tmp_path, name, flags):
    """MAE's loads what fits, and then insists on which names are missing."""
    model, content = checkpoint(name)
    path, _ = export(tmp_path, content, "mae", "out.pth", *flags)
    state = torch.load(path, map_location="cpu")["model"]
    classifier = timm_nano(global_pool="avg", num_classes=3)
    missing = classifier.load_state_dict(state, strict=False).missing_keys
    assert set(missing) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    x = images()
    expected = model.encoder(x)[-1]
    torch.testing.assert_close(classifier.forward_features(x), expected, rtol=0, atol=1e-5)

    probed = timm_nano(global_pool="token", num_classes=3)
    missing = set(probed.load_state_dict(state, strict=False).missing_keys)
    has_norm = name == "mae" or flags  # CrossMAE trains none, and its released files have none
    assert missing == {"head.weight", "head.bias"} | (
        set() if has_norm else {"norm.weight", "norm.bias"}
    )


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_classifier_loads_strictly_in_timm(tmp_path, pool):
    model = vit_nano(pool="cls" if pool == "token" else pool, num_classes=3)
    path, _ = export(tmp_path, finetuned(model), "mae", "out.pth")
    theirs = timm_nano(global_pool=pool, num_classes=3).eval()
    theirs.load_state_dict(torch.load(path)["model"])
    x = images()
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-5)


def test_a_linear_probe_keeps_its_batch_norm(tmp_path):
    model = vit_nano()
    make_probe(model, 3)
    content = finetuned(model, kind="linprobe")
    path, _ = export(tmp_path, content, "mae", "out.pth")
    assert_identical(torch.load(path)["model"], dict(model.state_dict()))


def test_images_that_are_not_square_are_refused(tmp_path):
    content = pretrained(randomized(mae_nano(img_size=(8, 32))))
    with pytest.raises(InputError, match="for square images only"):
        export(tmp_path, content, "mae", "out.pth")


def test_a_head_that_mae_would_run_on_other_features_is_refused(tmp_path):
    content = finetuned(vit_nano(pool="norm_avg", num_classes=3))
    with pytest.raises(InputError, match="use --format timm or --encoder_only"):
        export(tmp_path, content, "mae", "out.pth")
    export(tmp_path, content, "mae", "out.pth", "--encoder_only")


def test_plain_timm_weights_are_written_as_an_encoder(tmp_path):
    state = dict(randomized(timm_nano(num_classes=0)).state_dict())
    path, log = export(tmp_path, state, "mae", "out.pth")
    assert "leaving out the decoder: the checkpoint has none" in log
    assert_identical(dict(torch.load(path)["model"]), state)
