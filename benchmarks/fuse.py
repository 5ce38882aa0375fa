# SPDX-License-Identifier: Apache-2.0
"""Three crossed stacks of thick slices of one moving participant: each alone, averaged, and fused.

    python benchmarks/fuse.py OUT sub-01_desc-brain_T1w.nii.gz ... [--nprocs 4] [--picture OUT]

A skull-stripped T1w is rotated and shifted at random for each stack except the first (normal, SD 4
degrees about each axis and 4 mm along it), and averaged to slices along k, j and i, each with its
own bias field and noise. The three are runs of a BIDS data set, on which ``brainprior`` runs
twice: with ``--task restore``, separately for each run, and with ``--fuse runs``, which estimates
the motion. For the comparison, the single restorations and the cubic interpolations (divided by
N4's field) are moved back by the *true* motion and averaged. Metrics are computed after one gain,
as in ``brainprior evaluate``, in the intersection of the truth's mask and that of the fused run:
the masks supplied with some brains are wide and include vessels and fat, which ``brainprior``
removes (a separate line has their share). ``psnr_field`` is computed after a gain that may vary
slowly.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from participants import (
    PLANES,
    SCANNER_UNIT,
    Record,
    Runs,
    parser,
    participant,
    read,
    restore_record,
    run,
)
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.degrade import Recipe, degrade, thick_slices
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.scans import Volume, write_scan
from brainprior_bids.evaluation.thick_slices import figures

MARGIN = 14
STACKS = {"axi": 2, "cor": 1, "sag": 0}
"""Acquisition -> slice axis; the first is the reference, as chosen by the command."""
LAST = "fused, PSNR above the best of the others, dB"
KEPT = {"mae": "MAE", "psnr_db": "PSNR dB", "ssim": "SSIM", "psnr_field_db": "psnr_field dB"}


def rigid(rng: np.random.Generator, centre: np.ndarray, degrees: float, mm: float) -> np.ndarray:
    """A random motion about ``centre``."""
    turn = Rotation.from_rotvec(np.radians(rng.normal(0, degrees, 3))).as_matrix()
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = centre - turn @ centre + rng.normal(0, mm, 3)
    return matrix


def one_brain(path: Path, args: argparse.Namespace, record: Record, runs: Runs) -> None:
    """Degrade, run the command twice, compare."""
    if LAST in record:
        return
    held = participant(path, args)
    thick = round(args.spacing)
    sides = [(MARGIN, MARGIN + -(n + 2 * MARGIN) % thick) for n in held.data.shape]
    truth, inside = np.pad(held.data, sides), np.pad(held.inside, sides)
    inside = ndimage.binary_fill_holes(inside)
    grid = Grid(truth.shape, np.eye(4))
    rng = np.random.default_rng([args.seed, int(held.name)])
    images: dict[str, np.ndarray] = {}
    motions, stems, bids_dir = [], [], runs.folder / "bids"
    for name, axis in STACKS.items():
        motion = np.eye(4)
        if motions:
            motion = rigid(rng, np.array(grid.shape) / 2, args.degrees, args.mm)
        motions.append(motion)
        there = resample(inside, grid, grid, matrix=motion, order=1) > 0.5
        moved = np.where(there, resample(truth, grid, grid, matrix=motion), 0)
        recipe = Recipe(axis=axis, spacing_mm=args.spacing, thickness_mm=args.spacing,
                        noise_sd=args.noise, bias_sd=args.bias)  # fmt: skip
        data, own = degrade(moved, grid, recipe, rng, unit=1.0)
        stems.append(f"{runs.name}_acq-{name}_T1w")
        write_scan(
            bids_dir, stems[-1], Volume(data * SCANNER_UNIT, own),
            dataset="Crossed thick-slice stacks of one participant",
            metadata={"SliceThickness": args.spacing, "SpacingBetweenSlices": args.spacing,
                      "MRAcquisitionType": "2D"},
        )  # fmt: skip
        share, _ = thick_slices(there.astype(np.float32), grid, axis=axis, spacing_mm=args.spacing)
        flat = data / np.exp(n4(nib.Nifti1Image(data, np.array(own.affine)), share, threads=1))
        cubic = resample(flat, own, grid)
        images[f"cubic, {name}"] = resample(cubic, grid, grid, matrix=np.linalg.inv(motion))
    alone = runs.command(bids_dir, "alone")
    fused = runs.command(bids_dir, "fused", "--fuse", "runs")
    for name, stem, motion in zip(STACKS, stems, motions, strict=True):
        single = read(alone, stem, "restored")
        images[f"restored, {name}"] = resample(
            single.data, single.grid, grid, matrix=np.linalg.inv(motion)
        )
    for kind in ("cubic", "restored"):
        parts = [images[f"{kind}, {name}"] for name in STACKS]
        images[f"{kind}, average of three"] = np.mean(parts, axis=0)
    result = read(fused, f"{runs.name}_T1w", "restored")
    images["fused"] = resample(result.data, result.grid, grid)
    own = read(fused, f"{runs.name}_T1w", "restored", role="mask")
    kept = resample(own.data.astype(np.float32), own.grid, grid, order=1) > 0.5
    stripped = 1 - float(kept[inside].mean())
    inside &= kept
    rows = figures(images, truth, inside, grid.spacing_mm)
    points = np.argwhere(inside)[:: max(1, inside.sum() // 1000)]
    fused_runs = restore_record(fused, f"{runs.name}_T1w", "restored").runs or ()
    worst = []
    for stem, motion in zip(stems, motions, strict=True):
        (to_reference,) = (run.to_reference for run in fused_runs if run.name == stem)
        off = np.array(to_reference) @ motion - np.eye(4)
        worst.append(np.linalg.norm(points @ off[:3, :3].T + off[:3, 3], axis=1).max())
    best = max(row["psnr_db"] for method, row in rows.items() if method != "fused")
    ratios = [ratio for run in fused_runs for ratio in run.residual_ratios]
    for method, row in rows.items():
        record.add(method, {name: row[key] for key, name in KEPT.items()})
    record.add("fused, motion found to mm at the worst voxel", {"value": float(max(worst))})
    record.add("fused, share of the given mask that it strips", {"value": stripped})
    record.add("fused, residual in noise SDs, mean", {"value": float(np.mean(ratios))})
    record.add(LAST, {"value": rows["fused"]["psnr_db"] - best})
    if args.picture is not None:
        shown = {
            "truth": truth,
            "one stack, cubic": images["cubic, axi"],
            "one stack, restored": images["restored, axi"],
            "average of three": images["restored, average of three"],
            "fused": images["fused"],
        }
        columns = [
            Column(key, np.where(inside, image, 0), 1.1 * float(np.percentile(image[inside], 99)))
            for key, image in shown.items()
        ]
        caption = f"{runs.name} (OpenNeuro ds002748, CC0), slices of {args.spacing:g} mm"
        draw(args.picture / f"fuse_{runs.name}.png", columns, inside=inside,
             spacing_mm=[1.0] * 3, caption=caption, dpi=60,
             planes=PLANES[args.slab is None])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    made = parser(__doc__, n_samples=2)
    made.add_argument("--spacing", type=float, default=5.0, help="slice spacing, mm")
    made.add_argument("--noise", type=float, default=0.01, help="SD, brain's bright end = 1")
    made.add_argument("--bias", type=float, default=0.1, help="SD of the log field")
    made.add_argument("--degrees", type=float, default=4.0, help="SD of the rotations")
    made.add_argument("--mm", type=float, default=4.0, help="SD of the shifts")
    return run(made.parse_args(argv), one_brain, ["what"])


if __name__ == "__main__":
    raise SystemExit(main())
