# SPDX-License-Identifier: Apache-2.0
"""``--resource-monitor``: processor and memory usage of a run, every second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from brainprior_bids.background import Background
from brainprior_bids.run.logs import LOG

COLUMNS = ("seconds", "processes", "cpu_percent", "memory_gb", "running")


class ResourceMonitor:
    """Write processors and resident memory of this process and its workers to a table.

    Parameters
    ----------
    path : Path
        The TSV file to write: seconds since the start, number of processes, processor usage in per
        cent of one processor, resident memory in GiB (shared pages count once per process),
        running steps.
    running : function
        Returns the steps that are running.
    interval_s : float
        Time between two rows.
    """

    def __init__(
        self, path: Path, running: Callable[[], Sequence[str]], *, interval_s: float = 1.0
    ) -> None:
        self._path, self._running, self._interval_s = path, running, interval_s
        self._thread = Background(self._watch)

    def __enter__(self) -> ResourceMonitor:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.end()

    def _watch(self, stop: threading.Event) -> None:
        try:
            self._write_rows(stop)
        except OSError as error:
            LOG.warning("%s ends here: %s", self._path, error)

    def _write_rows(self, stop: threading.Event) -> None:
        start = time.monotonic()
        known: dict[int, psutil.Process] = {}
        with self._path.open("w", encoding="utf-8", buffering=1) as stream:
            stream.write("\t".join(COLUMNS) + "\n")
            while True:
                known, cpu, memory = _measure(known)
                cells = (
                    f"{time.monotonic() - start:.1f}",
                    str(len(known)),
                    f"{cpu:.0f}",
                    f"{memory / 2**30:.3f}",
                    "; ".join(self._running()) or "n/a",
                )
                stream.write("\t".join(cells) + "\n")
                if stop.wait(self._interval_s):
                    return


def _measure(known: dict[int, psutil.Process]) -> tuple[dict[int, psutil.Process], float, int]:
    """Processes by id, processor usage in per cent of one processor, resident memory in bytes.

    psutil measures usage since its last call, so the process objects are kept in ``known``.
    """
    me = psutil.Process()
    alive: dict[int, psutil.Process] = {}
    cpu, memory = 0.0, 0
    for process in (me, *me.children(recursive=True)):
        process = known.get(process.pid, process)
        try:
            cpu += process.cpu_percent()
            memory += process.memory_info().rss
        except psutil.NoSuchProcess:  # it ended between the two calls
            continue
        alive[process.pid] = process
    return alive, cpu, memory
