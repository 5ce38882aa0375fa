# SPDX-License-Identifier: Apache-2.0
"""Resampling between grids of any orientation (torch-interpol's pull and push)."""

from __future__ import annotations

import interpol
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from brainprior_bids.engine.errors import GeometryError
from brainprior_bids.engine.grids import Grid
from brainprior_bids.engine.operators.base import LinearOperator


class AffineResample(LinearOperator):
    """Values of an image on ``source`` at the voxel centres of ``target``; 0 beyond its edge.

    Parameters
    ----------
    source, target : Grid
        Of x and of y.
    target_to_source : (4, 4), optional
        mm of the target's space -> mm of the source's; identity if they share a space.
    order : int
        Of the spline that interpolates between the voxels taken as coefficients: 1 is linear.

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

    def _forward(self, x: Tensor) -> Tensor:
        pulled: Tensor = interpol.grid_pull(
            x, self.points.to(x), interpolation=self.order, bound="zero", extrapolate=False
        )
        return pulled

    def _adjoint(self, y: Tensor) -> Tensor:
        pushed: Tensor = interpol.grid_push(
            y,
            self.points.to(y),
            self.in_shape,
            interpolation=self.order,
            bound="zero",
            extrapolate=False,
        )
        return pushed
