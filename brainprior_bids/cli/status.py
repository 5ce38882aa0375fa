# SPDX-License-Identifier: Apache-2.0
"""``brainprior status OUT``: scans done, failed and running, and the remaining time."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from brainprior_bids.bids.status import read_summaries
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.records import ScanRecord

STARTED = re.compile(r"(\d{8}-\d{6})_")
"""The beginning of a run's identifier: its start time, UTC."""
WIDTH = 100


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``brainprior status``."""
    parser = argparse.ArgumentParser(
        prog="brainprior status",
        description="List the scans of an output folder: done, failed, running, and the remaining "
        "time of a run. It can be used while the run is going.",
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
    for summary in summaries:
        time = "" if summary.seconds is None else f"{summary.seconds / 60:.1f} min"
        text = "" if summary.finished and not summary.warnings else summary.message
        row = f"{summary.scan:<{longest}}  {summary.status or '–':<8}{time:>10}  {text}"
        print(row if len(row) <= WIDTH else row[: WIDTH - 1] + "…")
    counts = Counter(str(summary.status or "unknown") for summary in summaries)
    print(", ".join(f"{count} {name}" for name, count in sorted(counts.items())) + ".")
    print(remaining(summaries, datetime.now(UTC)), end="")
    return 0


def remaining(summaries: Sequence[ScanRecord], now: datetime) -> str:
    """A sentence on the remaining time of the newest run with scans that have not ended.

    It assumes that scans continue to end at the same rate.
    """
    running = [summary for summary in summaries if summary.running and summary.run_uuid]
    if not running:
        return ""
    run = max(str(summary.run_uuid) for summary in running)
    match = STARTED.match(run)
    own = [summary for summary in summaries if summary.run_uuid == run]
    left = sum(summary.running for summary in own)
    if match is None:
        return ""
    began = datetime.strptime(match[1], "%Y%m%d-%H%M%S").replace(tzinfo=UTC)
    ago = now - began
    text = f"The newest run began {_duration(ago)} ago and has {left} scan(s) to do"
    if left == len(own):
        return f"{text}; none has ended yet.\n"
    rest = ago * left / (len(own) - left)
    return f"{text}: about {_duration(rest)} left at the present rate, if it is still running.\n"


def _duration(time: timedelta) -> str:
    minutes = time.total_seconds() / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
