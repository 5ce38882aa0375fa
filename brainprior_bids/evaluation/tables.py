# SPDX-License-Identifier: Apache-2.0
"""From the records of ``brainprior evaluate`` to tables (TSV, Markdown) and plots (PNG)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.evaluation.protocol import HISTOGRAM, METHODS
from brainprior_bids.evaluation.studies import ABLATIONS, DAPS, STUDIES

Record = dict[str, Any]
COLUMNS = (
    "study", "variant", "participant", "contrast", "synthetic", "spacing_mm", "in_plane_mm",
    "noise_sd", "width", "sampler_used", "n_samples", "n_steps", "method", "mae", "rmse",
    "psnr_db", "ssim",
    "lpips", "cnr", "histogram_distance", "crps", "crps_predicted", "crps_tikhonov",
    "error_over_sd", "mean_dice", "mean_absolute_volume_error", "seconds", "prior_sha256",
)  # fmt: skip
STYLES = {"truth": "k-", "cubic": "C1:", "tv": "C3--", "sample": "C4-", "restored": "C5-"}
NAMES = {
    "linear": "linear",
    "cubic": "cubic",
    "tikhonov": "Tikhonov (knows the slice weights)",
    "tv": "TV (knows the slice weights)",
    "sample": "one sample",
    "restored": "`desc-restored`",
    "true": "truth",
    "degraded": "thick slices, unprocessed",
}


def read_records(out: Path) -> list[Record]:
    """Every record below ``out/results``.

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
    """``results.tsv``, ``tables.md`` and the plots; returns the Markdown's path."""
    records = read_records(out)
    with (out / "results.tsv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(COLUMNS)
        for record in records:
            parts = record.get("segmentation", {})
            for method in [*METHODS, *(m for m in parts if m not in METHODS)]:
                row = {**record, "method": method, **record["methods"].get(method, {})}
                row |= parts.get(method, {})
                writer.writerow([_cell(row.get(column)) for column in COLUMNS])
    made = {study: [r for r in records if r["study"] == study] for study in _studies(records)}
    text = []
    for study, part in made.items():
        text += {"ablation": _ablation, "segmentation": _segmentation}.get(study, _methods)(part)
    priors = sorted({r["prior_sha256"] for r in records})
    text += ["", f"Prior: {', '.join(sha[:12] for sha in priors)} (start of SHA-256)."]
    if len(priors) > 1:
        text.append("**These results are of more than one prior: run the command again.**")
    for study in ("restoration", "low-field"):
        if study in made:
            _plot(made[study], out / f"{study}.png")
            _histograms(made[study], out / f"{study}_histograms.png")
    if "segmentation" in made:
        _plot_dice(made["segmentation"], out / "segmentation.png")
    path = out / "tables.md"
    path.write_text("\n".join(text).strip() + "\n", encoding="utf-8")
    return path


def _studies(records: Sequence[Record]) -> list[str]:
    return sorted({r["study"] for r in records}, key=STUDIES.index)


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def groups_of(records: Sequence[Record], key: Callable[[Record], Any]) -> list[list[Record]]:
    """Records of the same key together, in the order of the keys."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return [found[k] for k in sorted(found)]


def condition_key(r: Record) -> tuple[Any, ...]:
    """What the degraded scans of one row or table have in common."""
    return (r["synthetic"], r["contrast"], r["spacing_mm"], r["in_plane_mm"] or 0, r["noise_sd"])


def mean_sd(values: Sequence[float], digits: int, sign: bool = False) -> str:
    """``mean ± SD`` over participants (n - 1); without the SD for one, "n/a" for none."""
    if len(values) == 0:
        return "n/a"
    shown = f"{np.mean(values):{'+' if sign else ''}.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ± {np.std(values, ddof=1):.{digits}f}"


def values_of(records: Sequence[Record], method: str, figure: str) -> list[float]:
    """One metric of one method, of the records that have it."""
    found = [r["methods"].get(method, {}).get(figure) for r in records]
    return [value for value in found if value is not None]


def _methods(records: Sequence[Record]) -> list[str]:
    text: list[str] = []
    for group in groups_of(records, condition_key):
        text += _one_condition(group)
    return text


def title(r: Record, count: int) -> str:
    """The degraded scans in words, and the number of participants or maps."""
    plane = f"{r['in_plane_mm'] or 1:g}"
    kind = "synthetic " if r["synthetic"] else ""
    law = "Rician noise" if r["rician"] else "noise"
    who = "map" if r["synthetic"] else "participant" if count == 1 else "participants"
    return (
        f"{kind}{r['contrast']}, {plane} × {plane} × {r['spacing_mm']:g} mm, {law} "
        f"{r['noise_sd']:g}, {count} {who if count == 1 or who == 'participants' else who + 's'}"
    )


def _one_condition(group: Sequence[Record]) -> list[str]:
    return [
        "",
        f"### {title(group[0], len(group))}",
        "",
        *methods_table(group),
        "",
        *_paired(group),
    ]


def methods_table(group: Sequence[Record]) -> list[str]:
    """One row per method for the records of one condition."""
    first = group[0]
    lpips = bool(values_of(group, "restored", "lpips"))
    true = [r["truth"]["cnr"] for r in group if r["truth"]["cnr"] is not None]
    cnr = "grey-white CNR" + (f" (truth {np.mean(true):.2f})" if true else "")
    figures = [("mae", "MAE", 4), ("psnr_db", "PSNR, dB", 2), ("ssim", "SSIM", 3)]
    figures += [("lpips", "LPIPS", 3)] if lpips else []
    figures += [("cnr", cnr, 2), ("histogram_distance", "histogram distance", 4)]
    text = ["| | " + " | ".join(name for _, name, _ in figures) + " |"]
    text += ["|---" * (len(figures) + 1) + "|"]
    for method in METHODS:
        cells = [mean_sd(values_of(group, method, key), digits) for key, _, digits in figures]
        name = NAMES[method] + (f" ({first['n_samples']})" if method == "restored" else "")
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    return text


def _paired(group: Sequence[Record]) -> list[str]:
    """The restored image against cubic and TV in the same participants; the spread."""
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
            f"(ahead in {int((gain['psnr_db'] > 0).sum())} of {len(group)}), MAE "
            f"{mean_sd(share, 1, True)} %, SSIM {mean_sd(gain['ssim'], 3, True)} "
            f"(ahead in {int((gain['ssim'] > 0).sum())})"
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


def _ablation(records: Sequence[Record]) -> list[str]:
    count = len({r["participant"] for r in records})
    heading = f"### Ablations: {title(records[0], count)}"
    return ["", heading, "", *ablation_table(records)]


def ablation_table(records: Sequence[Record]) -> list[str]:
    """One row per variant, in the order of the studies; variants of earlier versions are last."""
    order = {variant: n for n, variant in enumerate(ABLATIONS | DAPS)}
    text = ["| | sampler | MAE | PSNR, dB | SSIM | one sample, dB | CRPS | residual / noise | s |"]
    text += ["|---" * 9 + "|"]
    for group in groups_of(records, lambda r: (order.get(r["variant"], len(order)), r["variant"])):
        cells = [
            group[0]["sampler_used"],
            mean_sd(values_of(group, "restored", "mae"), 4),
            mean_sd(values_of(group, "restored", "psnr_db"), 2),
            mean_sd(values_of(group, "restored", "ssim"), 3),
            mean_sd(values_of(group, "sample", "psnr_db"), 2),
            mean_sd([r["crps"] for r in group if r["crps"] is not None], 4),
            mean_sd([float(np.mean(r["residual_ratios"])) for r in group], 2),
            f"{np.mean([r['seconds'] for r in group]):.0f}",
        ]
        text.append(f"| {group[0]['variant']} | " + " | ".join(cells) + " |")
    biased = [r for r in records if r["variant"] == "field ignored"]
    if biased:
        text.append("| cubic, field ignored | | " + _plain(biased, "cubic"))
    corrected = [r for r in records if r["variant"] == "field by N4"]
    if corrected:
        text.append("| cubic, field by N4 | | " + _plain(corrected, "cubic"))
    return text


def _plain(group: Sequence[Record], method: str) -> str:
    figures = (("mae", 4), ("psnr_db", 2), ("ssim", 3))
    return " | ".join(mean_sd(values_of(group, method, k), d) for k, d in figures) + " | | | | |"


def _segmentation(records: Sequence[Record]) -> list[str]:
    text: list[str] = []
    for group in groups_of(records, condition_key):
        heading = f"### Segmentation: {title(group[0], len(group))}"
        text += ["", heading, "", *segmentation_table(group)]
    return text


def segmentation_table(group: Sequence[Record]) -> list[str]:
    """One row per image for the records of one condition, and what it is compared with."""
    what = "the label map" if group[0]["synthetic"] else "that of the truth"
    text = [f"The embedded parcellation of every image against {what}.", ""]
    text += ["| | mean Dice | cortex | white matter | ventricles | volume error, % |"]
    text += ["|---" * 6 + "|"]
    for method in ("true", "degraded", "cubic", "tv", "restored", "sample"):
        if method not in group[0]["segmentation"]:
            continue
        rows = [r["segmentation"][method] for r in group]
        cells = [mean_sd([row["mean_dice"] for row in rows], 3)]
        for pair in (("3", "42"), ("2", "41"), ("4", "43")):
            known = [[row["dice"][i] for i in pair if i in row["dice"]] for row in rows]
            cells.append(mean_sd([float(np.mean(values)) for values in known if values], 3))
        errors = [100 * row["mean_absolute_volume_error"] for row in rows]
        text.append(f"| {NAMES[method]} | " + " | ".join(cells) + f" | {mean_sd(errors, 1)} |")
    return text


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _plot(records: Sequence[Record], path: Path) -> None:
    """PSNR, MAE and SSIM of every method and condition: bars are means, dots participants."""
    groups = groups_of(records, condition_key)
    figure = Figure(figsize=(max(6, 1.5 * len(groups) + 2), 9))
    for place, (key, label) in zip(
        figure.subplots(3, 1),
        (("psnr_db", "PSNR, dB"), ("mae", "MAE"), ("ssim", "SSIM")),
        strict=True,
    ):
        for m, method in enumerate(METHODS):
            at = np.arange(len(groups)) + (m - 2.5) * 0.14
            values = [values_of(group, method, key) for group in groups]
            place.bar(at, [np.mean(v) for v in values], 0.13, color=f"C{m}", label=method)
            for x, v in zip(at, values, strict=True):
                place.plot([x] * len(v), v, ".", color="0.15", markersize=3)
        everything = [v for method in METHODS for g in groups for v in values_of(g, method, key)]
        low, high = min(everything), max(everything)
        place.set_ylim(low - 0.25 * (high - low + 1e-3), high + 0.05 * (high - low + 1e-3))
        place.set_ylabel(label)
        place.set_xticks(range(len(groups)))
        place.set_xticklabels(
            [
                f"{g[0]['contrast']} {g[0]['spacing_mm']:g} mm\n{g[0]['noise_sd']:g}"
                for g in groups
            ],
            fontsize=7,
        )
    figure.axes[0].legend(
        ncol=len(METHODS), fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    _save(figure, path)


def _histograms(records: Sequence[Record], path: Path) -> None:
    """Intensities inside the mask, all participants of a condition together."""
    groups = groups_of(records, condition_key)
    figure = Figure(figsize=(3.2 * len(groups), 2.8))
    centres = (HISTOGRAM[1:] + HISTOGRAM[:-1]) / 2
    for place, group in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True
    ):
        for method, style in STYLES.items():
            counts = np.sum([r["histograms"][method] for r in group], axis=0)
            place.plot(centres, counts / counts.sum(), style, label=method, linewidth=1)
        r = group[0]
        place.set_title(f"{r['contrast']} {r['spacing_mm']:g} mm, {r['noise_sd']:g}", fontsize=8)
        place.set_yticks([])
    figure.axes[0].legend(fontsize=6)
    _save(figure, path)


def _plot_dice(records: Sequence[Record], path: Path) -> None:
    """Dice of every structure, mean over participants."""
    from brainprior_bids.anatomy.parcellation import structure_names

    names = structure_names()
    shown = ("degraded", "cubic", "tv", "restored")
    seen = sorted({i for r in records for i in r["segmentation"]["cubic"]["dice"]}, key=int)
    figure = Figure(figsize=(10, 4.5))
    place = figure.subplots()
    for m, method in enumerate(shown):
        tables = [r["segmentation"][method]["dice"] for r in records]
        means = [np.mean([table[i] for table in tables if i in table]) for i in seen]
        place.bar(np.arange(len(seen)) + (m - 1.5) * 0.2, means, 0.19, label=method)
    place.set_xticks(range(len(seen)))
    place.set_xticklabels([names[int(i)] for i in seen], rotation=90, fontsize=6)
    place.set_ylabel("Dice")
    place.legend(fontsize=7)
    _save(figure, path)
