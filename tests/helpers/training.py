"""One epoch of a tiny model, and test doubles for the collaborators of a training loop."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine_pretrain import train_one_epoch
from util.compute.precision import Precision
from util.data.batch import Batch
from util.data.broken_images import BrokenImages
from util.data.datasets import build_dataset
from util.data.loaders import build_train_loader
from util.data.transforms import pretrain_transform
from util.masking import Masking, count_tokens
from util.optim import build_adamw
from util.runs.checkpoint import TrainState

CPU = torch.device("cpu")
IMG_SIZE, NUM_PATCHES = (16, 16), 16  # nano models with patches of 4 pixels
MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.25, 0.2)
MASKING = {
    gamma: Masking((4, 4), count_tokens(NUM_PATCHES, 0.75, gamma), "random", seed=0)
    for gamma in (0.25, None)
}


class Recorder:
    """Test double for log and checkpoints that calls back at every log point."""

    def __init__(self, at_log_point=None):
        self.steps, self.stats = [], []
        self.at_log_point = at_log_point or (lambda: None)

    def start_epoch(self, epoch, step_in_epoch):
        self.started = (epoch, step_in_epoch)

    def end_micro_step(self, progress, done, total):
        pass

    def end_step(self, step, *, epoch, is_log_point):
        pass

    def log_step(self, step, *, epoch, lr, num_images, data_seconds, stats):
        self.steps.append((step, epoch, lr, num_images))
        self.stats.append(stats)

    def save_if_due(self):
        self.at_log_point()


def make_state(model, *, optimizer=None, amp="fp32", clip_grad=None, max_broken=0.0):
    return TrainState(
        model=model,
        optimizer=optimizer or build_adamw(model, weight_decay=0.05, betas=(0.9, 0.95)),
        precision=Precision(amp, CPU, clip_grad=clip_grad),
        broken=BrokenImages(100, max_broken),
    )


def make_loader(images, **options):
    transform = pretrain_transform(IMG_SIZE, MEAN, STD)
    dataset = build_dataset("folder", images, split="train", transform=transform, seed=0)
    usual = {"batch_size": 8, "accum_iter": 1, "rank": 0, "world_size": 1, "seed": 0}
    usual |= {"num_workers": 0, "pin_memory": False}
    return build_train_loader(dataset, **(usual | options))


class PreparedLoader:
    """Loader whose steps are given micro-batches."""

    num_crops = 1

    def __init__(self, steps):
        self.prepared, self.steps_per_epoch = steps, len(steps)

    def images_in_step(self, step):
        return sum(len(batch.images) for batch in self.prepared[step])

    def steps(self, epoch, first_step=0):
        return iter(self.prepared[first_step:])

    def keys_in_step(self, epoch, step):
        batches = enumerate(self.prepared[step])
        return [[(step, b, i) for i in range(batch.num_images)] for b, batch in batches]

    def read(self, keys):
        return [self.prepared[key[0][0]][key[0][1]] for key in keys]

    def name(self, key):
        return "step {}, micro-batch {}, image {}".format(*key)


def prepared(num_steps, batch_size=4, num_micro_batches=1, pixels=None, broken=()):
    labels = torch.zeros(batch_size, dtype=torch.int64)
    shape = (num_steps, num_micro_batches, batch_size, 3, *IMG_SIZE)
    pixels = torch.randn(shape) if pixels is None else pixels.expand(shape)
    return PreparedLoader([[Batch(x, labels, list(broken)) for x in step] for step in pixels])


def train(model, loader, state, *, gamma=0.25, lr=1e-3, log_every=100, recorder=None):
    """Train one epoch."""
    recorder = recorder or Recorder()
    return train_one_epoch(
        model,
        loader,
        state,
        lr_at=lr if callable(lr) else lambda step: lr,
        masking=MASKING[gamma],
        device=CPU,
        log_every=log_every,
        run_log=recorder,
        checkpoints=recorder,
    )


class HostReads(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device."""

    operators = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")
    methods = ("item", "tolist", "cpu", "numpy")

    def __init__(self, monkeypatch):
        super().__init__()
        self.found = []
        for name in self.methods:
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, getattr(torch.Tensor, name)))

    def counted(self, name, method):
        def call(tensor, *args, **kwargs):
            self.found.append(name)
            return method(tensor, *args, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in self.operators:
            self.found.append(name)
        return function(*args, **(kwargs or {}))
