# SPDX-License-Identifier: Apache-2.0
"""`conditional` and `exact` with 20 calls against DAPS with 1000 (200 x 5, 50 x 20), in one run.

    python benchmarks/compare_samplers.py --average avg305T1.nii sub-01_desc-brain_T1w.nii.gz
        [--crop 50] [--n-samples 8] [--threads 1]

The crop of the brain is averaged into thick slices by the engine's own profile, with white noise
of a known SD, which every sampler receives. So only the sampler differs. PSNR is that of the plain
mean of the samples; the mean that `restore` reports (averaged conditional expectations) has a
separate row. Residuals are those of single samples over voxels entirely inside the brain, in units
of the true noise SD.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.nuisance import Nuisances
from brainprior_bids.engine.observation import Observation
from brainprior_bids.engine.operators.slices import gaussian_profile, slice_weights
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.samplers.daps import DAPS_1K, DAPS_50, DapsSettings
from brainprior_bids.engine.weights import load_prior
from brainprior_bids.evaluation.metrics import compare, crps
from brainprior_bids.training.preprocess import UNIT, mni305_brain, prepare

CALLS = 20
"""Network calls of `conditional` and `exact`, which are compared at equal cost."""
SETTINGS: dict[str, tuple[str, DapsSettings]] = {
    f"conditional, {CALLS} calls": ("conditional", DAPS_1K),
    f"exact, {CALLS} calls": ("exact", DAPS_1K),
    "DAPS 50 x 20": ("daps", DAPS_50),
    "DAPS-1k (200 x 5)": ("daps", DAPS_1K),
}


HEAD = (
    "| sampler | calls | s per sample | times first | PSNR of mean, dB | CRPS | residual / sigma |"
    "\n|---|---|---|---|---|---|---|"
)


def thick_scan(
    path: Path, args: argparse.Namespace
) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    """Arguments of ``restore``, the truth, its mask, and W."""
    brain = prepare(path.name, "T1w", "report", path, mni305_brain(args.average))
    whole = brain.data.astype(np.float32) / UNIT
    size = args.crop or min(whole.shape) // args.spacing * args.spacing
    start = [(n - size) // 2 for n in whole.shape]
    truth = whole[tuple(slice(s, s + size) for s in start)]
    to_mni305 = np.array(brain.to_mni305)
    to_mni305[:3, 3] += to_mni305[:3, :3] @ np.array(start)
    holes_filled = ndimage.binary_fill_holes(whole > 0)
    inside = holes_filled[tuple(slice(s, s + size) for s in start)]
    weights = slice_weights(
        gaussian_profile(float(args.spacing)),
        n_slices=size // args.spacing,
        spacing_mm=float(args.spacing),
        n_thin=size,
        thin_mm=1.0,
    ).numpy()
    rng = np.random.default_rng(args.seed)
    scan = truth @ weights.T
    scan = (scan + args.noise * rng.standard_normal(scan.shape)).astype(np.float32)
    share = inside @ weights.T
    affine = np.diag([1.0, 1.0, args.spacing, 1.0])
    affine[2, 3] = (args.spacing - 1) / 2
    unit = float(np.quantile(scan[share > 0.5], 0.99))
    call = {
        "observation": Observation(
            scan,
            Grid(scan.shape, affine),
            Acquisition(2, float(args.spacing), float(args.spacing), "gaussian"),
            share,
            noise_sd=args.noise / unit,
        ),
        "mask_1mm": inside,
        "to_mni305": to_mni305,
        "contrast": "T1w",
        "n_samples": args.n_samples,
        "n_steps": CALLS,
        "seed": args.seed,
        "nuisances": Nuisances(thickness_sd=0.0),  # the profile is known here, to DAPS as well
    }
    return call, truth, inside, weights


def show(name: str, row: Sequence[float], sd: str = "") -> None:
    """Print one row of the table."""
    seconds, times, psnr, score, residual = row
    print(
        f"| {name} | {seconds:.1f} | {times:.1f} | {psnr:.2f}{sd} | {score:.4f} "
        f"| {residual:.3f} |",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print one table per brain, and one of their means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("brains", type=Path, nargs="+", help="1 mm T1w brains, 0 outside")
    parser.add_argument("--average", type=Path, required=True, help="MNI305 average head")
    parser.add_argument("--prior", type=Path, help="weights; default: embedded")
    parser.add_argument("--crop", type=int, default=0, help="cube's edge, mm; default: all")
    parser.add_argument("--spacing", type=int, default=5, help="slice spacing, mm")
    parser.add_argument("--noise", type=float, default=0.01, help="SD, brain's bright end = 1")
    parser.add_argument("--n-samples", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, with one thread that of a dedicated core",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args(argv)
    if args.crop % args.spacing:
        parser.error("--crop must be a multiple of --spacing")
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    torch.set_num_threads(args.threads)
    prior = load_prior(args.prior, device=args.device)
    table: dict[str, list[list[float]]] = {}
    for path in args.brains:
        call, truth, inside, weights = thick_scan(path, args)
        observation = call.pop("observation")
        scan, core = observation.scan.numpy(), observation.mask.numpy() > 0.95
        print(
            f"{path.name}: {truth.shape} mm, {args.n_samples} samples, noise {args.noise}, "
            f"{args.threads} threads, {args.clock} clock, load average {os.getloadavg()[0]:.1f}"
        )
        print(HEAD)
        base = None
        for name in args.only:
            sampler, daps = SETTINGS[name]
            began = clock()
            result = restore(
                observation, prior=prior, sampler=sampler, daps=daps, device=args.device, **call
            )
            seconds = (clock() - began) / args.n_samples
            base = base or seconds
            residual = [
                float(np.sqrt(np.mean((x @ weights.T - scan)[core] ** 2))) / args.noise
                for x in result.samples
            ]
            row = [
                seconds,
                seconds / base,
                compare(result.samples.mean(0), truth, inside)["psnr_db"],
                crps(result.samples, truth, inside),
                float(np.mean(residual)),
            ]
            table.setdefault(f"{name} | {result.calls}", []).append(row)
            show(f"{name} | {result.calls}", row)
            if sampler in ("conditional", "exact"):
                reported = compare(result.mean, truth, inside)["psnr_db"]
                table.setdefault("its reported mean | ", []).append([reported])
                print(f"| its reported mean | | | | {reported:.2f} | | |", flush=True)
    if len(args.brains) > 1:
        print(f"mean over {len(args.brains)} brains (SD)\n{HEAD}")
        for name, rows in table.items():
            if len(rows[0]) > 1:
                sd = np.std(rows, axis=0, ddof=1)
                show(name, np.mean(rows, axis=0).tolist(), f" ({sd[2]:.2f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
