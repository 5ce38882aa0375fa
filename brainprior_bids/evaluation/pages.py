# SPDX-License-Identifier: Apache-2.0
"""Write results of studies for documentation and reports: tables and ``data/measured.json``.

Each table is a file with its stamp, the caption and the study's own text, which pages include.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from brainprior_bids.bids.files import read_json, write_text
from brainprior_bids.engine.errors import UsageError
from brainprior_bids.evaluation import plots
from brainprior_bids.evaluation.stamp import DIGITS, KINDS, MEASURED, Stamp, joined
from brainprior_bids.evaluation.studies import STUDIES, find
from brainprior_bids.evaluation.summary import Record


def write_pages(
    records: Sequence[Record], docs: Path, *, command: str, day: str, nprocs: int = 1
) -> list[Path]:
    """Write ``docs/tables/STUDY.md`` and the plot of every study, and what reports quote.

    Parameters
    ----------
    records : sequence
        Of one prior, and of one parcellation.
    docs : Path
        Folder of the pages; created if missing. In a checkout, the studies' parts of the
        package's ``data/measured.json`` are replaced too.
    command, day : str
        As in ``Stamp``.
    nprocs : int
        ``processes`` of the stamps.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    UsageError
        If the records of a network are from more than one file of weights.
    """
    weights = {kind: _weights(records, kind) for kind in KINDS}
    paths = []
    measured = docs.absolute().parent / MEASURED
    parts = read_json(measured) if measured.is_file() else None
    for name in STUDIES:
        part = [r for r in records if r["study"] == name and not r.get("choosing")]
        validation = [r for r in records if r["study"] == name and r.get("choosing")]
        if not part:
            continue
        study = find(name)
        networks = [
            kind for kind in KINDS if any(f"{kind}_sha256" in r for r in [*part, *validation])
        ]
        participants, maps = (
            len({r["participant"] for r in part if r["synthetic"] is synthetic})
            for synthetic in (False, True)
        )
        stamp = Stamp(
            joined(weights[kind][:DIGITS] for kind in networks), day, participants, maps,
            command, joined(networks), _minutes([*part, *validation]), nprocs,
        )  # fmt: skip
        text = [stamp.line(), "", stamp.caption(), "", *study.table(part, validation)]
        paths.append(docs / "tables" / f"{name}.md")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_text("\n".join(text).strip() + "\n", encoding="utf-8")
        if study.plot is not None:
            figure = docs / "images" / f"evaluation-{name}.png"
            paths.append(plots.save(study.plot(part), figure, stamp.caption().partition(":")[0]))
        if parts is not None and study.measured is not None:
            parts[name] = {"prior_sha256": weights["prior"], **study.measured(part, validation)}
            paths.append(measured)
    if measured in paths:
        write_text(measured, json.dumps(parts, indent=2) + "\n")
    return paths


def _weights(records: Sequence[Record], kind: str) -> str:
    """The SHA-256 of a network's weights, "" if no record depends on it."""
    found = sorted({r[f"{kind}_sha256"] for r in records if f"{kind}_sha256" in r})
    if len(found) > 1:
        shown = ", ".join(sha256[:DIGITS] for sha256 in found)
        raise UsageError(
            f"evaluate: expected results of one {kind} for --tables, got {shown}. "
            "Run the command again without --tables-only."
        )
    return "".join(found)


def _minutes(records: Sequence[Record]) -> float | None:
    """Processor time of the cases; None if it is missing in one."""
    seconds = [r.get("case_processor_seconds") for r in records]
    known = [value for value in seconds if value is not None]
    return round(sum(known) / 60, 1) if len(known) == len(seconds) else None
