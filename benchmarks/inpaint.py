# SPDX-License-Identifier: Apache-2.0
"""Holes in healthy brains, filled: how wrong, is there a seam, does what was hidden matter?

    python benchmarks/inpaint.py --average avg305T1.nii sub-01_desc-brain_T1w.nii.gz ...

A sphere of each size, and a ragged blob, is hidden in the white and grey matter beside the middle
of a T1w at 1 mm with 2 % noise (``--spacing`` makes thick slices of it). Inside the hole, against
the noise-free truth, in units of the brain's 99th percentile: MAE and SSIM of

* ``mean``, ``sample``: the restoration's mean and its first sample;
* ``nearest``: each voxel from the nearest one outside (of the truth);
* ``average``: the MNI305 average head through the affine, brightness fitted around the hole.

``seam`` is the mean absolute step between neighbours across the hole's border over the same in
the truth: 1 where the border cannot be told. ``control`` puts a dark lesion under the mask
and restores again with the same numbers: the largest difference of the two results, which is 0
if nothing under the mask was believed. That the command leaves the scan outside the mask as it
was, bit for bit, is tested (tests/test_interfaces_nodes.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.restore import Restoration, restore
from brainprior_bids.engine.weights import load_parcellation, load_prior
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.metrics import compare
from brainprior_bids.evaluation.protocol import AXIS, Case, Condition, from_scan, make_case


def hole(case: Case, size: float | None, rng: np.random.Generator) -> np.ndarray:
    """A sphere of that diameter, or a ragged blob of some 20 mm, beside the block's middle."""
    shape = np.array(case.truth.grid.shape)
    centre = shape / 2 + np.array([shape[0] * 0.17, 0, 0])
    away = np.linalg.norm(np.indices(tuple(shape)).T - centre, axis=-1).T
    if size is not None:
        return (away <= size / 2) & case.inside
    ragged = ndimage.gaussian_filter(rng.normal(size=tuple(shape)), 3)
    return (away + 5 * ragged / ragged.std() <= 10) & case.inside


def seam(image: np.ndarray, where: np.ndarray, inside: np.ndarray) -> float:
    """Mean absolute step between neighbours of which one is in the hole, both in the brain."""
    steps = []
    for axis in range(3):
        a, b = (np.take(where, r, axis) for r in _pairs(where, axis))
        c, d = (np.take(inside, r, axis) for r in _pairs(where, axis))
        across = (a != b) & c & d
        steps.append(np.abs(np.diff(image, axis=axis))[across])
    return float(np.concatenate(steps).mean())


def _pairs(where: np.ndarray, axis: int) -> tuple[range, range]:
    n = where.shape[axis]
    return range(n - 1), range(1, n)


def fill(
    case: Case, scan: np.ndarray, hidden: np.ndarray, args: argparse.Namespace
) -> Restoration:
    """The restoration of a scan of which some voxels are hidden."""
    return restore(
        scan,
        grid=case.scan.grid,
        acquisition=Acquisition(AXIS, args.spacing, args.spacing),
        mask=case.mask,
        mask_1mm=case.inside,
        to_mni305=case.to_mni305,
        contrast="T1w",
        prior=load_prior(args.prior, device=args.device),
        log_bias=case.log_bias,
        hidden=hidden,
        n_samples=args.n_samples,
        n_steps=args.n_steps,
        seed=args.seed,
        device=args.device,
    )


def thick(where: np.ndarray, grid: Grid) -> np.ndarray:
    """Scan voxels that show anything of a part of the fine grid."""
    factors = [n // m for n, m in zip(where.shape, grid.shape, strict=True)]
    split = [n for m, f in zip(grid.shape, factors, strict=True) for n in (m, f)]
    return where.reshape(split).any((1, 3, 5))


def one_brain(path: Path, args: argparse.Namespace) -> list[list[Any]]:
    """Rows of the table."""
    name = path.name.partition("_")[0].removeprefix("sub-")
    condition = Condition(
        study="inpaint", spacing_mm=args.spacing, noise_sd=args.noise, crop_mm=tuple(args.crop)
    )
    person = from_scan(path, name, "T1w", load_parcellation())
    case = make_case(person, condition)
    truth = case.truth.data
    average = nib.as_closest_canonical(nib.load(args.average))
    head = resample(
        np.asarray(average.dataobj, np.float32),
        Grid(average.shape, average.affine),
        case.truth.grid,
        matrix=np.linalg.inv(case.to_mni305),
    )
    rows = []
    for size in [*args.sizes, *([] if args.no_blob else [None])]:
        where = hole(case, size, np.random.default_rng(args.seed))
        hidden = thick(where, case.scan.grid)
        done = fill(case, case.scan.data, hidden.astype(np.float32), args)
        around = ndimage.binary_dilation(where, iterations=8) & case.inside & ~where
        fit = np.polyfit(head[around], truth[around], 1)
        nearest = ndimage.distance_transform_edt(
            where | ~case.inside, return_distances=False, return_indices=True
        )
        images = {
            "mean": done.mean,
            "sample": done.samples[0],
            "nearest": truth[tuple(nearest)],
            "average": np.polyval(fit, head),
        }
        for method, image in images.items():
            filled = np.where(where, image, truth)
            row = compare(filled, truth, where)
            step = seam(filled, where, case.inside) / seam(truth, where, case.inside)
            rows.append([name, "blob" if size is None else f"{size:g} mm", method,
                         row["mae"], row["ssim"], step])  # fmt: skip
            print(
                "  ".join(f"{c:.4f}" if isinstance(c, float) else c for c in rows[-1]), flush=True
            )
        if size == args.sizes[0]:
            lesion = np.where(hidden, 0.4 * case.scan.data, case.scan.data).astype(np.float32)
            again = fill(case, lesion, hidden.astype(np.float32), args)
            difference = float(np.abs(again.samples - done.samples).max())
            print(f"{name}: control, largest difference with a lesion under the mask {difference}")
        if args.picture is not None:
            shown = {"truth": truth, "hole": np.where(where, 0, truth)}
            for method in ("nearest", "mean", "sample"):
                shown[method] = np.where(where, images[method], truth)
            columns = [Column(k, np.where(case.inside, v, 0), 1.1) for k, v in shown.items()]
            draw(args.picture / f"inpaint_{name}_{'blob' if size is None else f'{size:g}'}.png",
                 columns, inside=where, spacing_mm=[1.0] * 3,
                 caption=f"sub-{name} (OpenNeuro ds002748, CC0)")  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("brains", type=Path, nargs="+", help="1 mm T1w brains, 0 outside")
    parser.add_argument("--average", type=Path, required=True, help="MNI305 average head")
    parser.add_argument("--sizes", type=float, nargs="+", default=[10, 20, 30], help="mm")
    parser.add_argument("--no-blob", action="store_true")
    parser.add_argument("--spacing", type=float, default=1.0, help="slice spacing, mm")
    parser.add_argument("--noise", type=float, default=0.02)
    parser.add_argument("--crop", type=int, nargs=3, default=[96, 96, 96])
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--n-steps", type=int, default=20)
    parser.add_argument("--prior", type=Path, help="weights; default: embedded")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--picture", type=Path, help="folder for a PNG of each hole")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    rows = [row for path in args.brains for row in one_brain(path, args)]
    print("| hole | method | MAE | SSIM | seam |\n|---|---|---|---|---|")
    for kind in dict.fromkeys(r[1] for r in rows):
        for method in ("mean", "sample", "nearest", "average"):
            values = np.array([r[3:] for r in rows if r[1] == kind and r[2] == method], float)
            mae, ssim, step = values.mean(0)
            print(f"| {kind} | {method} | {mae:.4f} | {ssim:.3f} | {step:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
