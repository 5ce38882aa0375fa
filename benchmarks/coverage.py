# SPDX-License-Identifier: Apache-2.0
"""How often do the intervals contain the truth? Region means, by slice thickness and noise.

    python benchmarks/coverage.py OUT sub-01_desc-brain_T1w.nii.gz ... [--crop 80 96 80]

For each brain and condition: degrade, restore, take the mean of every region in each sample. The
interval is ``m ± t(N - 1) s sqrt(1 + 1/N)`` with m and s over the N samples (as ``bids`` writes it
into the uncertainty map's sidecar); it covers if the truth's mean lies in it. No gain is fitted.
Regions: cubes of ``--region`` mm entirely inside the brain, and the structures of the degraded
scan's parcellation with at least ``FEWEST`` voxels. (Structures segmented in the *truth* would
bias the test: voxels selected because they are bright in the truth are darker in every unbiased
sample.) A participant's coverage is the share of its regions; the table has the mean over
the participants and the 95 % interval of a bootstrap over them.

The network's own error is common to all samples and is not part of their spread. Its SD, for each
condition and kind of region, is estimated from the ``--choose`` brains of other participants
(``own_error``); a second row has the intervals ``m ± t(N - 1) sqrt(s² (1 + 1/N) + e²)``.

Every restoration writes ``OUT/<participant>-<condition>.json``: a run that was stopped resumes. A
record of other weights or settings is replaced.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from brainprior_bids.anatomy.parcellation import parcellate
from brainprior_bids.bids.derivatives import interval_half_widths
from brainprior_bids.bids.files import read_json, write_json
from brainprior_bids.engine.nuisance import THICKNESS_SD
from brainprior_bids.engine.weights import FOLDER, load_parcellation, load_prior, sha256_file
from brainprior_bids.evaluation.protocol import (
    Case,
    Condition,
    Participant,
    from_scan,
    make_case,
    restored,
)

FEWEST = 200
KINDS = ("cubes", "structures")


def seen_structures(
    participant: Participant, condition: Condition, case: Case
) -> NDArray[np.int16]:
    """(i, j, k) structures as found in the degraded scan, on the case's 1 mm grid."""
    whole = make_case(participant, replace(condition, crop_mm=None))
    fine = whole.scan.grid.one_millimetre()
    image = nib.Nifti1Image(whole.scan.data, np.array(whole.scan.grid.affine))
    found = parcellate(image, network=load_parcellation(), restored_grid=fine).structures
    start = np.round(case.truth.grid.affine[:3, 3] - fine.affine[:3, 3]).astype(int)
    return found[tuple(slice(s, s + n) for s, n in zip(start, case.truth.data.shape, strict=True))]


def regions(case: Case, structures: NDArray[np.int16], size: int) -> dict[str, list[np.ndarray]]:
    """Kind -> flat voxel indices of each region."""
    index = np.arange(case.judged.size).reshape(case.judged.shape)
    cubes = []
    for corner in itertools.product(*(range(0, n - size + 1, size) for n in index.shape)):
        part = tuple(slice(c, c + size) for c in corner)
        if case.judged[part].all():
            cubes.append(index[part].ravel())
    known = []
    for label in np.unique(structures[case.judged]):
        where = index[case.judged & (structures == label)]
        if label > 0 and len(where) >= FEWEST:
            known.append(where)
    return {"cubes": cubes, "structures": known}


def region_means(
    samples: np.ndarray, truth: np.ndarray, found: list[np.ndarray]
) -> dict[str, list[float]]:
    """``error`` (truth - mean of the samples) and ``sd`` (between samples) of each region."""
    means = np.array([[s.ravel()[where].mean() for where in found] for s in samples])
    true = np.array([truth.ravel()[where].mean() for where in found])
    return {
        "error": [round(float(e), 7) for e in true - means.mean(0)],
        "sd": [round(float(sd), 7) for sd in means.std(0, ddof=1)],
    }


def spread(row: dict[str, list[float]], n: int, own: float) -> NDArray[np.float64]:
    """SD of the truth's distance from the mean of n samples, ``own`` SD shared by all samples."""
    return np.sqrt(np.square(row["sd"]) * (1 + 1 / n) + own**2)


def covered(row: dict[str, list[float]], n: int, own: float) -> dict[str, float]:
    """Per cent -> share of the regions whose interval holds the truth; and how far off it is.

    ``rms_z`` is the root mean square of the truth's distance in units of ``spread``.
    """
    z = np.abs(row["error"]) / spread(row, n, own)
    result = {"rms_z": float(np.sqrt(np.mean(z**2)))}
    for percent, width in interval_half_widths(n).items():
        result[percent] = float((z <= width / np.sqrt(1 + 1 / n)).mean())
    return result


def own_error(rows: Sequence[dict[str, list[float]]], n: int) -> float:
    """The SD that all samples share: the likeliest under Student's t with n - 1 degrees."""
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


def one(path: Path, condition: Condition, args: argparse.Namespace) -> dict[str, Any]:
    """The record of one brain under one condition; made if it is not there."""
    name = path.name.partition("_")[0].removeprefix("sub-")
    record = args.out / f"{name}-{condition.kind}.json"
    made_by = {
        "prior": sha256_file(args.prior or FOLDER / "prior.safetensors"),
        "region_mm": args.region,
        "structures": "of the scan",
        "record": "errors",
        "thickness_sd": THICKNESS_SD,
        **json.loads(json.dumps(asdict(condition))),
    }
    if record.exists() and (found := read_json(record)).get("made_by") == made_by:
        return found
    participant = from_scan(path, name, "T1w", load_parcellation())
    case = make_case(participant, condition)
    done = restored(
        case,
        condition,
        "T1w",
        prior=load_prior(args.prior, device=args.device),
        device=args.device,
    )
    found = {
        kind: region_means(done.samples, case.truth.data, where)
        for kind, where in regions(
            case, seen_structures(participant, condition, case), args.region
        ).items()
        if where
    }
    result = {
        "participant": name,
        "condition": condition.kind,
        "sampler": done.sampler,
        "made_by": made_by,
        **found,
    }
    write_json(record, result)
    return result


def table(
    records: Sequence[dict[str, Any]], choosing: Sequence[dict[str, Any]], n: int
) -> list[str]:
    """Markdown rows: condition, kind, coverage with its interval."""
    lines = ["| condition | regions | own error | 50 % | 90 % | RMS z | participants |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    rng = np.random.default_rng(0)
    for condition in dict.fromkeys(r["condition"] for r in records):
        for kind in KINDS:
            rows = [r[kind] for r in records if r["condition"] == condition and kind in r]
            chose = [r[kind] for r in choosing if r["condition"] == condition and kind in r]
            for own in [0.0, own_error(chose, n)] if chose and rows else [0.0] if rows else []:
                held = [covered(row, n, own) for row in rows]
                cells = []
                for percent in ("50", "90"):
                    values = np.array([h[percent] for h in held])
                    draws = rng.choice(values, (2000, len(values))).mean(1)
                    low, high = np.percentile(draws, (2.5, 97.5))
                    cells.append(f"{100 * values.mean():.0f} [{100 * low:.0f}, {100 * high:.0f}]")
                z = np.mean([h["rms_z"] for h in held])
                count = int(np.mean([len(row["sd"]) for row in rows]))
                lines.append(
                    f"| {condition} | {count} {kind} | {own:.4f} | {' | '.join(cells)} | "
                    f"{z:.2f} | {len(rows)} |"
                )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of the records and of coverage.md")
    parser.add_argument("brains", type=Path, nargs="+", help="1 mm T1w brains, 0 outside")
    parser.add_argument(
        "--choose", type=Path, nargs="*", default=[], help="brains of others: own error"
    )
    parser.add_argument("--spacing", type=float, nargs="+", default=[3.0, 5.0], help="mm")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.01, 0.03])
    parser.add_argument("--crop", type=int, nargs="*", default=[80, 96, 80], help="none: whole")
    parser.add_argument("--region", type=int, default=8, help="edge of the cubes, mm")
    parser.add_argument("--n-samples", type=int, default=8)
    parser.add_argument("--n-steps", type=int, help="default: the sampler's own")
    parser.add_argument("--prior", type=Path, help="weights; default: embedded")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    records: dict[str, list[dict[str, Any]]] = {"report": [], "choose": []}
    for spacing, noise in itertools.product(args.spacing, args.noise):
        condition = Condition(
            study="coverage",
            spacing_mm=spacing,
            noise_sd=noise,
            n_samples=args.n_samples,
            n_steps=args.n_steps,
            crop_mm=tuple(args.crop) or None,
        )
        for split, paths in (("report", args.brains), ("choose", args.choose)):
            for path in paths:
                records[split].append(one(path, condition, args))
                print(f"{path.name}, {condition.kind}", flush=True)
    text = "\n".join(table(records["report"], records["choose"], args.n_samples))
    (args.out / "coverage.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
