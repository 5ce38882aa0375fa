# SPDX-License-Identifier: Apache-2.0
"""The reasons of failed steps; the plugin keeps them in memory, because a disk may be full."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brainprior_bids.records import FailureRecord
from brainprior_bids.run.interrupt import check
from brainprior_bids.run.logs import LOG

KILLED_WORKER = "KilledWorker"
"""``type`` of a step whose process or job ended without a message."""


@dataclass(frozen=True)
class Failure:
    """A failed step, and Nipype's crash file if it could be written."""

    record: FailureRecord
    crash_file: Path | None


def killed(text: str) -> dict[str, Any]:
    """Nipype's result of a step whose process or job was killed, lost or refused."""
    record = FailureRecord.of(None, type=KILLED_WORKER, message=text)
    return {"result": None, "traceback": [text], "failure": record}


class RecordsFailures:
    """Mix-in for one of Nipype's plugins: ``failures`` has every failed step, by its full name.

    A crash file that cannot be written does not end the run.
    """

    def __init__(self, plugin_args: Mapping[str, Any]) -> None:
        super().__init__(plugin_args=plugin_args)  # type: ignore[call-arg]
        self.failures: dict[str, Failure] = {}

    def _send_procs_to_workers(self, updatehash: bool = False, graph: Any = None) -> None:
        """Called by Nipype in a loop, so a pending interrupt is raised without long delay."""
        check()
        super()._send_procs_to_workers(updatehash=updatehash, graph=graph)  # type: ignore[misc]

    def _report_crash(self, node: Any, result: dict[str, Any] | None = None) -> str:
        record = (result or {}).get("failure") or _of_traceback(result)
        try:
            path = str(super()._report_crash(node, result=result))  # type: ignore[misc]
        except OSError as error:
            LOG.warning("%s: its crash file could not be written: %s", node.fullname, error)
            path = ""
        self.failures[node.fullname] = Failure(record, Path(path) if path else None)
        return path


def _of_traceback(result: dict[str, Any] | None) -> FailureRecord:
    """A failure from an error in this process, or from the record that a job wrote."""
    if (error := sys.exc_info()[1]) is not None:
        return FailureRecord.of(error)
    lines = [line.strip() for line in "".join((result or {})["traceback"]).splitlines()]
    kind, _, message = next(line for line in reversed(lines) if line).partition(": ")
    return FailureRecord.of(None, type=kind.rpartition(".")[2], message=message or kind)
