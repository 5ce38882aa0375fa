# SPDX-License-Identifier: Apache-2.0
"""Resampling between grids of any orientation: torch-interpol's pull and push, or a matrix."""

from __future__ import annotations

import itertools
import warnings

import interpol
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from brainprior_bids.engine.errors import GeometryError, InputError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.operators.base import LinearOperator


class AffineResample(LinearOperator):
    """Values of an image on ``source`` at the voxel centres of ``target``; 0 beyond its edge.

    Parameters
    ----------
    source, target : Grid
        Grids of x and of y.
    target_to_source : (4, 4), optional
        mm of the target's space -> mm of the source's; identity if they share a space.
    order : int
        Order of the spline that interpolates between the voxels, which are its coefficients; 1 is
        linear.

    Raises
    ------
    GeometryError
        If the matrix cannot be inverted.
    """

    def __init__(
        self,
        source: Grid,
        target: Grid,
        target_to_source: ArrayLike | None = None,
        *,
        order: int = 1,
    ) -> None:
        matrix = np.eye(4) if target_to_source is None else np.asarray(target_to_source, float)
        if (
            matrix.shape != (4, 4)
            or not np.isfinite(matrix).all()
            or (abs(np.linalg.det(matrix[:3, :3])) < 1e-9)
        ):
            raise GeometryError(
                f"AffineResample: expected an invertible 4 x 4 matrix, got\n{matrix}."
            )
        self.in_shape, self.out_shape = source.shape, target.shape
        voxels = np.linalg.inv(source.affine) @ matrix @ target.affine
        index = torch.meshgrid(
            *(torch.arange(n, dtype=torch.float64) for n in target.shape), indexing="ij"
        )
        points = torch.stack(index, -1) @ torch.from_numpy(voxels[:3, :3].T.copy())
        self.points = points + torch.from_numpy(voxels[:3, 3].copy())
        self.order = order
        self._made = self.points

    def _points(self, like: Tensor) -> Tensor:
        """The points with dtype and device of ``like``; cached for the next call."""
        if (self._made.dtype, self._made.device) != (like.dtype, like.device):
            self._made = self.points.to(like)
        return self._made

    def _forward(self, x: Tensor) -> Tensor:
        pulled: Tensor = interpol.grid_pull(
            x, self._points(x), interpolation=self.order, bound="zero", extrapolate=False
        )
        return pulled

    def _adjoint(self, y: Tensor) -> Tensor:
        pushed: Tensor = interpol.grid_push(
            y,
            self._points(y),
            self.in_shape,
            interpolation=self.order,
            bound="zero",
            extrapolate=False,
        )
        return pushed


class SparseResample(LinearOperator):
    """``AffineResample`` of order 1 as a sparse matrix, for many products of a brain's voxels.

    Only voxels where ``within`` is true are used, the others count as 0. These are a third of a
    brain's box, and a product costs a hundredth of torch-interpol's on one core.

    Parameters
    ----------
    source, target, target_to_source
        As ``AffineResample``.
    within : bool tensor of ``source.shape``
        Where the image may differ from 0.

    Raises
    ------
    GeometryError
        If the matrix cannot be inverted.
    InputError
        If ``within`` is false everywhere.
    """

    def __init__(
        self,
        source: Grid,
        target: Grid,
        target_to_source: ArrayLike,
        *,
        within: Tensor,
    ) -> None:
        points = AffineResample(source, target, target_to_source).points.reshape(-1, 3)
        self.in_shape, self.out_shape = source.shape, target.shape
        n, size = len(points), torch.tensor(source.shape)
        # most of a box is far from the brain
        voxels = within.cpu().nonzero()
        if not len(voxels):
            raise InputError("SparseResample: no voxel of the image lies within. Check the mask.")
        low, high = voxels.amin(0) - 1, voxels.amax(0) + 1
        every = ((points >= low) & (points <= high)).all(1).nonzero().flatten()
        points = points[every]
        first = points.floor()
        part = points - first
        first = first.long()
        inside = within.cpu().flatten()
        rows, columns, values = [], [], []
        for corner in itertools.product((0, 1), repeat=3):
            at = first + torch.tensor(corner)
            weight = torch.stack(
                [part[:, a] if up else 1 - part[:, a] for a, up in enumerate(corner)]
            ).prod(0)
            use = ((at >= 0) & (at < size)).all(1) & (weight > 0)
            index = (at[:, 0] * size[1] + at[:, 1]) * size[2] + at[:, 2]
            use &= inside[index.clamp(0, inside.numel() - 1)]
            rows.append(every[use])
            columns.append(index[use])
            values.append(weight[use])
        row, column, value = torch.cat(rows), torch.cat(columns), torch.cat(values)
        m = inside.numel()
        self._made = {
            (torch.float64, torch.device("cpu")): (
                _sparse(row, column, value, (n, m)),
                _sparse(column, row, value, (m, n)),
            )
        }

    def _matrices(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix and its transpose, with dtype and device of ``like``."""
        key = (like.dtype, like.device)
        if key not in self._made:
            ((one, two),) = self._made.values()
            self._made = {key: (one.to(like.device, like.dtype), two.to(like.device, like.dtype))}
        return self._made[key]

    def _forward(self, x: Tensor) -> Tensor:
        return _product(self._matrices(x)[0], x, self.in_shape, self.out_shape)

    def _adjoint(self, y: Tensor) -> Tensor:
        return _product(self._matrices(y)[1], y, self.out_shape, self.in_shape)


def _sparse(row: Tensor, column: Tensor, value: Tensor, shape: tuple[int, int]) -> Tensor:
    order = torch.argsort(row, stable=True)
    starts = torch.zeros(shape[0] + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(row, minlength=shape[0]).cumsum(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse matrices a beta feature
        matrix: Tensor = torch.sparse_csr_tensor(
            starts, column[order].to(torch.int32), value[order], size=shape
        )
    return matrix


def _product(
    matrix: Tensor, x: Tensor, in_shape: tuple[int, ...], out_shape: tuple[int, ...]
) -> Tensor:
    batch = x.shape[: x.ndim - len(in_shape)]
    flat = x.reshape(-1, matrix.shape[1])
    return torch.stack([matrix @ one for one in flat]).reshape(*batch, *out_shape)
