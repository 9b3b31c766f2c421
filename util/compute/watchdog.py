"""Ends a run of several processes when one of them is gone or stuck, and says which and where.

Each process tells the others every second, from a thread, where it is. So a run also ends where the
main threads of all wait for each other, which no exception in them would do.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from util.compute.distributed import broadcast_object, rank, world_size
from util.compute.signals import stop_signal

PERIOD = 1.0  # seconds between two heartbeats
GONE = 5.0  # seconds without one, where the connection to a process has broken
SILENT = 60.0  # seconds without one, where nothing has broken
ACTIVITIES = ("saving", "waiting for images", "computing")  # in the order in which others overtake
NOT_THERE = "is gone, or stands still, since"
ADVICE = "start the same command again, which continues from the last checkpoint"


@dataclass
class Place:
    """Where the main thread of this process is."""

    step: int = 0
    activity: str = "computing"
    since: float = field(default_factory=time.monotonic)

    def move(self, **change: int | str) -> None:
        """Be somewhere else from now on."""
        vars(self).update(change, since=time.monotonic())


_place = Place()  # a process has only one main thread, so one will do
_watchdog: "Watchdog | None" = None


def enter_step(step: int) -> None:
    """Note that this step of the run, counted from 0, begins."""
    _place.move(step=step)


@contextmanager
def activity(what: str) -> Iterator[None]:
    """Note what the main thread does inside, one of ACTIVITIES."""
    before = _place.activity
    _place.move(activity=what)
    try:
        yield
    finally:
        _place.move(activity=before)


class Watchdog:
    """Watches the other processes of a run, and the main thread of this one.

    Args:
        timeout: seconds after which a main thread that does not move is stuck.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.rank, self.heartbeats = timeout, rank(), 0
        self.store_is_gone = False
        # A connection of its own, because the main thread's may be blocked in a call; to torchrun's
        # store where there is one, which outlives process 0.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=SILENT))
        # A name for this start, because torchrun keeps a store over restarts.
        self.store = dist.PrefixStore(broadcast_object(f"{os.getpid()}-{time.time_ns()}"), store)
        self.names = [f"process {number}" for number in range(world_size())]
        self.send_heartbeat()
        dist.barrier()  # now all of them have told something
        self.last_heartbeats = self.store.multi_get(self.names)
        self.heard = [time.monotonic()] * world_size()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def send_heartbeat(self) -> None:
        """Send a heartbeat, with the place of the main thread."""
        self.heartbeats += 1
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "heartbeats": self.heartbeats}
        self.store.set(f"process {self.rank}", json.dumps({**asdict(_place), **owner}))

    def read_heartbeats(self) -> None:
        """Take in the others' heartbeats."""
        heartbeats = self.store.multi_get(self.names)
        for number, (old, new) in enumerate(zip(self.last_heartbeats, heartbeats, strict=True)):
            if old != new:
                self.heard[number] = time.monotonic()
        self.last_heartbeats = heartbeats

    def silent_ranks(self, seconds: float) -> list[int]:
        """The other processes that have sent no heartbeat for so long."""
        if self.store_is_gone:
            return [0]
        ages = [time.monotonic() - heard for heard in self.heard]
        return [n for n, age in enumerate(ages) if age > seconds and n != self.rank]

    def slowest_ranks(self) -> list[int]:
        """The processes that the others wait for, as far as can be told."""
        beats = [json.loads(heartbeat) for heartbeat in self.last_heartbeats]
        places = [(beat["step"], ACTIVITIES.index(beat["activity"])) for beat in beats]
        return [n for n, place in enumerate(places) if place == min(places)]

    def describe(self, numbers: list[int], what: str) -> str:
        """What has become of processes, where the others wait for them, and what to do."""
        beat = json.loads(self.last_heartbeats[numbers[0]])
        names = ", ".join(self.names[n] for n in numbers)
        return (
            f"{names} (pid {beat['pid']} on {beat['host']}) {what} step {_place.step + 1} of "
            f"the run: {ADVICE}"
        )

    def _watch(self) -> None:
        while not self.stopped.wait(PERIOD):
            try:
                self.send_heartbeat()
                self.read_heartbeats()
            except dist.DistError:  # with process 0
                self.store_is_gone = True
            idle = time.monotonic() - _place.since
            # torchrun sends SIGTERM when a process has died, and SIGKILL half a minute later.
            patience = min(SILENT if stop_signal() is None else GONE, self.timeout)
            if idle > patience and self.silent_ranks(patience):
                self._end(self.describe(self.silent_ranks(patience), NOT_THERE))
            elif idle > self.timeout:
                what = json.loads(self.last_heartbeats[self.slowest_ranks()[0]])["activity"]
                self._end(
                    self.describe(self.slowest_ranks(), f"has been {what} for {idle:.0f} s in")
                )

    def _end(self, message: str) -> None:
        if claim_report():
            sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")
            sys.stderr.flush()
        else:  # torchrun ends all as soon as one has ended: let the other speak
            time.sleep(PERIOD)
        os._exit(1)  # the main thread cannot be reached


def start_watchdog(minutes: float) -> None:
    """Watch from now on, where there are several processes; see Watchdog."""
    global _watchdog
    stop_watchdog()
    if world_size() > 1:
        _place.move()
        _watchdog = Watchdog(60 * minutes)


def stop_watchdog() -> None:
    """Watch no longer."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stopped.set()
        # Python aborts when it ends while a thread is in a call of the store.
        _watchdog.thread.join(SILENT)
        _watchdog = None


def claim_report() -> bool:
    """Whether no process has told yet why the run ends; from now on one has."""
    if _watchdog is None:
        return True
    try:
        return _watchdog.store.add("told", 1) == 1
    except dist.DistError:
        return True


def lost_process(error: Exception) -> str | None:
    """Which process is gone, where that made a connection fail; None for any other error."""
    broken = isinstance(error, RuntimeError) and "gloo" in str(error)
    if _watchdog is None or not (broken or isinstance(error, dist.DistError)):
        return None
    deadline = time.monotonic() + 2 * GONE
    while time.monotonic() < deadline:
        gone = _watchdog.silent_ranks(GONE)
        if gone:
            return _watchdog.describe(gone, NOT_THERE)
        time.sleep(PERIOD / 2)
    return None
