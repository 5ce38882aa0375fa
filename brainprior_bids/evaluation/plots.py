# SPDX-License-Identifier: Apache-2.0
"""Plots of the records of studies, for the documentation and the output folder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from brainprior_bids.evaluation.metrics import DEPTHS, SHELLS_MM
from brainprior_bids.evaluation.protocol import HISTOGRAM, METHODS
from brainprior_bids.evaluation.summary import (
    Record,
    condition_key,
    gains,
    groups_of,
    scan,
    values_of,
)

STYLES = {"truth": "k-", "cubic": "C1:", "tv": "C3--", "sample": "C4-", "restored": "C5-"}
NAMES = {"cubic": "cubic interpolation", "tv": "total variation", "restored": "brainprior"}
SAMPLERS = ("default settings", "sampler exact", "sampler mean", "5 calls", "20 calls", "40 calls")
"""Variants of the study ``ablation`` that change sampler or number of calls alone."""


def save(figure: Figure, path: Path, note: str = "") -> Path:
    """Write a PNG, with a note below the plot."""
    figure.tight_layout(rect=(0, 0.04 if note else 0, 1, 1))
    figure.text(0.01, 0.01, note, fontsize=7, color="0.3")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def forest(records: Sequence[Record]) -> Figure:
    """Gains over cubic and TV for each participant, and the calibration of the predicted SD."""
    groups = groups_of(records, condition_key)[::-1]
    figure = Figure(figsize=(10, 1.4 + 0.42 * len(groups)))
    cubic, tv, calibration = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    for axes, method in ((cubic, "cubic"), (tv, "tv")):
        for row, group in enumerate(groups):
            _interval(axes, gains(group, method, "psnr_db"), row)
        axes.axvline(0, color="0.6", linewidth=1)
        axes.set_xlabel(f"gain over {NAMES[method]}, dB")
        axes.set_yticks(range(len(groups)), [scan(g[0]) for g in groups] if axes is cubic else [])
        axes.set_ylim(-0.6, len(groups) - 0.4)
    lowest = min(r["noise_sd"] for r in records)
    for group in groups[::-1]:
        rows = [r["error_over_sd_by_decile"] for r in group if "error_over_sd_by_decile" in r]
        if rows and group[0]["noise_sd"] == lowest:
            ratios = np.mean(rows, axis=0)
            calibration.plot(
                range(1, len(ratios) + 1), ratios, ".-", label=f"{group[0]['spacing_mm']:g} mm"
            )
    calibration.axhspan(0.9, 1.1, color="0.9")
    calibration.axhline(1, color="0.6", linewidth=1)
    calibration.set_xticks((1, 4, 7, 10))
    calibration.set_xlabel("decile of the predicted SD")
    calibration.set_ylabel("RMS error / predicted SD")
    if calibration.get_legend_handles_labels()[0]:
        calibration.legend(fontsize=7)
    return figure


def _interval(axes: Axes, values: np.ndarray, row: int) -> None:
    """Dots of participants, and the mean with its 95 % interval (Student's t)."""
    axes.plot(values, [row] * len(values), "o", color="C0", markersize=3, alpha=0.5)
    half = 0.0
    if len(values) > 1:
        half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    axes.errorbar(values.mean(), row, xerr=half, fmt="D", color="k", markersize=5, capsize=3)


def depth(records: Sequence[Record]) -> Figure:
    """RMSE by depth below the border of the brain: dots are heads, lines their means."""
    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
    names = [f"{a}-{b}" for a, b in itertools.pairwise(SHELLS_MM)]
    names += [f"deeper than {SHELLS_MM[-1]}"]
    for n, method in enumerate(("cubic", "tv", "restored")):
        values = np.array([values_of(records, method, key) for key in DEPTHS])
        place = np.arange(len(DEPTHS)) + 0.12 * (n - 1)
        colour = STYLES[method][:2]
        axes.plot(place, values, "o", color=colour, markersize=3, alpha=0.5)
        axes.plot(place, values.mean(1), STYLES[method], label=NAMES[method])
    axes.set_xticks(range(len(DEPTHS)), names)
    axes.set_xlabel("depth below the border of the brain, mm")
    axes.set_ylabel("RMS error / 99th percentile")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def time_and_quality(records: Sequence[Record]) -> Figure:
    """PSNR against the time of a restoration, for samplers and numbers of calls."""
    figure = Figure(figsize=(6, 3.6))
    axes = figure.subplots()
    variants = [v for v in SAMPLERS if any(r["variant"] == v for r in records)]
    for n, variant in enumerate(variants):
        group = [r for r in records if r["variant"] == variant]
        x = float(np.mean([r["seconds"] for r in group]))
        y = float(np.mean(values_of(group, "restored", "psnr_db")))
        axes.plot(x, y, "o", color="C5")
        below = -14 if n % 2 else 8  # neighbours have almost the same PSNR
        axes.annotate(
            variant, (x, y), textcoords="offset points", xytext=(0, below), ha="center", fontsize=8
        )
    first = [r for r in records if r["variant"] == variants[0]]
    for method in ("cubic", "tv"):
        level = float(np.mean(values_of(first, method, "psnr_db")))
        axes.axhline(level, color=STYLES[method][:2], linestyle=":", label=NAMES[method])
    axes.set_xscale("log")
    axes.margins(x=0.2, y=0.2)
    axes.set_xlabel("time of a block with all its samples, s")
    axes.set_ylabel("PSNR of the restored image, dB")
    axes.legend(fontsize=8)
    return figure


def methods(records: Sequence[Record]) -> Figure:
    """PSNR, MAE and SSIM of every method and condition: bars are means, dots participants."""
    groups = groups_of(records, condition_key)
    figure = Figure(figsize=(max(6, 1.5 * len(groups) + 2), 9))
    for axes, (key, label) in zip(
        figure.subplots(3, 1),
        (("psnr_db", "PSNR, dB"), ("mae", "MAE"), ("ssim", "SSIM")),
        strict=True,
    ):
        for m, method in enumerate(METHODS):
            at = np.arange(len(groups)) + (m - 2.5) * 0.14
            values = [values_of(group, method, key) for group in groups]
            axes.bar(at, [np.mean(v) for v in values], 0.13, color=f"C{m}", label=method)
            for x, v in zip(at, values, strict=True):
                axes.plot([x] * len(v), v, ".", color="0.15", markersize=3)
        everything = [v for method in METHODS for g in groups for v in values_of(g, method, key)]
        low, high = min(everything), max(everything)
        axes.set_ylim(low - 0.25 * (high - low + 1e-3), high + 0.05 * (high - low + 1e-3))
        axes.set_ylabel(label)
        axes.set_xticks(range(len(groups)))
        axes.set_xticklabels(
            [
                f"{g[0]['contrast']} {g[0]['spacing_mm']:g} mm\n{g[0]['noise_sd']:g}"
                for g in groups
            ],
            fontsize=7,
        )
    figure.axes[0].legend(
        ncol=len(METHODS), fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    return figure


def histograms(records: Sequence[Record]) -> Figure:
    """Intensities inside the mask, all participants of a condition together."""
    groups = groups_of(records, condition_key)
    figure = Figure(figsize=(3.2 * len(groups), 2.8))
    centres = (HISTOGRAM[1:] + HISTOGRAM[:-1]) / 2
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        drawn = [method for method in STYLES if all(method in r["histograms"] for r in group)]
        for method in drawn:  # `mean` draws no sample
            counts = np.sum([r["histograms"][method] for r in group], axis=0)
            axes.plot(centres, counts / counts.sum(), STYLES[method], label=method, linewidth=1)
        r = group[0]
        axes.set_title(f"{r['contrast']} {r['spacing_mm']:g} mm, {r['noise_sd']:g}", fontsize=8)
        axes.set_yticks([])
    figure.axes[0].legend(fontsize=6)
    return figure


def dice(records: Sequence[Record]) -> Figure:
    """Dice of every structure, mean over participants."""
    from brainprior_bids.anatomy.parcellation import structure_names

    names = structure_names()
    shown = ("degraded", "cubic", "tv", "restored")
    indices = sorted({i for r in records for i in r["segmentation"]["cubic"]["dice"]}, key=int)
    figure = Figure(figsize=(10, 4.5))
    axes = figure.subplots()
    for m, method in enumerate(shown):
        tables = [r["segmentation"][method]["dice"] for r in records]
        means = [np.mean([table[i] for table in tables if i in table]) for i in indices]
        axes.bar(np.arange(len(indices)) + (m - 1.5) * 0.2, means, 0.19, label=method)
    axes.set_xticks(range(len(indices)))
    axes.set_xticklabels([names[int(i)] for i in indices], rotation=90, fontsize=6)
    axes.set_ylabel("Dice")
    axes.legend(fontsize=7)
    return figure
