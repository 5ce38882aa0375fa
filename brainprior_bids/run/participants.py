# SPDX-License-Identifier: Apache-2.0
"""The participant level, from the requested scans to an exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from brainprior_bids import __version__
from brainprior_bids.bids import export, status
from brainprior_bids.bids.claims import Claims
from brainprior_bids.bids.derivatives import write_dataset_files
from brainprior_bids.bids.files import readable
from brainprior_bids.bids.names import result_name
from brainprior_bids.bids.provenance import write_provenance_table, write_run
from brainprior_bids.bids.qc import rebuild_qc
from brainprior_bids.bids.query import (
    Scan,
    locked_folders,
    misnamed_folders,
    requested_subjects,
    subjects_without,
)
from brainprior_bids.records import ScanRecord, ScanStatus, Stage, named
from brainprior_bids.run.contrasts import align_contrasts
from brainprior_bids.run.documents import write_boilerplate, write_documents
from brainprior_bids.run.environment import prepare_environment, revive_tracker
from brainprior_bids.run.execute import execute
from brainprior_bids.run.heartbeat import Heartbeat
from brainprior_bids.run.jobs import plan_jobs
from brainprior_bids.run.logs import LOG, log_to_file
from brainprior_bids.run.preflight import (
    checked_weights,
    clean_work_dir,
    folders_of_temporaries,
    open_claims,
    validate_request,
)
from brainprior_bids.settings import Settings


def run_participants(scans: Sequence[Scan], settings: Settings, raw: dict[str, Any]) -> int:
    """The participant level; 0 if every requested scan is done."""
    with open_claims(settings) as claims:
        if settings.clean_workdir:
            clean_work_dir(settings.work_dir, claims)
        claims.sweep(folders_of_temporaries(settings, {scan.subject for scan in scans}))
        prepare_environment(settings)
        log_file = log_to_file(settings.output_dir / "logs" / f"{settings.run_uuid}.log")
        try:
            if not settings.skip_bids_validation and not settings.boilerplate_only:
                scans = validate_request(scans, settings)
            weights = checked_weights(settings)
            if settings.boilerplate_only:
                return write_boilerplate(scans, settings, weights)
            return _restore(scans, settings, raw, weights, claims)
        finally:
            revive_tracker()  # progress bars have semaphores until the process ends
            LOG.removeHandler(log_file)
            log_file.close()


def _restore(
    scans: Sequence[Scan],
    settings: Settings,
    raw: dict[str, Any],
    weights: dict[str, tuple[Path, str]],
    claims: Claims,
) -> int:
    """Describe the data sets, process unfinished scans, and write tables and documents."""
    write_dataset_files(
        settings.output_dir,
        bids_dir=settings.bids_dir,
        raw=raw,
        derivatives=settings.derivatives,
    )
    LOG.info("brainprior %s, run %s", __version__, settings.run_uuid)
    LOG.info(
        "%d scan(s) of %d participant(s); %s, %d processor(s), %d thread(s) per step",
        len(scans),
        len({scan.subject for scan in scans}),
        settings.device,
        settings.nprocs,
        settings.omp_nthreads,
    )
    export.prepare(
        settings.exports, bids_dir=settings.bids_dir, output_dir=settings.output_dir, raw=raw
    )
    with Heartbeat(settings) as heartbeat:
        return _process(scans, settings, weights, claims, heartbeat)


def _process(
    scans: Sequence[Scan],
    settings: Settings,
    weights: dict[str, tuple[Path, str]],
    claims: Claims,
    heartbeat: Heartbeat,
) -> int:
    """Process unfinished scans, align contrasts, and write tables and documents."""
    failed = name_absent(scans, settings)
    scans, linked = link_raw(scans, settings)
    hashes = {role: digest for role, (_, digest) in weights.items()}
    jobs = plan_jobs(scans, settings, hashes, claims)
    if jobs:
        write_run(settings)
        paths = {role: path for role, (path, _) in weights.items()}
        execute(jobs, settings, paths, heartbeat)
    heartbeat.enter(Stage.END)
    align_contrasts({scan.subject for scan in scans}, settings)
    if "raw" in settings.exports:
        export.describe_raw(Path(settings.exports["raw"]), settings.bids_dir)
    status.rebuild_status(settings.output_dir)
    rebuild_qc(settings.output_dir)
    write_provenance_table(settings.output_dir)
    reports_complete = write_documents({scan.subject for scan in scans}, settings)
    code = _conclude(scans, settings, claims.refused)
    code = code or (0 if reports_complete and linked else 1)
    return code or (1 if failed else 0)


def link_raw(scans: Sequence[Scan], settings: Settings) -> tuple[Sequence[Scan], bool]:
    """Fill the root of ``--export raw`` with links, before any work is done.

    Returns
    -------
    scans : sequence of Scan
        For a participant whose links cannot be created, the scans have the reason as ``problem``.
    linked : bool
        Whether the files that all participants share could be linked.
    """
    if "raw" not in settings.exports:
        return scans, True
    root = Path(settings.exports["raw"])
    links, problems = export.link_rest(
        root, settings.bids_dir, scans, sessions=settings.session_label
    )
    LOG.info("export raw: %d file(s) linked in %s", links, root)
    if "" in problems:
        LOG.error("%s", problems[""])
    failed = [
        replace(scan, problem=scan.problem or f"{scan.name.stem}: {problems[scan.subject]}")
        if scan.subject in problems
        else scan
        for scan in scans
    ]
    return failed, "" not in problems


def name_absent(scans: Sequence[Scan], settings: Settings) -> list[str]:
    """Log the requested participants without a scan, and note them for the status.

    The same holds for folders that cannot be read and, if all participants are requested, for
    folders that are ignored because of their names. Failures of files that no longer exist are
    removed from the status.

    Returns
    -------
    Labels of the participants for whom the run failed: those requested by label that have no scan
    or a folder that cannot be read. (If all are requested, not everyone needs every contrast.)
    """
    requested = requested_subjects(settings)
    locked: dict[str, str] = {}
    for place, message in locked_folders(
        settings.bids_dir, requested, settings.session_label
    ).items():
        LOG.error("%s", message)
        label = place.partition("/")[0].removeprefix("sub-")
        locked[label] = f"{locked[label]} {message}" if label in locked else message
    absent = {}
    for subject in subjects_without(scans, settings):
        if subject not in locked:
            absent[subject] = (
                f"sub-{readable(subject)}: no scan matches the request (modalities "
                f"{', '.join(settings.modalities)}, and the other filters). Check the names of "
                "its files, or widen the request."
            )
            LOG.warning("%s", absent[subject])
    present = {scan.relative.parts[0].removeprefix("sub-") for scan in scans}
    status.write_absent(settings.output_dir, absent | locked, present - locked.keys())
    status.forget_gone(settings.output_dir, settings.bids_dir, requested)
    if not settings.participant_label:
        misnamed = misnamed_folders(settings.bids_dir)
        for message in misnamed.values():
            LOG.warning("%s", message)
        status.write_misnamed(settings.output_dir, misnamed)
    return [*locked, *(absent if settings.participant_label else ())]


def _log_warnings(summary: ScanRecord) -> None:
    """Log the warnings of a scan's steps, their fallbacks among them."""
    for text in summary.warnings:
        LOG.warning("%s", named(text, summary.scan))


def _conclude(scans: Sequence[Scan], settings: Settings, elsewhere: Sequence[str]) -> int:
    """Log the counts; 0 if every scan is done, and none was skipped for another process."""
    summaries = [
        status.read_summary(settings.output_dir, result_name(scan.name, settings.image))
        for scan in scans
        if scan.name.node_name not in elsewhere
    ]
    states = [summary.status if summary else ScanStatus.FAILED for summary in summaries]
    for summary in summaries:
        if summary and summary.status is not ScanStatus.SKIPPED:
            _log_warnings(summary)
        if summary and summary.status is ScanStatus.FAILED:
            LOG.error("FAILED %s", summary.message)
            if summary.error is not None and summary.error.crash_file:
                LOG.error("  see %s", settings.output_dir / summary.error.crash_file)
    LOG.info(
        "%d done, %d already done, %d failed%s. Status: %s",
        states.count(ScanStatus.DONE),
        states.count(ScanStatus.SKIPPED),
        states.count(ScanStatus.FAILED),
        f", {len(elsewhere)} left to another process" if elsewhere else "",
        settings.output_dir / "logs" / "status.tsv",
    )
    for subject in sorted({scan.subject for scan in scans}):
        report = settings.output_dir / f"sub-{subject}.html"
        if report.exists():
            LOG.info("report: %s", report)
    finished = all(summary is not None and summary.finished for summary in summaries)
    return 0 if finished and not elsewhere else 1
