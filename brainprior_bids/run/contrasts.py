# SPDX-License-Identifier: Apache-2.0
"""Registration of the contrasts of every session to its T1w, after all scans."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from brainprior_bids.bids import status
from brainprior_bids.bids.contrasts import (
    Alignment,
    Pair,
    pairs,
    record_path,
    remove_stale,
    result_of,
)
from brainprior_bids.bids.files import publish, temporary_folder, write_json
from brainprior_bids.bids.provenance import (
    activity_id,
    contrast_records,
    run_path,
    sha256_file,
    write_run,
)
from brainprior_bids.engine.errors import InputError
from brainprior_bids.records import ContrastRecord, ScanRecord, matrix_rows
from brainprior_bids.run.logs import LOG
from brainprior_bids.settings import Settings

if TYPE_CHECKING:
    from brainprior_bids.anatomy.contrasts import ContrastMotion


def align_contrasts(subjects: Collection[str], settings: Settings) -> None:
    """Align every finished result of these participants with its session's reference.

    A contrast that cannot be aligned causes a warning, and nothing else fails.
    """
    summaries = {
        summary.scan: summary
        for summary in status.read_summaries(settings.output_dir)
        if summary.finished and summary.subject in subjects and summary.task == settings.task
    }
    for pair in pairs([result_of(summary) for summary in summaries.values()]):
        try:
            record = _align(pair, summaries[pair.other.title], settings)
        except Exception as error:  # any error: the scans are done
            message = (
                f"{pair.other.title} could not be aligned with {pair.reference.title} "
                f"({type(error).__name__}: {error}). It keeps its own frame; its other results "
                "are not affected."
            )
            LOG.debug("traceback", exc_info=True)
            record = _failed(pair, settings, message=message)
        if record.message:
            LOG.warning("%s", record.message)
        _note(record, settings)


def _align(pair: Pair, summary: ScanRecord, settings: Settings) -> ContrastRecord:
    """Align one contrast, unless this was done before with the same images."""
    from brainprior_bids.anatomy.contrasts import align_contrast

    alignment = Alignment.of(pair, summary, settings)
    inputs = alignment.inputs
    fingerprint = alignment.fingerprint(inputs)
    previous = status.read_contrast(settings.output_dir, pair.other.title)
    if previous is not None and _is_current(previous, fingerprint, settings):
        return previous
    LOG.info("%s: is being aligned with %s", pair.other.title, pair.reference.title)
    began = datetime.now(UTC)
    try:
        motion = align_contrast(alignment.images(pair.reference), alignment.images(pair.other))
        refusal = motion.refusal(pair.reference.title, pair.other.title)
        measured = {"shared": motion.shared, "alike": motion.alike}
    except InputError as error:
        motion, refusal, measured = None, str(error), {}
    if motion is None or not motion.certain:
        remove_stale(settings.output_dir, previous, ())
        record = replace(
            _failed(pair, settings, message=refusal), fingerprint=fingerprint, **measured
        )
        write_json(record_path(settings.output_dir, pair), record.to_json())
        return record
    staged = _publish(alignment, motion, inputs, fingerprint, began, settings)
    remove_stale(settings.output_dir, previous, staged)
    record = ContrastRecord(
        scan=pair.other.title,
        reference=pair.reference.title,
        fingerprint=fingerprint,
        to_reference=matrix_rows(motion.to_reference),
        run_uuid=settings.run_uuid,
        outputs=tuple(sorted(staged)),
        **measured,
    )
    write_json(record_path(settings.output_dir, pair), record.to_json())
    LOG.info("%s: aligned with %s", pair.other.title, pair.reference.title)
    return record


def _publish(
    alignment: Alignment,
    motion: ContrastMotion,
    inputs: Mapping[str, str],
    fingerprint: str,
    began: datetime,
    settings: Settings,
) -> list[str]:
    """Write the files of an alignment and their records; returns their paths."""
    title = alignment.pair.other.title
    with temporary_folder("contrast", settings.output_dir) as name:
        staging = Path(name)
        activity = activity_id("align", fingerprint)
        staged = alignment.stage(staging, motion, activity)
        records = contrast_records(
            title,
            settings,
            activity=activity,
            began=began,
            inputs=inputs,
            outputs=[(path, sha256_file(staging / path)) for path in staged],
            motion=motion,
        )
        if not run_path(settings).is_file():  # no scan was restored in this run
            write_run(settings)
        for file, text in records.items():
            path = staging / "prov" / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            staged.append(f"prov/{file}")
        publish({staging / path: settings.output_dir / path for path in staged})
    return staged


def _failed(pair: Pair, settings: Settings, *, message: str) -> ContrastRecord:
    """The record of a contrast that is not aligned, and why."""
    return ContrastRecord(
        scan=pair.other.title,
        reference=pair.reference.title,
        message=message,
        run_uuid=settings.run_uuid,
    )


def _note(record: ContrastRecord, settings: Settings) -> None:
    """State the alignment in the scan's summary, from which reports and verdicts are made."""
    summary = status.read_summary(settings.output_dir, record.scan)
    if summary is None or summary.facts.alignment == record.alignment:
        return
    before = summary.facts.alignment
    stale = before.message if before is not None else ""
    warnings = [text for text in summary.warnings if text != stale]
    noted = replace(
        summary,
        warnings=(*warnings, record.message) if record.message else tuple(warnings),
        facts=replace(summary.facts, alignment=record.alignment),
    )
    status.write_summary(settings.output_dir, noted)


def _is_current(previous: ContrastRecord, fingerprint: str, settings: Settings) -> bool:
    complete = all((settings.output_dir / path).is_file() for path in previous.outputs)
    return previous.fingerprint == fingerprint and complete and not settings.force
