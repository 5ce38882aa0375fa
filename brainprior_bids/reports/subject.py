# SPDX-License-Identifier: Apache-2.0
"""The report of one subject: what was done to each scan, its pictures, errors and provenance.

Everything is read from the output folder: the summaries ``logs/scans/<scan>.json``, the records
in ``prov/`` and the pictures in ``sub-XX/figures``. A value that a summary does not have reads
"not recorded".
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from brainprior_bids.bids.files import read_json
from brainprior_bids.bids.qc import concerns, metrics, relative_scores, verdict
from brainprior_bids.bids.status import FINISHED, read_summaries
from brainprior_bids.reports import atlas, measured
from brainprior_bids.reports.assembler import ScanSection, TextSection, assemble
from brainprior_bids.reports.methods import methods_text, of_summary, to_html

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
    scans = [s for s in read_summaries(output_dir) if str(s.get("subject")) == subject]
    finished = [s for s in scans if s.get("status") in FINISHED]
    records = {s["scan"]: _activity(output_dir, s) for s in scans}
    sections: list[TextSection | ScanSection] = [TextSection("Summary", _summary(scans))]
    sections += [ScanSection(s["scan"], _scan(s)) for s in finished]
    sections += [
        TextSection("Methods", _methods(finished)),
        TextSection("Errors", _errors(scans)),
        TextSection("Provenance", _provenance(output_dir, scans, records)),
    ]
    return assemble(
        output_dir / f"sub-{subject}.html",
        title=f"sub-{subject} · brainprior",
        subject=subject,
        sections=sections,
    )


def _summary(scans: Sequence[Mapping[str, Any]]) -> str:
    titles = ("Scan", "Status", "Quality", "Voxels (mm)", "Slices", "Sampler", "Misfit",
              "MNI305 (mm)", "Warnings", "Time", "Memory")  # fmt: skip
    numbers = {"Misfit", "MNI305 (mm)", "Warnings", "Time", "Memory"}
    rows = []
    for scan in scans:
        acquisition = _get(scan, "facts", "conform", "acquisition") or {}
        restore = _get(scan, "facts", "restore") or {}
        ratios = restore.get("residual_ratios") or []
        rows.append(
            {
                "name": scan["scan"],
                "status": scan.get("status", MISSING),
                "has_section": scan.get("status") in FINISHED,
                "cells": [
                    _quality(scan),
                    _voxels(scan),
                    _number(acquisition.get("thickness_mm"), ".3g", " mm", none="–"),
                    f"{restore['sampler']}, {_count(restore.get('n_samples', '?'), 'sample')}"
                    if restore.get("sampler")
                    else "–",
                    f"{statistics.mean(ratios):.2f}" if ratios else "–",
                    _number(_get(scan, "facts", "affine", "median_residual_mm"), ".1f", none="–"),
                    str(len(scan.get("warnings") or [])),
                    _duration(scan.get("seconds")),
                    _number(_peak(scan), ".1f", " GB", none="–"),
                ],
            }
        )
    return _render(
        "summary.html.j2",
        scans=rows,
        failed=sum(scan.get("status") == "failed" for scan in scans),
        lesions=measured.lesions(_get(scan, "facts", "restore") or {} for scan in scans),
        columns=[{"title": title, "number": title in numbers} for title in titles],
    )


def _quality(scan: Mapping[str, Any]) -> str:
    if scan.get("status") not in FINISHED:
        return "–"
    return verdict(metrics(scan))


def _scan(scan: Mapping[str, Any]) -> str:
    groups = [
        ("Input", _input_rows(scan)),
        ("Restoration", _restore_rows(scan)),
        ("Anatomy", _anatomy_rows(scan)),
        ("Run", _run_rows(scan)),
    ]
    return _render(
        "scan.html.j2",
        warnings=scan.get("warnings") or [],
        verdict=verdict(metrics(scan)),
        concerns=concerns(metrics(scan)),
        groups=groups,
        structures=_structures(scan),
    )


def _input_rows(scan: Mapping[str, Any]) -> Rows:
    conform = _get(scan, "facts", "conform") or {}
    acquisition = conform.get("acquisition") or {}
    stated = _get(conform, "facts", "acquisition") or {}
    axis = acquisition.get("slice_axis")
    thickness = _number(acquisition.get("thickness_mm"), ".3g", " mm")
    if stated.get("thickness_source"):
        thickness += f" (from: {stated['thickness_source']})"
    gap = stated.get("gap_mm")
    gap = gap if gap is None else round(gap, 3)  # 2e-07 is the header's rounding
    field_strength = _get(stated, "metadata", "MagneticFieldStrength")
    return [
        ("File", str(scan.get("source") or MISSING)),
        ("Stored orientation", _orientation(scan)),
        ("Voxel size", f"{_voxels(scan)} mm"),
        ("Grid", " × ".join(map(str, _get(conform, "facts", "grid", "shape") or [])) or MISSING),
        (
            "Tilt of the scan's axes",
            _number(_get(conform, "facts", "grid", "rotation_from_axes_deg"), ".1f", "°"),
        ),
        ("Slices follow", _sliced(axis, stated.get("slice_axis_source"))),
        ("Slice thickness", thickness),
        ("Gap between slices", _number(gap, ".3g", " mm")),
        ("Slice profile", str(acquisition.get("profile") or MISSING)),
        ("Field strength", _number(field_strength, "g", " T")),
    ]


def _sliced(axis: Any, source: str | None) -> str:
    if axis not in (0, 1, 2):
        return MISSING
    return AXES[axis] + (f" (from: {source})" if source else "")


def _restore_rows(scan: Mapping[str, Any]) -> Rows:
    restore = _get(scan, "facts", "restore") or {}
    unit = restore.get("unit")
    ratios = restore.get("residual_ratios") or []
    final = restore.get("residual_ratios_final") or []
    schedule = restore.get("schedule") or []

    def noise(key: str) -> str:
        if restore.get(key) is None:
            return MISSING
        text = f"{restore[key]:.4f} of the brain's 99th percentile"
        return text + (f", {restore[key] * unit:.3g} in scanner units" if unit else "")

    contrast = str(restore.get("contrast") or MISSING)
    if contrast == "unknown":
        contrast += ": outside of the contrasts that the prior was trained on"
    return [
        ("Taken for", contrast),
        *_fused_rows(restore),
        ("Sampler", str(restore.get("sampler") or MISSING)),
        ("Samples", str(restore.get("n_samples") or MISSING)),
        (
            "Noise levels",
            f"{len(schedule)}, from {max(schedule):.3g} to {min(schedule):.3g}"
            if schedule
            else MISSING,
        ),
        ("Network calls a sample", str(restore.get("calls") or MISSING)),
        ("Noise before sampling", noise("noise_sd_initial")),
        ("Noise after sampling", noise("noise_sd")),
        ("Misfit of each sample", ", ".join(f"{r:.2f}" for r in ratios) or MISSING),
        ("Misfit by the noise after sampling", ", ".join(f"{r:.2f}" for r in final) or MISSING),
        ("Correlation of its neighbours", _correlation(restore)),
        ("Prior", str(_get(restore, "prior", "name") or MISSING)),
        (
            "Coverage of its intervals",
            measured.coverage(restore, task=str(scan.get("task") or "restore")),
        ),
        ("Seed", str(scan.get("seed") if scan.get("seed") is not None else MISSING)),
    ]


def _fused_rows(restore: Mapping[str, Any]) -> Rows:
    """One row a run that was fused; none for a scan of its own."""
    rows = []
    for run in restore.get("runs") or []:
        thickness = _number(_get(run, "acquisition", "thickness_mm"), ".3g", " mm")
        axis = _get(run, "acquisition", "slice_axis")
        text = f"slices of {thickness} {AXES[axis] if axis in (0, 1, 2) else MISSING}"
        text += f", noise {run['noise_sd']:.4f}"
        text += f", misfit {', '.join(f'{r:.2f}' for r in run.get('residual_ratios') or [])}"
        if run.get("correlation") is not None:
            text += (
                f"; laid on the first by {run['angle_deg']:.1f}° and {run['shift_mm']:.1f} mm at "
                f"its middle, correlation {run['correlation']:.2f}"
            )
        rows.append((f"Run {run['name']}", text))
    return rows


def _correlation(restore: Mapping[str, Any]) -> str:
    """Lag-one correlation of the residual along each axis, mean over the samples."""
    samples = restore.get("residual_correlation") or []
    means = [statistics.mean(values) for values in zip(*samples, strict=True)]
    return ", ".join(f"{m:.2f} {axis}" for m, axis in zip(means, AXES, strict=False)) or MISSING


def _anatomy_rows(scan: Mapping[str, Any]) -> Rows:
    affine = _get(scan, "facts", "affine") or {}
    table = _get(scan, "facts", "parcellation", "table") or []
    volume = sum(row.get("volume_mm3") or 0 for row in table)
    used = affine.get("used")
    return [
        ("Brain mask from", _source(scan, "mask")),
        ("Structures from", _source(scan, "structures")),
        ("Structures found", str(len(table) or MISSING)),
        ("Their volume", f"{volume / 1000:.0f} ml" if volume else MISSING),
        ("Transform to MNI305", f"{affine['dof']} parameters" if affine.get("dof") else MISSING),
        ("Found from", str(affine.get("method") or MISSING)),
        ("Structures used for it", str(len(used)) if used else MISSING),
        ("Median distance", _number(affine.get("median_residual_mm"), ".1f", " mm")),
    ]


def _source(scan: Mapping[str, Any], what: str) -> str:
    source = str(_get(scan, "facts", "parcellation", f"{what}_source") or MISSING)
    return "the embedded network" if source == "embedded" else source


def _run_rows(scan: Mapping[str, Any]) -> Rows:
    environment = _get(scan, "facts", "restore", "environment") or {}
    device = environment.get("gpu") or environment.get("processor")
    return [
        ("Status", str(scan.get("status") or MISSING)),
        ("Device", f"{environment['device']} ({device})" if device else MISSING),
        ("Threads", str(environment.get("threads") or MISSING)),
        ("Time", _duration(scan.get("seconds"))),
        ("Time of the restoration", _duration(_get(scan, "facts", "restore", "seconds"))),
        ("Peak memory", _number(_peak(scan), ".1f", " GB")),
    ]


def _structures(scan: Mapping[str, Any]) -> list[dict[str, str]]:
    table = _get(scan, "facts", "parcellation", "table") or []
    distance = _get(scan, "facts", "affine", "residuals_mm") or {}
    scores = relative_scores(table)
    sure = _get(scan, "facts", "parcellation", "structures_source") in (None, "embedded")
    rows = []
    for row in table:
        name = atlas.name(int(row["index"]))
        rows.append(
            {
                "name": name,
                "index": str(row["index"]),
                "volume": _number(row.get("volume_mm3"), ".1f", scale=1e-3, none="–"),
                "score": _number(scores.get(row["name"]), "+.1f", none="–"),
                "confidence": _number(row.get("confidence") if sure else None, ".2f", none="–"),
                "distance": _number(distance.get(name), ".1f", none="–"),
            }
        )
    return rows


def _errors(scans: Sequence[Mapping[str, Any]]) -> str:
    errors = []
    for scan in scans:
        if scan.get("status") != "failed":
            continue
        error = scan.get("error") or {}
        errors.append(
            {
                "scan": scan["scan"],
                "node": error.get("node"),
                "type": error.get("type"),
                "message": error.get("message") or scan.get("message") or MISSING,
                "crash_file": error.get("crash_file"),
                "warnings": scan.get("warnings") or [],
            }
        )
    return _render("errors.html.j2", errors=errors)


def _methods(scans: Sequence[Mapping[str, Any]]) -> str:
    if not scans:
        return "<p>No scan of this participant was restored.</p>"
    intro = (
        '<p class="muted">This text states what was done here; copy it into a paper, with the '
        "references. For all participants, and with BibTeX: logs/CITATION.md.</p>"
    )
    return intro + to_html(methods_text([of_summary(scan) for scan in scans]))


def _provenance(
    output_dir: Path,
    scans: Sequence[Mapping[str, Any]],
    records: Mapping[str, Mapping[str, Any]],
) -> str:
    views = []
    packages: dict[str, str] = {}
    for scan in scans:
        activity = records[scan["scan"]]
        command = activity.get("Arguments") or scan.get("command") or []
        rows = [
            ("Command", shlex.join(map(str, command)) or MISSING),
            ("Run", str(scan.get("run_uuid") or MISSING)),
            ("Version", f"brainprior {scan.get('version') or MISSING}"),
            ("Input, SHA-256", str(scan.get("source_sha256") or MISSING)),
            ("Prior", _card(_get(scan, "facts", "restore", "prior"))),
            ("Parcellation network", _card(_get(scan, "facts", "parcellation", "weights"))),
            *(
                (f"{file['uri']}, SHA-256", str(file["sha256"]))
                for file in (_get(scan, "facts", "parcellation", "given") or {}).values()
            ),
            ("Seed of the run", str(_get(activity, "Settings", "random_seed", none=MISSING))),
            ("Seed of the scan", str(scan.get("seed", MISSING))),
            ("Fingerprint", str(scan.get("fingerprint") or MISSING)),
        ]
        paths = [p for p in scan.get("outputs") or [] if str(p).startswith("prov/")]
        run = "".join(c for c in str(scan.get("run_uuid") or "") if c.isalnum())
        shared = [f"prov/prov-{run}_soft.json", f"prov/prov-{run}_env.json"]
        paths += [path for path in shared if (output_dir / path).is_file()]
        packages |= _packages(output_dir / shared[0])
        nodes = [
            {
                "name": str(node.get("node") or node.get("name") or MISSING),
                "seconds": _number(node.get("seconds"), ".1f", none="–"),
                "memory": _number(node.get("peak_memory_gb"), ".2f", none="–"),
                "threads": str(node.get("threads", "–")),
            }
            for node in scan.get("nodes") or []
        ]
        views.append({"name": scan["scan"], "rows": rows, "records": paths, "nodes": nodes})
    return _render("provenance.html.j2", scans=views, packages=sorted(packages.items()))


def _activity(output_dir: Path, scan: Mapping[str, Any]) -> Mapping[str, Any]:
    """The activity record of a scan; empty where there is none."""
    for path in scan.get("outputs") or []:
        if str(path).endswith("_act.json") and (output_dir / path).is_file():
            activities = read_json(output_dir / path).get("Activities") or [{}]
            return activities[0]
    return {}


def _packages(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    software = read_json(path).get("Software") or [{}]
    return {"Python": str(software[0].get("Python")), **(software[0].get("Packages") or {})}


def _card(card: Mapping[str, Any] | None) -> str:
    if not card:
        return MISSING
    return f"{card.get('name') or 'unnamed'}, SHA-256 {card.get('sha256') or MISSING}"


def _voxels(scan: Mapping[str, Any]) -> str:
    spacing = _get(scan, "facts", "conform", "facts", "grid", "spacing_mm")
    return " × ".join(f"{size:.3g}" for size in spacing) if spacing else "–"


def _orientation(scan: Mapping[str, Any]) -> str:
    original = _get(scan, "facts", "conform", "facts", "original") or {}
    return str(original.get("axis_codes") or MISSING)


def _peak(scan: Mapping[str, Any]) -> float | None:
    """Largest peak memory of a scan's nodes, GB."""
    peaks = [node.get("peak_memory_gb") for node in scan.get("nodes") or []]
    return max((peak for peak in peaks if peak is not None), default=None)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"


def _count(n: Any, thing: str) -> str:
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def _number(
    value: float | None, spec: str, unit: str = "", *, scale: float = 1.0, none: str = MISSING
) -> str:
    if not isinstance(value, (int, float)):
        return none
    return f"{value * scale:{spec}}{unit}"


def _get(value: Any, *keys: str, none: Any = None) -> Any:
    """``value[k1][k2]…``, or ``none`` as soon as one is missing."""
    for key in keys:
        if not isinstance(value, Mapping) or value.get(key) is None:
            return none
        value = value[key]
    return value


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
