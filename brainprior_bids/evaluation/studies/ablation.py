# SPDX-License-Identifier: Apache-2.0
"""One setting changed at a time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from brainprior_bids.evaluation import plots
from brainprior_bids.evaluation.protocol import Condition
from brainprior_bids.evaluation.studies.base import Source, Study, of_test_set
from brainprior_bids.evaluation.studies.restoration import (
    REFERENCE,
    base_condition,
    measure,
    width_of,
)
from brainprior_bids.evaluation.summary import (
    Record,
    groups_of,
    mean_sd,
    settings,
    title,
    values_of,
)

BIASED = {"bias_sd": 0.1, "sampler": "exact"}
ABLATIONS: dict[str, dict[str, Any]] = {
    "default settings": {},
    "sampler exact": {"sampler": "exact"},
    "sampler mean": {"sampler": "mean"},
    "5 calls": {"n_steps": 5},
    "20 calls": {"n_steps": 20},
    "40 calls": {"n_steps": 40},
    "assumed noise 0.005": {"assumed_noise": 0.005},
    "assumed noise 0.01": {"assumed_noise": 0.01},
    "assumed noise 0.02": {"assumed_noise": 0.02},
    "field ignored": BIASED,
    "field by N4": {**BIASED, "field": "n4"},
    "field by N4, refined while sampling": {**BIASED, "field": "n4", "move_bias": True},
    "field estimated while sampling, from 0": {**BIASED, "move_bias": True},
}
DAPS = {"sampler daps": {"sampler": "daps", "n_samples": 1}}
QUICK = ("default settings", "sampler mean")


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Condition]]:
    """Every variant on the first participants."""
    base = base_condition(options, "ablation")
    variants = ABLATIONS | (DAPS if options.daps else {})
    if options.quick:
        variants = {name: variants[name] for name in QUICK}
    for variant, values in variants.items():
        for n, source in enumerate(of_test_set(sources)[: options.ablation_participants]):
            changed = {**REFERENCE, **values, "width": width_of(options, n)}
            yield source, replace(base, variant=variant, **changed)


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """One row per variant; variants of earlier versions are last."""
    count = len({r["participant"] for r in records})
    rows = f"{title(records[0], count)}; each row changes one setting:"
    order = {variant: n for n, variant in enumerate(ABLATIONS | DAPS)}
    text = [settings(records), "", rows, ""]
    text += [
        "| | sampler | MAE | PSNR, dB | SSIM | one sample, dB | CRPS | residual / noise | s |"
    ]
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
    metrics = (("mae", 4), ("psnr_db", 2), ("ssim", 3))
    return " | ".join(mean_sd(values_of(group, method, k), d) for k, d in metrics) + " | | | | |"


STUDY = Study(
    "ablation",
    cases,
    measure,
    table,
    defaults={"n_samples": 4},
    tuned=True,
    plot=plots.time_and_quality,
)
