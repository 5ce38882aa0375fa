# SPDX-License-Identifier: Apache-2.0
"""Write the records of ``brainprior evaluate`` as tables (TSV, Markdown) and plots (PNG)."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.evaluation import plots
from brainprior_bids.evaluation.protocol import METHODS
from brainprior_bids.evaluation.studies import STUDIES, find
from brainprior_bids.evaluation.summary import (
    Record,
    condition_key,
    groups_of,
    mean_sd,
    methods_table,
    title,
    values_of,
)

COLUMNS = (
    "study", "variant", "participant", "contrast", "synthetic", "spacing_mm", "in_plane_mm",
    "noise_sd", "width", "sampler_used", "n_samples", "n_steps", "method", "mae", "rmse",
    "psnr_db", "ssim",
    "lpips", "cnr", "histogram_distance", "crps", "crps_predicted", "crps_tikhonov",
    "error_over_sd", "mean_dice", "mean_absolute_volume_error", "seconds", "prior_sha256",
)  # fmt: skip
METHOD_STUDIES = ("restoration", "low-field", "ablation", "segmentation")
"""Studies whose records have one row per method in ``results.tsv``."""


def read_records(out: Path) -> list[Record]:
    """Read every record below ``out/results``.

    Raises
    ------
    UsageError
        If there is none.
    """
    paths = sorted((out / "results").rglob("*.json"))
    if not paths:
        raise UsageError(f"evaluate: no results in {out}. Run without --tables-only first.")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def write_tables(out: Path) -> Path:
    """Write ``results.tsv``, ``tables.md`` and the plots; returns the path of ``tables.md``.

    Raises
    ------
    UsageError
        As ``read_records``.
    """
    records = [r for r in read_records(out) if not r.get("choosing")]
    validation = [r for r in read_records(out) if r.get("choosing")]
    parts = {study: [r for r in records if r["study"] == study] for study in _studies(records)}
    _write_tsv([r for study in METHOD_STUDIES for r in parts.get(study, [])], out / "results.tsv")
    text = []
    for study, part in parts.items():
        if study in ("restoration", "low-field"):
            text += _methods(part)
        else:
            lines = find(study).table(part, [r for r in validation if r["study"] == study])
            text += ["", f"### Study {study}", "", *lines]
    priors = sorted({r["prior_sha256"] for r in records if "prior_sha256" in r})
    if priors:
        text += ["", f"Prior: {', '.join(sha[:12] for sha in priors)} (start of SHA-256)."]
    if len(priors) > 1:
        text.append("**These results are from more than one prior: run the command again.**")
    text += ["", "### Time", "", *_times([*records, *validation])]
    for study in ("restoration", "low-field"):
        if study in parts:
            plots.save(plots.methods(parts[study]), out / f"{study}.png")
            plots.save(plots.histograms(parts[study]), out / f"{study}_histograms.png")
    if "segmentation" in parts:
        plots.save(plots.dice(parts["segmentation"]), out / "segmentation.png")
    path = out / "tables.md"
    path.write_text("\n".join(text).strip() + "\n", encoding="utf-8")
    return path


def _times(records: Sequence[Record]) -> list[str]:
    """How long the cases of each study took; without the preparation of scans and penalties."""
    lines = ["| study | cases | minutes of one process |", "|---|---|---|"]
    for study in [*_studies(records), "all"]:
        seconds = [r.get("case_seconds") for r in records if study in ("all", r["study"])]
        known = [value for value in seconds if value is not None]
        lines.append(f"| {study} | {len(known)} | {sum(known) / 60:.1f} |")
    return lines


def _write_tsv(records: Sequence[Record], path: Path) -> None:
    """One row per record and method."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for record in records:
            parts = record.get("segmentation", {})
            for method in [*METHODS, *(m for m in parts if m not in METHODS)]:
                row = {**record, "method": method, **record["methods"].get(method, {})}
                row |= parts.get(method, {})
                writer.writerow([_cell(row.get(column)) for column in COLUMNS])


def _studies(records: Sequence[Record]) -> list[str]:
    return sorted({r["study"] for r in records}, key=STUDIES.index)


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _methods(records: Sequence[Record]) -> list[str]:
    text: list[str] = []
    for group in groups_of(records, condition_key):
        heading = f"### {title(group[0], len(group))}"
        text += ["", heading, "", *methods_table(group), "", *_paired(group)]
    return text


def _paired(group: Sequence[Record]) -> list[str]:
    """The restored image minus cubic and TV, paired; CRPS and error / SD; the penalties."""
    lines = []
    for method in ("cubic", "tv"):
        gain = {
            key: np.array(values_of(group, "restored", key))
            - np.array(values_of(group, method, key))
            for key in ("psnr_db", "ssim", "mae")
        }
        share = 100 * gain["mae"] / np.array(values_of(group, method, "mae"))
        lines.append(
            f"- restored minus {method}, paired: PSNR {mean_sd(gain['psnr_db'], 2, True)} dB "
            f"(better in {int((gain['psnr_db'] > 0).sum())} of {len(group)}), MAE "
            f"{mean_sd(share, 1, True)} %, SSIM {mean_sd(gain['ssim'], 3, True)} "
            f"(better in {int((gain['ssim'] > 0).sum())})"
        )
    tuned = group[0]["tuned_on"]
    penalties = ", ".join(
        f"{name} {group[0]['penalties'][key]:g}"
        for key, name in (("tikhonov", "Tikhonov"), ("tv", "TV"), ("spread", "spread"))
    )
    sampled = [r for r in group if r["crps"] is not None]
    crps, other = ([r[key] for r in sampled] for key in ("crps", "crps_tikhonov"))
    better = sum(a < b for a, b in zip(crps, other, strict=True))
    predicted = [r["crps_predicted"] for r in group if "crps_predicted" in r]
    ratios = [r["error_over_sd"] for r in group if "error_over_sd" in r]
    residuals = [float(np.mean(r["residual_ratios"])) for r in group]
    lines.append(
        f"- CRPS {mean_sd(crps, 4)}, tuned Tikhonov posterior {mean_sd(other, 4)} (better in "
        f"{better} of {len(group)})"
        + (f", predicted SD {mean_sd(predicted, 4)}" if predicted else "")
        + (f"; RMS error over predicted SD {mean_sd(ratios, 2)}" if ratios else "")
        + f"; residual over noise {mean_sd(residuals, 2)}"
    )
    lines.append(
        f"- penalties: {penalties}; "
        + (f"tuned on {', '.join(tuned)}" if tuned else "not tuned for these data")
    )
    return lines
