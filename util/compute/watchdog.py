"""Watchdog that ends a run of several processes if one has died or hangs, and reports which.

A thread of each process sends the others a heartbeat with its position every second. So a run also
ends if all main threads wait for each other, where none of them would raise an exception.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from util.compute.distributed import broadcast_object, meeting_store, rank, world_size
from util.compute.launchers import dead_launcher
from util.compute.signals import stop_signal

PERIOD = 1.0  # seconds between two heartbeats
GONE = 5.0  # seconds without a heartbeat before a process is lost, if a connection has broken
SILENT = 60.0  # the same if all connections work
LEAVING = 2.0  # seconds that process 0 waits for the others at the end
ACTIVITIES = ("saving", "waiting for images", "computing")  # slowest first, within a step
LOST = "died or stopped responding at"
ADVICE = "start the same command again to continue from the last checkpoint"


@dataclass
class Position:
    """Step and activity of this process's main thread."""

    step: int = 0
    activity: str = "computing"
    since: float = field(default_factory=time.monotonic)

    def move(self, **change: int | str) -> None:
        """Change the step or the activity."""
        vars(self).update(change, since=time.monotonic())


_position = Position()  # one is enough: a process has only one main thread
_watchdog: "Watchdog | None" = None


def enter_step(step: int) -> None:
    """Record that this step of the run, counted from 0, begins."""
    _position.move(step=step)


@contextmanager
def activity(what: str) -> Iterator[None]:
    """Context in which the main thread's activity is `what`, one of ACTIVITIES."""
    before = _position.activity
    _position.move(activity=what)
    try:
        yield
    finally:
        _position.move(activity=before)


class Watchdog:
    """Watches the other processes of a run, and the main thread of this one.

    Args:
        timeout: seconds after which a main thread that makes no progress is stuck.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self.rank, self.heartbeats = timeout, rank(), 0
        self.store_is_lost = False
        # A separate connection, because the main thread's may be blocked in a call; to torchrun's
        # store if there is one, which outlives process 0.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=SILENT))
        # A prefix unique to this start, because torchrun's store survives restarts.
        self.store = dist.PrefixStore(broadcast_object(f"{os.getpid()}-{time.time_ns()}"), store)
        self.names = [f"process {number}" for number in range(world_size())]
        self.send_heartbeat()
        dist.barrier()  # every process has sent a heartbeat
        self.last_heartbeats = self.store.multi_get(self.names)
        self.start_clocks()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def send_heartbeat(self) -> None:
        """Send a heartbeat with the position of the main thread."""
        self.heartbeats += 1
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "heartbeats": self.heartbeats}
        self.store.set(f"process {self.rank}", json.dumps({**asdict(_position), **owner}))

    def read_heartbeats(self) -> None:
        """Read the heartbeats and note when each process's last changed."""
        heartbeats = self.store.multi_get(self.names)
        for number, (old, new) in enumerate(zip(self.last_heartbeats, heartbeats, strict=True)):
            if old != new:
                self.heard[number] = time.monotonic()
        self.last_heartbeats = heartbeats

    def silent_ranks(self, seconds: float) -> list[int]:
        """Ranks of the other processes that have sent no heartbeat for this many seconds."""
        ages = [time.monotonic() - heard for heard in self.heard]
        if self.store_is_lost:  # which is all that is known
            return [0] if ages[0] > seconds and dead_launcher() is None else []
        return [n for n, age in enumerate(ages) if age > seconds and n != self.rank]

    def slowest_ranks(self) -> list[int]:
        """Ranks of the processes that the others are probably waiting for."""
        beats = [json.loads(heartbeat) for heartbeat in self.last_heartbeats]
        positions = [(beat["step"], ACTIVITIES.index(beat["activity"])) for beat in beats]
        return [n for n, position in enumerate(positions) if position == min(positions)]

    def stuck(self, seconds: float) -> str:
        """Message that some main thread has made no progress for this many seconds."""
        if self.store_is_lost and (launcher := dead_launcher()):
            # Nothing is known of the others.
            what = f"{_position.activity} for {seconds:.0f} s after the death of {launcher}, in"
            return self.describe([self.rank], f"has been {what}")
        slowest = self.slowest_ranks()
        what = json.loads(self.last_heartbeats[slowest[0]])["activity"]
        have = "has" if len(slowest) == 1 else "have"
        return self.describe(slowest, f"{have} been {what} for {seconds:.0f} s in")

    def describe(self, numbers: list[int], what: str) -> str:
        """Message that says what happened to processes, at which step, and what to do."""
        beats = {n: json.loads(self.last_heartbeats[n]) for n in numbers}
        names = [f"{self.names[n]} (pid {b['pid']} on {b['host']})" for n, b in beats.items()]
        return f"{', '.join(names)} {what} step {_position.step + 1} of the run: {ADVICE}"

    def start_clocks(self) -> None:
        """Count silent and idle seconds from 0."""
        _position.move()
        self.heard = [time.monotonic()] * world_size()

    def leave(self) -> None:
        """Leave the store; process 0, which may host it, waits a little for the others."""
        self.store.add("left", 1)
        end = time.monotonic() + LEAVING
        while self.rank == 0 and time.monotonic() < end:
            if self.store.add("left", 0) == len(self.names):
                return
            time.sleep(0.05)

    def _watch(self) -> None:
        while not self._wait():
            try:
                if not self.store_is_lost:  # PyTorch prints a page at each attempt
                    self.send_heartbeat()
                    self.read_heartbeats()
            except dist.DistError:  # the store died with process 0, or with torchrun
                self.store_is_lost = True
            idle = time.monotonic() - _position.since
            # torchrun sends SIGTERM when a process has died, and SIGKILL half a minute later.
            is_urgent = stop_signal() is not None and dead_launcher() is None
            patience = min(GONE if is_urgent else SILENT, self.timeout)
            if idle > patience and self.silent_ranks(patience):
                self._end(self.describe(self.silent_ranks(patience), LOST))
            elif idle > self.timeout:
                self._end(self.stuck(idle))

    def _wait(self) -> bool:
        """Wait for the next heartbeat; return whether the watchdog has been stopped meanwhile."""
        before = time.monotonic()
        stopped = self.stopped.wait(PERIOD)
        if time.monotonic() - before > 2 * PERIOD:
            # This process was suspended, and on a cluster the others with it. Whichever wakes up
            # first would take them for lost, which have been silent for just as long.
            self.start_clocks()
        return stopped

    def _end(self, message: str) -> None:
        if claim_report():
            sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")
            sys.stderr.flush()
        else:  # torchrun ends all processes as soon as one exits: let the other report first
            time.sleep(PERIOD)
        os._exit(1)  # the main thread cannot be reached


def start_watchdog(minutes: float) -> None:
    """Start the watchdog if there are several processes."""
    global _watchdog
    stop_watchdog()
    if world_size() > 1:
        _watchdog = Watchdog(60 * minutes)


def stop_watchdog() -> None:
    """Stop the watchdog, if it runs."""
    global _watchdog
    if _watchdog is not None:
        _watchdog.stopped.set()
        # Python aborts if it exits while a thread is inside a call to the store.
        _watchdog.thread.join(SILENT)
        with suppress(dist.DistError):
            if not _watchdog.store_is_lost:
                _watchdog.leave()
        _watchdog = None


def _report_store() -> dist.Store | None:
    """Where processes register before they report why the run ends; None if this one is alone."""
    return meeting_store() if _watchdog is None else _watchdog.store


def claim_report() -> bool:
    """Claim the right to report why the run ends; False if another process already has it."""
    store = _report_store()
    if store is None:
        return True
    with suppress(dist.DistError):
        if _watchdog is None or not _watchdog.store_is_lost:
            return store.add("reported", 1) == 1
    # torchrun's death stops all processes, and the first says so.
    return dead_launcher() is None or rank() == 0


def await_report(seconds: float) -> None:
    """Wait until another process has reported why the run ends, for at most this long."""
    store, end = _report_store(), time.monotonic() + seconds
    with suppress(dist.DistError):
        while time.monotonic() < end and not (store and store.add("reported", 0)):
            time.sleep(0.1)


def lost_process(error: Exception) -> str | None:
    """Message about the lost process that made a connection fail; None for any other error."""
    broken = isinstance(error, RuntimeError) and "gloo" in str(error)
    if not (broken or isinstance(error, dist.DistError)):
        return None
    if launcher := dead_launcher():
        return f"{launcher} has died: {ADVICE}"
    if _watchdog is None:
        return None
    deadline = time.monotonic() + 2 * GONE
    while time.monotonic() < deadline:
        gone = _watchdog.silent_ranks(GONE)
        if gone:
            return _watchdog.describe(gone, LOST)
        time.sleep(PERIOD / 2)
    return None
