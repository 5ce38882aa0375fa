# SPDX-License-Identifier: Apache-2.0
"""Gaussian blur: the point spread of low-field scans, whose voxels promise more than they hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from brainprior_bids.engine.errors import GeometryError
from brainprior_bids.engine.operators.base import LinearOperator, Shape


class GaussianBlur(LinearOperator):
    """Convolve one axis with a Gaussian, periodically; its own adjoint.

    Parameters
    ----------
    in_shape : tuple of int
    axis : int
        Within ``in_shape``.
    fwhm_voxels : float
        Full width at half maximum in voxels, above 0.

    Raises
    ------
    GeometryError
        If the width is not above 0.
    """

    def __init__(self, in_shape: Shape, axis: int, fwhm_voxels: float) -> None:
        if not 0 < fwhm_voxels < math.inf:
            raise GeometryError(f"GaussianBlur: width must be above 0 voxels, got {fwhm_voxels}.")
        self.in_shape = self.out_shape = tuple(in_shape)
        self.axis = axis - len(in_shape)
        sd = fwhm_voxels / (2 * math.sqrt(2 * math.log(2)))
        frequency = torch.fft.rfftfreq(in_shape[axis], dtype=torch.float64)
        self.response = torch.exp(-2 * (math.pi * sd * frequency) ** 2)

    def _forward(self, x: Tensor) -> Tensor:
        moved = x.movedim(self.axis, -1)
        k = torch.fft.rfft(moved, dim=-1) * self.response.to(x)
        y: Tensor = torch.fft.irfft(k, n=moved.shape[-1], dim=-1)
        return y.movedim(-1, self.axis)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._forward(y)
