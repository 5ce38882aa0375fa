# SPDX-License-Identifier: Apache-2.0
"""Holes in healthy brains, filled in: error, seam, and influence of the hidden content.

    python benchmarks/inpaint.py OUT sub-01_desc-brain_T1w.nii.gz ... --average avg305T1.nii
        [--nprocs 4] [--picture OUT]

One mask has separate spheres of 10, 20 and 30 mm and a ragged blob of some 20 mm, on a T1w at 1 mm
with 2 % noise and a bias field. Three BIDS data sets have the same scan and mask, but differ under
the mask: ``hole`` has 0, ``lesion`` 0.4 of the original intensity, and ``control`` the original.
``brainprior --task inpaint`` fills each. With ``--spacing`` above 1 the slices are thick and the
task is ``restore inpaint``; all images are then compared on the 1 mm grid, after one gain for the
rest of the brain.

In each hole, against the noise-free scan, in units of the brain's 99th percentile: MAE and SSIM of

* ``mean``, ``sample``: the images that the command wrote;
* ``nearest``: each voxel has the value of the nearest voxel outside the hole (in the truth);
* ``average``: the MNI305 average head, transformed by the true affine, with its intensity fitted
  around the hole.

``seam`` is the mean absolute step between neighbours across the border of the hole, divided by the
same in the truth: 1 if the border is invisible. ``off control`` is the mean absolute difference in
the hole from the result of the control, the same scan with neither hole nor lesion. A separate
line states whether every voxel outside the mask is the scan's, bit for bit (1 if so).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from participants import SCANNER_UNIT, Record, Runs, parser, participant, read, run
from scipy import ndimage

from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.grids import Grid
from brainprior_bids.evaluation.degrade import Recipe, add_noise, degrade
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import compare, matching_gain
from brainprior_bids.evaluation.scans import Volume, write_scan

MARGIN = 14
AXIS = 2
PLACES = {
    "10 mm": (0.30, 0.28, 0.58),
    "20 mm": (0.70, 0.45, 0.58),
    "30 mm": (0.30, 0.63, 0.58),
    "blob": (0.70, 0.75, 0.55),
}
"""Middle of each hole, as a share of the brain's box, RAS."""
LESION = 0.4
OUTSIDE = "every voxel outside the mask is the scan's, bit for bit"
DONE = "complete"


def holes(inside: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Spheres, and a ragged blob of about 20 mm, each within the brain."""
    edges = [np.flatnonzero(inside.any(axis=tuple({0, 1, 2} - {a})))[[0, -1]] for a in range(3)]
    low, high = np.transpose(edges)
    ragged = ndimage.gaussian_filter(rng.normal(size=inside.shape), 3)
    found = {}
    for name, place in PLACES.items():
        centre = low + np.array(place) * (high - low)
        away = np.linalg.norm(np.indices(inside.shape).T - centre, axis=-1).T
        if name == "blob":
            found[name] = (away + 5 * ragged / ragged.std() <= 10) & (away < 25) & inside
        else:
            found[name] = (away <= float(name.split()[0]) / 2) & inside
    return found


def seam(image: np.ndarray, where: np.ndarray, inside: np.ndarray) -> float:
    """Mean absolute step between neighbours of which one is in the hole, both in the brain."""
    steps = []
    for axis in range(3):
        low, high = range(where.shape[axis] - 1), range(1, where.shape[axis])
        a, b = np.take(where, low, axis), np.take(where, high, axis)
        c, d = np.take(inside, low, axis), np.take(inside, high, axis)
        steps.append(np.abs(np.diff(image, axis=axis))[(a != b) & c & d])
    return float(np.concatenate(steps).mean())


def one_brain(path: Path, args: argparse.Namespace, record: Record, runs: Runs) -> None:
    """Make the three data sets, run the command on each, compare."""
    if DONE in record:
        return
    held = participant(path, args)
    thick = round(args.spacing)
    sides = [(MARGIN, MARGIN + -(n + 2 * MARGIN) % thick) for n in held.data.shape]
    brain, inside = np.pad(held.data, sides), np.pad(held.inside, sides)
    to_mni305 = held.to_mni305.copy()
    to_mni305[:3, 3] -= to_mni305[:3, :3] @ np.full(3, MARGIN)
    grid = Grid(brain.shape, np.eye(4))
    rng = np.random.default_rng([args.seed, int(held.name)])
    recipe = Recipe(axis=AXIS, spacing_mm=args.spacing, thickness_mm=args.spacing,
                    noise_sd=0.0, bias_sd=args.bias)  # fmt: skip
    clean, own = degrade(brain, grid, recipe, rng, unit=1.0)
    scan = add_noise(clean, rng, sd=args.noise, rician=False)
    found = holes(inside, rng)
    shape = [n for m, f in zip(own.shape, (1, 1, thick), strict=True) for n in (m, f)]
    every = np.any(list(found.values()), axis=0).reshape(shape).any((1, 3, 5))
    variants = {
        "hole": np.where(every, 0, scan),
        "lesion": np.where(every, LESION * scan, scan),
        "control": scan,
    }
    stem = f"{runs.name}_T1w"
    image = "inpainted" if thick == 1 else "restoredInpainted"
    task = ["inpaint"] if thick == 1 else ["restore", "inpaint"]
    results: dict[str, dict[str, np.ndarray]] = {}
    same: dict[str, float] = {}
    for variant, data in variants.items():
        bids_dir = runs.folder / variant
        scanned = Volume((data * SCANNER_UNIT).astype(np.float32), own)
        write_scan(
            bids_dir, stem, scanned, dataset=f"Inpainting, {variant}",
            metadata={"SliceThickness": args.spacing, "SpacingBetweenSlices": args.spacing,
                      "MRAcquisitionType": "3D" if thick == 1 else "2D"},
        )  # fmt: skip
        mask = nib.Nifti1Image(every.astype(np.uint8), np.array(own.affine))
        name = f"{runs.name}_label-lesion_roi.nii.gz"
        nib.save(mask, bids_dir / runs.name / "anat" / name)
        output = runs.command(bids_dir, f"{variant}-out", "--task", *task, "--save-samples")
        mean = read(output, stem, image)
        sample = read(output, stem, image, "sample01")
        results[variant] = {"mean": mean.data, "sample": sample.data}
        if thick == 1:
            same[variant] = float(np.array_equal(mean.data[~every], scanned.data[~every]))
        else:
            results[variant] = {
                key: resample(value, mean.grid, grid) for key, value in results[variant].items()
            }
    truth = clean if thick == 1 else brain
    where_all = np.any(list(found.values()), axis=0)
    shown: dict[str, np.ndarray] = {}
    average = nib.as_closest_canonical(nib.load(args.average))
    head = resample(
        np.asarray(average.dataobj, np.float32),
        Grid(average.shape, average.affine),
        grid,
        matrix=np.linalg.inv(to_mni305),
    )
    nearest = ndimage.distance_transform_edt(
        where_all | ~inside, return_distances=False, return_indices=True
    )
    methods = {
        f"{variant} | {key}": value / SCANNER_UNIT
        for variant, made in results.items()
        for key, value in made.items()
    }
    if thick > 1:
        rest = inside & ~where_all
        methods = {k: v * matching_gain(v, truth, rest) for k, v in methods.items()}
    for kind, where in found.items():
        around = ndimage.binary_dilation(where, iterations=8) & inside & ~where_all
        fit = np.polyfit(head[around], truth[around], 1)
        rows = {
            **methods,
            "- | nearest": truth[tuple(nearest)],
            "- | average": np.polyval(fit, head),
        }
        for method, filled in rows.items():
            variant, _, what = method.partition(" | ")
            put = np.where(where, filled, truth)
            figures = compare(put, truth, where)
            row = {"MAE": figures["mae"], "SSIM": figures["ssim"],
                   "seam": seam(put, where, inside) / seam(truth, where, inside)}  # fmt: skip
            if variant in ("hole", "lesion"):
                off = np.abs(filled - methods[f"control | {what}"])[where]
                row["off control"] = float(off.mean())
            record.add(f"{variant} | {what} | {kind}", row)
            shown[what] = np.where(where, filled, shown.get(what, truth))
    for variant, equal in same.items():  # of a 1 mm scan
        record.add(f"{variant}: {OUTSIDE}", {"value": equal})
    record.add(DONE, {"value": 1.0})
    if args.picture is not None:
        pictures = {"truth": truth, "hole": np.where(where_all, 0, truth)}
        pictures |= {key: shown[key] for key in ("nearest", "mean", "sample")}
        columns = [Column(k, np.where(inside, v, 0), 1.1) for k, v in pictures.items()]
        draw(args.picture / f"inpaint_{runs.name}.png", columns, inside=found["30 mm"],
             spacing_mm=[1.0] * 3, caption=f"{runs.name} (OpenNeuro ds002748, CC0)",
             dpi=60)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    made = parser(__doc__, n_samples=2)
    made.add_argument("--average", type=Path, required=True, help="MNI305 average head")
    made.add_argument("--spacing", type=float, default=1.0, help="slice spacing, mm")
    made.add_argument("--noise", type=float, default=0.02, help="SD, brain's bright end = 1")
    made.add_argument("--bias", type=float, default=0.1, help="SD of the log field")
    return run(made.parse_args(argv), one_brain, ["scan", "what", "hole"])


if __name__ == "__main__":
    raise SystemExit(main())
