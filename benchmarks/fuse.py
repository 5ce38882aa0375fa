# SPDX-License-Identifier: Apache-2.0
"""Three crossed stacks of thick slices of one moving person: each alone, averaged, and fused.

    python benchmarks/fuse.py --average avg305T1.nii sub-01_desc-brain_T1w.nii.gz ...

A skull-stripped T1w is turned and shifted at random for each stack but the first (normal, SD 4
degrees about each axis and 4 mm along it), and averaged to slices along i, j and k, with a bias
field and noise of their own. The motion is then found by ``anatomy.motion``; that alone enters the
fusion. Single restorations and cubic interpolations are brought back by the *true* motion, and
their mean is what a careful averaging gives. The masks are the truth's, moved. Metrics and gain
as in ``brainprior evaluate``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.motion import Stack, find_motion
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.fusion import Run, fuse
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.weights import load_prior
from brainprior_bids.evaluation.degrade import Recipe, degrade
from brainprior_bids.evaluation.figure import Column, draw
from brainprior_bids.evaluation.thick_slices import figures
from brainprior_bids.training.preprocess import UNIT, mni305_brain, prepare

MARGIN = 14
ORDER = (2, 0, 1)
"""Slice axes; the first is the reference."""


def rigid(rng: np.random.Generator, centre: np.ndarray, degrees: float, mm: float) -> np.ndarray:
    """A random motion about ``centre``."""
    turn = Rotation.from_rotvec(np.radians(rng.normal(0, degrees, 3))).as_matrix()
    matrix = np.eye(4)
    matrix[:3, :3] = turn
    matrix[:3, 3] = centre - turn @ centre + rng.normal(0, mm, 3)
    return matrix


def one_brain(path: Path, average: Path, args: argparse.Namespace) -> None:
    """Degrade, align, restore, fuse, print."""
    brain = prepare(path.name, "T1w", "report", path, mni305_brain(average))
    truth = brain.data.astype(np.float32) / UNIT
    if args.crop is not None:
        start = [(n - min(n, size)) // 2 for n, size in zip(truth.shape, args.crop, strict=True)]
        block = tuple(slice(s, s + size) for s, size in zip(start, args.crop, strict=True))
        truth = truth[block]
        brain.to_mni305[:3, 3] += brain.to_mni305[:3, :3] @ start
    thick = round(args.spacing)
    sides = [(MARGIN, MARGIN + -(n + 2 * MARGIN) % thick) for n in truth.shape]
    truth = np.pad(truth, sides)
    grid = Grid(truth.shape, np.eye(4))
    to_mni305 = np.array(brain.to_mni305)
    to_mni305[:3, 3] -= to_mni305[:3, :3] @ np.full(3, MARGIN)
    inside = ndimage.binary_fill_holes(truth > 0)
    rng = np.random.default_rng(args.seed)
    prior = load_prior(args.prior, device=args.device)
    images: dict[str, np.ndarray] = {}
    runs, stacks, back = [], [], []
    for axis in ORDER:
        motion = np.eye(4)
        if runs:
            motion = rigid(rng, np.array(grid.shape) / 2, args.degrees, args.mm)
        there = resample(inside, grid, grid, matrix=motion, order=1) > 0.5
        moved = np.where(there, resample(truth, grid, grid, matrix=motion), 0)
        recipe = Recipe(axis=axis, spacing_mm=args.spacing, thickness_mm=args.spacing,
                        noise_sd=args.noise, bias_sd=args.bias)  # fmt: skip
        data, own = degrade(moved, grid, recipe, rng, unit=1.0)
        share = np.moveaxis(there, axis, 0).reshape(own.shape[axis], thick, -1).mean(1)
        share = np.moveaxis(
            share.reshape(own.shape[axis], *np.delete(grid.shape, axis)), 0, axis
        ).astype(np.float32)
        log_bias = n4(nib.Nifti1Image(data, np.array(own.affine)), share)
        acquisition = Acquisition(axis, args.spacing, args.spacing)
        name = f"slices along {'ijk'[axis]}"
        flat = (data / np.exp(log_bias)).astype(np.float32)
        stack = Stack(name, flat, own, acquisition, there)
        found, gain = np.eye(4), 1.0
        if runs:
            began = time.perf_counter()
            alike = find_motion(stacks[0], stack)
            found, gain = alike.to_reference, alike.gain
            corners = np.argwhere(inside)[:: max(1, inside.sum() // 1000)]
            off = found @ motion - np.eye(4)
            error = np.linalg.norm(corners @ off[:3, :3].T + off[:3, 3], axis=1).max()
            print(
                f"  {name}: moved by {alike.angle_deg:.1f} degrees, found to {error:.3f} mm, "
                f"correlation {alike.correlation:.3f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
        stacks.append(stack)
        back.append(np.linalg.inv(motion))
        runs.append(Run(name, data, own, acquisition, share, log_bias, found, gain))
        cubic = resample(flat, own, grid, order=3)
        images[f"cubic, {name}"] = resample(cubic, grid, grid, matrix=back[-1])
        if args.only_fused:
            continue
        began = time.perf_counter()
        single = restore(
            data, grid=own, acquisition=acquisition, mask=share, mask_1mm=there,
            to_mni305=to_mni305 @ back[-1], contrast="T1w", prior=prior, log_bias=log_bias,
            n_samples=args.n_samples, n_steps=args.n_steps, seed=args.seed, device=args.device,
        )  # fmt: skip
        print(f"  {name}: restored alone in {time.perf_counter() - began:.0f} s", flush=True)
        same = np.array_equal(motion, np.eye(4))
        images[f"restored, {name}"] = (
            single.mean if same else resample(single.mean, grid, grid, matrix=back[-1])
        )
    for kind in ("cubic", "restored"):
        parts = [image for method, image in images.items() if method.startswith(kind)]
        if parts:
            images[f"{kind}, average of three"] = np.mean(parts, axis=0)
    began = time.perf_counter()
    done, explained = fuse(
        runs, mask_1mm=inside, to_mni305=to_mni305, contrast="T1w", prior=prior,
        n_samples=args.n_samples, n_steps=args.n_steps, seed=args.seed, device=args.device,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    images["fused"] = done.mean
    print(
        f"{path.name}: fused in {seconds:.0f} s ({done.inner_iterations:.1f} inner iterations a "
        f"level), residual ratios {np.round(done.residual_ratios, 2)}"
    )
    for run in explained:
        ratios = np.round([r.ratio for r in run.residuals], 2)
        print(f"  {run.name}: noise {args.noise} found {run.noise_sd:.4f}, residual {ratios}")
    for method, row in figures(images, truth, inside, grid.spacing_mm).items():
        cells = "  ".join(f"{key} {value:.4f}" for key, value in row.items())
        print(f"  {method:28s} {cells}", flush=True)
    if args.picture is not None:
        shown = {"truth": truth, "cubic, first run": images[f"cubic, {runs[0].name}"]}
        if not args.only_fused:
            shown["first run restored"] = images[f"restored, {runs[0].name}"]
        shown |= {"average of three": images["cubic, average of three"], "fused": images["fused"]}
        columns = [Column(name, np.where(inside, image, 0), 1.1) for name, image in shown.items()]
        name = path.name.partition("_")[0]
        caption = f"{name} (OpenNeuro ds002748, CC0), {args.spacing:g} mm slices along i, j and k"
        draw(args.picture / f"fuse_{name}.png", columns, inside=inside, spacing_mm=[1.0] * 3,
             caption=caption)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("brains", type=Path, nargs="+", help="1 mm T1w brains, 0 outside")
    parser.add_argument("--average", type=Path, required=True, help="MNI305 average head")
    parser.add_argument("--prior", type=Path, help="weights; default: embedded")
    parser.add_argument("--spacing", type=float, default=5.0, help="slice spacing, mm")
    parser.add_argument("--noise", type=float, default=0.01, help="SD, brain's bright end = 1")
    parser.add_argument("--bias", type=float, default=0.1, help="SD of the log field")
    parser.add_argument("--degrees", type=float, default=4.0, help="SD of the rotations")
    parser.add_argument("--mm", type=float, default=4.0, help="SD of the shifts")
    parser.add_argument(
        "--crop", type=int, nargs=3, help="a block of the brain, as if there were no more; mm"
    )
    parser.add_argument("--picture", type=Path, help="folder for a PNG of each person")
    parser.add_argument("--only-fused", action="store_true", help="no single restorations")
    parser.add_argument("--n-samples", type=int, default=2)
    parser.add_argument("--n-steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for path in args.brains:
        one_brain(path, args.average, args)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
