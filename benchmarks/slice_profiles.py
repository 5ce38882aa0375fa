# SPDX-License-Identifier: Apache-2.0
"""The cost of a wrong slice profile, and of a mask that is off by a voxel.

    python benchmarks/slice_profiles.py sub-58_desc-brain_T1w.nii.gz

A coronal slab of a 1 mm brain is averaged to thick slices with several true profiles (5 mm, noise
0.01, no bias field) and restored with every profile of ``Acquisition``; then with masks other than
the truth's, with and without a rim. Each restoration takes two network calls, which is close to
E[x | y].
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from brainprior_bids.anatomy.affine import fit_affine
from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.hull import surface
from brainprior_bids.anatomy.parcellation import parcellate
from brainprior_bids.engine.acquisition import PROFILES, Acquisition
from brainprior_bids.engine.observation import Observation
from brainprior_bids.engine.restore import RIM_MM, restore
from brainprior_bids.engine.weights import load_parcellation, load_prior
from brainprior_bids.evaluation.baselines import interpolate
from brainprior_bids.evaluation.degrade import Recipe, degrade
from brainprior_bids.evaluation.metrics import by_depth, compare, matching_gain
from brainprior_bids.evaluation.picture import padded

TRUE = (("boxcar", 1.0), ("trapezoid", 0.85), ("trapezoid", 1.0), ("trapezoid", 1.15),
        ("pulse", 1.0), ("cosine", 1.0))  # fmt: skip
"""Shapes of ``evaluation.degrade``, and their width relative to the stated one."""
SLAB_MM, CUT_MM = 64, 8
"""Thickness of the slab in the middle of the brain, and of its ends excluded from metrics."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("brain", type=Path, help="1 mm T1w brain, 0 outside")
    parser.add_argument("--prior", type=Path, help="weights; default: embedded")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    truth, whole = padded(args.brain)
    inside = ndimage.binary_fill_holes(truth > 0)
    image = nib.Nifti1Image(truth, np.array(whole.affine))
    truth = truth / np.exp(n4(image, inside))
    parcels = parcellate(image, network=load_parcellation(), restored_grid=whole)
    to_mni305 = fit_affine(parcels.table, surface=surface(parcels.mask > 0, whole)).matrix

    low = truth.shape[1] // 2 - SLAB_MM // 2
    slab = np.s_[:, low : low + SLAB_MM]
    grid = whole.crop((0, low, 0), (whole.shape[0], low + SLAB_MM, whole.shape[2]))
    truth, inside, network_mask = truth[slab], inside[slab], parcels.mask[slab] > 0
    judged = inside.copy()
    judged[:, :CUT_MM] = judged[:, -CUT_MM:] = False
    unit = float(np.percentile(truth[inside], 99))
    prior = load_prior(args.prior)

    def row(name: str, estimate: np.ndarray, note: str = "") -> None:
        alike = matching_gain(estimate, truth, judged) * estimate
        psnr = compare(alike, truth, judged)["psnr_db"]
        middle = np.s_[:, CUT_MM:-CUT_MM]  # the ends of the slab are not a border of the brain
        shells = by_depth(alike[middle], truth[middle], inside[middle], grid.spacing_mm)
        cells = "  ".join(f"{key} {value:.4f}" for key, value in shells.items())
        print(f"{name:44s} {psnr:.2f} dB  {cells}{note}", flush=True)

    def judge(recipe: Recipe, assumed: str, mask: np.ndarray, rim_mm: float, name: str) -> None:
        scan, thick = degrade(truth, grid, recipe, np.random.default_rng(1), unit=unit)
        share = mask.reshape(*mask.shape[:2], thick.shape[2], -1).mean(-1)
        acquisition = Acquisition(2, recipe.spacing_mm, recipe.spacing_mm, assumed)
        result = restore(
            Observation(scan, thick, acquisition, share),
            mask_1mm=mask,
            rim_mm=rim_mm,
            to_mni305=to_mni305,
            contrast="T1w",
            prior=prior,
            n_samples=1,
            n_steps=2,
        )
        row(name, result.mean, f"  ({result.sampler})")

    for profile, width in TRUE:
        recipe = Recipe(profile=profile, width=width)
        scan, thick = degrade(truth, grid, recipe, np.random.default_rng(1), unit=unit)
        row(f"{profile} x {width}: cubic", interpolate(scan, thick, grid, order=3))
        for assumed in PROFILES:
            judge(recipe, assumed, inside, 0.0, f"{profile} x {width}: assumed {assumed}")
    for mask, what in ((inside, "truth's mask"), (network_mask, "network's mask")):
        for rim in (0.0, 1.0, RIM_MM, 2.0, 3.0):
            judge(Recipe(), "trapezoid", mask, rim, f"{what}, rim {rim:g} mm")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
