# SPDX-License-Identifier: Apache-2.0
"""A likelihood with voxels that say nothing: ``S y = S (b * (A x)) + n``.

S selects the measured voxels. The hidden ones have no precision at all (not a small one, which
would still pull x towards the lesion), so the inner system is solved on the measured voxels
alone: ``S (A V A^T + Sigma / b^2) S^T u = S rhs``, preconditioned by the stationary inverse
between the same selections.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from brainprior_bids.engine.errors import InputError
from brainprior_bids.engine.likelihood import SliceLikelihood
from brainprior_bids.engine.operators.base import check_shape
from brainprior_bids.engine.solve import conjugate_gradients
from brainprior_bids.engine.spectral import LevelFactors


class MaskedLikelihood(SliceLikelihood):
    """A scan of which some voxels are not to be believed.

    Parameters
    ----------
    y, options
        As ``SliceLikelihood``.
    hidden : (i', j', k') tensor
        Above 0 where the scan says nothing.

    Raises
    ------
    InputError
        If nothing of the brain is left to condition on.
    """

    def __init__(self, y: Tensor, *, hidden: Tensor, **options: Any) -> None:
        super().__init__(y, **options)
        covered = self._lead(hidden) > 0
        check_shape(
            "MaskedLikelihood: hidden", covered, self.solver.data_shape, "On the scan's grid."
        )
        self.keep = (~covered).to(self.y.dtype)
        self.core &= ~covered
        if not bool(self.core.any()):
            raise InputError(
                "The lesion mask covers every voxel that lies wholly in the brain: nothing is "
                "left to condition on. Check the mask."
            )

    def misfit_gradient(self, x: Tensor) -> Tensor:
        """As ``SliceLikelihood.misfit_gradient``, over the measured voxels."""
        thick = self.bias * self.solver.forward(self._from_image_axes(x))
        weighted = self.keep * self.bias * (thick - self.y) / self.variance(self.noise_sd)
        return self._to_image_axes(self.solver.adjoint(weighted))

    def _solve(self, factors: LevelFactors, rhs: Tensor, variance: Tensor, sigma: float) -> Tensor:
        keep = self.keep
        n = float(keep.sum()) ** 0.5
        inverse_sd = keep * variance.rsqrt()
        spread, noise = self.solver.mean_variance(factors), factors.noise_variance
        scale = keep * ((spread + noise) / (spread + variance)).sqrt()
        u, iterations = conjugate_gradients(
            lambda v: keep * (self.solver.covariance(factors, v) + variance * v),
            keep * rhs,
            precondition=lambda r: scale * self.solver.precondition(factors, scale * r),
            residual_size=lambda r: float((r * inverse_sd).norm()) / n,
            tolerance=self.limits.tolerance,
            max_iterations=self.limits.max_iterations,
            who=f"inner solve with a mask at sigma {sigma:.3g}",
        )
        self.iterations.append(iterations)
        return u
