# SPDX-License-Identifier: Apache-2.0
"""The spectral strategy: one scan whose slices lie along an axis of the image.

See ``spectral`` for the small matrices. With a bias field, hidden voxels or voxels partly outside
the brain, the noise is not white: conjugate gradients in data space, preconditioned by the solve
for white noise, take a few iterations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from brainprior_bids.engine.errors import UsageError
from brainprior_bids.engine.gaussian.conjugate_gradients import (
    conjugate_gradients,
    split_conjugate_gradients,
)
from brainprior_bids.engine.gaussian.spectral import LevelFactors, SpectralSolver, Spectrum
from brainprior_bids.engine.likelihood import Likelihood
from brainprior_bids.engine.operators.base import LinearOperator

WIDE = 40.0
"""V counts as wide if the variance it gives a data voxel is more than this times the noise
variance."""
MENDED, MENDINGS = 1.5, 4
"""A residual of x in the equation that exceeds this many times the tolerance is due to rounding;
it is solved for again, at most this many times."""


@dataclass(frozen=True)
class SolveLimits:
    """When the inner conjugate gradients stop.

    The residual is compared voxel by voxel with the noise SD: an RMS of 0.02 moves the data fit
    by 2 % of the noise.
    """

    tolerance: float = 0.02
    max_iterations: int = 200


class SlicedImage(LinearOperator):
    """``A x`` of a ``SpectralSolver``, with the slices along any axis.

    Parameters
    ----------
    solver : SpectralSolver
        Built with the slice axis first.
    axis : int
        The slice axis of x and y.
    """

    def __init__(self, solver: SpectralSolver, axis: int) -> None:
        self.solver, self.axis = solver, axis
        self.in_shape = self._moved(solver.image_shape)
        self.out_shape = self._moved(solver.data_shape)

    def _moved(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        rest = list(shape[1:])
        rest.insert(self.axis, shape[0])
        return tuple(rest)

    def lead(self, volume: Tensor) -> Tensor:
        """Move the slice axis to the front."""
        return volume.movedim(self.axis, 0).contiguous()

    def back(self, volume: Tensor) -> Tensor:
        """The inverse of ``lead``."""
        return volume.movedim(0, self.axis).contiguous()

    def _forward(self, x: Tensor) -> Tensor:
        return self.back(self.solver.forward(self.lead(x)))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.back(self.solver.adjoint(self.lead(y)))

    def squared_norm_bound(self) -> float:
        """``|W|^2 <= largest row sum times largest column sum``; the k-space crop only shrinks."""
        w = self.solver.slice_weights64.abs()
        return float(w.sum(0).max() * w.sum(1).max()) * self.solver.scale**2


class SpectralSolve:
    """A ``Solve`` for a likelihood with one term, whose operator is a ``SlicedImage``."""

    name = "spectral"

    def __init__(
        self, likelihood: Likelihood, spectrum: Spectrum, limits: SolveLimits = SolveLimits()
    ) -> None:
        (self.term,) = likelihood.terms
        assert isinstance(self.term.operator, SlicedImage)
        self.operator, self.solver = self.term.operator, self.term.operator.solver
        self.likelihood, self.spectrum, self.limits = likelihood, spectrum, limits
        self.iterations: list[int] = []
        self._support = self.operator.lead(likelihood.support)
        self._factors: tuple[float, LevelFactors] | None = None

    def draw(
        self, mean: Tensor, sigma: float, generator: torch.Generator, *, given: bool = False
    ) -> Tensor:
        """As ``Likelihood.draw``."""
        factors = self._level(sigma)
        variance = self._divided_variance()
        prior_k, drawn_data = self.solver.draw_prior(factors, generator)
        noise = torch.randn(variance.shape, generator=generator).to(self.solver.device)
        drawn = variance.sqrt() * noise
        return self._conditional(mean, sigma, prior_k, drawn_data, drawn, variance, given=given)

    def expect(self, mean: Tensor, sigma: float, *, given: bool = False) -> Tensor:
        """As ``Likelihood.expect``."""
        variance = self._divided_variance()
        nothing, still = self.solver.no_deviation(), torch.zeros_like(variance)
        return self._conditional(mean, sigma, nothing, still, still, variance, given=given)

    def refine(self, mean: Tensor, sigma: float, *, bias: bool, noise: bool) -> None:
        """One step of the bias field and of the noise level.

        The innovation ``e = y - b A m`` has covariance ``b A V A^T b + Sigma``: x is integrated
        out under V, so that a level with a wide V changes nothing; only voxels wholly inside the
        brain count.
        """
        if not (bias or noise):
            return
        term, factors, lead = self.term, self._level(sigma), self.operator.lead
        prediction_alone = term.operator(mean)

        def innovation() -> tuple[Tensor, Tensor]:
            prediction = torch.where(term.core, term.bias * prediction_alone, 0.0)
            return prediction, torch.where(term.core, term.y - term.bias * prediction_alone, 0.0)

        if bias:
            term.nuisance.step_bias(
                *innovation(),
                lambda v: self.operator.back(self.solver.precondition(factors, lead(v))),
            )
        if noise:
            whitened = self.solver.precondition(factors, lead(innovation()[1]))
            power = float(whitened.square().sum()) / float(term.core.float().mean())
            term.nuisance.step_noise(power, self.solver.inverse_traces(factors), term.y.numel())

    def _level(self, sigma: float) -> LevelFactors:
        """The small matrices of this noise level, for the current noise of the data."""
        noise = self.term.noise_sd**2
        if self._factors is None or self._factors[0] != sigma:
            self._factors = sigma, self.solver.factors(self.spectrum, sigma, noise)
        factors = self._factors[1]
        if abs(factors.noise_variance - noise) > 1e-9 * noise:
            self._factors = sigma, self.solver.renoise(factors, noise)
        return self._factors[1]

    def _divided_variance(self) -> Tensor:
        """Variance of y / b = ``A x + n / b``; slice axis first."""
        return self.operator.lead(self.term.variance() / self.term.bias**2)

    def _conditional(
        self,
        mean: Tensor,
        sigma: float,
        prior_k: Tensor,
        seen: Tensor,
        drawn: Tensor,
        variance: Tensor,
        *,
        given: bool,
    ) -> Tensor:
        """``z + V A^T (A V A^T + Sigma)^-1 (y + Sigma^1/2 n - A z)``, z = m + v.

        ``prior_k`` is v ~ N(0, V) in k-space, ``seen`` is A v, ``drawn`` is Sigma^1/2 n.

        Where V is very wide, u at low frequencies is a small difference of large numbers, and V
        A^T turns its float32 rounding into an offset of the whole image (a third of the noise SD
        in a head of 200 x 200 x 150 at sigma 30). Therefore x is inserted into the equation, and
        its residual is solved for again (iterative refinement).
        """
        if given:
            raise UsageError(
                "spectral solve: the denoiser is already conditioned on the only scan."
            )
        factors, m = self._level(sigma), self.operator.lead(mean)
        data = self.operator.lead(self.term.y / self.term.bias)
        rhs = data + drawn - seen - self.solver.forward(m)
        u = self._solve(factors, rhs, variance, sigma)
        x0 = m + self.solver.correct(factors, prior_k, u)
        for _ in range(MENDINGS):
            rest = data + drawn - self.solver.forward(x0) - variance * u
            if self._size(rest, variance) <= MENDED * self.limits.tolerance:
                break
            more = self._solve(factors, rest, variance, sigma)
            u += more
            x0 += self.solver.correct(factors, self.solver.no_deviation(), more)
        return self.operator.back(x0 * self._support)

    def _keep(self) -> Tensor | None:
        """1 where a voxel is measured, slice axis first; None if all are."""
        term = self.term
        return None if term.all_measured else self.operator.lead(term.measured).float()

    def _size(self, r: Tensor, variance: Tensor) -> float:
        """RMS of a residual over measured voxels, in SDs of the noise."""
        keep = self._keep()
        scaled = r * variance.rsqrt()
        if keep is None:
            return float(scaled.norm()) / math.sqrt(r.numel())
        return float((keep * scaled).norm()) / math.sqrt(float(keep.sum()))

    def _solve(self, factors: LevelFactors, rhs: Tensor, variance: Tensor, sigma: float) -> Tensor:
        """``(A V A^T + Sigma / b^2)^-1 rhs``, on the measured voxels alone where some are hidden.

        While V is wide and nothing is hidden, the stationary solve is a good preconditioner by
        itself. Once V is narrow, the different precisions of the voxels dominate; then the
        preconditioner is scaled by each voxel's precision, at the cost of a second product per
        iteration.
        """
        solver, noise = self.solver, factors.noise_variance
        spread = solver.mean_variance(factors)
        keep = self._keep()

        def size(r: Tensor) -> float:
            return self._size(r, variance)

        limits, who = self.limits, f"inner solve at sigma {sigma:.3g}"
        if keep is None and spread > WIDE * noise:
            u, iterations = split_conjugate_gradients(
                lambda r: solver.precondition(factors, r),
                variance - noise,
                rhs,
                residual_size=size,
                tolerance=limits.tolerance,
                max_iterations=limits.max_iterations,
                who=who,
            )
        else:
            scale = ((spread + noise) / (spread + variance)).sqrt()
            if keep is not None:
                scale, rhs = keep * scale, keep * rhs

            def apply(v: Tensor) -> Tensor:
                product = torch.addcmul(solver.covariance(factors, v), variance, v)
                return product if keep is None else keep * product

            u, iterations = conjugate_gradients(
                apply,
                rhs,
                precondition=lambda r: scale * solver.precondition(factors, scale * r),
                residual_size=size,
                tolerance=limits.tolerance,
                max_iterations=limits.max_iterations,
                who=who,
            )
        self.iterations.append(iterations)
        return u
