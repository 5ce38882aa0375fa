# SPDX-License-Identifier: Apache-2.0
"""The group level: mark unfinished scans of an ended job as failed; write tables and page."""

from __future__ import annotations

from brainprior_bids.bids import status
from brainprior_bids.bids.names import result_name
from brainprior_bids.bids.qc import rebuild_qc
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.records import ErrorRecord
from brainprior_bids.run.documents import write_documents
from brainprior_bids.run.jobs import requested_scans
from brainprior_bids.run.logs import LOG
from brainprior_bids.run.outcome import write_failure
from brainprior_bids.settings import Settings


def run_group(settings: Settings) -> None:
    """Run the group level.

    Raises
    ------
    UsageError
        If no scan is done.
    """
    from brainprior_bids.reports.group import build_group

    if settings.job_id is not None:
        _settle(settings, settings.job_id)
    written = build_group(settings.output_dir)
    if not written:
        raise UsageError(
            f"group: no scan is done in {settings.output_dir}. Run the participant level first."
        )
    for path in written:
        LOG.info("group: %s", path)


def _settle(settings: Settings, job: str) -> None:
    """Mark the unfinished scans of an ended job as failed, in the status and the reports.

    Scans that it never started are known only if participants are requested by label.
    """
    for scan in status.settle(settings.output_dir, job):
        LOG.error("FAILED %s: its job was killed", scan)
    for scan in requested_scans(settings) if settings.participant_label else ():
        result = result_name(scan.name, settings.image)
        if status.read_summary(settings.output_dir, result) is None:
            message = (
                f"job {job} ended before this scan was started: its task was refused, killed or "
                "cancelled. The task's own output (logs/slurm) has the reason. Submit it again."
            )
            write_failure(scan, settings, ErrorRecord(type=status.KILLED_JOB, message=message))
            LOG.error("FAILED %s: its task never started it", result)
    status.rebuild_status(settings.output_dir)
    rebuild_qc(settings.output_dir)
    unreported = {
        str(summary.subject)
        for summary in status.read_summaries(settings.output_dir)
        if summary.error is not None and summary.error.type == status.KILLED_JOB
    }
    write_documents(unreported, settings)
