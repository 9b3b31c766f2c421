"""The sentence that ends a run with a loss that is not finite names its cause.

torchrun runs this file as a script.
"""

import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from tests.helpers.files import write_images
from tests.helpers.models import crossmae_nano, mae_nano
from tests.helpers.processes import ROOT, command, finish, start
from tests.helpers.runs import assert_identical
from tests.helpers.training import CPU, make_loader, make_state, prepared, train
from util.compute.distributed import data_parallel, init_distributed, rank, stop_processes
from util.compute.recompute import set_memory
from util.compute.sharding import shard
from util.compute.watchdog import stop_watchdog
from util.data.loaders import StreamStepLoader
from util.errors import NonFiniteLossError
from util.runs.nonfinite import CauseSearch

NAN = math.nan
FC1 = "encoder.blocks.1.mlp.fc1"


class Spoil(nn.Module):
    """Layer that returns NaN for images whose values exceed a limit."""

    def __init__(self, layer, limit):
        super().__init__()
        self.layer, self.limit = layer, limit

    def forward(self, x):
        spoiled = x.detach().flatten(1).amax(dim=1) > self.limit
        return torch.where(spoiled.view(-1, *[1] * (x.ndim - 1)), NAN, self.layer(x))


class SpoilGradient(torch.autograd.Function):
    """Identity whose gradient is NaN."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * NAN


def sentence_of(model, loader, *, state=None, amp="fp32", **options):
    """Train until the loss is not finite; return the sentence that ends the run."""
    with pytest.raises(NonFiniteLossError) as caught:
        train(model, loader, state or make_state(model, amp=amp), **options)
    return str(caught.value)


def cause_in(sentence):
    """The middle of the sentence."""
    found = re.fullmatch(
        r"the loss of step \d+ of the run is not finite: (.*); nothing .*", sentence
    )
    assert found, sentence
    return found[1]


# What is at fault


@pytest.mark.parametrize("build", [crossmae_nano, mae_nano])
@pytest.mark.parametrize("memory", ["high", "medium", "low"])
def test_a_weight_that_is_not_finite_is_named(build, memory):
    model = build()
    set_memory(model.blocks, model.mixer, memory)
    with torch.no_grad():
        model.get_parameter(f"{FC1}.weight")[0, 0] = NAN
    sentence = sentence_of(model, prepared(3), gamma=None)
    assert sentence == (
        "the loss of step 1 of the run is not finite: the weight encoder.blocks.1.mlp.fc1.weight "
        "is not finite, for all 4 images; nothing has been saved since, so lower the learning "
        "rate or use --clip_grad 1, then continue from the last checkpoint"
    )


def test_a_token_that_is_not_finite_is_named_though_no_module_of_its_own_adds_it():
    model = crossmae_nano()
    with torch.no_grad():
        model.encoder.cls_token[..., 0] = NAN
    assert "the weight encoder.cls_token is not finite" in sentence_of(model, prepared(3))


@pytest.mark.parametrize("amp", ["bf16", "fp32"])
def test_a_learning_rate_that_is_too_high_shows_in_the_weights_of_the_first_module(amp):
    cause = cause_in(sentence_of(crossmae_nano(), prepared(5), lr=1e30, amp=amp))
    pattern = r"the first module to return NaN or infinity is encoder\.\S+ from inputs of up to "
    assert re.match(pattern + r"\S+ and weights of up to \S*e\+[23]\d, for all 4 images", cause)


def test_an_overflow_of_fp16_names_the_module_its_inputs_and_another_format():
    model = crossmae_nano()
    with torch.no_grad():
        model.get_parameter(f"{FC1}.weight").mul_(1e6)
    sentence = sentence_of(model, prepared(5), amp="fp16", log_every=2)
    first = r"the first module to return NaN or infinity is encoder\.blocks\.1\.mlp\.fc1 from "
    sizes = r"inputs of up to \d\.\d+ and weights of up to \d\.\d+e\+05, for all 4 images"
    assert re.match(first + sizes, cause_in(sentence))
    assert "lower the learning rate or use --amp bf16 or fp32, then" in sentence


def test_the_images_that_are_not_finite_are_named():
    loader = prepared(3, num_micro_batches=2)
    loader.prepared[1][0].images[3] = math.inf
    loader.prepared[1][1].images[2] = NAN
    sentence = sentence_of(crossmae_nano(), loader)
    assert cause_in(sentence) == (
        "NaN or infinity is in the model's input, for 2 of 8 images (step 1, micro-batch 0, image "
        "3, step 1, micro-batch 1, image 2)"
    )
    assert "so look at these images, or lower the learning rate" in sentence


def test_images_of_which_a_module_makes_nan_are_named_wherever_they_are_in_the_step():
    loader = prepared(3, num_micro_batches=3)
    for micro_batch, image in ((0, 1), (2, 0), (2, 3)):
        loader.prepared[1][micro_batch].images[image] = 1e6
    model = crossmae_nano()
    model.encoder.patch_embed = Spoil(model.encoder.patch_embed, 1e5)
    cause = cause_in(sentence_of(model, loader))
    places = [f"step 1, micro-batch {b}, image {i}" for b, i in ((0, 1), (2, 0), (2, 3))]
    assert "module to return NaN or infinity is encoder.patch_embed from inputs of up to" in cause
    assert cause.endswith(f", for 3 of 12 images ({', '.join(places)})")


def test_a_loss_alone_that_is_not_finite_is_told_apart():
    search = CauseSearch(nn.Identity(), 1)
    with search.micro_batch(4):
        outputs = search.model(torch.ones(4, 2))
        search.check_loss((outputs / 0).sum())
    assert search.describe(None) == (
        "all modules return finite values, and only their loss is not, for one or more of 4 images"
    )


def test_a_gradient_alone_that_is_not_finite_ends_the_run_before_it_reaches_the_weights():
    model = crossmae_nano()
    forward = model.forward
    model.forward = lambda *x: SpoilGradient.apply(forward(*x))
    state = make_state(model)
    assert sentence_of(model, prepared(3), state=state) == (
        "the gradient of step 1 of the run is not finite, but its loss is; nothing has been saved "
        "since, so lower the learning rate or use --clip_grad 1, then continue from the last "
        "checkpoint"
    )
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_what_is_finite_the_second_time_is_said_to_be():
    model, calls = crossmae_nano(), iter(range(9))
    forward = model.forward
    model.forward = lambda *x: forward(*x) * (NAN if next(calls) == 2 else 1.0)
    cause = cause_in(sentence_of(model, prepared(3)))
    assert cause == "computed once more, everything is finite"


# The step that is repeated


def weights_before(model, loader, num_steps):
    """Copies of a state's content after a number of steps."""
    state = make_state(model)
    loader.prepared = loader.prepared[:num_steps]
    loader.steps_per_epoch = num_steps
    train(model, loader, state)
    return state.model.state_dict(), state.optimizer.state_dict()


def test_nothing_is_learned_from_a_bad_step_on():
    torch.manual_seed(0)
    loader, other = prepared(6), prepared(6)
    other.prepared = [list(step) for step in loader.prepared]
    model, same = crossmae_nano(), crossmae_nano()
    same.load_state_dict(model.state_dict())
    loader.prepared[2][0].images[1] = NAN
    state = make_state(model)
    sentence = sentence_of(model, loader, state=state, log_every=5)
    assert sentence.startswith("the loss of step 3 of")
    assert "for 1 of 4 images (step 2, micro-batch 0, image 1)" in sentence
    weights, optimizer = weights_before(same, other, 2)
    assert_identical(model.state_dict(), weights)
    assert_identical(state.optimizer.state_dict(), optimizer)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("crops", [1, 2])
def test_a_step_is_read_again_as_it_was_and_its_files_are_known(tmp_path, num_workers, crops):
    folder = write_images(tmp_path, 21)
    broken = sorted(folder.glob("*.png"))[4]
    broken.write_bytes(b"")
    loader = make_loader(folder, accum_iter=2, batch_size=4, num_workers=num_workers)
    loader.dataset.transform = replace(loader.dataset.transform, num_crops=crops)
    steps = list(loader.steps(1))
    for number, step in enumerate(steps):
        keys = loader.keys_in_step(1, number)
        again = loader.read(keys)
        assert all(map(torch.equal, [b.images for b in step], [b.images for b in again]))
        names = [loader.name(key) for part in keys for key in part]
        assert broken.name not in {Path(name).name for name in names}
        assert all(Path(name).is_file() for name in names)
    assert len(steps) == 3


def test_the_file_of_an_image_is_named(tmp_path):
    folder, seen = write_images(tmp_path, 12), []
    model, loader = crossmae_nano(), make_loader(folder, batch_size=4)
    hook = model.encoder.patch_embed.register_forward_hook(lambda _, args, __: seen.append(*args))
    train(model, loader, make_state(model))
    hook.remove()
    brightest = torch.stack(seen).flatten(2).amax(dim=2)  # (step, image)
    step, image = divmod(brightest.argmax().item(), 4)
    model.encoder.patch_embed = Spoil(model.encoder.patch_embed, brightest.max() - 1e-4)
    sentence = sentence_of(model, loader)
    (keys,) = loader.keys_in_step(0, step)
    assert f"step {step + 1} " in sentence
    assert f"for 1 of 4 images ({loader.name(keys[image])});" in sentence


@pytest.mark.parametrize(
    ("amp", "clip_grad", "advice"),
    [
        ("fp16", None, "use --amp bf16 or fp32"),
        ("bf16", None, "use --clip_grad 1"),
        ("fp32", 2.0, "lower --clip_grad"),
    ],
)
def test_the_advice_fits_the_run(amp, clip_grad, advice):
    model = crossmae_nano()
    with torch.no_grad():
        model.encoder.cls_token[...] = NAN
    sentence = sentence_of(
        model, prepared(1), state=make_state(model, amp=amp, clip_grad=clip_grad)
    )
    assert "the weight encoder.cls_token is not finite" in sentence
    assert f"so lower the learning rate or {advice}, then continue from the last" in sentence


def test_a_stream_is_judged_by_the_last_step_before_the_log_point():
    model, loader = crossmae_nano(), prepared(4)
    loader.keys_in_step = partial(StreamStepLoader.keys_in_step, loader)
    forward, calls = model.forward, iter(range(9))
    model.forward = lambda *x: forward(*x) * (NAN if next(calls) > 1 else 1.0)
    sentence = sentence_of(model, loader)
    assert sentence.startswith("the loss of step 3 of the run is not finite: ")
    assert cause_in(sentence).endswith(
        "for one or more of 4 images of step 4, since a stream cannot be read again"
    )


def test_compiled_modules_are_watched_too():
    model = crossmae_nano()
    for block in model.blocks:
        block.compile(backend="eager", dynamic=False)
    with torch.no_grad():
        model.get_parameter(f"{FC1}.weight")[0, 0] = NAN
    assert f"the weight {FC1}.weight is not finite" in sentence_of(model, prepared(3))
    torch.compiler.reset()


# Several processes


def work():
    """Let one of two processes meet a bad image, in a whole model and in a sharded one."""
    init_distributed("cpu")
    for sharded in (False, True):
        torch.manual_seed(0)
        model = crossmae_nano()
        if sharded:
            shard(model, model.blocks, CPU)
        loader = prepared(4)
        loader.images_in_step = lambda step: 8
        if rank() == 1:
            loader.prepared[1][0].images[2] = NAN
        parallel = data_parallel(model, CPU)
        print(sentence_of(parallel, loader, state=make_state(model)), flush=True)


@pytest.mark.slow
def test_the_bad_image_of_one_process_is_named_by_all():
    code, out, err = finish(start(command(__file__, processes=2), PYTHONPATH=str(ROOT)))
    assert code == 0, out + err
    cause = "NaN or infinity is in the model's input, for 1 of 4 images (step 1, micro-batch 0, "
    expected = f"the loss of step 2 of the run is not finite on process 1: {cause}image 2);"
    assert out.count(expected) == 4, out


if __name__ == "__main__":
    work()
    stop_watchdog()
    stop_processes()
    sys.exit()
