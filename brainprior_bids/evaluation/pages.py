# SPDX-License-Identifier: Apache-2.0
"""Tables of the documentation from records of ``brainprior evaluate``: one file per study.

Each file has its stamp, the caption, the settings and the table; pages include it. Values are
means over participants or maps, differences are paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.samplers import registry
from brainprior_bids.evaluation.stamp import DIGITS, Stamp
from brainprior_bids.evaluation.studies import REFERENCE, STUDIES
from brainprior_bids.evaluation.tables import (
    Record,
    ablation_table,
    condition_key,
    groups_of,
    mean_sd,
    methods_table,
    segmentation_table,
    title,
    values_of,
)


def write_pages(records: Sequence[Record], folder: Path, *, command: str, day: str) -> list[Path]:
    """``folder/STUDY.md`` for every study of the records; returns the paths.

    Parameters
    ----------
    records : sequence
        Of one prior.
    folder : Path
        Made if it is not there.
    command, day : str
        As in ``Stamp``.

    Raises
    ------
    UsageError
        If the records are of more than one prior.
    """
    priors = sorted({r["prior_sha256"][:DIGITS] for r in records})
    if len(priors) != 1:
        raise UsageError(
            f"evaluate: expected results of one prior for --tables, got {', '.join(priors)}. "
            "Run the command again without --tables-only."
        )
    bodies = {
        "restoration": restoration,
        "low-field": low_field,
        "ablation": ablation,
        "segmentation": segmentation,
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for study in STUDIES:
        part = [r for r in records if r["study"] == study]
        if not part:
            continue
        participants, maps = (
            len({r["participant"] for r in part if r["synthetic"] is synthetic})
            for synthetic in (False, True)
        )
        stamp = Stamp(priors[0], day, participants, maps, command)
        text = [stamp.line(), "", stamp.caption(), "", *bodies[study](part)]
        paths.append(folder / f"{study}.md")
        paths[-1].write_text("\n".join(text) + "\n", encoding="utf-8")
    return paths


def restoration(records: Sequence[Record]) -> list[str]:
    """One row per condition, how often the restored image is better, and the predicted SD."""
    predicted = any("crps_predicted" in r for r in records)
    scores = {"crps": "samples", "crps_predicted": "predicted SD", "crps_tikhonov": "Tikhonov"}
    if not predicted:
        del scores["crps_predicted"]
    columns = ["scan", "PSNR, dB: cubic", "Tikhonov", "TV", "one sample", "restored"]
    columns += ["over cubic", "over TV", "MAE against cubic", "SSIM: cubic, TV, restored"]
    columns += [f"CRPS: {', '.join(scores.values())}", "RMS error / SD", "residual / noise"]
    text = [settings(records), "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for group in groups_of(records, condition_key):
        psnr = [
            mean(values_of(group, method, "psnr_db"), 2)
            for method in ("cubic", "tikhonov", "tv", "sample", "restored")
        ]
        mae = gains(group, "cubic", "mae") / values_of(group, "cubic", "mae")
        ssim = [
            mean(values_of(group, method, "ssim"), 3) for method in ("cubic", "tv", "restored")
        ]
        crps = [mean(facts(group, key), 4) for key in scores]
        cells = [scan(group[0]), *psnr[:-1], f"**{psnr[-1]}**"]
        cells += [mean_sd(gains(group, m, "psnr_db"), 2, sign=True) for m in ("cubic", "tv")]
        cells += [f"{100 * np.mean(mae):+.1f} %", ", ".join(ssim), ", ".join(crps)]
        cells += [mean(facts(group, "error_over_sd"), 2), mean(residuals(group), 2)]
        text.append(f"| {' | '.join(cells)} |")
    return [*text, "", wins(records), *deciles(records)]


def low_field(records: Sequence[Record]) -> list[str]:
    """For every condition one row per method, and the comparison in a sentence."""
    text = [settings(records)]
    for group in groups_of(records, condition_key):
        text += ["", f"{title(group[0], len(group))}:", "", *methods_table(group), ""]
        paired = [
            f"{mean_sd(gain, 2, sign=True)} dB over {name} (better in {(gain > 0).sum()} of "
            f"{len(group)})"
            for method, name in (("cubic", "cubic"), ("tv", "TV"))
            if len(gain := gains(group, method, "psnr_db"))
        ]
        text.append(
            f"`desc-restored`, paired: {', '.join(paired)}. CRPS {mean(facts(group, 'crps'), 3)} "
            f"(tuned Tikhonov posterior {mean(facts(group, 'crps_tikhonov'), 3)}), "
            f"RMS error / SD {mean(facts(group, 'error_over_sd'), 2)}, "
            f"residual / noise {mean(residuals(group), 2)}."
        )
    return text


def ablation(records: Sequence[Record]) -> list[str]:
    """One row per variant."""
    count = len({r["participant"] for r in records})
    rows = f"{title(records[0], count)}; each row changes one setting:"
    return [settings(records), "", rows, "", *ablation_table(records)]


def segmentation(records: Sequence[Record]) -> list[str]:
    """For every condition one row per image."""
    text = [settings(records)]
    for group in groups_of(records, condition_key):
        text += ["", f"{title(group[0], len(group))}.", "", *segmentation_table(group)]
    return text


def settings(records: Sequence[Record]) -> str:
    """What the records have in common: extent, samples, and the validation set."""
    first = records[0]
    crop = first["crop_mm"]
    extent = f"Blocks of {' × '.join(map(str, crop))} mm" if crop else "Whole brains"
    tuned = list(dict.fromkeys(name for r in records for name in r["tuned_on"]))
    penalties = f"tuned on {', '.join(tuned)}" if tuned else "not tuned on these data"
    calls = registry.find(first["sampler_used"]).calls(first["n_steps"], simple=True)
    return (
        f"{extent}; samples per image: {first['n_samples']}, of {calls} calls each; "
        f"penalties of Tikhonov and TV {penalties}."
    )


def scan(r: Record) -> str:
    """The row of a condition."""
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
    """A number of each record that has it."""
    return [r[key] for r in group if r.get(key) is not None]


def residuals(group: Sequence[Record]) -> list[float]:
    """Residual of the samples over the noise, per participant."""
    return [float(np.mean(r["residual_ratios"])) for r in group]


def wins(records: Sequence[Record]) -> str:
    """In how many records the restored image is better in every metric."""
    better = {
        method: int(
            (
                (gains(records, method, "psnr_db") > 0)
                & (gains(records, method, "ssim") > 0)
                & (gains(records, method, "mae") < 0)
            ).sum()
        )
        for method in ("cubic", "tv")
    }
    sampled = [r for r in records if r["crps"] is not None]
    sharper = sum(r["crps"] < r["crps_tikhonov"] for r in sampled)
    return (
        f"Of {len(records)} cases (a participant or map in one row), `desc-restored` is better "
        f"in PSNR, MAE and SSIM than cubic in {better['cubic']} and than TV in {better['tv']}; "
        f"its CRPS is better than Tikhonov's in {sharper}."
    )


def deciles(records: Sequence[Record]) -> list[str]:
    """Calibration of a predicted SD by its size, at the reference condition; else nothing."""
    group = [
        r
        for r in records
        if (r["contrast"], r["synthetic"]) == ("T1w", False)
        and all(r[key] == value for key, value in REFERENCE.items())
        and "error_over_sd_by_decile" in r
    ]
    if not group:
        return []
    ratios = np.mean([r["error_over_sd_by_decile"] for r in group], axis=0)
    shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return ["", f"RMS error / predicted SD by decile of the SD, {scan(group[0])}: {shown}"]
