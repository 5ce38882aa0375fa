# SPDX-License-Identifier: Apache-2.0
"""A scan with motion before its odd slices, restored as one scan and as two observations.

    python benchmarks/interleaves.py OUT sub-01_T1w.nii.gz ...

Whole heads of about 1 mm are averaged to axial slices, the odd ones after a random rigid motion of
the head (``--move`` mm and degrees), with noise of ``--noise`` of the head's 99th percentile.
Twelve slices through the middle of the brain are restored with ``exact``. Without motion: as one
scan, and as two observations, each with the other's slices hidden (which must be as good, and
shows how tissue around the brain affects each strategy of the solve). With motion: ignoring it,
with the true motion, and with the command's estimate of it. PSNR is computed against the head,
2 mm inside the brain, after one gain. An image that ignores the motion shows a position between
the two; so the head is compared before the motion, halfway and after it, and the best one counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from rows import Rows, label_of, parser, run
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.bias import n4
from brainprior_bids.anatomy.interleaves import find_interleave_motion
from brainprior_bids.anatomy.parcellation import parcellate
from brainprior_bids.anatomy.prepare import align_to_mni305
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.observation import Observation, halfway
from brainprior_bids.engine.restore import restore
from brainprior_bids.engine.weights import load_parcellation, load_prior
from brainprior_bids.evaluation.metrics import compare, matching_gain

Image = NDArray[np.float32]
AXIS, SLICES, RIM_MM = 2, 12, 1.5


@dataclass(frozen=True, eq=False)
class Head:
    """A head without its bias field, and its brain on the same grid."""

    image: Image
    brain: Image
    grid: Grid
    to_mni305: NDArray[np.float64]


def head(path: Path) -> Head:
    """Read a head and preprocess it as brainprior does."""
    scan = nib.as_closest_canonical(nib.load(path))
    values = scan.get_fdata(dtype=np.float32)
    grid = Grid(values.shape, scan.affine)
    parcels = parcellate(scan, network=load_parcellation(), restored_grid=grid.one_millimetre())
    brain = resample(parcels.mask.astype(np.float32), grid.one_millimetre(), grid, order=1)
    affine = align_to_mni305(scan, parcels.mask, parcels.table)
    return Head(values / np.exp(n4(scan, brain)), brain, grid, np.array(affine.matrix))


def moved(one: Head, matrix: NDArray[np.float64]) -> Head:
    """The head after the rigid motion of which ``matrix`` is the inverse (mm to mm)."""
    back = np.linalg.inv(matrix)
    image = resample(one.image, one.grid, one.grid, matrix=back, order=3)
    brain = resample(one.brain, one.grid, one.grid, matrix=back, order=1)
    return replace(one, image=image, brain=np.clip(brain, 0, 1))


def sliced(volume: Image, thick: int) -> Image:
    """Average ``thick`` voxels along ``AXIS``."""
    n = volume.shape[AXIS] // thick * thick
    lead = np.moveaxis(volume, AXIS, 0)[:n]
    means = lead.reshape(-1, thick, *lead.shape[1:]).mean(1, dtype=np.float32)
    return np.moveaxis(means, 0, AXIS)


def scan(even: Head, odd: Head, args: argparse.Namespace) -> Observation:
    """Noisy thick slices, the even ones of one head and the odd ones of the other."""
    values, share = sliced(even.image, args.thick), sliced(even.brain, args.thick)
    values[..., 1::2] = sliced(odd.image, args.thick)[..., 1::2]
    share[..., 1::2] = sliced(odd.brain, args.thick)[..., 1::2]
    affine = even.grid.affine.copy()
    affine[:3, 3] += affine[:3, AXIS] * (args.thick - 1) / 2
    affine[:3, AXIS] *= args.thick
    grid = Grid(values.shape, affine)
    rng = np.random.default_rng(args.seed)
    noise = args.noise * np.percentile(values, 99) * rng.standard_normal(values.shape)
    spacing = float(grid.spacing_mm[AXIS])
    noisy = np.abs(values + noise).astype(np.float32)
    return Observation(noisy, grid, Acquisition(AXIS, spacing, spacing), share)


def first_slice(whole: Observation) -> int:
    """The first of ``SLICES`` slices in the middle of the brain, an even one."""
    share = np.asarray(whole.mask)
    first = int(np.flatnonzero(share.max((0, 1)) > 0.9).mean()) - SLICES // 2
    return max(first, 0) // 2 * 2


def slab(whole: Observation, first: int) -> Observation:
    """``SLICES`` slices of a scan."""
    share = np.asarray(whole.mask)
    part = np.s_[..., first : first + SLICES]
    shape = whole.grid.shape
    grid = whole.grid.crop((0, 0, first), (shape[0], shape[1], first + SLICES))
    return Observation(whole.scan[part], grid, whole.acquisition, share[part])


def motion(one: Head, args: argparse.Namespace, rng: np.random.Generator) -> NDArray[np.float64]:
    """``args.move`` mm and degrees in random directions, about the middle of the brain."""
    shift, turn = (v / np.linalg.norm(v) for v in rng.standard_normal((2, 3)))
    centre = one.grid.points_mm()[:, one.brain > 0.5].mean(1)
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_rotvec(np.radians(args.move) * turn).as_matrix()
    matrix[:3, 3] = centre - matrix[:3, :3] @ centre + args.move * shift
    return matrix


def psnr(image: Image, truth: Image, inside: NDArray[np.bool_]) -> float:
    """After one gain, in dB."""
    gain = matching_gain(image, truth, inside)
    return float(compare(image * gain, truth, inside)["psnr_db"])


def one_head(path: Path, args: argparse.Namespace) -> Rows:
    """One row per way of restoring the scan."""
    torch.set_num_threads(1)
    still = head(path)
    true = motion(still, args, np.random.default_rng([args.seed, int(label_of(path))]))
    whole, whole_moved = scan(still, still, args), scan(still, moved(still, true), args)
    estimate = find_interleave_motion(
        whole_moved.scan,
        np.zeros(whole.grid.shape),
        whole_moved.mask,
        whole.grid,
        whole.acquisition,
    )
    assert estimate is not None
    first = first_slice(whole)
    one, shaken = slab(whole, first), slab(whole_moved, first)
    ways = {
        "still, one scan": one,
        "still, two observations": replace(one, odd_to_even=np.eye(4)),
        "moved, as if still": shaken,
        "moved, at the true place": replace(shaken, odd_to_even=true),
        "moved, at the place found": replace(shaken, odd_to_even=estimate.to_reference),
    }
    fine = one.grid.one_millimetre()
    places = [still, moved(still, halfway(true)), moved(still, true)]
    masks = [resample(place.brain, still.grid, fine, order=1) > 0.5 for place in places]
    truths = [resample(place.image, still.grid, fine, order=1) for place in places]
    insides = [ndimage.binary_erosion(mask, iterations=2) for mask in masks]
    prior = load_prior(args.prior, device=args.device)
    rows: Rows = {}
    for label, observation in ways.items():
        result = restore(
            observation,
            mask_1mm=masks[label.startswith("moved")],
            rim_mm=RIM_MM,
            to_mni305=still.to_mni305,
            contrast="T1w",
            prior=prior,
            sampler="exact",
            n_samples=args.n_samples,
            n_steps=args.n_steps,
            seed=args.seed,
            device=args.device,
        )
        rows[label] = {
            "PSNR dB": max(map(psnr, [result.mean] * 3, truths, insides)),
            "residual": float(np.mean(result.residual_ratios)),
        }
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parser(__doc__, n_samples=1)
    options.add_argument("--thick", type=int, default=5, help="voxels averaged into one slice")
    options.add_argument("--move", type=float, default=2.0, help="mm and degrees")
    options.add_argument("--noise", type=float, default=0.01, help="SD over the 99th percentile")
    options.add_argument("--n-steps", type=int, default=4, help="network calls per sample")
    run(options.parse_args(argv), one_head, ["what"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
