"""Memory of a step, foreseen from what autograd keeps for one or two images."""

from functools import partial

import pytest
import torch

from engine_detection import blank_losses
from engine_pretrain import blank_batch
from engine_segmentation import blank_loss
from models import build_detector, build_segmenter
from models_vit import build_vit, make_probe
from tests.helpers.models import NANO, crossmae_nano, mae_nano
from util.compute import memory
from util.compute.batch_size import foreseen_batch_size
from util.compute.memory import PEAK_PER_SAVED, StepMemory, check_step, foresee_step, saved_bytes
from util.compute.precision import Precision, blank_images, blank_pairs
from util.compute.recompute import set_memory
from util.errors import InputError
from util.masking import Masking
from util.settings.compute import MEMORY_MODES
from util.settings.masking import MaskSettings

CPU = torch.device("cpu")
GIB = 2**30
COLORS = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "device": CPU}


def autoencoder(build, mode="high"):
    model = build()
    set_memory(model.blocks, model.mixer, mode)
    masks = MaskSettings(0.75, None if build is mae_nano else 0.25)
    grid_size = model.encoder.grid_size
    masking = Masking.of(masks, grid_size, seed=0, all_masked=build is mae_nano)
    return model, partial(blank_batch, masking, model.encoder.img_size, **COLORS)


def classifier():
    model = build_vit(NANO, num_classes=7, pool="cls", drop_path=0.5)
    return model, blank_images(model.img_size, CPU)


def probe():
    model, example = classifier()
    make_probe(model, 7)
    return model, example


def segmenter():
    model = build_segmenter("tiny_patch4", img_size=(16, 16), num_classes=3, drop_path=0.5)
    return model, blank_pairs(model.img_size, CPU)


def detector(masks=True):
    options = {"input_size": 32, "num_classes": 3, "fpn_dim": 16, "roi_batch": 64, "masks": masks}
    model = build_detector("tiny_patch4", img_size=(32, 32), drop_path=0.5, **options)
    return model, blank_images((32, 32), CPU), partial(blank_losses, model)


def foresee(model, example, amp="fp32", **options):
    options = {"mode": "high", "batch_size": 8, **options}
    return foresee_step(model, example, Precision(amp, CPU), **options)


@pytest.mark.parametrize(
    ("build", "mode", "amp"),
    [*((crossmae_nano, mode, "fp32") for mode in MEMORY_MODES), (mae_nano, "high", "bf16")],
)
def test_the_memory_of_many_images_is_what_autograd_keeps_for_them(build, mode, amp):
    model, example = autoencoder(build, mode)
    step, precision = foresee(model, example, amp, mode=mode), Precision(amp, CPU)

    def kept(count):
        inputs = example(count)
        with precision.autocast():
            how = {"recomputes": mode != "high"}
            return saved_bytes(lambda: model(*inputs), model.parameters(), **how)

    more = kept(24) - kept(8)
    assert 16 * step.per_image == pytest.approx(more * PEAK_PER_SAVED["cpu"][mode], rel=0.05)


def test_weights_gradients_moments_and_an_average_are_counted():
    model, example = classifier()
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    step = foresee(model, example, has_average=True)
    assert (step.weights, step.gradients) == (weights, trained)
    assert step.state == 2 * trained + weights
    assert (
        step.missing(1000, 1)
        < step.missing(1000, 4)
        == (step.state + step.gradients + 1000 * step.per_image)
    )


def test_the_activations_of_a_frozen_encoder_count_though_none_are_kept():
    model, example = probe()
    hidden = 4 * NANO.embed_dim * (1 + model.num_patches) * 4
    assert foresee(model, example, moments=1).per_image >= 5 * hidden


def test_the_loss_of_a_segmentation_counts():
    model, example = segmenter()
    step = foresee(model, example, forward=partial(blank_loss, model, 0.4))
    logits = 3 * 16 * 16 * 4
    assert step.per_image > foresee(model, example).per_image + logits


def test_the_heads_of_a_detector_count_with_as_many_objects_as_they_take():
    model, example, forward = detector()
    step = foresee(model, example, forward=forward, peak_in_heads=True)
    seen = []
    model.roi_heads.box_head.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    model.roi_heads.mask_head.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    forward(*example(2))
    assert seen == [2 * 64, 2 * 16]  # proposals of two images; a quarter have masks
    without, example, forward = detector(masks=False)
    less = foresee(without, example, forward=forward, peak_in_heads=True)
    hidden = 16 * 16 * 14 * 14 * 4  # objects, channels, pixels, bytes
    assert step.per_image > less.per_image + 8 * hidden


def test_heads_are_never_recomputed():
    model, example, forward = detector()
    high = foresee(model, example, forward=forward, peak_in_heads=True).per_image
    set_memory(model.blocks, None, "low")
    options = {"mode": "low", "forward": forward}
    low = foresee(model, example, **options, peak_in_heads=True).per_image
    factors = PEAK_PER_SAVED["cpu"]
    assert low < high
    assert low == pytest.approx(
        foresee(model, example, **options).per_image * factors["high"] / factors["low"], rel=1e-3
    )


@pytest.mark.parametrize("build", [classifier, probe, segmenter, detector])
def test_looking_ahead_changes_no_weight_statistic_or_random_number(build):
    model, example, *forward = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    foresee(model, example, forward=forward[0] if forward else None)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(len(module._forward_hooks) for module in model.modules())


# What fits

STEP = StepMemory(CPU, "high", weights=GIB, state=2 * GIB, gradients=GIB, per_image=GIB // 4)


@pytest.fixture
def free(monkeypatch):
    """Sets the GiB that are free."""

    def set_free(gib):
        monkeypatch.setattr(memory, "available_memory", lambda: int(gib * GIB))

    return set_free


def refusal(step, *batch):
    with pytest.raises(InputError) as caught:
        check_step(step, *batch)
    return str(caught.value)


def test_a_step_that_fits_is_described(free):
    free(10.25)
    assert check_step(STEP, 32, 1) == "about 11.2 GiB"


def test_a_step_that_does_not_fit_is_refused_with_flags_that_fit_half_of_what_is_free(free):
    free(14)
    assert refusal(STEP, 512, 1) == (
        "a step of 512 images needs about 130 GiB of memory, but 14.0 GiB are free: "
        "use --batch_size 16 --effective_batch_size 512"
    )
    check_step(STEP, 16, 32)


def test_an_accumulation_given_by_accum_iter_is_given_by_the_images_instead(free):
    free(14)
    assert refusal(STEP, 64, 8).endswith(
        "use --batch_size 16 --effective_batch_size 512 without --accum_iter"
    )


def test_crops_of_an_image_stay_together_in_the_advice(free):
    free(14)
    assert "--batch_size 12 --effective_batch_size 96" in refusal(STEP, 96, 1, 3)


def test_a_step_of_one_image_that_does_not_fit_needs_another_model(free):
    free(3)
    assert refusal(STEP, 1, 1).endswith("use a smaller model or --memory low")
    low = StepMemory(CPU, "low", *(GIB, 2 * GIB, GIB, GIB // 4))
    assert refusal(low, 8, 1).endswith("use a smaller model")


def test_processes_on_one_machine_share_its_memory(free, monkeypatch):
    free(14)
    check_step(STEP, 32, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert "7.0 GiB are free" in refusal(STEP, 32, 1)


def test_unknown_memory_refuses_nothing(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    assert check_step(STEP, 10**6, 1).startswith("about ")
    assert check_step(None, 8, 1) is None


def test_a_chosen_batch_fits_half_of_what_is_free_and_is_no_larger_than_a_cpu_can_use(free):
    free(14)
    assert foreseen_batch_size(STEP, 512) == 16
    assert foreseen_batch_size(STEP, 510) == 15
    free(1000)
    assert foreseen_batch_size(STEP, 512) == 64
    assert foreseen_batch_size(STEP, 3 * 70, multiple_of=70) == 70


def test_no_batch_is_chosen_if_none_fits(free):
    free(6)
    with pytest.raises(InputError, match="not even a batch of 1 fits"):
        foreseen_batch_size(STEP, 512)
