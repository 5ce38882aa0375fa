# SPDX-License-Identifier: Apache-2.0
"""Which sampler, and how many samples? One scan, and two crossed scans fused, by each sampler.

A block of each T1w is averaged to thick slices, as thick as stated, along k and, for the second
scan, along j. ``ROWS`` are restored from the same scans: the metrics are those of the restored
image and of the first sample after one gain, the CRPS of the samples (of two or more), and the
residual of the samples in noise SDs. The time is processor time of the whole restoration. With
``--n-samples 1``, a first look, the crossed scans are left out: they take most of the time.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.result import Restoration
from brainprior_bids.engine.samplers import registry
from brainprior_bids.evaluation.metrics import compare, crps, matching_gain
from brainprior_bids.evaluation.protocol import AXIS, Case, Condition, Participant, make_case
from brainprior_bids.evaluation.studies.base import (
    Bench,
    Source,
    Study,
    number_of,
    of_test_set,
    processor_seconds,
)
from brainprior_bids.evaluation.studies.restoration import base_condition
from brainprior_bids.evaluation.studies.uncertainty import observe
from brainprior_bids.evaluation.summary import (
    Record,
    condition_key,
    extent,
    groups_of,
    label_table,
)

SECOND_AXIS = 1
PROBLEMS = {1: "one scan", 2: "two crossed scans"}


@dataclass(frozen=True)
class Row:
    """A restoration: number of scans, sampler, and factors on ``--n-samples`` and on the calls."""

    scans: int
    sampler: str
    samples: float = 1.0
    calls: int = 1


ROWS = (
    Row(1, "mean"), Row(1, "conditional", 0.5), Row(1, "conditional"), Row(1, "conditional", 2),
    Row(1, "exact"), Row(2, "conditional", 0.5), Row(2, "exact", 0.5), Row(2, "exact", 0.5, 2),
)  # fmt: skip


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Condition]]:
    """Every spacing for the T1w of the test set."""
    base = base_condition(options, "samplers")
    for spacing in options.spacing:
        for source in of_test_set(sources, "T1w"):
            yield source, replace(base, spacing_mm=spacing, noise_sd=options.noise[0])


def measure(participant: Participant, condition: Condition, bench: Bench) -> Record:
    """``rows``: "problem | sampler | calls | samples" -> metrics."""
    case = make_case(participant, condition)
    rng = np.random.default_rng([number_of(participant.name), condition.seed])
    scans = [observe(case, condition, axis, condition.spacing_mm, rng)
             for axis in (AXIS, SECOND_AXIS)]  # fmt: skip
    rows: dict[str, dict[str, float]] = {}
    for row in ROWS:
        sampler, simple = registry.find(row.sampler), row.scans == 1
        n_samples, n_steps, drawn = 1, None, "none"
        if sampler.yields_samples:
            n_samples = max(1, round(row.samples * condition.n_samples))
            n_steps = row.calls * sampler.levels(condition.n_steps, simple=simple)
            drawn = str(n_samples)
        calls = sampler.calls(n_steps, simple=simple)
        label = f"{PROBLEMS[row.scans]} | `{row.sampler}` | {calls} | {drawn}"
        first_look = condition.n_samples == 1
        if label in rows or (first_look and row.scans > 1):
            continue
        began = processor_seconds()
        result = restore(
            scans[: row.scans],
            mask_1mm=case.inside,
            to_mni305=case.to_mni305,
            contrast=participant.contrast,
            prior=bench.load_prior(),
            sampler=row.sampler,
            n_samples=n_samples,
            n_steps=n_steps,
            seed=condition.seed,
            device=bench.device,
        )
        seconds = processor_seconds() - began
        rows[label] = {**quality(result, case), "processor time, s": seconds}
    return {"rows": rows}


def quality(result: Restoration, case: Case) -> dict[str, float]:
    """Metrics of a restoration, where errors are judged."""
    truth, judged = case.truth.data, case.judged

    def psnr(image: np.ndarray) -> float:
        gain = matching_gain(image, truth, judged)
        return compare(gain * image, truth, judged)["psnr_db"]

    values = {"PSNR, dB": psnr(result.mean)}
    if registry.find(result.sampler).yields_samples:
        values["one sample, dB"] = psnr(result.samples[0])
        if len(result.samples) > 1:
            gain = matching_gain(result.mean, truth, judged)
            values["CRPS of the samples"] = crps(gain * result.samples, truth, judged)
        values["residual"] = float(np.mean(result.residual_ratios))
    return values


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """One row per restoration, for every condition."""
    text = []
    for group in groups_of(records, condition_key):
        first = group[0]
        text += [
            f"{first['contrast']}, slices of {first['spacing_mm']:g} mm, noise "
            f"{first['noise_sd']:g}. {extent(first)}.",
            "",
            *label_table([r["rows"] for r in group], ["problem", "sampler", "calls", "samples"]),
            "",
        ]
    return text[:-1]


STUDY = Study(
    "samplers",
    cases,
    measure,
    table,
    defaults={"spacing": (5.0,), "noise": (0.01,), "n_samples": 4},
    quick={"n_samples": 1, "n_steps": 2},
)
