# SPDX-License-Identifier: Apache-2.0
"""Quality metrics of a restored scan, and a verdict: pass, look, or fail.

The limits mark unusual values; they were set by judgement, and a scan within all of them can be
wrong (docs/models/parcellation.md reports their performance where it could be measured). They are
in one table, and every verdict lists the limits that were exceeded.

Volumes are compared with those of 54 participants (``data/volumes.json``): z is the distance of a
volume's logarithm from their mean, in their SDs.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from brainprior_bids.anatomy.contrasts import ALIKE
from brainprior_bids.anatomy.slices import FAINTEST, LARGEST_MISMATCH
from brainprior_bids.anatomy.tissue_metrics import RATIOS
from brainprior_bids.bids.files import write_text
from brainprior_bids.bids.status import read_summaries
from brainprior_bids.records import (
    AffineMethod,
    AffineRecord,
    BiasRecord,
    ParcellationRecord,
    ScanRecord,
    StructureRecord,
    TissuesRecord,
)

UNCERTAIN = ("CSF", "Left-Inf-Lat-Vent", "Right-Inf-Lat-Vent")
"""Parts too thin for a network at 2 mm: their volumes and confidence are not used."""
VERDICTS = ("pass", "look", "fail")


@dataclass(frozen=True)
class Metric:
    """One metric of a scan: its meaning, its usual range, and the range outside which it fails."""

    description: str
    units: str = "arbitrary"
    low: float | None = None
    high: float | None = None
    fail_low: float | None = None
    fail_high: float | None = None


METRICS = {
    "residual": Metric(
        "RMS of the scan minus its prediction, in SDs of the noise as first estimated. The "
        "prediction is that of each sample (then the mean over samples), or of the posterior mean "
        "if no samples were drawn. 1: explained down to the noise",
        "1", low=0.5, high=1.5, fail_high=4.0,
    ),
    "inconsistent_percent": Metric(
        "share of the scan's brain voxels that differ from their prediction by more than three "
        "SDs of the noise (white noise alone: 0.3)", "percent", high=10.0,
    ),
    "noise_percent": Metric(
        "final estimate of the SD of the scan's noise, in per cent of the brain's 99th percentile",
        "percent", high=8.0,
    ),
    "mni305_residual_mm": Metric(
        "median distance of structure centroids from their expected positions in MNI305", "mm",
        high=5.0, fail_high=9.0,
    ),
    "affine_fallbacks": Metric(
        "fallbacks of the affine to MNI305: 1 for 7 degrees of freedom, 2 for 6 (the distances of "
        "so few structures are no check), 1 for registration to the template", "1",
        high=0.0, fail_high=1.0,
    ),
    "mirrored_forms": Metric(
        "1 if sform and qform of the scan's header are mirror images of each other, so that left "
        "and right may be exchanged", "1", high=0.0,
    ),
    "brain_ml": Metric("volume of the mask: all structures and the fluid between", "ml"),
    "brain_z": Metric(
        "z-score of that volume; none if the field of view cuts the brain", "SD",
        low=-4.0, high=4.0, fail_low=-6.0, fail_high=6.0,
    ),
    "structure_z": Metric(
        "z-score of the structure whose share of the brain is most unusual; none if the field of "
        "view cuts the brain", "SD", low=-5.0, high=5.0,
    ),
    "cut_cm2": Metric("area of the mask on the border of the field of view", "cm2", high=10.0),
    "mask_agreement": Metric(
        "Dice of a supplied mask with the embedded network's", "1", low=0.85, fail_low=0.5
    ),
    "confidence": Metric(
        "the parcellation network's confidence, mean over structures, weighted by volume",
        "1", low=0.55, fail_low=0.5,
    ),
    "lowest_confidence": Metric(
        "its confidence in the least certain structure; thin parts are left out", "1", low=0.4
    ),
    "structures": Metric("structures found", "1", low=28, fail_low=12),
    "slice_mismatch": Metric(
        "difference of slices from the mean of their neighbours, over the difference of these "
        "neighbours: motion or gain between slices", "1", high=LARGEST_MISMATCH,
    ),
    "faintest_slice": Metric(
        "brightness of the faintest slice relative to its neighbours: a lost slice", "1",
        low=FAINTEST,
    ),
    "slice_gain_alternation": Metric(
        "half of the difference in log brightness between even and odd slices of a 2-D scan, as "
        "estimated before it was corrected", "percent", high=2.0,
    ),
    "interleave_motion_mm": Metric(
        "largest RMS displacement in the brain between two interleaves of a 2-D scan, where it is "
        "large and certain; otherwise 0", "mm", high=0.0,
    ),
    "asymmetry_percent": Metric(
        "difference of the hemispheres' volumes over their mean", "percent", high=15.0
    ),
    "bias_range": Metric(
        "99th over 1st percentile of the bias field inside the brain", "1", high=4.0
    ),
    "interpolation": Metric(
        "size of the measured voxels over that of the stored ones, along the axis where it is "
        "largest: above 1, the scan was interpolated", "1", high=1.35,
    ),
    "same_label": Metric(
        "share of the voxels in both brains that have one label after the registration to the "
        "session's reference contrast; none for the reference itself", "1", low=ALIKE,
    ),
    "thickness_mm": Metric("slice thickness that was used", "mm"),
    "in_plane_mm": Metric("larger of the scan's two in-plane voxel sizes", "mm"),
    "warnings": Metric("warnings of all steps", "1"),
    "seconds": Metric("time of all steps", "s"),
    "peak_memory_gb": Metric("largest memory of a step's process", "GiB"),
}  # fmt: skip


def metrics(summary: ScanRecord) -> dict[str, float | None]:
    """Every metric in ``METRICS`` from a finished scan's summary; None if not recorded."""
    steps = summary.facts
    restore, conform = steps.restore, steps.conform
    in_plane = conform.facts.acquisition.in_plane_mm
    mirrored = conform.facts.affine.sform_qform_mirrored
    ratios, noise, beyond = restore.residual_ratios, restore.noise_sd, restore.share_beyond_3_sd
    return {
        "residual": statistics.mean(ratios) if ratios else None,
        "inconsistent_percent": None if beyond is None else 100 * beyond,
        "noise_percent": None if noise is None else 100 * noise,
        "mni305_residual_mm": steps.affine.median_residual_mm,
        "affine_fallbacks": _fallbacks(steps.affine),
        "mirrored_forms": None if mirrored is None else float(mirrored),
        **_anatomy(steps.parcellation),
        "slice_gain_alternation": _alternation(steps.bias),
        "interleave_motion_mm": _interleave_motion(steps.bias),
        "bias_range": restore.bias_range,
        "interpolation": conform.facts.resolution.factor,
        "same_label": None if steps.alignment is None else steps.alignment.alike,
        "thickness_mm": conform.acquisition.thickness_mm,
        "in_plane_mm": max(in_plane, default=None),
        "warnings": len(summary.warnings),
        "seconds": summary.seconds,
        "peak_memory_gb": summary.peak_memory_gb,
    }


def _alternation(bias: BiasRecord | None) -> float | None:
    """Size of the alternation, in per cent; None if it was not estimated."""
    if bias is None or bias.alternation_percent is None:
        return None
    return abs(bias.alternation_percent)


def _interleave_motion(bias: BiasRecord | None) -> float | None:
    """The estimated motion; None if it was not estimated."""
    if bias is None or bias.interleaves is None:
        return None
    return bias.interleaves.rms_mm if bias.interleaves.moved else 0.0


def _fallbacks(affine: AffineRecord) -> int | None:
    """The number of fallbacks from the usual affine: 12 degrees of freedom, from structures."""
    if affine.dof is None:
        return None
    return {12: 0, 7: 1, 6: 2}[affine.dof] + (affine.method is not AffineMethod.STRUCTURES)


def _anatomy(parcellation: ParcellationRecord) -> dict[str, float | None]:
    """Metrics of mask and structures."""
    values = dict.fromkeys(
        ("brain_ml", "brain_z", "structure_z", "cut_cm2", "mask_agreement", "confidence",
         "lowest_confidence", "structures", "slice_mismatch", "faintest_slice",
         "asymmetry_percent"), None,
    )  # type: dict[str, float | None] # fmt: skip
    values["mask_agreement"] = parcellation.mask_agreement
    if parcellation.slices is not None:
        values["slice_mismatch"] = parcellation.slices.mismatch
        values["faintest_slice"] = parcellation.slices.faintest
    table = parcellation.table
    volumes = [row.volume_mm3 or 0.0 for row in table]
    total = sum(volumes)
    if total <= 0:
        return values
    # cut_share is the area on the border over volume^(2/3)
    cut_mm2 = sum(
        (row.cut_share or 0.0) * volume ** (2 / 3)
        for row, volume in zip(table, volumes, strict=True)
    )
    values.update(brain_ml=total / 1000, cut_cm2=cut_mm2 / 100, structures=len(table))
    limit = METRICS["cut_cm2"].high
    if limit is None or cut_mm2 / 100 <= limit:
        values["brain_z"] = z_score("Brain", total)
        values["structure_z"] = max(relative_scores(table).values(), key=abs, default=None)
    sides = [
        sum(v for row, v in zip(table, volumes, strict=True) if row.name.startswith(side))
        for side in ("Left-", "Right-")
    ]
    if sum(sides):
        values["asymmetry_percent"] = 200 * abs(sides[0] - sides[1]) / sum(sides)
    if parcellation.structures_origin.embedded:
        confidences = [row.confidence or 0.0 for row in table]
        values["confidence"] = (
            sum(v * c for v, c in zip(volumes, confidences, strict=True)) / total
        )
        values["lowest_confidence"] = min(
            (c for row, c in zip(table, confidences, strict=True) if row.name not in UNCERTAIN),
            default=None,
        )
    return values


@cache
def reference() -> dict[str, dict[str, float]]:
    """Structure -> mean and SD, over the reference participants, of its log volume in mm3.

    ``Brain`` is the whole mask. Made by ``brainprior_bids.training.volumes``.
    """
    text = (files("brainprior_bids") / "data" / "volumes.json").read_text("utf-8")
    volumes: dict[str, dict[str, float]] = json.loads(text)["volumes"]
    return volumes


def z_score(name: str, volume_mm3: float) -> float | None:
    """How unusual a volume is, in SDs; None for an unknown structure or an empty one."""
    known = reference().get(name)
    if known is None or volume_mm3 <= 0:
        return None
    return (math.log(volume_mm3) - known["log_mean"]) / known["log_sd"]


def relative_scores(table: Sequence[StructureRecord]) -> dict[str, float]:
    """Structure -> how unusual its share of the brain is, in SDs of its volume; no thin parts.

    A large brain has large structures, so the brain's own deviation is subtracted first.
    """
    total = sum(row.volume_mm3 or 0.0 for row in table)
    if total <= 0:
        return {}
    deviation = math.log(total) - reference()["Brain"]["log_mean"]
    scores = {}
    for row in table:
        score = z_score(row.name, (row.volume_mm3 or 0.0) / math.exp(deviation))
        if score is not None and row.name not in UNCERTAIN:
            scores[row.name] = score
    return scores


def reasons(values: Mapping[str, float | None]) -> list[str]:
    """The metrics that exceed a limit, as text; empty if none does."""
    return [text for _, text in _exceeded(values)]


def verdict(values: Mapping[str, float | None]) -> str:
    """``pass``; ``look``: a metric is unusual; ``fail``: one exceeds its limit for failure."""
    return VERDICTS[max((level for level, _ in _exceeded(values)), default=0)]


def _exceeded(values: Mapping[str, float | None]) -> list[tuple[int, str]]:
    """1 (look) or 2 (fail) and the limit, for every metric that exceeds one."""
    limits = []
    for name, metric in METRICS.items():
        value = values.get(name)
        if value is None:
            continue
        for level, low, high in (
            (2, metric.fail_low, metric.fail_high),
            (1, metric.low, metric.high),
        ):
            if low is not None and value < low:
                limits.append((level, f"{name} {_apart(value, low)} is below {low:g}"))
                break
            if high is not None and value > high:
                limits.append((level, f"{name} {_apart(value, high)} is above {high:g}"))
                break
    return limits


def _apart(value: float, limit: float) -> str:
    """A value in three digits, or in as many more as tell it from the limit."""
    texts = (f"{value:.{digits}g}" for digits in range(3, 18))
    return next((text for text in texts if float(text) != limit), repr(value))


def rebuild_qc(output_dir: Path) -> Path:
    """Write ``logs/qc.tsv``: verdict, reasons, metrics and volumes of every finished scan."""
    names = [name for name in reference() if name != "Brain"]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(
        [
            *("bids_name", "source", "verdict", "reasons"),
            *METRICS,
            *(f"{name}_{image}" for image in ("input", "restored") for name in RATIOS),
            *(f"{name}_mm3" for name in names),
        ]
    )
    for summary in read_summaries(output_dir):
        if not summary.finished:
            continue
        values = metrics(summary)
        volumes = {row.name: row.volume_mm3 for row in summary.facts.parcellation.table}
        tissues = summary.facts.tissues or TissuesRecord.empty()
        cells = [
            *(values[name] for name in METRICS),
            *(image.get(name) for image in (tissues.input, tissues.restored) for name in RATIOS),
            *(volumes.get(name) for name in names),
        ]
        writer.writerow(
            [
                summary.scan,
                summary.source or "n/a",
                verdict(values),
                "; ".join(reasons(values)) or "n/a",
                *("n/a" if value is None else f"{value:.6g}" for value in cells),
            ]
        )
    return write_text(output_dir / "logs" / "qc.tsv", stream.getvalue())
