# SPDX-License-Identifier: Apache-2.0
"""What was measured of the embedded prior, in the words of the report.

``data/measured.json`` holds the figures and the SHA-256 of the weights that they are of
(docs/tasks/samples.md and docs/usage.md say how they were measured). Nothing is said of others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
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
    said = _by_scans(found["rows"], "of", lambda row: f"{row['50']} and {row['90']} %")
    text = (
        f"50 and 90 % intervals of a mean held the truth ({found['how']}; slices, noise): {said}."
    )
    kinds = {"contrast": restore.get("contrast"), "sampler": restore.get("sampler"), "task": task}
    other = [f"the {key} {kind}" for key, kind in kinds.items() if kind != found["of"][key]]
    if other:
        text += f" Not measured for {', '.join(other)}."
    return text


def lesions(restores: Iterable[Mapping[str, Any]]) -> str:
    """What is left of a lesion's contrast; empty if no result is of the embedded prior."""
    held = _measured()
    if not any((r.get("prior") or {}).get("sha256") == held["prior_sha256"] for r in restores):
        return ""
    found = held["lesions"]
    said = _by_scans(
        found["rows"], "size", lambda row: f"{100 * row['least']:.0f}-{100 * row['most']:.0f} %"
    )
    return f"A restored image keeps of a lesion's contrast ({found['how']}; slices): {said}."


def _by_scans(
    rows: Iterable[Mapping[str, Any]], key: str, said: Callable[[Mapping[str, Any]], str]
) -> str:
    """``4 mm across: 93 % (1 mm), 37 % (5 mm); 8 mm across: ...``, in the rows' order."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        parts.setdefault(row[key], []).append(f"{said(row)} ({row['scans']})")
    return "; ".join(f"{name}: {', '.join(values)}" for name, values in parts.items())
