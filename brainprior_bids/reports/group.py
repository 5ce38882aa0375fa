# SPDX-License-Identifier: Apache-2.0
"""The group level: one table per contrast and task, and one page of all scans.

Only the summaries in ``logs/scans`` are read, no image.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from brainprior_bids import __version__
from brainprior_bids.bids.files import write_json, write_text
from brainprior_bids.bids.names import BIDSName
from brainprior_bids.bids.qc import METRICS, VERDICTS, Metric, metrics, reasons, verdict
from brainprior_bids.bids.status import read_summaries
from brainprior_bids.records import unnamed

OUTLIER = 3.5
"""Robust z-score beyond which a metric is an outlier among the scans of its contrast."""
FEWEST = 8
"""Fewest scans of a contrast for which outliers are marked."""
FEWEST_IN_BOX = 4
"""Fewest scans for which quartiles are drawn: of fewer they would be the extremes."""
WIDTH, HEIGHT = 460, 46


def build_group(output_dir: Path) -> list[Path]:
    """Write ``group_<suffix>.tsv`` with its ``.json``, and ``group.html``.

    The results of tasks other than restoration have separate tables
    (``group_desc-inpainted_T1w.tsv``), because their metrics exclude the masked voxels.

    Returns
    -------
    The files; none if no scan is finished.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    failed = []
    for summary in read_summaries(output_dir):
        if not summary.finished:
            message = unnamed(summary.message, summary.scan)
            report = summary.subject and f"sub-{summary.subject}.html#Errors"
            failed.append({"scan": summary.scan, "message": message, "report": report})
            continue
        values = metrics(summary)
        name = BIDSName.parse(f"{summary.scan}.nii.gz")
        suffix = f"desc-{name.get('desc')}_{name.suffix}" if name.get("desc") else name.suffix
        row = {"bids_name": summary.scan, "subject": summary.subject, **values}
        row |= {"verdict": verdict(values), "reasons": reasons(values)}
        row["report"] = f"sub-{summary.subject}.html#{summary.scan}"
        rows.setdefault(suffix, []).append(row)
    if not rows:
        return []
    written = []
    groups = []
    for suffix, scans in sorted(rows.items()):
        scores = robust_scores(scans)
        for scan, score in zip(scans, scores, strict=True):
            scan["outlier"] = [name for name, z in score.items() if abs(z) > OUTLIER]
        written.append(write_text(output_dir / f"group_{suffix}.tsv", _tsv(scans)))
        written.append(write_json(output_dir / f"group_{suffix}.json", _sidecar()))
        groups.append(_view(suffix, scans))
    strips = [figure["strip"] for group in groups for figure in group["figures"]]
    page = _template().render(
        groups=groups,
        failed=failed,
        version=__version__,
        plots=bool(strips),
        boxes=any(strip["box"] for strip in strips),
    )
    return [*written, write_text(output_dir / "group.html", page)]


def robust_scores(scans: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Distance of each metric from the median, over 1.4826 times the median absolute deviation.

    Returns
    -------
    One mapping per scan. Metrics are left out if they are missing, if all scans have the same
    value, or if fewer than ``FEWEST`` scans have one.
    """
    scores: list[dict[str, float]] = [{} for _ in scans]
    for name in METRICS:
        known = [scan[name] for scan in scans if scan[name] is not None]
        if len(known) < FEWEST:
            continue
        middle = statistics.median(known)
        spread = 1.4826 * statistics.median(abs(value - middle) for value in known)
        if spread == 0:
            continue
        for scan, score in zip(scans, scores, strict=True):
            if scan[name] is not None:
                score[name] = (scan[name] - middle) / spread
    return scores


def _tsv(scans: Sequence[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
    writer.writerow(["bids_name", "verdict", *METRICS, "reasons", "outlier"])
    for scan in scans:
        values = ["n/a" if scan[n] is None else f"{scan[n]:.6g}" for n in METRICS]
        texts = ["; ".join(scan[key]) or "n/a" for key in ("reasons", "outlier")]
        writer.writerow([scan["bids_name"], scan["verdict"], *values, *texts])
    return stream.getvalue()


def _sidecar() -> dict[str, Any]:
    columns = {
        name: {"Description": metric.description, "Units": metric.units}
        for name, metric in METRICS.items()
    }
    return {
        "bids_name": {"Description": "the scan, entities and suffix"},
        "verdict": {
            "Description": "quality rating of the result, from the metrics and their limits",
            "Levels": {
                "pass": "no metric exceeds a limit",
                "look": "a metric is unusual: look at the pictures before using the scan",
                "fail": "a metric is outside the range of usable results",
            },
        },
        **columns,
        "reasons": {"Description": "metrics that exceed a limit, with the limit"},
        "outlier": {
            "Description": f"metrics whose robust z-score within the contrast is beyond {OUTLIER}"
        },
    }


def _view(suffix: str, scans: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The page's data on one contrast and task.

    A metric with the same value in all of several scans is listed below the table, which then has
    no column for it.
    """
    texts = {
        name: ["–" if scan[name] is None else f"{scan[name]:.4g}" for scan in scans]
        for name in METRICS
    }
    same = {n: column[0] for n, column in texts.items() if len(scans) > 1 and len({*column}) == 1}
    columns = {name: metric for name, metric in METRICS.items() if name not in same}
    figures = []
    for name, metric in METRICS.items():
        # rounded as in the TSV: values that are the same there have no distribution
        points = [
            (row, float(f"{scan[name]:.6g}"))
            for row, scan in enumerate(scans)
            if scan[name] is not None
        ]
        if len({value for _, value in points}) > 1:
            strip = _strip(points, [scan["verdict"] for scan in scans], metric)
            figures.append({"name": name, "about": metric, "strip": strip})
    rows = [
        {
            **scan,
            "cells": [(texts[name][row], name in scan["outlier"]) for name in columns],
        }
        for row, scan in enumerate(scans)
    ]
    counts = Counter(scan["verdict"] for scan in scans)
    return {
        "suffix": suffix,
        "scans": rows,
        "verdicts": {name: counts[name] for name in VERDICTS},
        "columns": columns,
        "same": [(name, text) for name, text in same.items() if text != "–"],
        "missing": [name for name, text in same.items() if text == "–"],
        "figures": figures,
    }


def _strip(
    points: Sequence[tuple[int, float]], verdicts: Sequence[str], metric: Metric
) -> dict[str, Any]:
    """A strip plot: one dot per scan, the median, the limits within the plotted range, and a box
    from the first to the third quartile if there are at least ``FEWEST_IN_BOX`` scans.

    The dots of one verdict are a single path (lines without length and with round ends), because
    20,000 elements would take seconds to open. ``rows`` has the table's row of each of them.

    Parameters
    ----------
    points : sequence of (row in the table, value)
    verdicts : sequence of str
        Verdict of every row.
    metric : Metric
    """
    values = [value for _, value in points]
    low, high = min(values), max(values)

    def x(value: float) -> float:
        return round(10 + (WIDTH - 20) * (value - low) / (high - low), 1)

    paths: dict[str, dict[str, list[str]]] = {}
    for n, (row, value) in enumerate(points):
        # scatter the dots by a fixed pattern, so that the page is the same every time
        y = round(8 + (n * 0.618034 % 1) * (HEIGHT - 26), 1)
        path = paths.setdefault(verdicts[row], {"d": [], "rows": []})
        path["d"].append(f"M{x(value)} {y}h0")
        path["rows"].append(str(row))
    first, middle, third = statistics.quantiles(values, n=4)
    return {
        "low": f"{low:.4g}",
        "high": f"{high:.4g}",
        "median": f"{middle:.4g}",
        "width": WIDTH,
        "height": HEIGHT,
        "paths": [
            {"verdict": name, "d": "".join(path["d"]), "rows": " ".join(path["rows"])}
            for name, path in paths.items()
        ],
        "box": (x(first), x(third)) if len(values) >= FEWEST_IN_BOX else None,
        "middle": x(middle),
        "limits": [x(limit) for limit in (metric.low, metric.high) if limit is not None
                   and low <= limit <= high],
    }  # fmt: skip


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(files("brainprior_bids") / "data" / "reports")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("group.html.j2")
