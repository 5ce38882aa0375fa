# SPDX-License-Identifier: Apache-2.0
"""Quality figures of a restored scan, and what they say: fine, or to be looked at.

The limits separate the usual from the unusual; they are no measurement of what is wrong, and a
scan inside all of them can still be wrong. They stand in one table, and every verdict names the
limit that was passed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One figure of a scan: what it is, and between which values it is usual."""

    description: str
    units: str = "arbitrary"
    low: float | None = None
    high: float | None = None


METRICS = {
    "misfit": Metric(
        "RMS of the scan minus what a sample predicts for it, over the noise expected before "
        "sampling; mean over samples. 1: explained down to the noise",
        "1", low=0.5, high=1.5,
    ),
    "noise_percent": Metric(
        "SD of the scan's noise after sampling, in per cent of the brain's 99th percentile",
        "percent", high=8.0,
    ),
    "mni305_residual_mm": Metric(
        "median distance between structure centres and where MNI305 has them", "mm", high=6.0
    ),
    "brain_ml": Metric("volume of all structures", "ml", low=700.0, high=2200.0),
    "confidence": Metric(
        "the parcellation network's confidence, mean over structures, weighted by volume",
        "1", low=0.5,
    ),
    "structures": Metric("structures found", "1", low=20),
    "asymmetry_percent": Metric(
        "difference of the hemispheres' volumes over their mean", "percent", high=15.0
    ),
    "thickness_mm": Metric("slice thickness that was used", "mm"),
    "in_plane_mm": Metric("larger of the scan's two in-plane voxel sizes", "mm"),
    "warnings": Metric("warnings of all steps", "1"),
    "seconds": Metric("time of all steps", "s"),
    "peak_memory_gb": Metric("largest memory of a step's process", "GiB"),
}  # fmt: skip


def metrics(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Every figure in ``METRICS`` from a finished scan's summary; None where not recorded."""
    facts = summary.get("facts") or {}
    restore = facts.get("restore") or {}
    conform = facts.get("conform") or {}
    acquisition = conform.get("acquisition") or {}
    table = (facts.get("parcellation") or {}).get("table") or []
    volumes = [row.get("volume_mm3") or 0.0 for row in table]
    total = sum(volumes)
    ratios = restore.get("residual_ratios") or []
    sides = {
        side: sum(row.get("volume_mm3") or 0.0 for row in table if row["name"].startswith(side))
        for side in ("Left-", "Right-")
    }
    mean_side = sum(sides.values()) / 2
    in_plane = ((conform.get("facts") or {}).get("acquisition") or {}).get("in_plane_mm")
    peaks = [node["peak_memory_gb"] for node in summary.get("nodes") or []]
    noise = restore.get("noise_sd")
    return {
        "misfit": statistics.mean(ratios) if ratios else None,
        "noise_percent": 100 * noise if noise is not None else None,
        "mni305_residual_mm": (facts.get("affine") or {}).get("median_residual_mm"),
        "brain_ml": total / 1000 if table else None,
        "confidence": (
            sum(v * (row.get("confidence") or 0.0) for v, row in zip(volumes, table, strict=True))
            / total
            if total
            else None
        ),
        "structures": len(table) or None,
        "asymmetry_percent": (
            100 * abs(sides["Left-"] - sides["Right-"]) / mean_side if mean_side else None
        ),
        "thickness_mm": acquisition.get("thickness_mm"),
        "in_plane_mm": max(in_plane) if in_plane else None,
        "warnings": len(summary.get("warnings") or []),
        "seconds": summary.get("seconds"),
        "peak_memory_gb": max(peaks, default=None),
    }


def concerns(values: Mapping[str, float | None]) -> list[str]:
    """The limits that a scan's figures pass, in words; none means that nothing stands out."""
    found = []
    for name, metric in METRICS.items():
        value = values.get(name)
        if value is None:
            continue
        if metric.low is not None and value < metric.low:
            found.append(f"{name} {value:.3g} is below {metric.low:g}")
        if metric.high is not None and value > metric.high:
            found.append(f"{name} {value:.3g} is above {metric.high:g}")
    return found
