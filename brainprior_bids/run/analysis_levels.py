# SPDX-License-Identifier: Apache-2.0
"""A run from its settings to an exit code: the participant level, the group level, or both."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

from brainprior_bids.bids import status
from brainprior_bids.bids.claims import Claims
from brainprior_bids.bids.derivatives import check_output
from brainprior_bids.bids.files import become_owner
from brainprior_bids.bids.qc import rebuild_qc
from brainprior_bids.bids.query import NoScanError, Scan, check_dataset
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.run.documents import write_documents
from brainprior_bids.run.group import run_group
from brainprior_bids.run.jobs import requested_scans
from brainprior_bids.run.logs import LOG
from brainprior_bids.run.participants import name_absent, run_participants
from brainprior_bids.run.plugin_file import read_plugin_file, require_scheduler
from brainprior_bids.run.resources import fit_memory, memory_limit_gb
from brainprior_bids.settings import Settings


def run(settings: Settings) -> int:
    """Run the requested levels; returns the exit code."""
    LOG.setLevel(logging.DEBUG if settings.verbose else logging.INFO)
    raw = check_dataset(settings.bids_dir)
    become_owner()
    if settings.reports_only:
        return _rewrite(settings)
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
            require_scheduler(read_plugin_file(settings.plugin_file), settings.output_dir)
        check_output(settings.output_dir)
        code = run_participants(scans, settings, raw)
    elif settings.dry_run or settings.boilerplate_only:
        raise UsageError(
            "--dry-run and --boilerplate-only are for the participant level. Leave them out."
        )
    if "group" in settings.analysis_level and not settings.boilerplate_only:
        try:
            with _claims(settings):
                run_group(settings)
        except UsageError as error:
            if not code:
                raise
            LOG.error("%s", error)  # the scans failed, which determines the exit code of this call
    return code


def _requested(settings: Settings) -> Sequence[Scan]:
    """The requested scans; if there are none, the status names the requested participants."""
    try:
        return requested_scans(settings)
    except NoScanError:
        if settings.participant_label and not (settings.dry_run or settings.boilerplate_only):
            check_output(settings.output_dir)
            with _claims(settings):
                name_absent((), settings)
                status.rebuild_status(settings.output_dir)
        raise


def _claims(settings: Settings) -> Claims | nullcontext[None]:
    """This process as the owner of temporary files in an output folder, if there is one."""
    logs = settings.output_dir / "logs"
    return Claims([logs]) if logs.is_dir() else nullcontext()


def _rewrite(settings: Settings) -> int:
    """Rebuild table, reports and methods text from the results in the output folder."""
    subjects = {
        str(summary.subject)
        for summary in status.read_summaries(settings.output_dir)
        if not settings.participant_label or summary.subject in settings.participant_label
    }
    if not subjects:
        raise UsageError(
            f"--reports-only: {settings.output_dir} has no scan of the requested participants. "
            "Run the participant level for them first."
        )
    check_output(settings.output_dir)
    complete = True
    with _claims(settings):
        status.rebuild_status(settings.output_dir)
        rebuild_qc(settings.output_dir)
        if "participant" in settings.analysis_level:
            complete = write_documents(subjects, settings)
        if "group" in settings.analysis_level:
            run_group(settings)
    LOG.info("%d report(s) in %s", len(subjects), settings.output_dir)
    return 0 if complete else 1


def _fit_memory(settings: Settings) -> Settings:
    """Settings whose steps fit into this process's memory; refused otherwise."""
    if settings.boilerplate_only or read_plugin_file(settings.plugin_file).is_batch:
        return settings  # nothing is computed, or each step is a separate job
    from brainprior_bids.workflows.scan import claims_gb

    return fit_memory(
        settings,
        largest_gb=max(claims_gb(replace(settings, low_mem=False)).values()),
        largest_low_gb=max(claims_gb(replace(settings, low_mem=True)).values()),
        limit=memory_limit_gb(),
    )
