# SPDX-License-Identifier: Apache-2.0
"""One summary file a scan, and the table rebuilt from all of them.

``logs/scans/<scan>.json`` is put in place by rename, by whichever process finished the scan;
``logs/status.tsv`` is made from those files alone, so several processes may share an output
folder (appending to one table is not atomic on NFS). Fields of a summary:

``scan, subject, source, task, run_uuid, version`` (str); ``status`` (``done``, ``failed``,
``skipped``, or ``running``: at work in the scheduler's ``job``, or killed before it could say so);
``seconds`` (sum of the nodes' times); ``message``; ``fingerprint`` (of everything that decides
the result) and ``parts`` (what that is: name -> value or SHA-256); ``seed``;
``outputs`` and ``figures`` (paths from the output folder); ``left`` (of a failed scan: what an
earlier run made and is still there);
``warnings`` (list of str); ``facts`` (``conform``, ``parcellation``, ``affine``, ``restore``,
``seed``: what each node recorded); ``nodes`` (list of ``node, seconds, peak_memory_gb,
gpu_memory_gb, started, threads``); ``error`` (None, or ``node, type, message, crash_file``).
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from brainprior_bids.bids.files import read_json, write_json, write_text

COLUMNS = ("source", "task", "status", "seconds", "message")
FINISHED = ("done", "skipped")


def summary_path(output_dir: Path, scan: str) -> Path:
    """Where a scan's summary lies."""
    return output_dir / "logs" / "scans" / f"{scan}.json"


def write_summary(output_dir: Path, summary: dict[str, Any]) -> Path:
    """Put one scan's summary in place."""
    return write_json(summary_path(output_dir, summary["scan"]), summary)


def read_summary(output_dir: Path, scan: str) -> dict[str, Any] | None:
    """A scan's summary; None where there is none, or where it cannot be read."""
    try:
        return read_json(summary_path(output_dir, scan))
    except (OSError, ValueError):
        return None


def read_summaries(output_dir: Path) -> list[dict[str, Any]]:
    """Every readable summary, sorted by scan."""
    folder = output_dir / "logs" / "scans"
    found = (read_summary(output_dir, path.stem) for path in sorted(folder.glob("*.json")))
    return [summary for summary in found if summary is not None]


def rebuild_status(output_dir: Path) -> Path:
    """Write ``logs/status.tsv``: one row a scan, from the summaries."""
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_NONE,
                        escapechar=None, quotechar=None)  # fmt: skip
    writer.writerow(COLUMNS)
    for summary in read_summaries(output_dir):
        writer.writerow([_cell(summary.get(column)) for column in COLUMNS])
    return write_text(output_dir / "logs" / "status.tsv", stream.getvalue())


def settle(output_dir: Path, job: str) -> list[str]:
    """Scans that were at work in a job, or in a task of an array, that has ended: they failed.

    Returns
    -------
    Their names.
    """
    killed = []
    for summary in read_summaries(output_dir):
        own = str(summary.get("job"))
        if summary["status"] != "running" or job not in (own, own.partition("_")[0]):
            continue
        message = (
            f"{summary['scan']}: job {own} ended before this scan was done: it was killed "
            "(memory, time) or cancelled. Submit it again; what is done is not repeated."
        )
        error = {"node": None, "type": "KilledJob", "message": message, "crash_file": None}
        write_summary(
            output_dir, {**summary, "status": "failed", "message": message, "error": error}
        )
        killed.append(summary["scan"])
    return killed


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "n/a"
    if isinstance(value, float):
        return f"{value:.1f}"
    return " ".join(str(value).split())  # no tab, no line break
