# SPDX-License-Identifier: Apache-2.0
"""``brainprior status OUT``: scans done, failed, running and waiting, and the remaining time."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from brainprior_bids.bids.status import read_progress, read_summaries
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.records import RunProgressRecord, ScanRecord, Stage

STARTED = re.compile(r"(\d{8}-\d{6})_")
"""The beginning of a run's identifier: its start time, UTC."""
LEAST_SHARE = 0.05
"""Share of the work from which the remaining time is estimated. Below, mostly the first step was
run, for many scans in advance: its share of 0.02 gave 51 minutes where 11 were left."""
SILENT = timedelta(minutes=3)
"""Longest time without a sign of life of a run that is going, which has one every 10 s; clocks of
two machines may differ."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``brainprior status``."""
    parser = argparse.ArgumentParser(
        prog="brainprior status",
        description="List the scans of an output folder: done, failed, running, waiting, and the "
        "remaining time of a run. It can be used while the run is going.",
    )
    parser.add_argument("output_dir", type=Path, help="output folder of a run")
    return parser


def status(argv: Sequence[str]) -> int:
    """Print one row per scan, the counts, and the remaining time of the newest run."""
    options = build_parser().parse_args(list(argv))
    summaries = read_summaries(options.output_dir)
    if not summaries:
        raise UsageError(
            f"{options.output_dir} has no status: expected the output folder of a run "
            "(logs/scans/*.json)."
        )
    longest = max(len(summary.scan) for summary in summaries)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for summary in summaries:
        time = "" if summary.seconds is None else f"{summary.seconds / 60:.1f} min"
        text = "" if summary.finished and not summary.warnings else summary.message
        row = f"{summary.scan:<{longest}}  {summary.status or '–':<8}{time:>10}  {text}"
        print(row if width is None or len(row) <= width else row[: width - 1] + "…")
    counts = Counter(str(summary.status or "unknown") for summary in summaries)
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())) + ".")
    progress = read_progress(options.output_dir)
    print(remaining(summaries, datetime.now(UTC), progress), end="")
    return 0


def remaining(
    summaries: Sequence[ScanRecord], now: datetime, progress: Sequence[RunProgressRecord] = ()
) -> str:
    """Sentences on the remaining time of the newest run that has not ended.

    The time is that of the steps done so far, by ``progress``, continued at the same rate. Of a
    run that records no progress, it is that of the scans that have ended.

    Parameters
    ----------
    progress : sequence of RunProgressRecord
        Of the runs that are going, or were killed.
    """
    pending = [summary for summary in summaries if summary.pending and summary.run_uuid]
    going = {record.run_uuid: record for record in progress}
    runs = {*going, *(str(summary.run_uuid) for summary in pending)}
    run = max(runs, default="")
    match = STARTED.match(run)
    newest = max((summary.run_uuid or "" for summary in summaries), default="")
    if match is None or (run not in {s.run_uuid for s in pending} and run < newest):
        return ""  # what is left of a run that was killed, and that a newer one has completed
    began = datetime.strptime(match[1], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
    own = [summary for summary in summaries if summary.run_uuid == run]
    return _sentences(own, now - began, going.get(run)) + _sign_of_life(going.get(run), now)


def _sentences(own: Sequence[ScanRecord], ago: timedelta, record: RunProgressRecord | None) -> str:
    """How far a run is: its scans, the time since its start, and its progress if recorded."""
    text = f"The newest run began {_duration(ago)} ago and"
    left = sum(summary.pending for summary in own)
    share = None if record is None else record.share
    if record is not None and record.stage is Stage.END:
        return (
            f"{text} has not finished: its scans have ended, contrasts are being aligned, and "
            "tables and reports written.\n"
        )
    text += f" has {left} scan(s) to do"
    if share is not None and LEAST_SHARE <= share < 1:
        rest, rate = ago * (1 - share) / share, "by the steps done so far"
    elif left < len(own):
        rest, rate = ago * left / (len(own) - left), "at the present rate"
    else:
        return f"{text}; none has ended yet.\n"
    return f"{text}: about {_duration(rest)} left {rate}, if it is still running.\n"


def _sign_of_life(record: RunProgressRecord | None, now: datetime) -> str:
    """A warning if a run's progress has not been recorded for long."""
    if record is None:
        return ""
    silent = now - datetime.fromisoformat(record.updated)
    if silent < SILENT:
        return ""
    return (
        f"It has shown no sign of life for {_duration(silent)}: it was probably killed. Rerun the "
        "same command to resume.\n"
    )


def _duration(time: timedelta) -> str:
    minutes = time.total_seconds() / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
