# SPDX-License-Identifier: Apache-2.0
"""The requested scans, sorted into those to process, those done and those that cannot start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from brainprior_bids.anatomy.templates import Template, find_template
from brainprior_bids.bids import export, status
from brainprior_bids.bids.claims import Claims
from brainprior_bids.bids.contrasts import through_t1w
from brainprior_bids.bids.fingerprint import changes, decisive, fingerprint, short
from brainprior_bids.bids.fuse import fuse_runs
from brainprior_bids.bids.given import Given, find_given
from brainprior_bids.bids.names import MAX_BYTES, output_names, result_name, scan_seed
from brainprior_bids.bids.provenance import label, sha256_file
from brainprior_bids.bids.query import Scan, find_scans
from brainprior_bids.bids.refined import name_after_images
from brainprior_bids.engine.errors import InputError
from brainprior_bids.records import ErrorRecord, ScanStatus
from brainprior_bids.run.logs import LOG
from brainprior_bids.run.outcome import write_failure
from brainprior_bids.settings import Settings


def requested_scans(settings: Settings) -> Sequence[Scan]:
    """The requested scans, one for each result."""
    scans = find_scans(settings)
    if settings.fuse:
        scans = fuse_runs(scans)
    if not settings.uses_scan:
        scans = name_after_images(scans, settings)
    return scans


def plan_jobs(
    scans: Sequence[Scan], settings: Settings, weights: dict[str, str], claims: Claims
) -> list[Any]:
    """The scans to process, claimed for this process; writes the summaries of the others."""
    from brainprior_bids.workflows.scan import Job

    jobs = []
    to_fmriprep = exported_t1w(scans, settings)
    through = via_t1w(scans, settings)
    _log_export(scans, settings, to_fmriprep)
    for scan in scans:
        try:
            job = look_up(scan, settings, weights, via_t1w=scan.name.stem in through)
        except InputError as error:
            write_failure(scan, settings, ErrorRecord(type="InputError", message=str(error)))
            continue
        except Exception as error:  # unexpected: only this scan fails
            LOG.debug("%s", scan.name.stem, exc_info=True)
            kind, reason = type(error).__name__, " ".join(str(error).split())
            message = f"it cannot be started ({kind}: {reason}). Please report this, with -vv."
            write_failure(scan, settings, ErrorRecord(type=kind, message=message))
            continue
        for text in scan.warnings:
            LOG.warning("%s: %s", scan.name.stem, text)
        if not claims.take(scan.name.node_name):  # the name of its work folder
            LOG.error(
                "%s: skipped, another process is working on it (claimed in %s or %s).",
                scan.name.stem,
                settings.output_dir,
                settings.work_dir,
            )
            continue
        roots = export_roots_of(scan, settings, to_fmriprep)
        why = why_again(scan, job, settings, roots)
        if why is None:
            LOG.info("%s: already done with the same input and settings", scan.name.stem)
            previous = status.read_summary(
                settings.output_dir, result_name(scan.name, settings.image)
            )
            assert previous is not None
            skipped = replace(
                previous,
                status=ScanStatus.SKIPPED,
                message="already done with the same input, settings and version",
            )
            status.write_summary(settings.output_dir, skipped)
            if "fmriprep" in roots:  # an earlier export may have been per session
                export.remove_others(
                    Path(roots["fmriprep"]),
                    scan.subject,
                    export.fmriprep_files(scan.name),
                    per=settings.export_per,
                )
            claims.give_back(scan.name.node_name)
            continue
        if why:
            LOG.info("%s: %s", scan.name.stem, why)
        jobs.append(
            Job(
                scan,
                scan_seed(settings.random_seed, scan.name),
                job.fingerprint,
                job.given,
                tuple(roots),
                job.others,
                job.parts,
                job.templates,
            )
        )
    return jobs


@dataclass(frozen=True)
class ScanInputs:
    """The inputs of a scan's result.

    Parameters
    ----------
    parts : name -> value or SHA-256
        Everything that determines the result.
    fingerprint : str
        SHA-256 over them.
    given : role -> Given
        Files from other data sets.
    others : sequence of (Scan, role -> Given)
        Runs that are fused with it.
    templates : tuple of str
        Standard spaces to whose template the scan itself is registered.
    """

    parts: dict[str, str]
    fingerprint: str
    given: Mapping[str, Given]
    others: Sequence[tuple[Scan, Mapping[str, Given]]]
    templates: tuple[str, ...] = ()


def via_t1w(scans: Sequence[Scan], settings: Settings) -> set[str]:
    """Stems of the scans that reach the templates through a T1w of their session."""
    names = [scan.name for scan in scans if scan.problem is None]
    return through_t1w(names, status.read_summaries(settings.output_dir), settings)


def look_up(
    scan: Scan, settings: Settings, weights: Mapping[str, str], *, via_t1w: bool = False
) -> ScanInputs:
    """Find and hash everything that determines a scan's result.

    Parameters
    ----------
    weights : role -> SHA-256
    via_t1w : bool
        Whether the scan reaches the templates through a T1w of its session.

    Raises
    ------
    InputError
        If the scan cannot be processed; the message states why.
    """
    if scan.problem is not None:
        raise InputError(scan.problem)
    _check_lengths(scan, settings)
    given, *of_others = find_given(scan, settings)
    others = list(zip(scan.runs[1:], of_others, strict=True))
    try:
        image = sha256_file(scan.path)
        hashes = {role: sha256_file(file.path) for role, file in given.items()}
        if settings.synthstrip_model is not None:
            hashes["weights of SynthStrip"] = sha256_file(settings.synthstrip_model)
        for run, files in others:
            hashes |= {
                run.name.stem: sha256_file(run.path),
                f"metadata of {run.name.stem}": short(dict(run.metadata)),
                **{f"{r} of {run.name.stem}": sha256_file(f.path) for r, f in files.items()},
            }
    except OSError as error:
        what = "the file" if error.filename == str(scan.path) else error.filename
        raise InputError(
            f"{what} cannot be read ({error.strerror}). Check its permissions."
        ) from error
    templates = () if via_t1w else settings.template_spaces
    if via_t1w:
        hashes["way to the templates"] = "through the T1w"
    hashes |= {f"template {space}": template_sha256(find_template(space)) for space in templates}
    parts = decisive(scan, settings, input_sha256=image, weights=weights, given=hashes)
    return ScanInputs(parts, fingerprint(scan, parts), given, others, templates)


@cache
def template_sha256(template: Template) -> str:
    """SHA-256 over the hashes of a template's image and mask."""
    return short([sha256_file(template.image), sha256_file(template.mask)])


def _check_lengths(scan: Scan, settings: Settings) -> None:
    """Refuse a scan whose results would have names that are too long for a file system."""
    names = output_names(
        scan.name,
        n_samples=settings.n_samples,
        save_samples=settings.save_samples,
        image=settings.image,
        native=settings.output_grid == "native",
        runs=[run.name for run in scan.runs[1:]],
        spaces=("anat", "MNI305", *settings.template_spaces),
        uncertainty=True,
    )
    result = result_name(scan.name, settings.image)
    longest = max(
        max(map(len, names.values())) + len("rec-brainprior_"),
        len(f"prov-{label(settings.run_uuid, result)}_act.json"),
        len(f"{scan.name.node_name}_wf"),
    )
    if longest > MAX_BYTES:
        raise InputError(
            f"{scan.name.stem}: the name is too long: names of its results would have "
            f"{longest} characters, but file systems allow {MAX_BYTES}. Shorten it by "
            f"{longest - MAX_BYTES} (a label such as that of acq-)."
        )


def why_again(
    scan: Scan, inputs: ScanInputs, settings: Settings, exports: Mapping[str, str]
) -> str | None:
    """Why a scan must be processed ("" if it is new); None if it is done and unchanged.

    Parameters
    ----------
    exports : kind -> root
        Exports that include the scan.
    """
    previous = status.read_summary(settings.output_dir, result_name(scan.name, settings.image))
    if previous is None or not previous.finished:
        return ""
    if previous.fingerprint != inputs.fingerprint:
        what = changes(previous.parts, inputs.parts)
        return f"already processed; rerunning because of changes: {what}"
    files = (*previous.outputs, *previous.figures)
    missing = [path for path in files if not (settings.output_dir / path).is_file()]
    if missing:
        return (
            f"already processed; rerunning because {len(missing)} file(s) are missing, such as "
            f"{missing[0]}"
        )
    if settings.force:
        return "already processed; rerunning because of --force"
    if not export.is_delivered(exports, scan, inputs.fingerprint):
        return "already processed, but not exported; rerunning for the export"
    return None


def exported_t1w(scans: Sequence[Scan], settings: Settings) -> set[str]:
    """Stems of the T1w that are exported for fMRIPrep."""
    if "fmriprep" not in settings.exports:
        return set()
    return export.choose_t1w(scans, per=settings.export_per)


def export_roots_of(scan: Scan, settings: Settings, to_fmriprep: set[str]) -> dict[str, str]:
    """The exports that include a scan: kind -> root."""
    return {
        kind: root
        for kind, root in settings.exports.items()
        if kind == "raw" or scan.name.stem in to_fmriprep
    }


def _log_export(scans: Sequence[Scan], settings: Settings, chosen: set[str]) -> None:
    """Log which of several T1w is exported for fMRIPrep, and which participants have none."""
    if "fmriprep" not in settings.exports:
        return
    for stem in sorted(chosen):
        LOG.info("export fmriprep: %s in %s", stem, settings.exports["fmriprep"])
    without = {s.subject for s in scans} - {s.subject for s in scans if s.name.stem in chosen}
    for subject in sorted(without):
        LOG.warning("export fmriprep: sub-%s has no T1w, nothing is exported", subject)
