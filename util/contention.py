"""Tells a run on a CPU that its threads wait for each other beside other busy programs."""

import logging
import os
import time
from functools import cache

import torch

SECONDS = 10.0  # of steps before a judgement
TOO_SLOW = 1.5  # times as long as the processor computes

_logger = logging.getLogger(__name__)


class ContentionWatch:
    """Warns once where steps take far longer than CPU time explains.

    OpenMP's threads wait for each other by computing nothing at full speed. Alone on a machine that
    is the fastest way; beside a busy program, which takes a thread's core away for a while, the
    others burn theirs, and several threads are slower than one.

    Args:
        device: of the run; only a CPU is watched, and only with several threads.
    """

    def __init__(self, device: torch.device) -> None:
        waits_asleep = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
        self.watches = device.type == "cpu" and torch.get_num_threads() > 1 and not waits_asleep
        self.seconds = self.cpu_seconds = 0.0

    def start_step(self) -> None:
        """A step begins; its images are there."""
        self.start = time.monotonic(), time.thread_time()

    def end_step(self) -> None:
        """The step ends; whatever comes now may wait for a disk or for other processes."""
        self.seconds += time.monotonic() - self.start[0]
        self.cpu_seconds += time.thread_time() - self.start[1]
        if not self.watches or self.seconds < SECONDS:
            return
        if self.seconds > TOO_SLOW * self.cpu_seconds:
            self.watches = False
            _logger.warning(
                "steps take %.1f times as long as this process computes: other programs share its "
                "cores, and its %d threads wait for each other. OMP_NUM_THREADS=1 or "
                "OMP_WAIT_POLICY=PASSIVE before the command may be several times faster "
                "(docs/faq.md)",
                *(self.seconds / self.cpu_seconds, torch.get_num_threads()),
            )
        self.seconds = self.cpu_seconds = 0.0


@cache
def contention_watch(device: torch.device) -> ContentionWatch:
    """The watch of this process, from one epoch to the next."""
    return ContentionWatch(device)
