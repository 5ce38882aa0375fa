# SPDX-License-Identifier: Apache-2.0
"""One summary file per scan, and the table that is rebuilt from all of them.

``logs/scans/<scan>.json`` is moved into place by the process that finished the scan;
``logs/status.tsv`` is derived from those files alone, so that several processes may share an
output folder (appending to one table is not atomic on NFS). A summary is a ``records.ScanRecord``.

``logs/participants/sub-XX.json`` records a participant without a scan to restore, who has a row in
the table too.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from brainprior_bids.bids.files import (
    read_json,
    readable,
    to_json,
    write_json,
    write_text_at_last,
)
from brainprior_bids.engine.errors import RecordError
from brainprior_bids.records import (
    ContrastRecord,
    ErrorRecord,
    RunProgressRecord,
    ScanRecord,
    ScanStatus,
)

KILLED_JOB = "KilledJob"
"""``ErrorRecord.type`` of a scan whose job ended before it did."""
NO_SCAN = "no scan"
"""Status of a participant without a scan."""
PROGRESS = "_progress.json"
"""End of the name of a run's progress file."""
LONGEST_CELL = 10_000
"""Longest value in the table, in characters; readers refuse more than 131,072."""
COLUMNS = ("source", "task", "status", "seconds", "message")


def summary_path(output_dir: Path, scan: str) -> Path:
    """Path of a scan's summary."""
    return output_dir / "logs" / "scans" / f"{scan}.json"


def write_summary(output_dir: Path, summary: ScanRecord) -> Path:
    """Write one scan's summary."""
    path = summary_path(output_dir, summary.scan)
    return write_text_at_last(path, to_json(summary.to_json()))


def read_summary(output_dir: Path, scan: str) -> ScanRecord | None:
    """A scan's summary; None if there is none, or if it cannot be read (with a warning)."""
    try:
        return ScanRecord.read(summary_path(output_dir, scan))
    except OSError:
        return None
    except RecordError as error:
        _warn(str(error))
        return None


def contrast_path(output_dir: Path, scan: str) -> Path:
    """Path of the record of a contrast's alignment with its session's reference."""
    return output_dir / "logs" / "contrasts" / f"{scan}.json"


def read_contrast(output_dir: Path, scan: str) -> ContrastRecord | None:
    """The record of a contrast's alignment; None if there is none, or if it cannot be read."""
    try:
        return ContrastRecord.read(contrast_path(output_dir, scan))
    except (OSError, RecordError):
        return None


@cache
def _warn(text: str) -> None:
    """Warn once for each text: the tables are rebuilt whenever a scan finishes."""
    logging.getLogger("brainprior").warning("%s", text)


def read_summaries(output_dir: Path) -> list[ScanRecord]:
    """Every readable summary, sorted by scan."""
    folder = output_dir / "logs" / "scans"
    summaries = (read_summary(output_dir, path.stem) for path in sorted(folder.glob("*.json")))
    return [summary for summary in summaries if summary is not None]


def progress_path(output_dir: Path, run_uuid: str) -> Path:
    """Path of the file that shows that a run is going."""
    return output_dir / "logs" / f"{run_uuid}{PROGRESS}"


def read_progress(output_dir: Path) -> list[RunProgressRecord]:
    """The progress of every run that is going, or was killed."""
    records = []
    for path in sorted((output_dir / "logs").glob(f"*{PROGRESS}")):
        try:
            records.append(RunProgressRecord.read(path))
        except (OSError, RecordError):  # the run ended in this moment
            continue
    return records


def write_absent(output_dir: Path, absent: Mapping[str, str], present: Iterable[str]) -> None:
    """Record participants without a scan or with an unreadable folder; remove other records.

    Parameters
    ----------
    absent : label -> message
    present : labels
        Participants who have one.
    """
    folder = output_dir / "logs" / "participants"
    for label, message in absent.items():
        row = {"source": readable(f"sub-{label}"), "status": NO_SCAN, "message": message}
        write_json(folder / f"sub-{label}.json", row)
    for label in present:
        (folder / f"sub-{label}.json").unlink(missing_ok=True)


def write_misnamed(output_dir: Path, misnamed: Mapping[str, str]) -> None:
    """Record the folders that are ignored because of their names, and remove earlier records.

    Parameters
    ----------
    misnamed : path in the data set -> message
    """
    folder = output_dir / "logs" / "participants"
    for path in folder.glob("ignored-*.json"):
        path.unlink(missing_ok=True)
    for number, (place, message) in enumerate(misnamed.items(), 1):
        row = {"source": readable(place), "status": NO_SCAN, "message": message}
        write_json(folder / f"ignored-{number}.json", row)


def forget_gone(output_dir: Path, bids_dir: Path, subjects: Iterable[str]) -> list[str]:
    """Remove the failures of files that are no longer in the data set (renamed, or removed).

    Parameters
    ----------
    subjects : labels
        Only their folders are checked, so that a part of the data set can be processed elsewhere.

    Returns
    -------
    Names of the scans. Results are kept, and so are failures with results of an earlier run.
    """
    folders = {f"sub-{subject}" for subject in subjects}
    gone = []
    for summary in read_summaries(output_dir):
        source = summary.source or ""
        if (
            summary.status is ScanStatus.FAILED
            and not summary.files
            and source.partition("/")[0] in folders
            and not os.path.lexists(bids_dir / source)
        ):
            summary_path(output_dir, summary.scan).unlink(missing_ok=True)
            gone.append(summary.scan)
    return gone


def rebuild_status(output_dir: Path) -> Path:
    """Write ``logs/status.tsv``: one row per scan, and per participant without one."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE,
                        escapechar=None, quotechar=None)  # fmt: skip
    writer.writerow(COLUMNS)
    for summary in read_summaries(output_dir):
        writer.writerow([_cell(getattr(summary, column)) for column in COLUMNS])
    for path in sorted((output_dir / "logs" / "participants").glob("*.json")):
        try:
            row = read_json(path)
        except (OSError, ValueError):  # removed meanwhile by the process that found a scan
            continue
        writer.writerow([_cell(row.get(column)) for column in COLUMNS])
    return write_text_at_last(output_dir / "logs" / "status.tsv", stream.getvalue())


def settle(output_dir: Path, job: str) -> list[str]:
    """Mark scans as failed that were being processed by a job, or array task, that has ended.

    Returns
    -------
    Their names.
    """
    killed = []
    for summary in read_summaries(output_dir):
        own = summary.job or ""
        if not summary.pending or job not in (own, own.partition("_")[0]):
            continue
        message = (
            f"{summary.scan}: job {own} ended before this scan was done: it was killed "
            "(memory, time) or cancelled. Submit it again; finished scans are not repeated."
        )
        error = ErrorRecord(type=KILLED_JOB, message=message)
        failed = replace(summary, status=ScanStatus.FAILED, message=message, error=error)
        write_summary(output_dir, failed)
        killed.append(summary.scan)
    return killed


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "n/a"
    if isinstance(value, float):
        return f"{value:.1f}"
    text = " ".join(str(value).split())  # no tab, no line break
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]} …"
