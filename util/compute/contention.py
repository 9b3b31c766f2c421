"""Warning for runs on a CPU whose threads are slowed down by other busy programs."""

import logging
import os
import time
from functools import cache

import torch

from util.compute.distributed import world_size

SECONDS = 10.0  # of steps in one measurement
TOO_SLOW = 1.5  # wall time over CPU time

_logger = logging.getLogger(__name__)


class ContentionWatch:
    """Warns once if steps take far longer than their CPU time explains.

    OpenMP's threads wait for each other in busy loops. On an otherwise idle machine that is
    fastest; when another program takes a thread's core away, the others burn theirs waiting, and
    several threads are slower than one.

    Only a single process with several threads on a CPU is watched: with several processes, each
    waits for the others' gradients anyway.
    """

    def __init__(self, device: torch.device) -> None:
        waits_asleep = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
        has_threads = device.type == "cpu" and torch.get_num_threads() > 1
        self.watches = has_threads and world_size() == 1 and not waits_asleep
        self.seconds = self.cpu_seconds = 0.0
        self.was_slow = False

    def start_step(self) -> None:
        """Start timing a step, after its images are loaded."""
        self.start = time.monotonic(), time.thread_time()

    def end_step(self) -> None:
        """Stop timing a step, before anything that may wait for a disk."""
        self.seconds += time.monotonic() - self.start[0]
        self.cpu_seconds += time.thread_time() - self.start[1]
        if not self.watches or self.seconds < SECONDS:
            return
        is_slow = self.seconds > TOO_SLOW * self.cpu_seconds
        if is_slow and self.was_slow:  # twice in a row, so not a compilation or a pause
            self.watches = False
            _logger.warning(
                "steps take %.1f times as long as the CPU time they use: other programs compete "
                "for the cores, and the %d threads of this process wait for each other. Try "
                "OMP_NUM_THREADS=1 or OMP_WAIT_POLICY=PASSIVE before the command (docs/faq.md)",
                *(self.seconds / self.cpu_seconds, torch.get_num_threads()),
            )
        self.was_slow = is_slow
        self.seconds = self.cpu_seconds = 0.0


@cache
def contention_watch(device: torch.device) -> ContentionWatch:
    """Return this process's watch, which is kept from one epoch to the next."""
    return ContentionWatch(device)
