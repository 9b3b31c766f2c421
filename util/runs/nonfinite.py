"""What makes a loss NaN or infinite, found in the forward passes of its step, computed again."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from util.errors import counted, first_few


class Finding(NamedTuple):
    """The first value that is not finite in the forward pass of a micro-batch."""

    where: str
    """Names it, the same in every micro-batch."""
    text: str
    is_bad: list[bool] | None
    """Whether it is due to each image; None if that cannot be told."""


class CauseSearch:
    """Looks for the first value that is not finite, module by module in the order of execution.

    Args:
        model: the model of a run, not wrapped in DDP.
        num_crops: of each image, adjacent in a micro-batch.
    """

    def __init__(self, model: nn.Module, num_crops: int) -> None:
        self.model, self.num_crops = model, num_crops
        self.findings: list[Finding | None] = []
        """Of each micro-batch so far."""
        self.sizes: list[int] = []
        """Crops in each micro-batch so far."""

    @contextmanager
    def micro_batch(self, num_images: int) -> Iterator[None]:
        """Context for the forward pass of the next micro-batch.

        Args:
            num_images: in it; each crop counts as one.
        """
        self.findings.append(None)
        self.sizes.append(num_images)
        hooks = [
            # Before the hooks of sharded modules, which give their weights back.
            module.register_forward_hook(partial(self._check, name), prepend=True, with_kwargs=True)
            for name, module in self.model.named_modules()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _check(
        self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> None:
        """Hook on a module; those within it have been checked before."""
        if self.findings[-1] is not None or all_finite(output):
            return
        inputs = (args, kwargs)
        if all_finite(inputs):
            self._found(name, describe_module(name, module, inputs), output)
        elif module is self.model:
            self._found("input", "NaN or infinity is in the model's input", inputs)

    def check_loss(self, loss: Tensor) -> None:
        """Check the loss of the current micro-batch."""
        if self.findings[-1] is None and not all_finite(loss):
            self._found(
                "loss", "all modules return finite values, and only their loss is not", loss
            )

    def _found(self, where: str, text: str, values: object) -> None:
        self.findings[-1] = Finding(where, text, bad_rows(values, self.sizes[-1]))

    @property
    def first(self) -> Finding | None:
        """The cause; None if everything was finite."""
        return next((found for found in self.findings if found is not None), None)

    @property
    def num_images(self) -> int:
        """Images in all micro-batches so far."""
        return sum(self.sizes) // self.num_crops

    @property
    def blames_images(self) -> bool:
        """Whether the cause concerns some images and not the others."""
        return bool(self.first and self.first.is_bad) and len(self.images()) < self.num_images

    def images(self) -> list[tuple[int, int]]:
        """Return (micro-batch, image in it) of the images that the cause concerns."""
        images = {}  # in order
        for number, (found, size) in enumerate(zip(self.findings, self.sizes, strict=True)):
            if found is not None and found.where == self.first.where:
                is_bad = found.is_bad or [True] * size
                images |= {(number, i // self.num_crops): None for i in range(size) if is_bad[i]}
        return list(images)

    def describe(self, name_of: Callable[[int, int], str] | None) -> str:
        """Return the cause and the images that it concerns as a clause.

        Args:
            name_of: (micro-batch, image in it) -> file name; None if names are not known.
        """
        if self.first is None:
            return "computed once more, everything is finite"
        images, total = self.images(), self.num_images
        if not self.first.is_bad:
            number = f"one or more of {len(images)} images" if len(images) > 1 else "one image"
        elif len(images) == total > 1:
            return f"{self.first.text}, for all {total} images"
        else:
            number = f"{len(images)} of {counted(total, 'image')}"
        names = [] if name_of is None else [name_of(*place) for place in images[:4]]
        return f"{self.first.text}, for {number}" + (f" ({first_few(names)})" if names else "")


def describe_module(name: str, module: nn.Module, inputs: object) -> str:
    """Describe a module that returns values that are not finite though its inputs are.

    Args:
        name: in the model, "" for the model itself.
    """
    weights = dict(module.named_parameters(name))
    bad = next((own for own, weight in weights.items() if not all_finite(weight)), None)
    if bad is not None:
        return f"the weight {bad} is not finite"
    sizes = {"inputs": largest(inputs), "weights": largest(weights)}
    known = [f"{what} of up to {size:.3g}" for what, size in sizes.items() if size is not None]
    origin = f" from {' and '.join(known)}" if known else ""
    return f"the first module to return NaN or infinity is {name or type(module).__name__}{origin}"


def floats(content: object) -> Iterator[Tensor]:
    """Yield the floating-point tensors in nested containers; of a sharded one, the own shard."""
    if isinstance(content, DTensor):
        yield from floats(content.to_local())
    elif isinstance(content, Tensor):
        if content.is_floating_point():
            yield content.detach()
    elif isinstance(content, dict):
        yield from floats(list(content.values()))
    elif isinstance(content, list | tuple):
        for value in content:
            yield from floats(value)
    elif dataclasses.is_dataclass(content):
        yield from floats(list(vars(content).values()))


def all_finite(content: object) -> bool:
    """Whether all numbers in nested containers of tensors are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in floats(content))


def largest(content: object) -> float | None:
    """Return the largest absolute value in nested containers of tensors; None without one."""
    sizes = [tensor.abs().max().item() for tensor in floats(content) if tensor.numel()]
    return max(sizes, default=None)


def bad_rows(content: object, num_rows: int) -> list[bool] | None:
    """Return which rows of tensors are not finite; None if no tensor with that many has any."""
    is_bad = [
        ~tensor.isfinite().flatten(1).all(dim=1).cpu()
        for tensor in floats(content)
        if tensor.ndim > 1 and len(tensor) == num_rows
    ]
    found = torch.stack(is_bad).any(dim=0).tolist() if is_bad else []
    return found if any(found) else None
