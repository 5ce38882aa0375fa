# SPDX-License-Identifier: Apache-2.0
"""Measured performance of the embedded prior, as sentences for the report.

``data/measured.json`` has the values of each study and the SHA-256 of the weights for which they
were measured (``brainprior evaluate --study coverage lesions --tables docs`` writes it;
docs/tasks/samples.md and docs/usage.md describe how). For other weights nothing is reported.
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
    """How often the intervals of a result like this one contain the true value.

    Parameters
    ----------
    restore : RestoreRecord
    task : str
        The task in the scan's summary.
    """
    if restore.prior.coverage:  # stated in the header of the weights
        return restore.prior.coverage
    study = _measured()["coverage"]
    if restore.prior.sha256 != study["prior_sha256"]:
        return "not measured for these weights"
    shares = _by_scans(study["rows"], "of", lambda row: f"{row['50']} and {row['90']} %")
    text = (
        "share of the 50 and 90 % intervals of a regional mean that contained the true value "
        f"({study['how']}; in brackets: slices, noise): {shares}."
    )
    kinds = {"contrast": restore.contrast, "sampler": restore.sampler, "task": task}
    other = [f"the {key} {kind}" for key, kind in kinds.items() if kind != study["of"][key]]
    if restore.runs:
        other.append("fused runs")
    if other:
        text += f" Not measured for {', '.join(other)}."
    return text


def lesions(restores: Iterable[RestoreRecord]) -> str:
    """How much of a lesion's contrast remains; empty if no result is from the embedded prior."""
    study = _measured()["lesions"]
    if all(restore.prior.sha256 != study["prior_sha256"] for restore in restores):
        return ""
    shares = _by_scans(
        study["rows"], "size", lambda row: f"{100 * row['least']:.0f}-{100 * row['most']:.0f} %"
    )
    return (
        f"Share of a lesion's contrast that a restored image keeps ({study['how']}; in brackets: "
        f"slices): {shares}."
    )


def _by_scans(
    rows: Iterable[Mapping[str, Any]], key: str, cell: Callable[[Mapping[str, Any]], str]
) -> str:
    """``4 mm across: 93 % (1 mm), 37 % (5 mm); 8 mm across: ...``, in the rows' order."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        parts.setdefault(row[key], []).append(f"{cell(row)} ({row['scans']})")
    return "; ".join(f"{name}: {', '.join(values)}" for name, values in parts.items())
