# SPDX-License-Identifier: Apache-2.0
"""The extent of the brain in every direction, which centroids deep inside do not determine.

Symbols: u, a unit vector in MNI305; p, a point of the mask's surface in the scan (RAS mm); A, an
affine from the scan to MNI305. The support in the direction u is the mean of ``u . A p`` over the
outermost ``1 - QUANTILE`` of the surface points, in mm from the origin of MNI305.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.anatomy.padding import beyond
from brainprior_bids.engine.grids import Grid

Array = NDArray[np.float64]

QUANTILE = 0.98
LOWEST = -0.6
"""Directions below this z are omitted: there the brain stem ends with the scan."""
POINTS = 20000
"""Maximum number of surface points."""
BORDER_MM = 3.0
"""Points this close to the edge of the field of view belong to the cut, not to the brain."""


def directions(n: int = 40) -> Array:
    """(m, 3) evenly spread unit vectors, none steeply downwards, with all mirror images in x."""
    step = np.arange(n) + 0.5
    polar, azimuth = np.arccos(1 - 2 * step / n), np.pi * (1 + 5**0.5) * step
    spread = np.c_[np.cos(azimuth) * np.sin(polar), np.sin(azimuth) * np.sin(polar), np.cos(polar)]
    spread = spread[spread[:, 2] > LOWEST]
    return np.concatenate([spread, spread * [-1, 1, 1]])


def surface(
    mask: NDArray[np.bool_], grid: Grid, unmeasured: NDArray[np.bool_] | None = None
) -> tuple[Array, NDArray[np.bool_]]:
    """Surface of a mask.

    Parameters
    ----------
    mask : (i, j, k) bool array
    grid : Grid
        Grid of the mask.
    unmeasured : (i, j, k) bool array, optional
        Where the image was padded with one value (``padding.unmeasured``).

    Returns
    -------
    points : (n, 3) array
        Scanner RAS mm; at most ``POINTS``, evenly thinned.
    cut : (n,) bool array
        True where the field of view ends, so that the brain may continue.
    """
    edge = np.argwhere(mask & ~ndimage.binary_erosion(mask, border_value=0))
    edge = edge[:: -(-len(edge) // POINTS)]
    margin = np.maximum(np.ceil(BORDER_MM / grid.spacing_mm), 1)
    cut = ((edge < margin) | (edge >= np.array(grid.shape) - margin)).any(1)
    if unmeasured is not None and unmeasured.any():
        near = beyond(unmeasured, np.zeros_like(mask), grid.spacing_mm, near_mm=BORDER_MM)
        cut |= near[tuple(edge.T)]
    return edge @ grid.affine[:3, :3].T + grid.affine[:3, 3], cut


def supports(
    points: Array, matrix: Array, towards: Array, cut: NDArray[np.bool_] | None = None
) -> tuple[Array, Array, NDArray[np.bool_]]:
    """The extent of the mapped points.

    Returns
    -------
    height : (m,) array
        Support in MNI305 mm.
    place : (m, 3) array
        Mean of the outermost points, in the scan.
    measured : (m,) bool array
        False where at least one in twenty of them is on the cut.
    """
    reach = (points @ matrix[:3, :3].T + matrix[:3, 3]) @ towards.T
    n = max(round(len(points) * (1 - QUANTILE)), 1)
    outermost = np.argpartition(-reach, n - 1, axis=0)[:n]  # (n, m)
    height = np.take_along_axis(reach, outermost, axis=0).mean(0)
    measured = np.ones(len(towards), bool) if cut is None else cut[outermost].mean(0) < 0.05
    return height, points[outermost].mean(0), measured
