# SPDX-License-Identifier: Apache-2.0
"""Registration of the contrasts of every session to its T1w, after all scans."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

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
from brainprior_bids.engine.errors import InputError, RecordError
from brainprior_bids.records import ContrastRecord, ScanRecord, matrix_rows
from brainprior_bids.run.logs import LOG
from brainprior_bids.settings import Settings


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
            _align(pair, summaries[pair.other.title], settings)
        except Exception as error:  # any error: the scans are done
            LOG.warning(
                "%s could not be aligned with %s (%s: %s). It keeps its own frame; its other "
                "results are not affected.",
                pair.other.title,
                pair.reference.title,
                type(error).__name__,
                error,
            )
            LOG.debug("traceback", exc_info=True)


def _align(pair: Pair, summary: ScanRecord, settings: Settings) -> None:
    """Align one contrast, unless this was done before with the same images."""
    from brainprior_bids.anatomy.contrasts import align_contrast

    alignment = Alignment.of(pair, summary, settings)
    inputs = alignment.inputs
    fingerprint = alignment.fingerprint(inputs)
    previous = _previous(record_path(settings.output_dir, pair))
    if previous is not None and _is_current(previous, fingerprint, settings):
        if previous.message:
            LOG.warning("%s", previous.message)
        return
    try:
        motion = align_contrast(alignment.images(pair.reference), alignment.images(pair.other))
    except InputError as error:
        LOG.warning("%s", error)
        remove_stale(settings.output_dir, previous, ())
        _write_record(pair, settings, fingerprint, message=str(error))
        return
    with temporary_folder("contrast", settings.output_dir) as name:
        staging = Path(name)
        activity = activity_id("align", fingerprint)
        staged = alignment.stage(staging, motion, activity)
        outputs = [(path, sha256_file(staging / path)) for path in staged]
        records = contrast_records(
            pair.other.title,
            settings,
            activity=activity,
            inputs=inputs,
            outputs=outputs,
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
    remove_stale(settings.output_dir, previous, staged)
    record = ContrastRecord(
        scan=pair.other.title,
        reference=pair.reference.title,
        fingerprint=fingerprint,
        to_reference=matrix_rows(motion.to_reference),
        shared=motion.shared,
        alike=motion.alike,
        run_uuid=settings.run_uuid,
        outputs=tuple(sorted(staged)),
    )
    write_json(record_path(settings.output_dir, pair), record.to_json())
    LOG.info("%s: aligned with %s", pair.other.title, pair.reference.title)


def _write_record(pair: Pair, settings: Settings, fingerprint: str, *, message: str) -> None:
    """Record why a contrast is not aligned."""
    record = ContrastRecord(
        scan=pair.other.title,
        reference=pair.reference.title,
        fingerprint=fingerprint,
        message=message,
        run_uuid=settings.run_uuid,
    )
    write_json(record_path(settings.output_dir, pair), record.to_json())


def _previous(path: Path) -> ContrastRecord | None:
    try:
        return ContrastRecord.read(path)
    except (OSError, RecordError):  # missing or unreadable: the contrast is aligned again
        return None


def _is_current(previous: ContrastRecord, fingerprint: str, settings: Settings) -> bool:
    complete = all((settings.output_dir / path).is_file() for path in previous.outputs)
    return previous.fingerprint == fingerprint and complete and not settings.force
