# SPDX-License-Identifier: Apache-2.0
"""The progress of a run: one changing line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from brainprior_bids.background import Background
from brainprior_bids.engine.errors import RecordError
from brainprior_bids.interfaces.restore import PROGRESS
from brainprior_bids.records import ProgressRecord
from brainprior_bids.run.logs import LOG

INTERVAL_S = 1.0


class Progress:
    """Reports which step of which scan starts and ends, and the progress of the sampling.

    Nipype calls it when a node starts and ends. Sampling happens in worker processes; each
    leaves a small file in its node's folder, which a thread here reads every second.

    Parameters
    ----------
    scans : workflow name -> scan
        Scans, by the names that are shown.
    folders : workflow name -> Path
        Folder of the scan's nodes.
    work : node -> float
        Expected time of a node relative to the others, in any unit.
    left_out : sequence of str
        Nodes that a scan does not have, one entry per scan.
    on_begin : function, optional
        Called with a workflow's name, before the scan's first step after the first node of
        ``work`` starts. The first one only reads the scan, and runs for many scans in advance.
    terminal : bool, optional
        Whether a line may be overwritten; by default, whether stderr is a terminal.
    """

    def __init__(
        self,
        scans: Mapping[str, str],
        folders: Mapping[str, Path],
        work: Mapping[str, float],
        *,
        left_out: Sequence[str] = (),
        on_begin: Callable[[str], None] | None = None,
        terminal: bool | None = None,
    ) -> None:
        self._scans, self._folders, self._work = scans, folders, work
        self._running: dict[str, tuple[str, str]] = {}
        self._first, self._on_begin = next(iter(work)), on_begin
        self._begun: set[str] = set()
        self._steps = len(scans) * len(work) - len(left_out)
        self._done = 0.0
        self._ended = 0
        self._quarter: dict[str, int] = {}
        self._thread = Background(self._watch)
        self._lock = threading.Lock()
        self._total = len(scans) * sum(work.values()) - sum(work[step] for step in left_out)
        shown = sys.stderr.isatty() if terminal is None else terminal
        self._bar = tqdm(
            total=self._total,
            disable=not shown,
            smoothing=0,
            **({"ncols": 80, "nrows": 24} if _unsized() else {"dynamic_ncols": True}),
            bar_format="{percentage:3.0f} % |{bar:20}| {elapsed}, {remaining} left{postfix}",
            file=sys.stderr,
        )
        self._redirect = logging_redirect_tqdm(loggers=[LOG]) if shown else None

    def __enter__(self) -> Progress:
        if self._redirect is not None:
            self._redirect.__enter__()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.end()
        self._bar.close()
        if self._redirect is not None:
            self._redirect.__exit__(kind, error, trace)

    @property
    def running(self) -> Sequence[str]:
        """``sub-01_T1w restore`` for every step that is running."""
        with self._lock:
            return [f"{self._scans[scan]} {step}" for scan, step in self._running.values()]

    @property
    def begun(self) -> Collection[str]:
        """Names of the workflows of scans that have begun."""
        with self._lock:
            return set(self._begun)

    @property
    def share(self) -> float:
        """Share of the expected work that is done.

        A running step counts by half, the sampling by its own progress.
        """
        with self._lock:
            running, done = list(self._running.values()), self._done
        return (done + sum(self._partly(scan, step) for scan, step in running)) / self._total

    def _partly(self, scan: str, step: str) -> float:
        """The work of a running step that is done."""
        if step != "restore":
            return self._work[step] / 2
        at = _sampling(self._folders[scan] / step / PROGRESS)
        return 0.0 if at is None else self._work[step] * at.share

    def __call__(self, node: Any, event: str) -> None:
        *_, scan, step = node.fullname.split(".")
        if step not in self._work:
            return
        name = self._scans[scan]
        if event == "start" and step != self._first:
            self._begin(scan)
        with self._lock:
            if event == "start":
                self._running[node.fullname] = (scan, step)
                LOG.info("%s: %s …", name, step)
                return
            if node.fullname not in self._running:  # never started: a step before it failed
                return
            del self._running[node.fullname]
            self._ended += 1
            self._done += self._work[step]
        what = "done" if event == "end" else "FAILED"
        LOG.info("[%d/%d] %s: %s %s", self._ended, self._steps, name, step, what)

    def _begin(self, scan: str) -> None:
        with self._lock:
            if scan in self._begun:
                return
            self._begun.add(scan)
        if self._on_begin is not None:
            self._on_begin(scan)

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(INTERVAL_S):
            self.refresh()

    def refresh(self) -> None:
        """Read and show the progress of the sampling."""
        with self._lock:
            running = list(self._running.values())
            done = self._done
        shown = []
        for scan, step in running:
            text = f"{self._scans[scan]} {step}"
            at = _sampling(self._folders[scan] / step / PROGRESS) if step == "restore" else None
            if at is not None:
                text += f" sample {at.sample}/{at.samples} step {at.step}/{at.steps}"
                done += self._work[step] * at.share
                self._log_quarters(scan, text, int(4 * at.share))
            shown.append(text)
        self._bar.n = done
        self._bar.set_postfix_str("; ".join(shown[:2]) + (" …" if len(shown) > 2 else ""))

    def _log_quarters(self, scan: str, text: str, quarter: int) -> None:
        if self._bar.disable and quarter > self._quarter.get(scan, 0):
            self._quarter[scan] = quarter
            LOG.info("%s", text)


def _unsized() -> bool:
    """Whether this is a terminal of 0 columns, on which tqdm shows nothing (some remote ones)."""
    try:
        return 0 in os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):  # no terminal
        return False


def _sampling(path: Path) -> ProgressRecord | None:
    try:
        return ProgressRecord.read(path)
    except (OSError, RecordError):
        return None
