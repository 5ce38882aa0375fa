# SPDX-License-Identifier: Apache-2.0
"""Rigid registration of the interleaves of a 2-D scan to each other, all at once.

Symbols: interleave p of n has the slices k with k mod n = p; S_p(x) is its image at the point x,
T_p (4, 4) its position: mm of the interleave -> common mm. T_0 is the identity. Each interleave
is spread across the slices by a kernel, N_p, and so is its comb of slices, D_p. The others predict
a point of interleave p,

    P_p(x) = sum_q N_q(T_q^-1 T_p x) / sum_q D_q(T_q^-1 T_p x),    q != p,

and the positions minimise the sum of squares of S_p - (a_p P_p + b_p) over all slices
(Gauss-Newton; a_p and b_p are fitted). S_p is spread by the same kernel, so that both sides have
the same resolution. The kernel is so wide that a sum over slices far apart is as sharp at the
slices as between them: otherwise the registration would be drawn to a motion that puts the slices
of one interleave onto those of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

from brainprior_bids.anatomy.motion import FWHM
from brainprior_bids.engine.grids import Grid

Matrix = NDArray[np.float64]
Values = NDArray[np.float32]

BLUR = 4
"""FWHM of the kernel across the slices, in slice spacings. Two interleaves: with 2, errors across
the slices were larger. Four: with 3 and 6, too."""
NEXT = 2
"""Half width of the triangle that compares a slice with the two next to it, in slice spacings."""
MARGIN_MM = 4.0
"""Margin around the brain that is compared too."""
EVERY = 2
"""Every so many voxels in the plane are compared."""
STEPS = 20
"""Largest number of Gauss-Newton steps."""
CLOSE_MM = 0.01
"""A smaller step is the last one."""


@dataclass(frozen=True, eq=False)
class Slices:
    """A 2-D scan with thick slices.

    Parameters
    ----------
    values : (i, j, k)
        Divided by the bias field.
    inside : (i, j, k) bool
        Brain.
    grid : Grid
    axis : int
        Axis of the slices.
    lost : (n_slices,) bool
        Slices without signal.
    """

    values: Values
    inside: NDArray[np.bool_]
    grid: Grid
    axis: int
    lost: NDArray[np.bool_]

    def smoothed(self, fwhm_mm: float) -> Slices:
        """Blurred in the plane (Gaussian), and reduced to voxels of about half of that width."""
        planes = [axis for axis in range(3) if axis != self.axis]
        sd, part, affine = np.zeros(3), [slice(None)] * 3, self.grid.affine.copy()
        for axis in planes:
            spacing = float(self.grid.spacing_mm[axis])
            sd[axis] = fwhm_mm / FWHM / spacing
            step = max(1, int(fwhm_mm / 2 / spacing))
            part[axis] = slice(None, None, step)
            affine[:3, axis] *= step
        values = ndimage.gaussian_filter(self.values, sd)[tuple(part)]
        grid = Grid((values.shape[0], values.shape[1], values.shape[2]), affine)
        return Slices(values, self.inside[tuple(part)], grid, self.axis, self.lost)


class Interleaves:
    """The interleaves of a scan, each spread across the slices, and the points that are compared.

    Parameters
    ----------
    scan : Slices
    count : int
        Number of interleaves, n.
    kernel : (2 r + 1,)
        Weights across the slices.
    sharp : bool
        Compare the slices as they are with the prediction; otherwise spread like it.

    Attributes
    ----------
    brain : (3, m)
        The points in the brain, mm.
    """

    def __init__(self, scan: Slices, count: int, kernel: Matrix, *, sharp: bool) -> None:
        self.scan, self.count = scan, count
        self._to_voxels = np.linalg.inv(scan.grid.affine)
        lead = np.moveaxis(scan.values, scan.axis, 0)
        self._spread: list[Values] = []
        self._comb: list[Matrix] = []
        for p in range(count):
            own = ((np.arange(len(lead)) % count == p) & ~scan.lost).astype(np.float32)
            spread = ndimage.convolve1d(lead * own[:, None, None], kernel, axis=0, mode="constant")
            self._spread.append(np.moveaxis(spread, 0, scan.axis))
            self._comb.append(ndimage.convolve1d(own.astype(np.float64), kernel, mode="constant"))
        self._pick(sharp)

    def _pick(self, sharp: bool) -> None:
        """The points of each interleave in and around the brain, and their values."""
        scan = self.scan
        reach = [max(1, round(MARGIN_MM / s)) for s in scan.grid.spacing_mm]
        reach[scan.axis] = 0
        box = [2 * r + 1 for r in reach]
        around = ndimage.maximum_filter(scan.inside.astype(np.uint8), box) > 0
        every = [slice(None, None, 1 if axis == scan.axis else EVERY) for axis in range(3)]
        picked = np.zeros_like(around)
        picked[tuple(every)] = around[tuple(every)]
        np.moveaxis(picked, scan.axis, 0)[scan.lost] = False
        voxels = np.argwhere(picked).T
        self._points, self._values, self._inside = [], [], []
        for p in range(self.count):
            own = voxels[:, voxels[scan.axis] % self.count == p]
            values = scan.values[tuple(own)].astype(np.float64)
            if not sharp:
                values = self._spread[p][tuple(own)] / self._comb[p][own[scan.axis]]
            self._points.append(_mapped(scan.grid.affine, own))
            self._values.append(values)
            self._inside.append(scan.inside[tuple(own)])
        pairs = zip(self._points, self._inside, strict=True)
        self.brain = np.concatenate([points[:, inside] for points, inside in pairs], axis=1)
        self._centre = self.brain.mean(1)

    @cached_property
    def _slopes(self) -> list[list[Values]]:
        return [[np.gradient(spread, axis=a) for a in range(3)] for spread in self._spread]

    def _predict(
        self, positions: Sequence[Matrix], p: int, *, slopes: bool
    ) -> tuple[Matrix, dict[int, Matrix]]:
        """P_p at the points of p; and d P_p / d (shift, turn) of each interleave, (6, m)."""
        axis = self.scan.axis
        points = _mapped(positions[p], self._points[p])
        index = np.arange(len(self._comb[0]))
        above, below = np.zeros(points.shape[1]), np.zeros(points.shape[1])
        parts: dict[int, tuple[Matrix, Matrix, Matrix]] = {}
        for q in (q for q in range(self.count) if q != p):
            into = self._to_voxels @ np.linalg.inv(positions[q])
            at = _mapped(into, points)
            above += _at(self._spread[q], at)
            below += np.interp(at[axis], index, self._comb[q])
            if slopes:
                rise = np.stack([_at(slope, at) for slope in self._slopes[q]]).astype(np.float64)
                comb = np.interp(at[axis], index, np.gradient(self._comb[q]))
                parts[q] = rise, comb, into[:3, :3]
        below = np.maximum(below, 1e-6)
        prediction = above / below
        derivatives: dict[int, Matrix] = {}
        arm = points - self._centre[:, None]
        for q, (rise, comb, turn) in parts.items():
            rise[axis] -= prediction * comb
            slope = turn.T @ (rise / below)  # a motion of q moves the points the other way
            derivatives[q] = -np.concatenate([slope, np.cross(arm.T, slope.T).T])
        if slopes:
            derivatives[p] = -np.sum(list(derivatives.values()), axis=0)
        return prediction, derivatives

    def _normal(self, positions: Sequence[Matrix]) -> tuple[Matrix, Matrix]:
        """(n, 6 n, 6 n) and (n, 6 n): the normal equations of each interleave's points."""
        n = self.count
        squares, sides = np.zeros((n, 6 * n, 6 * n)), np.zeros((n, 6 * n))
        for p in range(n):
            prediction, derivatives = self._predict(positions, p, slopes=True)
            alike = np.stack([prediction, np.ones_like(prediction)], axis=1)
            basis, r = np.linalg.qr(alike)
            gain = np.linalg.solve(r, basis.T @ self._values[p])
            rows = gain[0] * np.concatenate([derivatives[q] for q in range(n)])
            rows -= (rows @ basis) @ basis.T  # a_p and b_p are fitted
            squares[p] = rows @ rows.T
            sides[p] = rows @ (self._values[p] - alike @ gain)
        return squares, sides

    def register(self, positions: Sequence[Matrix]) -> list[Matrix]:
        """The positions, from a start; that of the first interleave is kept."""
        current = list(positions)
        for _ in range(STEPS):
            squares, sides = self._normal(current)
            step = _solved(squares.sum(0)[6:, 6:], sides.sum(0)[6:]).reshape(-1, 6)
            moves = [self._rigid(one) for one in step]
            current[1:] = [move @ old for move, old in zip(moves, current[1:], strict=True)]
            if max(rms(move, np.eye(4), self.brain) for move in moves) < CLOSE_MM:
                break
        return current

    def error_mm(self, positions: Sequence[Matrix]) -> float:
        """Half of the RMS distance between the two directions of registration, the largest of all
        interleaves: each at its own points, or at those of the others.
        """
        squares, sides = self._normal(positions)
        errors = []
        for p in range(self.count):
            own, others = slice(6 * p, 6 * p + 6), np.arange(self.count) != p
            there = _solved(squares[p, own, own], sides[p, own])
            back = _solved(squares[others][:, own, own].sum(0), sides[others][:, own].sum(0))
            errors.append(rms(self._rigid(there), self._rigid(back), self.brain) / 2)
        return max(errors)

    def mismatch(self, positions: Sequence[Matrix]) -> float:
        """One minus the correlation of the points in the brain with their prediction."""
        seen, predicted = [], []
        for p in range(self.count):
            prediction, _ = self._predict(positions, p, slopes=False)
            seen.append(self._values[p][self._inside[p]])
            predicted.append(prediction[self._inside[p]])
        return 1 - float(np.corrcoef(np.concatenate(seen), np.concatenate(predicted))[0, 1])

    def _rigid(self, parameters: Matrix) -> Matrix:
        """A shift, mm, and a rotation vector about the middle of the brain -> (4, 4)."""
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_rotvec(parameters[3:]).as_matrix()
        matrix[:3, 3] = self._centre - matrix[:3, :3] @ self._centre + parameters[:3]
        return matrix


def smooth_kernel() -> Matrix:
    """The wide kernel, a Gaussian: for the registration."""
    sd = BLUR / FWHM
    at = np.arange(-int(4 * sd), int(4 * sd) + 1)
    return np.exp(-0.5 * (at / sd) ** 2)


def next_kernel() -> Matrix:
    """The narrow kernel: for the comparison of a slice with its neighbours. It is the same for
    every number of interleaves.
    """
    return np.maximum(0.0, 1 - np.abs(np.arange(1 - NEXT, NEXT)) / NEXT)


def rms(a: Matrix, b: Matrix, points: Matrix) -> float:
    """RMS distance between points, (3, m) mm, mapped by two motions."""
    apart = _mapped(a - b, points)
    return float(np.sqrt(np.mean(np.sum(apart**2, axis=0))))


def _mapped(matrix: Matrix, points: NDArray[np.float64] | NDArray[np.intp]) -> Matrix:
    return np.asarray(matrix[:3, :3] @ points + matrix[:3, 3:], np.float64)


def _at(volume: Values, voxels: Matrix) -> Values:
    return np.asarray(ndimage.map_coordinates(volume, voxels, order=1, mode="nearest"))


def _solved(squares: Matrix, side: Matrix) -> Matrix:
    """The least-squares solution; parameters that the points do not determine stay 0."""
    return np.asarray(np.linalg.lstsq(squares, side, rcond=1e-9)[0], np.float64)
