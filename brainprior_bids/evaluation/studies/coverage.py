# SPDX-License-Identifier: Apache-2.0
"""How often do the intervals contain the truth? Region means, by slice thickness and noise.

For each brain and condition: degrade, restore, take the mean of every region in each sample. The
interval is ``m ± t(N - 1) s sqrt(1 + 1/N)`` with m and s over the N samples (as ``bids`` writes it
into the uncertainty map's sidecar); it covers if the truth's mean lies in it. No gain is fitted.
Regions: cubes of ``REGION_MM`` entirely inside the brain, and the structures of the degraded
scan's parcellation with at least ``FEWEST`` voxels. (Structures segmented in the *truth* would
bias the test: voxels selected because they are bright in the truth are darker in every unbiased
sample.) A participant's coverage is the share of its regions; the table has the mean over
the participants and the 95 % interval of a bootstrap over them.

The network's own error e is common to all samples and is not part of their spread. Its SD, for
each condition and kind of region, is estimated from the validation set (``own_error``); a second
row has the intervals ``m ± t(N - 1) sqrt(s² (1 + 1/N) + e²)``.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from brainprior_bids.anatomy.parcellation import parcellate
from brainprior_bids.bids.derivatives import interval_half_widths
from brainprior_bids.evaluation.protocol import (
    Case,
    Condition,
    Participant,
    make_case,
    restored,
)
from brainprior_bids.evaluation.studies.base import (
    Bench,
    Source,
    Study,
    of_test_set,
    parcellation,
)
from brainprior_bids.evaluation.studies.restoration import base_condition
from brainprior_bids.evaluation.summary import Record, calls_of, counted, extent

FEWEST = 200
REGION_MM = 8
KINDS = {"cubes": f"cubes of {REGION_MM} mm", "structures": "structures"}
"""Kinds of regions, and their names in the table."""


def cases(options: Namespace, sources: Sequence[Source]) -> Iterator[tuple[Source, Condition]]:
    """Every spacing and noise for the T1w of the test and of the validation set."""
    base = base_condition(options, "coverage")
    validation = [s for s in sources if s.choosing and not s.synthetic and s.contrast == "T1w"]
    for spacing, noise in itertools.product(options.spacing, options.noise):
        for source in [*of_test_set(sources, "T1w"), *validation]:
            yield source, replace(base, spacing_mm=spacing, noise_sd=noise)


def measure(participant: Participant, condition: Condition, bench: Bench) -> Record:
    """``error`` and ``sd`` of every region, by kind."""
    case = make_case(participant, condition)
    result = restored(
        case,
        condition,
        participant.contrast,
        prior=bench.load_prior(),
        device=bench.device,
    )
    where = regions(case, seen_structures(participant, condition, case))
    means = {
        kind: region_means(result.samples, case.truth.data, indices)
        for kind, indices in where.items()
        if indices
    }
    return {"sampler_used": result.sampler, **means}


def seen_structures(
    participant: Participant, condition: Condition, case: Case
) -> NDArray[np.int16]:
    """(i, j, k) structures segmented in the degraded scan, on the case's 1 mm grid."""
    whole = make_case(participant, replace(condition, crop_mm=None))
    fine = whole.scan.grid.one_millimetre()
    image = nib.Nifti1Image(whole.scan.data, np.array(whole.scan.grid.affine))
    structures = parcellate(image, network=parcellation(), restored_grid=fine).structures
    start = np.round(case.truth.grid.affine[:3, 3] - fine.affine[:3, 3]).astype(int)
    part = tuple(slice(s, s + n) for s, n in zip(start, case.truth.data.shape, strict=True))
    return structures[part]


def regions(case: Case, structures: NDArray[np.int16]) -> dict[str, list[NDArray[np.int64]]]:
    """Kind -> flat voxel indices of each region."""
    index = np.arange(case.judged.size).reshape(case.judged.shape)
    cubes = []
    corners = (range(0, n - REGION_MM + 1, REGION_MM) for n in index.shape)
    for corner in itertools.product(*corners):
        part = tuple(slice(c, c + REGION_MM) for c in corner)
        if case.judged[part].all():
            cubes.append(index[part].ravel())
    known = []
    for label in np.unique(structures[case.judged]):
        where = index[case.judged & (structures == label)]
        if label > 0 and len(where) >= FEWEST:
            known.append(where)
    return {"cubes": cubes, "structures": known}


def region_means(
    samples: NDArray[np.float32], truth: NDArray[np.float32], indices: list[NDArray[np.int64]]
) -> dict[str, list[float]]:
    """``error`` (truth - mean of the samples) and ``sd`` (between samples) of each region.

    Parameters
    ----------
    samples : (n, i, j, k) array
    truth : (i, j, k) array
    indices : list of arrays
        Flat voxel indices of each region.
    """
    means = np.array([[s.ravel()[where].mean() for where in indices] for s in samples])
    true = np.array([truth.ravel()[where].mean() for where in indices])
    return {
        "error": [round(float(e), 7) for e in true - means.mean(0)],
        "sd": [round(float(sd), 7) for sd in means.std(0, ddof=1)],
    }


def spread(row: Mapping[str, list[float]], n: int, own: float) -> NDArray[np.float64]:
    """SD of the truth about the mean of n samples, with an error of SD ``own`` shared by all."""
    total: NDArray[np.float64] = np.sqrt(np.square(row["sd"]) * (1 + 1 / n) + own**2)
    return total


def covered(row: Mapping[str, list[float]], n: int, own: float) -> dict[str, float]:
    """Per cent -> share of the regions whose interval contains the truth; and ``rms_z``.

    ``rms_z`` is the root mean square of the error in units of ``spread``.
    """
    z = np.abs(row["error"]) / spread(row, n, own)
    result = {"rms_z": float(np.sqrt(np.mean(z**2)))}
    for percent, width in interval_half_widths(n).items():
        result[percent] = float((z <= width / np.sqrt(1 + 1 / n)).mean())
    return result


def own_error(rows: Sequence[Mapping[str, list[float]]], n: int) -> float:
    """Maximum-likelihood SD of the shared error, for Student's t with n - 1 degrees of freedom."""
    candidates = np.concatenate([[0.0], np.geomspace(2e-4, 0.05, 60)])
    likelihood = [
        sum(
            float((student_t.logpdf(np.divide(row["error"], sd), n - 1) - np.log(sd)).sum())
            for row in rows
            for sd in [spread(row, n, own)]
        )
        for own in candidates
    ]
    return float(candidates[int(np.argmax(likelihood))])


def rows_of(records: Sequence[Record], validation: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per condition, kind of region and own error: coverage in %, with its interval."""
    rng = np.random.default_rng(0)
    n = records[0]["n_samples"]
    rows = []
    for condition in sorted({_condition(r) for r in records}):
        for kind in KINDS:
            regions_test, regions_validation = (
                [r[kind] for r in group if _condition(r) == condition and kind in r]
                for group in (records, validation)
            )
            for shared in (False, True) if regions_validation else (False,):
                own = own_error(regions_validation, n) if shared else 0.0
                shares = [covered(row, n, own) for row in regions_test]
                if not shares:
                    continue
                row = {"scans": scans(*condition), "kind": kind, "shared": shared, "own": own}
                row["regions"] = int(np.mean([len(one["sd"]) for one in regions_test]))
                for percent in ("50", "90"):
                    values = np.array([share[percent] for share in shares])
                    draws = rng.choice(values, (2000, len(values))).mean(1)
                    ends = np.percentile(draws, (2.5, 97.5))
                    row[percent] = [round(100 * float(v)) for v in (values.mean(), *ends)]
                row["rms_z"] = float(np.mean([share["rms_z"] for share in shares]))
                rows.append(row)
    return rows


def _condition(r: Record) -> tuple[float, float]:
    return r["spacing_mm"], r["noise_sd"]


def scans(spacing_mm: float, noise_sd: float) -> str:
    """``5 mm, 1 %``"""
    return f"{spacing_mm:g} mm, {100 * noise_sd:g} %"


def table(records: Sequence[Record], validation: Sequence[Record]) -> list[str]:
    """Coverage by condition and kind of region, without and with the network's own error."""
    first = records[0]
    others = sorted({r["participant"] for r in validation})
    text = (
        f"{first['contrast']}. {extent(first)}; samples per image: {first['n_samples']}, "
        f"{first['sampler_used']}, of {calls_of(first)} calls each."
    )
    if others:
        text += f" Own error e (SD, brain's 99th percentile = 1) estimated in {', '.join(others)}."
    columns = "| slices, noise | regions per participant | e | coverage of the 50 % interval "
    columns += "| coverage of the 90 % interval | RMS of error / SD |"
    lines = [text, "", columns, "|---|---|---|---|---|---|"]
    for row in rows_of(records, validation):
        shares = [f"{m} % [{low}, {high}]" for m, low, high in (row["50"], row["90"])]
        own = f"{row['own']:.4f}" if row["shared"] else "0"
        lines.append(
            f"| {row['scans']} | {row['regions']} {KINDS[row['kind']]} | {own} | "
            f"{' | '.join(shares)} | {row['rms_z']:.2f} |"
        )
    return lines


def measured(records: Sequence[Record], validation: Sequence[Record]) -> dict[str, Any]:
    """The rows without the own error, for reports."""
    first = records[0]
    who = counted(len({r["participant"] for r in records}), "participant")
    how = f"{who}, {first['contrast']}, {counted(first['n_samples'], 'sample')} of "
    names = {**KINDS, "structures": "whole structures"}
    return {
        "how": how + first["sampler_used"],
        "of": {
            "contrast": first["contrast"], "sampler": first["sampler_used"], "task": "restore",
        },
        "rows": [
            {"scans": row["scans"], "of": names[row["kind"]], "50": row["50"][0],
             "90": row["90"][0]}
            for row in rows_of(records, validation)
            if not row["shared"]
        ],
    }  # fmt: skip


STUDY = Study(
    "coverage",
    cases,
    measure,
    table,
    defaults={"spacing": (3.0, 5.0), "noise": (0.01, 0.03), "n_samples": 8},
    quick={"spacing": (5.0,), "noise": (0.01,), "n_samples": 4},
    measured=measured,
)
