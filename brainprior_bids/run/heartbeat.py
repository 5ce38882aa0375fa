# SPDX-License-Identifier: Apache-2.0
"""A sign of life of a run, for ``brainprior status``: how far it is, and that it has not ended."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Protocol

from brainprior_bids.background import Background
from brainprior_bids.bids.files import write_json
from brainprior_bids.bids.status import PROGRESS, progress_path
from brainprior_bids.records import RunProgressRecord, Stage
from brainprior_bids.run.logs import LOG
from brainprior_bids.settings import Settings

INTERVAL_S = 10.0
FORGOTTEN_S = 600.0
"""A progress file that has not changed for so long is of a run that was killed, and is removed."""


class HasShare(Protocol):
    """What ``Heartbeat`` requires of the progress of the scans."""

    @property
    def share(self) -> float:
        """Share of the expected work that is done."""
        ...


class Heartbeat:
    """Rewrites ``logs/<run>_progress.json`` regularly until the run ends, then removes it.

    Parameters
    ----------
    settings : Settings
    interval_s : float
        Time between two changes.
    """

    def __init__(self, settings: Settings, *, interval_s: float = INTERVAL_S) -> None:
        self._settings, self._interval_s = settings, interval_s
        self._path = progress_path(settings.output_dir, settings.run_uuid)
        self._stage = Stage.SCANS
        self._progress: HasShare | None = None
        self._lock, self._thread = threading.Lock(), Background(self._watch)

    def watch(self, progress: HasShare) -> None:
        """Take the share of the work from ``progress``."""
        self._progress = progress

    def enter(self, stage: Stage) -> None:
        """Record the next part of the run at once."""
        self._stage = stage
        self._beat()

    def __enter__(self) -> Heartbeat:
        self._forget_killed()
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.end()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _watch(self, stop: threading.Event) -> None:
        while not stop.wait(self._interval_s):
            self._beat()

    def _beat(self) -> None:
        with self._lock:  # else an earlier stage could be written last
            progress = self._progress
            record = RunProgressRecord(
                run_uuid=self._settings.run_uuid,
                updated=datetime.now(UTC).isoformat(timespec="seconds"),
                stage=self._stage,
                share=None if progress is None else round(progress.share, 4),
            )
            try:
                write_json(self._path, record.to_json())
            except OSError as error:  # a full disk, perhaps: the run continues
                LOG.debug("the progress was not recorded: %s", error, exc_info=True)

    def _forget_killed(self) -> None:
        for path in self._path.parent.glob(f"*{PROGRESS}"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > FORGOTTEN_S:
                    path.unlink()
