# SPDX-License-Identifier: Apache-2.0
"""The multiplicative bias field on a low-frequency cosine basis.

``log b(t) = log b_0(t) + sum_f c_f prod_axis cos(pi f_axis t_axis)`` with t in [0, 1] along each
axis of the data box; b_0 is the initial estimate (N4's field). The constant term is a gain: the
prior has learned the brightness of a brain in its unit, and a percentile of thick slices matches
that unit only roughly. ``restore`` moves the gain to the image, so that log b has mean 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CosineField:
    """A smooth field on a basis of cosines.

    Parameters
    ----------
    extent_mm : three floats
        Size of the data box along each axis.
    shortest_mm : float
        Half waves shorter than this are omitted.
    sd : float
        Prior SD of the coefficients (log units) at frequency 0; falls as 1 / (1 + |f|^2).
    """

    def __init__(
        self, extent_mm: tuple[float, float, float], shortest_mm: float = 60.0, sd: float = 0.15
    ) -> None:
        self.orders = tuple(max(int(extent // shortest_mm), 1) + 1 for extent in extent_mm)
        grids = torch.meshgrid(*(torch.arange(n) for n in self.orders), indexing="ij")
        frequency = torch.stack(grids).double()
        waves = torch.stack(
            [f / extent for f, extent in zip(frequency, extent_mm, strict=True)]
        ).norm(dim=0)
        self.keep = waves <= 1 / shortest_mm
        prior_sd = sd / (1 + (frequency**2).sum(0))
        self.precision = prior_sd[self.keep] ** -2
        self.n = int(self.keep.sum())

    def basis(self, positions: list[Tensor]) -> list[Tensor]:
        """Per axis the (n_f, n) cosines at relative positions (0 and 1 are the box's edges)."""
        return [
            torch.cos(torch.pi * torch.arange(n, dtype=torch.float64)[:, None] * t.double())
            for n, t in zip(self.orders, positions, strict=True)
        ]

    def evaluate(self, coefficients: Tensor, basis: list[Tensor]) -> Tensor:
        """The field: (n,) coefficients -> (i, j, k) float32."""
        full = coefficients.new_zeros(self.orders)
        full[self.keep] = coefficients
        a, b, c = (axis.to(full) for axis in basis)
        return torch.einsum("abc,ai,bj,ck->ijk", full, a, b, c).float()

    def project(self, volume: Tensor, basis: list[Tensor]) -> Tensor:
        """The adjoint of ``evaluate``: (i, j, k) -> (n,) float64."""
        a, b, c = (axis.to(volume) for axis in basis)
        t: Tensor = torch.tensordot(volume, c, dims=([2], [1]))
        t = torch.tensordot(t, b, dims=([1], [1]))
        t = torch.tensordot(t, a, dims=([0], [1]))  # (c, b, a)
        return t.permute(2, 1, 0)[self.keep.to(t.device)].double()


def gauss_newton_step(
    field: CosineField,
    basis: list[Tensor],
    *,
    coefficients: Tensor,
    prediction: Tensor,
    residual: Tensor,
    whiten: Callable[[Tensor], Tensor],
    trust: float = 1.0,
    iterations: int = 6,
) -> Tensor:
    """New coefficients after one ridge Gauss-Newton step.

    Minimises ``(e - J d)^T C^-1 (e - J d) + (c + d)^T R (c + d)`` over d with ``J = diag(b A m)
    Phi`` by a few conjugate-gradient steps (stopping early only damps the step).

    Parameters
    ----------
    prediction, residual : (i, j, k) tensors
        ``b A m`` and ``e = y - b A m``, 0 where nothing was measured.
    whiten : function
        ``C^-1 v``, C the covariance of e.
    trust : float
        Weight of the data relative to the ridge; below 1 if C neglects correlations of the errors.
    """
    ridge = field.precision.to(coefficients)

    def weigh(volume: Tensor) -> Tensor:
        projection = field.project(prediction * whiten(volume), basis)
        return trust * projection.to(coefficients)

    def hessian(d: Tensor) -> Tensor:
        return weigh(prediction * field.evaluate(d, basis).to(prediction)) + ridge * d

    step = torch.zeros_like(coefficients)
    r = weigh(residual) - ridge * coefficients
    # A scale per coefficient: the Hessian's size on one probe, shared by all of them.
    probe = torch.ones_like(coefficients)
    size = float((hessian(probe) - ridge * probe).abs().mean())
    scale = 1 / (ridge + size)
    z = scale * r
    p = z
    rz = float(r @ z)
    for _ in range(min(iterations, field.n)):
        if rz <= 0.0:
            break
        hp = hessian(p)
        alpha = rz / float(p @ hp)
        step = step + alpha * p
        r = r - alpha * hp
        z = scale * r
        rz, before = float(r @ z), rz
        p = z + (rz / before) * p
    return coefficients + step
