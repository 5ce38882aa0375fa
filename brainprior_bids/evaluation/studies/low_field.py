# SPDX-License-Identifier: Apache-2.0
"""Scans like those of a low-field scanner: coarse in all directions, with strong Rician noise."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace

from brainprior_bids.evaluation.protocol import Condition
from brainprior_bids.evaluation.studies.base import Source, Study, of_test_set
from brainprior_bids.evaluation.studies.restoration import base_condition, measure, width_of
from brainprior_bids.evaluation.summary import (
    Record,
    condition_key,
    facts,
    gains,
    groups_of,
    mean,
    mean_sd,
    methods_table,
    residuals,
    settings,
    title,
)

SCAN = {"in_plane_mm": 1.6, "noise_sd": 0.05, "rician": True}


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Condition]]:
    """One scan per participant."""
    base = base_condition(options, "low-field")
    for n, source in enumerate(of_test_set(sources)):
        yield source, replace(base, width=width_of(options, n), **SCAN)


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
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


STUDY = Study("low-field", cases, measure, table, defaults={"n_samples": 4}, tuned=True)
