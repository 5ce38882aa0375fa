# SPDX-License-Identifier: Apache-2.0
"""How often does an image show a structure that is not there?

A *false structure* is a connected region in which the image is above the truth, or below it, by
more than ``FACTOR`` predicted SDs. The SD is that of the restored image (predicted by the prior,
or that of the samples if the weights predict none), so that the threshold is the same for every
method. Voxels are neighbours if they share a face. Each image has its least-squares gain.
"""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.evaluation.metrics import matching_gain
from brainprior_bids.evaluation.protocol import (
    Condition,
    Participant,
    classical,
    make_case,
    restored,
)
from brainprior_bids.evaluation.studies.base import Bench, Source, Study, of_test_set
from brainprior_bids.evaluation.studies.restoration import base_condition, width_of
from brainprior_bids.evaluation.summary import (
    NAMES,
    Record,
    condition_key,
    groups_of,
    interval,
    scan,
    settings,
)

FACTOR = 3.0
SIZES_MM3 = (10, 100)
"""Smallest volumes of the regions that are counted."""
METHODS = ("cubic", "tv", "sample", "restored")


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Condition]]:
    """Every spacing and noise for the scans of the test set."""
    base = base_condition(options, "hallucination")
    for spacing, noise in itertools.product(options.spacing, options.noise):
        for n, source in enumerate(of_test_set(sources)):
            width = width_of(options, n)
            yield source, replace(base, spacing_mm=spacing, noise_sd=noise, width=width)


def measure(participant: Participant, condition: Condition, bench: Bench) -> Record:
    """``false_structures`` of every method."""
    case = make_case(participant, condition)
    result = restored(
        case, condition, participant.contrast, prior=bench.load_prior(), device=bench.device
    )
    if result.sd is None:
        raise UsageError(
            "hallucination: these weights predict no SD, and one sample has none. Pass a larger "
            "--n-samples."
        )
    images = {**classical(case, bench.penalties), "restored": result.mean}
    if len(result.samples):
        images["sample"] = result.samples[0]
    truth, judged = case.truth.data, case.judged
    gains = {method: matching_gain(images[method], truth, judged) for method in images}
    sd = result.sd * gains["restored"]
    if result.sd_from == "samples":
        sd = sd * math.sqrt(1 + 1 / len(result.samples))
    return {
        "sampler_used": result.sampler,
        "sd_from": result.sd_from,
        "methods": {
            method: false_structures(gains[method] * images[method], truth, sd, judged)
            for method in METHODS
            if method in images
        },
    }


def false_structures(
    image: NDArray[np.floating[Any]],
    truth: NDArray[np.floating[Any]],
    sd: NDArray[np.floating[Any]],
    inside: NDArray[np.bool_],
) -> dict[str, Any]:
    """Voxels beyond ``FACTOR`` SDs and the connected regions that they form.

    Parameters
    ----------
    image, truth, sd : (i, j, k) arrays
        Same grid of 1 mm voxels, same unit.
    inside : (i, j, k) bool array
        Where they are compared.

    Returns
    -------
    dict
        ``share`` of the voxels inside, ``largest`` region in mm³, and ``regions``: smallest volume
        in mm³ -> number of regions of at least this volume, per 100 ml inside.
    """
    error = image - truth
    sizes = np.concatenate(
        [
            np.bincount(ndimage.label(far & inside)[0].ravel())[1:]
            for far in (error > FACTOR * sd, error < -FACTOR * sd)
        ]
    )
    volume = int(inside.sum())
    return {
        "share": float(sizes.sum() / volume),
        "largest": int(sizes.max(initial=0)),
        "regions": {
            str(least): float((sizes >= least).sum() * 1e5 / volume) for least in SIZES_MM3
        },
    }


def table(records: Sequence[Record], _: Sequence[Record]) -> list[str]:
    """One row per condition and method."""
    sources = {"prior": "predicted by the prior", "samples": "of the samples"}
    kinds = " and ".join(sources[kind] for kind in sorted({r["sd_from"] for r in records}))
    columns = ["scan", "image", f"beyond {FACTOR:g} SD, % of the voxels"]
    columns += [f"regions ≥ {least} mm³ per 100 ml" for least in SIZES_MM3]
    columns += ["largest region, mm³"]
    text = [f"{settings(records)} SD: {kinds}.", ""]
    text += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for group in groups_of(records, condition_key):
        for method in METHODS:
            rows = [r["methods"][method] for r in group if method in r["methods"]]
            cells = [scan(group[0]), NAMES[method]]
            cells.append(interval([100 * row["share"] for row in rows], 2))
            cells += [interval([r["regions"][str(least)] for r in rows], 1) for least in SIZES_MM3]
            cells.append(f"{max((row['largest'] for row in rows), default=0)}")
            if rows:
                text.append(f"| {' | '.join(cells)} |")
    return text


STUDY = Study(
    "hallucination",
    cases,
    measure,
    table,
    defaults={"spacing": (3.0, 5.0, 7.0), "noise": (0.01,), "n_samples": 4},
    quick={"spacing": (5.0,)},
    tuned=True,
)
