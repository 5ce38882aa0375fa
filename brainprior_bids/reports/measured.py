# SPDX-License-Identifier: Apache-2.0
"""Measured performance of the embedded prior, worded for the report.

``data/measured.json`` holds the figures and the SHA-256 of the weights that they are of
(docs/tasks/samples.md and docs/usage.md say how they were measured). Nothing is said of others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from brainprior_bids.records import RestoreRecord


@cache
def _measured() -> dict[str, Any]:
    path = files("brainprior_bids") / "data" / "measured.json"
    measurements: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return measurements


def coverage(restore: RestoreRecord, *, task: str) -> str:
    """How often the intervals of such a result hold the truth.

    Parameters
    ----------
    restore : RestoreRecord
    task : str
        Of the scan's summary.
    """
    if restore.prior.coverage:  # stated in the header of the weights
        return restore.prior.coverage
    measurements = _measured()
    if restore.prior.sha256 != measurements["prior_sha256"]:
        return "not measured for these weights"
    study = measurements["coverage"]
    shares = _by_scans(study["rows"], "of", lambda row: f"{row['50']} and {row['90']} %")
    text = (
        f"50 and 90 % intervals of a mean held the truth ({study['how']}; slices, noise): "
        f"{shares}."
    )
    kinds = {"contrast": restore.contrast, "sampler": restore.sampler, "task": task}
    other = [f"the {key} {kind}" for key, kind in kinds.items() if kind != study["of"][key]]
    if restore.runs:
        other.append("fused runs")
    if other:
        text += f" Not measured for {', '.join(other)}."
    return text


def lesions(restores: Iterable[RestoreRecord]) -> str:
    """What is left of a lesion's contrast; empty if no result is of the embedded prior."""
    measurements = _measured()
    if all(restore.prior.sha256 != measurements["prior_sha256"] for restore in restores):
        return ""
    study = measurements["lesions"]
    shares = _by_scans(
        study["rows"], "size", lambda row: f"{100 * row['least']:.0f}-{100 * row['most']:.0f} %"
    )
    return f"A restored image keeps of a lesion's contrast ({study['how']}; slices): {shares}."


def _by_scans(
    rows: Iterable[Mapping[str, Any]], key: str, cell: Callable[[Mapping[str, Any]], str]
) -> str:
    """``4 mm across: 93 % (1 mm), 37 % (5 mm); 8 mm across: ...``, in the rows' order."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        parts.setdefault(row[key], []).append(f"{cell(row)} ({row['scans']})")
    return "; ".join(f"{name}: {', '.join(values)}" for name, values in parts.items())
