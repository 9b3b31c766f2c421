"""Checkpoints of a small layer and its training state."""

import torch

from util.compute.precision import Precision
from util.data.broken_images import BrokenImages
from util.optim import build_adamw
from util.runs.checkpoint import (
    CheckpointWriter,
    TrainState,
)

CPU = torch.device("cpu")


def make_state(amp="fp32"):
    model = torch.nn.Linear(6, 4)
    return TrainState(
        model=model,
        optimizer=build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95)),
        precision=Precision(amp, CPU),
        broken=BrokenImages(100, 0.5),
    )


def train(state, num_steps=1):
    """Change everything in a state."""
    for _ in range(num_steps):
        state.precision.backward(state.model(torch.randn(3, 6)).square().mean())
        norm = state.precision.step(state.optimizer, state.model)
        state.optimizer.zero_grad()
        step = state.progress.step
        state.meters.update(loss=norm.detach(), grad_norm=norm, num_images=3, step=step)
        state.progress.step += 1
        state.progress.step_in_epoch += 1
    state.meters.read()
    state.broken.add([("a.png", "empty")])


def writer(folder, state, **options):
    return CheckpointWriter(
        folder, state, {}, **{"kind": "pretrain", "every_minutes": None, "keep_last": 0} | options
    )


def save_at(folder, *places, state=None, **options):
    """Save checkpoints after the given epochs and steps; return their paths."""
    state = state or make_state()
    paths = []
    for epoch, step in places:
        state.progress.epoch, state.progress.step_in_epoch = epoch, step
        paths.append(writer(folder, state, **options).save())
    return paths


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def names(folder):
    return sorted(path.name for path in folder.iterdir())
