# SPDX-License-Identifier: Apache-2.0
"""The rigid motion between the interleaves of a 2-D scan.

Most 2-D scans measure their slices in two or more interleaves, also called packages: the slices p,
p + n, p + 2n, ... If the participant moves in between, these show the brain in other positions
than the others. All interleaves are registered to each other at once (``interleave_fit``).

The number n is that of ``SliceTiming`` if it is in the JSON. Otherwise 2, 3 and 4 are tried. Every
slice is compared with the two next to it, without motion and with the one that was estimated: the
mismatch is one minus the correlation in the brain. The estimate must make the slices more alike,
because a registration can be wrong, for example in sagittal slices of a symmetric brain; and more
interleaves must do so clearly better than fewer. Distances are RMS displacements over the brain,
mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainprior_bids.anatomy.interleave_fit import (
    Interleaves,
    Slices,
    next_kernel,
    rms,
    smooth_kernel,
)
from brainprior_bids.engine.acquisition import Acquisition
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.sensing import is_3d

Matrix = NDArray[np.float64]

COUNTS = (2, 3, 4)
"""Numbers of interleaves that are tried."""
FEWEST = 5
"""Smallest number of slices with brain in each interleave."""
COARSE_MM, FINE_MM = 4.0, 2.0
"""FWHM of the blur in the plane, for the first estimate and for the last one."""
CLEARER = 0.95
"""More interleaves are assumed if they multiply the mismatch by at most this factor. Two heads
(slices of 4.0 and 5.3 mm) with motion between four interleaves had 0.82 to 0.93 for four instead
of two, and 1.01 to 1.03 with motion between two."""
LEAST = 0.3
"""Motion below this share of the slice spacing is not reported."""
LARGEST_SPACINGS_MM = {2: 5.5, 3: 5.5, 4: 4.2}
"""Number of interleaves -> largest spacing of slices whose motion is corrected. In two interleaves
of slices further apart, the correction improved some images and made others worse; in four of 5.3
mm it did not improve them; for more interleaves, it was not measured (docs/tasks/restore.md)."""
FAR = (
    "its correction has proved to improve the image only in two or three packages of slices 1 to "
    f"{LARGEST_SPACINGS_MM[2]} mm apart, or four of 1 to {LARGEST_SPACINGS_MM[4]} mm"
)
"""Why the motion of other scans is not corrected."""
LEAST_IN_PLANE = 1 / 3
"""Smallest displacement in the plane of the slices that is corrected, in slice spacings, unless it
is at least as large as that across them. A motion across the slices moves the slices of one
interleave onto those of another: the gaps between them hold no data, and the corrected image was
worse."""
ACROSS = "it is mostly across the slices, and its correction would not improve the image"
"""Why such a motion is not corrected."""
LARGEST_ERROR = 0.5
"""Largest error of the estimate, as a share of the motion."""
LARGEST_MISMATCH = 0.95
"""Largest mismatch after the motion, as a share of that before. Two heads (2.7 to 5.3 mm) with
motions of 2.6 to 5 mm had 0.34 to 0.84, without motion 0.99 to 1.02."""


@dataclass(frozen=True, eq=False)
class InterleaveMotion:
    """Positions of the interleaves of a scan relative to the first, which is the reference.

    Attributes
    ----------
    to_reference : (n, 4, 4) array
        Scanner RAS mm of each interleave -> of the first; rigid.
    rms_mm : float
        The largest RMS displacement over the brain between two interleaves.
    error_mm : float
        RMS distance between the estimates of both directions, halved.
    mismatch_ratio : float
        Mismatch of neighbouring slices after the motion, as a share of that before.
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
        largest = LARGEST_SPACINGS_MM.get(len(self.to_reference), 0.0)
        if not 1 <= self.spacing_mm <= largest:
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
        count = len(self.to_reference)
        return [
            f"The {count} packages of slices (every {ORDINALS[count]} slice) are displaced "
            f"relative to each other by up to {self.rms_mm:.1f} mm (RMS in the brain): the "
            "participant moved between them."
        ]


ORDINALS = ("", "", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def treatment(obstacle: str | None) -> str:
    """The warning that says whether the motion was corrected, and if not, why."""
    if obstacle is None:
        return (
            "The displacement of the packages of slices is corrected: the restored image shows "
            "the brain in the mean of their positions. It is less accurate than without motion."
        )
    return (
        f"The displacement of the packages of slices is not corrected: {obstacle}. Expect jagged "
        "edges across the slices."
    )


def find_interleave_motion(
    values: ArrayLike,
    log_bias: ArrayLike,
    mask: ArrayLike,
    grid: Grid,
    acquisition: Acquisition,
) -> InterleaveMotion | None:
    """Register the interleaves of a 2-D scan to each other.

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
        With ``interleaves``, no other number is tried.

    Returns
    -------
    InterleaveMotion or None
        None for a 3-D scan, for slices measured in order, and if an interleave has fewer than
        ``FEWEST`` slices with brain.
    """
    axis, stated = acquisition.slice_axis, acquisition.interleaves
    if is_3d(grid, acquisition):
        return None
    share = np.asarray(mask, np.float32)
    inside = np.asarray(share > 0.5)
    seen = np.moveaxis(inside, axis, 0).any((1, 2))
    brain = np.flatnonzero(seen)
    candidates = COUNTS if stated is None else (stated,)
    counts = [n for n in candidates if n > 1 and np.bincount(brain % n, None, n).min() >= FEWEST]
    if not counts:
        return None
    lost = ~seen
    lost[: brain[0]] = lost[brain[-1] :] = False
    finite = np.nan_to_num(np.asarray(values, np.float32))
    unbiased = finite / np.exp(np.asarray(log_bias, np.float32))
    scan = Slices(unbiased, inside, grid, axis, lost)
    return _refined(scan, _best(scan, counts))


def _best(scan: Slices, counts: Sequence[int]) -> list[Matrix]:
    """A first estimate of the positions, for the smallest number of interleaves that explains the
    slices about as well as any.
    """
    coarse, smooth, narrow = scan.smoothed(COARSE_MM), smooth_kernel(), next_kernel()
    best, lowest = [np.eye(4)] * counts[0], np.inf
    for count in counts:
        still = [np.eye(4)] * count
        positions = Interleaves(coarse, count, smooth, sharp=False).register(still)
        mismatch = Interleaves(coarse, count, narrow, sharp=True).mismatch(positions)
        if mismatch <= CLEARER * lowest:
            best, lowest = positions, mismatch
    return best


def _refined(scan: Slices, start: Sequence[Matrix]) -> InterleaveMotion:
    """The last estimate, and how certain it is."""
    fine, count = scan.smoothed(FINE_MM), len(start)
    interleaves = Interleaves(fine, count, smooth_kernel(), sharp=False)
    positions = interleaves.register(start)
    neighbours = Interleaves(fine, count, next_kernel(), sharp=True)
    before, after = (neighbours.mismatch(p) for p in ([np.eye(4)] * count, positions))
    points = interleaves.brain
    pairs = [(a, b) for b in range(count) for a in range(b)]
    apart = [rms(positions[a], positions[b], points) for a, b in pairs]
    a, b = pairs[int(np.argmax(apart))]
    direction = scan.grid.affine[:3, scan.axis] / scan.grid.spacing_mm[scan.axis]
    return InterleaveMotion(
        np.stack(positions),
        max(apart),
        interleaves.error_mm(positions),
        after / before if before > 0 else 1.0,
        float(scan.grid.spacing_mm[scan.axis]),
        _rms_along(positions[b] - positions[a], points, direction),
    )


def _rms_along(difference: Matrix, points: Matrix, direction: Matrix) -> float:
    """RMS difference of two motions of the points along a direction of length 1."""
    along = direction @ (difference[:3, :3] @ points + difference[:3, 3:])
    return float(np.sqrt(np.mean(along**2)))
