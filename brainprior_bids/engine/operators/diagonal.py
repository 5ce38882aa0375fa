# SPDX-License-Identifier: Apache-2.0
"""Operators without neighbours: identity, bias field and precision, selection of voxels."""

from __future__ import annotations

from torch import Tensor

from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.operators.base import LinearOperator, Shape


class Identity(LinearOperator):
    """``y = x``: refinement of an image that is trusted up to its noise SD."""

    def __init__(self, shape: Shape) -> None:
        self.in_shape = self.out_shape = tuple(shape)

    def _forward(self, x: Tensor) -> Tensor:
        return x

    def _adjoint(self, y: Tensor) -> Tensor:
        return y


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


class Selection(LinearOperator):
    """``y = S x``: the voxels where ``mask`` is true, as one list.

    Raises
    ------
    InputError
        If the mask selects nothing.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool()
        if not bool(self.mask.any()):
            raise InputError("Selection: the mask selects no voxel.")
        self.in_shape = tuple(mask.shape)
        self.out_shape = (int(self.mask.sum()),)

    def _forward(self, x: Tensor) -> Tensor:
        return x[..., self.mask.to(x.device)]

    def _adjoint(self, y: Tensor) -> Tensor:
        x = y.new_zeros(*y.shape[:-1], *self.in_shape)
        x[..., self.mask.to(y.device)] = y
        return x
