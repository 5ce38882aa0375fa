# SPDX-License-Identifier: Apache-2.0
"""Linear operators, from which every measurement ``y = A x`` is composed.

An operator acts on the last ``len(in_shape)`` axes of a tensor; axes before them are a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from brainprior_bids.engine.errors import ShapeMismatchError

Shape = tuple[int, ...]


def check_shape(who: str, tensor: Tensor, shape: Shape, hint: str) -> None:
    """Raise ShapeMismatchError unless the last axes of ``tensor`` are ``shape``."""
    if tuple(tensor.shape[tensor.ndim - len(shape) :]) != shape or tensor.ndim < len(shape):
        raise ShapeMismatchError(
            f"{who}: expected an array that ends in {shape}, got {tuple(tensor.shape)}. {hint}"
        )


class LinearOperator(ABC):
    """``y = A x`` with its exact adjoint.

    Attributes
    ----------
    in_shape, out_shape : tuple of int
        The last axes of x and of y.

    Raises
    ------
    ShapeMismatchError
        From ``forward`` and ``adjoint``, if the argument has another shape.
    """

    in_shape: Shape
    out_shape: Shape

    @abstractmethod
    def _forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        """``A x``: ``(..., *in_shape) -> (..., *out_shape)``."""
        hint = "Was the image resampled after the operator was built?"
        check_shape(type(self).__name__, x, self.in_shape, hint)
        return self._forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """``A^T y``: ``(..., *out_shape) -> (..., *in_shape)``."""
        hint = "The adjoint takes data, not an image."
        check_shape(f"{type(self).__name__}.adjoint", y, self.out_shape, hint)
        return self._adjoint(y)

    def gram(self, x: Tensor) -> Tensor:
        """``A^T A x``."""
        return self._adjoint(self.forward(x))

    def squared_norm_bound(self) -> float:
        """An upper bound of ``||A||^2``, the largest eigenvalue of ``A^T A``.

        By default 1.2 times an estimate by power iteration, which converges from below.
        """
        return 1.2 * squared_norm(self, torch.Generator().manual_seed(0))

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def __matmul__(self, other: LinearOperator) -> Composition:
        return Composition(self, other)


class Composition(LinearOperator):
    """``A B x``: first ``inner`` (B), then ``outer`` (A)."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        if outer.in_shape != inner.out_shape:
            raise ShapeMismatchError(
                f"Composition: {type(outer).__name__} takes {outer.in_shape}, "
                f"{type(inner).__name__} gives {inner.out_shape}. Build both for the same grid."
            )
        self.outer, self.inner = outer, inner
        self.in_shape, self.out_shape = inner.in_shape, outer.out_shape

    def _forward(self, x: Tensor) -> Tensor:
        return self.outer._forward(self.inner._forward(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.inner._adjoint(self.outer._adjoint(y))


class VStack(LinearOperator):
    """Several scans of one image: ``y = (A_1 x, A_2 x, ...)``, each flattened and joined.

    ``split`` returns the scans in their own shapes.
    """

    def __init__(self, operators: Sequence[LinearOperator]) -> None:
        if not operators:
            raise ShapeMismatchError("VStack: expected at least one operator, got none.")
        self.operators = tuple(operators)
        self.in_shape = self.operators[0].in_shape
        for operator in self.operators:
            if operator.in_shape != self.in_shape:
                raise ShapeMismatchError(
                    f"VStack: all operators must take {self.in_shape}, "
                    f"{type(operator).__name__} takes {operator.in_shape}. Use one image grid."
                )
        self.sizes = [int(torch.Size(op.out_shape).numel()) for op in self.operators]
        self.out_shape = (sum(self.sizes),)

    def split(self, y: Tensor) -> list[Tensor]:
        """The joined data, split into one tensor per scan."""
        batch = y.shape[:-1]
        parts = torch.split(y, self.sizes, dim=-1)
        return [
            part.reshape(*batch, *op.out_shape)
            for part, op in zip(parts, self.operators, strict=True)
        ]

    def _forward(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - len(self.in_shape)]
        return torch.cat([op._forward(x).reshape(*batch, -1) for op in self.operators], dim=-1)

    def _adjoint(self, y: Tensor) -> Tensor:
        parts = [op._adjoint(part) for part, op in zip(self.split(y), self.operators, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


def squared_norm(
    operator: LinearOperator, generator: torch.Generator, iterations: int = 30
) -> float:
    """``||A||^2``, the largest eigenvalue of ``A^T A``, by power iteration.

    The estimate approaches from below; multiply by a margin before you use it as a bound.
    """
    x = torch.randn(operator.in_shape, generator=generator, dtype=torch.float64)
    value = 0.0
    for _ in range(iterations):
        x = x / x.norm()
        x = operator.gram(x)
        value = float(x.norm())
        if value == 0.0:
            return 0.0
    return value
