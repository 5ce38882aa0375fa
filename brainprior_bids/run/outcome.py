# SPDX-License-Identifier: Apache-2.0
"""The status of a scan while it runs and where its last step was not reached."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from brainprior_bids import __version__
from brainprior_bids.bids import status
from brainprior_bids.bids.names import result_name
from brainprior_bids.bids.query import Scan
from brainprior_bids.records import (
    ErrorRecord,
    FailureRecord,
    NodeRecord,
    ScanRecord,
    ScanStatus,
    named,
    total_seconds,
)
from brainprior_bids.settings import Settings


def write_running(scan: Scan, settings: Settings) -> None:
    """What the status says of a scan from now until it ends, or for good if this is killed."""
    number = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = settings.job_id or (f"{number}_{task}" if task else number)
    result = result_name(scan.name, settings.image)
    previous = status.read_summary(settings.output_dir, result) or _summary(scan, settings)
    status.write_summary(
        settings.output_dir,
        replace(
            _summary(scan, settings),
            # the last step removes those that it does not replace
            outputs=previous.outputs,
            figures=previous.figures,
            left=previous.left,
            status=ScanStatus.RUNNING,
            job=job,
            message=f"began {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC on {platform.node()}"
            f"{f', job {job}' if job else ''}; not ended: it is at work, or was killed",
        ),
    )


def write_failure(
    scan: Scan,
    settings: Settings,
    error: ErrorRecord,
    *,
    nodes: Sequence[NodeRecord] = (),
) -> None:
    """Write the summary of a failed scan: why, and the steps that it got through.

    ``left`` are files of an earlier run that are still in place: the message says so, and the next
    run that succeeds removes those that it does not replace.
    """
    message = str(error.message)
    if message != scan.problem:  # which names the file, perhaps by a name that is not the scan's
        message = named(message, scan.name.stem)
    previous = status.read_summary(settings.output_dir, result_name(scan.name, settings.image))
    earlier = () if previous is None else previous.files
    left = sorted(path for path in {*earlier} if (settings.output_dir / path).is_file())
    if left:
        message = f"{message.rstrip('.')}. What an earlier run made of it is still in place."
    status.write_summary(
        settings.output_dir,
        replace(
            _summary(scan, settings),
            seconds=total_seconds(nodes) if nodes else None,
            message=message,
            left=tuple(left),
            warnings=tuple(text for node in nodes for text in node.warnings),
            nodes=tuple(nodes),
            error=error,
        ),
    )


def _summary(scan: Scan, settings: Settings) -> ScanRecord:
    """The summary of a scan without a result."""
    return ScanRecord(
        scan=result_name(scan.name, settings.image),
        subject=scan.subject,
        source=str(scan.relative),
        task=settings.task,
        status=ScanStatus.FAILED,
        run_uuid=settings.run_uuid,
        version=__version__,
    )


def step_records(folder: Path, steps: Collection[str], last: str | None) -> list[NodeRecord]:
    """Time and memory of the steps that a scan got through, in their order.

    Another task may have worked in the folder: what is not of this one's ``steps``, and what comes
    after ``last``, the step that failed, is its record.
    """
    from brainprior_bids.interfaces.base import RECORD
    from brainprior_bids.workflows.scan import NODES

    reached = NODES[: NODES.index(last)] if last in NODES else NODES
    paths = (folder / name / RECORD for name in reached if name in steps)
    return [NodeRecord.read(path) for path in paths if path.exists()]


def why_not_ended(
    scan: Scan, folder: Path, settings: Settings, crashed: BaseException | None
) -> ErrorRecord:
    """Why a scan did not end: what its node said, or what the graph ended with."""
    from brainprior_bids.interfaces.base import FAILURE, RECORD
    from brainprior_bids.run.cluster import LOST, REFUSED
    from brainprior_bids.run.pool import KILLED
    from brainprior_bids.workflows.scan import NODES, log_dir

    crash_files = sorted(log_dir(settings, scan.subject).glob("crash-*.txt"))
    own = [path for path in crash_files if f"{scan.name.node_name}_wf" in _read(path)]
    crash_file = str(own[-1].relative_to(settings.output_dir)) if own else None
    for path in sorted(folder.glob(f"*/{FAILURE}")):
        failure, node = FailureRecord.read(path), path.parent.name
        message = failure.message
        if not failure.expected:
            message = f"{failure.type} in {node}: {message}"
        return ErrorRecord(node=node, type=failure.type, message=message, crash_file=crash_file)
    lines = _read(own[-1]).splitlines() if own else []
    killed = [line for line in lines if line.startswith((KILLED, LOST, REFUSED))]
    if killed:
        step = re.search(r"^Node: \S+\.(\w+)$", "\n".join(lines), re.MULTILINE)
        node = step[1] if step else None
        message = f"{node}: {killed[0]}" if node else killed[0]
        return ErrorRecord(node=node, type="KilledWorker", message=message, crash_file=crash_file)
    if own:
        *_, last = (line.strip() for line in lines if line.strip())
        return ErrorRecord(type="Crash", message=last, crash_file=crash_file)
    if isinstance(crashed, KeyboardInterrupt):
        return ErrorRecord(type="Interrupted", message="interrupted; the same command goes on")
    if crashed is not None and settings.stop_on_first_crash:
        return ErrorRecord(
            type="Stopped",
            message="not finished: the run was stopped because another scan failed",
        )
    if crashed is not None:
        kind = type(crashed).__name__
        reasons = [line.strip() for line in str(crashed).splitlines() if line.strip()]
        reason = reasons[-1] if reasons else kind
        return ErrorRecord(type=kind, message=f"not finished: {reason}")
    step = next((name for name in NODES if not (folder / name / RECORD).exists()), None)
    return ErrorRecord(
        node=step,
        type="Unknown",
        message=f"not finished, stopped in {step}; run again with -vv to see why",
    )


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
