# SPDX-License-Identifier: Apache-2.0
"""Means, paired differences and intervals over the records of a study, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from brainprior_bids.engine.samplers import registry
from brainprior_bids.evaluation.protocol import METHODS

Record = dict[str, Any]
NAMES = {
    "linear": "linear",
    "cubic": "cubic",
    "tikhonov": "Tikhonov (given the slice weights)",
    "tv": "TV (given the slice weights)",
    "sample": "one sample",
    "restored": "`desc-restored`",
    "true": "truth",
    "degraded": "thick slices, unprocessed",
}


def groups_of(records: Sequence[Record], key: Callable[[Record], Any]) -> list[list[Record]]:
    """Group the records by a key; the groups are in the order of their keys."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return [groups[k] for k in sorted(groups)]


def condition_key(r: Record) -> tuple[Any, ...]:
    """The fields in which the degraded scans of one row or table agree."""
    return (r["synthetic"], r["contrast"], r["spacing_mm"], r["in_plane_mm"] or 0, r["noise_sd"])


def mean_sd(values: Sequence[float], digits: int, sign: bool = False) -> str:
    """``mean ± SD`` over participants (n - 1); without the SD for one, "n/a" for none."""
    if len(values) == 0:
        return "n/a"
    shown = f"{np.mean(values):{'+' if sign else ''}.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ± {np.std(values, ddof=1):.{digits}f}"


def values_of(records: Sequence[Record], method: str, metric: str) -> list[float]:
    """One metric of one method, from the records that have it."""
    values = [r["methods"].get(method, {}).get(metric) for r in records]
    return [value for value in values if value is not None]


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


def methods_table(group: Sequence[Record]) -> list[str]:
    """One row per method for the records of one condition."""
    first = group[0]
    lpips = bool(values_of(group, "restored", "lpips"))
    true = [r["truth"]["cnr"] for r in group if r["truth"]["cnr"] is not None]
    cnr = "grey-white CNR" + (f" (truth {np.mean(true):.2f})" if true else "")
    metrics = [("mae", "MAE", 4), ("psnr_db", "PSNR, dB", 2), ("ssim", "SSIM", 3)]
    metrics += [("lpips", "LPIPS", 3)] if lpips else []
    metrics += [("cnr", cnr, 2), ("histogram_distance", "histogram distance", 4)]
    text = ["| | " + " | ".join(name for _, name, _ in metrics) + " |"]
    text += ["|---" * (len(metrics) + 1) + "|"]
    for method in METHODS:
        cells = [mean_sd(values_of(group, method, key), digits) for key, _, digits in metrics]
        drawn = method == "restored" and bool(values_of(group, "sample", "psnr_db"))
        name = NAMES[method] + (f" ({first['n_samples']})" if drawn else "")
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    return text


def scan(r: Record) -> str:
    """A condition in words, the label of its row."""
    kind = "synthetic " if r["synthetic"] else ""
    return f"{kind}{r['contrast']}, {r['spacing_mm']:g} mm, noise {r['noise_sd']:g}"


def mean(values: Sequence[float], digits: int) -> str:
    """Mean over participants, "n/a" for none."""
    return f"{np.mean(values):.{digits}f}" if len(values) else "n/a"


def gains(group: Sequence[Record], method: str, metric: str) -> np.ndarray:
    """The restored image minus another method, in the same participants."""
    restored = values_of(group, "restored", metric)
    return np.array(restored) - np.array(values_of(group, method, metric))


def facts(group: Sequence[Record], key: str) -> list[float]:
    """The values of ``key``, from the records that have it."""
    return [r[key] for r in group if r.get(key) is not None]


def residuals(group: Sequence[Record]) -> list[float]:
    """Residual of the samples in noise SDs, mean over the samples of each participant."""
    return [float(np.mean(r["residual_ratios"])) for r in group]


def settings(records: Sequence[Record]) -> str:
    """The settings that the records share: extent, samples, and the validation set."""
    first = records[0]
    tuned = list(dict.fromkeys(name for r in records for name in r["tuned_on"]))
    penalties = f"tuned on {', '.join(tuned)}" if tuned else "not tuned on these data"
    drawn = f"samples per image: {first['n_samples']}, of {calls_of(first)} calls each"
    if not registry.find(first["sampler_used"]).yields_samples:
        drawn = f"`{first['sampler_used']}`, no samples"
    return f"{extent(first)}; {drawn}; penalties of Tikhonov and TV {penalties}."


def extent(r: Record) -> str:
    """The part of the brain that was restored."""
    crop = r["crop_mm"]
    return f"Blocks of {' × '.join(map(str, crop))} mm" if crop else "Whole brains"


def calls_of(r: Record) -> int:
    """Network calls per sample."""
    return int(registry.find(r["sampler_used"]).calls(r["n_steps"], simple=True))


def counted(count: int, name: str) -> str:
    """``six participants``"""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    number = words[count] if count < len(words) else str(count)
    return f"{number} {name}{'s' * (count != 1)}"


def interval(values: Sequence[float], digits: int = 4) -> str:
    """Mean, and for two participants or more the 95 % interval of a bootstrap over them."""
    if not values:
        return ""
    shown = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return shown
    rng = np.random.default_rng(0)
    draws = rng.choice(np.array(values), (4000, len(values))).mean(1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return f"{shown} [{low:.{digits}f}, {high:.{digits}f}]"


def label_table(
    rows: Sequence[Mapping[str, Mapping[str, float]]], header: Sequence[str]
) -> list[str]:
    """One row per label, with mean and interval of every metric over the participants.

    Parameters
    ----------
    rows : sequence
        For each participant: label -> metric -> value. The parts of a label are separated by
        " | ". A label whose only metric is ``value`` is listed below the table.
    header : sequence of str
        Headings of the parts of a label.
    """
    labels = dict.fromkeys(label for row in rows for label in row)
    keys = list(dict.fromkeys(k for row in rows for values in row.values() for k in values))
    keys = [key for key in keys if key != "value"]
    lines = [f"| {' | '.join([*header, *keys, 'participants'])} |"]
    lines += ["|---" * (len(header) + len(keys) + 1) + "|"]
    single = []
    for label in labels:
        group = [row[label] for row in rows if label in row]
        if "value" in group[0]:
            shown = interval([row["value"] for row in group], _digits(label))
            single.append(f"- {label}: {shown} ({len(group)})")
            continue
        cells = [interval([row[key] for row in group if key in row], _digits(key)) for key in keys]
        lines.append(f"| {label} | {' | '.join(cells)} | {len(group)} |")
    return [*lines, "", *single] if single else lines


def _digits(metric: str) -> int:
    """Decimal places: few for decibels and millimetres, none for seconds and counts."""
    if metric.endswith(", s") or metric == "landmarks":
        return 0
    return 2 if "dB" in metric or metric.endswith(", mm") else 4
