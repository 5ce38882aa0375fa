# SPDX-License-Identifier: Apache-2.0
"""Status, quality table and participants' reports that change as scans begin and finish."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Any

from brainprior_bids.background import Background
from brainprior_bids.bids import status
from brainprior_bids.bids.names import result_name
from brainprior_bids.bids.qc import rebuild_qc
from brainprior_bids.run.documents import write_documents
from brainprior_bids.run.logs import LOG
from brainprior_bids.settings import Settings

INTERVAL_S = 10.0


class LiveResults:
    """Checks regularly whether a scan has begun or ended, and rebuilds status, tables and reports.

    It reads the summaries, so it works with every plugin, also if steps run on other machines. The
    end of a run rebuilds everything again, so an error in writing here is only logged.

    Parameters
    ----------
    jobs : sequence of Job
        The scans of this run.
    settings : Settings
    begun : function
        Returns the names of the workflows of scans that have begun.
    failing : function
        Returns the names of the workflows in which a step has failed.
    settle : function
        Writes the summary of a failed scan.
    interval_s : float
        Time between two checks.
    """

    def __init__(
        self,
        jobs: Sequence[Any],
        settings: Settings,
        *,
        begun: Callable[[], Collection[str]] = tuple,
        failing: Callable[[], Collection[str]],
        settle: Callable[[Any], None],
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._pending = list(jobs)
        self._settings, self._interval_s = settings, interval_s
        self._failing, self._settle = failing, settle
        self._begun, self._n_begun = begun, 0
        self._thread = Background(self._watch)

    def __enter__(self) -> LiveResults:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.end()

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(self._interval_s):
            try:
                self.refresh()
            except Exception as error:  # a full disk, perhaps: the run continues
                LOG.debug("the status was not updated: %s", error, exc_info=True)

    def refresh(self) -> None:
        """Check once."""
        failing, n_begun = self._failing(), len(self._begun())
        ended = []
        for job in self._pending:
            if f"{job.scan.name.node_name}_wf" in failing:
                self._settle(job)
                ended.append(job)
            elif self._has_ended(job):
                ended.append(job)
        if not ended:
            if n_begun > self._n_begun:
                status.rebuild_status(self._settings.output_dir)
                self._n_begun = n_begun
            return
        pending = [job for job in self._pending if job not in ended]
        if pending:  # else the run ends, and everything is rebuilt in a moment
            status.rebuild_status(self._settings.output_dir)
            rebuild_qc(self._settings.output_dir)
            write_documents({job.scan.subject for job in ended}, self._settings)
        self._pending, self._n_begun = pending, n_begun

    def _has_ended(self, job: Any) -> bool:
        name = result_name(job.scan.name, self._settings.image)
        summary = status.read_summary(self._settings.output_dir, name)
        return summary is not None and not summary.pending
