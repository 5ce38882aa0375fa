# SPDX-License-Identifier: Apache-2.0
"""Restored against interpolated images, by contrast, slice spacing and noise.

The other studies of degraded scans (``low_field``, ``ablation``, ``segmentation``,
``hallucination``) use ``base_condition``, ``width_of`` and ``measure`` too.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from brainprior_bids.evaluation import plots, protocol
from brainprior_bids.evaluation.protocol import Condition, Participant
from brainprior_bids.evaluation.studies.base import (
    Bench,
    Source,
    Study,
    of_test_set,
    parcellation,
)
from brainprior_bids.evaluation.summary import (
    Record,
    condition_key,
    facts,
    gains,
    groups_of,
    mean,
    mean_sd,
    residuals,
    scan,
    settings,
    values_of,
)

REFERENCE = {"spacing_mm": 5.0, "noise_sd": 0.01}
"""Condition of the ablation and segmentation studies."""


def base_condition(options: Namespace, study: str) -> Condition:
    """The condition that the command line specifies; studies change it from row to row."""
    return Condition(
        study=study,
        profile=options.profile,
        sampler=options.sampler,
        n_samples=options.n_samples,
        n_steps=options.n_steps,
        crop_mm=None if options.whole else (options.crop[0], options.crop[1], options.crop[2]),
        seed=options.random_seed,
    )


def width_of(options: Namespace, number: int) -> float:
    """True divided by stated slice thickness, alternately above and below 1."""
    return float(1 + options.width_off * (-1) ** number)


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Condition]]:
    """Every spacing with every noise; synthetic brains with the first noise alone."""
    base = base_condition(options, "restoration")
    test_sources = [source for source in sources if not source.choosing]
    number = {source: n for n, source in enumerate(test_sources)}
    synthetic = [source for source in test_sources if source.synthetic]
    for group, noises in ((of_test_set(sources), options.noise), (synthetic, options.noise[:1])):
        for n, spacing in enumerate(options.spacing):
            for noise in noises:
                for source in group:
                    width = width_of(options, number[source] + n)
                    yield source, replace(base, spacing_mm=spacing, noise_sd=noise, width=width)


def measure(participant: Participant, condition: Condition, bench: Bench) -> Record:
    """Every method on one degraded scan."""
    return protocol.measure(
        participant,
        condition,
        prior=bench.load_prior(),
        penalties=bench.penalties,
        network=parcellation() if condition.segment else None,
        own_labels=bench.own_labels,
        device=bench.device,
        picture=bench.picture,
    )


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
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


STUDY = Study(
    "restoration",
    cases,
    measure,
    table,
    defaults={"spacing": (3.0, 5.0, 7.0), "noise": (0.01, 0.03), "n_samples": 8},
    quick={"spacing": (5.0,), "noise": (0.01,), "n_samples": 4},
    tuned=True,
    plot=plots.forest,
)
