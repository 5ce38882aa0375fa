# SPDX-License-Identifier: Apache-2.0
"""The rigid motion between the two interleaves of a 2-D scan: its even and its odd slices.

Most 2-D scans measure every second slice first. If the participant moves in between, the odd
slices show the brain in another position than the even ones. Each interleave is treated as a
separate scan, with slices two spacings apart. Both are blurred across their slices (Gaussian, FWHM
of ``BLUR`` spacings). Without it, an interleave would be sharp at its slices and blurred between
them, and the registration would be drawn to a motion that puts the slices of one onto those of the
other. Both are registered in both directions:

    M_a  even -> odd, with the even slices fixed
    M_b  odd -> even, with the odd slices fixed

The estimate is the mean of M_b and the inverse of M_a. Their difference is an estimate of the
error. Both can agree on a wrong motion, for example in sagittal slices of a symmetric brain, so
the estimate must also make the interleaves more alike: their mismatch is one minus the correlation
in the brain. Distances are RMS displacements over the brain, mm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.motion import FWHM, BrainImage, Metric, register_rigid
from brainprior_bids.anatomy.spaces import resample
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.sensing import is_3d

Matrix = NDArray[np.float64]

FEWEST = 5
"""Smallest number of slices with brain in each interleave."""
FINE_MM = 2.0
"""Spacing of the grid on which the interleaves are compared."""
AROUND = 2
"""Margin around the brain that is compared too, in voxels of that grid."""
BLUR = 4
"""FWHM of the blur across the slices, in slice spacings; with 2, errors across were larger."""
LEAST = 0.3
"""Motion below this share of the slice spacing is not reported: still scans have up to 0.15."""
LARGEST_SPACING_MM = 5.5
"""With slices further apart, correcting the motion improved some images and made others worse
(docs/tasks/restore.md)."""
FAR = (
    f"only in slices 1 to {LARGEST_SPACING_MM} mm apart has its correction proved to improve the "
    "image"
)
"""Why the motion of such slices is not corrected."""
LEAST_IN_PLANE = 1 / 3
"""Smallest displacement in the plane of the slices that is corrected, in slice spacings, unless it
is at least as large as that across them. A motion across the slices moves the odd ones onto the
even ones: the gaps between them hold no data, and the corrected image was worse."""
ACROSS = "it is mostly across the slices, and its correction would not improve the image"
"""Why such a motion is not corrected."""
LARGEST_ERROR = 0.5
"""Largest error of the estimate, as a share of the motion."""
LARGEST_MISMATCH = 0.9
"""Largest mismatch after the motion, as a share of that before. Heads with true motions of 1.5 to
4 mm had 0.82 to 0.34, still heads 0.95 to 1.03, one of them with a consistent estimate of 4.6 mm.
"""


@dataclass(frozen=True, eq=False)
class InterleaveMotion:
    """Position of the odd slices of a scan relative to the even ones, which are the reference.

    Attributes
    ----------
    to_reference : (4, 4) array
        Scanner RAS mm of the odd slices -> of the even ones; rigid.
    rms_mm : float
        RMS displacement over the brain.
    error_mm : float
        RMS distance between the estimates of both directions, halved.
    mismatch_ratio : float
        Mismatch of the interleaves after the motion, as a share of that before.
    spacing_mm : float
        Spacing of the slices.
    across_mm : float
        The part of ``rms_mm`` across the slices.
    """

    to_reference: Matrix
    rms_mm: float
    error_mm: float
    mismatch_ratio: float
    spacing_mm: float
    across_mm: float = 0.0

    @property
    def moved(self) -> bool:
        """Whether the motion is large and certain."""
        large = self.rms_mm >= LEAST * self.spacing_mm
        certain = self.error_mm <= LARGEST_ERROR * self.rms_mm
        return large and certain and self.mismatch_ratio <= LARGEST_MISMATCH

    @property
    def obstacle(self) -> str | None:
        """Why the scan is not restored with this motion; None if it is."""
        if not 1 <= self.spacing_mm <= LARGEST_SPACING_MM:
            return FAR
        in_plane = np.sqrt(max(self.rms_mm**2 - self.across_mm**2, 0.0))
        if in_plane < min(LEAST_IN_PLANE * self.spacing_mm, self.across_mm):
            return ACROSS
        return None

    @property
    def warnings(self) -> list[str]:
        """A warning if the participant moved."""
        if not self.moved:
            return []
        return [
            f"The odd slices are displaced by {self.rms_mm:.1f} mm (RMS in the brain) relative to "
            "the even ones: the participant moved between the interleaves."
        ]


def treatment(obstacle: str | None) -> str:
    """The warning that says whether the motion was corrected, and if not, why."""
    if obstacle is None:
        return (
            "The displacement of the odd slices is corrected: the restored image shows the brain "
            "halfway between its two positions. It is less accurate than without motion."
        )
    return (
        f"The displacement of the odd slices is not corrected: {obstacle}. Expect jagged edges "
        "across the slices."
    )


def find_interleave_motion(
    values: ArrayLike,
    log_bias: ArrayLike,
    mask: ArrayLike,
    grid: Grid,
    acquisition: Acquisition,
) -> InterleaveMotion | None:
    """Register the odd slices of a 2-D scan to the even ones.

    Parameters
    ----------
    values : (i, j, k)
        The scan, scanner units.
    log_bias : (i, j, k)
        Natural log of its bias field, slice gains included.
    mask : (i, j, k)
        Share of brain in its voxels, without lesions and lost slices.
    grid : Grid
    acquisition : Acquisition

    Returns
    -------
    InterleaveMotion or None
        None for a 3-D scan, and if an interleave has fewer than ``FEWEST`` slices with brain.
    """
    axis = acquisition.slice_axis
    if is_3d(grid, acquisition):
        return None
    scan = np.nan_to_num(np.asarray(values, np.float32)) / np.exp(np.asarray(log_bias, np.float32))
    share = np.moveaxis(np.asarray(mask, np.float32), axis, 0)
    brain = np.flatnonzero((share > 0.5).any((1, 2)))
    if min((brain % 2 == 0).sum(), (brain % 2 == 1).sum()) < FEWEST:
        return None
    slices = np.moveaxis(scan, axis, 0)
    for k in np.setdiff1d(np.arange(brain[0], brain[-1]), brain):  # lost: from its interleave
        slices[k] = (slices[max(k - 2, k % 2)] + slices[min(k + 2, len(slices) - 1)]) / 2
    even, odd = (_interleave(scan, np.asarray(mask), grid, axis, parity) for parity in (0, 1))
    around = ndimage.binary_dilation(even.mask | odd.mask, iterations=AROUND)
    there = register_rigid(even, odd, around=around, metric=Metric.CORRELATION)
    back = register_rigid(odd, even, around=around, metric=Metric.CORRELATION)
    points = even.grid.points_mm()[:, even.mask].astype(np.float64)
    to_reference, error = _mean_of(np.linalg.inv(there), back, points)
    before, after = (_mismatch(even, odd, matrix) for matrix in (np.eye(4), to_reference))
    return InterleaveMotion(
        to_reference,
        _rms(to_reference, np.eye(4), points),
        error / 2,
        after / before if before > 0 else 1.0,
        float(grid.spacing_mm[axis]),
        _rms_along(to_reference, points, grid.affine[:3, axis]),
    )


def _interleave(
    scan: NDArray[np.float32], mask: NDArray[np.float32], grid: Grid, axis: int, parity: int
) -> BrainImage:
    """Every second slice on a fine grid of the whole field of view, blurred across the slices."""
    part = np.moveaxis(scan, axis, 0)[parity::2]
    part = np.moveaxis(np.pad(part, ((1, 1), (0, 0), (0, 0)), mode="edge"), 0, axis)
    sparse = np.eye(4)  # indices of the padded slices -> of the scan
    sparse[axis, axis], sparse[axis, 3] = 2.0, parity - 2.0
    size = np.maximum(np.round(grid.extent_mm / FINE_MM), 1).astype(int)
    fine = grid.resized((int(size[0]), int(size[1]), int(size[2])))
    image = resample(part, Grid(part.shape, grid.affine @ sparse), fine, order=1)
    sd = BLUR * grid.spacing_mm[axis] / FWHM / fine.spacing_mm[axis]
    image = ndimage.gaussian_filter1d(image, float(sd), axis=axis, mode="nearest")
    return BrainImage(image, fine, resample(mask, grid, fine, order=1) > 0.5)


def _mismatch(even: BrainImage, odd: BrainImage, to_even: Matrix) -> float:
    """One minus the correlation in the brain, with the odd slices moved."""
    moved = resample(odd.data, odd.grid, even.grid, matrix=to_even, order=1)
    return 1 - float(np.corrcoef(even.data[even.mask], moved[even.mask])[0, 1])


def _mean_of(a: Matrix, b: Matrix, points: Matrix) -> tuple[Matrix, float]:
    """The mean of two rigid motions about the middle of the points, and their RMS distance."""
    centre = points.mean(1)
    rotations = Rotation.from_matrix(np.stack([a[:3, :3], b[:3, :3]])).mean().as_matrix()
    moved = np.mean([m[:3, :3] @ centre + m[:3, 3] for m in (a, b)], axis=0)
    mean = np.eye(4)
    mean[:3, :3], mean[:3, 3] = rotations, moved - rotations @ centre
    return mean, _rms(a, b, points)


def _rms(a: Matrix, b: Matrix, points: Matrix) -> float:
    """RMS distance between the points, (3, n) mm, mapped by two motions."""
    apart = (a - b)[:3, :3] @ points + (a - b)[:3, 3:]
    return float(np.sqrt(np.mean(np.sum(apart**2, axis=0))))


def _rms_along(motion: Matrix, points: Matrix, direction: NDArray[np.float64]) -> float:
    """RMS displacement of the points along a direction."""
    apart = (motion - np.eye(4))[:3, :3] @ points + motion[:3, 3:]
    along = direction / np.linalg.norm(direction) @ apart
    return float(np.sqrt(np.mean(along**2)))
