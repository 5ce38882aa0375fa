# SPDX-License-Identifier: Apache-2.0
"""The report of one subject: processing and pictures of each scan, errors and provenance.

Everything is read from the output folder: the summaries ``logs/scans/<scan>.json``, the records
in ``prov/`` and the pictures in ``sub-XX/figures``. A value that is missing from a summary is
shown as "not recorded".
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from brainprior_bids.anatomy.tissue_metrics import RATIOS
from brainprior_bids.bids.files import read_json
from brainprior_bids.bids.provenance import label
from brainprior_bids.bids.qc import metrics, reasons, relative_scores, verdict
from brainprior_bids.bids.status import read_summaries
from brainprior_bids.records import (
    AlignmentRecord,
    ErrorRecord,
    RestoreRecord,
    ScanRecord,
    ScanStatus,
    WeightsRecord,
)
from brainprior_bids.reports import atlas, measured
from brainprior_bids.reports.assembler import ScanSection, TextSection, assemble
from brainprior_bids.reports.methods import methods_text, of_summary, to_html, with_contrasts
from brainprior_bids.reports.rating import ARTEFACTS, RATINGS
from brainprior_bids.settings import read_table

MISSING = "not recorded"
Rows = list[tuple[str, str]]
AXES = ("left-right", "posterior-anterior", "inferior-superior")


def build_subject_report(output_dir: Path, subject: str) -> Path:
    """Write ``sub-XX.html`` in the output folder.

    Parameters
    ----------
    output_dir : Path
        Root of the derivative data set.
    subject : str
        Label, with or without ``sub-``.

    Returns
    -------
    Path of the report. A subject without any summary gets a report that says so.
    """
    output_dir = Path(output_dir)
    subject = subject.removeprefix("sub-")
    scans = [s for s in read_summaries(output_dir) if s.subject == subject]
    finished = [s for s in scans if s.finished]
    activities = {s.scan: _activity(output_dir, s) for s in scans}
    sections: list[TextSection | ScanSection] = [TextSection("Summary", _summary(scans))]
    sections += [ScanSection(s.scan, _scan(s), _rating(s)) for s in finished]
    sections += [
        TextSection("Methods", _methods(output_dir, finished)),
        TextSection("Errors", _errors(scans)),
        TextSection("Provenance", _provenance(output_dir, scans, activities)),
    ]
    return assemble(
        output_dir / f"sub-{subject}.html",
        title=f"sub-{subject} · brainprior",
        subject=subject,
        sections=sections,
    )


def _summary(scans: Sequence[ScanRecord]) -> str:
    titles = ("Scan", "Status", "Quality", "Voxels (mm)", "Slices", "Sampler", "Residual",
              "MNI305 (mm)", "Warnings", "Time", "Memory")  # fmt: skip
    numbers = {"Residual", "MNI305 (mm)", "Warnings", "Time", "Memory"}
    rows = []
    for scan in scans:
        conform, restore = scan.facts.conform, scan.facts.restore
        ratios = restore.residual_ratios
        rows.append(
            {
                "name": scan.scan,
                "status": scan.status or MISSING,
                "has_section": scan.finished,
                "cells": [
                    verdict(metrics(scan)) if scan.finished else "–",
                    _voxels(scan),
                    _number(conform.acquisition.thickness_mm, ".3g", " mm", none="–"),
                    _sampler(restore),
                    f"{statistics.mean(ratios):.2f}" if ratios else "–",
                    _number(scan.facts.affine.median_residual_mm, ".1f", none="–"),
                    str(len(scan.warnings)),
                    _duration(scan.seconds),
                    _number(scan.peak_memory_gb, ".1f", " GB", none="–"),
                ],
            }
        )
    return _render(
        "summary.html.j2",
        scans=rows,
        failed=sum(scan.status is ScanStatus.FAILED for scan in scans),
        lesions=measured.lesions(scan.facts.restore for scan in scans),
        columns=[{"title": title, "number": title in numbers} for title in titles],
    )


def _scan(scan: ScanRecord) -> str:
    groups = [
        ("Input", _input_rows(scan)),
        ("Restoration", restore_rows(scan)),
        ("Anatomy", _anatomy_rows(scan)),
        ("Run", _run_rows(scan)),
    ]
    return _render(
        "scan.html.j2",
        scan=scan.scan,
        warnings=scan.warnings,
        verdict=verdict(metrics(scan)),
        reasons=reasons(metrics(scan)),
        groups=groups,
        structures=_structures(scan),
        tissues=_tissues(scan),
    )


def _rating(scan: ScanRecord) -> str:
    return _render("rating.html.j2", scan=scan, ratings=RATINGS, artefacts=ARTEFACTS)


def _input_rows(scan: ScanRecord) -> Rows:
    acquisition, facts = scan.facts.conform.acquisition, scan.facts.conform.facts
    stated, grid = facts.acquisition, facts.grid
    thickness = _number(acquisition.thickness_mm, ".3g", " mm")
    if stated.thickness_source:
        thickness += f" (from: {stated.thickness_source})"
    gap = stated.gap_mm
    gap = gap if gap is None else round(gap, 3)  # the header's rounding may leave 2e-07
    return [
        ("File", scan.source or MISSING),
        ("Stored orientation", facts.original.axis_codes or MISSING),
        ("Voxel size", f"{_voxels(scan)} mm"),
        ("Grid", " × ".join(map(str, grid.shape)) or MISSING),
        ("Tilt of the scan's axes", _number(grid.rotation_from_axes_deg, ".1f", "°")),
        ("Slice direction", _sliced(acquisition.slice_axis, stated.slice_axis_source)),
        ("Slice thickness", thickness),
        ("Gap between slices", _number(gap, ".3g", " mm")),
        ("Slice profile", str(acquisition.profile or MISSING)),
        ("Field strength", _number(stated.field_strength_t, "g", " T")),
    ]


def _sliced(axis: int | None, source: str | None) -> str:
    if axis not in (0, 1, 2):
        return MISSING
    return AXES[axis] + (f" (from: {source})" if source else "")


def restore_rows(scan: ScanRecord) -> Rows:
    """The table "Restoration" of a scan: label and text."""
    restore = scan.facts.restore
    schedule = restore.schedule
    contrast = restore.contrast or MISSING
    if restore.outside_training:
        contrast += ": the prior was not trained on this contrast"
    return [
        ("Contrast", contrast),
        *_fused_rows(restore),
        ("Sampler", restore.sampler or MISSING),
        ("Samples", _samples(restore.n_samples)),
        (
            "Noise levels",
            f"{len(schedule)}, from {max(schedule):.3g} to {min(schedule):.3g}"
            if schedule
            else MISSING,
        ),
        *_fit_rows(restore),
        ("Correlation of residuals between neighbouring voxels", _correlation(restore)),
        ("Prior", restore.prior.name or MISSING),
        ("Coverage of the intervals", measured.coverage(restore, task=scan.task or "restore")),
        ("Seed", str(MISSING if scan.seed is None else scan.seed)),
    ]


def _fit_rows(restore: RestoreRecord) -> Rows:
    """Network calls, noise and residual: per sample, or of the mean if no samples were drawn."""
    calls, residual = str(restore.calls or MISSING), _ratios(restore.residual_ratios) or MISSING
    if restore.n_samples == 0:
        return [
            ("Network calls", calls),
            ("Noise", _noise(restore, restore.noise_sd)),
            ("Residual of the posterior mean, in SDs of the noise", residual),
        ]
    return [
        ("Network calls per sample", calls),
        ("Noise before sampling", _noise(restore, restore.noise_sd_initial)),
        ("Noise after sampling", _noise(restore, restore.noise_sd)),
        ("Residual of each sample, in SDs of the noise before sampling", residual),
        (
            "The same in SDs of the noise after sampling",
            _ratios(restore.residual_ratios_final) or MISSING,
        ),
    ]


def _sampler(restore: RestoreRecord) -> str:
    """Sampler and number of samples; "mean" draws none."""
    if not restore.sampler or restore.n_samples == 0:
        return restore.sampler or "–"
    return f"{restore.sampler}, {_count(restore.n_samples, 'sample')}"


def _samples(n: int | None) -> str:
    if n == 0:
        return "none: the posterior mean alone"
    return MISSING if n is None else str(n)


def _noise(restore: RestoreRecord, sd: float | None) -> str:
    if sd is None:
        return MISSING
    scanner = restore.scanner_units(sd)
    text = f"{sd:.4f} of the brain's 99th percentile"
    return text if scanner is None else f"{text}, {scanner:.3g} in scanner units"


def _ratios(ratios: Sequence[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


def _fused_rows(restore: RestoreRecord) -> Rows:
    """One row per fused run; no row for a scan that was not fused."""
    rows = []
    for run in restore.runs or ():
        thickness = _number(run.acquisition.thickness_mm, ".3g", " mm")
        text = f"slices of {thickness} {_sliced(run.acquisition.slice_axis, None)}"
        text += f", noise {_number(run.noise_sd, '.4f')}, residual {_ratios(run.residual_ratios)}"
        if run.correlation is not None:
            text += (
                f"; registered to the first by {_number(run.angle_deg, '.1f', '°')} and "
                f"{_number(run.shift_mm, '.1f', ' mm')} at its centre, correlation "
                f"{run.correlation:.2f}"
            )
        if run.lesion is not None:
            hidden = _number(run.lesion.hidden_ml, ".1f", " ml")
            text += f"; {hidden} under its own lesion mask excluded"
        rows.append((f"Run {run.name}", text))
    return rows


def _correlation(restore: RestoreRecord) -> str:
    """Lag-one correlation of the residual along each axis, mean over the samples."""
    means = [statistics.mean(values) for values in zip(*restore.residual_correlation, strict=True)]
    return ", ".join(f"{m:.2f} {axis}" for m, axis in zip(means, AXES, strict=False)) or MISSING


def _anatomy_rows(scan: ScanRecord) -> Rows:
    affine, parcellation = scan.facts.affine, scan.facts.parcellation
    volume = sum(row.volume_mm3 or 0 for row in parcellation.table)
    return [
        ("Brain mask from", parcellation.mask_origin.words),
        ("Structures from", parcellation.structures_origin.words),
        ("Structures found", str(len(parcellation.table) or MISSING)),
        ("Volume of all structures", f"{volume / 1000:.0f} ml" if volume else MISSING),
        (
            "z-score of this volume (54 participants, T1w)",
            _number(metrics(scan)["brain_z"], "+.1f", none="–"),
        ),
        ("Transform to MNI305", f"{affine.dof} parameters" if affine.dof else MISSING),
        ("Transform based on", affine.method.words),
        ("Structures used for the transform", str(len(affine.used) or MISSING)),
        (
            "Median distance of centroids from MNI305",
            _number(affine.median_residual_mm, ".1f", " mm"),
        ),
        *_alignment_rows(scan.facts.alignment),
    ]


def _alignment_rows(alignment: AlignmentRecord | None) -> Rows:
    """How well the contrast fits its session's reference; nothing for the reference itself."""
    if alignment is None:
        return []
    if alignment.alike is None:
        return [(f"Registered to {alignment.reference}", "no")]
    fit = f"{100 * alignment.alike:.0f} % of the brain has the same label in both"
    return [(f"Registered to {alignment.reference}", f"no: {fit}" if alignment.message else fit)]


def _run_rows(scan: ScanRecord) -> Rows:
    environment = scan.facts.restore.environment
    device = environment.gpu or environment.processor
    return [
        ("Status", scan.status or MISSING),
        ("Device", f"{environment.device} ({device})" if device else MISSING),
        ("Threads", str(environment.threads or MISSING)),
        ("Time", _duration(scan.seconds)),
        ("Time of the restoration", _duration(scan.facts.restore.seconds)),
        ("Peak memory", _number(scan.peak_memory_gb, ".1f", " GB")),
    ]


def _structures(scan: ScanRecord) -> list[dict[str, str]]:
    parcellation, distances = scan.facts.parcellation, scan.facts.affine.residuals_mm
    scores = relative_scores(parcellation.table)
    own = parcellation.structures_origin.embedded
    rows = []
    for row in parcellation.table:
        name = row.name if row.index is None else atlas.name(row.index)
        rows.append(
            {
                "name": name,
                "index": str(row.index),
                "volume": _number(row.volume_mm3, ".1f", scale=1e-3, none="–"),
                "score": _number(scores.get(row.name), "+.1f", none="–"),
                "confidence": _number(row.confidence if own else None, ".2f", none="–"),
                "distance": _number(distances.get(name), ".1f", none="–"),
            }
        )
    return rows


def _tissues(scan: ScanRecord) -> list[dict[str, str]]:
    """Signal and contrast by tissue; empty where they were not computed."""
    tissues = scan.facts.tissues
    if tissues is None:
        return []
    return [
        {
            "name": name,
            "input": _number(tissues.input.get(name), ".3g", none="–"),
            "restored": _number(tissues.restored.get(name), ".3g", none="–"),
        }
        for name in dict.fromkeys((*RATIOS, *tissues.input, *tissues.restored))
    ]


def _errors(scans: Sequence[ScanRecord]) -> str:
    errors = []
    for scan in scans:
        if scan.status is not ScanStatus.FAILED:
            continue
        error = scan.error or ErrorRecord.empty()
        errors.append(
            {
                "scan": scan.scan,
                "node": error.node,
                "type": error.type,
                "message": error.message or scan.message or MISSING,
                "crash_file": error.crash_file,
                "warnings": scan.warnings,
            }
        )
    return _render("errors.html.j2", errors=errors)


def _methods(output_dir: Path, scans: Sequence[ScanRecord]) -> str:
    if not scans:
        return "<p>No scan of this participant was restored.</p>"
    methods = with_contrasts([of_summary(scan) for scan in scans], output_dir)
    text = to_html(methods_text(methods))
    return _render("methods.html.j2", text=text)


def _provenance(
    output_dir: Path,
    scans: Sequence[ScanRecord],
    activities: Mapping[str, Mapping[str, Any]],
) -> str:
    views = []
    packages: dict[str, str] = {}
    for scan in scans:
        activity = activities[scan.scan]
        command = activity.get("Arguments") or []
        settings = activity.get("Settings") or {}
        rows = [
            ("Command", shlex.join(map(str, command)) or MISSING),
            ("Run", scan.run_uuid or MISSING),
            ("Version", f"brainprior {scan.version}" if scan.version else MISSING),
            ("Input, SHA-256", scan.source_sha256 or MISSING),
            ("Prior", _card(scan.facts.restore.prior)),
            ("Parcellation network", _card(scan.facts.parcellation.weights)),
            *(
                (f"{file.uri}, SHA-256", str(file.sha256))
                for file in scan.facts.parcellation.given.values()
            ),
            ("Seed of the run", str(settings.get("random_seed", MISSING))),
            ("Seed of the scan", str(MISSING if scan.seed is None else scan.seed)),
            ("Fingerprint", scan.fingerprint or MISSING),
        ]
        if not scan.finished:  # it may have failed before the rest was known
            rows = [(name, value) for name, value in rows if value != MISSING]
        paths = [path for path in scan.outputs if path.startswith("prov/")]
        run = label(scan.run_uuid or "")
        shared = [f"prov/prov-{run}_soft.json", f"prov/prov-{run}_env.json"]
        paths += [path for path in shared if (output_dir / path).is_file()]
        packages |= _packages(output_dir, run)
        nodes = [
            {
                "name": node.node or MISSING,
                "seconds": _number(node.seconds, ".1f", none="–"),
                "memory": _number(node.peak_memory_gb, ".2f", none="–"),
                "threads": str(node.threads or "–"),
            }
            for node in scan.nodes
        ]
        views.append({"name": scan.scan, "rows": rows, "records": paths, "nodes": nodes})
    return _render("provenance.html.j2", scans=views, packages=sorted(packages.items()))


def _activity(output_dir: Path, scan: ScanRecord) -> Mapping[str, Any]:
    """The activity record of a scan, or else command and seed from the settings of its run."""
    for path in scan.outputs:
        if path.endswith("_act.json") and (output_dir / path).is_file():
            activities = read_json(output_dir / path).get("Activities") or [{}]
            return activities[0]
    path = output_dir / f"sub-{scan.subject}" / "log" / str(scan.run_uuid) / "brainprior.toml"
    try:
        settings = read_table(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {"Arguments": settings.get("command"), "Settings": settings}


def _packages(output_dir: Path, run: str) -> dict[str, str]:
    """Name -> version of the software that brainprior used, from the records of a run."""
    environment = output_dir / "prov" / f"prov-{run}_env.json"
    software = environment.with_name(f"prov-{run}_soft.json")
    if environment.is_file():
        (first, *_) = read_json(environment).get("Environments") or [{}]
        if "Dependencies" in first:
            return dict(first["Dependencies"])
    if not software.is_file():
        return {}
    (first, *_) = read_json(software).get("Software") or [{}]  # written by earlier versions
    return {"python": str(first.get("Python")), **(first.get("Packages") or {})}


def _card(weights: WeightsRecord) -> str:
    if weights == WeightsRecord.empty():
        return MISSING
    return f"{weights.name or 'unnamed'}, SHA-256 {weights.sha256 or MISSING}"


def _voxels(scan: ScanRecord) -> str:
    spacing = scan.facts.conform.facts.grid.spacing_mm
    return " × ".join(f"{size:.3g}" for size in spacing) or "–"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"


def _count(n: int | None, thing: str) -> str:
    return f"{'?' if n is None else n} {thing}{'' if n == 1 else 's'}"


def _number(
    value: float | None, spec: str, unit: str = "", *, scale: float = 1.0, none: str = MISSING
) -> str:
    return none if value is None else f"{value * scale:{spec}}{unit}"


def _render(template: str, **context: Any) -> str:
    """A fragment of the report, everything inserted escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(files("brainprior_bids") / "data" / "reports")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(**context)
