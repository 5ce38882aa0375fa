# SPDX-License-Identifier: Apache-2.0
"""Multiplication voxel by voxel: a bias field, or the root of a precision."""

from __future__ import annotations

from torch import Tensor

from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.operators.base import LinearOperator


class Multiply(LinearOperator):
    """``y = w x`` voxel by voxel: a bias field, or the root of a precision.

    Raises
    ------
    InputError
        If a factor is not finite.
    """

    def __init__(self, factor: Tensor) -> None:
        if not bool(factor.isfinite().all()):
            raise InputError("Multiply: the factor holds NaN or infinite values.")
        self.factor = factor
        self.in_shape = self.out_shape = tuple(factor.shape)

    def _forward(self, x: Tensor) -> Tensor:
        return self.factor.to(x) * x

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.factor.to(y) * y
