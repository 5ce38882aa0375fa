# SPDX-License-Identifier: Apache-2.0
"""How good is the SD of few samples, where the prior does not predict it?

Four problems in a block of each T1w, whose truth is known: one scan with the sampler ``exact``;
two crossed scans, fused; a scan together with another tool's image (the truth blurred by
``BLUR_MM``, with the SD of its error as trust); and a hole in a 1 mm scan, in which alone the
errors are then judged. The SD of the samples is taken of each voxel alone, with intervals by
Student's t, and averaged over neighbours (``engine.result.sample_sd``), with the intervals of the
uncertainty map's sidecar (``bids.derivatives.voxel_half_widths``).

The CRPS is that of a normal distribution about the restored image, after one gain. Coverage is the
share of the voxels whose interval contains the truth; the half width is that of the 90 % interval,
mean over the voxels. All in units of the truth's 99th percentile.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.bids.derivatives import interval_half_widths, voxel_half_widths
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.observation import ImageObservation, Observation
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.result import Restoration, sample_sd
from brainprior_bids.evaluation.degrade import Recipe, degrade, thick_slices
from brainprior_bids.evaluation.metrics import matching_gain
from brainprior_bids.evaluation.protocol import (
    AXIS,
    Case,
    Condition,
    Participant,
    gaussian_crps,
    make_case,
)
from brainprior_bids.evaluation.studies.base import Bench, Source, Study, number_of, of_test_set
from brainprior_bids.evaluation.studies.restoration import base_condition
from brainprior_bids.evaluation.summary import (
    Record,
    condition_key,
    counted,
    extent,
    groups_of,
    label_table,
)

BLUR_MM = 0.8
RADII_MM = (10, 5)
"""Of the two spheres of the hole."""
ALONE, AVERAGED = "each voxel alone", "averaged"

Observations = list[Observation | ImageObservation]


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Condition]]:
    """One condition for the T1w of the test set."""
    base = base_condition(options, "uncertainty")
    for spacing in options.spacing:
        for source in of_test_set(sources, "T1w"):
            yield source, replace(base, spacing_mm=spacing, noise_sd=options.noise[0])


def measure(participant: Participant, condition: Condition, bench: Bench) -> Record:
    """``rows``: "problem | SD" -> metrics."""
    case = make_case(participant, condition)
    rng = np.random.default_rng([number_of(participant.name), condition.seed])
    one = observe(case, condition, AXIS, condition.spacing_mm, rng)
    hole = spheres(case)
    problems: dict[str, tuple[Observations, str]] = {
        "one scan, sampler exact": ([one], "exact"),
        "two scans, fused": (
            [one, observe(case, condition, 1, condition.spacing_mm, rng)],
            "auto",
        ),
        "with another tool's image": ([one, other_tool(case)], "auto"),
        "a hole": ([replace(observe(case, condition, AXIS, 1.0, rng), hidden=hole)], "auto"),
    }
    rows: dict[str, dict[str, float]] = {}
    for name, (observations, sampler) in problems.items():
        result = restore(
            observations,
            mask_1mm=case.inside,
            to_mni305=case.to_mni305,
            contrast=participant.contrast,
            prior=bench.load_prior(),
            sampler=sampler,
            n_samples=condition.n_samples,
            n_steps=condition.n_steps,
            seed=condition.seed,
            device=bench.device,
        )
        domain, judged = (hole, hole) if name == "a hole" else (case.inside, case.judged)
        for label, values in compare_spreads(result, case.truth.data, domain, judged).items():
            rows[f"{name} | {label}"] = values
    return {"rows": rows}


def observe(
    case: Case, condition: Condition, axis: int, spacing_mm: float, rng: np.random.Generator
) -> Observation:
    """A scan of the case's block with slices across ``axis``."""
    truth, grid = case.truth.data, case.truth.grid
    recipe = Recipe(
        axis=axis,
        spacing_mm=spacing_mm,
        thickness_mm=spacing_mm,
        profile=condition.profile,
        noise_sd=condition.noise_sd,
    )
    data, own = degrade(truth, grid, recipe, rng, unit=1.0)
    share, _ = thick_slices(
        case.inside.astype(np.float32), grid, axis=axis, spacing_mm=spacing_mm,
        thickness_mm=spacing_mm, profile=condition.profile,
    )  # fmt: skip
    return Observation(
        data,
        grid=own,
        acquisition=Acquisition(axis, spacing_mm, spacing_mm),
        mask=np.clip(share, 0, 1),
        name=f"slices across axis {axis}",
    )


def other_tool(case: Case) -> ImageObservation:
    """The truth blurred, with the SD of its error."""
    blurred = ndimage.gaussian_filter(case.truth.data, BLUR_MM)
    image = np.where(case.inside, blurred, 0).astype(np.float32)
    return ImageObservation(image, float((image - case.truth.data)[case.inside].std()))


def spheres(case: Case) -> NDArray[np.bool_]:
    """(i, j, k) hole: two spheres in the middle of the block."""
    index = np.indices(case.inside.shape)
    middle = np.array(case.inside.shape) // 2
    hole = np.zeros(case.inside.shape, bool)
    for radius, shift in zip(RADII_MM, (0, -sum(RADII_MM) - 3), strict=True):
        centre = (middle + np.array([0, shift, 0])).reshape(3, 1, 1, 1)
        hole |= ((index - centre) ** 2).sum(0) < radius**2
    return hole & case.inside


def compare_spreads(
    result: Restoration,
    truth: NDArray[np.float32],
    domain: NDArray[np.bool_],
    judged: NDArray[np.bool_],
) -> dict[str, dict[str, float]]:
    """The metrics of both SDs.

    Parameters
    ----------
    truth : (i, j, k) array
    domain : (i, j, k) bool array
        Where the variance is averaged.
    judged : (i, j, k) bool array
        Where errors are judged.
    """
    n = len(result.samples)
    spreads = {
        ALONE: (result.samples.std(0, ddof=1), interval_half_widths(n)),
        AVERAGED: (sample_sd(result.samples, domain, (1.0, 1.0, 1.0)), voxel_half_widths(n)),
    }
    gain = matching_gain(result.mean, truth, judged)
    mean, unit = gain * result.mean, float(np.percentile(truth[judged], 99))
    error = np.abs(mean - truth)[judged]
    rows = {}
    for label, (spread, factors) in spreads.items():
        sd = gain * spread
        inside = sd[judged]
        rows[label] = {
            "RMS error / SD": float(np.sqrt((error**2).mean() / (inside**2).mean())),
            "CRPS": gaussian_crps(mean, sd, truth, judged),
            "in the 50 % interval": float((error <= factors["50"] * inside).mean()),
            "in the 90 % interval": float((error <= factors["90"] * inside).mean()),
            "its half width": float(factors["90"] * inside.mean() / unit),
        }
    return rows


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """One row per problem and SD."""
    text = []
    for group in groups_of(records, condition_key):
        first = group[0]
        text += [
            f"{first['contrast']}, slices of {first['spacing_mm']:g} mm, noise "
            f"{first['noise_sd']:g}. {extent(first)}; {counted(first['n_samples'], 'sample')} per "
            "image.",
            "",
            *label_table([r["rows"] for r in group], ["problem", "SD of the samples"]),
            "",
        ]
    return text[:-1]


STUDY = Study(
    "uncertainty",
    cases,
    measure,
    table,
    defaults={"spacing": (5.0,), "noise": (0.01,), "n_samples": 4},
    quick={"n_samples": 2},
)
