# SPDX-License-Identifier: Apache-2.0
"""Two crossed stacks of thick slices, fused by each sampler at the same number of network calls.

    python benchmarks/fused_samplers.py OUT sub-01_desc-brain_T1w.nii.gz ...

The middle ``--cube`` mm of a brain are averaged to axial and sagittal slices (Gaussian profile, no
motion, no bias field, noise of ``--noise``). ``restore`` is given the first stack alone, and both
with ``exact``, with ``conditional`` and with ``exact`` at twice the calls. The metrics are PSNR of
the restored image inside the brain, after one gain, and the residual of the samples in noise SDs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rows import Rows, parser, participant, run

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.observation import Observation
from brainprior_bids.engine.operators.slices import SliceProfile, gaussian_profile, slice_weights
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.weights import load_prior
from brainprior_bids.evaluation.metrics import compare, matching_gain
from brainprior_bids.evaluation.protocol import Participant

ROWS = {
    "first stack alone, conditional": (1, "conditional", 1),
    "fused, exact": (2, "exact", 1),
    "fused, conditional": (2, "conditional", 1),
    "fused, exact, twice the calls": (2, "exact", 2),
}
"""Label -> number of stacks, sampler, factor on the calls."""


def cube(whole: Participant, edge: int) -> Participant:
    """The middle of a brain, ``edge`` voxels of 1 mm along each axis."""
    start = np.array([(n - edge) // 2 for n in whole.data.shape])
    part = tuple(slice(s, s + edge) for s in start)
    to_mni305 = whole.to_mni305.copy()
    to_mni305[:3, 3] += to_mni305[:3, :3] @ start
    return replace(whole, data=whole.data[part], inside=whole.inside[part], to_mni305=to_mni305)


def stack(
    truth: Participant, axis: int, args: argparse.Namespace, rng: np.random.Generator
) -> Observation:
    """Thick slices across ``axis``."""
    shape, spacing = truth.data.shape, args.spacing
    weights = slice_weights(
        gaussian_profile(float(spacing)),
        n_slices=shape[axis] // spacing,
        spacing_mm=float(spacing),
        n_thin=shape[axis],
        thin_mm=1.0,
    ).float()
    slices = SliceProfile(weights, shape, axis)
    y = slices(torch.from_numpy(np.where(truth.inside, truth.data, 0)))
    share = slices(torch.from_numpy(truth.inside.astype(np.float32))).clamp(0, 1)
    y = y + args.noise * torch.from_numpy(rng.standard_normal(tuple(y.shape), dtype=np.float32))
    affine = np.eye(4)
    affine[axis, axis], affine[axis, 3] = spacing, (spacing - 1) / 2
    acquisition = Acquisition(axis, float(spacing), float(spacing), "gaussian")
    return Observation(y, Grid(tuple(y.shape), affine), acquisition, share, name=f"axis {axis}")


def one_brain(path: Path, args: argparse.Namespace) -> Rows:
    """One row per sampler."""
    torch.set_num_threads(1)
    truth = cube(participant(path, args), args.cube)
    rng = np.random.default_rng([args.seed, int(truth.name)])
    stacks = [stack(truth, axis, args, rng) for axis in (2, 0)]
    prior = load_prior(args.prior, device=args.device)
    shown = np.where(truth.inside, truth.data, 0)
    rows: Rows = {}
    for label, (count, sampler, factor) in ROWS.items():
        began = time.process_time()
        result = restore(
            stacks[:count],
            mask_1mm=truth.inside,
            to_mni305=truth.to_mni305,
            contrast="T1w",
            prior=prior,
            sampler=sampler,
            n_samples=args.n_samples,
            n_steps=factor * args.n_steps,
            seed=args.seed,
            device=args.device,
        )
        image = result.mean * matching_gain(result.mean, shown, truth.inside)
        rows[label] = {
            "PSNR dB": compare(image, shown, truth.inside)["psnr_db"],
            "residual": float(np.mean(result.residual_ratios)),
            "CPU s": time.process_time() - began,
        }
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parser(__doc__, n_samples=2)
    options.add_argument("--cube", type=int, default=80, help="edge, mm")
    options.add_argument("--spacing", type=int, default=5, help="slice spacing, mm")
    options.add_argument("--noise", type=float, default=0.01, help="SD, brain's bright end = 1")
    options.add_argument("--n-steps", type=int, default=8, help="network calls per sample")
    run(options.parse_args(argv), one_brain, ["what"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
