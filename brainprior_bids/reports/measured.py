# SPDX-License-Identifier: Apache-2.0
"""What was measured of the embedded prior, in the words of the report.

``data/measured.json`` holds the figures and the SHA-256 of the weights that they are of
(docs/tasks/samples.md and docs/usage.md say how they were measured). Nothing is said of others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def _measured() -> dict[str, Any]:
    path = files("brainprior_bids") / "data" / "measured.json"
    held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return held


def coverage(restore: Mapping[str, Any], *, task: str) -> str:
    """How often the intervals of such a result hold the truth.

    Parameters
    ----------
    restore : mapping
        A scan's ``facts.restore``.
    task : str
        Of its summary.
    """
    prior = restore.get("prior") or {}
    if prior.get("coverage"):  # whoever made the weights says so in their header
        return str(prior["coverage"])
    held = _measured()
    if prior.get("sha256") != held["prior_sha256"]:
        return "not measured for these weights"
    found = held["coverage"]
    said = "; ".join(
        f"slices of {row['slices_mm']:g} mm, mean of {row['of']}: {row['50']} and {row['90']} %"
        for row in found["rows"]
    )
    text = f"50 and 90 % intervals held the truth ({found['how']}) in: {said}."
    kinds = {"contrast": restore.get("contrast"), "sampler": restore.get("sampler"), "task": task}
    other = [str(kind) for key, kind in kinds.items() if kind != found["of"][key]]
    if other:
        text += f" Not measured for {', '.join(other)}."
    return text


def lesions(restores: Iterable[Mapping[str, Any]]) -> str:
    """What is left of a lesion's contrast; empty if no result is of the embedded prior."""
    held = _measured()
    if not any((r.get("prior") or {}).get("sha256") == held["prior_sha256"] for r in restores):
        return ""
    found = held["lesions"]
    said = "; ".join(
        f"{row['diameter_mm']:g} mm across in slices of {row['slices_mm']:g} mm: "
        f"{row['least']:.0%} to {row['most']:.0%}"
        for row in found["rows"]
    )
    return f"Measured ({found['how']}), a restored image keeps of a lesion's contrast: {said}."
