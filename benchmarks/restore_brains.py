# SPDX-License-Identifier: Apache-2.0
"""The engine alone on real skull-stripped brains: degraded, restored, compared with the truth.

    python benchmarks/restore_brains.py --average avg305T1.nii sub-01_desc-brain_T1w.nii.gz ...

No parcellation and no command: the mask is the truth's, the affine to MNI305 is registered on the
truth. What is measured is the prior, the operators and the sampler. The slice profile is a
trapezoid and the bias field a random spline, neither of which the engine assumes.

Tikhonov and TV know the true slice weights and are divided by the same N4 field (of the thick
scan) as the interpolations. Every image is multiplied by its least-squares gain on the truth.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from brainprior_bids.anatomy.bias import n4
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.weights import load_prior
from brainprior_bids.evaluation.degrade import Recipe, degrade, slice_weights
from brainprior_bids.evaluation.metrics import crps
from brainprior_bids.evaluation.scans import Volume
from brainprior_bids.evaluation.thick_slices import classical, figures
from brainprior_bids.training.preprocess import UNIT, mni305_brain, prepare

MARGIN = 10


def one_brain(path: Path, average: Path, args: argparse.Namespace) -> None:
    """Degrade, restore, print."""
    brain = prepare(path.name, "T1w", "report", path, mni305_brain(average))
    truth = brain.data.astype(np.float32) / UNIT
    thick = round(args.spacing)
    extra = [-(n + 2 * MARGIN) % thick if a == args.axis else 0 for a, n in enumerate(truth.shape)]
    truth = np.pad(truth, [(MARGIN, MARGIN + e) for e in extra])
    grid = Grid(truth.shape, np.eye(4))
    to_mni305 = np.array(brain.to_mni305)
    to_mni305[:3, 3] -= to_mni305[:3, :3] @ np.full(3, MARGIN)
    inside = ndimage.binary_fill_holes(truth > 0)
    recipe = Recipe(
        axis=args.axis,
        spacing_mm=args.spacing,
        thickness_mm=args.spacing,
        noise_sd=args.noise,
        bias_sd=args.bias,
        width=args.width,
    )
    rng = np.random.default_rng(args.seed)
    scan = Volume(*degrade(truth, grid, recipe, rng, unit=1.0))
    weights = slice_weights(
        grid.shape[args.axis], 1.0, args.spacing, args.spacing * args.width, recipe.profile
    )
    mask = np.moveaxis(np.tensordot(weights, inside, axes=(1, args.axis)), 0, args.axis)
    log_bias = n4(nib.Nifti1Image(scan.data, np.array(scan.grid.affine)), mask)
    flat = Volume((scan.data / np.exp(log_bias)).astype(np.float32), scan.grid)
    images = classical(flat, grid, weights, axis=args.axis, unit=1.0)

    began = time.perf_counter()
    found = restore(
        scan.data,
        grid=scan.grid,
        acquisition=Acquisition(args.axis, args.spacing, args.spacing),
        mask=mask,
        mask_1mm=inside,
        to_mni305=to_mni305,
        contrast="T1w",
        prior=load_prior(args.prior, device=args.device),
        log_bias=log_bias,
        n_samples=args.n_samples,
        n_steps=args.n_steps,
        sampler=args.sampler,
        seed=args.seed,
        device=args.device,
    )
    seconds = time.perf_counter() - began
    images["single sample"] = found.samples[0]
    images["mean of samples"] = found.mean
    print(
        f"{path.name}: noise {args.noise} found {found.noise_sd:.4f}, residual ratios "
        f"{np.round(found.residual_ratios, 3)}, {seconds:.0f} s, warnings {found.warnings}"
    )
    for method, row in figures(images, truth, inside).items():
        cells = "  ".join(f"{key} {value:.4f}" for key, value in row.items())
        print(f"  {method:16s} {cells}", flush=True)
    if found.sd is not None:
        error = np.abs(found.mean - truth)[inside]
        spread = found.sd[inside] * np.sqrt(1 + 1 / args.n_samples)
        rank = np.corrcoef(error, spread)[0, 1]
        print(
            f"  CRPS {crps(found.samples, truth, inside):.4f}; RMS error / RMS predictive SD "
            f"{np.sqrt(np.mean(error**2) / np.mean(spread**2)):.2f}; correlation of |error| and "
            f"SD {rank:.2f}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("brains", type=Path, nargs="+", help="1 mm T1w brains, 0 outside")
    parser.add_argument("--average", type=Path, required=True, help="MNI305 average head")
    parser.add_argument("--prior", type=Path, help="weights; default: embedded")
    parser.add_argument("--axis", type=int, choices=(0, 1, 2), default=2)
    parser.add_argument("--spacing", type=float, default=5.0, help="slice spacing, mm")
    parser.add_argument("--width", type=float, default=1.0, help="true over stated thickness")
    parser.add_argument("--noise", type=float, default=0.01, help="SD, brain's bright end = 1")
    parser.add_argument("--bias", type=float, default=0.1, help="SD of the log field")
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--n-steps", type=int, default=20)
    parser.add_argument("--sampler", default="exact")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for path in args.brains:
        one_brain(path, args.average, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
