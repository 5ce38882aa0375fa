# SPDX-License-Identifier: Apache-2.0
"""The status of a scan while it waits or is running, and after a failure."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from brainprior_bids import __version__
from brainprior_bids.bids import status
from brainprior_bids.bids.names import result_name
from brainprior_bids.bids.query import Scan
from brainprior_bids.engine.errors import is_full
from brainprior_bids.records import (
    FULL_DISK,
    ErrorRecord,
    FailureRecord,
    NodeRecord,
    ScanRecord,
    ScanStatus,
    named,
    total_seconds,
)
from brainprior_bids.run.failures import KILLED_WORKER, Failure
from brainprior_bids.settings import Settings

LITTLE_BYTES, LITTLE_FILES = 16 * 2**20, 16
"""With less free space, a disk counts as full. (The image that did not fit has been removed.)"""


def write_waiting(scan: Scan, settings: Settings) -> None:
    """Set the status to waiting; it remains so if this process is killed before it begins."""
    _write_pending(scan, settings, ScanStatus.WAITING)


def write_running(scan: Scan, settings: Settings) -> None:
    """Set the status to running, until the scan ends; it remains so if this process is killed."""
    _write_pending(scan, settings, ScanStatus.RUNNING)


def _write_pending(scan: Scan, settings: Settings, state: ScanStatus) -> None:
    number = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ.get("SLURM_JOB_ID"))
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    job = settings.job_id or (f"{number}_{task}" if task else number)
    result = result_name(scan.name, settings.image)
    previous = status.read_summary(settings.output_dir, result) or _summary(scan, settings)
    status.write_summary(
        settings.output_dir,
        replace(
            _summary(scan, settings),
            # the last step removes the files that it does not replace
            outputs=previous.outputs,
            figures=previous.figures,
            left=previous.left,
            status=state,
            job=job,
            message=f"since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC on {platform.node()}"
            f"{f', job {job}' if job else ''}, or was killed",
        ),
    )


def write_failure(
    scan: Scan,
    settings: Settings,
    error: ErrorRecord,
    *,
    nodes: Sequence[NodeRecord] = (),
) -> None:
    """Write the summary of a failed scan: the reason, and the completed steps.

    ``left`` are files of an earlier run that are still in place: the message says so, and the next
    run that succeeds removes those that it does not replace.
    """
    message = str(error.message)
    if message != scan.problem:  # which names the file, perhaps not by the scan's name
        message = named(message, scan.name.stem)
    previous = status.read_summary(settings.output_dir, result_name(scan.name, settings.image))
    earlier = () if previous is None else previous.files
    left = sorted(path for path in {*earlier} if (settings.output_dir / path).is_file())
    if left:
        message = f"{message.rstrip('.')}. The files of an earlier run are still in place."
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
    """Time and memory of the completed steps of a scan, in their order.

    Another task may have worked in the folder: records of other steps than ``steps``, or of steps
    after ``last``, the step that failed, belong to that task.
    """
    from brainprior_bids.interfaces.base import RECORD
    from brainprior_bids.workflows.scan import NODES

    reached = NODES[: NODES.index(last)] if last in NODES else NODES
    paths = (folder / name / RECORD for name in reached if name in steps)
    return [NodeRecord.read(path) for path in paths if path.exists()]


def why_not_ended(
    scan: Scan,
    folder: Path,
    settings: Settings,
    crashed: BaseException | None,
    failures: Mapping[str, Failure],
) -> ErrorRecord:
    """Why a scan did not finish: the error of its step, or that of the graph.

    Parameters
    ----------
    folder : Path
        Folder of the scan's steps.
    crashed : exception, optional
        Error with which the graph ended.
    failures : step's full name -> Failure
        As kept by the plugin; for a job on another machine, the step's own file has more detail.
    """
    from brainprior_bids.interfaces.base import FAILURE, RECORD
    from brainprior_bids.workflows.scan import NODES

    for name, failure in failures.items():
        *_, workflow, step = name.split(".")
        if workflow == folder.name:
            own = folder / step / FAILURE
            record = FailureRecord.read(own) if own.exists() else failure.record
            return _error(record, step, settings, failure.crash_file)
    for path in sorted(folder.glob(f"*/{FAILURE}")):
        return _error(FailureRecord.read(path), path.parent.name, settings, None)
    if isinstance(crashed, KeyboardInterrupt):
        return ErrorRecord(
            type="Interrupted", message="interrupted; rerun the same command to resume"
        )
    if is_full(crashed):
        return ErrorRecord(type=FULL_DISK, message=no_room(settings))
    if crashed is not None and settings.stop_on_first_crash:
        return ErrorRecord(
            type="Stopped",
            message="not finished: the run was stopped because another scan failed. Rerun the "
            "same command without --stop-on-first-crash",
        )
    if crashed is not None:
        kind = type(crashed).__name__
        reasons = [line.strip() for line in str(crashed).splitlines() if line.strip()]
        reason = reasons[-1] if reasons else kind
        return ErrorRecord(
            type=kind,
            message=f"not finished: {reason}. Rerun the same command; if this happens again, "
            "please report this, with the output of -vv",
        )
    step = next((name for name in NODES if not (folder / name / RECORD).exists()), None)
    return ErrorRecord(
        node=step,
        type="Unknown",
        message=f"not finished, stopped in {step}; run again with -vv to see why",
    )


def _error(
    failure: FailureRecord, step: str, settings: Settings, crash_file: Path | None
) -> ErrorRecord:
    """The reason of a failed step, as a sentence."""
    crash = None
    if crash_file is not None:
        out = settings.output_dir
        crash = str(crash_file.relative_to(out) if crash_file.is_relative_to(out) else crash_file)
    if failure.type == FULL_DISK:
        message = f"{step}: {no_room(settings)}"
    elif failure.type == KILLED_WORKER:
        message = f"{step}: {failure.message}"
    elif failure.expected:
        message = failure.message
    else:
        message = (
            f"{step}: unexpected error: {failure.message} ({failure.type}). Please "
            f"report it{f', with {crash}' if crash else ''}"
        )
    return ErrorRecord(node=step, type=failure.type, message=message, crash_file=crash)


def no_room(settings: Settings) -> str:
    """The message about a full disk; it names the folder on that disk if this is known."""
    folders = {"--work-dir": settings.work_dir, "output_dir": settings.output_dir}
    folders |= {f"--export {kind}": Path(root) for kind, root in settings.exports.items()}
    folders["TMPDIR"] = Path(tempfile.gettempdir())
    full = {name: folder for name, folder in folders.items() if _has_no_room(folder)}
    places = " or ".join(f"{name} {folder}" for name, folder in (full or folders).items())
    return (
        f"no space left on the disk of {places} (its size, a quota or the number of files). Make "
        "room or choose another folder, and rerun the same command"
    )


def _has_no_room(folder: Path) -> bool:
    """Whether the file system reports little free space; it does not report quotas."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return False
    return disk.f_bavail * disk.f_frsize < LITTLE_BYTES or (
        disk.f_files > 0 and disk.f_favail < LITTLE_FILES
    )
