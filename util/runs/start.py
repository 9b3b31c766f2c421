"""The block that a run shows at its start: device, model, images, step, run, output."""

import logging
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from util.compute.batch_size import BatchPlan
from util.compute.distributed import world_size
from util.compute.precision import Precision
from util.data.loaders import StepLoader
from util.data.report import Images
from util.errors import counted
from util.kernels import cpu_linear
from util.machine import size_text, total_memory
from util.runs.log_file import LOG_FILE
from util.runs.resume import RunRecord
from util.schedule import LearningRate, odd_settings
from util.settings.optim import OptimSettings
from util.settings.run import RunSettings
from util.weights.encoder import StartingPoint

LABEL = 8  # width
WRAPPER = textwrap.TextWrapper(100, break_long_words=False, break_on_hyphens=False)
FORMATS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
# Settings that are in other lines, or that hardly anybody changes.
NOT_IN_RECIPE = ("--model", "--dataset", "--repeated_aug", "--mean", "--std", "--iba_init")

_logger = logging.getLogger(__name__)


def log_start(
    run: RunSettings,
    optim: OptimSettings,
    record: RunRecord,
    *,
    model: str,
    images: str,
    precision: Precision,
    loader: StepLoader,
    batches: BatchPlan,
    lr: LearningRate,
    memory: str | None = None,
) -> None:
    """Log the block of a run that trains, and warnings of settings that fit the data badly.

    Args:
        optim: with all defaults filled in.
        model, images: their descriptions.
        memory: amount that a step needs, if that is known.
    """
    log_block(
        {
            "device": describe_device(precision),
            "model": model,
            "images": images,
            "step": describe_step(loader, batches, memory),
            "run": describe_run(optim, loader, lr, record),
            "recipe": describe_recipe(record),
            "output": describe_output(run),
        }
    )
    num_images = loader.sampler.num_samples * loader.num_crops
    for warning in odd_settings(optim, loader, lr, num_images, in_steps=record.in_steps):
        _logger.warning("%s", warning)


def log_block(block: Mapping[str, str | Sequence[str]]) -> None:
    """Log texts, each beside its label.

    A string is wrapped; several lines stay as they are, because a path or a command that is broken
    cannot be copied.
    """
    for label, text in block.items():
        lines = WRAPPER.wrap(text) if isinstance(text, str) else text
        for number, line in enumerate(lines):
            _logger.info("%s %s", ("" if number else label).ljust(LABEL), line)


def millions(number: int) -> str:
    """Return a number of parameters, such as "5.5 M"."""
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"


def num_parameters(model: nn.Module) -> int:
    """Number of a model's weights, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


def describe_device(precision: Precision) -> str:
    """Describe what a run computes on, and in which format."""
    device = precision.device
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    elif device.type == "cpu":
        kernels = torch.backends.cpu.get_cpu_capability()
        text = f"CPU ({kernels}, {counted(torch.get_num_threads(), 'thread')}"
        text += f", large float32 layers by {cpu_linear()})"
        memory = total_memory()
        text += "" if memory is None else f", {size_text(memory)} of memory"
    else:
        text = str(device)
    if world_size() > 1:
        text += f", {world_size()} processes"
    return f"{text}; {FORMATS[precision.amp]}"


def describe_images(train_set: Images, val_set: Images | None) -> str:
    """Describe the numbers of images."""
    validation = "none" if val_set is None else f"{val_set.num_samples:,}"
    return f"{train_set.num_samples:,} for training, {validation} for validation"


def describe_encoder(start: StartingPoint, finetune: str | None, model: nn.Module) -> str:
    """Describe a model for a task, and what its encoder starts from."""
    origin = f"encoder from {finetune}" if finetune else "from random weights"
    return f"vit_{start.size}, {millions(num_parameters(model))} parameters; {origin}"


def describe_step(loader: StepLoader, batches: BatchPlan, memory: str | None = None) -> str:
    """Describe the images of a step.

    Args:
        memory: amount that a step needs, if that is known.
    """
    text = f"{counted(loader.effective_batch_size, 'image')} = {batches.batch_size}"
    text += f" x {batches.accum_iter} (--accum_iter) x {world_size()} (processes)"
    if loader.num_crops > 1:
        text += f", {loader.num_crops} crops of each image"
    return f"{text}; memory {memory}" if memory else text


def describe_run(
    optim: OptimSettings, loader: StepLoader, lr: LearningRate, record: RunRecord
) -> str:
    """Describe the length of a run and its learning rate."""
    per_epoch = loader.steps_per_epoch
    total = optim.epochs * per_epoch
    warmup = f"{optim.warmup_epochs:.3g} epoch{'s' * (optim.warmup_epochs != 1)}"
    if record.in_steps:
        length = f"{total:,} steps"
        if per_epoch < total:
            length += f", evaluated every {per_epoch:,}"
        warmup = counted(round(optim.warmup_epochs * per_epoch), "step")
    else:
        length = f"{counted(optim.epochs, 'epoch')} of {counted(per_epoch, 'step')}"
        length += f", {total:,} steps" if optim.epochs > 1 < per_epoch else ""
    return f"{length}; lr {lr.peak:.4g} {lr.origin}, warm-up {warmup}"


def describe_recipe(record: RunRecord) -> str:
    """List settings of a run by their flags, without those that are off or in other lines."""
    off = (None, False, 0, (), [])
    return ", ".join(
        name.removeprefix("--") + ("" if value is True else f" {_value_text(value)}")
        for name, value in record.fixed.items()
        if name.startswith("--") and name not in NOT_IN_RECIPE and value not in off
    )


def _value_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_value_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_output(run: RunSettings) -> list[str]:
    """Describe where a run writes, and how to see it."""
    return [f"{run.folder} (with {LOG_FILE})", tensorboard_command(run)]


def tensorboard_command(run: RunSettings) -> str:
    """Return the command that shows a run.

    It names runs by their folders below --logdir, so that is the folder above, unless that may be
    large.
    """
    above = run.folder.parent
    is_above = run.log_dir is None and not above.is_absolute() and above != Path()
    return f"tensorboard --logdir {shlex.quote(str(above if is_above else run.log_folder))}"
