# SPDX-License-Identifier: Apache-2.0
"""Baselines for a restoration: interpolation, Tikhonov and total variation.

Each returns an image on the finer grid of the same field of view. Tikhonov and TV are given the
exact slice weights ``W`` (see ``degrade.averaging_weights``), which are unknown for a real scan.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from brainprior_bids.engine.errors import GeometryError, ShapeMismatchError
from brainprior_bids.engine.grids import Grid


def interpolate(
    data: NDArray[np.float32], source: Grid, target: Grid, *, order: int
) -> NDArray[np.float32]:
    """Spline interpolation between grids that share their axes; 1 is linear, 3 cubic.

    Outside the outermost voxel centres the border value is kept.

    Raises
    ------
    GeometryError
        If the grids are rotated relative to each other.
    """
    index = np.linalg.inv(source.affine) @ target.affine
    if not np.allclose(index[:3, :3], np.diag(np.diag(index[:3, :3])), atol=1e-4):
        raise GeometryError("interpolate: expected grids with the same axes; resample instead.")
    values = np.asarray(data, np.float32)
    return ndimage.affine_transform(
        values, index[:3, :3], index[:3, 3], output_shape=target.shape, order=order, mode="nearest"
    )


def tikhonov(
    data: NDArray[np.float32], weights: NDArray[np.float64], *, axis: int, penalty: float
) -> NDArray[np.float32]:
    """``argmin_x |W x - y|² + penalty |D x|²`` along the slice axis, D the first difference.

    Parameters
    ----------
    data : (i, j, k) array
        Thick slices along ``axis``.
    weights : (slices, fine) array
        W.
    axis : int
        Slice axis.
    penalty : float
        Dimensionless.

    Returns
    -------
    (i, j, k) float32 array
        ``fine`` voxels along ``axis``; the unit of ``data``.

    Raises
    ------
    ShapeMismatchError
        If the rows of W are not as many as the slices.
    """
    _check_slices(data, weights, axis)
    difference = np.diff(np.eye(weights.shape[1]), axis=0)
    normal = weights.T @ weights + penalty * difference.T @ difference
    solve = np.linalg.solve(normal, weights.T)
    return np.moveaxis(np.tensordot(solve, data, axes=(1, axis)), 0, axis).astype(np.float32)


def total_variation(
    data: NDArray[np.float32],
    weights: NDArray[np.float64],
    *,
    axis: int,
    penalty: float,
    iterations: int = 150,
) -> NDArray[np.float32]:
    """``argmin_x |W x - y|² / 2 + penalty TV(x)``, isotropic 3-D TV, primal-dual.

    Chambolle and Pock, J Math Imaging Vis 40 (2011), algorithm 1; the data term's proximal map is
    a small matrix along the slice axis. Start: Tikhonov.

    Parameters
    ----------
    data, weights, axis
        As ``tikhonov``.
    penalty : float
        In the unit of ``data``.
    iterations : int
        Primal-dual steps.

    Returns
    -------
    (i, j, k) float32 array
        As ``tikhonov``.

    Raises
    ------
    ShapeMismatchError
        As ``tikhonov``.
    """
    _check_slices(data, weights, axis)
    y = np.moveaxis(np.asarray(data, np.float32), axis, 0)
    x = np.moveaxis(tikhonov(data, weights, axis=axis, penalty=1e-3), axis, 0)
    step = 1 / np.sqrt(12.0)  # |gradient|² <= 12
    inverse = np.linalg.inv(np.eye(weights.shape[1]) + step * weights.T @ weights)
    inverse = inverse.astype(np.float32)
    constant = np.tensordot((step * weights.T).astype(np.float32), y, 1)
    dual = np.zeros((3, *x.shape), np.float32)
    ahead = x.copy()
    for _ in range(iterations):
        for direction in range(3):
            moving = _along(dual[direction], direction)
            moving[:-1] += np.float32(step) * np.diff(_along(ahead, direction), axis=0)
        norm = np.sqrt(np.einsum("dijk,dijk->ijk", dual, dual))
        dual /= np.maximum(1, norm / np.float32(penalty))
        divergence = np.zeros_like(x)
        for direction in range(3):
            moving, part = _along(divergence, direction), _along(dual[direction], direction)
            moving[:-1] += part[:-1]
            moving[1:] -= part[:-1]
        previous = x
        x = np.tensordot(inverse, x + np.float32(step) * divergence + constant, 1)
        ahead = 2 * x - previous
    return np.moveaxis(x, 0, axis)


def _along(values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """A view with ``axis`` in front."""
    return np.moveaxis(values, axis, 0)


def _check_slices(data: NDArray[np.float32], weights: NDArray[np.float64], axis: int) -> None:
    if data.shape[axis] != weights.shape[0]:
        raise ShapeMismatchError(
            f"Baseline: {weights.shape[0]} rows of slice weights for {data.shape[axis]} slices."
        )
