# SPDX-License-Identifier: Apache-2.0
"""The participant and the group level, from the settings of a run to an exit code."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from brainprior_bids import __version__
from brainprior_bids.bids import export, status
from brainprior_bids.bids.claims import Claims
from brainprior_bids.bids.derivatives import check_output, write_dataset_files
from brainprior_bids.bids.fuse import fuse_runs
from brainprior_bids.bids.names import result_name
from brainprior_bids.bids.provenance import write_run
from brainprior_bids.bids.qc import rebuild_qc
from brainprior_bids.bids.query import Scan, check_dataset, find_scans
from brainprior_bids.bids.refined import name_after_images
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.samplers import registry
from brainprior_bids.records import (
    ErrorRecord,
    MaskSource,
    Origin,
    ScanRecord,
    ScanStatus,
    StructuresSource,
    WeightsRecord,
    named,
)
from brainprior_bids.run.environment import prepare_environment
from brainprior_bids.run.execute import execute
from brainprior_bids.run.jobs import plan_jobs
from brainprior_bids.run.logs import LOG, log_to_file
from brainprior_bids.run.outcome import write_failure
from brainprior_bids.run.plugin_file import read_plugin_file, require_scheduler
from brainprior_bids.run.preflight import checked_weights, clean_work_dir, validate_request
from brainprior_bids.run.resources import fit_memory, memory_limit_gb
from brainprior_bids.settings import Settings


def run(settings: Settings) -> int:
    """Do what the settings ask for; the exit code."""
    LOG.setLevel(logging.DEBUG if settings.verbose else logging.INFO)
    raw = check_dataset(settings.bids_dir)
    if settings.reports_only:
        return _reports_only(settings)
    code = 0
    if "participant" in settings.analysis_level:
        scans = _requested(settings)
        if settings.dry_run:
            from brainprior_bids.run.plan import print_plan

            print_plan(scans, settings)
            try:
                _fit_memory(settings)
            except UsageError as error:
                print(f"On this machine it would be refused: {error}")
            return 0
        settings = _fit_memory(settings)
        if not settings.boilerplate_only:
            require_scheduler(read_plugin_file(settings.plugin_file))
        check_output(settings.output_dir)
        code = _participants(scans, settings, raw)
    elif settings.dry_run or settings.boilerplate_only:
        raise UsageError("--dry-run and --boilerplate-only are for the participant level.")
    if "group" in settings.analysis_level and not settings.boilerplate_only:
        try:
            _group(settings)
        except UsageError as error:
            if not code:
                raise
            LOG.error("%s", error)  # the scans failed: that is how this call ended
    return code


def _requested(settings: Settings) -> Sequence[Scan]:
    """The scans that were asked for, one for each result."""
    scans = find_scans(settings)
    if settings.fuse:
        scans = fuse_runs(scans)
    if settings.task == "refine":
        scans = name_after_images(scans, settings)
    return scans


def _fit_memory(settings: Settings) -> Settings:
    """Settings whose steps fit into this process's memory; refused where they cannot."""
    if settings.boilerplate_only or read_plugin_file(settings.plugin_file).is_batch:
        return settings  # nothing is computed, or each step has a job of its own
    from brainprior_bids.workflows.scan import claims_gb

    return fit_memory(
        settings,
        largest_gb=max(claims_gb(replace(settings, low_mem=False)).values()),
        largest_low_gb=max(claims_gb(replace(settings, low_mem=True)).values()),
        limit=memory_limit_gb(),
    )


def _participants(scans: Sequence[Scan], settings: Settings, raw: dict[str, Any]) -> int:
    """The participant level; 0 if every requested scan is done."""
    if settings.clean_workdir:
        clean_work_dir(settings.work_dir)
    prepare_environment(settings)
    log_file = log_to_file(settings.output_dir / "logs" / f"{settings.run_uuid}.log")
    try:
        if not settings.skip_bids_validation and not settings.boilerplate_only:
            validate_request(scans, settings)
        weights = checked_weights(settings)
        if settings.boilerplate_only:
            return _boilerplate_only(scans, settings, weights)
        write_dataset_files(
            settings.output_dir,
            bids_dir=settings.bids_dir,
            raw=raw,
            derivatives=settings.derivatives,
        )
        LOG.info("brainprior %s, run %s", __version__, settings.run_uuid)
        LOG.info(
            "%d scan(s) of %d participant(s); %s, %d processor(s), %d thread(s) a step",
            len(scans),
            len({scan.subject for scan in scans}),
            settings.device,
            settings.nprocs,
            settings.omp_nthreads,
        )
        export.prepare(
            settings.exports,
            bids_dir=settings.bids_dir,
            output_dir=settings.output_dir,
            raw=raw,
        )
        hashes = {role: digest for role, (_, digest) in weights.items()}
        with Claims([settings.output_dir / "logs", settings.work_dir]) as claims:
            jobs = plan_jobs(scans, settings, hashes, claims)
            if jobs:
                write_run(settings)
                execute(jobs, settings, {role: path for role, (path, _) in weights.items()})
        if "raw" in settings.exports:
            root = Path(settings.exports["raw"])
            links = export.link_rest(
                root, settings.bids_dir, scans, sessions=settings.session_label
            )
            LOG.info("export raw: %d file(s) linked in %s", links, root)
        status.rebuild_status(settings.output_dir)
        rebuild_qc(settings.output_dir)
        reports_made = _reports({scan.subject for scan in scans}, settings)
        return _conclude(scans, settings, claims.refused) or (0 if reports_made else 1)
    finally:
        LOG.removeHandler(log_file)
        log_file.close()


def _reports_only(settings: Settings) -> int:
    """Write table, reports and methods text again, from what is in the output folder."""
    subjects = {
        str(summary.subject)
        for summary in status.read_summaries(settings.output_dir)
        if not settings.participant_label or summary.subject in settings.participant_label
    }
    if not subjects:
        raise UsageError(
            f"--reports-only: nothing is done in {settings.output_dir} for the participants "
            "that were asked for."
        )
    check_output(settings.output_dir)
    status.rebuild_status(settings.output_dir)
    rebuild_qc(settings.output_dir)
    made = True
    if "participant" in settings.analysis_level:
        made = _reports(subjects, settings)
    if "group" in settings.analysis_level:
        _group(settings)
    LOG.info("%d report(s) in %s", len(subjects), settings.output_dir)
    return 0 if made else 1


def _group(settings: Settings) -> None:
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
    """Scans that a job left undone when it ended have failed, and say so in table and report.

    Those that it never began are known where the participants are named.
    """
    for scan in status.settle(settings.output_dir, job):
        LOG.error("FAILED %s: its job was killed", scan)
    for scan in _requested(settings) if settings.participant_label else ():
        result = result_name(scan.name, settings.image)
        if status.read_summary(settings.output_dir, result) is None:
            message = (
                f"job {job} ended before this scan was begun: its task was refused, killed or "
                "cancelled. The task's own output (logs/slurm) says why. Submit it again."
            )
            write_failure(scan, settings, ErrorRecord(type=status.KILLED_JOB, message=message))
            LOG.error("FAILED %s: its task never began it", result)
    status.rebuild_status(settings.output_dir)
    rebuild_qc(settings.output_dir)
    unreported = {
        str(summary.subject)
        for summary in status.read_summaries(settings.output_dir)
        if summary.error is not None and summary.error.type == status.KILLED_JOB
    }
    _reports(unreported, settings)


def _boilerplate_only(
    scans: Sequence[Scan], settings: Settings, weights: dict[str, tuple[Path, str]]
) -> int:
    """Write the methods text of what these settings would do."""
    from brainprior_bids.engine.weights import read_weights
    from brainprior_bids.reports.methods import Method, write_citation

    cards = {
        role: WeightsRecord.from_json(read_weights(path, kind=role)[1]).label
        for role, (path, _) in weights.items()
    }
    methods = [
        Method(
            suffix=scan.name.suffix,
            task=settings.task,
            sampler=settings.sampler,
            n_samples=settings.n_samples,
            calls=registry.find(settings.sampler).calls(settings.n_steps),
            version=__version__,
            mask=Origin(MaskSource(settings.skull_strip)),
            structures=Origin(StructuresSource(settings.parcellation)),
            runs=max(1, len(scan.runs)),
            **cards,
        )
        for scan in scans
        if scan.problem is None
    ]
    for path in write_citation(settings.output_dir / "logs", methods):
        LOG.info("%s", path)
    return 0


def _reports(subjects: Iterable[str], settings: Settings) -> bool:
    """One HTML page a participant and the methods text; False if one could not be made."""
    from brainprior_bids.reports.methods import of_summary, write_citation
    from brainprior_bids.reports.subject import build_subject_report

    made = True
    for subject in sorted(subjects):
        try:
            build_subject_report(settings.output_dir, subject)
        except Exception as error:  # the images are there: say it, and go on
            LOG.error("sub-%s: the report could not be made: %s", subject, error)
            LOG.debug("traceback", exc_info=True)
            made = False
    summaries = status.read_summaries(settings.output_dir)
    methods = [of_summary(summary) for summary in summaries if summary.finished]
    write_citation(settings.output_dir / "logs", methods)
    return made


def _log_warnings(summary: ScanRecord) -> None:
    """Log the warnings of a scan's steps, their fallbacks among them."""
    for text in summary.warnings:
        LOG.warning("%s", named(text, summary.scan))


def _conclude(scans: Sequence[Scan], settings: Settings, elsewhere: Sequence[str]) -> int:
    """Say how it ended; 0 if every scan is done, and none was left to another process."""
    summaries = [
        status.read_summary(settings.output_dir, result_name(scan.name, settings.image))
        for scan in scans
        if scan.name.stem not in elsewhere
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
