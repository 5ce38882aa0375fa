# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a program or a block of code, with all processes that it starts."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

import psutil

from brainprior_bids.background import Background


@dataclass(frozen=True)
class Usage:
    """What a program or a block of code used.

    Attributes
    ----------
    seconds, cpu_seconds : float
        Wall-clock and processor time.
    peak_memory_gb : float
        Largest resident memory in GiB; pages that processes share count once per process.
    """

    seconds: float
    cpu_seconds: float
    peak_memory_gb: float


def waited_for() -> float:
    """Processor seconds of the children that this process has waited for."""
    times = os.times()
    return times.children_user + times.children_system


class Watch:
    """Measure a process and its descendants while a block runs.

    They are looked at every ``interval_s``: a process that nobody waits for, such as a worker of a
    worker, is in no sum that the system keeps. So of each descendant up to ``interval_s`` is lost;
    but no less is counted than the system's sum of those that were waited for.

    Parameters
    ----------
    pid : int, optional
        A child process that ends in the block; default: this process.
    family : bool
        Whether descendants count.
    interval_s : float
    """

    def __init__(
        self, pid: int | None = None, *, family: bool = True, interval_s: float = 0.05
    ) -> None:
        self._process, self._family, self._interval_s = psutil.Process(pid), family, interval_s
        self._thread = Background(self._watch)
        self._seconds: dict[int, float] = {}
        self._peak = 0

    def __enter__(self) -> Watch:
        self._look()
        self._before, self._began = dict(self._seconds), time.monotonic()
        self._waited = waited_for()
        self._peak = 0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.monotonic() - self._began
        self._thread.end()
        self._look()
        spent = {pid: used - self._before.get(pid, 0.0) for pid, used in self._seconds.items()}
        own = spent.pop(os.getpid(), 0.0)
        cpu = own + max(sum(spent.values()), (waited_for() - self._waited) * self._family)
        gib = self._peak / 2**30
        self.usage = Usage(round(seconds, 2), round(cpu, 2), round(gib, 3))

    def _watch(self, stop: threading.Event) -> None:
        while True:
            self._look()
            if stop.wait(self._interval_s):
                return

    def _look(self) -> None:
        """Note the processor time of each process so far, and the largest memory of all."""
        total = 0
        try:
            family = self._process.children(recursive=True) if self._family else []
        except psutil.Error:  # it has ended
            return
        for process in (self._process, *family):
            try:
                with process.oneshot():
                    times, memory = process.cpu_times(), process.memory_info().rss
            except psutil.Error:  # it ended between the two calls
                continue
            self._seconds[process.pid] = times.user + times.system
            total += memory
        self._peak = max(self._peak, total)
