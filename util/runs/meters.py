"""Mean loss and gradient norm of an epoch, accumulated without waiting for the device."""

import math

import torch
from torch import Tensor

from util.compute.distributed import all_gather
from util.errors import NonFiniteLossError


class EpochMeters:
    """Means over an epoch, accumulated on the device and read on the host only at log points.

    Args:
        skips_steps: whether steps with an infinite gradient are skipped, by fp16 loss scaling;
            else such a gradient ends the run, as does a loss that is not finite.
    """

    def __init__(self, device: torch.device, *, skips_steps: bool = False) -> None:
        # float64, so that a long epoch does not lose precision; MPS does not support it.
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.device, self.skips_steps = device, skips_steps
        self.reset()

    def reset(self) -> None:
        """Start a new epoch."""
        # Sums of loss and gradient norm, and the images in steps with a finite gradient.
        self.sums = torch.zeros(3, dtype=self.dtype, device=self.device)
        # The first steps whose loss, and whose gradient, were not finite
        self.first_bad = torch.full((2,), math.inf, dtype=self.dtype, device=self.device)
        self.num_images = 0
        self.last_sums, self.last_num_images = [0.0, 0.0, 0.0], 0

    def update(self, *, loss: Tensor, grad_norm: Tensor, num_images: int, step: int) -> None:
        """Add a step, without waiting for the device.

        Args:
            loss: this process's part, such that the mean over processes is the step's loss.
            grad_norm: of the whole step, the same on all processes.
            num_images: over all processes.
            step: number in the run, counted from 0.
        """
        is_finite = grad_norm.isfinite()
        norm = torch.where(is_finite, grad_norm, 0.0)
        self.sums += torch.stack((loss, norm, is_finite.to(loss.dtype))) * num_images
        self.num_images += num_images
        is_good = torch.stack((loss.isfinite(), is_finite | self.skips_steps))
        self.first_bad = torch.minimum(self.first_bad, torch.where(is_good, math.inf, step))

    @property
    def found_bad(self) -> Tensor:
        """1 from the first step on whose loss or gradient was not finite here, else 0, float32."""
        return self.first_bad.isfinite().any().float()

    def read(self) -> dict[str, float]:
        """Return the mean loss and gradient norm since the last read.

        Only here does the host wait for the device, and processes for each other.

        Raises:
            NonFiniteLossError: on all processes at once.
        """
        rows = all_gather(torch.cat((self.sums, self.first_bad)))
        raise_if_bad(rows[:, 3:])
        *sums, _, _ = rows.mean(dim=0).tolist()
        window = [new - old for new, old in zip(sums, self.last_sums, strict=True)]
        num_images = self.num_images - self.last_num_images
        self.last_sums, self.last_num_images = sums, self.num_images
        return mean_metrics(window, num_images)

    def means(self) -> dict[str, float]:
        """Mean loss and gradient norm of the epoch up to the last read."""
        return mean_metrics(self.last_sums, self.last_num_images)

    def state_dict(self) -> dict:
        """Plain values as of the last read."""
        return {"sums": self.last_sums, "num_images": self.last_num_images}

    def load_state_dict(self, state: dict) -> None:
        """Restore the sums of an unfinished epoch."""
        self.reset()
        self.last_sums = [float(value) for value in state["sums"]]
        self.last_num_images = int(state["num_images"])
        self.sums += torch.tensor(self.last_sums, dtype=self.dtype, device=self.device)
        self.num_images = self.last_num_images


def raise_if_bad(first_bad: Tensor) -> None:
    """Raise NonFiniteLossError if a step was bad.

    Args:
        first_bad: (processes, 2), the first steps whose loss, and whose gradient, were not finite.
    """
    (in_loss, in_gradient), processes = (x.tolist() for x in first_bad.min(dim=0))
    step, process = min(in_loss, in_gradient), processes[0]
    if step == math.inf:
        return
    if in_gradient < in_loss:  # it is the sum of all processes' gradients
        message = f"the gradient of step {int(step) + 1} of the run is not finite, but its loss is"
    else:
        where = f" on process {process}" if len(first_bad) > 1 else ""
        message = f"the loss of step {int(step) + 1} of the run is not finite{where}"
    raise NonFiniteLossError(
        message, step=int(step), process=process, in_gradient=in_gradient < in_loss
    )


def mean_metrics(sums: list[float], num_images: int) -> dict[str, float]:
    """Turn the sums of EpochMeters into means; NaN without images."""
    loss, grad_norm, num_finite = sums
    return {
        "loss": loss / num_images if num_images else math.nan,
        "grad_norm": grad_norm / num_finite if num_finite else math.nan,
    }
